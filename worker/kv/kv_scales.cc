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

using kernels::KvChannelScales;
using nlohmann::json;

static_assert(std::endian::native == std::endian::little);

constexpr int kFormatVersion = 1;
constexpr int kMostRanks = 4096;
constexpr int64_t kMostManifestBytes = 1 << 20;
constexpr char kManifestName[] = "kv_scales.json";
constexpr char kHowToWrite[] = "; `rankwise calibrate` and `rankwise kv-qparams` write it";

const char* Name(Granularity granularity) {
  constexpr const char* kNames[] = {"tensor", "head", "channel"};
  return kNames[static_cast<int>(granularity)];
}

KvChannelScales Choose(const ValueSpread& keys, const ValueSpread& values, const ClipOptions& clip) {
  const Int8Parameters k = ChooseParameters(keys, clip), v = ChooseParameters(values, clip);
  return {.k_scale = k.scale, .k_zero_point = k.zero_point, .v_scale = v.scale, .v_zero_point = v.zero_point};
}

KvChannelScales OfHeads(const KvStatistics& statistics, int layer, shard::Range heads, const ClipOptions& clip) {
  return Choose(statistics.Spread(true, layer, heads), statistics.Spread(false, layer, heads), clip);
}

std::vector<KvChannelScales> OfChannels(const KvStatistics& s, int layer, int64_t head, const ClipOptions& clip) {
  std::vector<KvChannelScales> scales;
  const int64_t first = (int64_t{layer} * s.n_kv_heads + head) * s.head_dim;
  for (int64_t i = first; i < first + s.head_dim; ++i) {
    scales.push_back(Choose({.min = s.k_min[i], .max = s.k_max[i]}, {.min = s.v_min[i], .max = s.v_max[i]}, clip));
  }
  return scales;
}

// A scale file is an array of these.
static_assert(sizeof(KvChannelScales) == 4 * sizeof(float));

std::string Bytes(const std::vector<KvChannelScales>& scales) {
  return std::string(reinterpret_cast<const char*>(scales.data()), scales.size() * sizeof(KvChannelScales));
}

std::string RankFile(int layer, int rank) { return absl::StrCat("layers.", layer, ".past_kv_scale.", rank, ".weight"); }
std::string HeadFile(int layer, int64_t head) {
  return absl::StrCat("layers.", layer, ".past_kv_scale_head.", head, ".weight");
}
std::string ChannelFile(int layer, int64_t head) {
  return absl::StrCat("layers.", layer, ".past_kv_scale_channel.", head, ".weight");
}

// The KV heads of each rank of a group: contiguous, and shared when there are more ranks than heads.
shard::Range HeadsOfRank(int n_kv_heads, int rank, int world_size) {
  const int64_t begin = int64_t{n_kv_heads} * rank / world_size;
  const int64_t end = std::max(begin + 1, int64_t{n_kv_heads} * (rank + 1) / world_size);
  return {begin, end};
}

absl::StatusOr<std::vector<KvChannelScales>> ReadScaleFile(const std::string& path, int count) {
  const absl::StatusOr<std::string> bytes = ReadTextFile(path, 1 << 16);
  if (!bytes.ok()) {
    return absl::Status(bytes.status().code(),
                        absl::StrCat("KV scales: ", std::string(bytes.status().message()), kHowToWrite));
  }
  if (bytes->size() == 8) {
    return absl::FailedPreconditionError(
        absl::StrCat(path,
                     " has 8 bytes: symmetric scales of LMDeploy (k_scale, v_scale), which its own engine cannot "
                     "load either; `rankwise kv-qparams --kv-sym` writes symmetric scales in the 16 bytes of "
                     "k_scale, k_zp, v_scale, v_zp"));
  }
  std::vector<KvChannelScales> scales(count);
  const size_t size = count * sizeof(KvChannelScales);
  if (bytes->size() != size) {
    return absl::FailedPreconditionError(absl::StrCat(path, " has ", bytes->size(), " bytes instead of ", size,
                                                      " (k_scale, k_zp, v_scale, v_zp)", kHowToWrite));
  }
  std::memcpy(scales.data(), bytes->data(), size);
  for (const KvChannelScales& s : scales) {
    for (const float value : {s.k_scale, s.k_zero_point, s.v_scale, s.v_zero_point}) {
      if (!std::isfinite(value))
        return absl::FailedPreconditionError(absl::StrCat(path, " holds a value that is not finite"));
    }
    if (s.k_scale <= 0 || s.v_scale <= 0) {
      return absl::FailedPreconditionError(
          absl::StrCat(path, " holds scales ", s.k_scale, " and ", s.v_scale, "; both must be positive"));
    }
  }
  return scales;
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
  if (clip.method != ClipMethod::kNone && granularity == Granularity::kChannel) {
    return absl::FailedPreconditionError(absl::StrCat("clip=", ClipMethodName(clip.method),
                                                      " needs histograms, which there are of heads, not of channels"));
  }
  const int heads = statistics.n_kv_heads;
  if (world_size < 1 || (heads % world_size != 0 && world_size % heads != 0)) {
    return absl::InvalidArgumentError(
        absl::StrCat("tp=", world_size, " and n_kv_heads=", heads, " do not divide one another"));
  }
  std::string all;
  const auto write = [&](const std::string& name, const std::vector<KvChannelScales>& scales) {
    const std::string bytes = Bytes(scales);
    all += bytes;
    return WriteFileAtomically(absl::StrCat(folder, "/", name), bytes);
  };
  for (int layer = 0; layer < statistics.n_layers; ++layer) {
    for (int rank = 0; rank < world_size; ++rank) {
      const shard::Range own = HeadsOfRank(heads, rank, world_size);
      RW_RETURN_IF_ERROR(write(RankFile(layer, rank), {OfHeads(statistics, layer, own, clip)}));
    }
    for (int64_t head = 0; granularity >= Granularity::kHead && head < heads; ++head) {
      RW_RETURN_IF_ERROR(write(HeadFile(layer, head), {OfHeads(statistics, layer, {head, head + 1}, clip)}));
    }
    for (int64_t head = 0; granularity == Granularity::kChannel && head < heads; ++head) {
      RW_RETURN_IF_ERROR(write(ChannelFile(layer, head), OfChannels(statistics, layer, head, clip)));
    }
  }
  json manifest = {{"format_version", kFormatVersion},
                   {"id", Digest(all)},
                   {"model", statistics.model_fingerprint},
                   {"tp", world_size},
                   {"ranks", json::array()},
                   {"granularity", Name(granularity)},
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

// The finest granularity of a manifest that is of this model and TP degree and has the one asked for.
absl::StatusOr<Granularity> CheckManifest(const json& manifest, const std::string& path,
                                          const std::string& model_fingerprint, const ScaleShape& shape,
                                          const shard::ShardPlan& plan, Granularity granularity) {
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
  if (!is("n_layers", shape.n_layers) || !is("n_kv_heads", shape.n_kv_heads) || !is("head_dim", shape.head_dim)) {
    return refuse("is of another shape than this model");
  }
  for (const Granularity written : {Granularity::kRank, Granularity::kHead, Granularity::kChannel}) {
    if (!is("granularity", Name(written))) continue;
    if (written < granularity) {
      return refuse("has no scales per ", Name(granularity), " (--granularity ", Name(granularity), ")");
    }
    if (granularity == Granularity::kRank && !is("tp", plan.world_size)) {
      return refuse("is not of tp=", plan.world_size, " (--num-tp)");
    }
    return written;
  }
  return refuse("names no granularity");
}

}  // namespace

absl::StatusOr<RankScales> ReadKvScales(const std::string& folder, const std::string& model_fingerprint,
                                        const ScaleShape& shape, const shard::ShardPlan& plan,
                                        Granularity granularity) {
  const std::string manifest_path = absl::StrCat(folder, "/", kManifestName);
  int rank_count = plan.world_size;
  Granularity written = Granularity::kRank;
  std::string manifest_id;
  if (std::filesystem::exists(manifest_path)) {
    RW_ASSIGN_OR_RETURN(const std::string text, ReadTextFile(manifest_path, kMostManifestBytes));
    const json manifest = json::parse(text, nullptr, /*allow_exceptions=*/false);
    RW_ASSIGN_OR_RETURN(written, CheckManifest(manifest, manifest_path, model_fingerprint, shape, plan, granularity));
    manifest_id = manifest["id"].get<std::string>();
    rank_count = manifest["tp"].get<int>();
  } else if (granularity != Granularity::kRank) {
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
  const auto read = [&](const std::string& name, int count, bool is_wanted, int64_t times) -> absl::Status {
    RW_ASSIGN_OR_RETURN(const auto scales, ReadScaleFile(absl::StrCat(folder, "/", name), count));
    for (int64_t i = 0; is_wanted && i < times; ++i) {
      result.scales.insert(result.scales.end(), scales.begin(), scales.end());
    }
    all += Bytes(scales);
    return absl::OkStatus();
  };
  const auto is_own = [&](Granularity wanted, int64_t head) {
    return granularity == wanted && plan.kv_heads.begin <= head && head < plan.kv_heads.end;
  };
  for (int layer = 0; layer < shape.n_layers; ++layer) {
    for (int rank = 0; rank < rank_count; ++rank) {
      RW_RETURN_IF_ERROR(read(RankFile(layer, rank), 1, granularity == Granularity::kRank && rank == plan.rank,
                              plan.kv_heads.count() * shape.head_dim));
    }
    for (int64_t head = 0; written >= Granularity::kHead && head < shape.n_kv_heads; ++head) {
      RW_RETURN_IF_ERROR(read(HeadFile(layer, head), 1, is_own(Granularity::kHead, head), shape.head_dim));
    }
    for (int64_t head = 0; written == Granularity::kChannel && head < shape.n_kv_heads; ++head) {
      RW_RETURN_IF_ERROR(read(ChannelFile(layer, head), shape.head_dim, is_own(Granularity::kChannel, head), 1));
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
