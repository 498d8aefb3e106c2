// Included after simd.h.
#pragma once

#include "kernels/cpu/isa_kernels.h"

namespace rankwise::kernels::RW_ISA {

// Attention of consecutive rows of one request over the blocks of one KV head, 512 positions ("a split") at a time.
//   s[t] = ((q * k_scale) · k[t]) * score_scale   (f32 and f16: scale 1, zero 0); k's zero point would add the same to
//   all a split keeps m = max s, l = Σ exp(s - m), o = Σ exp(s - m) v[t]; splits merge in the order of positions out =
//   o / l * v_scale + v_zero_point
// Online formats have scales and zeros of each position:
//   s[t] = (q · k[t]) * (k_scale[t] * score_scale) + k_zero[t] * (Σq * score_scale)
//   z = Σ exp(s - m) v_zero[t], o = Σ (exp(s - m) v_scale[t]) v[t], out = (o + z) / l
// Shapes   a vector is one (row, query head); q [vectors, head_dim]; K block [head_dim, 16], V block [16, padded_dim]
// of T Order    q · k: one fma chain over dims, a lane per position. l: sixteen chains over positions mod 16, then
// SumLanes.
//          z like l. o: one fma chain over positions, a lane per dim. All from 0 in each split, and splits start at
//          multiples of 512 whatever the row: a vector's bits depend on its row and context only.
// Rounding S = max_t |s[t]|' where ' sums absolute values (Σ_d |q k_stored k_scale|, + |k_zero| Σ|q| when online) *
// score_scale;
//          e = 2 (head_dim + 8) 2^-24 S + 2^-22 is the relative error of one weight; n = positions, V = max |v| or, for
//          quantised, max |v_q| v_scale + |v_zero_point|: |out - exact| <= (2 e + (2 min(n, 512) + 8 splits + 8) 2^-24)
//          V
// Garbage  positions outside a vector's window are never summed: their scores are replaced, their V is not read

inline constexpr int kVectorsAtOnce = kAccumulators >= 24 ? 8 : 4;
inline constexpr int kSums = kAccumulators >= 24 ? 16 : 4;

// The softmax state of `count` vectors.
struct State {
  float *max, *sum, *zeros, *values;  // [count] each, [count, padded_dim]
  State(float* floats, int64_t count)
      : max(floats), sum(floats + count), zeros(floats + 2 * count), values(floats + 3 * count) {}
};

struct Range {
  int32_t begin, end;
  bool empty() const { return begin >= end; }
};
inline Range Intersect(Range a, Range b) { return {Larger(a.begin, b.begin), Smaller(a.end, b.end)}; }

inline const OnlineBlock& OnlineOf(const AttentionTile& tile, int32_t block) {
  return *reinterpret_cast<const OnlineBlock*>(tile.blocks + tile.block_table[block] * tile.block_bytes +
                                               tile.online_offset);
}
inline Vec Load(const uint16_t (&halves)[kKvBlockTokens]) { return LoadF16(halves); }

// The positions row `row` of the tile attends, of those in `split`.
inline Range RowRange(const AttentionTask& task, const AttentionTile& tile, int32_t row, int32_t split) {
  const int32_t end = tile.first_position + row + 1;
  const int32_t begin = task.sliding_window > 0 ? Larger(0, end - task.sliding_window) : 0;
  return Intersect({begin, end}, {split * kSplitTokens, (split + 1) * kSplitTokens});
}

template <typename T>
inline const T* KeysOf(const AttentionTile& tile, int32_t block) {
  return reinterpret_cast<const T*>(tile.blocks + tile.block_table[block] * tile.block_bytes);
}
template <typename T>
inline const T* ValuesOf(const AttentionTile& tile, int32_t block) {
  return reinterpret_cast<const T*>(tile.blocks + tile.block_table[block] * tile.block_bytes + tile.v_offset);
}

// Blocks whose K and V are fetched into the second cache while others are multiplied, a line with every other dim: all
// at once they would only wait in a queue.
struct BlocksAhead {
  const char* const* blocks;
  int64_t bytes_per_dim;
};

// q · k of M vectors and B blocks. q [head_dim, M]; scores of vector m and block b at scores + m * kScoreStride + b
// * 16.
template <typename T, int M, int B>
inline void Score(const T* const* keys, const BlocksAhead& ahead, const float* q, int32_t head_dim, float* scores) {
  Vec acc[M][B];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) acc[m][b] = Zero();
  }
  for (int32_t d = 0; d < head_dim; ++d) {
    Vec k[B];
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) {
      k[b] = Load(At(keys[b], d * kKvBlockTokens));
      if (d % 2 == 0) _mm_prefetch(ahead.blocks[b] + d * ahead.bytes_per_dim, _MM_HINT_T1);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vec broadcast = Set(q[d * M + m]);
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) acc[m][b] = Fma(broadcast, k[b], acc[m][b]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) Store(scores + m * kScoreStride + b * kKvBlockTokens, acc[m][b]);
  }
}

// M vectors and up to four consecutive blocks. Few vectors take several blocks at once to keep enough chains in flight.
template <typename T, int M>
void ScoreBlocks(const T* const* keys, int32_t count, BlocksAhead ahead, const float* q, int32_t head_dim,
                 float* scores) {
  constexpr int kBlocks = Smaller(4, Larger(1, kSums / M));
  int32_t b = 0;
  for (; b + kBlocks <= count; b += kBlocks, ahead.blocks += kBlocks) {
    Score<T, M, kBlocks>(keys + b, ahead, q, head_dim, scores + b * kKvBlockTokens);
  }
  for (; b < count; ++b, ++ahead.blocks) Score<T, M, 1>(keys + b, ahead, q, head_dim, scores + b * kKvBlockTokens);
}

// values [M, 16 D] += Σ_t p[m][t] v[t] for positions in `range`; p of position t at weights[m * kScoreStride + t -
// origin].
template <typename T, int M, int D>
inline void SumValues(const AttentionTask& task, const AttentionTile& tile, Range range, int32_t origin,
                      const float* weights, int64_t dim, float* values) {
  Vec acc[M][D];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int d = 0; d < D; ++d) acc[m][d] = Load(values + m * task.padded_dim + dim + d * 16);
  }
  for (int32_t t = range.begin; t < range.end;) {
    const int32_t block = t / kKvBlockTokens;
    const T* v = At(ValuesOf<T>(tile, block), int64_t{t % kKvBlockTokens} * task.padded_dim + dim);
    const int32_t end = Smaller(range.end, (block + 1) * kKvBlockTokens);
    for (; t < end; ++t, v = At(v, task.padded_dim)) {
      Vec row[D];
#pragma GCC unroll 4
      for (int d = 0; d < D; ++d) row[d] = Load(At(v, d * 16));
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const Vec p = Set(weights[m * kScoreStride + t - origin]);
#pragma GCC unroll 4
        for (int d = 0; d < D; ++d) acc[m][d] = Fma(p, row[d], acc[m][d]);
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int d = 0; d < D; ++d) Store(values + m * task.padded_dim + dim + d * 16, acc[m][d]);
  }
}

template <typename T, int M>
void SumAllValues(const AttentionTask& task, const AttentionTile& tile, Range range, int32_t origin,
                  const float* weights, float* values) {
  constexpr int kDims = Smaller(4, kSums / M);
  if (range.empty()) return;
  int64_t dim = 0;
  for (; dim + kDims * 16 <= task.padded_dim; dim += kDims * 16) {
    SumValues<T, M, kDims>(task, tile, range, origin, weights, dim, values);
  }
  for (; dim < task.padded_dim; dim += 16) SumValues<T, M, 1>(task, tile, range, origin, weights, dim, values);
}

// Calls body(first, std::integral_constant-like M) over [0, count) in runs of 8 (AVX-512), 4, 2, 1 vectors.
template <int M>
struct Run {
  static constexpr int kCount = M;
};
template <typename Body>
inline void ForRuns(int32_t count, Body&& body) {
  int32_t i = 0;
  if constexpr (kVectorsAtOnce == 8) {
    for (; i + 8 <= count; i += 8) body(i, Run<8>());
  }
  for (; i + 4 <= count; i += 4) body(i, Run<4>());
  if (i + 2 <= count) {
    body(i, Run<2>());
    i += 2;
  }
  if (i < count) body(i, Run<1>());
}

// What the passes over one split share.
struct Split {
  const AttentionTask& task;
  const AttentionTile& tile;
  int32_t index;
  int32_t vectors;
  float* scores;  // [vectors, kScoreStride]; slot i is position index * kSplitTokens + i

  int32_t origin() const { return index * kSplitTokens; }
  Range RangeOf(int32_t vector) const { return RowRange(task, tile, vector / task.group, index); }
  const float* QueryOf(int32_t vector) const {
    return task.qkv + (tile.row_begin + vector / task.group) * task.qkv_stride +
           (tile.kv_head * task.group + vector % task.group) * int64_t{task.head_dim};
  }
};

// q of each run of vectors as [head_dim, M], one run after the other, times the scales of K where they are static.
template <typename T>
void TransposeQueries(const Split& split, float* q) {
  ForRuns(split.vectors, [&](int32_t first, auto run) {
    constexpr int M = run.kCount;
    float* to = q + int64_t{first} * split.task.head_dim;
    for (int m = 0; m < M; ++m) {
      const float* from = split.QueryOf(first + m);
      for (int32_t d = 0; d < split.task.head_dim; ++d) {
        to[d * M + m] = kIsStatic<T> ? from[d] * split.tile.scales.k_scale[d] : from[d];
      }
    }
  });
}

template <typename T>
void ScoreSplit(const Split& split, Range positions, const float* q) {
  const int32_t block_end = (positions.end - 1) / kKvBlockTokens + 1;
  const int32_t last = (split.tile.first_position + split.tile.row_count - 1) / kKvBlockTokens;
  for (int32_t block = positions.begin / kKvBlockTokens; block < block_end; block += 4) {
    const int32_t count = Smaller(4, block_end - block);
    const T* keys[4];
    const char* next[4];
    for (int32_t b = 0; b < count; ++b) {
      keys[b] = KeysOf<T>(split.tile, block + b);
      next[b] = reinterpret_cast<const char*>(KeysOf<T>(split.tile, Smaller(block + b + 4, last)));
    }
    const BlocksAhead ahead = {next, split.tile.block_bytes / split.task.head_dim};
    ForRuns(split.vectors, [&](int32_t first, auto run) {
      ScoreBlocks<T, run.kCount>(
          keys, count, ahead, q + int64_t{first} * split.task.head_dim, split.task.head_dim,
          split.scores + int64_t{first} * kScoreStride + block * kKvBlockTokens - split.origin());
    });
  }
}

// s = dot * factor + offset of a score; online formats multiply both with the position's scale and zero.
struct Fold {
  float factor, offset;
};
template <typename T>
inline Fold FoldOf(const Split& split, int32_t vector) {
  if constexpr (!kIsOnline<T>) return {split.task.score_scale, 0.0f};
  const float* q = split.QueryOf(vector);
  Vec sum = Zero();
  for (int32_t d = 0; d < split.task.head_dim; d += 16) {
    sum = Add(sum, LoadFirst(q + d, Smaller(16, split.task.head_dim - d)));
  }
  return {split.task.score_scale, SumLanes(sum) * split.task.score_scale};
}

// Turns a vector's scores into the weights of its values, and sets max, sum and zeros.
template <typename T>
void Softmax(const Split& split, int32_t vector, Fold fold, State state) {
  const Range range = split.RangeOf(vector);
  if (range.empty()) {
    state.max[vector] = state.sum[vector] = state.zeros[vector] = 0;
    return;
  }
  float* scores = split.scores + int64_t{vector} * kScoreStride - split.origin();
  const Vec factor = Set(fold.factor), offset = Set(fold.offset), nothing = Set(-__builtin_inff());
  const int32_t first = range.begin / kKvBlockTokens * kKvBlockTokens;
  Vec max = nothing;
  for (int32_t t = first; t < range.end; t += kKvBlockTokens) {
    Vec s;
    if constexpr (kIsOnline<T>) {
      const OnlineBlock& online = OnlineOf(split.tile, t / kKvBlockTokens);
      s = Fma(Load(scores + t), Mul(Load(online.k_scale), factor), Mul(Load(online.k_zero), offset));
    } else {
      s = Fma(Load(scores + t), factor, offset);
    }
    if (t < range.begin || t + kKvBlockTokens > range.end) {
      s = Select(Lanes(Larger(0, range.begin - t), Smaller(kKvBlockTokens, range.end - t)), s, nothing);
    }
    Store(scores + t, s);
    max = Max(max, s);
  }
  state.max[vector] = MaxLane(max);
  const Vec shift = Set(-state.max[vector]);
  Vec sum = Zero(), zeros = Zero();
  for (int32_t t = first; t < range.end; t += kKvBlockTokens) {
    Vec p = Exp(Add(Load(scores + t), shift));
    sum = Add(sum, p);
    if constexpr (kIsOnline<T>) {
      const OnlineBlock& online = OnlineOf(split.tile, t / kKvBlockTokens);
      zeros = Fma(p, Load(online.v_zero), zeros);
      p = Mul(p, Load(online.v_scale));
    }
    Store(scores + t, p);
  }
  state.sum[vector] = SumLanes(sum);
  state.zeros[vector] = SumLanes(zeros);
}

// Values of one run of vectors. Rows of a run differ in their windows: what all attend is summed together, the ragged
// ends before and after by each vector alone, all in the order of positions.
template <typename T, int M>
void SumRun(const Split& split, int32_t first, float* values) {
  const AttentionTask& task = split.task;
  const float* weights = split.scores + int64_t{first} * kScoreStride;
  float* sums = values + int64_t{first} * task.padded_dim;
  Range common = split.RangeOf(first);
  for (int m = 1; m < M; ++m) common = Intersect(common, split.RangeOf(first + m));
  const auto alone = [&](int m, Range range) {
    SumAllValues<T, 1>(task, split.tile, range, split.origin(), weights + m * kScoreStride, sums + m * task.padded_dim);
  };
  if (common.empty()) {
    for (int m = 0; m < M; ++m) alone(m, split.RangeOf(first + m));
    return;
  }
  for (int m = 0; m < M; ++m) alone(m, {split.RangeOf(first + m).begin, common.begin});
  SumAllValues<T, M>(task, split.tile, common, split.origin(), weights, sums);
  for (int m = 0; m < M; ++m) alone(m, {common.end, split.RangeOf(first + m).end});
}

template <typename T>
void AttendSplit(const AttentionTask& task, const AttentionTile& tile, int32_t index, float* state_floats,
                 float* scratch) {
  const int32_t vectors = tile.row_count * task.group;
  const Split split{task, tile, index, vectors, scratch};
  const State state(state_floats, vectors);
  std::memset(state.values, 0, sizeof(float) * vectors * task.padded_dim);
  float* q = scratch + int64_t{vectors} * kScoreStride;
  const Range positions{RowRange(task, tile, 0, index).begin, RowRange(task, tile, tile.row_count - 1, index).end};
  if (!positions.empty()) {
    TransposeQueries<T>(split, q);
    ScoreSplit<T>(split, positions, q);
  }
  for (int32_t v = 0; v < vectors; ++v) Softmax<T>(split, v, FoldOf<T>(split, v), state);
  ForRuns(vectors, [&](int32_t first, auto run) { SumRun<T, run.kCount>(split, first, state.values); });
}

inline void MergeSplit(int64_t vectors, int64_t padded_dim, float* state_floats, const float* split_floats) {
  const State state(state_floats, vectors), split(const_cast<float*>(split_floats), vectors);
  for (int64_t v = 0; v < vectors; ++v) {
    if (split.sum[v] == 0) continue;
    const bool is_first = state.sum[v] == 0;
    const float max = is_first || state.max[v] < split.max[v] ? split.max[v] : state.max[v];
    const float keep = is_first ? 0.0f : Exp(state.max[v] - max), gain = is_first ? 1.0f : Exp(split.max[v] - max);
    state.max[v] = max;
    state.sum[v] = __builtin_fmaf(split.sum[v], gain, state.sum[v] * keep);
    state.zeros[v] = __builtin_fmaf(split.zeros[v], gain, state.zeros[v] * keep);
    for (int64_t d = v * padded_dim; d < (v + 1) * padded_dim; d += 16) {
      Store(state.values + d, Fma(Load(split.values + d), Set(gain), Mul(Load(state.values + d), Set(keep))));
    }
  }
}

template <typename T>
void FinishAttention(const AttentionTask& task, const AttentionTile& tile, const float* state_floats) {
  const int32_t vectors = tile.row_count * task.group;
  const State state(const_cast<float*>(state_floats), vectors);
  for (int32_t v = 0; v < vectors; ++v) {
    float* out = task.out + (tile.row_begin + v / task.group) * task.out_stride +
                 (tile.kv_head * task.group + v % task.group) * int64_t{task.head_dim};
    const float* values = state.values + int64_t{v} * task.padded_dim;
    for (int32_t d = 0; d < task.head_dim; d += 16) {
      Vec x = Load(values + d);
      if constexpr (kIsOnline<T>) x = Add(x, Set(state.zeros[v]));
      x = Div(x, Set(state.sum[v]));
      if constexpr (kIsStatic<T>) x = Fma(x, Load(tile.scales.v_scale + d), Load(tile.scales.v_zero_point + d));
      StoreFirst(out + d, x, Smaller(16, task.head_dim - d));
    }
  }
}

}  // namespace rankwise::kernels::RW_ISA
