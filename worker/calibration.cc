#include "worker/calibration.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "worker/kv/kv_scales.h"

namespace rankwise {
namespace {

// All layers' k_min, k_max, v_min, v_max of one rank, one after the other.
std::string Serialize(const std::vector<kernels::KvObservation>& observations) {
  std::string bytes;
  for (const kernels::KvObservation& layer : observations) {
    for (const auto* values : {&layer.k_min, &layer.k_max, &layer.v_min, &layer.v_max}) {
      bytes.append(reinterpret_cast<const char*>(values->data()), values->size() * sizeof(float));
    }
  }
  return bytes;
}

// Widens the statistics by one rank's message; ranks that share a KV head saw the same values.
absl::Status Merge(const std::string& bytes, const shard::ShardPlan& plan, kv::KvStatistics& statistics) {
  const int64_t count = plan.kv_heads.count() * statistics.head_dim;
  if (static_cast<int64_t>(bytes.size()) != statistics.n_layers * 4 * count * static_cast<int64_t>(sizeof(float))) {
    return absl::DataLossError(absl::StrCat("rank ", plan.rank, " sent ", bytes.size(), " bytes of statistics"));
  }
  const char* source = bytes.data();
  std::vector<float> part(count);
  for (int layer = 0; layer < statistics.n_layers; ++layer) {
    const int64_t offset =
        (static_cast<int64_t>(layer) * statistics.n_kv_heads + plan.kv_heads.begin) * statistics.head_dim;
    for (auto* whole : {&statistics.k_min, &statistics.k_max, &statistics.v_min, &statistics.v_max}) {
      std::memcpy(part.data(), source, count * sizeof(float));
      source += count * sizeof(float);
      const bool is_min = whole == &statistics.k_min || whole == &statistics.v_min;
      for (int64_t i = 0; i < count; ++i) {
        float& value = (*whole)[offset + i];
        value = is_min ? std::min(value, part[i]) : std::max(value, part[i]);
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status WriteObservations(const engine::Rank& rank, comm::Communicator& communicator, const std::string& path,
                               const SampleInfo& samples, absl::Duration timeout) {
  std::vector<std::string> parts;
  RW_RETURN_IF_ERROR(communicator.GatherMessages(Serialize(rank.decoder->observations()), parts, timeout));
  absl::Status written;
  if (communicator.rank() == 0) {
    const weights::ModelConfig& config = rank.decoder->config();
    const int64_t count = static_cast<int64_t>(config.n_layers) * config.n_kv_heads * config.head_dim;
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    kv::KvStatistics statistics{.model_fingerprint = rank.checkpoint->fingerprint(),
                                .n_layers = config.n_layers,
                                .n_kv_heads = config.n_kv_heads,
                                .head_dim = config.head_dim,
                                .dataset = samples.dataset,
                                .sample_count = samples.sample_count,
                                .sample_tokens = samples.sample_tokens,
                                .k_min = std::vector<float>(count, kInfinity),
                                .k_max = std::vector<float>(count, -kInfinity),
                                .v_min = std::vector<float>(count, kInfinity),
                                .v_max = std::vector<float>(count, -kInfinity)};
    for (int r = 0; r < communicator.size() && written.ok(); ++r) {
      auto plan = shard::PlanShard(config.dims(), {.rank = r, .world_size = communicator.size()});
      written.Update(plan.status());
      if (plan.ok()) written.Update(Merge(parts[r], *plan, statistics));
    }
    if (written.ok() && !std::isfinite(statistics.k_min.front())) {
      written = absl::FailedPreconditionError("no token was seen, so there is nothing to write");
    }
    if (written.ok()) written = kv::WriteKvStatistics(path, statistics);
  }
  return engine::AgreeOnStatus(written, communicator, timeout);
}

}  // namespace rankwise
