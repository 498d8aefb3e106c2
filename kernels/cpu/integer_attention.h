// Included after row_kernels.h and dot_avx2.h or dot_avx512_vnni.h.
#pragma once

#include <type_traits>

#include "kernels/cpu/attention_split.h"

// Attention's products with K and V stored as integers, with q and the weights of values as integers of sixteen bits.
// A sum of head_dim, or of 64, products stays below 2^31.
namespace rankwise::kernels::RW_ISA {

inline constexpr int kGroupTokens = 64;
inline constexpr int kGroupBlocks = kGroupTokens / kKvBlockTokens;
inline constexpr int kGroupsOfSplit = kSplitTokens / kGroupTokens;
inline constexpr float kLevels = 16384;         // of q and of weights: 255 * 16384 * 512 < 2^31
inline constexpr float kLeastSize = 0x1p-100f;  // what is smaller counts as 0

// Four elements of the major dimension by sixteen of the minor one, in two parts; see PairedOffset.
template <typename T>
inline Shorts Widen(const T* p) {
  return std::is_same_v<T, int8_t> ? WidenSigned(p) : WidenUnsigned(p);
}
template <typename T>
inline const T* FourAt(const T* tile, int64_t major, int64_t width, int64_t minor, int part) {
  return tile + (std::is_same_v<T, U4> ? PairedNibbleOffset(major, minor, width)
                                       : PairedOffset(major + part * 2, minor, width));
}
template <typename T>
inline void LoadFour(const T* tile, int64_t major, int64_t width, int64_t minor, Shorts (&parts)[2]) {
  parts[0] = Widen(FourAt(tile, major, width, minor, 0));
  if constexpr (std::is_same_v<T, U4>) {
    parts[1] = UpperNibbles(parts[0]);
    parts[0] = LowerNibbles(parts[0]);
  } else {
    parts[1] = Widen(FourAt(tile, major, width, minor, 1));
  }
}

template <typename T>
requires(kIsInteger<T>) struct Stored<T> {
  using Word = uint32_t;
  using Sum = Ints;
  using Part = Shorts;
  static constexpr int kMajors = 4, kParts = 2, kMajorsOfLine = std::is_same_v<T, U4> ? 8 : 4;
  static const T* At(const T* k, int32_t d) { return FourAt(k, d, kKvBlockTokens, 0, 0); }
  static void Load(const T* k, int32_t d, Shorts (&parts)[2]) { LoadFour(k, d, kKvBlockTokens, 0, parts); }
};
inline void Clear(Ints& sum) { sum = ZeroInts(); }

// One vector's q (times its scales where they are static) as integers, zeros behind the last dim up to a whole Vec.
template <typename T>
Fold QuantizeQuery(const Split& split, const float* q, int16_t* quantized) {
  const int32_t dims = split.task.head_dim;
  const auto load = [&](int64_t d, int n) {
    const Vec x = LoadFirst(q + d, n);
    return kIsStatic<T> ? Mul(x, Load(split.tile.scales.k_scale + d)) : x;
  };
  // NaN where an element is not finite.
  Vec size = Zero(), poison = Zero();
  ForLanes(dims, [&](int64_t d, int n) {
    const Vec x = load(d, n);
    size = Max(size, Abs(x));
    poison = Fma(x, Zero(), poison);
  });
  const float largest = MaxLane(size), levels = dims <= 512 ? kLevels : kLevels / 2;
  const Vec inverse = Set(largest >= kLeastSize ? levels / largest : 0.0f);
  ForLanes(dims, [&](int64_t d, int n) { StoreI16(quantized + d, Mul(load(d, n), inverse)); });
  int32_t sum = 0;
  for (int32_t d = 0; d < dims; ++d) sum += quantized[d];
  const float scale = (largest / levels + SumLanes(poison)) * split.task.score_scale;
  return {scale, static_cast<float>(sum) * scale};
}

// q of each run of vectors as [pairs of dims, M], one run after the other.
template <typename T>
requires(kIsInteger<T>) void PrepareQueries(const Split& split, uint32_t* q, Fold* folds) {
  alignas(64) int16_t quantized[kLargestHeadDim];
  const int32_t dims = (split.task.head_dim + 3) / 4 * 4;
  ForRuns(split.vectors, [&](int32_t first, auto run) {
    constexpr int M = run.kCount;
    uint32_t* to = q + int64_t{first} * split.task.padded_dim;
    for (int m = 0; m < M; ++m) {
      folds[first + m] = QuantizeQuery<T>(split, split.QueryOf(first + m), quantized);
      for (int32_t d = 0; d < dims; d += 2) std::memcpy(&to[d / 2 * M + m], quantized + d, sizeof(uint32_t));
    }
  });
}

// The weights of a vector's values in one split, where its scores were.
struct QuantizedWeights {
  explicit QuantizedWeights(float* scores) : q(reinterpret_cast<int16_t*>(scores)), scales(scores + kSplitTokens) {}
  int16_t* q;     // [kSplitTokens]
  float* scales;  // [kGroupsOfSplit]
};
static_assert(kScoreStride >= kSplitTokens + kGroupsOfSplit);

// Weights outside of `slots` are 0.
template <typename T, typename WeightsOf>
requires(kIsInteger<T>) inline void StoreWeights(float* scores, Range slots, WeightsOf&& weights_of) {
  const QuantizedWeights to(scores);
  for (int group = 0; group < kGroupsOfSplit; ++group) {
    if (group * kGroupTokens >= slots.end || (group + 1) * kGroupTokens <= slots.begin) {
      std::memset(to.q + group * kGroupTokens, 0, sizeof(int16_t) * kGroupTokens);
      to.scales[group] = 0;
      continue;
    }
    Vec weights[kGroupBlocks];
    Vec size = Zero();
    for (int b = 0; b < kGroupBlocks; ++b) {
      const int32_t i = group * kGroupTokens + b * kKvBlockTokens;
      weights[b] = i < slots.begin || i >= slots.end ? Zero() : weights_of(i);
      size = Max(size, weights[b]);
    }
    const float largest = MaxLane(size);
    const bool counts = largest >= kLeastSize;
    const Vec inverse = Set(counts ? kLevels / largest : 0.0f);
    to.scales[group] = counts ? largest * (1 / kLevels) : 0.0f;
    for (int b = 0; b < kGroupBlocks; ++b) {
      StoreI16(to.q + group * kGroupTokens + b * kKvBlockTokens, Mul(weights[b], inverse));
    }
  }
}

// values [M, 16 D] += Σ_t p[m][t] v[t] over `count` blocks of one group, while those ahead are fetched.
template <typename T, int M, int D>
inline void SumGroup(const AttentionTask& task, const T* const* blocks, const T* const* ahead, int count,
                     const uint32_t* weights, const float* scales, int64_t dim, float* values) {
  Ints acc[M][D];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int d = 0; d < D; ++d) acc[m][d] = ZeroInts();
  }
  for (int b = 0; b < count; ++b) {
    for (int t = 0; t < kKvBlockTokens; t += 4) {
      Shorts v[D][2];
#pragma GCC unroll 4
      for (int d = 0; d < D; ++d) LoadFour(blocks[b], t, task.padded_dim, dim + d * 16, v[d]);
      FetchLines<D * 32>(FourAt(ahead[b], t, task.padded_dim, dim, 0));
      if (!std::is_same_v<T, U4>) FetchLines<D * 32>(FourAt(ahead[b], t, task.padded_dim, dim, 1));
#pragma GCC unroll 2
      for (int part = 0; part < 2; ++part) {
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          const uint32_t& pair = weights[m * kScoreStride + (b * kKvBlockTokens + t) / 2 + part];
#pragma GCC unroll 4
          for (int d = 0; d < D; ++d) AddProducts(acc[m][d], v[d][part], pair);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    const Vec scale = Set(scales[m * kScoreStride]);
#pragma GCC unroll 4
    for (int d = 0; d < D; ++d) {
      float* to = values + m * task.padded_dim + dim + d * 16;
      Store(to, Fma(ToFloats(acc[m][d]), scale, Load(to)));
    }
  }
}

// Values of one run of vectors. What a vector does not attend weighs 0, and adds exactly nothing.
template <typename T, int M>
requires(kIsInteger<T>) void SumRun(const Split& split, Range positions, int32_t first, float* values) {
  constexpr int kDims = Smaller(4, Larger(1, kSums / M));
  const AttentionTask& task = split.task;
  const QuantizedWeights weights(split.scores + int64_t{first} * kScoreStride);
  float* sums = values + int64_t{first} * task.padded_dim;
  const int32_t block_end = (positions.end - 1) / kKvBlockTokens + 1;
  for (int group = (positions.begin - split.origin()) / kGroupTokens; group < kGroupsOfSplit; ++group) {
    const int32_t first_block = (split.origin() + group * kGroupTokens) / kKvBlockTokens;
    const int32_t begin = Larger(first_block, positions.begin / kKvBlockTokens);
    const int count = Smaller(first_block + kGroupBlocks, block_end) - begin;
    if (count <= 0) break;
    const T *blocks[kGroupBlocks], *ahead[kGroupBlocks];
    for (int b = 0; b < count; ++b) {
      blocks[b] = ValuesOf<T>(split.tile, begin + b);
      ahead[b] = ValuesOf<T>(split.tile, BlockAhead(split.tile, begin + b));
    }
    const auto* q = reinterpret_cast<const uint32_t*>(weights.q + begin * kKvBlockTokens - split.origin());
    int64_t dim = 0;
    for (; dim + kDims * 16 <= task.padded_dim; dim += kDims * 16) {
      SumGroup<T, M, kDims>(task, blocks, ahead, count, q, weights.scales + group, dim, sums);
    }
    for (; dim < task.padded_dim; dim += 16) {
      SumGroup<T, M, 1>(task, blocks, ahead, count, q, weights.scales + group, dim, sums);
    }
  }
}

}  // namespace rankwise::kernels::RW_ISA
