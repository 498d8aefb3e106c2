#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"

namespace rankwise::weights {

struct QuantizeOptions {
  int bits = 4;  // 4 or 8
  int32_t group_size = 128;
  bool replaces = false;  // an existing folder that an earlier call wrote; otherwise AlreadyExists
};

// One group of one output, `levels` = 2^bits - 1: w ≈ (q - zero) * scale. Of the ranges that are 100, 95, ... 50 per
// cent of the values' own (widened to hold 0), the one with the least sum of squared errors; scale is an f16.
struct QuantizedGroup {
  uint16_t scale = 0;  // f16
  int zero = 0;
  std::vector<int> q;  // empty when the values are not finite or their range exceeds f16
};
QuantizedGroup QuantizeGroup(std::span<const float> weights, int levels);

// Writes the Hugging Face folder `model_dir` as an AWQ checkpoint (layout "gemm": qweight, qzeros and scales for each
// linear layer of the decoder; embeddings, norms, biases and the output matrix as they are): round to nearest, without
// scaling by activations. Written beside `folder` and renamed at the end; streams, one matrix at a time. `progress`
// gets the weights done and the whole.
absl::Status WriteQuantized(const std::string& model_dir, const std::string& folder, const QuantizeOptions& options,
                            const std::function<void(int64_t, int64_t)>& progress);

}  // namespace rankwise::weights
