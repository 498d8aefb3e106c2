#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace rankwise::launch {

struct Arrival {
  absl::Duration at;  // since the first one
  int32_t prompt_tokens = 1;
  int32_t output_tokens = 1;
};

// Trace files, in order of time: a .csv of TIMESTAMP,ContextTokens,GeneratedTokens (Azure's) or a .jsonl of timestamp
// (ms), input_length, output_length (Mooncake's). Lengths are divided by `length_divisor`; at least 1 remains.
// NotFound; InvalidArgument names the line that is neither.
absl::StatusOr<std::vector<Arrival>> ReadTrace(const std::string& path, int length_divisor);

}  // namespace rankwise::launch
