// Measures a worker's engine without gRPC: how fast it decodes and prefills against this machine's limits, and what a
// KV format costs in accuracy. Runs alone or under mpirun, one rank per process.

#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "base/log.h"
#include "base/mapped_file.h"
#include "base/status_macros.h"
#include "coordinator/text/tokenizer.h"
#include "kernels/machine_limits.h"
#include "worker/comm/mpi_communicator.h"
#include "worker/engine/rank.h"
#include "worker/kv/kv_choice.h"
#include "worker/kv/kv_scales.h"

namespace rankwise {
namespace {

struct Flags {
  engine::RankOptions rank;
  kernels::CpuOptions cpu;
  std::vector<int> batches = {1};
  int depth = 0;
  int prompt = 512;
  int steps = 24;
  int repeats = 5;
  std::string text_file;
  std::vector<std::string> kv_formats = {""};  // of the comparison; "": the model's own
  std::string baseline_kv = "f32", baseline_model;
  int windows = 64;
  int window_tokens = 255;
  int skipped_windows = 0;
  bool is_recorded = false;
  bool is_json = false;
  int tp = 0;
};

double Now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

double Median(std::vector<double> values) {
  std::ranges::nth_element(values, values.begin() + values.size() / 2);
  return values[values.size() / 2];
}

absl::Status Ignore(int32_t, int32_t, std::span<float>) { return absl::OkStatus(); }

// Σ over ranks.
absl::StatusOr<double> Sum(double value, comm::Communicator& communicator) {
  float sum = static_cast<float>(value);
  RW_RETURN_IF_ERROR(communicator.AllReduceSum({&sum, 1}, absl::Minutes(1)));
  return sum;
}

// One row of the table: work done in `seconds` by all ranks, against the sum of the ranks' limits.
struct Figure {
  std::string work;
  double tokens_per_second, milliseconds, bytes_per_second, read_fraction, flops_per_second, fma_fraction;
};

class EngineBench {
 public:
  EngineBench(const Flags& flags, engine::Rank& rank, comm::Communicator& communicator)
      : flags_(flags), rank_(rank), communicator_(communicator), config_(rank.decoder->config()) {}

  absl::Status Run(kernels::MachineLimits limits) {
    RW_ASSIGN_OR_RETURN(read_limit_, Sum(limits.read_bytes_per_second, communicator_));
    RW_ASSIGN_OR_RETURN(fma_limit_, Sum(limits.fma_flops_per_second, communicator_));
    if (flags_.prompt > 0) RW_RETURN_IF_ERROR(Prefill());
    for (const int batch : flags_.batches) RW_RETURN_IF_ERROR(Decode(batch));
    if (communicator_.rank() == 0) Print();
    return absl::OkStatus();
  }

 private:
  // Rows [position, position + count) of slot `slot`, whose blocks are its own range of the pool.
  void AddSegment(StepPlan& plan, int slot, int position, int count, LogitsNeed logits) const {
    StepSegment& segment = plan.segments.emplace_back();
    segment.slot = slot;
    segment.first_position = position;
    segment.logits = logits;
    for (int i = 0; i < count; ++i) {
      segment.tokens.push_back(
          static_cast<int32_t>((int64_t{7919} * (position + i) + 31 * slot + 13) % config_.vocab_size));
    }
    const int blocks_each = rank_.scheduler_options.block_count / rank_.scheduler_options.slot_count;
    const auto blocks = [](int tokens) { return (tokens + kernels::kKvBlockTokens - 1) / kernels::kKvBlockTokens; };
    for (int b = blocks(position); b < blocks(position + count); ++b)
      segment.new_blocks.push_back(slot * blocks_each + b);
  }

  absl::Status Fill(int slot, int tokens) {
    const int step_rows = rank_.scheduler_options.max_step_rows;
    for (int position = 0; position < tokens; position += step_rows) {
      StepPlan plan{.kind = StepKind::kRun};
      if (position == 0) plan.cleared_slots = {slot};
      const int count = std::min(step_rows, tokens - position);
      AddSegment(plan, slot, position, count, position + count == tokens ? LogitsNeed::kLast : LogitsNeed::kNone);
      RW_RETURN_IF_ERROR(rank_.executor->Execute(plan, Ignore));
    }
    return absl::OkStatus();
  }

  // Multiply-adds of scores and weighted values of one row that attends `positions` positions.
  int64_t AttentionMultiplyAdds(int64_t positions) const {
    return 2 * config_.n_layers * rank_.decoder->plan().heads.count() * config_.head_dim * positions;
  }

  int64_t KvBytes(int64_t positions) const {
    const kernels::KvPool& pool = rank_.decoder->kv_pool();
    return pool.bytes() / pool.block_count() / kernels::kKvBlockTokens * positions;
  }

  absl::Status Prefill() {
    std::vector<double> seconds;
    for (int i = 0; i <= flags_.repeats; ++i) {
      RW_RETURN_IF_ERROR(communicator_.Barrier(absl::Minutes(1)));
      const double begin = Now();
      RW_RETURN_IF_ERROR(Fill(0, flags_.prompt));
      if (i > 0) seconds.push_back(Now() - begin);
    }
    const int64_t rows = flags_.prompt;
    const int64_t multiply_adds = rows * rank_.decoder->multiply_adds() + rank_.decoder->output_multiply_adds() +
                                  AttentionMultiplyAdds(rows * (rows + 1) / 2);
    return Add(absl::StrCat("prefill ", rows), rows, Median(seconds), rank_.decoder->weight_bytes(), 2 * multiply_adds);
  }

  absl::Status Decode(int batch) {
    const int depth = std::max(flags_.depth, 1);
    for (int slot = 0; slot < batch; ++slot) RW_RETURN_IF_ERROR(Fill(slot, depth));
    std::vector<double> seconds;
    for (int step = 0; step < flags_.steps; ++step) {
      StepPlan plan{.kind = StepKind::kRun};
      for (int slot = 0; slot < batch; ++slot) AddSegment(plan, slot, depth + step, 1, LogitsNeed::kLast);
      const double begin = Now();
      RW_RETURN_IF_ERROR(rank_.executor->Execute(plan, Ignore));
      seconds.push_back(Now() - begin);
    }
    const int64_t positions = batch * (depth + flags_.steps / 2);
    const int64_t multiply_adds = batch * (rank_.decoder->multiply_adds() + rank_.decoder->output_multiply_adds()) +
                                  AttentionMultiplyAdds(positions);
    return Add(absl::StrCat("decode batch ", batch, " depth ", depth), batch, Median(seconds),
               rank_.decoder->weight_bytes() + KvBytes(positions), 2 * multiply_adds);
  }

  absl::Status Add(const std::string& work, int64_t tokens, double seconds, int64_t bytes, int64_t flops) {
    RW_ASSIGN_OR_RETURN(const double all_bytes, Sum(static_cast<double>(bytes), communicator_));
    RW_ASSIGN_OR_RETURN(const double all_flops, Sum(static_cast<double>(flops), communicator_));
    figures_.push_back({.work = work,
                        .tokens_per_second = tokens / seconds,
                        .milliseconds = 1e3 * seconds,
                        .bytes_per_second = all_bytes / seconds,
                        .read_fraction = all_bytes / seconds / read_limit_,
                        .flops_per_second = all_flops / seconds,
                        .fma_fraction = all_flops / seconds / fma_limit_});
    return absl::OkStatus();
  }

  void Print() const {
    if (flags_.is_json) {
      nlohmann::json out{{"read_limit_bytes_per_second", read_limit_}, {"fma_limit_flops_per_second", fma_limit_}};
      for (const Figure& f : figures_) {
        out["figures"].push_back({{"work", f.work},
                                  {"tokens_per_second", f.tokens_per_second},
                                  {"milliseconds", f.milliseconds},
                                  {"bytes_per_second", f.bytes_per_second},
                                  {"read_fraction", f.read_fraction},
                                  {"flops_per_second", f.flops_per_second},
                                  {"fma_fraction", f.fma_fraction}});
      }
      std::printf("%s\n", out.dump(2).c_str());
      return;
    }
    std::printf("limits measured in this run, all ranks: %.1f GB/s read, %.1f GFLOP/s f32 fma\n\n", read_limit_ / 1e9,
                fma_limit_ / 1e9);
    std::printf("%-28s %10s %10s %8s %8s %9s %8s\n", "work", "tokens/s", "ms", "GB/s", "of read", "GFLOP/s", "of fma");
    for (const Figure& f : figures_) {
      std::printf("%-28s %10.2f %10.2f %8.2f %7.0f%% %9.1f %7.0f%%\n", f.work.c_str(), f.tokens_per_second,
                  f.milliseconds, f.bytes_per_second / 1e9, 100 * f.read_fraction, f.flops_per_second / 1e9,
                  100 * f.fma_fraction);
    }
  }

  const Flags& flags_;
  engine::Rank& rank_;
  comm::Communicator& communicator_;
  const weights::ModelConfig& config_;
  double read_limit_ = 0, fma_limit_ = 0;
  std::vector<Figure> figures_;
};

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
    const double begin = Now();
    RW_RETURN_IF_ERROR(rank.executor->Execute(plan, Ignore));
    seconds.push_back(Now() - begin);
  }
  return 1 / Median(std::move(seconds));
}

absl::StatusOr<Comparison> Compare(engine::Rank& baseline, engine::Rank& other,
                                   const std::vector<std::vector<int32_t>>& windows, comm::Communicator& communicator) {
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
  RW_ASSIGN_OR_RETURN(const double saturated, Sum(static_cast<double>(sums.saturated), communicator));
  sums.saturated = static_cast<int64_t>(saturated);
  RW_ASSIGN_OR_RETURN(sums.tokens_per_second, DecodeSpeed(other, windows[0]));
  const kernels::KvShape& shape = other.decoder->kv_pool().shape();
  sums.token_bytes = int64_t{2} * shape.n_layers * other.decoder->config().n_kv_heads *
                     kernels::KvVectorBytes(shape.format, shape.head_dim);
  return sums;
}

// Windows of a text scored with each of several KV formats, or weights, and with a baseline: perplexity of each and
// KL(baseline || other) per token.
absl::Status CompareKv(const Flags& flags, kernels::Backend& backend, comm::Communicator& communicator) {
  RW_ASSIGN_OR_RETURN(const auto tokenizer, text::Tokenizer::Load(flags.rank.model_dir));
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
  engine::RankOptions options = flags.rank;
  options.max_running = 1;
  options.max_tokens = options.max_step_rows = options.max_chunk_rows = flags.window_tokens + 1;
  options.has_prefix_cache = false;
  engine::RankOptions baseline_options = options;
  baseline_options.kv = flags.baseline_kv;
  if (!flags.baseline_model.empty()) baseline_options.model_dir = flags.baseline_model;
  RW_ASSIGN_OR_RETURN(engine::Rank baseline, engine::LoadRank(baseline_options, backend, communicator));

  bool is_first = true;
  for (const std::string& format : flags.kv_formats) {
    options.kv = format;
    RW_ASSIGN_OR_RETURN(engine::Rank other, engine::LoadRank(options, backend, communicator));
    if (other.decoder->config().vocab_size != baseline.decoder->config().vocab_size) {
      return absl::InvalidArgumentError(
          absl::StrCat(flags.baseline_model, " has another vocabulary than ", flags.rank.model_dir));
    }
    RW_ASSIGN_OR_RETURN(const Comparison sums, Compare(baseline, other, windows, communicator));
    if (communicator.rank() != 0) continue;
    const auto count = static_cast<double>(sums.targets);
    const kv::MeasuredLoss loss{.kv = other.kv,
                                .text = flags.text_file,
                                .token_count = sums.targets,
                                .nll_change = sums.nll / sums.baseline_nll - 1,
                                .kl_mean = sums.kl / count};
    if (is_first) {
      std::printf("%s, tp %d, %lld tokens of %s; baseline %s, kv %s\n", flags.rank.model_dir.c_str(),
                  communicator.size(), static_cast<long long>(sums.targets), flags.text_file.c_str(),
                  baseline_options.model_dir.c_str(), baseline.kv.c_str());
      std::printf("%-12s %12s %10s %12s %10s %11s %11s %9s %9s %10s\n", "kv", "bytes/token", "NLL", "perplexity",
                  "dNLL", "KL mean", "KL worst", "same top", "tokens/s", "saturated");
      std::printf("%-12s %12s %10.6f %12.6f\n", "baseline", "", sums.baseline_nll / count,
                  std::exp(sums.baseline_nll / count));
      is_first = false;
    }
    std::printf("%-12s %12lld %10.6f %12.6f %9.4f%% %11.3e %11.3e %8.2f%% %9.1f %10lld\n", other.kv.c_str(),
                static_cast<long long>(sums.token_bytes), sums.nll / count, std::exp(sums.nll / count),
                100 * loss.nll_change, loss.kl_mean, sums.worst_kl,
                100.0 * static_cast<double>(sums.agreements) / count, sums.tokens_per_second,
                static_cast<long long>(sums.saturated));
    std::fflush(stdout);
    if (flags.is_recorded && !other.kv_scales_id.empty()) {
      RW_RETURN_IF_ERROR(kv::RecordMeasurement(flags.rank.kv_scales_dir, other.kv_scales_id, loss));
    }
  }
  return absl::OkStatus();
}

absl::Status BenchEngine(Flags& flags, kernels::Backend& backend, comm::Communicator& communicator) {
  const kernels::MachineLimits limits = kernels::MeasureMachineLimits(flags.cpu.threads);
  engine::RankOptions options = flags.rank;
  options.max_running = std::max(1, *std::ranges::max_element(flags.batches));
  options.max_tokens = std::max(flags.prompt, std::max(flags.depth, 1) + flags.steps);
  options.max_step_rows = std::max({512, options.max_running});
  const int64_t blocks_each = (options.max_tokens + kernels::kKvBlockTokens - 1) / kernels::kKvBlockTokens;
  RW_ASSIGN_OR_RETURN(engine::Rank rank, engine::LoadRank(options, backend, communicator));
  if (rank.scheduler_options.block_count < blocks_each * options.max_running) {
    return absl::InvalidArgumentError(absl::StrCat("batch ", options.max_running, " at ", options.max_tokens,
                                                   " tokens needs more KV memory: give --kv-memory"));
  }
  if (communicator.rank() == 0 && !flags.is_json) {
    std::printf("%s, %s, tp %d, kv %s, %.3f GB of weights per rank\n", flags.rank.model_dir.c_str(),
                backend.Description().c_str(), communicator.size(), rank.kv.c_str(),
                rank.decoder->weight_bytes() / 1e9);
  }
  return EngineBench(flags, rank, communicator).Run(limits);
}

constexpr char kDefaultFormat[] = "int8 for a workspace with quant_policy = 4, else f16";

void AddCommonFlags(CLI::App& app, Flags& flags) {
  app.add_option("--model", flags.rank.model_dir, "Folder with config.json and *.safetensors, or a workspace")
      ->required();
  app.add_option("--tp", flags.tp, "Ranks, which `rankwise bench` starts")->default_str("those of mpirun");
  app.add_option("--kv-scales", flags.rank.kv_scales_dir, "Folder that kv-qparams wrote");
  app.add_option("--threads", flags.cpu.threads, "CPU threads per rank")->default_str("CPUs / ranks on this host");
  app.add_option("--instruction-set", flags.cpu.instruction_set, "avx2 or avx512");
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
  if (flags.cpu.threads == 0) {
    flags.cpu.threads = std::max(1, static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN)) / mpi.host_size());
  }
  flags.cpu.pin_threads = mpi.host_size() == 1;
  absl::Status ended;
  auto communicator = comm::CreateGroupCommunicator(mpi, absl::Minutes(1));
  auto backend = kernels::CreateCpuBackend(flags.cpu);
  ended.Update(communicator.status());
  ended.Update(backend.status());
  if (ended.ok()) {
    ended = is_engine ? BenchEngine(flags, **backend, **communicator) : CompareKv(flags, **backend, **communicator);
  }
  if (ended.ok()) return 0;
  spdlog::error("{}", std::string(ended.message()));
  if (mpi.size() > 1) mpi.Abort(3);
  return 3;
}

}  // namespace
}  // namespace rankwise

int main(int argc, char** argv) {
  using namespace rankwise;
  CLI::App app("rankwise-bench: how fast an engine runs against its machine's limits, and what a KV format costs");
  Flags flags;
  CLI::App* engine = app.add_subcommand("engine", "Decode and prefill speed, with the fraction of the measured limits");
  AddCommonFlags(*engine, flags);
  engine->add_option("--kv", flags.rank.kv, absl::StrJoin(kv::KvNames(), ", "))->default_str(kDefaultFormat);
  engine->add_option("--batch", flags.batches, "Batch sizes of decode, e.g. 1,8,32")
      ->delimiter(',')
      ->capture_default_str();
  engine->add_option("--depth", flags.depth, "Tokens in the cache before decode begins")->capture_default_str();
  engine->add_option("--prompt", flags.prompt, "Tokens of the prefill; 0 leaves it out")->capture_default_str();
  engine->add_option("--steps", flags.steps, "Decode steps, of which the median is taken")->capture_default_str();
  engine->add_option("--repeats", flags.repeats, "Prefills, of which the median is taken")->capture_default_str();
  engine->add_option("--kv-memory", flags.rank.kv_memory_bytes, "Bytes of KV cache per rank");
  engine->add_flag("--json", flags.is_json, "Print JSON");
  CLI::App* kv = app.add_subcommand(
      "kv",
      "Memory, perplexity, KL and single-stream speed of KV formats, or of quantised weights, against a baseline");
  AddCommonFlags(*kv, flags);
  kv->add_option("--kv", flags.kv_formats, absl::StrCat("Some of ", absl::StrJoin(kv::KvNames(), ", ")))
      ->delimiter(',')
      ->default_str(kDefaultFormat);
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
  kv->add_flag("--record", flags.is_recorded, "Write dNLL and KL into the manifest of --kv-scales");
  app.require_subcommand(1);
  app.footer("`rankwise bench memory --help`: the plan of `rankwise plan` against running ranks");
  CLI11_PARSE(app, argc, argv);
  StartLog("bench", "warn");
  return Run(flags, engine->parsed());
}
