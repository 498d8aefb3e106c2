#include "base/check.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/test_support.h"

namespace rankwise::kernels {

std::vector<std::string> InstructionSets() {
  std::vector<std::string> sets;
  for (const char* name : {"avx2", "avx512"}) {
    if (CreateCpuBackend({.threads = 1, .instruction_set = name}).ok()) sets.push_back(name);
  }
  return sets;
}

std::vector<std::string> BackendNames() {
  std::vector<std::string> names = InstructionSets();
  names.insert(names.begin(), "reference");
  return names;
}

// By pairs, or by fma where a CPU has no better.
std::vector<std::string> BFloat16Products() {
  std::vector<std::string> names;
  for (const std::string& name : InstructionSets()) {
    names.push_back(name);
    if (FindCpuKernels(name)->bfloat16s.is_in_pairs) names.push_back(name + "_rounded");
  }
  return names;
}

std::unique_ptr<Backend> MakeBackend(const std::string& name, int threads, Activations activations) {
  if (name == "reference") return CreateReferenceBackend(activations);
  if (name.ends_with("_rounded")) {
    const CpuKernels kernels = FindCpuKernels(name.substr(0, name.find('_'))).value();
    return std::make_unique<CpuBackend>(CpuKernels{kernels.floats, kernels.integers, kAvx512BFloat16s},
                                        CpuOptions{.pin_threads = false, .activations = activations}, threads);
  }
  auto backend =
      CreateCpuBackend({.threads = threads, .pin_threads = false, .instruction_set = name, .activations = activations});
  RW_CHECK(backend.ok(), std::string(backend.status().message()));
  return *std::move(backend);
}

std::vector<int> TeamSizes() { return {1, 2, 3}; }
int32_t LongestTestContext() { return 1 << 20; }
int32_t LargestTestHeadDim() { return kLargestHeadDim; }

}  // namespace rankwise::kernels
