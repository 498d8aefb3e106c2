// Included after simd.h.
#pragma once

#include "kernels/cpu/isa_kernels.h"

namespace rankwise::kernels::RW_ISA {

inline int32_t TileBegin(const MatMulTask& task, int32_t tile) {
  return static_cast<int32_t>(int64_t{task.row_count} * tile / task.tile_count);
}

// What each step of a tile fetches, for later tiles or steps.
struct Ahead {
  const char* begin;
  int64_t bytes_per_step;
};

// y of one panel of 32 output columns: sum_chunk(chunk, sums) leaves a chunk's sums [row_count, 32], which are added in
// a balanced binary tree; then the bias. `stack` has room for kSumLevels times those sums.
template <typename SumChunk>
inline void SumTreeOfPanel(const MatMulTask& task, int64_t panel, float* stack, const SumChunk& sum_chunk) {
  const int64_t level = int64_t{task.row_count} * kPanelColumns;
  // A binary counter: after chunk c the stack holds one finished subtree for each bit set in c + 1.
  float* top = stack;
  for (int32_t c = 0; c < task.chunk_count; ++c, top += level) {
    sum_chunk(c, top);
    for (int32_t bits = c; bits & 1; bits >>= 1, top -= level) {
      for (int64_t i = 0; i < level; i += 16) Store(top - level + i, Add(Load(top - level + i), Load(top + i)));
    }
  }
  const int64_t first = panel * kPanelColumns;
  for (int v = 0; v < 2; ++v) {
    const int64_t column = first + v * 16;
    const int count = static_cast<int>(Smaller<int64_t>(16, task.n_out - column));
    if (count <= 0) break;
    const Vec bias = task.bias ? LoadFirst(task.bias + column, count) : Zero();
    for (int32_t r = 0; r < task.row_count; ++r) {
      const Vec sum = Load(stack + r * kPanelColumns + v * 16);
      StoreFirst(task.y + r * task.n_out + column, task.bias ? Add(sum, bias) : sum, count);
    }
  }
}

}  // namespace rankwise::kernels::RW_ISA
