#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "base/mapped_file.h"
#include "base/program_folder.h"
#include "base/status_macros.h"
#include "kernels/cpu/thread_team.h"
#include "launch/child_process.h"
#include "launch/commands.h"
#include "launch/memory_report.h"
#include "launch/preflight.h"

namespace rankwise::launch {
namespace {

constexpr char kDescription[] = R"(Say what would go wrong before an allocation is spent: run it where serve will run

Checks that the model is whole (configuration, tokenizer, every tensor, checksums where a manifest has them) and can be cut
into --tp; that its ranks fit this host's memory and CPUs; that --listen is free; shared memory; the device; and that the
launcher starts --tp ranks which find each other, with what their all-reduce takes. Inside a Slurm job the launcher is
srun --mpi=pmix, else mpirun. Exit code 0 when nothing is BAD, else 2; what is bad comes with what to do.)";

constexpr char kExamples[] = R"(Examples:
  rankwise preflight ./model --tp 4 --kv int8-online --batch 32 --seq 4096
  srun -N 2 -n 2 --pty bash -c 'rankwise preflight ./model --tp 2'
  rankwise preflight ./model --tp 8 --min-bandwidth 20)";

struct PreflightFlags {
  MemoryFlags memory;
  std::string kv = "f16";
  int64_t batch = 8;
  int replicas = 1;
  std::string device = "auto";
  std::string listen = "127.0.0.1:0";
  std::string launcher = "auto";
  double min_bandwidth = 0;
  double launch_seconds = 30;
};

int NodeCount() {
  const char* text = std::getenv("SLURM_JOB_NUM_NODES");
  int nodes = 1;
  return text != nullptr && absl::SimpleAtoi(text, &nodes) ? std::max(nodes, 1) : 1;
}

// Runs the collectives' benchmark until it has said what we want to know.
std::vector<Finding> CheckLaunch(const PreflightFlags& flags, const weights::ModelConfig* config) {
  std::string launcher = flags.launcher;
  if (launcher == "auto") launcher = std::getenv("SLURM_JOB_ID") != nullptr ? "srun" : "mpirun";
  const std::string ranks = absl::StrCat(flags.memory.tp);
  ChildOptions options;
  options.command = launcher == "srun" ? std::vector<std::string>{"srun", "--mpi=pmix", "--overlap", "-n", ranks}
                                       : std::vector<std::string>{"mpirun",    "-n",   ranks,   "--oversubscribe",
                                                                  "--bind-to", "none", "--mca", "mpi_yield_when_idle",
                                                                  "1"};
  options.command.push_back(ProgramFolder() + "/rankwise-comm-bench");
  options.environment = {"OMPI_ALLOW_RUN_AS_ROOT=1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"};
  const auto folder = PrivateFolder::Create(TemporaryParent());
  if (!folder.ok())
    return {{Finding::kBad, "launch", std::string(folder.status().message()), "a TMPDIR that can be written"}};
  options.log_path = folder->path() + "/log";
  AdoptOrphans();
  auto child = ChildProcess::Start(options);
  if (!child.ok())
    return {{Finding::kBad, "launch", std::string(child.status().message()),
             launcher == "srun" ? "load Slurm's commands, or --launcher mpirun" : "install Open MPI (openmpi-bin)"}};
  CommReport report;
  const absl::Time deadline = absl::Now() + absl::Seconds(flags.launch_seconds);
  for (bool is_running = true; is_running && absl::Now() < deadline;) {
    is_running = !(*child)->Wait(absl::Now() + absl::Milliseconds(50));
    report = ParseCommReport(ReadTextFile(options.log_path, 1 << 20).value_or(""));
    if (report.p50_us.contains(1 << 20)) break;
  }
  const std::string tail = (*child)->LogTail(5);
  (*child)->Signal(SIGTERM);
  (*child)->Wait(absl::Now() + absl::Seconds(5));
  child->reset();
  KillOrphans();
  return JudgeLaunch(report, flags.memory.tp, launcher, tail, flags.min_bandwidth, config);
}

absl::Status Preflight(const PreflightFlags& flags) {
  std::vector<Finding> findings;
  const auto report = [&](Finding finding) {
    absl::PrintF("%s", ToText(finding));
    std::fflush(stdout);
    findings.push_back(std::move(finding));
  };
  std::optional<PlannedModel> model;
  report(CheckModel(flags.memory.model, flags.memory.tp, model));
  const int nodes = NodeCount();
  const int ranks_on_host = (flags.memory.tp * flags.replicas + nodes - 1) / nodes;
  const int cpus = kernels::ThreadTeam::AllowedCpuCount();
  const int threads = flags.memory.threads > 0 ? flags.memory.threads : std::max(1, cpus / ranks_on_host);
  if (model) {
    RW_ASSIGN_OR_RETURN(const MemoryOptions options, OptionsFor(flags.memory, *model, flags.kv, flags.batch));
    RW_ASSIGN_OR_RETURN(const std::vector<RankGroup> ranks, PlanRanks(*model, options, std::nullopt));
    report(JudgeMemory(ranks, ranks_on_host, AvailableMemory()));
  }
  report(JudgeCpus(ranks_on_host, threads, cpus));
  report(CheckListen(flags.listen));
  report(CheckSharedMemory());
  report(JudgeDevice(flags.device));
  for (Finding& finding : CheckLaunch(flags, model ? &model->config : nullptr)) report(std::move(finding));
  const auto bad =
      std::count_if(findings.begin(), findings.end(), [](const auto& f) { return f.kind == Finding::kBad; });
  if (bad > 0) return absl::FailedPreconditionError(absl::StrCat(bad, " of ", findings.size(), " checks are bad"));
  return absl::OkStatus();
}

}  // namespace

void AddPreflight(CLI::App& app, Action& action) {
  CLI::App* command = app.add_subcommand("preflight", kDescription);
  command->footer(kExamples);
  const auto flags = std::make_shared<PreflightFlags>();
  command->add_option("MODEL", flags->memory.model, "Model folder or workspace")->required();
  command->add_option("--tp", flags->memory.tp, "Ranks of one group")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  command->add_option("--replicas", flags->replicas, "Groups")->check(CLI::Range(1, 1024))->capture_default_str();
  command->add_option("--threads", flags->memory.threads, "Threads of one rank; 0: this host's CPUs shared out")
      ->check(CLI::Range(0, 4096))
      ->capture_default_str();
  command->add_option("--kv", flags->kv, "KV format of serve")->capture_default_str();
  command->add_option("--batch", flags->batch, "Sequences that run at once")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 20))
      ->capture_default_str();
  command->add_option("--seq", flags->memory.sequence_tokens, "Prompt and generated tokens of each")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 24))
      ->capture_default_str();
  command->add_option("--device", flags->device, "What the ranks compute on")
      ->check(CLI::IsMember({"auto", "cpu", "cuda"}))
      ->capture_default_str();
  command->add_option("--listen", flags->listen, "HOST:PORT of the coordinator")->capture_default_str();
  command->add_option("--launcher", flags->launcher, "Who starts the ranks")
      ->check(CLI::IsMember({"auto", "mpirun", "srun"}))
      ->capture_default_str();
  command
      ->add_option("--min-bandwidth", flags->min_bandwidth,
                   "GB/s that an all-reduce of 1 MiB must reach; 0: only shown")
      ->check(CLI::Range(0.0, 1e6))
      ->capture_default_str();
  command->add_option("--launch-timeout", flags->launch_seconds, "Seconds for the launch and its collectives")
      ->check(CLI::Range(1.0, 3600.0))
      ->capture_default_str();
  command->callback([flags, &action] { action = [flags] { return Preflight(*flags); }; });
}

}  // namespace rankwise::launch
