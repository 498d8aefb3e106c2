// Included after matmul_kernel.h: BFloat16Kernels of a CPU without products of bf16.
#pragma once

namespace rankwise::kernels::RW_ISA {

// What vdpbf16ps does whatever the mode: denormals are zeros on the way in and out.
class DenormalsAreZeros {
 public:
  DenormalsAreZeros() : saved_(_mm_getcsr()) {
    constexpr unsigned kFlushOut = 0x8000, kZeroIn = 0x0040;
    _mm_setcsr(saved_ | kFlushOut | kZeroIn);
  }
  DenormalsAreZeros(const DenormalsAreZeros&) = delete;
  DenormalsAreZeros& operator=(const DenormalsAreZeros&) = delete;
  ~DenormalsAreZeros() { _mm_setcsr(saved_); }

 private:
  const unsigned saved_;
};

// FloatToBFloat16 of number_formats.h.
inline float RoundToBFloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint32_t size = bits & 0x7fffffff;
  if (size > 0x7f800000) {
    bits |= 0x00400000;
  } else if (size < 0x00800000) {
    bits &= 0x80000000;
  } else {
    bits += 0x7fff + (bits >> 16 & 1);
  }
  bits &= 0xffff0000;
  std::memcpy(&x, &bits, sizeof(bits));
  return x;
}

inline void TileRounded(float* tiles, const float* x, const MatMulTask& task, int64_t begin, int64_t end) {
  TileRows(tiles, x, task, begin, end);
  for (int32_t t = 0; t < task.tile_count; ++t) {
    const int32_t row = TileBegin(task, t), rows = TileBegin(task, t + 1) - row;
    float* tile = tiles + row * task.n_in;
    for (int64_t i = begin * rows; i < end * rows; ++i) tile[i] = RoundToBFloat16(tile[i]);
  }
}

// The sums of chunks alone: their tree is finished by other ranks.
inline void RoundedMatMulPanel(const MatMulTask& task, int64_t panel, float* scratch) {
  const PlainPanel<BF16> weights(task, panel);
  SumTreeOfPanel(task, panel, scratch + kMatMulDepth * kPanelColumns, [&](int32_t chunk, float* sums) {
    const DenormalsAreZeros mode;
    SumChunk(task, weights, task.steps[chunk], task.steps[chunk + 1], sums, scratch);
  });
}

inline float RoundedBurst(int64_t iterations) { return FmaBurst(iterations * 2 * kPairChains / kFmaChains); }

inline constexpr BFloat16Kernels kBFloat16Table = {
    .name = kName,
    .is_in_pairs = false,
    .tile_rows = kTileRows,
    .tile_rows_of = TileRounded,
    .matmul_panel = RoundedMatMulPanel,
    .dot_burst = RoundedBurst,
};

}  // namespace rankwise::kernels::RW_ISA
