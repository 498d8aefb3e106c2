// The table that librankwise_nccl.so exports.

#include "kernels/cuda_plugin.h"
#include "worker/comm/nccl_communicator.h"
#include "worker/device/nccl_plugin.h"

namespace rankwise::device {

extern "C" const NcclPlugin rankwise_nccl_plugin;
const NcclPlugin rankwise_nccl_plugin = {.build = kernels::CudaPluginBuild(), .create = comm::CreateNcclCommunicator};

}  // namespace rankwise::device
