#include "launch/memory_report.h"

#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <system_error>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/mapped_file.h"
#include "base/status_macros.h"
#include "kernels/cpu/thread_team.h"
#include "worker/engine/rank.h"
#include "worker/kv/kv_choice.h"
#include "worker/weights/checkpoint.h"
#include "worker/weights/random_model.h"

namespace rankwise::launch {
namespace {

using kernels::DType;

constexpr size_t kConfigBytesMost = size_t{1} << 20;

// What transformers writes when it saves a model.
DType StatedDType(const std::string& config_json) {
  const nlohmann::json object = nlohmann::json::parse(config_json, nullptr, false);
  for (const char* key : {"dtype", "torch_dtype"}) {
    if (!object.is_object() || !object.contains(key) || !object[key].is_string()) continue;
    if (object[key] == "float32") return DType::kF32;
    if (object[key] == "bfloat16") return DType::kBF16;
  }
  return DType::kF16;
}

absl::StatusOr<PlannedModel> FromConfigFile(const std::string& name, const std::string& path) {
  RW_ASSIGN_OR_RETURN(const std::string text, ReadTextFile(path, kConfigBytesMost));
  absl::StatusOr<weights::ModelConfig> config = weights::ParseModelConfig(text);
  if (!config.ok()) {
    return absl::Status(config.status().code(), absl::StrCat(path, ": ", std::string(config.status().message())));
  }
  return PlannedModel{name, *std::move(config), StatedDType(text)};
}

// A folder whose weights are still to be fetched is planned from its configuration.
absl::StatusOr<PlannedModel> FromFolder(const std::string& folder) {
  const auto checkpoint = weights::Checkpoint::Open(folder);
  if (absl::IsNotFound(checkpoint.status())) return FromConfigFile(folder, folder + "/config.json");
  RW_RETURN_IF_ERROR(checkpoint.status());
  const weights::ModelConfig& config = (*checkpoint)->config();
  RW_ASSIGN_OR_RETURN(const shard::ShardPlan whole, shard::PlanShard(config.dims(), {}));
  return PlannedModel{folder, config, (*checkpoint)->Outer(whole).embedding.dtype};
}

PlannedModel FromShape(const std::string& name, const weights::RandomModelSpec& spec) {
  weights::ModelConfig config{.model_type = spec.model_type,
                              .hidden_size = spec.hidden_size,
                              .n_layers = spec.n_layers,
                              .n_heads = spec.n_heads,
                              .n_kv_heads = spec.n_kv_heads,
                              .head_dim = spec.head_dim,
                              .intermediate_size = spec.intermediate_size,
                              .vocab_size = spec.vocab_size,
                              .max_position = spec.max_position,
                              .rope = {.rotary_dim = spec.head_dim}};
  return {name, std::move(config), DType::kF16};
}

}  // namespace

void AddMemoryFlags(CLI::App& command, MemoryFlags& flags) {
  command.add_option("--tp", flags.tp, "Ranks of one group: each holds 1/N of the model")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  command.add_option("--batch", flags.batches, "Sequences that run at once, e.g. 8,16,32,48")
      ->delimiter(',')
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 20))
      ->capture_default_str();
  command.add_option("--seq", flags.sequence_tokens, "Prompt and generated tokens of each")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 24))
      ->capture_default_str();
  command.add_option("--kv", flags.kv, "KV formats of serve, e.g. f16,int8")->delimiter(',')->capture_default_str();
  command.add_option("--threads", flags.threads, "Threads of one rank; 0: this host's CPUs shared out")
      ->check(CLI::Range(0, 4096))
      ->capture_default_str();
  command.add_option("--svg", flags.svg, "Draw memory against batch to this file");
  command.add_option("--png", flags.png, "The same as a PNG, by gnuplot");
}

absl::StatusOr<PlannedModel> FindModel(const std::string& name) {
  std::error_code error;
  if (std::filesystem::is_directory(name, error)) return FromFolder(name);
  if (std::filesystem::exists(name, error)) return FromConfigFile(name, name);
  const auto shape = weights::RandomModelShape(name);
  if (shape.ok()) return FromShape(name, *shape);
  return absl::NotFoundError(absl::StrCat("MODEL \"", name, "\" is no folder, no config.json and no shape (",
                                          std::string(shape.status().message()), ")"));
}

absl::StatusOr<MemoryOptions> OptionsFor(const MemoryFlags& flags, const PlannedModel& model, const std::string& kv,
                                         int64_t batch) {
  RW_ASSIGN_OR_RETURN(const kv::KvChoice choice, kv::ParseKvChoice(kv));
  const int threads = flags.threads > 0 ? flags.threads : kernels::ThreadTeam::AllowedCpuCount() / flags.tp;
  return MemoryOptions{.tp = flags.tp,
                       .kv_format = choice.format,
                       .weight_dtype = model.weight_dtype,
                       .batch = batch,
                       .sequence_tokens = flags.sequence_tokens,
                       .threads = std::max(1, threads)};
}

std::string RankGroup::name() const { return first == last ? absl::StrCat(first) : absl::StrCat(first, "-", last); }

absl::StatusOr<std::vector<RankGroup>> PlanRanks(const PlannedModel& model, const MemoryOptions& options,
                                                 const std::optional<Overhead>& overhead) {
  std::vector<RankGroup> groups;
  for (int rank = 0; rank < options.tp; ++rank) {
    RW_ASSIGN_OR_RETURN(const RankMemory memory, PlanMemory(model.config, options, rank, overhead));
    if (groups.empty() || groups.back().memory != memory) groups.push_back({rank, rank, memory});
    groups.back().last = rank;
  }
  return groups;
}

double Mib(int64_t bytes) { return static_cast<double>(bytes) / (1 << 20); }

absl::Status WriteCharts(const MemoryFlags& flags, Chart chart) {
  const std::string model = std::filesystem::path(flags.model + "/").parent_path().filename();
  chart.title =
      absl::StrCat(model, ", tp ", flags.tp, ", ", flags.sequence_tokens, " tokens a sequence: ", chart.title);
  chart.x_title = "batch (sequences at full length)";
  chart.y_title = "MiB";
  for (ChartLine& line : chart.lines) {
    std::ranges::sort(line.points);
    std::ranges::sort(line.markers);
  }
  if (!flags.svg.empty()) RW_RETURN_IF_ERROR(WriteFileAtomically(flags.svg, ChartSvg(chart)));
  if (!flags.png.empty()) RW_RETURN_IF_ERROR(WriteChartPng(flags.png, chart));
  return absl::OkStatus();
}

}  // namespace rankwise::launch
