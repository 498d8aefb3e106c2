// Included after simd.h.
#pragma once

#include "kernels/cpu/sum_tree.h"

namespace rankwise::kernels::RW_ISA {

// y = x Wᵀ + bias for one panel of 32 output columns.
//   Each output is one fma chain per chunk from 0, in the order of the input columns; chunk sums add up in a balanced
//   binary tree; then the bias.
// Shapes   weights [n_in, 32] of W; x tiles [n_in, R] f32; y [row_count, n_out] f32
// Rounding |y - exact| <= (longest chunk + log2(chunks) + 1) 2^-24 (Σ_k |x w| + |bias|), up to second order
// Order    a lane is an output column, so neither the instruction set nor the number of rows can change it; cutting a
//          chunk into blocks stores and reloads the accumulators, which changes nothing either

// k_count more steps of R rows and 16 V columns. Continues from `sums` [R, 32] when `continues`, else from 0.
template <typename Vector, typename W, int R, int V>
inline void FmaTile(const W* w, const float* x, int64_t k_count, bool continues, Ahead ahead, float* sums) {
  using Word = Words<Vector>;
  Vector acc[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) acc[r][v] = continues ? Word::Load(sums + r * kPanelColumns + v * 16) : Word::Zero();
  }
  for (int64_t k = 0; k < k_count; ++k) {
    const W* row = w + k * kPanelColumns;
#pragma GCC unroll 2
    for (size_t line = 0; line < sizeof(W) * V * 16; line += 64) _mm_prefetch(ahead.begin + line, _MM_HINT_T0);
    ahead.begin += ahead.bytes_per_step;
    decltype(LoadAs<Vector>(row)) weights[V];
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
void PanelTile(const W* w, const float* x, int64_t k_count, bool continues, Ahead ahead, float* sums) {
  if constexpr (sizeof(W) == 2 && R <= kPairTileRows) {
    FmaTile<Pair, W, R, 2>(w, x, k_count, continues, ahead, sums);
  } else if constexpr (2 * R <= kAccumulators) {
    FmaTile<Vec, W, R, 2>(w, x, k_count, continues, ahead, sums);
  } else {
    FmaTile<Vec, W, R, 1>(w, x, k_count, continues, ahead, sums);
    FmaTile<Vec, W, R, 1>(w + 16, x, k_count, continues, ahead, sums + 16);
  }
}

inline constexpr int kTileRows = kAccumulators >= 24 ? 12 : 6;

template <typename W>
inline void MultiplyTile(int rows, const W* w, const float* x, int64_t k_count, bool continues, Ahead ahead,
                         float* sums) {
  static constexpr void (*kTiles[])(const W*, const float*, int64_t, bool, Ahead, float*) = {PanelTile<W, 1>,
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
  kTiles[rows - 1](w, x, k_count, continues, ahead, sums);
}

// All steps of a panel that one tile reads, from 0. Few rows wait for memory, and the hardware's own prefetch does
// best; more compute, and it does not reach far enough ahead. Fractions of the fma peak, f16 weights from memory,
// without and with, Zen 4: 4 rows 0.76 and 0.80, 8 rows 0.85 and 0.90, 12 rows 0.82 and 0.94.
template <typename W>
inline void MultiplyOnce(int rows, const W* w, const float* x, int64_t k_count, float* sums) {
  const auto* own = reinterpret_cast<const char*>(w);
  const Ahead ahead = rows <= 3 ? Ahead{own, 0} : Ahead{own + 4096, sizeof(W) * kPanelColumns};
  MultiplyTile(rows, w, x, k_count, false, ahead, sums);
}

// One panel of weights as they are: [n_in, 32].
template <typename W>
class PlainPanel {
 public:
  PlainPanel(const MatMulTask& task, int64_t panel)
      : w_(reinterpret_cast<const W*>(task.weights + panel * task.panel_bytes)) {}
  // sums [rows, 32] = x [end - begin, rows] times input columns [begin, end), from 0.
  void Multiply(int rows, const float* x, int64_t begin, int64_t end, float* sums) const {
    MultiplyOnce(rows, w_ + begin * kPanelColumns, x, end - begin, sums);
  }
  // [end - begin, 32] as all tiles read them: f32, in `widened`.
  const float* Block(int64_t begin, int64_t end, float* widened) const {
    const W* w = w_ + begin * kPanelColumns;
    for (int64_t i = 0; i < (end - begin) * kPanelColumns; i += 16) Store(widened + i, Load(w + i));
    return widened;
  }
  // Where what belongs to input column k lies in memory.
  const char* At(int64_t k) const { return reinterpret_cast<const char*>(w_ + k * kPanelColumns); }

 private:
  const W* w_;
};

// The 32 scales of a group and -zero * scale: w = q * scale - zero * scale, without a rounding.
struct GroupParameters {
  Vec scale[2], shift[2];
};

// The stored values of one group: of four bits, words of eight input columns, [columns / 8, 32]; of eight,
// [columns, 32].
struct FourBits {
  uint32_t word;
};
inline constexpr int kColumnsPerWord = 8;

// Calls body(k, weights) for columns [k, k_end) of the group and output columns [16 v0, 16 (v0 + V)).
template <int V, typename Body>
[[gnu::always_inline]] inline void ForWeights(const U8* q, const GroupParameters& group, int v0, int64_t k,
                                              int64_t k_end, const Body& body) {
  for (; k < k_end; ++k) {
    const U8* row = q + k * kPanelColumns + v0 * 16;
    Vec weights[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) weights[v] = Fma(Load(row + v * 16), group.scale[v0 + v], group.shift[v0 + v]);
    body(k, weights);
  }
}
template <int V, typename Body>
[[gnu::always_inline]] inline void ForWeights(const FourBits* q, const GroupParameters& group, int v0, int64_t k,
                                              int64_t k_end, const Body& body) {
  NibbleWords words[V];
  const auto load = [&](int64_t at) __attribute__((always_inline)) {
    const FourBits* row = q + at / kColumnsPerWord * kPanelColumns + v0 * 16;
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) words[v] = LoadNibbleWords(row + v * 16);
  };
  const auto one = [&](int64_t at, auto nibble) __attribute__((always_inline)) {
    Vec weights[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) weights[v] = Fma(nibble(words[v]), group.scale[v0 + v], group.shift[v0 + v]);
    body(at, weights);
  };
  const auto some = [&](int64_t end) __attribute__((always_inline)) {
    for (; k < end; ++k) {
      load(k);
      one(k, [&](NibbleWords x) { return Nibble(x, static_cast<int>(k % kColumnsPerWord)); });
    }
  };
  some(Smaller(k_end, (k + kColumnsPerWord - 1) / kColumnsPerWord * kColumnsPerWord));
  for (; k + kColumnsPerWord <= k_end; k += kColumnsPerWord) {
    load(k);
    one(k, [](NibbleWords x) { return Nibble<0>(x); });
    one(k + 1, [](NibbleWords x) { return Nibble<1>(x); });
    one(k + 2, [](NibbleWords x) { return Nibble<2>(x); });
    one(k + 3, [](NibbleWords x) { return Nibble<3>(x); });
    one(k + 4, [](NibbleWords x) { return Nibble<4>(x); });
    one(k + 5, [](NibbleWords x) { return Nibble<5>(x); });
    one(k + 6, [](NibbleWords x) { return Nibble<6>(x); });
    one(k + 7, [](NibbleWords x) { return Nibble<7>(x); });
  }
  some(k_end);
}

// Columns [k, k_end) of one group for R rows and output columns [16 v0, 16 (v0 + V)); x [k_end - k, R].
template <typename Q, int R, int V>
inline void GroupTile(const Q* q, const GroupParameters& group, int v0, const float* x, int64_t k, int64_t k_end,
                      bool continues, float* sums) {
  Vec acc[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) acc[r][v] = continues ? Load(sums + r * kPanelColumns + (v0 + v) * 16) : Zero();
  }
  const int64_t first = k;
  ForWeights<V>(
      q, group, v0, k, k_end, [&](int64_t at, const Vec(&weights)[V]) __attribute__((always_inline)) {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const Vec a = Set(x[(at - first) * R + r]);
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v) acc[r][v] = Fma(a, weights[v], acc[r][v]);
        }
      });
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) Store(sums + r * kPanelColumns + (v0 + v) * 16, acc[r][v]);
  }
}

// Weights quantised in groups of input columns.
template <typename Q>
class GroupedPanel {
 public:
  GroupedPanel(const MatMulTask& task, int64_t panel) : task_(task), groups_(task.weights + panel * task.panel_bytes) {}

  void Multiply(int rows, const float* x, int64_t begin, int64_t end, float* sums) const {
    ForGroups(begin, end, [&](int64_t first, const Q* q, const GroupParameters& group, int64_t k, int64_t k_end) {
      TileFor(rows)(q, group, x + (k - begin) * rows, k - first, k_end - first, k > begin, sums);
    });
  }
  const float* Block(int64_t begin, int64_t end, float* widened) const {
    ForGroups(begin, end, [&](int64_t first, const Q* q, const GroupParameters& group, int64_t k, int64_t k_end) {
      float* out = widened + (first - begin) * kPanelColumns;
      ForWeights<2>(q, group, 0, k - first, k_end - first, [&](int64_t at, const Vec(&weights)[2]) {
        Store(out + at * kPanelColumns, weights[0]);
        Store(out + at * kPanelColumns + 16, weights[1]);
      });
    });
    return widened;
  }
  const char* At(int64_t k) const {
    const int64_t group = (k + task_.group_offset) / task_.group_size;
    const int64_t column = k - GroupBegin(group, task_.group_size, task_.group_offset);
    constexpr int kBits = std::is_same_v<Q, FourBits> ? 4 : 8;
    return reinterpret_cast<const char*>(groups_) + group * task_.group_bytes + kGroupHeaderBytes +
           column * kBits * kPanelColumns / 8;
  }

 private:
  using Tile = void (*)(const Q*, const GroupParameters&, const float*, int64_t, int64_t, bool, float*);
  template <int R>
  static void TileOfRows(const Q* q, const GroupParameters& group, const float* x, int64_t k, int64_t k_end,
                         bool continues, float* sums) {
    if constexpr (2 * R <= kAccumulators) {
      GroupTile<Q, R, 2>(q, group, 0, x, k, k_end, continues, sums);
    } else {
      GroupTile<Q, R, 1>(q, group, 0, x, k, k_end, continues, sums);
      GroupTile<Q, R, 1>(q, group, 1, x, k, k_end, continues, sums);
    }
  }
  static Tile TileFor(int rows) {
    static constexpr Tile kTiles[] = {TileOfRows<1>,
                                      TileOfRows<2>,
                                      TileOfRows<3>,
                                      TileOfRows<4>,
                                      TileOfRows<5>,
                                      TileOfRows<6>
#ifdef __AVX512F__
                                      ,
                                      TileOfRows<7>,
                                      TileOfRows<8>,
                                      TileOfRows<9>,
                                      TileOfRows<10>,
                                      TileOfRows<11>,
                                      TileOfRows<12>
#endif
    };
    return kTiles[rows - 1];
  }

  // Calls body(first column, q, parameters, begin, end) for the part of each group in [begin, end).
  template <typename Body>
  void ForGroups(int64_t begin, int64_t end, Body&& body) const {
    while (begin < end) {
      const int64_t group = (begin + task_.group_offset) / task_.group_size;
      const int64_t next = Smaller<int64_t>(end, (group + 1) * task_.group_size - task_.group_offset);
      const std::byte* stored = groups_ + group * task_.group_bytes;
      const auto* scales = reinterpret_cast<const uint16_t*>(stored);
      const auto* zeros = reinterpret_cast<const U8*>(scales + kPanelColumns);
      GroupParameters parameters;
      for (int v = 0; v < 2; ++v) {
        parameters.scale[v] = LoadF16(scales + v * 16);
        parameters.shift[v] = Negate(Mul(Load(zeros + v * 16), parameters.scale[v]));
      }
      body(GroupBegin(group, task_.group_size, task_.group_offset),
           reinterpret_cast<const Q*>(stored + kGroupHeaderBytes), parameters, begin, next);
      begin = next;
    }
  }

  const MatMulTask& task_;
  const std::byte* groups_;
};

// Steps [begin, end) of all tiles: sums [row_count, 32] from 0.
template <typename Panel>
void SumChunk(const MatMulTask& task, const Panel& panel, int64_t begin, int64_t end, float* sums, float* widened) {
  if (begin == end) std::memset(sums, 0, sizeof(float) * task.row_count * kPanelColumns);
  if (task.tile_count == 1) {
    panel.Multiply(task.row_count, task.x + begin * task.row_count, begin, end, sums);
    return;
  }
  for (int64_t k = begin; k < end; k += kMatMulDepth) {
    const int64_t depth = Smaller<int64_t>(kMatMulDepth, end - k);
    const auto* weights = panel.Block(k, k + depth, widened);
    for (int32_t t = 0; t < task.tile_count; ++t) {
      const int32_t row = TileBegin(task, t), rows = TileBegin(task, t + 1) - row;
      const float* x = task.x + row * task.steps[task.chunk_count] + k * rows;
      // Each tile fetches its share of the next block.
      const char* next = panel.At(k + depth);
      const int64_t next_bytes = panel.At(k + 2 * depth) - next;
      const Ahead ahead = {next + next_bytes * t / task.tile_count, next_bytes / depth / task.tile_count};
      MultiplyTile(rows, weights, x, depth, k > begin, ahead, sums + row * kPanelColumns);
    }
  }
}

template <typename Panel>
void MatMulPanel(const MatMulTask& task, int64_t panel, float* scratch) {
  const Panel weights(task, panel);
  SumTreeOfPanel(task, panel, scratch + kMatMulDepth * kPanelColumns, [&](int32_t chunk, float* sums) {
    SumChunk(task, weights, task.steps[chunk], task.steps[chunk + 1], sums, scratch);
  });
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
