#include "worker/engine/rank.h"

#include <algorithm>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "base/status_macros.h"
#include "worker/comm/exchange.h"
#include "worker/kv/kv_choice.h"
#include "worker/kv/kv_scales.h"

namespace rankwise::engine {
namespace {

constexpr int32_t kDefaultMaxTokens = 16384;
constexpr int64_t kDefaultKvBytes = int64_t{2} << 30;

// Collective: the smallest of the ranks' numbers.
absl::StatusOr<int64_t> AgreeOnMinimum(int64_t own, comm::Communicator& communicator, absl::Duration timeout) {
  RW_ASSIGN_OR_RETURN(const std::vector<std::string> all, comm::Exchange(absl::StrCat(own), communicator, timeout));
  for (const std::string& text : all) {
    int64_t value = 0;
    if (!absl::SimpleAtoi(text, &value)) return absl::DataLossError(absl::StrCat("not a number: ", text));
    own = std::min(own, value);
  }
  return own;
}

// Collective: ranks started with different flags would add up parts of different sums.
absl::Status AgreeOnNumbers(const Rank& rank, comm::Communicator& communicator, absl::Duration timeout) {
  const std::string own =
      absl::StrCat("model ", rank.checkpoint->fingerprint(), ", kv ", rank.kv,
                   rank.kv_scales_id.empty() ? "" : absl::StrCat(" (scales ", rank.kv_scales_id, ")"), ", activations ",
                   kernels::ActivationsName(rank.decoder->activations()));
  RW_ASSIGN_OR_RETURN(const std::vector<std::string> all, comm::Exchange(own, communicator, timeout));
  for (size_t r = 1; r < all.size(); ++r) {
    if (all[r] == all[0]) continue;
    return absl::InvalidArgumentError(
        absl::StrCat("the ranks of a group must compute alike: rank 0 has ", all[0], "; rank ", r, " has ", all[r]));
  }
  return absl::OkStatus();
}

// Dynamic NTK reaches past the trained length, but only when asked: it turns every angle, those of short requests too.
int64_t LongestContext(const weights::ModelConfig& config) {
  const bool is_dynamic = config.rope.scaling == weights::RopeConfig::Scaling::kDynamicNtk;
  return is_dynamic ? static_cast<int64_t>(static_cast<double>(config.max_position) * config.rope.factor)
                    : config.max_position;
}

struct Prepared {
  std::unique_ptr<weights::Checkpoint> checkpoint;
  shard::ShardPlan plan;
  model::DecoderOptions decoder;
  std::string kv;
  std::string kv_scales_id;
};

absl::StatusOr<Prepared> Prepare(const RankOptions& options, const kernels::Backend& backend,
                                 const comm::Communicator& communicator) {
  Prepared prepared;
  RW_ASSIGN_OR_RETURN(prepared.checkpoint, weights::Checkpoint::Open(options.model_dir));
  const weights::ModelConfig& config = prepared.checkpoint->config();
  RW_ASSIGN_OR_RETURN(
      prepared.plan, shard::PlanShard(config.dims(), {.rank = communicator.rank(), .world_size = communicator.size()}));
  const weights::KvAdvice advice = prepared.checkpoint->kv_advice();
  prepared.kv = options.kv.empty() ? advice.format : options.kv;
  RW_ASSIGN_OR_RETURN(const kv::KvChoice kv, kv::ParseKvChoice(prepared.kv));
  if (options.observes &&
      (kv.format != kernels::KvFormat::kF32 || options.has_prefix_cache || options.max_drafts > 0)) {
    return absl::InvalidArgumentError("observing K and V needs kv=f32, no prefix cache and no speculation");
  }
  if (const int64_t longest = LongestContext(config); options.max_tokens > longest) {
    return absl::InvalidArgumentError(
        absl::StrCat("max_tokens=", options.max_tokens, " exceeds the model's context of ", longest));
  }
  const int32_t step_rows =
      options.max_step_rows != 0 ? options.max_step_rows : std::max(backend.step_rows(), options.max_running);
  if (options.max_tokens < 0 || options.max_running < 1 || step_rows < options.max_running ||
      options.max_chunk_rows < 1 || options.max_drafts < 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "max_tokens=", options.max_tokens, ", max_running=", options.max_running, ", max_step_rows=", step_rows,
        ", max_chunk_rows=", options.max_chunk_rows, ", max_drafts=", options.max_drafts,
        ": all must be positive, but drafts may be 0, and max_step_rows at least max_running"));
  }
  RW_RETURN_IF_ERROR(prepared.checkpoint->Verify(prepared.plan));
  model::DecoderOptions& decoder = prepared.decoder;
  decoder.max_rows = step_rows;
  decoder.max_positions =
      options.max_tokens > 0 ? options.max_tokens : std::min<int64_t>(config.max_position, kDefaultMaxTokens);
  decoder.kv_format = kv.format;
  decoder.observes = options.observes;
  decoder.collective_timeout = options.collective_timeout;
  if (kv.granularity.has_value()) {
    const std::string scales_dir = options.kv_scales_dir.empty() ? advice.scales_dir : options.kv_scales_dir;
    if (scales_dir.empty()) {
      return absl::FailedPreconditionError(
          absl::StrCat("kv=", prepared.kv, " needs the scales of this model: give the folder that kv-qparams wrote"));
    }
    RW_ASSIGN_OR_RETURN(
        kv::RankScales scales,
        kv::ReadKvScales(scales_dir, prepared.checkpoint->fingerprint(),
                         {.n_layers = config.n_layers, .n_kv_heads = config.n_kv_heads, .head_dim = config.head_dim},
                         prepared.plan, *kv.granularity));
    decoder.kv_scales = std::move(scales.scales);
    prepared.kv_scales_id = std::move(scales.manifest_id);
  }
  const kernels::KvShape shape{.n_layers = config.n_layers,
                               .n_kv_heads_local = static_cast<int>(prepared.plan.kv_heads.count()),
                               .head_dim = config.head_dim,
                               .format = kv.format};
  const int64_t block_bytes = backend.KvBlockBytes(shape);
  const int64_t blocks_per_sequence = (decoder.max_positions + kernels::kKvBlockTokens - 1) / kernels::kKvBlockTokens;
  int64_t blocks = blocks_per_sequence * options.max_running;
  blocks = options.kv_memory_bytes > 0 ? options.kv_memory_bytes / block_bytes
                                       : std::min(blocks, std::max(kDefaultKvBytes / block_bytes, blocks_per_sequence));
  if (blocks < 1 || blocks > INT32_MAX) {
    return absl::InvalidArgumentError(absl::StrCat("kv_memory of ", options.kv_memory_bytes, " bytes is ", blocks,
                                                   " blocks of ", block_bytes, " bytes"));
  }
  decoder.block_count = static_cast<int32_t>(blocks);
  return prepared;
}

}  // namespace

absl::Status AgreeOnStatus(const absl::Status& own, comm::Communicator& communicator, absl::Duration timeout) {
  const std::string mine = own.ok() ? ""
                                    : absl::StrCat(static_cast<int>(own.code()), "|rank ", communicator.rank(), ": ",
                                                   std::string(own.message()));
  std::vector<std::string> all;
  RW_RETURN_IF_ERROR(communicator.GatherMessages(mine, all, timeout));
  std::string joined;
  for (const std::string& text : all) {
    if (text.empty()) continue;
    const std::vector<std::string> parts = absl::StrSplit(text, absl::MaxSplits('|', 1));
    absl::StrAppend(&joined, joined.empty() ? absl::StrCat(parts[0], "|") : "; ", parts[1]);
  }
  RW_RETURN_IF_ERROR(communicator.Broadcast(joined, timeout));
  if (joined.empty()) return absl::OkStatus();
  const std::vector<std::string> parts = absl::StrSplit(joined, absl::MaxSplits('|', 1));
  int code = 0;
  if (parts.size() != 2 || !absl::SimpleAtoi(parts[0], &code)) return absl::InternalError(joined);
  return absl::Status(static_cast<absl::StatusCode>(code), parts[1]);
}

absl::StatusOr<Rank> LoadRank(const RankOptions& options, kernels::Backend& backend, comm::Communicator& communicator) {
  const absl::Duration timeout = options.collective_timeout;
  absl::StatusOr<Prepared> prepared = Prepare(options, backend, communicator);
  RW_RETURN_IF_ERROR(AgreeOnStatus(prepared.status(), communicator, timeout));
  RW_ASSIGN_OR_RETURN(const int64_t blocks, AgreeOnMinimum(prepared->decoder.block_count, communicator, timeout));
  prepared->decoder.block_count = static_cast<int32_t>(blocks);

  Rank rank;
  rank.checkpoint = std::move(prepared->checkpoint);
  rank.kv = prepared->kv;
  rank.kv_scales_id = prepared->kv_scales_id;
  absl::StatusOr<std::unique_ptr<model::Decoder>> decoder =
      model::Decoder::Create(*rank.checkpoint, prepared->plan, backend, communicator, prepared->decoder);
  // Packing takes as long as reading the checkpoint does: minutes from a cold disk.
  RW_RETURN_IF_ERROR(AgreeOnStatus(decoder.status(), communicator, timeout + absl::Minutes(10)));
  rank.decoder = *std::move(decoder);
  RW_RETURN_IF_ERROR(AgreeOnNumbers(rank, communicator, timeout));

  const auto max_positions = static_cast<int32_t>(prepared->decoder.max_positions);
  const auto step_rows = static_cast<int32_t>(prepared->decoder.max_rows);
  rank.executor = std::make_unique<Executor>(
      *rank.decoder, StepLimits{.slot_count = options.max_running,
                                .block_count = prepared->decoder.block_count,
                                .max_rows = step_rows,
                                .max_positions = max_positions,
                                .vocab_size = static_cast<int32_t>(rank.checkpoint->config().vocab_size)});
  rank.scheduler_options = {.block_count = prepared->decoder.block_count,
                            .block_tokens = kernels::kKvBlockTokens,
                            .slot_count = options.max_running,
                            .max_step_rows = step_rows,
                            .max_chunk_rows = std::min(options.max_chunk_rows, step_rows),
                            .max_positions = max_positions,
                            .max_waiting = options.max_waiting,
                            .has_prefix_cache = options.has_prefix_cache,
                            .max_drafts = options.max_drafts};
  return rank;
}

}  // namespace rankwise::engine
