// Included after row_kernels.h.
#pragma once

#include "kernels/cpu/attention_split.h"

// Attention's products with K and V stored as floats.
namespace rankwise::kernels::RW_ISA {

template <typename T>
requires(!kIsInteger<T>) struct Stored<T> {
  using Word = float;
  using Sum = Vec;
  using Part = Vec;
  static constexpr int kMajors = 1, kParts = 1, kMajorsOfLine = 64 / (kKvBlockTokens * sizeof(T));
  static const T* At(const T* k, int32_t d) { return k + d * kKvBlockTokens; }
  static void Load(const T* k, int32_t d, Vec (&parts)[1]) { parts[0] = RW_ISA::Load(At(k, d)); }
};
inline void Clear(Vec& sum) { sum = Zero(); }
inline void AddProducts(Vec& sum, Vec part, float word) { sum = Fma(Set(word), part, sum); }
inline Vec ToFloats(Vec sum) { return sum; }

// q of each run of vectors as [head_dim, M], one run after the other.
template <typename T>
requires(!kIsInteger<T>) void PrepareQueries(const Split& split, float* q, Fold* folds) {
  ForRuns(split.vectors, [&](int32_t first, auto run) {
    constexpr int M = run.kCount;
    float* to = q + int64_t{first} * split.task.padded_dim;
    for (int m = 0; m < M; ++m) {
      const float* from = split.QueryOf(first + m);
      for (int32_t d = 0; d < split.task.head_dim; ++d) to[d * M + m] = from[d];
      folds[first + m] = {split.task.score_scale, 0.0f};
    }
  });
}

template <typename T, typename WeightsOf>
requires(!kIsInteger<T>) inline void StoreWeights(float* scores, Range slots, WeightsOf&& weights_of) {
  for (int32_t i = slots.begin; i < slots.end; i += kKvBlockTokens) Store(scores + i, weights_of(i));
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
    const int64_t offset = int64_t{t % kKvBlockTokens} * task.padded_dim + dim;
    const T *v = ValuesOf<T>(tile, block) + offset, *ahead = ValuesOf<T>(tile, BlockAhead(tile, block)) + offset;
    const int32_t end = Smaller(range.end, (block + 1) * kKvBlockTokens);
    for (; t < end; ++t, v += task.padded_dim, ahead += task.padded_dim) {
      FetchLines<D * 16 * sizeof(T)>(ahead);
      Vec row[D];
#pragma GCC unroll 4
      for (int d = 0; d < D; ++d) row[d] = Load(v + d * 16);
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

// Values of one run of vectors. Rows of a run differ in their windows: what all attend is summed together, the ragged
// ends before and after by each vector alone, all in the order of positions.
template <typename T, int M>
requires(!kIsInteger<T>) void SumRun(const Split& split, Range, int32_t first, float* values) {
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

}  // namespace rankwise::kernels::RW_ISA
