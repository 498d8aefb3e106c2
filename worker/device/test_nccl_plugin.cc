// A librankwise_nccl.so for device_test: its communicator is one to recognise, of one rank.

#include <utility>

#include "kernels/cuda_plugin.h"
#include "worker/comm/communicator.h"
#include "worker/device/nccl_plugin.h"

namespace rankwise::device {
namespace {

absl::StatusOr<std::unique_ptr<comm::Communicator>> Create(comm::Communicator&, int, void*, absl::Duration) {
  return std::move(comm::CreateThreadCommunicators(1)[0]);
}

}  // namespace

extern "C" const NcclPlugin rankwise_nccl_plugin;
const NcclPlugin rankwise_nccl_plugin = {.build = kernels::CudaPluginBuild(), .create = Create};

}  // namespace rankwise::device
