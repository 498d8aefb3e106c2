#include "worker/kv/kv_scales.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "base/digest.h"
#include "base/mapped_file.h"
#include "base/status_macros.h"

namespace rankwise::kv {
namespace {

using kernels::KvHeadScales;
using nlohmann::json;

static_assert(std::endian::native == std::endian::little);

constexpr int kFormatVersion = 1;
constexpr int kMostRanks = 4096;
constexpr int64_t kMostManifestBytes = 1 << 20;
constexpr char kManifestName[] = "kv_scales.json";
constexpr char kHowToWrite[] = "; `rankwise calibrate` and `rankwise kv-qparams` write it";

KvHeadScales OfHeads(const KvStatistics& statistics, int layer, shard::Range heads, const ClipOptions& clip) {
  const Int8Parameters k = ChooseParameters(statistics.Spread(true, layer, heads), clip);
  const Int8Parameters v = ChooseParameters(statistics.Spread(false, layer, heads), clip);
  return {.k_scale = k.scale, .k_zero_point = k.zero_point, .v_scale = v.scale, .v_zero_point = v.zero_point};
}

std::string Bytes(const KvHeadScales& scales) {
  const float values[4] = {scales.k_scale, scales.k_zero_point, scales.v_scale, scales.v_zero_point};
  return std::string(reinterpret_cast<const char*>(values), sizeof values);
}

std::string RankFile(int layer, int rank) { return absl::StrCat("layers.", layer, ".past_kv_scale.", rank, ".weight"); }
std::string HeadFile(int layer, int64_t head) {
  return absl::StrCat("layers.", layer, ".past_kv_scale_head.", head, ".weight");
}

// The KV heads of each rank of a group: contiguous, and shared when there are more ranks than heads.
shard::Range HeadsOfRank(int n_kv_heads, int rank, int world_size) {
  const int64_t begin = int64_t{n_kv_heads} * rank / world_size;
  const int64_t end = std::max(begin + 1, int64_t{n_kv_heads} * (rank + 1) / world_size);
  return {begin, end};
}

absl::StatusOr<KvHeadScales> ReadScaleFile(const std::string& path) {
  const absl::StatusOr<std::string> bytes = ReadTextFile(path, 4096);
  if (!bytes.ok()) {
    return absl::Status(bytes.status().code(),
                        absl::StrCat("KV scales: ", std::string(bytes.status().message()), kHowToWrite));
  }
  float values[4];
  if (bytes->size() == 8) {
    return absl::FailedPreconditionError(
        absl::StrCat(path,
                     " has 8 bytes: symmetric scales of LMDeploy (k_scale, v_scale), which its own engine cannot "
                     "load either; `rankwise kv-qparams --kv-sym` writes symmetric scales in the 16 bytes of "
                     "k_scale, k_zp, v_scale, v_zp"));
  }
  if (bytes->size() != sizeof values) {
    return absl::FailedPreconditionError(
        absl::StrCat(path, " has ", bytes->size(), " bytes instead of 16 (k_scale, k_zp, v_scale, v_zp)", kHowToWrite));
  }
  std::memcpy(values, bytes->data(), sizeof values);
  for (const float value : values) {
    if (!std::isfinite(value))
      return absl::FailedPreconditionError(absl::StrCat(path, " holds a value that is not finite"));
  }
  if (values[0] <= 0 || values[2] <= 0) {
    return absl::FailedPreconditionError(
        absl::StrCat(path, " holds scales ", values[0], " and ", values[2], "; both must be positive"));
  }
  return KvHeadScales{.k_scale = values[0], .k_zero_point = values[1], .v_scale = values[2], .v_zero_point = values[3]};
}

}  // namespace

absl::Status WriteKvScales(const std::string& folder, const KvStatistics& statistics, int world_size,
                           Granularity granularity, const ClipOptions& clip) {
  RW_RETURN_IF_ERROR(CheckStatistics(statistics));
  if (clip.method != ClipMethod::kNone && statistics.k_histogram.empty()) {
    return absl::FailedPreconditionError(absl::StrCat("clip=", ClipMethodName(clip.method),
                                                      " needs histograms, which these statistics do not have; "
                                                      "`rankwise calibrate` writes them"));
  }
  const int heads = statistics.n_kv_heads;
  if (world_size < 1 || (heads % world_size != 0 && world_size % heads != 0)) {
    return absl::InvalidArgumentError(
        absl::StrCat("tp=", world_size, " and n_kv_heads=", heads, " do not divide one another"));
  }
  std::string all;
  const auto write = [&](const std::string& name, shard::Range range, int layer) {
    const std::string bytes = Bytes(OfHeads(statistics, layer, range, clip));
    all += bytes;
    return WriteFileAtomically(absl::StrCat(folder, "/", name), bytes);
  };
  for (int layer = 0; layer < statistics.n_layers; ++layer) {
    for (int rank = 0; rank < world_size; ++rank) {
      RW_RETURN_IF_ERROR(write(RankFile(layer, rank), HeadsOfRank(heads, rank, world_size), layer));
    }
    for (int64_t head = 0; granularity == Granularity::kHead && head < heads; ++head) {
      RW_RETURN_IF_ERROR(write(HeadFile(layer, head), {head, head + 1}, layer));
    }
  }
  json manifest = {{"format_version", kFormatVersion},
                   {"id", Digest(all)},
                   {"model", statistics.model_fingerprint},
                   {"tp", world_size},
                   {"ranks", json::array()},
                   {"granularity", granularity == Granularity::kHead ? "head" : "tensor"},
                   {"n_layers", statistics.n_layers},
                   {"n_kv_heads", heads},
                   {"head_dim", statistics.head_dim},
                   {"bits", 8},
                   {"symmetric", clip.is_symmetric},
                   {"clip", ClipMethodName(clip.method)},
                   {"dataset", statistics.dataset},
                   {"samples", statistics.sample_count},
                   {"seqlen", statistics.sample_tokens},
                   {"seed", statistics.seed}};
  if (clip.method == ClipMethod::kPercentile) manifest["percentile"] = clip.percentile;
  for (int rank = 0; rank < world_size; ++rank) {
    const shard::Range range = HeadsOfRank(heads, rank, world_size);
    manifest["ranks"].push_back({{"rank", rank}, {"kv_heads", {range.begin, range.end}}});
  }
  return WriteFileAtomically(absl::StrCat(folder, "/", kManifestName),
                             manifest.dump(2, ' ', false, json::error_handler_t::replace) + "\n");
}

namespace {

// OK when the manifest is of this model and TP degree and has the granularity asked for.
absl::Status CheckManifest(const json& manifest, const std::string& path, const std::string& model_fingerprint,
                           int n_layers, int n_kv_heads, const shard::ShardPlan& plan, Granularity granularity) {
  const auto refuse = [&](const auto&... what) {
    return absl::FailedPreconditionError(absl::StrCat(path, " ", what..., kHowToWrite));
  };
  const auto is = [&](const char* key, const json& value) { return manifest.contains(key) && manifest[key] == value; };
  if (!manifest.is_object() || !manifest.contains("id") || !manifest["id"].is_string() || manifest["id"] == "") {
    return refuse("is not a scale manifest");
  }
  if (!is("format_version", kFormatVersion)) return refuse("is of another format version than ", kFormatVersion);
  if (!is("model", model_fingerprint)) return refuse("is of another model than ", model_fingerprint);
  if (!manifest.contains("tp") || !manifest["tp"].is_number_unsigned() || manifest["tp"].get<uint64_t>() < 1 ||
      manifest["tp"].get<uint64_t>() > kMostRanks) {
    return refuse("names no tp");
  }
  if (!is("n_layers", n_layers) || !is("n_kv_heads", n_kv_heads)) return refuse("is of another shape than this model");
  if (!is("granularity", "head") && !is("granularity", "tensor")) return refuse("names no granularity");
  if (granularity == Granularity::kHead) {
    return is("granularity", "head") ? absl::OkStatus() : refuse("has no scales per head (--granularity head)");
  }
  if (!is("tp", plan.world_size)) return refuse("is not of tp=", plan.world_size, " (--num-tp)");
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<RankScales> ReadKvScales(const std::string& folder, const std::string& model_fingerprint, int n_layers,
                                        int n_kv_heads, const shard::ShardPlan& plan, Granularity granularity) {
  const std::string manifest_path = absl::StrCat(folder, "/", kManifestName);
  int rank_count = plan.world_size, head_count = 0;
  std::string manifest_id;
  if (std::filesystem::exists(manifest_path)) {
    RW_ASSIGN_OR_RETURN(const std::string text, ReadTextFile(manifest_path, kMostManifestBytes));
    const json manifest = json::parse(text, nullptr, /*allow_exceptions=*/false);
    RW_RETURN_IF_ERROR(
        CheckManifest(manifest, manifest_path, model_fingerprint, n_layers, n_kv_heads, plan, granularity));
    manifest_id = manifest["id"].get<std::string>();
    rank_count = manifest["tp"].get<int>();
    if (manifest["granularity"] == "head") head_count = n_kv_heads;
  } else if (granularity == Granularity::kHead) {
    return absl::NotFoundError(absl::StrCat(manifest_path, " is missing", kHowToWrite));
  } else if (const std::string next = absl::StrCat(folder, "/", RankFile(0, rank_count));
             std::filesystem::exists(next)) {
    // A rank's scales cover its own heads: those for more ranks are too narrow for fewer.
    return absl::FailedPreconditionError(absl::StrCat(next, " is for more ranks than tp=", rank_count, kHowToWrite));
  }
  // All files, in the order they were written: the id is of all, so that every rank has the same one, and files that
  // the manifest does not know (those of another export) are found out.
  RankScales result;
  std::string all;
  const auto read = [&](const std::string& name, int64_t times) -> absl::Status {
    RW_ASSIGN_OR_RETURN(const KvHeadScales scales, ReadScaleFile(absl::StrCat(folder, "/", name)));
    result.scales.insert(result.scales.end(), times, scales);
    all += Bytes(scales);
    return absl::OkStatus();
  };
  for (int layer = 0; layer < n_layers; ++layer) {
    for (int rank = 0; rank < rank_count; ++rank) {
      const bool is_wanted = granularity == Granularity::kRank && rank == plan.rank;
      RW_RETURN_IF_ERROR(read(RankFile(layer, rank), is_wanted ? plan.kv_heads.count() : 0));
    }
    for (int64_t head = 0; head < head_count; ++head) {
      const bool is_wanted =
          granularity == Granularity::kHead && plan.kv_heads.begin <= head && head < plan.kv_heads.end;
      RW_RETURN_IF_ERROR(read(HeadFile(layer, head), is_wanted ? 1 : 0));
    }
  }
  result.manifest_id = Digest(all);
  if (!manifest_id.empty() && manifest_id != result.manifest_id) {
    return absl::FailedPreconditionError(absl::StrCat(manifest_path, " has id ", manifest_id,
                                                      ", but the scale files beside it make ", result.manifest_id,
                                                      kHowToWrite));
  }
  return result;
}

absl::Status RecordMeasurement(const std::string& folder, const std::string& manifest_id, const MeasuredLoss& loss) {
  const std::string path = absl::StrCat(folder, "/", kManifestName);
  if (!std::filesystem::exists(path)) {
    return absl::FailedPreconditionError(absl::StrCat(path, " is missing, so there is nowhere to record", kHowToWrite));
  }
  RW_ASSIGN_OR_RETURN(const std::string text, ReadTextFile(path, kMostManifestBytes));
  json manifest = json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!manifest.is_object() || !manifest.contains("id") || manifest["id"] != manifest_id) {
    return absl::FailedPreconditionError(absl::StrCat(path, " is not the manifest of the scales ", manifest_id));
  }
  if (!manifest.contains("measured") || !manifest["measured"].is_object()) manifest["measured"] = json::object();
  manifest["measured"][loss.kv] = {
      {"text", loss.text}, {"tokens", loss.token_count}, {"nll_change", loss.nll_change}, {"kl_mean", loss.kl_mean}};
  return WriteFileAtomically(path, manifest.dump(2, ' ', false, json::error_handler_t::replace) + "\n");
}

}  // namespace rankwise::kv
