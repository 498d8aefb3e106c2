#include "worker/comm/sum.h"

#include <cstdint>

#include "base/check.h"

namespace rankwise::comm {

void AddTo(std::span<float> into, std::span<const float> from) {
  RW_CHECK(into.size() == from.size());
  float* __restrict out = into.data();
  const float* __restrict in = from.data();
  for (int64_t i = 0; i < std::ssize(into); ++i) out[i] += in[i];
}

}  // namespace rankwise::comm
