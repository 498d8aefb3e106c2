#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "worker/kv/kv_clip.h"
#include "worker/kv/kv_statistics.h"
#include "worker/shard/shard_plan.h"

// Static int8 parameters of the KV cache: from calibration statistics to scale files to what a rank needs.
namespace rankwise::kv {

enum class Granularity : uint8_t {
  kRank,  // one for all KV heads of a rank: "tensor" on the command line and in the manifest
  kHead,
  kChannel,
};

// Writes layers.{layer}.past_kv_scale.{rank}.weight (16 bytes: little-endian f32 k_scale, k_zp, v_scale, v_zp) for
// every layer and rank of `world_size`; with kHead and kChannel also layers.{layer}.past_kv_scale_head.{head}.weight in
// the same form for every KV head; with kChannel also layers.{layer}.past_kv_scale_channel.{head}.weight, head_dim
// times the same form; and kv_scales.json, the manifest: format version, model fingerprint, tp, the ranks' KV heads,
// shapes, granularity, clipping, dataset, samples, seed, id (xxh3 of all scales, 16 hex digits). Files are written to
// temporary names and renamed. The folder must exist. FailedPrecondition when clipping needs histograms that the
// statistics lack: those of channels always do.
absl::Status WriteKvScales(const std::string& folder, const KvStatistics& statistics, int world_size,
                           Granularity granularity, const ClipOptions& clip = {});

// What the scales cost against a cache without quantisation, on a text.
struct MeasuredLoss {
  std::string kv;    // "int8", "int8-head", "int8-channel"
  std::string text;  // its file
  int64_t token_count = 0;
  double nll_change = 0;  // relative: 0.001 is 0.1 %
  double kl_mean = 0;     // nats a token
};

// Adds the figures to the manifest under "measured", one entry for each `kv`. The id stays: it is of the scales.
// FailedPrecondition when the folder has no manifest, or one of another id.
absl::Status RecordMeasurement(const std::string& folder, const std::string& manifest_id, const MeasuredLoss& loss);

struct ScaleShape {
  int n_layers = 0, n_kv_heads = 0, head_dim = 0;  // of the model
};

struct RankScales {
  std::string manifest_id;
  std::vector<kernels::KvChannelScales> scales;  // [n_layers, n_kv_heads_local, head_dim]
};

// What this rank serves with. A missing, short, long or non-finite file, a scale that is not positive, a manifest of
// another model or TP degree (scales of heads and channels serve every degree), files that do not add up to the
// manifest's id: FailedPrecondition / NotFound naming the file and saying which command writes it. Without a manifest
// (files LMDeploy wrote) only kRank can be read, files for more ranks than serve are refused, and the id is that of the
// files' content.
absl::StatusOr<RankScales> ReadKvScales(const std::string& folder, const std::string& model_fingerprint,
                                        const ScaleShape& shape, const shard::ShardPlan& plan, Granularity granularity);

}  // namespace rankwise::kv
