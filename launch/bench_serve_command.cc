#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "base/mapped_file.h"
#include "base/status_macros.h"
#include "launch/arrivals.h"
#include "launch/bench_record.h"
#include "launch/chart.h"
#include "launch/client.h"
#include "launch/commands.h"
#include "launch/interrupt.h"
#include "launch/latency_report.h"
#include "launch/load_client.h"
#include "launch/progress_bar.h"

namespace rankwise::launch {
namespace {

using rankwise::v1::GetModelInfoResponse;
using rankwise::v1::Inference;

constexpr char kDescription[] = R"(Latencies and throughput of a running deployment, as its clients see them

Sends requests with prompts of random tokens to a coordinator: --rate as a Poisson process, --concurrency as so many clients
of which each asks again when it has its answer, --trace at the times and lengths of a file (Azure's .csv of TIMESTAMP,
ContextTokens,GeneratedTokens or Mooncake's .jsonl of timestamp, input_length, output_length). Each answer is as long as it
was asked for: an end of sequence does not end it. Arrivals, lengths and prompts follow from --seed alone, so a second run
with the same seed finds its prompts in the prefix cache of the first: the report says how many tokens came from there.

Prints, of the requests that succeeded:
  TTFT          from the time a request was due, also when the client sends it late, to its first token
  ITL           between successive messages with tokens; each has one token, or more where drafts were accepted
  TPOT          a request's (last token - first token) / (tokens - 1)
  end to end    to the end of the stream
and requests, output tokens and all tokens per second; with --slo-*, the goodput: requests per second that kept both.
All streams run over 16 connections and need no thread of their own: --concurrency may be 16384.

Ctrl-C cancels what is under way and prints what was measured until then. Exit codes: 0 every request succeeded, 1 one
failed or, with --fail-on-regression, a figure is worse than the baseline's, 2 something to be changed first, 130
interrupted.)";

constexpr char kExamples[] = R"(Examples:
  rankwise bench serve --endpoint 127.0.0.1:8600 --concurrency 16 --requests 200
  rankwise bench serve --endpoint 127.0.0.1:8600 --rate 4 --prompt-tokens 64:512 --output-tokens 128 --slo-ttft 500 --slo-tpot 50
  rankwise bench serve --endpoint-file ./endpoint --trace azure_llm_2023_conv.csv --divisor 8 --speed 2 --svg latencies.svg
  rankwise bench serve --endpoint-file ./endpoint --concurrency 16 --save before.json
  rankwise bench serve --endpoint-file ./endpoint --concurrency 16 --seed 1 --compare before.json --fail-on-regression)";

constexpr char kBench[] = "serve";
constexpr int kConnections = 16;
constexpr int kMostStreams = 16384;
constexpr int kWarmupStreams = 8;  // where --concurrency does not say
constexpr absl::Duration kCallTimeout = absl::Seconds(10);

struct BenchServeFlags {
  EndpointFlags endpoint;
  int64_t requests = 0;
  double rate = 0;
  int concurrency = 0;
  std::string trace;
  double speed = 1;
  int divisor = 1;
  std::string prompt_tokens = "128", output_tokens = "64";
  int32_t shared_prefix = 0;
  uint64_t seed = 0;
  int warmup = 0;
  Slo slo;
  double deadline_seconds = 600;
  std::string svg;
  RecordFlags record;
};

constexpr int64_t kDefaultRequests = 100;  // of what is not a trace

absl::StatusOr<std::vector<Arrival>> PlanArrivals(const BenchServeFlags& flags) {
  if (flags.trace.empty()) {
    RW_ASSIGN_OR_RETURN(const TokenRange prompt, ParseTokenRange(flags.prompt_tokens));
    RW_ASSIGN_OR_RETURN(const TokenRange output, ParseTokenRange(flags.output_tokens));
    return DrawArrivals(flags.requests > 0 ? flags.requests : kDefaultRequests, flags.rate, prompt, output, flags.seed);
  }
  RW_ASSIGN_OR_RETURN(std::vector<Arrival> arrivals, ReadTrace(flags.trace, flags.divisor));
  if (flags.requests > 0 && flags.requests < std::ssize(arrivals)) arrivals.resize(static_cast<size_t>(flags.requests));
  if (arrivals.empty()) return absl::InvalidArgumentError(absl::StrCat(flags.trace, " has no requests"));
  for (Arrival& arrival : arrivals) arrival.at /= flags.speed;
  return arrivals;
}

absl::Status CheckLengths(const std::vector<Arrival>& arrivals, const GetModelInfoResponse& model) {
  for (size_t i = 0; i < arrivals.size(); ++i) {
    const int64_t tokens = int64_t{arrivals[i].prompt_tokens} + arrivals[i].output_tokens;
    if (tokens <= model.max_tokens()) continue;
    return absl::InvalidArgumentError(
        absl::StrCat("request ", i, " has ", arrivals[i].prompt_tokens, " + ", arrivals[i].output_tokens,
                     " tokens, but ", model.model_name(), " is served with ", model.max_tokens(),
                     ": ask for less, divide a trace's lengths by --divisor", ", or serve with more --max-tokens"));
  }
  return absl::OkStatus();
}

using Stubs = std::vector<std::unique_ptr<Inference::Stub>>;

// Connections of their own, all of them up.
absl::StatusOr<GetModelInfoResponse> ConnectAll(const EndpointFlags& flags, Stubs& stubs) {
  RW_ASSIGN_OR_RETURN(const std::string endpoint, ResolveEndpoint(flags));
  RW_ASSIGN_OR_RETURN(const wire::Credentials credentials, ResolveCredentials(flags, endpoint));
  GetModelInfoResponse model;
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  for (int i = 0; i < kConnections; ++i) {
    stubs.push_back(ConnectTo(endpoint, credentials, arguments));
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + kCallTimeout));
    const absl::Status status = FromGrpc(stubs.back()->GetModelInfo(&context, {}, &model));
    if (!status.ok()) return absl::Status(status.code(), absl::StrCat(endpoint, ": ", status.message()));
  }
  return model;
}

std::string Subject(const BenchServeFlags& flags, const GetModelInfoResponse& model, size_t requests) {
  std::string load = absl::StrCat(requests, " requests ");
  if (flags.concurrency > 0) {
    absl::StrAppend(&load, "of ", flags.concurrency, " clients");
  } else if (flags.rate > 0) {
    absl::StrAppend(&load, "at ", flags.rate, "/s");
  } else {
    absl::StrAppend(&load, "of ", flags.trace, " at ", flags.speed, " times its speed");
  }
  return absl::StrCat(model.model_name(), ", tp ", model.tp(), ", kv ", model.kv_format(), ", ", model.activations(),
                      " activations, ", model.backend(), "; ", load);
}

absl::Status BenchServe(const BenchServeFlags& flags) {
  const Interrupt interrupt;
  RW_ASSIGN_OR_RETURN(const auto baseline, ReadBaseline(flags.record, kBench));
  RW_ASSIGN_OR_RETURN(const std::vector<Arrival> arrivals, PlanArrivals(flags));
  Stubs stubs;
  RW_ASSIGN_OR_RETURN(const GetModelInfoResponse model, ConnectAll(flags.endpoint, stubs));
  RW_RETURN_IF_ERROR(CheckLengths(arrivals, model));
  LoadOptions options{.arrivals = arrivals,
                      .concurrency = flags.concurrency,
                      .seed = flags.seed,
                      .shared_prefix = flags.shared_prefix,
                      .vocab_size = static_cast<int32_t>(model.vocab_size()),
                      .deadline = absl::Seconds(flags.deadline_seconds)};
  if (flags.warmup > 0) {
    LoadOptions warmup = options;
    warmup.arrivals.clear();
    for (int i = 0; i < flags.warmup; ++i)
      warmup.arrivals.push_back(arrivals[static_cast<size_t>(i) % arrivals.size()]);
    warmup.first_index = std::ssize(arrivals);
    if (warmup.concurrency == 0) warmup.concurrency = kWarmupStreams;
    ProgressBar progress("warm-up", flags.warmup);
    const LoadOutcome outcome = RunLoad(stubs, warmup, interrupt, progress);
    if (outcome.is_interrupted) return absl::CancelledError("interrupted in the warm-up");
    for (const RequestRecord& record : outcome.records) {
      if (!record.status.ok())
        return absl::Status(record.status.code(), absl::StrCat("warm-up: ", record.status.message()));
    }
  }
  LoadOutcome outcome;
  {
    ProgressBar progress("requests", std::ssize(arrivals));
    outcome = RunLoad(stubs, options, interrupt, progress);
  }
  const LatencyReport report = Summarize(outcome.records, outcome.seconds, flags.slo);
  BenchRecord record = StartRecord(kBench);
  record.subject = Subject(flags, model, arrivals.size());
  record.figures = FiguresOf(report);
  RecordFlags shown = flags.record;
  if (outcome.is_interrupted) shown.save.clear();  // a part of a run is no baseline
  const absl::Status reported =
      Report(record, absl::StrCat(record.subject, "\n\n", LatencyText(report)), shown, baseline);
  if (!flags.svg.empty()) {
    RW_RETURN_IF_ERROR(WriteFileAtomically(flags.svg, ChartSvg(LatencyChart(report, record.subject))));
  }
  if (outcome.is_interrupted) {
    return absl::CancelledError(
        absl::StrCat("interrupted after ", report.succeeded + report.failed, " of ", arrivals.size(), " requests"));
  }
  if (report.failed > 0) {
    const auto& [code, failures] = *report.failures.begin();
    return absl::InternalError(
        absl::StrCat(report.failed, " of ", arrivals.size(), " requests failed, e.g. ", code, ": ", failures.example));
  }
  return reported;
}

void AddLoadFlags(CLI::App& command, BenchServeFlags& flags) {
  CLI::Option_group* load = command.add_option_group("Load", "When requests are sent: one of these");
  load->add_option("--rate", flags.rate, "Requests per second, a Poisson process")->check(CLI::PositiveNumber);
  load->add_option("--concurrency", flags.concurrency, "Clients that ask again when they have their answer")
      ->check(CLI::Range(1, kMostStreams));
  CLI::Option* trace = load->add_option("--trace", flags.trace, "File of arrivals and lengths, .csv or .jsonl");
  load->require_option(1);
  command.add_option("--speed", flags.speed, "Times as fast as the trace")
      ->needs(trace)
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command.add_option("--divisor", flags.divisor, "Divides the trace's lengths")
      ->needs(trace)
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command.add_option("--requests", flags.requests, "How many")
      ->check(CLI::Range(int64_t{1}, int64_t{10'000'000}))
      ->default_str(absl::StrCat("the trace's, or ", kDefaultRequests));
  command.add_option("--prompt-tokens", flags.prompt_tokens, "N, or LEAST:MOST, drawn evenly")
      ->excludes(trace)
      ->capture_default_str();
  command.add_option("--output-tokens", flags.output_tokens, "The same of the answers")
      ->excludes(trace)
      ->capture_default_str();
  command.add_option("--shared-prefix", flags.shared_prefix, "Tokens that all prompts begin with")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command.add_option("--seed", flags.seed, "Of arrivals, lengths and prompts")->capture_default_str();
  command.add_option("--warmup", flags.warmup, "Requests before the measurement, which do not count")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command.add_option("--deadline", flags.deadline_seconds, "Seconds that a request may take")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
}

}  // namespace

void AddBenchServe(CLI::App& bench, Action& action) {
  CLI::App* command = bench.add_subcommand("serve", kDescription);
  command->set_help_flag("-h,--help", "Print this help message and exit");
  command->footer(kExamples);
  const auto flags = std::make_shared<BenchServeFlags>();
  AddEndpointFlags(*command, flags->endpoint);
  AddLoadFlags(*command, *flags);
  command->add_option("--slo-ttft", flags->slo.first_token_ms, "Milliseconds of TTFT that count as good")
      ->check(CLI::PositiveNumber);
  command->add_option("--slo-tpot", flags->slo.per_output_token_ms, "The same of TPOT")->check(CLI::PositiveNumber);
  command->add_option("--svg", flags->svg, "Draw the latencies' distribution functions into this file");
  AddRecordFlags(*command, flags->record);
  command->callback([flags, &action] { action = [flags] { return BenchServe(*flags); }; });
}

}  // namespace rankwise::launch
