#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "worker/shard/shard_plan.h"

// Static int8 parameters of the KV cache: from calibration statistics to scale files to what a rank needs.
namespace rankwise::kv {

// What calibration saw, whole model: per layer, KV head and channel. K after bias, norm and RoPE, rotate-half order.
struct KvStatistics {
  std::string model_fingerprint;
  int n_layers = 0;
  int n_kv_heads = 0;
  int head_dim = 0;
  std::string dataset;  // "ptb", "c4", a path …
  int64_t sample_count = 0;
  int64_t sample_tokens = 0;
  // [n_layers, n_kv_heads, head_dim] each.
  std::vector<float> k_min, k_max, v_min, v_max;

  std::vector<float> AbsMax(bool of_keys) const;
};

// One safetensors file with tensors key.min, key.max, key.absmax, value.… and the rest as metadata.
absl::Status WriteKvStatistics(const std::string& path, const KvStatistics& statistics);
absl::StatusOr<KvStatistics> ReadKvStatistics(const std::string& path);

enum class Granularity : uint8_t { kRank, kHead };

// Writes layers.{layer}.past_kv_scale.{rank}.weight (16 bytes: little-endian f32 k_scale, k_zp, v_scale, v_zp) for
// every layer and rank of `world_size`; with kHead also layers.{layer}.past_kv_scale_head.{head}.weight in the same
// form for every KV head; and kv_scales.json, the manifest: format version, model fingerprint, tp, shapes, dataset,
// samples, id (xxh3 of all scales, 16 hex digits). Files are written to temporary names and renamed. The folder must
// exist. zp = (min + max) / 2, scale = (max - min) / 255 in f32; a constant channel range gets the smallest scale that
// keeps it exact.
absl::Status WriteKvScales(const std::string& folder, const KvStatistics& statistics, int world_size,
                           Granularity granularity);

struct RankScales {
  std::string manifest_id;
  std::vector<kernels::KvHeadScales> scales;  // [n_layers, n_kv_heads_local]
};

// What this rank serves with. A missing, short, long or non-finite file, a scale that is not positive, a manifest of
// another model or TP degree (per-head scales serve every degree), files that do not add up to the manifest's id:
// FailedPrecondition / NotFound naming the file and saying which command writes it. Without a manifest (files LMDeploy
// wrote) only kRank can be read, files for more ranks than serve are refused, and the id is that of the files' content.
absl::StatusOr<RankScales> ReadKvScales(const std::string& folder, const std::string& model_fingerprint, int n_layers,
                                        int n_kv_heads, const shard::ShardPlan& plan, Granularity granularity);

}  // namespace rankwise::kv
