// Measures a worker's engine without gRPC: how fast it decodes and prefills against this machine's limits, and what a
// KV format costs in accuracy. Runs alone or under mpirun, one rank per process.

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/log.h"
#include "base/mapped_file.h"
#include "base/status_macros.h"
#include "coordinator/text/tokenizer.h"
#include "launch/bench_engine.h"
#include "worker/comm/mpi_communicator.h"
#include "worker/engine/rank.h"
#include "worker/kv/kv_choice.h"
#include "worker/kv/kv_scales.h"

namespace rankwise::launch {
namespace {

struct Flags {
  RankFlags ranks;
  EngineFlags engine;
  std::string text_file;
  std::vector<std::string> kv_formats = {""};  // of the comparison; "": the model's own
  std::vector<std::string> activations = {kernels::ActivationsName(kernels::Activations::kFloat)};  // likewise
  std::string baseline_kv = "f32", baseline_model;
  int windows = 64;
  int window_tokens = 255;
  int skipped_windows = 0;
  bool is_recorded = false;
  int tp = 0;
};

absl::Status Ignore(int32_t, int32_t, std::span<float>) { return absl::OkStatus(); }

// log-softmax of each position's logits, [tokens, vocab], on rank 0.
absl::StatusOr<std::vector<double>> ScoreWindow(engine::Rank& rank, const std::vector<int32_t>& tokens) {
  StepPlan plan{
      .kind = StepKind::kRun, .cleared_slots = {0}, .segments = {{.logits = LogitsNeed::kAll, .tokens = tokens}}};
  for (int b = 0; b * kernels::kKvBlockTokens < static_cast<int>(tokens.size()); ++b)
    plan.segments[0].new_blocks.push_back(b);
  std::vector<double> scores;
  RW_RETURN_IF_ERROR(rank.executor->Execute(plan, [&](int32_t, int32_t, std::span<float> logits) {
    const float highest = *std::ranges::max_element(logits);
    double sum = 0;
    for (const float logit : logits) sum += std::exp(double{logit} - highest);
    for (const float logit : logits) scores.push_back(logit - highest - std::log(sum));
    return absl::OkStatus();
  }));
  return scores;
}

// One KV format against the baseline.
struct Comparison {
  int64_t targets = 0, agreements = 0, saturated = 0, token_bytes = 0;
  double baseline_nll = 0, nll = 0, kl = 0, worst_kl = 0, tokens_per_second = 0;
};

// The median speed of single tokens decoded one after the other, as in a stream of one client.
absl::StatusOr<double> DecodeSpeed(engine::Rank& rank, const std::vector<int32_t>& tokens) {
  std::vector<double> seconds;
  for (size_t t = 0; t < tokens.size(); ++t) {
    const auto position = static_cast<int32_t>(t);
    StepPlan plan{.kind = StepKind::kRun,
                  .segments = {{.first_position = position, .logits = LogitsNeed::kLast, .tokens = {tokens[t]}}}};
    if (t == 0) plan.cleared_slots = {0};
    if (position % kernels::kKvBlockTokens == 0) plan.segments[0].new_blocks = {position / kernels::kKvBlockTokens};
    const double begin = SecondsNow();
    RW_RETURN_IF_ERROR(rank.executor->Execute(plan, Ignore));
    seconds.push_back(SecondsNow() - begin);
  }
  return 1 / Median(std::move(seconds));
}

absl::StatusOr<Comparison> Compare(engine::Rank& baseline, engine::Rank& other,
                                   const std::vector<std::vector<int32_t>>& windows, const device::Device& device,
                                   comm::Communicator& communicator) {
  Comparison sums;
  const auto vocab = static_cast<size_t>(baseline.decoder->config().vocab_size);
  for (const std::vector<int32_t>& window : windows) {
    RW_ASSIGN_OR_RETURN(const std::vector<double> p, ScoreWindow(baseline, window));
    RW_ASSIGN_OR_RETURN(const std::vector<double> q, ScoreWindow(other, window));
    if (communicator.rank() != 0) continue;
    for (size_t t = 0; t + 1 < window.size(); ++t) {
      const std::span<const double> at_p(p.data() + t * vocab, vocab), at_q(q.data() + t * vocab, vocab);
      double divergence = 0;
      for (size_t v = 0; v < vocab; ++v) divergence += std::exp(at_p[v]) * (at_p[v] - at_q[v]);
      sums.kl += divergence;
      sums.worst_kl = std::max(sums.worst_kl, divergence);
      sums.baseline_nll -= at_p[window[t + 1]];
      sums.nll -= at_q[window[t + 1]];
      sums.agreements += std::ranges::max_element(at_p) - at_p.begin() == std::ranges::max_element(at_q) - at_q.begin();
      ++sums.targets;
    }
  }
  for (const int64_t n : other.decoder->kv_pool().SaturatedCounts()) sums.saturated += n;
  RW_ASSIGN_OR_RETURN(const double saturated, SumOverRanks(static_cast<double>(sums.saturated), device, communicator));
  sums.saturated = static_cast<int64_t>(saturated);
  RW_ASSIGN_OR_RETURN(sums.tokens_per_second, DecodeSpeed(other, windows[0]));
  const kernels::KvShape& shape = other.decoder->kv_pool().shape();
  sums.token_bytes = int64_t{2} * shape.n_layers * other.decoder->config().n_kv_heads *
                     kernels::KvVectorBytes(shape.format, shape.head_dim);
  return sums;
}

absl::StatusOr<std::vector<std::vector<int32_t>>> ReadWindows(const Flags& flags) {
  RW_ASSIGN_OR_RETURN(const auto tokenizer, text::Tokenizer::Load(flags.ranks.rank.model_dir));
  RW_ASSIGN_OR_RETURN(const std::string document, ReadTextFile(flags.text_file));
  RW_ASSIGN_OR_RETURN(const std::vector<int32_t> ids, tokenizer->Encode(document, {.add_bos = false}));
  std::vector<std::vector<int32_t>> windows;
  for (int w = 0; w < flags.windows; ++w) {
    const size_t begin = static_cast<size_t>(flags.skipped_windows + w) * flags.window_tokens;
    if (begin + flags.window_tokens > ids.size()) break;
    std::vector<int32_t>& window = windows.emplace_back();
    if (const auto bos = tokenizer->bos_id()) window.push_back(*bos);
    window.insert(window.end(), ids.begin() + begin, ids.begin() + begin + flags.window_tokens);
  }
  if (windows.empty()) return absl::InvalidArgumentError(absl::StrCat(flags.text_file, " is shorter than one window"));
  return windows;
}

void PrintBaseline(const Flags& flags, const engine::RankOptions& options, const engine::Rank& baseline, int tp,
                   const Comparison& sums) {
  const auto count = static_cast<double>(sums.targets);
  std::printf("%s, tp %d, %lld tokens of %s; baseline %s, kv %s\n", flags.ranks.rank.model_dir.c_str(), tp,
              static_cast<long long>(sums.targets), flags.text_file.c_str(), options.model_dir.c_str(),
              baseline.kv.c_str());
  std::printf("%-12s %11s %12s %10s %12s %10s %11s %11s %9s %9s %10s\n", "kv", "activations", "bytes/token", "NLL",
              "perplexity", "dNLL", "KL mean", "KL worst", "same top", "tokens/s", "saturated");
  std::printf("%-12s %11s %12s %10.6f %12.6f\n", "baseline", "", "", sums.baseline_nll / count,
              std::exp(sums.baseline_nll / count));
}

void PrintRow(const engine::Rank& other, const Comparison& sums, const kv::MeasuredLoss& loss) {
  const auto count = static_cast<double>(sums.targets);
  std::printf("%-12s %11s %12lld %10.6f %12.6f %9.4f%% %11.3e %11.3e %8.2f%% %9.1f %10lld\n", other.kv.c_str(),
              kernels::ActivationsName(other.decoder->activations()), static_cast<long long>(sums.token_bytes),
              sums.nll / count, std::exp(sums.nll / count), 100 * loss.nll_change, loss.kl_mean, sums.worst_kl,
              100.0 * static_cast<double>(sums.agreements) / count, sums.tokens_per_second,
              static_cast<long long>(sums.saturated));
  std::fflush(stdout);
}

// The kind of device that `floats` is.
absl::StatusOr<device::Device> OpenFor(kernels::Activations activations, device::DeviceOptions options,
                                       const device::Device& floats, comm::Communicator& host) {
  options.device = floats.gpu < 0 ? "cpu" : "cuda";
  options.activations = activations;
  return device::OpenDevice(options, host);
}

// Windows of a text scored with each of several KV formats and activations, or weights, and with a baseline: perplexity
// of each and KL(baseline || other) per token.
absl::Status CompareKv(const Flags& flags, const device::Device& device, comm::Communicator& host) {
  RW_ASSIGN_OR_RETURN(const std::vector<std::vector<int32_t>> windows, ReadWindows(flags));
  engine::RankOptions options = flags.ranks.rank;
  options.max_running = 1;
  options.max_tokens = options.max_step_rows = options.max_chunk_rows = flags.window_tokens + 1;
  options.has_prefix_cache = false;
  engine::RankOptions baseline_options = options;
  baseline_options.kv = flags.baseline_kv;
  if (!flags.baseline_model.empty()) baseline_options.model_dir = flags.baseline_model;
  RW_ASSIGN_OR_RETURN(engine::Rank baseline,
                      engine::LoadRank(baseline_options, *device.backend, device.communicator(host)));

  bool is_first = true;
  for (const std::string& name : flags.activations) {
    device::Device opened;
    const kernels::Activations activations = kernels::ActivationsByName().at(name);
    const bool is_float = activations == kernels::Activations::kFloat;
    if (!is_float) {
      RW_ASSIGN_OR_RETURN(opened, OpenFor(activations, flags.ranks.device, device, host));
    }
    const device::Device& own = is_float ? device : opened;
    comm::Communicator& communicator = own.communicator(host);
    for (const std::string& format : flags.kv_formats) {
      options.kv = format;
      RW_ASSIGN_OR_RETURN(engine::Rank other, engine::LoadRank(options, *own.backend, communicator));
      if (other.decoder->config().vocab_size != baseline.decoder->config().vocab_size) {
        return absl::InvalidArgumentError(
            absl::StrCat(flags.baseline_model, " has another vocabulary than ", flags.ranks.rank.model_dir));
      }
      RW_ASSIGN_OR_RETURN(const Comparison sums, Compare(baseline, other, windows, own, communicator));
      if (communicator.rank() != 0) continue;
      const kv::MeasuredLoss loss{.kv = other.kv,
                                  .text = flags.text_file,
                                  .token_count = sums.targets,
                                  .nll_change = sums.nll / sums.baseline_nll - 1,
                                  .kl_mean = sums.kl / static_cast<double>(sums.targets)};
      if (is_first) PrintBaseline(flags, baseline_options, baseline, communicator.size(), sums);
      is_first = false;
      PrintRow(other, sums, loss);
      if (flags.is_recorded && !other.kv_scales_id.empty() && is_float) {
        RW_RETURN_IF_ERROR(kv::RecordMeasurement(flags.ranks.rank.kv_scales_dir, other.kv_scales_id, loss));
      }
    }
  }
  return absl::OkStatus();
}

int Run(Flags& flags, bool is_engine) {
  auto session = comm::MpiSession::Start();
  if (!session.ok()) {
    spdlog::error("{}", std::string(session.status().message()));
    return 3;
  }
  comm::MpiSession& mpi = **session;
  if (flags.tp != 0 && flags.tp != mpi.size()) {
    spdlog::error("--tp {}, but {} ranks run: start it as `rankwise bench` or with mpirun -n {}", flags.tp, mpi.size(),
                  flags.tp);
    return 2;
  }
  device::ShareOutCpus(mpi.host_size(), flags.ranks.device.cpu);
  flags.ranks.device.mpi_host_rank = mpi.host_rank();
  auto host = comm::CreateGroupCommunicator(mpi, absl::Minutes(1));
  absl::Status ended = host.status();
  if (ended.ok()) {
    if (!is_engine) flags.ranks.device.activations = kernels::Activations::kFloat;  // the baseline's
    const absl::StatusOr<device::Device> device = device::OpenDevice(flags.ranks.device, **host);
    if (!device.ok()) {
      if (mpi.rank() == 0) spdlog::error("{}", std::string(device.status().message()));
      return 2;
    }
    ended = is_engine ? BenchEngine(flags.ranks, flags.engine, *device, device->communicator(**host))
                      : CompareKv(flags, *device, **host);
  }
  if (ended.ok()) return 0;
  spdlog::error("{}", std::string(ended.message()));
  if (absl::IsOutOfRange(ended)) return 1;
  if (mpi.size() > 1) mpi.Abort(3);
  return 3;
}

}  // namespace
}  // namespace rankwise::launch

int main(int argc, char** argv) {
  using namespace rankwise::launch;
  CLI::App app("rankwise-bench: how fast an engine runs against its machine's limits, and what a KV format costs");
  Flags flags;
  CLI::App* engine = app.add_subcommand("engine", "Decode and prefill speed, with the fraction of the measured limits");
  AddEngineFlags(*engine, flags.ranks, flags.engine);
  CLI::App* kv = app.add_subcommand(
      "kv",
      "Memory, perplexity, KL and single-stream speed of KV formats, quantised weights and activations, against a "
      "baseline");
  AddRankFlags(*kv, flags.ranks);
  for (CLI::App* command : {engine, kv}) {
    command->add_option("--tp", flags.tp, "Ranks, which `rankwise bench` starts")->default_str("those of mpirun");
  }
  kv->add_option("--kv", flags.kv_formats, absl::StrCat("Some of ", absl::StrJoin(rankwise::kv::KvNames(), ", ")))
      ->delimiter(',')
      ->default_str(kDefaultKvFormat);
  kv->add_option("--activations", flags.activations,
                 "Some of float, int8, bf16: what weights are multiplied with; the baseline's always with floats")
      ->delimiter(',')
      ->check(CLI::IsMember(rankwise::kernels::ActivationsByName()))
      ->capture_default_str();
  kv->add_option("--text", flags.text_file, "UTF-8 text to score")->required();
  kv->add_option("--baseline", flags.baseline_kv, "KV format to compare with")->capture_default_str();
  kv->add_option("--baseline-model", flags.baseline_model,
                 "Model to compare with, e.g. that which MODEL was quantised from")
      ->default_str("MODEL");
  kv->add_option("--windows", flags.windows, "Windows at most")->capture_default_str();
  kv->add_option("--window-tokens", flags.window_tokens, "Tokens of a window behind its BOS")->capture_default_str();
  kv->add_option("--skip-windows", flags.skipped_windows, "Windows left out at the text's beginning")
      ->check(CLI::Range(0, 1 << 24))
      ->capture_default_str();
  kv->add_flag("--record", flags.is_recorded, "Write dNLL and KL, with floats, into the manifest of --kv-scales");
  app.require_subcommand(1);
  app.footer(
      "`rankwise bench memory --help`: the plan of `rankwise plan` against running ranks\n"
      "`rankwise bench serve --help`: latencies and throughput of a running deployment");
  CLI11_PARSE(app, argc, argv);
  rankwise::StartLog("bench", "warn");
  return Run(flags, engine->parsed());
}
