// Included after dot_avx512_vnni.h.
#pragma once

#include <cstdint>

#include "kernels/cpu/isa_kernels.h"

namespace rankwise::kernels::RW_ISA {

inline constexpr int kMatrixRows = 32;      // of a tile: two registers of sixteen
inline constexpr int kMatrixMostPairs = 8;  // of words, that one register holds of each column

// The eight matrix registers of AMX-INT8 as one product: a tile of up to 32 rows times 32 columns. Registers 0 to 3 sum
// [rows / 16, columns / 16], 4 and 5 hold rows of q, 6 and 7 columns of weights. They are given back with the object:
// registers in use slow down every switch of threads.
class MatrixRegisters {
 public:
  MatrixRegisters() = default;
  MatrixRegisters(const MatrixRegisters&) = delete;
  MatrixRegisters& operator=(const MatrixRegisters&) = delete;
  ~MatrixRegisters() {
    if (rows_ > 0) asm volatile("tilerelease" ::: "memory");
  }

  // Sums of `rows` rows, from 0, of AddProducts with `pairs` pairs each.
  void Begin(int rows, int pairs) {
    if (rows != rows_ || pairs != pairs_) SetShapes(rows, pairs);
    Zero<0>();
    Zero<1>();
    if (rows <= 16) return;
    Zero<2>();
    Zero<3>();
  }
  // Pairs of words x [rows, pairs, 2], rows `stride` words apart, times weights [pairs, 2, 32] of 0 to 255.
  void AddProducts(const uint32_t* x, int64_t stride, const uint32_t (*weights)[kPanelColumns]) {
    const auto x_bytes = stride * static_cast<int64_t>(sizeof(uint32_t));
    Load<4>(x, x_bytes);
    Load<6>(weights[0], sizeof(*weights));
    Multiply<0, 4, 6>();
    Load<7>(weights[0] + 16, sizeof(*weights));
    Multiply<1, 4, 7>();
    if (rows_ <= 16) return;
    Load<5>(x + 16 * stride, x_bytes);
    Multiply<2, 5, 6>();
    Multiply<3, 5, 7>();
  }
  // [rows, 32]
  void Store(int32_t (*dots)[kPanelColumns]) const {
    StoreOne<0>(dots[0]);
    StoreOne<1>(dots[0] + 16);
    if (rows_ <= 16) return;
    StoreOne<2>(dots[16]);
    StoreOne<3>(dots[16] + 16);
  }

  static int32_t Burst(int64_t iterations);

 private:
  struct alignas(64) Shapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };

  void SetShapes(int rows, int pairs) {
    Shapes shapes;
    const auto set = [&](int i, int row_count, int row_bytes) {
      shapes.rows[i] = static_cast<uint8_t>(row_count);
      shapes.row_bytes[i] = static_cast<uint16_t>(row_bytes);
    };
    constexpr int kWord = sizeof(uint32_t);
    for (int half = 0; half < 2; ++half) {
      const int row_count = half == 0 ? Smaller(rows, 16) : rows - 16;
      set(6 + half, 2 * pairs, 16 * kWord);
      if (row_count <= 0) continue;
      set(2 * half, row_count, 16 * kWord);
      set(2 * half + 1, row_count, 16 * kWord);
      set(4 + half, row_count, 2 * pairs * kWord);
    }
    asm volatile("ldtilecfg %0" ::"m"(shapes) : "memory");
    rows_ = rows;
    pairs_ = pairs;
  }

  // GCC 12's own intrinsics do not say that they read memory.
  template <int T>
  static void Load(const void* p, int64_t row_bytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(row_bytes), "i"(T) : "memory");
  }
  template <int T>
  static void StoreOne(int32_t* p) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(sizeof(int32_t[kPanelColumns])), "i"(T) : "memory");
  }
  template <int T>
  static void Zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(T));
  }
  // Of signed bytes times unsigned ones.
  template <int Sum, int A, int B>
  static void Multiply() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(A), "i"(B));
  }

  int rows_ = 0, pairs_ = 0;
};

// Matrix registers take whole bytes.
inline void WidenPairs(const Nibbles* from, int32_t pair_count, Bytes* to) {
  for (int32_t p = 0; p < pair_count; ++p) {
    for (int v = 0; v < 2; ++v) {
      const WordPair words = LoadPair(from + p, v);
      _mm512_storeu_si512(to[p].words[0] + v * 16, words.even);
      _mm512_storeu_si512(to[p].words[1] + v * 16, words.odd);
    }
  }
}

// As many pairs as a register holds, or fewer so that equal pieces make up the group.
inline int32_t PairsAtOnce(int32_t pair_count) {
  int32_t pairs = Smaller(pair_count, kMatrixMostPairs);
  while (pair_count % pairs != 0) --pairs;
  return pairs;
}

// Four products of 16 x 16 x 64 are as many operations as 256 / 3 iterations of IntegerKernels::dot_burst.
inline int32_t MatrixRegisters::Burst(int64_t iterations) {
  constexpr int64_t kProducts = 4 * 16 * 16 * 64, kOfIteration = 64 * kDotChains;
  alignas(64) uint32_t x[2][16][16] = {};
  alignas(64) uint32_t weights[16][kPanelColumns] = {};
  alignas(64) int32_t dots[kMatrixRows][kPanelColumns];
  MatrixRegisters registers;
  registers.Begin(kMatrixRows, kMatrixMostPairs);
  registers.AddProducts(x[0][0], 16, weights);
  for (int64_t n = 0; n < iterations * kOfIteration; n += kProducts) {
    Multiply<0, 4, 6>();
    Multiply<1, 4, 7>();
    Multiply<2, 5, 6>();
    Multiply<3, 5, 7>();
  }
  registers.Store(dots);
  return dots[0][0];
}

}  // namespace rankwise::kernels::RW_ISA
