#include "worker/device/device.h"

#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "worker/comm/exchange.h"
#include "worker/comm/staged_communicator.h"
#include "worker/device/gpu_place.h"
#include "worker/device/nccl_plugin.h"

namespace rankwise::device {

void ShareOutCpus(int ranks_on_host, kernels::CpuOptions& cpu) {
  const auto cpus = static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN));
  if (cpu.threads == 0) cpu.threads = std::max(1, cpus / ranks_on_host);
  cpu.pin_threads = ranks_on_host == 1;
}

namespace {

using comm::Agree;

struct OwnGpu {
  const kernels::CudaPlugin* plugin = nullptr;
  kernels::Gpu gpu;
  int visible_count = 0;
};

absl::StatusOr<OwnGpu> FindGpu(const DeviceOptions& options) {
  if (options.activations == kernels::Activations::kInt8) {
    return absl::InvalidArgumentError("--activations int8 is of the CPU backend");
  }
  OwnGpu own;
  RW_ASSIGN_OR_RETURN(own.plugin, kernels::OpenCudaPlugin(options.plugin_folder));
  RW_ASSIGN_OR_RETURN(const std::vector<kernels::Gpu> gpus, own.plugin->list_gpus());
  own.visible_count = static_cast<int>(gpus.size());
  own.gpu = gpus[GpuIndex(HostRank(std::getenv, options.mpi_host_rank), own.visible_count)];
  return own;
}

absl::StatusOr<std::unique_ptr<comm::Communicator>> OpenNccl(const DeviceOptions& options, comm::Communicator& host,
                                                             int gpu, void* stream) {
  const absl::StatusOr<const void*> table =
      kernels::OpenPlugin(options.plugin_folder, kNcclPluginFile, kNcclPluginSymbol, "NCCL");
  RW_RETURN_IF_ERROR(Agree(table.status(), host, options.timeout));
  return static_cast<const NcclPlugin*>(*table)->create(host, gpu, stream, options.timeout);
}

absl::StatusOr<Device> OpenCuda(const DeviceOptions& options, comm::Communicator& host) {
  const absl::StatusOr<OwnGpu> own = FindGpu(options);
  const absl::StatusOr<std::string> uuid =
      own.ok() ? absl::StatusOr<std::string>(own->gpu.uuid) : absl::StatusOr<std::string>(own.status());
  RW_ASSIGN_OR_RETURN(const std::vector<std::string> uuids, comm::Exchange(uuid, host, options.timeout));
  RW_RETURN_IF_ERROR(CheckDistinctGpus(uuids, options.is_gpu_sharing_allowed));

  Device device;
  absl::StatusOr<std::unique_ptr<kernels::Backend>> backend =
      own->plugin->create_backend(own->gpu.index, options.activations.value_or(kernels::Activations::kFloat));
  RW_RETURN_IF_ERROR(Agree(backend.status(), host, options.timeout));
  device.backend = *std::move(backend);
  device.gpu = own->gpu.index;
  spdlog::info("rank {}: {} (of {} visible)", host.rank(), kernels::Describe(own->gpu), own->visible_count);
  if (host.size() == 1) return device;
  if (HasSharedGpu(uuids)) {
    // NCCL refuses two ranks on one GPU.
    device.device_communicator = comm::CreateStagedCommunicator(host, *device.backend);
  } else {
    RW_ASSIGN_OR_RETURN(device.device_communicator,
                        OpenNccl(options, host, own->gpu.index, own->plugin->stream(*device.backend)));
  }
  return device;
}

absl::StatusOr<Device> OpenCpu(const DeviceOptions& options, comm::Communicator& host) {
  Device device;
  kernels::CpuOptions cpu = options.cpu;
  cpu.activations = options.activations.value_or(kernels::Activations::kInt8);
  absl::StatusOr<std::unique_ptr<kernels::Backend>> backend = kernels::CreateCpuBackend(cpu);
  RW_RETURN_IF_ERROR(Agree(backend.status(), host, options.timeout));
  device.backend = *std::move(backend);
  return device;
}

}  // namespace

absl::StatusOr<Device> OpenDevice(const DeviceOptions& options, comm::Communicator& host) {
  if (options.device == "cpu") return OpenCpu(options, host);
  if (options.device != "auto" && options.device != "cuda") {
    return absl::InvalidArgumentError(absl::StrCat("--device ", options.device, " is not one of auto, cpu, cuda"));
  }
  absl::StatusOr<Device> cuda = OpenCuda(options, host);
  if (cuda.ok()) return cuda;
  if (options.device == "cuda") {
    return absl::Status(cuda.status().code(), absl::StrCat("--device cuda: ", cuda.status().message()));
  }
  if (host.rank() == 0) spdlog::info("--device auto takes the CPU: {}", std::string(cuda.status().message()));
  return OpenCpu(options, host);
}

}  // namespace rankwise::device
