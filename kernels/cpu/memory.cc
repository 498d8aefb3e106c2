#include "kernels/cpu/memory.h"

#include <sys/mman.h>

#include <cstdlib>

#include "absl/strings/str_cat.h"
#include "base/check.h"

namespace rankwise::kernels {

void MemoryDeleter::operator()(std::byte* p) const { std::free(p); }

absl::StatusOr<Memory> AllocateMemory(int64_t bytes) {
  constexpr int64_t kHugePage = int64_t{2} << 20;
  const bool is_huge = bytes >= kHugePage;
  const int64_t rounded = bytes < 64 ? 64 : (bytes + 63) / 64 * 64;
  void* p = nullptr;
  if (bytes < 0 || posix_memalign(&p, is_huge ? kHugePage : 64, static_cast<size_t>(rounded)) != 0) {
    return absl::ResourceExhaustedError(absl::StrCat("no memory for ", bytes, " bytes"));
  }
  // Advice: a kernel without huge pages refuses it and only speed is lost.
  if (is_huge) madvise(p, static_cast<size_t>(rounded), MADV_HUGEPAGE);
  return Memory(static_cast<std::byte*>(p));
}

float* Scratch::Reserve(int64_t floats) {
  if (floats > floats_) {
    memory_.reset();
    auto memory = AllocateMemory(floats * static_cast<int64_t>(sizeof(float)));
    RW_CHECK(memory.ok(), std::string(memory.status().message()));
    memory_ = *std::move(memory);
    floats_ = floats;
  }
  return reinterpret_cast<float*>(memory_.get());
}

}  // namespace rankwise::kernels
