// Included after simd.h.
#pragma once

#include "kernels/cpu/isa_kernels.h"

namespace rankwise::kernels::RW_ISA {

// y = x Wᵀ + bias for one panel of 32 output columns.
//   Each output is one fma chain per chunk from 0, in the order of the input columns; chunk sums add up in a balanced
//   binary tree; then the bias.
// Shapes   weights [n_in, 32] of W; x tiles [n_in, R] f32; y [row_count, n_out] f32
// Rounding |y - exact| <= (longest chunk + log2(chunks) + 1) 2^-24 (Σ_k |x w| + |bias|), up to second order
// Order    a lane is an output column, so neither the instruction set nor the number of rows can change it; cutting a
//          chunk into blocks stores and reloads the accumulators, which changes nothing either

// Bytes ahead of the loads of a panel that comes from memory: two pages' worth of a core's outstanding misses.
inline constexpr int kPrefetchBytes = 2048;

// k_count more steps of R rows and 16 V columns. Continues from `sums` [R, 32] when `continues`, else from 0.
template <typename Vector, typename W, int R, int V>
inline void FmaTile(const W* w, const float* x, int64_t k_count, bool continues, float* sums) {
  using Word = Words<Vector>;
  Vector acc[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) acc[r][v] = continues ? Word::Load(sums + r * kPanelColumns + v * 16) : Word::Zero();
  }
  for (int64_t k = 0; k < k_count; ++k) {
    const W* row = w + k * kPanelColumns;
    if constexpr (sizeof(W) == 2) _mm_prefetch(reinterpret_cast<const char*>(row) + kPrefetchBytes, _MM_HINT_T0);
    Vector weights[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) weights[v] = LoadAs<Vector>(row + v * 16);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vector a = Word::Set(x[k * R + r]);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) acc[r][v] = Fma(a, weights[v], acc[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) Store(sums + r * kPanelColumns + v * 16, acc[r][v]);
  }
}

template <typename W, int R>
void PanelTile(const W* w, const float* x, int64_t k_count, bool continues, float* sums) {
  if constexpr (sizeof(W) == 2 && R <= kPairTileRows) {
    FmaTile<Pair, W, R, 2>(w, x, k_count, continues, sums);
  } else if constexpr (2 * R <= kAccumulators) {
    FmaTile<Vec, W, R, 2>(w, x, k_count, continues, sums);
  } else {
    FmaTile<Vec, W, R, 1>(w, x, k_count, continues, sums);
    FmaTile<Vec, W, R, 1>(w + 16, x, k_count, continues, sums + 16);
  }
}

inline constexpr int kTileRows = kAccumulators >= 24 ? 12 : 6;

template <typename W>
using TileFunction = void (*)(const W*, const float*, int64_t, bool, float*);
template <typename W>
inline TileFunction<W> TileOf(int rows) {
  static constexpr TileFunction<W> kTiles[] = {PanelTile<W, 1>,
                                               PanelTile<W, 2>,
                                               PanelTile<W, 3>,
                                               PanelTile<W, 4>,
                                               PanelTile<W, 5>,
                                               PanelTile<W, 6>
#ifdef __AVX512F__
                                               ,
                                               PanelTile<W, 7>,
                                               PanelTile<W, 8>,
                                               PanelTile<W, 9>,
                                               PanelTile<W, 10>,
                                               PanelTile<W, 11>,
                                               PanelTile<W, 12>
#endif
  };
  return kTiles[rows - 1];
}

inline int32_t TileBegin(const MatMulTask& task, int32_t tile) {
  return static_cast<int32_t>(int64_t{task.row_count} * tile / task.tile_count);
}

// Input columns [begin, end) of all tiles: sums [row_count, 32] from 0.
template <typename W>
void SumChunk(const MatMulTask& task, const W* w, int64_t begin, int64_t end, float* sums, float* widened) {
  if (begin == end) std::memset(sums, 0, sizeof(float) * task.row_count * kPanelColumns);
  if (task.tile_count == 1) {
    TileOf<W>(task.row_count)(w + begin * kPanelColumns, task.x + begin * task.row_count, end - begin, false, sums);
    return;
  }
  for (int64_t k = begin; k < end; k += kMatMulDepth) {
    const int64_t depth = Smaller<int64_t>(kMatMulDepth, end - k);
    for (int64_t i = 0; i < depth * kPanelColumns; i += 16) Store(widened + i, Load(w + k * kPanelColumns + i));
    for (int32_t t = 0; t < task.tile_count; ++t) {
      const int32_t row = TileBegin(task, t), rows = TileBegin(task, t + 1) - row;
      const float* x = task.x + row * task.n_in + k * rows;
      TileOf<float>(rows)(widened, x, depth, k > begin, sums + row * kPanelColumns);
    }
  }
}

template <typename W>
void MatMulPanel(const MatMulTask& task, int64_t panel, float* scratch) {
  const W* w = static_cast<const W*>(task.weights) + panel * task.n_in * kPanelColumns;
  float* widened = scratch;
  float* stack = scratch + kMatMulDepth * kPanelColumns;
  const int64_t level = int64_t{task.row_count} * kPanelColumns;
  // A binary counter: after chunk c the stack holds one finished subtree for each bit set in c + 1.
  float* top = stack;
  for (int32_t c = 0; c < task.chunk_count; ++c, top += level) {
    SumChunk(task, w, task.boundaries[c], task.boundaries[c + 1], top, widened);
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

inline void TileRows(float* tiles, const float* x, const MatMulTask& task, int64_t begin, int64_t end) {
  for (int32_t t = 0; t < task.tile_count; ++t) {
    const int32_t row = TileBegin(task, t), rows = TileBegin(task, t + 1) - row;
    float* tile = tiles + row * task.n_in;
    const float* from = x + row * task.n_in;
    for (int64_t k = begin; k < end; ++k) {
      for (int32_t r = 0; r < rows; ++r) tile[k * rows + r] = from[r * task.n_in + k];
    }
  }
}

}  // namespace rankwise::kernels::RW_ISA
