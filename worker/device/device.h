#pragma once

#include <memory>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "base/program_folder.h"
#include "kernels/backend.h"
#include "kernels/cuda_plugin.h"
#include "worker/comm/communicator.h"

namespace rankwise::device {

struct DeviceOptions {
  std::string device = "auto";  // cpu, cuda, or auto: cuda where every rank can, else cpu
  bool is_gpu_sharing_allowed = false;
  std::string plugin_folder = ProgramFolder();
  int mpi_host_rank = 0;  // this rank's position on its host, as far as MPI knows
  kernels::CpuOptions cpu;
  // In place of the CPU's, on every kind of device. None: int8 on the CPU, which is of quantised weights alone, and
  // float on a GPU.
  std::optional<kernels::Activations> activations;
  absl::Duration timeout = absl::Seconds(60);  // for each wait for another rank
};

// The CPU threads of one of `ranks_on_host` ranks, unless the options say; pinned when it has the host for itself,
// since several would all pin their first thread to the same CPU.
void ShareOutCpus(int ranks_on_host, kernels::CpuOptions& cpu);

// What one rank computes on, and how it acts together with the others in that memory.
struct Device {
  int gpu = -1;  // its index among those this process may use; -1: the CPU
  std::unique_ptr<kernels::Backend> backend;
  // Over the host's, for memory of the backend; null where the host's own will do. Destroyed before the backend.
  std::unique_ptr<comm::Communicator> device_communicator;

  comm::Communicator& communicator(comm::Communicator& host) const {
    return device_communicator == nullptr ? host : *device_communicator;
  }
};

// Collective over `host`, which must outlive the device. All ranks get the same kind of device or all an error, which
// begins with "--device cuda: ". `auto` says why it takes the CPU, in one line of rank 0's log; each rank's log names
// its GPU.
absl::StatusOr<Device> OpenDevice(const DeviceOptions& options, comm::Communicator& host);

}  // namespace rankwise::device
