#include "base/check.h"
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

std::unique_ptr<Backend> MakeBackend(const std::string& name, int threads) {
  if (name == "reference") return CreateReferenceBackend();
  auto backend = CreateCpuBackend({.threads = threads, .pin_threads = false, .instruction_set = name});
  RW_CHECK(backend.ok(), std::string(backend.status().message()));
  return *std::move(backend);
}

std::vector<int> TeamSizes() { return {1, 2, 3}; }
int32_t LongestTestContext() { return 1 << 20; }

}  // namespace rankwise::kernels
