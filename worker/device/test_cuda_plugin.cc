// A librankwise_cuda.so for device_test: the GPUs are named by RANKWISE_TEST_GPUS, and compute like the reference.

#include <cstdlib>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "base/status_macros.h"
#include "kernels/cuda_plugin.h"

namespace rankwise::kernels {
namespace {

std::vector<std::string> Names() { return absl::StrSplit(std::getenv("RANKWISE_TEST_GPUS"), ',', absl::SkipEmpty()); }

absl::StatusOr<std::vector<Gpu>> ListGpus() {
  const std::vector<std::string> names = Names();
  if (names.empty()) return absl::UnavailableError("no GPU");
  std::vector<Gpu> gpus;
  for (int i = 0; i < static_cast<int>(names.size()); ++i) {
    Gpu& gpu = gpus.emplace_back(Gpu{.index = i,
                                     .name = "Test GPU " + names[i],
                                     .uuid = "GPU-" + names[i],
                                     .capability = 90,
                                     .multiprocessors = 132,
                                     .memory_bytes = int64_t{80} << 30});
    for (int peer = 0; peer < static_cast<int>(names.size()); ++peer) {
      if (peer != i) gpu.peers.push_back(peer);
    }
  }
  return gpus;
}

absl::StatusOr<std::unique_ptr<Backend>> CreateBackend(int gpu, Activations activations) {
  if (Names()[gpu] == "broken") return absl::InternalError("out of order");
  return CreateReferenceBackend(activations);
}

}  // namespace

extern "C" const CudaPlugin rankwise_cuda_plugin;
const CudaPlugin rankwise_cuda_plugin = {.build = RANKWISE_TEST_BUILD,
                                         .list_gpus = ListGpus,
                                         .create_backend = CreateBackend,
                                         .stream = [](Backend&) -> void* { return nullptr; }};

}  // namespace rankwise::kernels
