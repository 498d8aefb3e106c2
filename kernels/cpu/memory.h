#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"

namespace rankwise::kernels {

struct MemoryDeleter {
  void operator()(std::byte* p) const;
};
using Memory = std::unique_ptr<std::byte[], MemoryDeleter>;

// Uninitialised and not yet backed by pages, so that the thread that writes first decides the NUMA node. Aligned to 64
// bytes; from 2 MiB on aligned to and advised for huge pages. ResourceExhausted names the size.
absl::StatusOr<Memory> AllocateMemory(int64_t bytes);

// Scratch that only grows, outside of a loop of the team. Contents are lost when it grows.
class Scratch {
 public:
  float* Reserve(int64_t floats);

 private:
  Memory memory_;
  int64_t floats_ = 0;
};

}  // namespace rankwise::kernels
