#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/machine_limits.h"

// The CUDA backend lies in a library of its own, opened only when it is wanted; cuBLASLt, which costs a process 200 MB
// and up to two seconds, in another, which benchmarks alone open.
namespace rankwise::kernels {

struct Gpu {
  int index = 0;            // among those this process may use
  std::string name;         // "NVIDIA H100 80GB HBM3"
  std::string uuid;         // "GPU-4f0c...", the same in every process
  int capability = 0;       // 90 for sm_90
  int multiprocessors = 0;  // SMs
  int64_t memory_bytes = 0;
  std::vector<int> peers;  // the indices of those whose memory it can reach itself
};
std::string Describe(const Gpu& gpu);  // "GPU 0, NVIDIA H100 80GB HBM3, sm_90, 132 SMs, 79.6 GiB, no peer access"

// What librankwise_cuda.so exports under the name kCudaPluginSymbol. Every function may be called from any thread.
struct CudaPlugin {
  const char* build = nullptr;  // CudaPluginBuild() of the program it was built with
  // The GPUs this process may use, in their order; never empty. Unavailable without a driver or a GPU.
  absl::StatusOr<std::vector<Gpu>> (*list_gpus)() = nullptr;
  absl::StatusOr<std::unique_ptr<Backend>> (*create_backend)(int gpu, Activations activations) = nullptr;
  // The cudaStream_t on which a backend of create_backend works.
  void* (*stream)(Backend& backend) = nullptr;
};
inline constexpr char kCudaPluginFile[] = "librankwise_cuda.so";
inline constexpr char kCudaPluginSymbol[] = "rankwise_cuda_plugin";

struct CudaLimitsPlugin {
  const char* build = nullptr;
  absl::StatusOr<MachineLimits> (*measure)(int gpu) = nullptr;
};
inline constexpr char kCudaLimitsPluginFile[] = "librankwise_cuda_limits.so";
inline constexpr char kCudaLimitsPluginSymbol[] = "rankwise_cuda_limits_plugin";

// Names the interfaces that program and plug-in share: both must have been built from the same ones.
const char* CudaPluginBuild();

// Opens `file` in `folder` and finds `symbol`, the table of a plug-in whose first member is its build. Unimplemented
// when there is no such file, FailedPrecondition when there is no driver, the file cannot be opened, or is of another
// build. What is opened stays open. `feature` is what its absence means: "CUDA backend".
absl::StatusOr<const void*> OpenPlugin(const std::string& folder, const std::string& file, const std::string& symbol,
                                       const std::string& feature);
absl::StatusOr<const CudaPlugin*> OpenCudaPlugin(const std::string& folder);

}  // namespace rankwise::kernels
