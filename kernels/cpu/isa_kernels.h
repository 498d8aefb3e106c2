#pragma once

#include <cstdint>

#include "kernels/backend.h"

// The boundary between the CPU backend and its vector code, which is compiled once per instruction set. Plain data and
// function pointers only: an inline function used on both sides could be linked in its AVX-512 form and run on a
// machine without it.
namespace rankwise::kernels {

inline constexpr int kPanelColumns = 32;     // output columns of a packed panel: [n_out / 32, n_in, 32]
inline constexpr int kSumLevels = 7;         // partial sums alive at once in a tree of 64 chunks: log2(64) + 1
inline constexpr int kMatMulRowBlock = 240;  // rows per pass: 30 KiB of sums per panel and level
inline constexpr int kCpuStepRows = 128;  // prefills 512 tokens as fast as one step of them (Zen 4, int8: 281, 278/s)
inline constexpr int kMatMulDepth = 128;  // input columns widened to f32 at a time: 16 KiB, half of an L1
inline constexpr int kSplitTokens = 512;  // attention sums a context in splits of this size, whoever computes them
inline constexpr int kScoreStride = kSplitTokens + 16;  // floats; off the powers of two that collide in an L1
inline constexpr int kTileVectors = 32;                 // (row, query head) pairs that share one pass over K and V

// Floats a thread needs for MatMul.
inline constexpr int64_t kMatMulScratch =
    int64_t{kSumLevels} * kMatMulRowBlock * kPanelColumns + kMatMulDepth * kPanelColumns;

// A group of columns of quantised activations (kernels/activation_groups.h), in whole pairs of words of eight columns:
// columns of the first and the last pair that are not the group's have q = 0 there.
struct DotGroup {
  int32_t begin, end;
  int32_t weight_group;
  int32_t pair_begin, pair_count;  // of its weight group's
  int32_t pair_column;             // the first column of the first pair
  int32_t x_pair;                  // pairs of all groups before it
};

// Tiles of consecutive rows like MatMulTask::x: words of four q, which meet the stored words of the weights, of each
// group [its pairs, 2, rows of the tile], or [rows of the tile, its pairs, 2] for matrix registers; scales and sums of
// q (sixteen bits, zero-extended) [groups, rows of the tile].
struct QuantizedRows {
  uint32_t* words;
  float* scales;
  uint32_t* sums;
  int32_t pair_count, group_count;  // of a row
};

struct MatMulTask {
  float* y;                  // [row_count, n_out]
  const float* x;            // tiles of consecutive rows, each [steps, rows of the tile]
  int32_t row_count;         // at most kMatMulRowBlock
  int32_t tile_count;        // tile t covers rows [row_count * t / tile_count, row_count * (t + 1) / tile_count)
  const std::byte* weights;  // panels
  int64_t panel_bytes;
  int64_t n_out, n_in;
  // [chunk_count + 1]: the input columns of the chunks, and in how many steps a panel takes them. A step is a column,
  // or a pair of one chunk's in a word (BFloat16Kernels).
  const int64_t *boundaries, *steps;
  int32_t chunk_count;
  const float* bias;  // [n_out] or null
  // Of grouped weights: input column k belongs to group (k + group_offset) / group_size. A panel is its groups, each
  // {scales f16 [32], zeros u8 [32], 32 bytes of nothing, q} in group_bytes, so that reading it is one stream: q is
  // [columns, 32] of eight bits, or [columns / 8, 32] of words that hold eight input columns from their lowest bits on.
  int32_t group_size, group_offset;
  int64_t group_bytes;
  // Of IntegerKernels, instead of x, boundaries and steps. A group's q is then stored in pairs of words of eight input
  // columns [columns / 8, 2, 32]: columns 0 2 4 6 of the eight from the lowest bits on, then 1 3 5 7; of four bits,
  // where one word holds all eight in their order, that order is [columns / 8, 32] as above.
  const DotGroup* groups;
  const int32_t* chunk_groups;  // [chunk_count + 1]
  QuantizedRows quantized;
};

inline constexpr int64_t kGroupHeaderBytes = 128;
inline constexpr int64_t GroupBytes(int64_t n_in, int64_t group_size, int bits) {
  const int64_t columns = n_in < group_size ? n_in : group_size;
  return kGroupHeaderBytes + (columns + 7) / 8 * bits * kPanelColumns;
}
inline constexpr int64_t GroupedPanelBytes(int64_t n_in, int64_t group_size, int64_t group_offset, int bits) {
  return (n_in + group_offset + group_size - 1) / group_size * GroupBytes(n_in, group_size, bits);
}
// The first input column of a group.
inline constexpr int64_t GroupBegin(int64_t group, int64_t group_size, int64_t group_offset) {
  return group == 0 ? 0 : group * group_size - group_offset;
}

struct RopeAppendTask {
  float* qkv;
  int64_t qkv_stride;
  int32_t n_heads, n_kv_heads, head_dim, padded_dim, rotary_dim;
  const float *cos, *sin;        // [positions, rotary_dim / 2]
  const float *q_norm, *k_norm;  // [head_dim] or null
  float norm_eps;
  float *k_min, *k_max, *v_min, *v_max;  // [n_kv_heads, head_dim] or all null
  OnlineRange (*online_range)(float min, float max, float levels);
};

// Parameters of the sixteen tokens of a block in an online format, as f16.
struct OnlineBlock {
  uint16_t k_scale[kKvBlockTokens], k_zero[kKvBlockTokens], v_scale[kKvBlockTokens], v_zero[kKvBlockTokens];
};

// The channels' parameters of one head of a static int8 pool, [padded_dim] each.
struct HeadScales {
  const float *k_scale, *k_zero_point, *v_scale, *v_zero_point;
};

// Where element (major, minor) of a tile [majors, width] of stored integers lies, in bytes: pairs of two majors are
// neighbours, so that their products add up where they are made. Of K a major is a dim, of V a token.
inline constexpr int64_t PairedOffset(int64_t major, int64_t minor, int64_t width) {
  return major / 2 * 2 * width + minor * 2 + major % 2;
}
// The same of four bits: majors 4 i + 2 and 4 i + 3 are the upper halves of the bytes of 4 i and 4 i + 1.
inline constexpr int64_t PairedNibbleOffset(int64_t major, int64_t minor, int64_t width) {
  return PairedOffset(major / 4 * 2 + major % 2, minor, width);
}
inline constexpr bool IsUpperNibble(int64_t major) { return major % 4 >= 2; }

// Where one token of one KV head goes.
struct KvSlot {
  void* k;  // the block's [head_dim, 16], of integers as PairedOffset has it
  void* v;  // the block's [16, padded_dim], likewise
  int32_t slot;
  HeadScales scales;    // of a static int8 pool
  OnlineBlock* online;  // of an online pool
};

struct AttentionTask {
  float* out;
  const float* qkv;
  int64_t out_stride, qkv_stride;
  int32_t group;  // query heads per KV head
  int32_t head_dim, padded_dim;
  float score_scale;
  int32_t sliding_window;
};

// Consecutive rows of one segment and one KV head, with where that head's blocks lie.
struct AttentionTile {
  int64_t row_begin;
  int32_t row_count;
  int32_t first_position;
  const int32_t* block_table;
  const char* blocks;  // block b: K at blocks + b * block_bytes, V v_offset bytes later
  int64_t block_bytes, v_offset, online_offset;
  int32_t kv_head;
  HeadScales scales;  // of a static int8 pool
};

// Floats of the softmax state of `vectors` (row, head) pairs: maximum, sum, weighted zeros and weighted values of each.
inline constexpr int64_t AttentionStateFloats(int64_t vectors, int64_t padded_dim) {
  return vectors * (padded_dim + 16);
}
inline constexpr int64_t kOnlineFloats = 4 * kSplitTokens;  // of all OnlineBlocks of a split
inline constexpr int64_t AttentionScratchFloats(int64_t vectors, int64_t padded_dim) {
  return kOnlineFloats + vectors * (kScoreStride + padded_dim + 16);
}

using AttendSplitFunction = void(const AttentionTask&, const AttentionTile&, int32_t split, float* state,
                                 float* scratch);

struct IsaKernels {
  const char* name;
  int matmul_tile_rows;  // most rows of one tile

  // One panel for all rows of the task. Indexed by DType.
  void (*matmul_panel[kDTypeCount])(const MatMulTask&, int64_t panel, float* scratch);
  // Steps [begin, end) of rows [row_count, n_in] into the tiles of MatMulTask::x.
  void (*tile_rows)(float* tiles, const float* x, const MatMulTask&, int64_t begin, int64_t end);

  // Of f32, f16 and bf16.
  void (*widen[3])(float* out, const void* row, int64_t width);
  void (*add)(float* x, const float* delta, const float* bias, int64_t width);
  void (*rms_norm)(float* out, const float* x, const float* weight, int64_t width, float eps);
  void (*silu_mul)(float* out, const float* gate, const float* up, int64_t width);

  // Query heads of KV head `head`, its K and its V in one row. Returns how many values saturated. Indexed by KvFormat.
  int64_t (*rope_append[kKvFormatCount])(const RopeAppendTask&, int64_t row, int32_t position, int32_t head,
                                         const KvSlot&);

  // The softmax state of one split alone, of f32 and f16; vectors whose window misses the split get a sum of 0.
  AttendSplitFunction* attend_split[2];
  // state = state followed by split. Both of the same tile.
  void (*merge_split)(int64_t vectors, int64_t padded_dim, float* state, const float* split);
  void (*finish_attention[kKvFormatCount])(const AttentionTask&, const AttentionTile&, const float* state);

  // For MeasureMachineLimits: 2 * 16 * kFmaChains operations per iteration; the exclusive or of the words.
  float (*fma_burst)(int64_t iterations);
  uint64_t (*read_burst)(const void* data, int64_t bytes);
};

inline constexpr int kFmaChains = 12;

// Quantised weights times quantised activations (Activations::kInt8), of an instruction set of their own, which
// IsaKernels need not have. Whichever it is, the bits are the same.
struct IntegerKernels {
  const char* name;
  int tile_rows;  // most rows of one tile
  // Groups [begin, end) of rows x [row_count, n_in] into task.quantized.
  void (*quantize_rows)(const MatMulTask& task, const float* x, int64_t begin, int64_t end);
  // One panel for all rows of the task, of weights of four and of eight bits.
  void (*matmul_panel[2])(const MatMulTask&, int64_t panel, float* scratch);
  // For MeasureMachineLimits: 2 * 64 * kDotChains operations per iteration.
  int32_t (*dot_burst)(int64_t iterations);
};

inline constexpr int kDotChains = 12;

// Attention over stored integers, likewise.
struct IntegerAttention {
  // As of IsaKernels, of int8, int8-online and int4-online.
  AttendSplitFunction* attend_split[3];
};

// bf16 weights times activations rounded to bf16 (Activations::kBF16): the fma chains of IsaKernels with denormals
// taken for zeros, within the bound of matmul_kernel.h and 2^-126 for each column. In pairs, a word of weights or of x
// holds two columns of one chunk, the earlier in its upper half; behind an odd last one, -0 of weights and 0 of x,
// which change no sum. A panel is then [steps, 32] words.
struct BFloat16Kernels {
  const char* name;
  bool is_in_pairs;
  int tile_rows;  // most rows of one tile
  // As of IsaKernels, with words for floats in pairs.
  void (*tile_rows_of)(float* tiles, const float* x, const MatMulTask&, int64_t begin, int64_t end);
  void (*matmul_panel)(const MatMulTask&, int64_t panel, float* scratch);
  // For MeasureMachineLimits: 4 * 16 * kPairChains operations per iteration.
  float (*dot_burst)(int64_t iterations);
};

inline constexpr int kPairChains = 24;

extern const IsaKernels kAvx2Kernels;
extern const IsaKernels kAvx512Kernels;
extern const IntegerKernels kAvx2Integers;
extern const IntegerKernels kAvx512VnniIntegers;
extern const IntegerKernels kAvx512AmxIntegers;
extern const IntegerAttention kAvx2IntegerAttention;
extern const IntegerAttention kAvx512VnniIntegerAttention;
extern const BFloat16Kernels kAvx2BFloat16s;
extern const BFloat16Kernels kAvx512BFloat16s;
extern const BFloat16Kernels kAvx512Bf16BFloat16s;

}  // namespace rankwise::kernels
