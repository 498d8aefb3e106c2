// Included after pairs_avx512_bf16.h and matmul_kernel.h: BFloat16Kernels in pairs.
#pragma once

namespace rankwise::kernels::RW_ISA {

inline void TilePairs(float* tiles, const float* x, const MatMulTask& task, int64_t begin, int64_t end) {
  constexpr int kSteps = 16;
  alignas(64) uint32_t words[kSteps];
  for (int32_t t = 0; t < task.tile_count; ++t) {
    const int32_t row = TileBegin(task, t), rows = TileBegin(task, t + 1) - row;
    float* tile = tiles + row * task.steps[task.chunk_count];
    for (int32_t r = 0; r < rows; ++r) {
      const float* from = x + (row + r) * task.n_in;
      for (int32_t c = 0; c < task.chunk_count; ++c) {
        const int64_t first = Larger(begin, task.steps[c]), last = Smaller(end, task.steps[c + 1]);
        for (int64_t step = first; step < last; step += kSteps) {
          const int64_t k = task.boundaries[c] + 2 * (step - task.steps[c]);
          PairColumns(from + k, static_cast<int>(Smaller<int64_t>(2 * kSteps, task.boundaries[c + 1] - k)), words);
          const auto count = static_cast<int>(Smaller<int64_t>(kSteps, last - step));
          for (int i = 0; i < count; ++i) std::memcpy(tile + (step + i) * rows + r, words + i, sizeof(uint32_t));
        }
      }
    }
  }
}

// Panels of words, which all tiles read where they lie.
class PairedPanel {
 public:
  PairedPanel(const MatMulTask& task, int64_t panel)
      : w_(reinterpret_cast<const BF16Pair*>(task.weights + panel * task.panel_bytes)) {}
  void Multiply(int rows, const float* x, int64_t begin, int64_t end, float* sums) const {
    MultiplyOnce(rows, w_ + begin * kPanelColumns, x, end - begin, sums);
  }
  const BF16Pair* Block(int64_t begin, int64_t, float*) const { return w_ + begin * kPanelColumns; }
  const char* At(int64_t step) const { return reinterpret_cast<const char*>(w_ + step * kPanelColumns); }

 private:
  const BF16Pair* w_;
};

inline constexpr BFloat16Kernels kBFloat16Table = {
    .name = "avx512-bf16",
    .is_in_pairs = true,
    .tile_rows = kTileRows,
    .tile_rows_of = TilePairs,
    .matmul_panel = MatMulPanel<PairedPanel>,
    .dot_burst = DotBurst,
};

}  // namespace rankwise::kernels::RW_ISA
