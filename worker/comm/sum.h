#pragma once

#include <span>

namespace rankwise::comm {

// into[i] += from[i]. Requires: equal sizes, no overlap.
void AddTo(std::span<float> into, std::span<const float> from);

}  // namespace rankwise::comm
