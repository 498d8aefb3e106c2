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
  bool replaces = false;       // an existing folder that an earlier call wrote; otherwise AlreadyExists
  std::string statistics_dir;  // where calibrate wrote InputStatistics of this model; empty: no scaling by activations
};

// Gets what is being done, how much of it is, and the whole.
using QuantizeProgress = std::function<void(const char* work, int64_t done, int64_t total)>;

// One group of one output, `levels` = 2^bits - 1: w ≈ (q - zero) * scale. Of the ranges that are 100, 95, ... 50 per
// cent of the values' own (widened to hold 0), the one with the least sum of squared errors, each times the input's
// `importance` (empty: 1); scale is an f16.
struct QuantizedGroup {
  uint16_t scale = 0;  // f16
  int zero = 0;
  std::vector<int> q;  // empty when the values are not finite or their range exceeds f16
};
QuantizedGroup QuantizeGroup(std::span<const float> weights, int levels, std::span<const float> importance = {});

// Writes the Hugging Face folder `model_dir` as an AWQ checkpoint (layout "gemm": qweight, qzeros and scales for each
// linear layer of the decoder; embeddings and the output matrix as they are, norms and biases too but for
// scaling by activations): round to nearest. Written beside `folder` and renamed at the end; streams, one matrix at a
// time. FailedPrecondition when the statistics are of another model. `progress` may be empty.
absl::Status WriteQuantized(const std::string& model_dir, const std::string& folder, const QuantizeOptions& options,
                            const QuantizeProgress& progress);

}  // namespace rankwise::weights
