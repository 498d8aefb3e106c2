#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/kv/kv_clip.h"
#include "worker/shard/shard_plan.h"

namespace rankwise::kv {

// What calibration saw, whole model. K after bias, norm and RoPE, rotate-half order.
struct KvStatistics {
  static constexpr char kFileName[] = "kv_statistics.safetensors";

  std::string model_fingerprint;
  int n_layers = 0;
  int n_kv_heads = 0;
  int head_dim = 0;
  std::string dataset;  // "ptb", "c4", a path …
  int64_t sample_count = 0;
  int64_t sample_tokens = 0;
  uint64_t seed = 0;  // of the choice of samples
  // [n_layers, n_kv_heads, head_dim] each.
  std::vector<float> k_min, k_max, v_min, v_max;
  // [n_layers, n_kv_heads, kernels::kHistogramBins] each, or both empty: no clipping.
  std::vector<uint64_t> k_histogram, v_histogram;

  std::vector<float> AbsMax(bool of_keys) const;
  // All values of these KV heads. Requires checked statistics.
  ValueSpread Spread(bool of_keys, int layer, shard::Range heads) const;
};

// InvalidArgument when shapes, ranges or counts contradict each other or values are beyond f32 arithmetic.
absl::Status CheckStatistics(const KvStatistics& statistics);

// One safetensors file with tensors key.min, key.max, key.absmax (F32), key.histogram (U64), value.… and the rest, the
// histogram's bins among it, as metadata.
absl::Status WriteKvStatistics(const std::string& path, const KvStatistics& statistics);
// The file is not trusted: it must say what CheckStatistics asks, and count in the bins of this build.
absl::StatusOr<KvStatistics> ReadKvStatistics(const std::string& path);

}  // namespace rankwise::kv
