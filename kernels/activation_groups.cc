#include "kernels/activation_groups.h"

#include <algorithm>
#include <cmath>

namespace rankwise::kernels {

std::vector<ActivationGroup> CutActivations(const PackedShape& shape, const SumTree& tree,
                                            std::vector<int32_t>& chunk_begin) {
  std::vector<ActivationGroup> groups;
  chunk_begin = {0};
  for (size_t c = 0; c + 1 < tree.boundaries.size(); ++c) {
    for (int64_t k = tree.boundaries[c]; k < tree.boundaries[c + 1];) {
      const int64_t weight_group = (k + shape.group_offset) / shape.group_size;
      const int64_t first = weight_group * shape.group_size - shape.group_offset;  // may lie before this slice
      const int64_t cut = first + ((k - first) / kActivationGroup + 1) * kActivationGroup;
      const int64_t end = std::min({cut, first + shape.group_size, tree.boundaries[c + 1]});
      groups.push_back({.begin = static_cast<int32_t>(k),
                        .end = static_cast<int32_t>(end),
                        .weight_group = static_cast<int32_t>(weight_group)});
      k = end;
    }
    chunk_begin.push_back(static_cast<int32_t>(groups.size()));
  }
  return groups;
}

float QuantizeActivations(std::span<const float> x, std::span<int8_t> q) {
  float largest = 0;
  for (const float value : x) {
    if (std::isnan(value)) largest = value;
    if (std::fabs(value) > largest) largest = std::fabs(value);
  }
  const float scale = largest / 127.0f;
  for (size_t i = 0; i < x.size(); ++i) {
    const float level = std::nearbyint(x[i] / (scale > 0 ? scale : 1.0f));
    q[i] = static_cast<int8_t>(level > -127.0f ? std::min(level, 127.0f) : -127.0f);
  }
  return scale;
}

}  // namespace rankwise::kernels
