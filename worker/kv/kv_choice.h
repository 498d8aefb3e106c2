#pragma once

#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "worker/kv/kv_scales.h"

namespace rankwise::kv {

// A KV cache as command lines, GetModelInfo and reports name it.
struct KvChoice {
  kernels::KvFormat format = kernels::KvFormat::kF16;
  std::optional<Granularity> granularity;  // of the scales that `kv-qparams` writes, where there are any
};

// f32, f16, int8 (scales per layer and rank), int8-head (and per KV head), int8-channel (and per channel of a head),
// int8-online, int4-online.
std::vector<std::string> KvNames();
// InvalidArgument listing them.
absl::StatusOr<KvChoice> ParseKvChoice(const std::string& name);
bool NeedsScales(const std::string& name);

}  // namespace rankwise::kv
