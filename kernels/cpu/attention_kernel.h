// Included after float_attention.h or integer_attention.h.
#pragma once

namespace rankwise::kernels::RW_ISA {

// Attention of consecutive rows of one request over the blocks of one KV head, 512 positions ("a split") at a time.
//   s[t] = ((q * k_scale) · k[t]) * score_scale   (f32 and f16: scale 1, zero 0; k's zero point would move all alike)
//   of a split m = max s, l = Σ exp(s - m), o = Σ exp(s - m) v[t]; splits merge in the order of positions
//   out = o / l * v_scale + v_zero_point
// Online formats have scales and zeros of each position:
//   s[t] = (q · k[t]) * (k_scale[t] * score_scale) + k_zero[t] * (Σq * score_scale)
//   z = Σ exp(s - m) v_zero[t], o = Σ (exp(s - m) v_scale[t]) v[t], out = (o + z) / l
// Stored integers are multiplied as integers, twice as many at once: q (times its scales) by 16384 levels for a vector,
// the weights of values by as many for 64 positions, whose sums are exact (integer_attention.h).
// Shapes   a vector is one (row, query head); q [vectors, head_dim]; K block [head_dim, 16], V block [16, padded_dim]
//          of T; stored integers as PairedOffset has it
// Order    q · k: one fma chain over dims, a lane per position. l: sixteen chains over positions mod 16, then
//          SumLanes. z like l. o: one fma chain over positions, or, of integers, groups of 64, a lane per dim. All from
//          0 in each split, and splits start at multiples of 512 whatever the row: a vector's bits depend on its row
//          and context only.
// Rounding S = max_t |s[t]|' where ' sums absolute values (Σ_d |q k_stored k_scale|, + |k_zero| Σ|q| when online) *
//          score_scale; K = the same sum with the largest |q k_scale| of the vector for each (0 in f32 and f16);
//          e = 2 (head_dim + 8) 2^-24 S + 2^-15 K + 2^-22 is the relative error of one weight, with 2^-14 K where
//          head_dim > 512; n = positions, V = max |v| or, for quantised, max |v_q| v_scale + |v_zero_point|:
//          |out - exact| <= (2 e + (2 min(n, 512) + 8 splits + 8) 2^-24 + (integers: min(n, 64) 2^-15)) V
// Garbage  positions outside a vector's window are never summed: their scores are replaced, their V is not read, or, of
//          integers, weighs 0

// q · k of M vectors and B blocks. q [head_dim / dims of a word, M]; scores of vector m and block b at scores + m *
// kScoreStride + b * 16.
template <typename T, int M, int B>
inline void Score(const T* const* keys, const T* const* ahead, const typename Stored<T>::Word* q, int32_t head_dim,
                  float* scores) {
  using S = Stored<T>;
  typename S::Sum acc[M][B];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) Clear(acc[m][b]);
  }
  for (int32_t d = 0; d < head_dim; d += S::kMajors) {
    typename S::Part k[B][S::kParts];
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) {
      S::Load(keys[b], d, k[b]);
      if (d % S::kMajorsOfLine == 0) FetchLines<64>(S::At(ahead[b], d));
    }
#pragma GCC unroll 2
    for (int part = 0; part < S::kParts; ++part) {
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b) AddProducts(acc[m][b], k[b][part], q[m]);
      }
      q += M;
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) Store(scores + m * kScoreStride + b * kKvBlockTokens, ToFloats(acc[m][b]));
  }
}

// M vectors and up to four consecutive blocks. Few vectors take several blocks at once to keep enough chains in flight.
template <typename T, int M>
void ScoreBlocks(const T* const* keys, const T* const* ahead, int32_t count, const typename Stored<T>::Word* q,
                 int32_t head_dim, float* scores) {
  constexpr int kBlocks = Smaller(4, Larger(1, kSums / M));
  int32_t b = 0;
  for (; b + kBlocks <= count; b += kBlocks) {
    Score<T, M, kBlocks>(keys + b, ahead + b, q, head_dim, scores + b * kKvBlockTokens);
  }
  for (; b < count; ++b) Score<T, M, 1>(keys + b, ahead + b, q, head_dim, scores + b * kKvBlockTokens);
}

template <typename T>
void ScoreSplit(const Split& split, Range positions, const typename Stored<T>::Word* q) {
  const int32_t block_end = (positions.end - 1) / kKvBlockTokens + 1;
  for (int32_t block = positions.begin / kKvBlockTokens; block < block_end; block += 4) {
    const int32_t count = Smaller(4, block_end - block);
    const T *keys[4], *ahead[4];
    for (int32_t b = 0; b < count; ++b) {
      keys[b] = KeysOf<T>(split.tile, block + b);
      ahead[b] = KeysOf<T>(split.tile, BlockAhead(split.tile, block + b));
      if (kIsOnline<T>) FetchLines<sizeof(OnlineBlock)>(&OnlineOf(split.tile, BlockAhead(split.tile, block + b)));
    }
    ForRuns(split.vectors, [&](int32_t first, auto run) {
      ScoreBlocks<T, run.kCount>(
          keys, ahead, count, q + int64_t{first} * split.task.padded_dim, split.task.head_dim,
          split.scores + int64_t{first} * kScoreStride + block * kKvBlockTokens - split.origin());
    });
  }
}

// Turns a vector's scores into the weights of its values, and sets max, sum and zeros.
template <typename T>
void Softmax(const Split& split, int32_t vector, Fold fold, State state) {
  const Range range = split.RangeOf(vector);
  float* const scores = split.scores + int64_t{vector} * kScoreStride;
  if (range.empty()) {
    state.max[vector] = state.sum[vector] = state.zeros[vector] = 0;
    std::memset(scores, 0, sizeof(float) * kScoreStride);
    return;
  }
  const Vec factor = Set(fold.factor), offset = Set(fold.offset), nothing = Set(-__builtin_inff());
  const int32_t first = range.begin / kKvBlockTokens * kKvBlockTokens;
  Vec max = nothing;
  for (int32_t t = first; t < range.end; t += kKvBlockTokens) {
    float* at = scores + t - split.origin();
    Vec s;
    if constexpr (kIsOnline<T>) {
      const int32_t i = t - split.origin();
      s = Fma(Load(at), Mul(Load(split.online->k_scale + i), factor), Mul(Load(split.online->k_zero + i), offset));
    } else {
      s = Mul(Load(at), factor);
    }
    if (t < range.begin || t + kKvBlockTokens > range.end) {
      s = Select(Lanes(Larger(0, range.begin - t), Smaller(kKvBlockTokens, range.end - t)), s, nothing);
    }
    Store(at, s);
    max = Max(max, s);
  }
  state.max[vector] = MaxLane(max);
  const Vec shift = Set(-state.max[vector]);
  Vec sum = Zero(), zeros = Zero();
  StoreWeights<T>(scores, Range{first - split.origin(), range.end - split.origin()}, [&](int32_t i) {
    Vec p = Exp(Add(Load(scores + i), shift));
    sum = Add(sum, p);
    if constexpr (kIsOnline<T>) {
      zeros = Fma(p, Load(split.online->v_zero + i), zeros);
      p = Mul(p, Load(split.online->v_scale + i));
    }
    return p;
  });
  state.sum[vector] = SumLanes(sum);
  state.zeros[vector] = SumLanes(zeros);
}

inline void WidenOnline(const Split& split, Range positions) {
  const int32_t block_end = (positions.end - 1) / kKvBlockTokens + 1;
  for (int32_t block = positions.begin / kKvBlockTokens; block < block_end; ++block) {
    const auto& from =
        *reinterpret_cast<const OnlineBlock*>(KeysOf<char>(split.tile, block) + split.tile.online_offset);
    const int32_t i = block * kKvBlockTokens - split.origin();
    Store(split.online->k_scale + i, LoadF16(from.k_scale));
    Store(split.online->k_zero + i, LoadF16(from.k_zero));
    Store(split.online->v_scale + i, LoadF16(from.v_scale));
    Store(split.online->v_zero + i, LoadF16(from.v_zero));
  }
}

template <typename T>
void AttendSplit(const AttentionTask& task, const AttentionTile& tile, int32_t index, float* state_floats,
                 float* scratch) {
  const int32_t vectors = tile.row_count * task.group;
  const Split split{task, tile, index, vectors, scratch + kOnlineFloats, reinterpret_cast<OnlineSplit*>(scratch)};
  const State state(state_floats, vectors);
  std::memset(state.values, 0, sizeof(float) * vectors * task.padded_dim);
  const Range positions{RowRange(task, tile, 0, index).begin, RowRange(task, tile, tile.row_count - 1, index).end};
  if (positions.empty()) {
    std::memset(state.sum, 0, sizeof(float) * vectors);
    return;
  }
  float* q = split.scores + int64_t{vectors} * kScoreStride;
  auto* words = reinterpret_cast<typename Stored<T>::Word*>(q);
  auto* folds = reinterpret_cast<Fold*>(q + int64_t{vectors} * task.padded_dim);
  PrepareQueries<T>(split, words, folds);
  ScoreSplit<T>(split, positions, words);
  if constexpr (kIsOnline<T>) WidenOnline(split, positions);
  for (int32_t v = 0; v < vectors; ++v) Softmax<T>(split, v, folds[v], state);
  ForRuns(vectors, [&](int32_t first, auto run) { SumRun<T, run.kCount>(split, positions, first, state.values); });
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
