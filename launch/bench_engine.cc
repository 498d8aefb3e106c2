#include "launch/bench_engine.h"

#include <algorithm>
#include <chrono>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/status_macros.h"
#include "worker/kv/kv_choice.h"

namespace rankwise::launch {
namespace {

constexpr char kBench[] = "engine";

absl::Status Ignore(int32_t, int32_t, std::span<float>) { return absl::OkStatus(); }
// As in serving, where logits stay where they are.
const engine::Executor::TokenSink kGreedy = {
    .rule_of = [](int32_t, int32_t) { return kernels::DrawRule{.temperature = 0}; },
    .take = [](int32_t, int32_t, int32_t) { return absl::OkStatus(); }};

// One row of the table: work done by all ranks, against the sum of the ranks' limits.
struct Measurement {
  std::string work;
  double tokens_per_second, milliseconds, bytes_per_second, read_fraction, flops_per_second, compute_fraction;
};

class EngineBench {
 public:
  EngineBench(const EngineFlags& flags, engine::Rank& rank, const device::Device& device,
              comm::Communicator& communicator)
      : flags_(flags), rank_(rank), device_(device), communicator_(communicator), config_(rank.decoder->config()) {}

  absl::Status Run(kernels::MachineLimits limits) {
    for (double* limit : {&limits.read_bytes_per_second, &limits.fma_flops_per_second, &limits.int8_ops_per_second,
                          &limits.bf16_flops_per_second}) {
      RW_ASSIGN_OR_RETURN(*limit, SumOverRanks(*limit, device_, communicator_));
    }
    limits_ = limits;
    if (flags_.prompt > 0) RW_RETURN_IF_ERROR(Prefill());
    for (const int batch : flags_.batches) RW_RETURN_IF_ERROR(Decode(batch));
    return absl::OkStatus();
  }

  bool is_ahead() const { return is_ahead_; }

  // What Run has measured, for a person and for a record.
  std::string Text() const {
    std::string text = absl::StrFormat("limits measured in this run, all ranks: %.1f GB/s %s, %.1f GFLOP/s %s",
                                       limits_.read_bytes_per_second / 1e9, device_.gpu < 0 ? "read" : "copied",
                                       limits_.fma_flops_per_second / 1e9, device_.gpu < 0 ? "f32 fma" : "bf16 matmul");
    if (activations_ != kernels::Activations::kFloat) {
      absl::StrAppendFormat(&text, ", %.1f %s %s, in which the layers' matrices are multiplied",
                            limits_.ops_per_second(activations_) / 1e9, unit_, kernels::ActivationsName(activations_));
    }
    absl::StrAppendFormat(&text, "\n\n%-28s %10s %10s %8s %9s %9s %9s\n", "work", "tokens/s", "ms", "GB/s", "of limit",
                          unit_, "of limit");
    for (const Measurement& m : measurements_) {
      absl::StrAppendFormat(&text, "%-28s %10.2f %10.2f %8.2f %8.0f%% %9.1f %8.0f%%\n", m.work, m.tokens_per_second,
                            m.milliseconds, m.bytes_per_second / 1e9, 100 * m.read_fraction, m.flops_per_second / 1e9,
                            100 * m.compute_fraction);
    }
    return text;
  }

  std::vector<Figure> Figures() const {
    std::vector<Figure> figures = {
        {"limit of reads", "GB/s", limits_.read_bytes_per_second / 1e9, Better::kNeither},
        {"limit of arithmetic", "GFLOP/s", limits_.fma_flops_per_second / 1e9, Better::kNeither}};
    if (activations_ != kernels::Activations::kFloat) {
      figures.push_back({absl::StrCat("limit of ", kernels::ActivationsName(activations_), " arithmetic"), unit_,
                         limits_.ops_per_second(activations_) / 1e9, Better::kNeither});
    }
    for (const Measurement& m : measurements_) {
      figures.push_back({m.work, "tokens/s", m.tokens_per_second, Better::kHigher});
      figures.push_back({m.work, "ms", m.milliseconds, Better::kLower});
      figures.push_back({m.work, "% of reads", 100 * m.read_fraction, Better::kHigher});
      figures.push_back({m.work, "% of arithmetic", 100 * m.compute_fraction, Better::kHigher});
    }
    return figures;
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
      RW_RETURN_IF_ERROR(rank_.executor->Execute(plan, Ignore, kGreedy));
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
      const double begin = SecondsNow();
      RW_RETURN_IF_ERROR(Fill(0, flags_.prompt));
      if (i > 0) seconds.push_back(SecondsNow() - begin);
    }
    const int64_t rows = flags_.prompt;
    return Add(absl::StrCat("prefill ", rows), rows, Median(seconds),
               {.bytes = rank_.decoder->weight_bytes(),
                .layer_multiply_adds = rows * rank_.decoder->multiply_adds(),
                .output_multiply_adds = rank_.decoder->output_multiply_adds(),
                .attention_multiply_adds = AttentionMultiplyAdds(rows * (rows + 1) / 2)});
  }

  StepPlan DecodePlan(int batch, int position) const {
    StepPlan plan{.kind = StepKind::kRun};
    for (int slot = 0; slot < batch; ++slot) AddSegment(plan, slot, position, 1, LogitsNeed::kLast);
    return plan;
  }

  // The seconds of each step.
  absl::StatusOr<std::vector<double>> ExecuteSteps(int batch, int depth) {
    std::vector<double> seconds;
    for (int step = 0; step < flags_.steps; ++step) {
      const StepPlan plan = DecodePlan(batch, depth + step);
      const double begin = SecondsNow();
      RW_RETURN_IF_ERROR(rank_.executor->Execute(plan, Ignore, kGreedy));
      seconds.push_back(SecondsNow() - begin);
    }
    return seconds;
  }

  // As a device that draws serves: each step is issued, with the tokens that the one before draws, while that one runs.
  // The seconds between one step's tokens and the next one's.
  absl::StatusOr<std::vector<double>> IssueSteps(int batch, int depth) {
    is_ahead_ = true;
    engine::Executor& executor = *rank_.executor;
    const bool draws = communicator_.rank() == 0;
    std::vector<double> seconds;
    double before = SecondsNow();
    for (int step = 0; step <= flags_.steps; ++step) {
      if (step < flags_.steps) {
        StepPlan plan = DecodePlan(batch, depth + step);
        if (step > 0) {
          plan.kind = StepKind::kRunOn;
          for (int slot = 0; slot < batch; ++slot) plan.segments[slot].tokens = {slot};
        }
        RW_RETURN_IF_ERROR(executor.Issue(plan, draws ? kGreedy : engine::Executor::TokenSink()));
      }
      if (step == 0) continue;
      if (draws) RW_RETURN_IF_ERROR(executor.Collect(kGreedy));
      const double now = SecondsNow();
      seconds.push_back(now - std::exchange(before, now));
    }
    return seconds;
  }

  absl::Status Decode(int batch) {
    const int depth = std::max(flags_.depth, 1);
    for (int slot = 0; slot < batch; ++slot) RW_RETURN_IF_ERROR(Fill(slot, depth));
    RW_ASSIGN_OR_RETURN(const std::vector<double> seconds,
                        rank_.executor->can_issue() ? IssueSteps(batch, depth) : ExecuteSteps(batch, depth));
    const int64_t positions = batch * (depth + flags_.steps / 2);
    return Add(absl::StrCat("decode batch ", batch, " depth ", depth), batch, Median(seconds),
               {.bytes = rank_.decoder->weight_bytes() + KvBytes(positions),
                .layer_multiply_adds = batch * rank_.decoder->multiply_adds(),
                .output_multiply_adds = batch * rank_.decoder->output_multiply_adds(),
                .attention_multiply_adds = AttentionMultiplyAdds(positions)});
  }

  // Of this rank; those of matrices are in the arithmetic of their activations.
  struct Work {
    int64_t bytes, layer_multiply_adds, output_multiply_adds, attention_multiply_adds;
  };
  absl::Status Add(const std::string& work, int64_t tokens, double seconds, const Work& own) {
    const auto sum = [&](int64_t value) { return SumOverRanks(static_cast<double>(value), device_, communicator_); };
    RW_ASSIGN_OR_RETURN(const double all_bytes, sum(own.bytes));
    RW_ASSIGN_OR_RETURN(const double layer_flops, sum(2 * own.layer_multiply_adds));
    RW_ASSIGN_OR_RETURN(const double output_flops, sum(2 * own.output_multiply_adds));
    RW_ASSIGN_OR_RETURN(const double attention_flops, sum(2 * own.attention_multiply_adds));
    const double least_seconds = layer_flops / limits_.ops_per_second(activations_) +
                                 output_flops / limits_.ops_per_second(rank_.decoder->output_activations()) +
                                 attention_flops / limits_.fma_flops_per_second;
    const double flops = layer_flops + output_flops + attention_flops;
    measurements_.push_back({.work = work,
                             .tokens_per_second = tokens / seconds,
                             .milliseconds = 1e3 * seconds,
                             .bytes_per_second = all_bytes / seconds,
                             .read_fraction = all_bytes / seconds / limits_.read_bytes_per_second,
                             .flops_per_second = flops / seconds,
                             .compute_fraction = least_seconds / seconds});
    return absl::OkStatus();
  }

  const EngineFlags& flags_;
  engine::Rank& rank_;
  const device::Device& device_;
  comm::Communicator& communicator_;
  const weights::ModelConfig& config_;
  const kernels::Activations activations_ = rank_.decoder->activations();
  const char* const unit_ = activations_ == kernels::Activations::kInt8 ? "GOP/s" : "GFLOP/s";
  kernels::MachineLimits limits_;  // of all ranks
  std::vector<Measurement> measurements_;
  bool is_ahead_ = false;
};

absl::StatusOr<kernels::MachineLimits> MeasureLimits(const RankFlags& ranks, const device::Device& device) {
  if (device.gpu >= 0) return kernels::MeasureCudaLimits(ranks.device.plugin_folder, device.gpu);
  return kernels::MeasureMachineLimits(ranks.device.cpu.threads);
}

}  // namespace

absl::Status BenchEngine(const RankFlags& ranks, const EngineFlags& flags, const device::Device& device,
                         comm::Communicator& communicator) {
  std::optional<BenchRecord> baseline;
  if (communicator.rank() == 0) {
    RW_ASSIGN_OR_RETURN(baseline, ReadBaseline(flags.record, kBench));
  }
  RW_ASSIGN_OR_RETURN(const kernels::MachineLimits limits, MeasureLimits(ranks, device));
  engine::RankOptions options = ranks.rank;
  options.max_running = std::max(1, *std::ranges::max_element(flags.batches));
  options.max_tokens = std::max(flags.prompt, std::max(flags.depth, 1) + flags.steps);
  const int step_rows = flags.step_rows > 0 ? flags.step_rows : device.backend->step_rows();
  options.max_step_rows = options.max_chunk_rows = std::max(step_rows, options.max_running);
  const int64_t blocks_each = (options.max_tokens + kernels::kKvBlockTokens - 1) / kernels::kKvBlockTokens;
  RW_ASSIGN_OR_RETURN(engine::Rank rank, engine::LoadRank(options, *device.backend, communicator));
  if (rank.scheduler_options.block_count < blocks_each * options.max_running) {
    return absl::InvalidArgumentError(absl::StrCat("batch ", options.max_running, " at ", options.max_tokens,
                                                   " tokens needs more KV memory: give --kv-memory"));
  }
  EngineBench bench(flags, rank, device, communicator);
  RW_RETURN_IF_ERROR(bench.Run(limits));
  if (communicator.rank() != 0) return absl::OkStatus();
  BenchRecord record = StartRecord(kBench);
  record.subject = absl::StrFormat("%s, %s, tp %d, kv %s, %s activations, %.3f GB of weights per rank%s",
                                   options.model_dir, device.backend->Description(), communicator.size(), rank.kv,
                                   kernels::ActivationsName(rank.decoder->activations()),
                                   static_cast<double>(rank.decoder->weight_bytes()) / 1e9,
                                   bench.is_ahead() ? ", decode issued a step ahead" : "");
  record.figures = bench.Figures();
  return Report(record, absl::StrCat(record.subject, "\n", bench.Text()), flags.record, baseline);
}

void AddRankFlags(CLI::App& app, RankFlags& flags) {
  app.add_option("--model", flags.rank.model_dir, "Folder with config.json and *.safetensors, or a workspace")
      ->required();
  app.add_option("--device", flags.device.device, "cpu, cuda or auto")->capture_default_str();
  app.add_flag("--allow-shared-gpu", flags.device.is_gpu_sharing_allowed, "Let ranks share a GPU");
  app.add_option("--kv-scales", flags.rank.kv_scales_dir, "Folder that kv-qparams wrote");
  app.add_option("--threads", flags.device.cpu.threads, "CPU threads per rank")
      ->default_str("CPUs / ranks on this host");
  app.add_option("--instruction-set", flags.device.cpu.instruction_set, "avx2 or avx512");
}

void AddEngineFlags(CLI::App& app, RankFlags& ranks, EngineFlags& flags) {
  AddRankFlags(app, ranks);
  app.add_option("--kv", ranks.rank.kv, absl::StrJoin(kv::KvNames(), ", "))->default_str(kDefaultKvFormat);
  app.add_option_function<std::string>(
         "--activations",
         [&ranks](const std::string& name) { ranks.device.activations = kernels::ActivationsOfFlag(name); },
         kernels::kActivationsHelp)
      ->check(CLI::IsMember(kernels::ActivationsFlags()))
      ->default_str(kernels::kAutoActivations);
  app.add_option("--batch", flags.batches, "Batch sizes of decode, e.g. 1,8,32")->delimiter(',')->capture_default_str();
  app.add_option("--depth", flags.depth, "Tokens in the cache before decode begins")->capture_default_str();
  app.add_option("--prompt", flags.prompt, "Tokens of the prefill; 0 leaves it out")->capture_default_str();
  app.add_option("--steps", flags.steps, "Decode steps, of which the median is taken")->capture_default_str();
  app.add_option("--repeats", flags.repeats, "Prefills, of which the median is taken")->capture_default_str();
  app.add_option("--kv-memory", ranks.rank.kv_memory_bytes, "Bytes of KV cache per rank")
      ->transform(CLI::AsSizeValue(false));
  app.add_option("--step-rows", flags.step_rows, "Token rows of one step at most, e.g. of a prefill")
      ->check(CLI::Range(1, 1 << 16))
      ->default_str("what the device serves with");
  AddRecordFlags(app, flags.record);
}

double SecondsNow() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double Median(std::vector<double> values) {
  std::ranges::nth_element(values, values.begin() + values.size() / 2);
  return values[values.size() / 2];
}

absl::StatusOr<double> SumOverRanks(double value, const device::Device& device, comm::Communicator& communicator) {
  float sum = static_cast<float>(value);
  RW_ASSIGN_OR_RETURN(const kernels::Backend::Floats there, device.backend->Allocate(1));
  RW_RETURN_IF_ERROR(device.backend->CopyToDevice({&sum, 1}, there.get()));
  RW_RETURN_IF_ERROR(communicator.AllReduceSum({there.get(), 1}, absl::Minutes(1)));
  RW_RETURN_IF_ERROR(communicator.Wait(absl::Minutes(1)));
  RW_RETURN_IF_ERROR(device.backend->CopyToHost(there.get(), {&sum, 1}));
  return sum;
}

}  // namespace rankwise::launch
