#pragma once

#include <functional>
#include <optional>
#include <span>
#include <string>

#include "absl/status/status.h"

// Which rank computes on which GPU. Pure.
namespace rankwise::device {

// The position of this rank among those of its host. The launcher's word goes first (Open MPI's
// OMPI_COMM_WORLD_LOCAL_RANK, then SLURM_LOCALID: an mpirun inside a Slurm job inherits the latter from the batch
// script), for ranks in containers of their own each look alone to MPI; without it, `mpi_host_rank`.
int HostRank(const std::function<const char*(const char* name)>& environment, int mpi_host_rank);

// The index of this rank's GPU among the `visible_count` ≥ 1 that it may use. A batch system that gives each task one
// GPU shows it that one alone, hence the wrap; whether two ranks then share one, CheckDistinctGpus tells.
int GpuIndex(int host_rank, int visible_count);

// uuids[rank] of each rank's GPU. InvalidArgument naming the first two ranks that share one, unless that is allowed.
absl::Status CheckDistinctGpus(std::span<const std::string> uuids, bool is_sharing_allowed);
bool HasSharedGpu(std::span<const std::string> uuids);

}  // namespace rankwise::device
