#include "kernels/cuda_plugin.h"

#include <dlfcn.h>
#include <unistd.h>

#include <cstring>
#include <string_view>
#include <system_error>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/status_macros.h"

namespace rankwise::kernels {
namespace {

std::string LastLinkError() {
  const char* error = dlerror();
  return error == nullptr ? "unknown error" : error;
}

// The driver's library. CUDA's own answer without one would cost opening the plug-in and all it is linked with.
absl::Status CheckDriver() {
  if (dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL) != nullptr) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat("this machine has no NVIDIA driver: ", LastLinkError()));
}

}  // namespace

std::string Describe(const Gpu& gpu) {
  const double gib = static_cast<double>(gpu.memory_bytes) / (1 << 30);
  const std::string peers =
      gpu.peers.empty() ? "no peer access" : absl::StrCat("peer access to GPU ", absl::StrJoin(gpu.peers, ", "));
  return absl::StrFormat("GPU %d, %s, sm_%d, %d SMs, %.1f GiB, %s", gpu.index, gpu.name, gpu.capability,
                         gpu.multiprocessors, gib, peers);
}

const char* CudaPluginBuild() { return RANKWISE_PLUGIN_BUILD; }

absl::StatusOr<const void*> OpenPlugin(const std::string& folder, const std::string& file, const std::string& symbol,
                                       const std::string& feature) {
  const std::string path = absl::StrCat(folder, "/", file);
  if (access(path.c_str(), F_OK) != 0) {
    return absl::UnimplementedError(absl::StrCat("this build has no ", feature, ": there is no ", path));
  }
  RW_RETURN_IF_ERROR(CheckDriver());
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
  if (library == nullptr)
    return absl::FailedPreconditionError(absl::StrCat("cannot open ", path, ": ", LastLinkError()));
  const void* table = dlsym(library, symbol.c_str());
  if (table == nullptr) return absl::FailedPreconditionError(absl::StrCat(path, " exports no ", symbol));
  const char* build = nullptr;
  std::memcpy(&build, table, sizeof build);
  if (std::string_view(build) != CudaPluginBuild()) {
    return absl::FailedPreconditionError(
        absl::StrCat(path, " is of build ", build, ", this program of build ", CudaPluginBuild()));
  }
  return table;
}

absl::StatusOr<const CudaPlugin*> OpenCudaPlugin(const std::string& folder) {
  RW_ASSIGN_OR_RETURN(const void* table, OpenPlugin(folder, kCudaPluginFile, kCudaPluginSymbol, "CUDA backend"));
  return static_cast<const CudaPlugin*>(table);
}

absl::StatusOr<MachineLimits> MeasureCudaLimits(const std::string& folder, int gpu) {
  RW_ASSIGN_OR_RETURN(const void* table,
                      OpenPlugin(folder, kCudaLimitsPluginFile, kCudaLimitsPluginSymbol, "measure of a GPU's limits"));
  return static_cast<const CudaLimitsPlugin*>(table)->measure(gpu);
}

}  // namespace rankwise::kernels
