#include "worker/calibration.h"

#include <cstring>
#include <tuple>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "kernels/kv_histogram.h"
#include "worker/kv/kv_statistics.h"
#include "worker/weights/input_statistics.h"

namespace rankwise {
namespace {

template <typename T>
void Append(const std::vector<T>& values, std::string& bytes) {
  bytes.append(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
}

std::string Serialize(const kernels::KvObservation& layer, const model::InputObservation& inputs) {
  std::string bytes;
  for (const auto* sums : {&inputs.qkv, &inputs.o, &inputs.gate_up, &inputs.down}) Append(*sums, bytes);
  for (const auto* values : {&layer.k_min, &layer.k_max, &layer.v_min, &layer.v_max}) Append(*values, bytes);
  for (const auto* counts : {&layer.k_histogram, &layer.v_histogram}) Append(*counts, bytes);
  return bytes;
}

// The whole model's, as they are gathered.
struct Gathered {
  kv::KvStatistics kv;
  weights::InputStatistics inputs;
};

// Puts one rank's statistics of a layer in their place. Ranks that share a KV head saw the same values: theirs are the
// same, and not to be added; so are those of inputs that every rank reads whole.
absl::Status Place(const std::string& bytes, const shard::ShardPlan& plan, int64_t rows, int layer,
                   Gathered& gathered) {
  kv::KvStatistics& statistics = gathered.kv;
  weights::InputMeanSquares& inputs = gathered.inputs.layers[layer];
  const int64_t heads = plan.kv_heads.count(), first = int64_t{layer} * statistics.n_kv_heads + plan.kv_heads.begin;
  const int64_t float_bytes = heads * statistics.head_dim * static_cast<int64_t>(sizeof(float));
  const int64_t count_bytes = heads * kernels::kHistogramBins * static_cast<int64_t>(sizeof(uint64_t));
  const int64_t hidden = static_cast<int64_t>(inputs.qkv.size());
  const std::tuple<std::vector<float>*, int64_t, int64_t> parts[] = {
      {&inputs.qkv, 0, hidden},
      {&inputs.o, plan.heads.begin * statistics.head_dim, plan.heads.count() * statistics.head_dim},
      {&inputs.gate_up, 0, hidden},
      {&inputs.down, plan.intermediate.begin, plan.intermediate.count()}};
  int64_t expected = 4 * float_bytes + 2 * count_bytes;
  for (const auto& [whole, begin, count] : parts) expected += count * static_cast<int64_t>(sizeof(double));
  if (static_cast<int64_t>(bytes.size()) != expected) {
    return absl::DataLossError(absl::StrCat("rank ", plan.rank, " sent ", bytes.size(), " bytes of statistics"));
  }
  const char* source = bytes.data();
  for (const auto& [whole, begin, count] : parts) {
    for (int64_t i = 0; i < count; ++i, source += sizeof(double)) {
      double sum;
      std::memcpy(&sum, source, sizeof sum);
      (*whole)[begin + i] = static_cast<float>(sum / static_cast<double>(rows));
    }
  }
  for (auto* whole : {&statistics.k_min, &statistics.k_max, &statistics.v_min, &statistics.v_max}) {
    std::memcpy(&(*whole)[first * statistics.head_dim], source, float_bytes);
    source += float_bytes;
  }
  for (auto* whole : {&statistics.k_histogram, &statistics.v_histogram}) {
    std::memcpy(&(*whole)[first * kernels::kHistogramBins], source, count_bytes);
    source += count_bytes;
  }
  return absl::OkStatus();
}

kv::KvStatistics EmptyStatistics(const engine::Rank& rank, const SampleInfo& samples) {
  const weights::ModelConfig& config = rank.decoder->config();
  const int64_t heads = static_cast<int64_t>(config.n_layers) * config.n_kv_heads;
  const std::vector<float> values(heads * config.head_dim);
  const std::vector<uint64_t> counts(heads * kernels::kHistogramBins);
  return {.model_fingerprint = rank.checkpoint->fingerprint(),
          .n_layers = config.n_layers,
          .n_kv_heads = config.n_kv_heads,
          .head_dim = config.head_dim,
          .dataset = samples.dataset,
          .sample_count = samples.sample_count,
          .sample_tokens = samples.sample_tokens,
          .seed = samples.seed,
          .k_min = values,
          .k_max = values,
          .v_min = values,
          .v_max = values,
          .k_histogram = counts,
          .v_histogram = counts};
}

}  // namespace

absl::Status WriteObservations(const engine::Rank& rank, comm::Communicator& communicator, const std::string& folder,
                               const SampleInfo& samples, absl::Duration timeout) {
  const model::Decoder& decoder = *rank.decoder;
  const int64_t rows = decoder.observed_rows();
  Gathered gathered{.kv = EmptyStatistics(rank, samples),
                    .inputs = weights::EmptyInputStatistics(decoder.config(), rank.checkpoint->fingerprint())};
  absl::Status written;
  if (rows == 0) written = absl::FailedPreconditionError("no token was seen, so there is nothing to write");
  for (int layer = 0; layer < gathered.kv.n_layers; ++layer) {  // a message each: all would pass its limit
    std::vector<std::string> parts;
    RW_RETURN_IF_ERROR(communicator.GatherMessages(
        Serialize(decoder.observations()[layer], decoder.input_observations()[layer]), parts, timeout));
    for (int r = 0; r < static_cast<int>(parts.size()) && written.ok(); ++r) {
      const auto plan = shard::PlanShard(rank.decoder->config().dims(), {.rank = r, .world_size = communicator.size()});
      written.Update(plan.ok() ? Place(parts[r], *plan, rows, layer, gathered) : plan.status());
    }
  }
  if (communicator.rank() == 0) {
    if (written.ok()) {
      written = weights::WriteInputStatistics(absl::StrCat(folder, "/", weights::InputStatistics::kFileName),
                                              gathered.inputs);
    }
    if (written.ok()) {
      written = kv::WriteKvStatistics(absl::StrCat(folder, "/", kv::KvStatistics::kFileName), gathered.kv);
    }
  }
  return engine::AgreeOnStatus(written, communicator, timeout);
}

}  // namespace rankwise
