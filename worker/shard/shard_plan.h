#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"

// Which rows, columns and heads a rank owns. Pure arithmetic.
namespace rankwise::shard {

struct Range {
  int64_t begin = 0;
  int64_t end = 0;
  int64_t count() const { return end - begin; }
  bool operator==(const Range&) const = default;
};

// The sizes of a model that tensor parallelism cuts, whole-model.
struct Dims {
  int n_heads = 0;
  int n_kv_heads = 0;
  int head_dim = 0;
  int64_t intermediate_size = 0;
  int64_t vocab_size = 0;
};

struct RankOptions {
  int rank = 0;
  int world_size = 1;
};

struct ShardPlan {
  int rank = 0;
  int world_size = 1;
  Range heads;         // query heads; wo's input columns are heads × head_dim
  Range kv_heads;      // the KV heads those query heads read; shared with other ranks when world_size > n_kv_heads
  Range intermediate;  // rows of gate and up, columns of down
  Range vocab;         // rows of the output matrix
  // Chunk boundaries, relative to the rank's own columns, in which wo and w2 are summed (kernels::SumTree). The whole
  // model has SumChunks(dims) chunks cut at floor(c * K / chunks) over wo's heads and w2's columns; a rank of a
  // power-of-two world_size ≤ chunks owns chunks / world_size of them. Other world sizes sum one chunk per rank and
  // promise no equality with TP = 1.
  std::vector<int64_t> wo_boundaries;
  std::vector<int64_t> w2_boundaries;
};

// The largest power of two that divides n_heads, at most 64.
int SumChunks(const Dims& dims);

// InvalidArgument, naming the sizes, when world_size does not divide n_heads, or when n_kv_heads and world_size do not
// divide one another, or exceeds intermediate_size or vocab_size.
absl::StatusOr<ShardPlan> PlanShard(const Dims& dims, const RankOptions& options);

}  // namespace rankwise::shard
