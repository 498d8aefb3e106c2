// The table that librankwise_cuda.so exports.

#include <cuda_runtime_api.h>

#include <cstdio>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "base/status_macros.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda_plugin.h"

namespace rankwise::kernels {
namespace {

// As nvidia-smi writes it.
std::string UuidText(const cudaUUID_t& uuid) {
  std::string text = "GPU";
  for (int i = 0; i < 16; ++i) {
    char byte[4];
    std::snprintf(byte, sizeof byte, "%02x", static_cast<unsigned char>(uuid.bytes[i]));
    absl::StrAppend(&text, i == 0 || i == 4 || i == 6 || i == 8 || i == 10 ? "-" : "", byte);
  }
  return text;
}

absl::StatusOr<std::vector<Gpu>> ListGpus() {
  int count = 0;
  RW_CUDA(cudaGetDeviceCount(&count));
  std::vector<Gpu> gpus(count);
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties;
    RW_CUDA(cudaGetDeviceProperties(&properties, i));
    gpus[i] = {.index = i,
               .name = properties.name,
               .uuid = UuidText(properties.uuid),
               .capability = 10 * properties.major + properties.minor,
               .multiprocessors = properties.multiProcessorCount,
               .memory_bytes = static_cast<int64_t>(properties.totalGlobalMem)};
    for (int peer = 0; peer < count; ++peer) {
      int can_reach = 0;
      if (peer != i) RW_CUDA(cudaDeviceCanAccessPeer(&can_reach, i, peer));
      if (can_reach != 0) gpus[i].peers.push_back(peer);
    }
  }
  if (gpus.empty()) return absl::UnavailableError("there is no GPU that this process may use");
  return gpus;
}

}  // namespace

extern "C" const CudaPlugin rankwise_cuda_plugin;
const CudaPlugin rankwise_cuda_plugin = {
    .build = CudaPluginBuild(),
    .list_gpus = ListGpus,
    .create_backend =
        [](int gpu, Activations activations) { return CreateCudaBackend({.device = gpu, .activations = activations}); },
    .stream = [](Backend& backend) { return CudaStreamOf(backend); },
};

}  // namespace rankwise::kernels
