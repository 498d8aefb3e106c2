#include "launch/cluster_flags.h"

#include <sched.h>

#include <algorithm>
#include <filesystem>
#include <system_error>

#include "absl/strings/str_cat.h"

namespace rankwise::launch {
namespace {

// CPUs this process may run on: a batch system or container often gives fewer than the host has.
int UsableCpus() {
  cpu_set_t set;
  return sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 1;
}

}  // namespace

void AddClusterFlags(CLI::App& command, ClusterFlags& flags) {
  command.add_option("MODEL", flags.model, "Folder with config.json, *.safetensors and a tokenizer, or a workspace")
      ->required();
  command.add_option("--tp", flags.tp, "Ranks of one group: each holds 1/N of the model")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  command
      .add_option("--device", flags.device,
                  "What the ranks compute on; auto: a GPU each where there is one, else the CPU")
      ->check(CLI::IsMember({"auto", "cpu", "cuda"}))
      ->capture_default_str();
  command.add_flag("--allow-shared-gpu", flags.is_gpu_sharing_allowed,
                   "Let ranks share a GPU; they then sum by way of the host");
  command.add_option("--threads", flags.threads, "Threads of one rank; 0: this host's CPUs shared out")
      ->check(CLI::Range(0, 4096))
      ->capture_default_str();
  command.add_option("--activations", flags.activations, kernels::kActivationsHelp)
      ->check(CLI::IsMember(kernels::ActivationsFlags()))
      ->capture_default_str();
  command.add_option("--kv-memory", flags.kv_memory, "Memory for keys and values on each rank, as in 512M or 20G");
  command.add_option("--mpirun", flags.mpirun, "Open MPI's launcher")->capture_default_str();
  command.add_option("--log-folder", flags.log_folder, "Write a log file for each program there, instead of stderr");
  command.add_option("--log-level", flags.log_level, "Of coordinator and workers")
      ->check(CLI::IsMember({"trace", "debug", "info", "warn", "error", "off"}))
      ->capture_default_str();
  command.add_option("--start-timeout", flags.start_seconds, "Seconds until the first group must serve")
      ->check(CLI::Range(1.0, 86400.0))
      ->capture_default_str();
}

absl::StatusOr<ClusterOptions> ToClusterOptions(const ClusterFlags& flags) {
  std::error_code error;
  if (!std::filesystem::is_directory(flags.model, error))
    return absl::NotFoundError(absl::StrCat("MODEL \"", flags.model, "\" is not a folder"));
  ClusterOptions options;
  options.model = flags.model;
  options.tp = flags.tp;
  options.replicas = flags.replicas;
  options.mpirun = flags.mpirun;
  options.start_timeout = absl::Seconds(flags.start_seconds);
  if (!flags.log_folder.empty()) {
    std::filesystem::create_directories(flags.log_folder, error);
    if (error)
      return absl::InvalidArgumentError(absl::StrCat("--log-folder ", flags.log_folder, ": ", error.message()));
    options.log_folder = flags.log_folder;
  }
  const int threads = flags.threads > 0 ? flags.threads : std::max(1, UsableCpus() / (flags.tp * flags.replicas));
  options.coordinator_flags = {"--log-level", flags.log_level};
  options.worker_flags = {"--device",    flags.device,    "--threads",     absl::StrCat(threads),
                          "--log-level", flags.log_level, "--activations", flags.activations};
  if (flags.is_gpu_sharing_allowed) options.worker_flags.push_back("--allow-shared-gpu");
  if (!flags.kv_memory.empty())
    options.worker_flags.insert(options.worker_flags.end(), {"--kv-memory", flags.kv_memory});
  return options;
}

}  // namespace rankwise::launch
