#include <algorithm>
#include <cmath>
#include <future>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "launch/client.h"
#include "launch/cluster_flags.h"
#include "launch/commands.h"
#include "launch/interrupt.h"
#include "launch/local_cluster.h"
#include "launch/memory_plan.h"
#include "launch/memory_report.h"
#include "launch/resident_memory.h"
#include "worker/kv/kv_scales.h"
#include "worker/weights/checkpoint.h"

namespace rankwise::launch {
namespace {

constexpr char kDescription[] = R"(Hold the plan of `rankwise plan` against running ranks

Serves MODEL once for each KV format and batch, with room for exactly that batch at --seq tokens, and reads what its ranks
have in memory. The cache is zeroed at the start, so all of its blocks are touched. Columns, in MiB:
  KV planned, reported, grown   by arithmetic; as the rank counts it; and how much more anonymous memory it has than a
                                rank whose cache is a single block
  all planned                   the whole plan but the embedding, which is a mapped file
  anonymous, shared             what that is in fact, after a prompt of 128 tokens: private memory, and MPI's shared one
  mapped                        mapped files, shared by the ranks of a host and given up under pressure: the checkpoint's
                                pages that were read, and code
int8 formats run with made-up scales: memory does not depend on them. Fails when a cache is off its plan by more than 1 %
and more than one huge page (2 MiB).)";

constexpr char kExamples[] = R"(Examples:
  rankwise bench memory ./launch/demo_model --tp 2 --batch 8,16,32,48 --seq 1024 --kv f16,int8
  rankwise bench memory ./TinyLlama-1.1B --tp 2 --batch 8,16 --svg memory.svg)";

constexpr int64_t kHugePage = int64_t{2} << 20;
constexpr double kKvTolerance = 0.01;
constexpr absl::Duration kCallTimeout = absl::Minutes(10);

struct BenchMemoryFlags {
  MemoryFlags memory;
  double start_seconds = 300;
};

// A folder with scales that fit the model and mean nothing.
absl::StatusOr<PrivateFolder> WriteMadeUpScales(const std::string& model_dir, int tp) {
  RW_ASSIGN_OR_RETURN(const auto checkpoint, weights::Checkpoint::Open(model_dir));
  const weights::ModelConfig& config = checkpoint->config();
  kv::KvStatistics statistics{.model_fingerprint = checkpoint->fingerprint(),
                              .n_layers = config.n_layers,
                              .n_kv_heads = config.n_kv_heads,
                              .head_dim = config.head_dim,
                              .dataset = "none"};
  const size_t count = static_cast<size_t>(config.n_layers) * config.n_kv_heads * config.head_dim;
  statistics.k_min.assign(count, -8);
  statistics.k_max.assign(count, 8);
  statistics.v_min = statistics.k_min;
  statistics.v_max = statistics.k_max;
  RW_ASSIGN_OR_RETURN(PrivateFolder folder, PrivateFolder::Create(TemporaryParent()));
  RW_RETURN_IF_ERROR(kv::WriteKvScales(folder.path(), statistics, tp, kv::Granularity::kChannel));
  return folder;
}

// One server: what each rank says of itself, and what it holds.
struct Reading {
  int64_t blocks = 0;
  std::vector<rankwise::v1::RankLoad> ranks;
  std::vector<ResidentMemory> memory;  // of each rank
};

class MemoryServer {
 public:
  MemoryServer(std::unique_ptr<LocalCluster> cluster, const Interrupt& interrupt)
      : cluster_(std::move(cluster)), interrupt_(interrupt) {}

  absl::StatusOr<Reading> Read() {
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(10)));
    rankwise::v1::GetLoadResponse load;
    RW_RETURN_IF_ERROR(FromGrpc(cluster_->stub().GetLoad(&context, {}, &load)));
    Reading reading;
    if (load.groups_size() != 1) return absl::InternalError(absl::StrCat(load.groups_size(), " groups serve, not one"));
    reading.blocks = load.groups(0).blocks_total();
    reading.ranks.assign(load.groups(0).ranks().begin(), load.groups(0).ranks().end());
    for (const auto& rank : reading.ranks) {
      RW_ASSIGN_OR_RETURN(reading.memory.emplace_back(), ReadResidentMemory(static_cast<pid_t>(rank.pid())));
    }
    return reading;
  }

  // A prompt of `tokens` tokens, so that every buffer of a step has been used.
  absl::Status RunPrompt(int64_t tokens, int64_t vocab_size) {
    std::future<absl::Status> ended =
        std::async(std::launch::async, [&] { return Send(cluster_->stub(), tokens, vocab_size); });
    absl::Status status;
    while (status.ok() && ended.wait_for(std::chrono::seconds(0)) != std::future_status::ready) {
      status = cluster_->Supervise(absl::Now() + absl::Milliseconds(50), interrupt_.fd());
      if (interrupt_.has_come()) status.Update(absl::CancelledError("interrupted"));
      if (cluster_->failures() > 0) status.Update(absl::AbortedError("a rank died"));
    }
    if (!status.ok()) cluster_->Kill();  // ends the call too
    const absl::Status answered = ended.get();
    status.Update(answered);
    return status;
  }

  absl::Status Stop() { return cluster_->Drain(interrupt_.fd()); }

 private:
  static absl::Status Send(rankwise::v1::Inference::Stub& stub, int64_t tokens, int64_t vocab_size) {
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + kCallTimeout));
    rankwise::v1::GenerateRequest request;
    for (int64_t i = 0; i < tokens; ++i) {
      request.mutable_token_ids()->add_ids(static_cast<int32_t>((7 * i + 3) % vocab_size));
    }
    request.mutable_sampling()->set_max_tokens(1);
    request.mutable_sampling()->set_temperature(0);
    request.mutable_sampling()->set_ignore_eos(true);
    const auto reader = stub.Generate(&context, request);
    rankwise::v1::GenerateResponse response;
    while (reader->Read(&response)) continue;
    return FromGrpc(reader->Finish());
  }

  std::unique_ptr<LocalCluster> cluster_;
  const Interrupt& interrupt_;
};

class Bench {
 public:
  Bench(const BenchMemoryFlags& flags, const PlannedModel& model, const Interrupt& interrupt)
      : flags_(flags), model_(model), interrupt_(interrupt) {}

  absl::Status Run() {
    absl::PrintF("%-10s %6s %5s %10s %10s %10s %8s %11s %10s %8s %8s %9s\n", "kv", "batch", "rank", "KV planned",
                 "reported", "grown", "apart", "all planned", "anonymous", "shared", "apart", "mapped");
    for (const std::string& kv : flags_.memory.kv) RW_RETURN_IF_ERROR(RunFormat(kv));
    absl::PrintF("\nKV: at most %.2f %% from the plan\n", 100 * worst_kv_);
    RW_RETURN_IF_ERROR(WriteCharts(flags_.memory, chart_));
    return is_kv_as_planned_ ? absl::OkStatus() : absl::InternalError("a KV cache is not as planned: see the table");
  }

  absl::Status RunFormat(const std::string& kv) {
    chart_.lines.push_back({.name = kv});
    RW_ASSIGN_OR_RETURN(const MemoryOptions one, OptionsFor(flags_.memory, model_, kv, 1));
    std::optional<PrivateFolder> scales;
    if (one.kv_format == kernels::KvFormat::kInt8) {
      RW_ASSIGN_OR_RETURN(PrivateFolder folder, WriteMadeUpScales(model_.name, one.tp));
      scales.emplace(std::move(folder));
    }
    const std::string scales_dir = scales ? scales->path() : "";
    RW_ASSIGN_OR_RETURN(const RankMemory sequence, PlanMemory(model_.config, one, 0));
    const int64_t block_bytes = sequence.kv / BlocksPerSequence(one.sequence_tokens);
    RW_ASSIGN_OR_RETURN(MemoryServer bare, Serve(kv, scales_dir, one, block_bytes));
    RW_ASSIGN_OR_RETURN(const Reading base, bare.Read());
    RW_RETURN_IF_ERROR(bare.Stop());
    for (const int64_t batch : flags_.memory.batches) {
      RW_ASSIGN_OR_RETURN(const MemoryOptions options, OptionsFor(flags_.memory, model_, kv, batch));
      RW_RETURN_IF_ERROR(RunBatch(kv, scales_dir, options, base, block_bytes));
    }
    return absl::OkStatus();
  }

 private:
  absl::StatusOr<MemoryServer> Serve(const std::string& kv, const std::string& scales_dir, const MemoryOptions& options,
                                     int64_t kv_bytes) {
    ClusterFlags cluster;
    cluster.model = model_.name;
    cluster.tp = options.tp;
    cluster.threads = options.threads;
    cluster.start_seconds = flags_.start_seconds;
    RW_ASSIGN_OR_RETURN(ClusterOptions start, ToClusterOptions(cluster));
    start.worker_flags.insert(start.worker_flags.end(),
                              {"--kv", kv, "--kv-memory", absl::StrCat(kv_bytes), "--max-running",
                               absl::StrCat(options.batch), "--max-tokens", absl::StrCat(options.sequence_tokens),
                               "--max-step-rows", absl::StrCat(std::max(options.step_rows, options.batch))});
    if (!scales_dir.empty()) start.worker_flags.insert(start.worker_flags.end(), {"--kv-scales", scales_dir});
    RW_ASSIGN_OR_RETURN(auto started, LocalCluster::Start(start));
    RW_RETURN_IF_ERROR(started->WaitServing(1, absl::Now() + start.start_timeout, interrupt_.fd()));
    return MemoryServer(std::move(started), interrupt_);
  }

  absl::Status RunBatch(const std::string& kv, const std::string& scales_dir, const MemoryOptions& options,
                        const Reading& base, int64_t block_bytes) {
    RW_ASSIGN_OR_RETURN(const RankMemory first, PlanMemory(model_.config, options, 0));
    RW_ASSIGN_OR_RETURN(MemoryServer server, Serve(kv, scales_dir, options, first.kv));
    RW_ASSIGN_OR_RETURN(const Reading idle, server.Read());
    // One token is left for the answer.
    const int64_t prompt = std::min(options.step_rows, options.sequence_tokens - 1);
    if (prompt > 0) RW_RETURN_IF_ERROR(server.RunPrompt(prompt, model_.config.vocab_size));
    RW_ASSIGN_OR_RETURN(const Reading worked, server.Read());
    RW_RETURN_IF_ERROR(server.Stop());
    // The cache was asked for in bytes: that they make the planned blocks is a check of its own.
    const int64_t blocks = options.batch * BlocksPerSequence(options.sequence_tokens);
    if (worked.blocks != blocks) {
      return absl::InternalError(
          absl::StrCat("kv ", kv, ", batch ", options.batch, ": ", worked.blocks, " blocks, planned ", blocks));
    }
    double planned_most = 0, measured_most = 0;
    for (size_t i = 0; i < worked.ranks.size(); ++i) {
      const int rank = static_cast<int>(worked.ranks[i].rank());
      RW_ASSIGN_OR_RETURN(const RankMemory plan, PlanMemory(model_.config, options, rank));
      const auto reported = static_cast<int64_t>(worked.ranks[i].kv_bytes());
      const int64_t ledger = rank == 0 ? LedgerBytes(blocks) - LedgerBytes(1) : 0;
      const int64_t grown = idle.memory[i].anonymous - base.memory[i].anonymous + block_bytes - ledger;
      const int64_t planned = plan.total() - plan.embedding;
      const int64_t measured = worked.memory[i].anonymous + worked.memory[i].shared;
      absl::PrintF("%-10s %6d %5d %10.1f %10.1f %10.1f %+7.2f%% %11.1f %10.1f %8.1f %+7.2f%% %9.1f\n", kv,
                   options.batch, rank, Mib(plan.kv), Mib(reported), Mib(grown), 100 * Apart(grown, plan.kv),
                   Mib(planned), Mib(worked.memory[i].anonymous), Mib(worked.memory[i].shared),
                   100 * Apart(measured, planned), Mib(worked.memory[i].file));
      std::fflush(stdout);
      worst_kv_ = std::max({worst_kv_, std::abs(Apart(grown, plan.kv)), std::abs(Apart(reported, plan.kv))});
      const int64_t allowed = std::max(kHugePage, static_cast<int64_t>(kKvTolerance * static_cast<double>(plan.kv)));
      if (reported != plan.kv || std::abs(grown - plan.kv) > allowed) is_kv_as_planned_ = false;
      planned_most = std::max(planned_most, Mib(planned));
      measured_most = std::max(measured_most, Mib(measured));
    }
    chart_.lines.back().points.emplace_back(options.batch, planned_most);
    chart_.lines.back().markers.emplace_back(options.batch, measured_most);
    return absl::OkStatus();
  }

  static double Apart(int64_t measured, int64_t planned) {
    return static_cast<double>(measured) / static_cast<double>(planned) - 1;
  }

  const BenchMemoryFlags& flags_;
  const PlannedModel& model_;
  const Interrupt& interrupt_;
  Chart chart_ = {.title = "largest rank, without mapped files"};
  double worst_kv_ = 0;
  bool is_kv_as_planned_ = true;
};

absl::Status BenchMemory(const BenchMemoryFlags& flags) {
  const Interrupt interrupt;
  StartLog("rankwise", "warn");
  RW_ASSIGN_OR_RETURN(const PlannedModel model, FindModel(flags.memory.model));
  return Bench(flags, model, interrupt).Run();
}

}  // namespace

void AddBenchMemory(CLI::App& bench, Action& action) {
  CLI::App* command = bench.add_subcommand("memory", kDescription);
  command->set_help_flag("-h,--help", "Print this help message and exit");
  command->footer(kExamples);
  const auto flags = std::make_shared<BenchMemoryFlags>();
  command->add_option("MODEL", flags->memory.model, "Folder with config.json and *.safetensors")->required();
  AddMemoryFlags(*command, flags->memory);
  command->add_option("--start-timeout", flags->start_seconds, "Seconds until a server must serve")
      ->check(CLI::Range(1.0, 86400.0))
      ->capture_default_str();
  command->callback([flags, &action] { action = [flags] { return BenchMemory(*flags); }; });
}

}  // namespace rankwise::launch
