#pragma once

#include <cmath>

#include "kernels/cuda/device.h"
#include "kernels/cuda/kv_layout.h"
#include "kernels/cuda/numbers.h"

// The cache's values as operands of MultiplyTerms: what a lane loads, and the bf16 terms of it. Integers of eight bits
// are one term; f16 is two, f32 three.
//   K: a lane holds dims 16 t + 4 i + {0 .. 3} of one token and a slab of 64, for steps i = 0 .. 3
//   V: tokens 4 t + {0 .. 3} of dims 8 n + g of a slab of 32, for n = 0 .. 3
// VTerms tells whether all values were finite; others it replaces with 0.
namespace rankwise::kernels::cuda {

// Four bytes, none above 2^8 - 1, minus `offset`, as pairs of bf16.
__device__ inline void BytesToPairs(uint32_t bytes, float offset, uint32_t (&terms)[1][2]) {
  float x[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = __uint_as_float(__byte_perm(bytes, 0x4b000000, 0x7440 + i)) - offset;
  terms[0][0] = __byte_perm(__float_as_uint(x[0]), __float_as_uint(x[1]), 0x7632);
  terms[0][1] = __byte_perm(__float_as_uint(x[2]), __float_as_uint(x[3]), 0x7632);
}

__device__ inline bool MakeFinite(float& x) {
  if (fabsf(x) < INFINITY) return true;
  x = 0;
  return false;
}

template <int kTerms>
__device__ inline void QuadToPairs(const float4& x, uint32_t (&terms)[kTerms][2]) {
  uint32_t first[kTerms], second[kTerms];
  SplitPair(x.x, x.y, first);
  SplitPair(x.z, x.w, second);
#pragma unroll
  for (int i = 0; i < kTerms; ++i) {
    terms[i][0] = first[i];
    terms[i][1] = second[i];
  }
}

// Words of 16 bytes, as many as 16 values have.
template <int kCount>
struct Words16 {
  uint4 words[kCount];
  __device__ uint32_t at(int i) const {
    const uint4& w = words[i / 4];
    return i % 4 == 0 ? w.x : i % 4 == 1 ? w.y : i % 4 == 2 ? w.z : w.w;
  }
};

// What formats of whole bytes share: 16 values of kBits.
template <int kBits>
struct ByteFragments {
  static constexpr int kLoads = kBits / 8;
  using KWords = Words16<kLoads>;
  using VWords = Words16<kLoads>;
  // `dim` is a multiple of 16; past the row's padding all is zero.
  __device__ static void LoadK(const unsigned char* tile, int head_dim, int token, int dim, KWords& k) {
    const int64_t row = RoundUp(head_dim, 16);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      k.words[i] = dim < row ? Load16(tile + (token * row + dim) * (kBits / 8) + i * 16) : uint4{0, 0, 0, 0};
    }
  }
  __device__ static void LoadV(const unsigned char* tile, int slab, int lane, VWords& v) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) v.words[i] = Load16(tile + ((slab * kLoads + i) * 32 + lane) * 16);
  }
};

template <KvElement kFormat>
struct KvFragments;

template <>
struct KvFragments<KvElement::kF32> : ByteFragments<32> {
  static constexpr int kTerms = 3;
  static constexpr bool kHasInfinities = true;
  __device__ static float4 Quad(const Words16<4>& words, int i) {
    return {__uint_as_float(words.at(i * 4)), __uint_as_float(words.at(i * 4 + 1)),
            __uint_as_float(words.at(i * 4 + 2)), __uint_as_float(words.at(i * 4 + 3))};
  }
  __device__ static void KTerms(const KWords& k, int i, uint32_t (&terms)[3][2]) { QuadToPairs(Quad(k, i), terms); }
  __device__ static bool VTerms(const VWords& v, int n, uint32_t (&terms)[3][2]) {
    float4 x = Quad(v, n);
    const bool is_finite = MakeFinite(x.x) & MakeFinite(x.y) & MakeFinite(x.z) & MakeFinite(x.w);
    QuadToPairs(x, terms);
    return is_finite;
  }
  __device__ static float Value(const unsigned char* tile, int token, int dim) {
    return *reinterpret_cast<const float*>(tile + VBit(KvElement::kF32, token, dim) / 8);
  }
};

template <>
struct KvFragments<KvElement::kF16> : ByteFragments<16> {
  static constexpr int kTerms = 2;
  static constexpr bool kHasInfinities = true;
  __device__ static float4 Quad(const Words16<2>& words, int i) {
    const uint32_t a = words.at(i * 2), b = words.at(i * 2 + 1);
    return {HalfToFloat(static_cast<uint16_t>(a)), HalfToFloat(static_cast<uint16_t>(a >> 16)),
            HalfToFloat(static_cast<uint16_t>(b)), HalfToFloat(static_cast<uint16_t>(b >> 16))};
  }
  __device__ static void KTerms(const KWords& k, int i, uint32_t (&terms)[2][2]) { QuadToPairs(Quad(k, i), terms); }
  __device__ static bool VTerms(const VWords& v, int n, uint32_t (&terms)[2][2]) {
    float4 x = Quad(v, n);
    const bool is_finite = MakeFinite(x.x) & MakeFinite(x.y) & MakeFinite(x.z) & MakeFinite(x.w);
    QuadToPairs(x, terms);
    return is_finite;
  }
  __device__ static float Value(const unsigned char* tile, int token, int dim) {
    return HalfToFloat(*reinterpret_cast<const uint16_t*>(tile + VBit(KvElement::kF16, token, dim) / 8));
  }
};

// Integers are always finite.
struct IntegerFragments {
  static constexpr int kTerms = 1;
  static constexpr bool kHasInfinities = false;
  __device__ static float Value(const unsigned char*, int, int) { return 0; }
};

template <>
struct KvFragments<KvElement::kInt8> : ByteFragments<8>, IntegerFragments {
  __device__ static void KTerms(const KWords& k, int i, uint32_t (&terms)[1][2]) {
    BytesToPairs(k.at(i) ^ 0x80808080, 8388608.0f + 128.0f, terms);
  }
  __device__ static bool VTerms(const VWords& v, int n, uint32_t (&terms)[1][2]) {
    KTerms(v, n, terms);
    return true;
  }
};

template <>
struct KvFragments<KvElement::kInt8Online> : ByteFragments<8>, IntegerFragments {
  __device__ static void KTerms(const KWords& k, int i, uint32_t (&terms)[1][2]) {
    BytesToPairs(k.at(i), 8388608.0f, terms);
  }
  __device__ static bool VTerms(const VWords& v, int n, uint32_t (&terms)[1][2]) {
    KTerms(v, n, terms);
    return true;
  }
};

template <>
struct KvFragments<KvElement::kInt4Online> : IntegerFragments {
  using KWords = uint2;
  using VWords = uint2;
  __device__ static void LoadK(const unsigned char* tile, int head_dim, int token, int dim, KWords& k) {
    const int64_t row = RoundUp(head_dim, 16);
    k = dim < row ? Load8(tile + (token * row + dim) / 2) : uint2{0, 0};
  }
  __device__ static void LoadV(const unsigned char* tile, int slab, int lane, VWords& v) {
    v = Load8(tile + (slab * 32 + lane) * 8);
  }
  // Nibbles 4 i .. 4 i + 3 as bytes.
  __device__ static void KTerms(const KWords& k, int i, uint32_t (&terms)[1][2]) {
    const uint32_t nibbles = (i < 2 ? k.x : k.y) >> (i % 2 * 16);
    const uint32_t even = nibbles & 0x0f0f, odd = nibbles >> 4 & 0x0f0f;
    BytesToPairs(__byte_perm(even, odd, 0x5140), 8388608.0f, terms);
  }
  // The low or high nibbles of four bytes.
  __device__ static bool VTerms(const VWords& v, int n, uint32_t (&terms)[1][2]) {
    BytesToPairs((n < 2 ? v.x : v.y) >> (n % 2 * 4) & 0x0f0f0f0f, 8388608.0f, terms);
    return true;
  }
};

}  // namespace rankwise::kernels::cuda
