// Included after simd.h.
#pragma once

#include "kernels/cpu/isa_kernels.h"

// What the passes of attention (attention_kernel.h) over one split share.
namespace rankwise::kernels::RW_ISA {

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

// The positions row `row` of the tile attends, of those in `split`.
inline Range RowRange(const AttentionTask& task, const AttentionTile& tile, int32_t row, int32_t split) {
  const int32_t end = tile.first_position + row + 1;
  const int32_t begin = task.sliding_window > 0 ? Larger(0, end - task.sliding_window) : 0;
  return Intersect({begin, end}, {split * kSplitTokens, (split + 1) * kSplitTokens});
}

// Which block is fetched into the second cache while `block` is multiplied, line by line: all at once they would only
// wait in a queue.
inline int32_t BlockAhead(const AttentionTile& tile, int32_t block) {
  return Smaller(block + kSplitTokens / kKvBlockTokens, (tile.first_position + tile.row_count - 1) / kKvBlockTokens);
}
// The lines that begin in `bytes` bytes from `at` on.
template <int kBytes>
[[gnu::always_inline]] inline void FetchLines(const void* at) {
  for (int i = 0; i < kBytes; i += 64) _mm_prefetch(static_cast<const char*>(at) + i, _MM_HINT_T1);
}

template <typename T>
inline const T* KeysOf(const AttentionTile& tile, int32_t block) {
  return reinterpret_cast<const T*>(tile.blocks + tile.block_table[block] * tile.block_bytes);
}
template <typename T>
inline const T* ValuesOf(const AttentionTile& tile, int32_t block) {
  return reinterpret_cast<const T*>(tile.blocks + tile.block_table[block] * tile.block_bytes + tile.v_offset);
}
inline const OnlineBlock& OnlineOf(const AttentionTile& tile, int32_t block) {
  return *reinterpret_cast<const OnlineBlock*>(KeysOf<char>(tile, block) + tile.online_offset);
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

// OnlineBlock of every block of a split, in f32.
struct OnlineSplit {
  float k_scale[kSplitTokens], k_zero[kSplitTokens], v_scale[kSplitTokens], v_zero[kSplitTokens];
};
static_assert(sizeof(OnlineSplit) == kOnlineFloats * sizeof(float));

// What the passes over one split share.
struct Split {
  const AttentionTask& task;
  const AttentionTile& tile;
  int32_t index;
  int32_t vectors;
  float* scores;  // [vectors, kScoreStride]; slot i is position index * kSplitTokens + i
  OnlineSplit* online;

  int32_t origin() const { return index * kSplitTokens; }
  Range RangeOf(int32_t vector) const { return RowRange(task, tile, vector / task.group, index); }
  const float* QueryOf(int32_t vector) const {
    return task.qkv + (tile.row_begin + vector / task.group) * task.qkv_stride +
           (tile.kv_head * task.group + vector % task.group) * int64_t{task.head_dim};
  }
};

// s = dot * factor + offset of a score; online formats multiply both with the position's scale and zero.
struct Fold {
  float factor, offset;
};

// How K of T is multiplied, float_attention.h and integer_attention.h:
//   Word, Part, Sum    of q, of K, and what their products add up in
//   kMajors, kParts    dims that Load loads at a time, and in how many parts: a word of q for each
//   kMajorsOfLine      dims in 64 bytes
// and, of a whole split, PrepareQueries (q of each run of vectors as [words, M], one run after the other, and the folds
// of their scores), StoreWeights (of values, from slots.begin, of a block, in place of scores), and SumRun (their
// values, of a run of vectors and the positions that any vector of the tile attends).
template <typename T>
struct Stored;

}  // namespace rankwise::kernels::RW_ISA
