#include "worker/kv/kv_scales.h"

#include <xxhash.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <limits>
#include <nlohmann/json.hpp>
#include <span>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/mapped_file.h"
#include "base/status_macros.h"
#include "worker/weights/safetensors.h"

namespace rankwise::kv {
namespace {

using kernels::KvHeadScales;
using nlohmann::json;

static_assert(std::endian::native == std::endian::little);

constexpr int kFormatVersion = 1;
constexpr int kMostRanks = 4096;
constexpr float kMostValue = 1e38f;  // max - min and min + max stay finite
constexpr char kManifestName[] = "kv_scales.json";
constexpr char kHowToWrite[] = "; `rankwise calibrate` and `rankwise kv-qparams` write it";

struct Parameters {
  float scale, zero_point;
};

// The range [min, max] on 256 steps. A constant is represented exactly: q = 0 with zero point = the constant.
Parameters FromRange(float min, float max) {
  // The least normal number: its reciprocal is still finite.
  return {.scale = std::max((max - min) / 255.0f, std::numeric_limits<float>::min()), .zero_point = (min + max) / 2.0f};
}

KvHeadScales FromHeads(const KvStatistics& statistics, int layer, shard::Range heads) {
  const int64_t row = int64_t{layer} * statistics.n_kv_heads;
  const auto begin = (row + heads.begin) * statistics.head_dim, end = (row + heads.end) * statistics.head_dim;
  const auto range = [&](const std::vector<float>& low, const std::vector<float>& high) {
    return FromRange(*std::min_element(low.begin() + begin, low.begin() + end),
                     *std::max_element(high.begin() + begin, high.begin() + end));
  };
  const Parameters k = range(statistics.k_min, statistics.k_max), v = range(statistics.v_min, statistics.v_max);
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

std::string Digest(const std::string& bytes) {
  return absl::StrFormat("%016x", XXH3_64bits(bytes.data(), bytes.size()));
}

// The KV heads of each rank of a group: contiguous, and shared when there are more ranks than heads.
shard::Range HeadsOfRank(int n_kv_heads, int rank, int world_size) {
  const int64_t begin = int64_t{n_kv_heads} * rank / world_size;
  const int64_t end = std::max(begin + 1, int64_t{n_kv_heads} * (rank + 1) / world_size);
  return {begin, end};
}

absl::Status CheckStatistics(const KvStatistics& s) {
  const auto count = static_cast<size_t>(s.n_layers) * s.n_kv_heads * s.head_dim;
  if (count == 0) return absl::InvalidArgumentError("statistics of no layer or head");
  for (const auto* values : {&s.k_min, &s.k_max, &s.v_min, &s.v_max}) {
    if (values->size() != count) {
      return absl::InvalidArgumentError(absl::StrCat("statistics hold ", values->size(), " values instead of ", count));
    }
    for (const float value : *values) {
      if (!(std::abs(value) <= kMostValue)) {
        return absl::InvalidArgumentError(
            absl::StrCat("statistics hold ", value, ", which is not finite or beyond ", kMostValue));
      }
    }
  }
  for (size_t i = 0; i < count; ++i) {
    if (s.k_min[i] > s.k_max[i] || s.v_min[i] > s.v_max[i]) {
      return absl::InvalidArgumentError("statistics hold a minimum above its maximum");
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<KvHeadScales> ReadScaleFile(const std::string& path) {
  const absl::StatusOr<std::string> bytes = ReadTextFile(path, 4096);
  if (!bytes.ok()) {
    return absl::Status(bytes.status().code(),
                        absl::StrCat("KV scales: ", std::string(bytes.status().message()), kHowToWrite));
  }
  float values[4];
  if (bytes->size() != sizeof values) {
    const char* guess = bytes->size() == 8 ? ", as a symmetric export (k_scale, v_scale) has" : "";
    return absl::FailedPreconditionError(absl::StrCat(path, " has ", bytes->size(), " bytes", guess,
                                                      " instead of 16 (k_scale, k_zp, v_scale, v_zp)", kHowToWrite));
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

std::vector<float> KvStatistics::AbsMax(bool of_keys) const {
  const std::vector<float>&low = of_keys ? k_min : v_min, &high = of_keys ? k_max : v_max;
  std::vector<float> absmax(low.size());
  for (size_t i = 0; i < absmax.size(); ++i) absmax[i] = std::max(std::abs(low[i]), std::abs(high[i]));
  return absmax;
}

absl::Status WriteKvStatistics(const std::string& path, const KvStatistics& statistics) {
  RW_RETURN_IF_ERROR(CheckStatistics(statistics));
  const std::vector<int64_t> shape = {statistics.n_layers, statistics.n_kv_heads, statistics.head_dim};
  const std::vector<float> k_absmax = statistics.AbsMax(true), v_absmax = statistics.AbsMax(false);
  const std::pair<const char*, const std::vector<float>*> tensors[] = {
      {"key.min", &statistics.k_min},   {"key.max", &statistics.k_max},   {"key.absmax", &k_absmax},
      {"value.min", &statistics.v_min}, {"value.max", &statistics.v_max}, {"value.absmax", &v_absmax}};
  std::vector<weights::TensorHeader> headers;
  for (const auto& [name, values] : tensors) headers.push_back({.name = name, .dtype = "F32", .shape = shape});
  std::string bytes = weights::SafetensorsHeader(headers, {{"format", "rankwise-kv-statistics-1"},
                                                           {"model", statistics.model_fingerprint},
                                                           {"dataset", statistics.dataset},
                                                           {"samples", absl::StrCat(statistics.sample_count)},
                                                           {"sample_tokens", absl::StrCat(statistics.sample_tokens)}});
  for (const auto& [name, values] : tensors) {
    bytes.append(reinterpret_cast<const char*>(values->data()), values->size() * sizeof(float));
  }
  return WriteFileAtomically(path, bytes);
}

absl::StatusOr<KvStatistics> ReadKvStatistics(const std::string& path) {
  RW_ASSIGN_OR_RETURN(const weights::SafetensorsFile file, weights::SafetensorsFile::Open(path));
  const auto metadata = [&](const char* key) {
    const auto found = file.metadata().find(key);
    return found == file.metadata().end() ? std::string() : found->second;
  };
  if (metadata("format") != "rankwise-kv-statistics-1") {
    return absl::InvalidArgumentError(absl::StrCat(path, " is not a KV statistics file"));
  }
  KvStatistics statistics{.model_fingerprint = metadata("model"), .dataset = metadata("dataset")};
  if (!absl::SimpleAtoi(metadata("samples"), &statistics.sample_count)) statistics.sample_count = 0;
  if (!absl::SimpleAtoi(metadata("sample_tokens"), &statistics.sample_tokens)) statistics.sample_tokens = 0;
  const std::pair<const char*, std::vector<float>*> tensors[] = {{"key.min", &statistics.k_min},
                                                                 {"key.max", &statistics.k_max},
                                                                 {"value.min", &statistics.v_min},
                                                                 {"value.max", &statistics.v_max}};
  for (const auto& [name, values] : tensors) {
    const auto found = file.tensors().find(name);
    if (found == file.tensors().end() || found->second.dtype != "F32" || found->second.shape.size() != 3) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": ", name, " is not an F32 tensor [layers, KV heads, channels]"));
    }
    const weights::StoredTensor& tensor = found->second;
    if (tensor.shape != file.tensors().at("key.min").shape) {
      return absl::InvalidArgumentError(absl::StrCat(path, ": ", name, " has another shape than key.min"));
    }
    for (const int64_t dim : tensor.shape) {
      if (dim < 1 || dim > (1 << 20))
        return absl::InvalidArgumentError(absl::StrCat(path, ": ", name, " has a dimension of ", dim));
    }
    statistics.n_layers = static_cast<int>(tensor.shape[0]);
    statistics.n_kv_heads = static_cast<int>(tensor.shape[1]);
    statistics.head_dim = static_cast<int>(tensor.shape[2]);
    values->resize(tensor.bytes / sizeof(float));
    std::memcpy(values->data(), tensor.data, tensor.bytes);
  }
  const absl::Status checked = CheckStatistics(statistics);
  if (!checked.ok()) return absl::Status(checked.code(), absl::StrCat(path, ": ", std::string(checked.message())));
  return statistics;
}

absl::Status WriteKvScales(const std::string& folder, const KvStatistics& statistics, int world_size,
                           Granularity granularity) {
  RW_RETURN_IF_ERROR(CheckStatistics(statistics));
  const int heads = statistics.n_kv_heads;
  if (world_size < 1 || (heads % world_size != 0 && world_size % heads != 0)) {
    return absl::InvalidArgumentError(
        absl::StrCat("tp=", world_size, " and n_kv_heads=", heads, " do not divide one another"));
  }
  std::string all;
  const auto write = [&](const std::string& name, shard::Range range, int layer) {
    const std::string bytes = Bytes(FromHeads(statistics, layer, range));
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
  const json manifest = {{"format_version", kFormatVersion},
                         {"id", Digest(all)},
                         {"model", statistics.model_fingerprint},
                         {"tp", world_size},
                         {"granularity", granularity == Granularity::kHead ? "head" : "rank"},
                         {"n_layers", statistics.n_layers},
                         {"n_kv_heads", heads},
                         {"head_dim", statistics.head_dim},
                         {"bits", 8},
                         {"dataset", statistics.dataset},
                         {"samples", statistics.sample_count},
                         {"sample_tokens", statistics.sample_tokens}};
  return WriteFileAtomically(absl::StrCat(folder, "/", kManifestName), manifest.dump(2) + "\n");
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
  if (!is("granularity", "head") && !is("granularity", "rank")) return refuse("names no granularity");
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
    RW_ASSIGN_OR_RETURN(const std::string text, ReadTextFile(manifest_path, 1 << 20));
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

}  // namespace rankwise::kv
