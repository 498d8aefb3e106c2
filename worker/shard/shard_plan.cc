#include "worker/shard/shard_plan.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace rankwise::shard {
namespace {

constexpr int kMaxChunks = 64;

int64_t Cut(int64_t count, int64_t part, int64_t parts) { return count * part / parts; }

Range Slice(int64_t count, const RankOptions& options) {
  return {Cut(count, options.rank, options.world_size), Cut(count, options.rank + 1, options.world_size)};
}

// Boundaries of chunks [first, first + count) of `chunks` over `columns`, relative to the first one's begin.
std::vector<int64_t> Boundaries(int64_t columns, int first, int count, int chunks) {
  std::vector<int64_t> boundaries;
  for (int c = first; c <= first + count; ++c)
    boundaries.push_back(Cut(columns, c, chunks) - Cut(columns, first, chunks));
  return boundaries;
}

}  // namespace

int SumChunks(const Dims& dims) {
  int chunks = 1;
  while (chunks < kMaxChunks && dims.n_heads % (2 * chunks) == 0) chunks *= 2;
  return chunks;
}

absl::StatusOr<ShardPlan> PlanShard(const Dims& dims, const RankOptions& options) {
  const int world = options.world_size;
  if (world < 1 || options.rank < 0 || options.rank >= world) {
    return absl::InvalidArgumentError(absl::StrCat("rank ", options.rank, " is not in a group of tp=", world));
  }
  if (dims.n_heads < 1 || dims.n_kv_heads < 1 || dims.n_heads % dims.n_kv_heads != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("n_kv_heads=", dims.n_kv_heads, " does not divide n_heads=", dims.n_heads));
  }
  if (dims.n_heads % world != 0) {
    return absl::InvalidArgumentError(absl::StrCat("tp=", world, " does not divide n_heads=", dims.n_heads));
  }
  if (dims.n_kv_heads % world != 0 && world % dims.n_kv_heads != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("tp=", world, " and n_kv_heads=", dims.n_kv_heads, " do not divide one another"));
  }
  if (world > dims.intermediate_size || world > dims.vocab_size) {
    return absl::InvalidArgumentError(absl::StrCat("tp=", world, " exceeds intermediate_size=", dims.intermediate_size,
                                                   " or vocab_size=", dims.vocab_size));
  }
  ShardPlan plan{.rank = options.rank, .world_size = world};
  plan.heads = Slice(dims.n_heads, options);
  const int64_t heads_per_kv = dims.n_heads / dims.n_kv_heads;
  plan.kv_heads = {plan.heads.begin / heads_per_kv, (plan.heads.end - 1) / heads_per_kv + 1};
  plan.intermediate = Slice(dims.intermediate_size, options);
  plan.vocab = Slice(dims.vocab_size, options);

  const int chunks = SumChunks(dims);
  const bool owns_subtrees = (world & (world - 1)) == 0 && world <= chunks;
  const int cut_in = owns_subtrees ? chunks : world;
  const int own = cut_in / world;
  plan.wo_boundaries = Boundaries(int64_t{dims.n_heads} * dims.head_dim, options.rank * own, own, cut_in);
  plan.w2_boundaries = Boundaries(dims.intermediate_size, options.rank * own, own, cut_in);
  return plan;
}

}  // namespace rankwise::shard
