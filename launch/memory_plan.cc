#include "launch/memory_plan.h"

#include <algorithm>
#include <bit>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "kernels/cpu/cpu_kv_pool.h"
#include "kernels/cpu/isa_kernels.h"
#include "worker/shard/shard_plan.h"

namespace rankwise::launch {
namespace {

using kernels::DTypeBytes;
using weights::ModelConfig;

constexpr int64_t kFloatBytes = sizeof(float);
constexpr int64_t kLogitRows = 64;  // of model::Decoder
constexpr int64_t kBatchMost = 1 << 20;
constexpr double kBytesMost = 1e18;

// gRPC, MPI, stacks and heap of a rank that serves: 4.3 to 4.8 MiB by `bench memory` on the demo model at tp 1, 2
// and 4.
constexpr int64_t kProcessBytes = int64_t{5} << 20;

constexpr int64_t kDrawFloats = 2;  // of TokenDraw, for each token: a weight of 64 bits

struct Widths {
  int64_t hidden, heads, qkv, intermediate, vocab_local;
};

Widths WidthsOf(const ModelConfig& config, const shard::ShardPlan& plan) {
  const int64_t heads = plan.heads.count() * config.head_dim;
  return {.hidden = config.hidden_size,
          .heads = heads,
          .qkv = heads + 2 * plan.kv_heads.count() * config.head_dim,
          .intermediate = plan.intermediate.count(),
          .vocab_local = plan.vocab.count()};
}

int64_t WeightBytes(const ModelConfig& config, const Widths& w, const shard::ShardPlan& plan, kernels::DType dtype) {
  const auto columns = [](int64_t n_out) {
    return (n_out + kernels::kPanelColumns - 1) / kernels::kPanelColumns * kernels::kPanelColumns;
  };
  const auto packed = [&](int64_t n_out, int64_t n_in) { return columns(n_out) * n_in * DTypeBytes(dtype); };
  // A matrix of a layer, whose slice begins at input `first_in`.
  const auto linear = [&](int64_t n_out, int64_t n_in, int64_t first_in) {
    if (config.weight_bits == 0) return packed(n_out, n_in);
    return columns(n_out) / kernels::kPanelColumns *
           kernels::GroupedPanelBytes(n_in, config.weight_group_size, first_in % config.weight_group_size,
                                      config.weight_bits);
  };
  const int64_t matrices = linear(w.qkv, w.hidden, 0) + linear(w.hidden, w.heads, plan.heads.begin * config.head_dim) +
                           linear(2 * w.intermediate, w.hidden, 0) +
                           linear(w.hidden, w.intermediate, plan.intermediate.begin);
  int64_t vectors = 2 * w.hidden;
  if (config.has_qkv_bias) vectors += w.qkv;
  if (config.has_o_bias) vectors += w.hidden;
  if (config.has_mlp_bias) vectors += 2 * w.intermediate + w.hidden;
  if (config.has_qk_norm) vectors += int64_t{2} * config.head_dim;
  return config.n_layers * (matrices + vectors * kFloatBytes) + packed(w.vocab_local, w.hidden) +
         w.hidden * kFloatBytes;
}

int64_t ActivationBytes(const ModelConfig& config, const Widths& w, const shard::ShardPlan& plan,
                        const MemoryOptions& options) {
  const int64_t rows = std::max(options.step_rows, options.batch);
  const int64_t step = rows * (3 * w.hidden + w.qkv + w.heads + 3 * w.intermediate);
  const bool is_alone = options.tp == 1;  // draws where the logits are, and sends none
  const int64_t logits = kLogitRows * (w.hidden + (is_alone ? 1 : 2) * w.vocab_local);
  const int64_t angles = options.sequence_tokens * config.rope.rotary_dim;
  const int64_t tiled_rows = kernels::kMatMulRowBlock * std::max({w.hidden, w.heads, w.intermediate});
  const int64_t group = plan.heads.count() / plan.kv_heads.count();
  const int64_t vectors = std::max<int64_t>(1, kernels::kTileVectors / group) * group;
  const int64_t padded_dim = (config.head_dim + 15) / 16 * 16;
  const int64_t each_thread = kernels::kMatMulScratch + 2 * kernels::AttentionStateFloats(vectors, padded_dim) +
                              kernels::AttentionScratchFloats(vectors, padded_dim) +
                              (is_alone ? kDrawFloats * config.vocab_size : 0);
  return kFloatBytes * (step + logits + angles + tiled_rows + options.threads * each_thread);
}

int64_t CommunicationBytes(const ModelConfig& config, const MemoryOptions& options, int rank) {
  int64_t floats = std::max(options.step_rows, options.batch) * config.hidden_size;
  if (rank == 0) floats += (options.tp > 1 ? kLogitRows + kDrawFloats : 0) * config.vocab_size + config.vocab_size;
  return kFloatBytes * floats;
}

absl::StatusOr<int64_t> KvBytes(const ModelConfig& config, const shard::ShardPlan& plan, const MemoryOptions& options) {
  const int64_t block_bytes = kernels::CpuKvBlockBytes({.n_layers = config.n_layers,
                                                        .n_kv_heads_local = static_cast<int>(plan.kv_heads.count()),
                                                        .head_dim = config.head_dim,
                                                        .format = options.kv_format});
  const int64_t blocks = options.batch * BlocksPerSequence(options.sequence_tokens);
  if (blocks > INT32_MAX || static_cast<double>(blocks) * static_cast<double>(block_bytes) > kBytesMost) {
    return absl::InvalidArgumentError(absl::StrCat("batch=", options.batch, " of ", options.sequence_tokens,
                                                   " tokens is ", blocks, " blocks of ", block_bytes,
                                                   " bytes: more than a cache can have"));
  }
  return blocks * block_bytes;
}

}  // namespace

int64_t BlocksPerSequence(int64_t sequence_tokens) {
  return (sequence_tokens + kernels::kKvBlockTokens - 1) / kernels::kKvBlockTokens;
}

int64_t LedgerBytes(int64_t blocks) {
  constexpr int64_t kRecord = 28, kFreeListEntry = 4, kBucket = 4;
  const int64_t tokens = int64_t{kernels::kKvBlockTokens} * 4;
  return blocks * (kRecord + tokens + kFreeListEntry) +
         static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(blocks))) * kBucket;
}

absl::StatusOr<RankMemory> PlanMemory(const ModelConfig& config, const MemoryOptions& options, int rank,
                                      const std::optional<Overhead>& overhead) {
  if (options.batch < 1 || options.batch > kBatchMost || options.sequence_tokens < 1) {
    return absl::InvalidArgumentError(absl::StrCat("batch=", options.batch, " of ", options.sequence_tokens,
                                                   " tokens is not within 1 to ", kBatchMost, " of at least 1"));
  }
  RW_ASSIGN_OR_RETURN(const shard::ShardPlan plan,
                      shard::PlanShard(config.dims(), {.rank = rank, .world_size = options.tp}));
  const Widths widths = WidthsOf(config, plan);
  RankMemory memory;
  memory.weights = WeightBytes(config, widths, plan, options.weight_dtype);
  memory.embedding = config.vocab_size * config.hidden_size * DTypeBytes(options.weight_dtype);
  RW_ASSIGN_OR_RETURN(memory.kv, KvBytes(config, plan, options));
  if (overhead.has_value()) {
    memory.overhead = overhead->fixed_bytes + options.batch * overhead->sequence_bytes;
    return memory;
  }
  memory.activations = ActivationBytes(config, widths, plan, options);
  memory.communication = CommunicationBytes(config, options, rank);
  memory.process = kProcessBytes;
  if (rank == 0) memory.process += LedgerBytes(options.batch * BlocksPerSequence(options.sequence_tokens));
  return memory;
}

absl::StatusOr<int64_t> LargestBatch(const ModelConfig& config, MemoryOptions options, int64_t memory_bytes,
                                     const std::optional<Overhead>& overhead) {
  const auto fits = [&](int64_t batch) -> absl::StatusOr<bool> {
    options.batch = batch;
    for (int rank = 0; rank < options.tp; ++rank) {
      RW_ASSIGN_OR_RETURN(const RankMemory memory, PlanMemory(config, options, rank, overhead));
      if (memory.total() > memory_bytes) return false;
    }
    return true;
  };
  int64_t fitting = 0;
  int64_t most = std::min(kBatchMost, INT32_MAX / BlocksPerSequence(options.sequence_tokens));
  while (fitting < most) {
    const int64_t batch = (fitting + most + 1) / 2;
    RW_ASSIGN_OR_RETURN(const bool is_fitting, fits(batch));
    if (is_fitting) {
      fitting = batch;
    } else {
      most = batch - 1;
    }
  }
  return fitting;
}

}  // namespace rankwise::launch
