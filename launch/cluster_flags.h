#pragma once

#include <CLI/CLI.hpp>
#include <string>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "launch/local_cluster.h"

namespace rankwise::launch {

// The flags that serve and calibrate share.
struct ClusterFlags {
  std::string model;
  int tp = 1;
  int replicas = 1;
  std::string device = "auto";
  bool is_gpu_sharing_allowed = false;
  int threads = 0;  // of one rank; 0: this host's CPUs shared out
  std::string activations = kernels::kAutoActivations;
  std::string kv_memory;
  std::string mpirun = "mpirun";
  std::string log_folder;
  std::string log_level = "warn";
  double start_seconds = 300;
};

void AddClusterFlags(CLI::App& command, ClusterFlags& flags);

// The part of the options that follows from them. NotFound when the model is no folder.
absl::StatusOr<ClusterOptions> ToClusterOptions(const ClusterFlags& flags);

}  // namespace rankwise::launch
