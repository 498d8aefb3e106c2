#include "base/check.h"
#include "kernels/amx_emulation/amx_emulator.h"
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

// Matrix registers are emulated where the CPU has none.
std::vector<std::string> IntegerProducts() {
  std::vector<std::string> names;
  for (const std::string& name : InstructionSets()) {
    const IntegerKernels* best = &FindCpuKernels(name)->integers;
    if (best == &kAvx2Integers) {
      names.push_back(name);
    } else {
      names.insert(names.end(), {name + "_vnni", name + "_amx"});
      if (best != &kAvx512AmxIntegers) amx_emulation::Install();
    }
  }
  return names;
}

std::unique_ptr<Backend> MakeBackend(const std::string& name, int threads, Activations activations) {
  if (name == "reference") return CreateReferenceBackend(activations);
  if (const size_t end = name.find('_'); end != std::string::npos) {
    const CpuKernels best = FindCpuKernels(name.substr(0, end)).value();
    const CpuKernels kernels{best.floats,
                             name.ends_with("_amx")    ? kAvx512AmxIntegers
                             : name.ends_with("_vnni") ? kAvx512VnniIntegers
                                                       : best.integers,
                             best.integer_attention, name.ends_with("_rounded") ? kAvx512BFloat16s : best.bfloat16s};
    return std::make_unique<CpuBackend>(kernels, CpuOptions{.pin_threads = false, .activations = activations}, threads);
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
