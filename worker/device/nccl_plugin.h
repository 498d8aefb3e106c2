#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "worker/comm/communicator.h"

namespace rankwise::device {

// What librankwise_nccl.so exports under the name kNcclPluginSymbol: a library of its own, for one rank alone needs
// none of NCCL's 220 MB.
struct NcclPlugin {
  const char* build = nullptr;  // kernels::CudaPluginBuild() of the program it was built with
  // Collective over `host`, which is borrowed: comm::CreateNcclCommunicator.
  absl::StatusOr<std::unique_ptr<comm::Communicator>> (*create)(comm::Communicator& host, int gpu, void* stream,
                                                                absl::Duration timeout) = nullptr;
};
inline constexpr char kNcclPluginFile[] = "librankwise_nccl.so";
inline constexpr char kNcclPluginSymbol[] = "rankwise_nccl_plugin";

}  // namespace rankwise::device
