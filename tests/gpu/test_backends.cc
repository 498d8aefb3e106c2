#include "base/check.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/test_support.h"
#include "tests/gpu/device_copies.h"

namespace rankwise::kernels {

// The CUDA backend of librankwise_cuda's sources, or of their emulation: whichever is linked.
std::vector<std::string> InstructionSets() { return {"cuda"}; }
std::vector<std::string> BackendNames() { return {"cuda"}; }
std::vector<std::string> BFloat16Products() { return {"cuda"}; }

std::unique_ptr<Backend> MakeBackend(const std::string& name, int, Activations activations) {
  if (name == "reference") return CreateReferenceBackend(activations);
  auto backend = CreateCudaBackend({.activations = activations});
  RW_CHECK(backend.ok(), std::string(backend.status().message()));
  return MakeDeviceCopies(*std::move(backend));
}

std::vector<int> TeamSizes() { return {1}; }
int32_t LongestTestContext() { return 600; }
int32_t LargestTestHeadDim() { return 512; }

}  // namespace rankwise::kernels
