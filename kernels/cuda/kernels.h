#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/draw_weights.h"

// What the .cu files offer the backend: functions that issue kernels on a stream. Sizes are checked by the caller. All
// pointers are device memory; `[...]` are shapes, row-major, f32 unless said otherwise.
namespace rankwise::kernels::cuda {

enum class Element : uint8_t { kF32, kF16, kBF16 };

// out [row_count, width] = rows of `element` that are `row_bytes` apart: rows[tokens[r]]; rows[r] where tokens is null;
// rows[drawn[tokens[r]]] where drawn is not, and rows[0] for one below 0, which stands for no token.
struct WidenTask {
  float* out;
  const unsigned char* rows;
  const int32_t *tokens, *drawn;
  int64_t row_bytes, row_count, width;
};
cudaError_t WidenRows(const WidenTask& task, Element element, cudaStream_t stream);

// What the norm kernels do with a row: x += delta + bias first (delta and bias may be null), then, where `weight` is
// not null, out = x / sqrt(mean(x²) + eps) * weight. Without delta x is only read, and `out` may be x.
struct NormTask {
  float* out;
  float* x;
  const float *delta, *bias, *weight;
  int64_t row_count, width;
  float eps;
};
cudaError_t AddAndNorm(const NormTask& task, cudaStream_t stream);

// out [rows, width] = silu(gate) * up of gate_up [rows, 2 * width].
cudaError_t SiluMul(float* out, const float* gate_up, int64_t row_count, int64_t width, cudaStream_t stream);

// out [count, width] = x[picked[i]].
cudaError_t PickRows(float* out, const float* x, const int32_t* picked, int64_t count, int64_t width,
                     cudaStream_t stream);

// ids[r] = what rules[r] draws from row r of logits [row_count, vocab_size] (kernels/token_draw.h).
struct DrawTask {
  int32_t* ids;
  const float* logits;
  const DrawRule* rules;
  uint64_t* weights;  // [row_count, vocab_size], scratch
  int64_t row_count;
  int32_t vocab_size;
};
cudaError_t Draw(const DrawTask& task, cudaStream_t stream);

// In the order of DType; and bf16 whose x is rounded to bf16, too.
enum class WeightFormat : uint8_t { kF32, kF16, kBF16, kInt4, kInt8, kBF16OfBF16 };

// y [row_count, n_out] = x [row_count, n_in] · Wᵀ + bias (bias may be null).
//   weights [padded_out / 16, slabs of 64 columns, loads, 32 lanes, 16 bytes]: what each lane of matmul.cu's Stored
//   holds. Of the grouped formats scales f16 and zeros u8 [groups, padded_out]; column k is in group (k + group_offset)
//   / group_size. Zeros fill up padded_out, a multiple of 16, and the last slab.
struct MatMulTask {
  float* y;
  const float* x;
  const unsigned char* weights;
  const uint16_t* scales;
  const uint8_t* zeros;
  const float* bias;
  int64_t row_count, n_out, n_in, padded_out;
  int32_t group_size, group_offset;
  bool has_group_per_slab;  // every slab lies in one group
  bool is_aligned;          // every four columns of x are one aligned access
};
cudaError_t MatMul(const MatMulTask& task, WeightFormat format, cudaStream_t stream);

enum class KvElement : uint8_t { kF32, kF16, kInt8, kInt8Online, kInt4Online };  // in the order of KvFormat

struct KvScales {  // of one channel
  float k_scale, k_zero, v_scale, v_zero;
};

// One layer of the paged cache: KV head h of block b lies at data + h * head_bytes + b * block_bytes (kv_layout.h).
struct KvLayer {
  unsigned char* data;
  int64_t head_bytes, block_bytes;
  const KvScales* scales;         // [n_kv_heads, head_dim]; of the static int8 format
  unsigned long long* saturated;  // one counter
};

// Normalises (where q_norm and k_norm [head_dim] are not null) and rotates q and k of qkv [rows, (n_heads + 2
// n_kv_heads) * head_dim], writes both back, and stores K and V of row r in slot position[r] % 16 of block[r].
struct RopeAppendTask {
  float* qkv;
  const float *cos, *sin;  // [rows, rotary_dim / 2], of each row's position
  const float *q_norm, *k_norm;
  const int32_t *position, *block;  // [rows]
  KvLayer kv;
  int64_t row_count;
  int32_t n_heads, n_kv_heads, head_dim, rotary_dim;
  float norm_eps;
};
cudaError_t RopeAppend(const RopeAppendTask& task, KvElement format, cudaStream_t stream);

constexpr int kTileVectors = 16;  // rows × query heads of one KV head that share a tile: the tensor core's height
constexpr int kSplitTokens = 256;
constexpr int kHeadDimLimit = 512;  // of attention, whose queries and sums are kept in shared memory

// At most kTileVectors consecutive vectors of one segment: vector v is row row_begin + v / group at position
// first_position + v / group, and query head v % group of the KV head.
struct AttentionTile {
  int32_t row_begin, first_position, table_begin;  // of the segment; its blocks are tables[table_begin ...]
  int32_t vector_begin, vector_count;
};

// out [rows, n_heads * head_dim] = softmax(q · Kᵀ * score_scale) · V over each row's window.
struct AttentionTask {
  float* out;
  const float* qkv;  // [rows, (n_heads + 2 n_kv_heads) * head_dim]
  const int32_t* tables;
  const AttentionTile* tiles;
  KvLayer kv;
  int32_t tile_count, group, n_kv_heads, head_dim, sliding_window;
  float score_scale;
  // 0: a block walks all splits of its tile. Else the most that any tile has: each split has a block of its own, which
  // leaves its state in partials [rows * n_heads, split_count, 4 + head_dim] for a second kernel.
  int32_t split_count;
  float* partials;
};
cudaError_t Attention(const AttentionTask& task, KvElement format, cudaStream_t stream);

}  // namespace rankwise::kernels::cuda
