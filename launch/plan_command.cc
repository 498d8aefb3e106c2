#include <algorithm>
#include <memory>
#include <optional>
#include <string>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "base/status_macros.h"
#include "launch/commands.h"
#include "launch/memory_plan.h"
#include "launch/memory_report.h"

namespace rankwise::launch {
namespace {

constexpr char kDescription[] = R"(Say what memory each rank will take, before it takes it

MODEL is a model folder, a config.json, or a shape: tiny, tinyllama-1.1b, llama-7b. The columns, per rank in MiB:
  weights      matrices as packed (its 1/N), norms and biases; f16, bf16 or f32 as in the folder or its configuration
  embedding    the table, read where the checkpoint is mapped: ranks of one host share its pages
  KV           `--batch` sequences of `--seq` tokens, in whole blocks
  activations  buffers of the largest step (128 rows, or the batch), scratch of the threads, RoPE angles
  comm         all-reduce scratch, and on rank 0 the logits of all ranks
  process      gRPC, MPI and stacks, 5 MiB as measured, and on rank 0 the scheduler's ledger of blocks; code is a mapped
               file like any other and not counted
`bench memory` holds this against running ranks. --overhead replaces the last three columns:
  own          as above
  page         what TurboMind adds on a GPU in the table of LMDeploy's KV int8 page: 1260 MiB, and 2 MiB a sequence;
               `rankwise plan llama-7b --seq 2056 --overhead page` gives that table's eight cells within 0.5 %
  MIB[+MIB]    so many MiB a rank, and so many for each sequence)";

constexpr char kExamples[] = R"(Examples:
  rankwise plan ./Llama-2-7b --tp 4 --batch 16,32,64 --seq 4096 --kv f16,int8 --memory 40G
  rankwise plan llama-7b --seq 2056 --overhead page --memory 80G --svg memory.svg)";

struct PlanFlags {
  MemoryFlags memory;
  std::string overhead = "own";
  uint64_t limit_bytes = 0;  // 0: none
};

absl::StatusOr<std::optional<Overhead>> ParseOverhead(const std::string& text) {
  if (text == "own") return std::nullopt;
  if (text == "page") return kPageOverhead;
  const std::vector<std::string> parts = absl::StrSplit(text, '+');
  double mib[2] = {0, 0};
  bool is_good = parts.size() <= 2;
  for (size_t i = 0; is_good && i < parts.size(); ++i) {
    is_good = absl::SimpleAtod(parts[i], &mib[i]) && mib[i] >= 0 && mib[i] <= 1e9;
  }
  if (!is_good) {
    return absl::InvalidArgumentError(absl::StrCat("--overhead ", text, " is not own, page, MIB or MIB+MIB"));
  }
  return Overhead{static_cast<int64_t>(mib[0] * (1 << 20)), static_cast<int64_t>(mib[1] * (1 << 20))};
}

void PrintModel(const PlannedModel& model, const MemoryOptions& options) {
  const weights::ModelConfig& c = model.config;
  absl::PrintF(
      "%s: %s, %d layers, %d heads, %d KV heads of %d, hidden %d, intermediate %d, vocabulary %d, weights %s\n",
      model.name, c.model_type, c.n_layers, c.n_heads, c.n_kv_heads, c.head_dim, c.hidden_size, c.intermediate_size,
      c.vocab_size, kernels::DTypeName(model.weight_dtype));
  absl::PrintF("tp %d, %d thread%s a rank, %d tokens a sequence: %d blocks of %d\n\n", options.tp, options.threads,
               options.threads == 1 ? "" : "s", options.sequence_tokens, BlocksPerSequence(options.sequence_tokens),
               kernels::kKvBlockTokens);
}

void PrintHeader(bool has_own_overhead) {
  absl::PrintF("%-10s %6s %9s %10s %10s %10s", "kv", "batch", "ranks", "weights", "embedding", "KV");
  if (has_own_overhead) absl::PrintF(" %11s %8s %8s", "activations", "comm", "process");
  if (!has_own_overhead) absl::PrintF(" %10s", "overhead");
  absl::PrintF(" %11s\n", "total, MiB");
}

void PrintRow(const std::string& kv, int64_t batch, const RankGroup& ranks, bool has_own_overhead) {
  const RankMemory& m = ranks.memory;
  absl::PrintF("%-10s %6d %9s %10.1f %10.1f %10.1f", kv, batch, ranks.name(), Mib(m.weights), Mib(m.embedding),
               Mib(m.kv));
  if (has_own_overhead) absl::PrintF(" %11.1f %8.1f %8.1f", Mib(m.activations), Mib(m.communication), Mib(m.process));
  if (!has_own_overhead) absl::PrintF(" %10.1f", Mib(m.overhead));
  absl::PrintF(" %11.1f\n", Mib(m.total()));
}

absl::Status Plan(const PlanFlags& flags) {
  RW_ASSIGN_OR_RETURN(const PlannedModel model, FindModel(flags.memory.model));
  RW_ASSIGN_OR_RETURN(const std::optional<Overhead> overhead, ParseOverhead(flags.overhead));
  for (const std::string& kv : flags.memory.kv) RW_RETURN_IF_ERROR(OptionsFor(flags.memory, model, kv, 1).status());
  const auto limit = static_cast<int64_t>(flags.limit_bytes);
  Chart chart{.title = "largest rank", .y_limit = Mib(limit)};
  std::string largest;
  for (const std::string& kv : flags.memory.kv) {
    chart.lines.push_back({.name = kv});
    for (const int64_t batch : flags.memory.batches) {
      RW_ASSIGN_OR_RETURN(const MemoryOptions options, OptionsFor(flags.memory, model, kv, batch));
      RW_ASSIGN_OR_RETURN(const std::vector<RankGroup> groups, PlanRanks(model, options, overhead));
      if (chart.lines.size() == 1 && chart.lines[0].points.empty()) {
        PrintModel(model, options);
        PrintHeader(!overhead.has_value());
      }
      int64_t most = 0;
      for (const RankGroup& group : groups) {
        PrintRow(kv, batch, group, !overhead.has_value());
        most = std::max(most, group.memory.total());
      }
      chart.lines.back().points.emplace_back(batch, Mib(most));
    }
    if (limit == 0) continue;
    RW_ASSIGN_OR_RETURN(const MemoryOptions options, OptionsFor(flags.memory, model, kv, 1));
    RW_ASSIGN_OR_RETURN(const int64_t batch, LargestBatch(model.config, options, limit, overhead));
    absl::StrAppend(&largest, largest.empty() ? "" : ", ", kv, " ", batch);
  }
  if (limit > 0) absl::PrintF("\nlargest batch in %.1f MiB a rank: %s\n", Mib(limit), largest);
  if (flags.memory.sequence_tokens > model.config.max_position) {
    absl::PrintF("\nnote: the model's context is %d tokens; serve refuses --max-tokens %d%s\n",
                 model.config.max_position, flags.memory.sequence_tokens,
                 model.config.rope.scaling == weights::RopeConfig::Scaling::kDynamicNtk
                     ? " beyond its RoPE scaling's factor times that"
                     : "");
  }
  return WriteCharts(flags.memory, chart);
}

}  // namespace

void AddPlan(CLI::App& app, Action& action) {
  CLI::App* command = app.add_subcommand("plan", kDescription);
  command->footer(kExamples);
  const auto flags = std::make_shared<PlanFlags>();
  command->add_option("MODEL", flags->memory.model, "Model folder, config.json, or the name of a shape")->required();
  AddMemoryFlags(*command, flags->memory);
  command
      ->add_option("--memory", flags->limit_bytes, "Memory of one rank, as in 80G: print the largest batch that fits")
      ->transform(CLI::AsSizeValue(false))
      ->check(CLI::Range(uint64_t{1}, uint64_t{1} << 50));
  command->add_option("--overhead", flags->overhead, "own, page, MIB or MIB+MIB_PER_SEQUENCE")->capture_default_str();
  command->callback([flags, &action] { action = [flags] { return Plan(*flags); }; });
}

}  // namespace rankwise::launch
