#include "worker/weights/workspace_layout.h"

#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "base/digest.h"
#include "base/status_macros.h"
#include "worker/weights/json.h"
#include "worker/weights/turbomind_config.h"
#include "worker/weights/turbomind_int4.h"

namespace rankwise::weights {
namespace {

using kernels::DType;
using nlohmann::json;

constexpr int kFormatVersion = 1;
constexpr char kLayout[] = "turbomind-0.2";
constexpr double kBytesMost = 1e15;

absl::Status CheckDigest(const std::string& name, const std::string& digest) {
  if (digest.size() == 16 && digest.find_first_not_of("0123456789abcdef") == std::string::npos) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(name, "=", digest.substr(0, 80), " is not 16 hex digits"));
}

absl::StatusOr<WorkspaceManifest::File> ParseFile(const std::string& name, const json& entry, DType dtype) {
  if (!entry.is_object()) return absl::InvalidArgumentError(absl::StrCat("files.", name, " is not an object"));
  Members members(entry, absl::StrCat("files.", name, "."));
  WorkspaceManifest::File file;
  file.bytes = members.Int("bytes", {0, kBytesMost});
  file.xxh3 = members.String("xxh3");
  const std::string own_dtype = members.String("dtype");
  RW_RETURN_IF_ERROR(members.status());
  RW_RETURN_IF_ERROR(CheckDigest(absl::StrCat("files.", name, ".xxh3"), file.xxh3));
  const json& shape = members.Get("shape");
  const auto is_dim = [](const json& dim) { return dim.is_number_unsigned(); };
  if (!shape.is_array() || shape.size() > 2 || !std::ranges::all_of(shape, is_dim)) {
    return absl::InvalidArgumentError(absl::StrCat("files.", name, ".shape is not a list of one or two sizes"));
  }
  file.shape = shape.get<std::vector<int64_t>>();
  for (const DType known : {dtype, DType::kInt4}) {
    file.dtype = known;
    if (own_dtype == kernels::DTypeName(known)) return file;
  }
  return absl::InvalidArgumentError(absl::StrCat("files.", name, ".dtype=", own_dtype.substr(0, 80), " is neither ",
                                                 kernels::DTypeName(dtype), " nor int4"));
}

}  // namespace

std::string WorkspaceWeights(const std::string& folder) { return folder + "/triton_models/weights"; }
std::string WorkspaceTokenizer(const std::string& folder) { return folder + "/triton_models/tokenizer"; }

bool IsWorkspace(const std::string& folder) {
  std::error_code error;
  return std::filesystem::exists(folder + "/" + kWorkspaceConfig, error);
}

int64_t WorkspaceFile::bytes() const {
  int64_t count = 1;
  for (const int64_t dim : shape) count *= dim;
  return dtype == DType::kInt4 ? count / 2 : count * kernels::DTypeBytes(dtype);
}

std::vector<WorkspaceFile> OuterFiles(const ModelConfig& model, int tp, DType dtype) {
  const int64_t vocab_padded = (model.vocab_size + tp - 1) / tp * tp;
  return {{"tok_embeddings.weight", {vocab_padded, model.hidden_size}, dtype},
          {"norm.weight", {model.hidden_size}, dtype},
          {"output.weight", {vocab_padded, model.hidden_size}, dtype}};
}

std::vector<WorkspaceFile> LayerFiles(const ModelConfig& model, int tp, int layer, DType dtype) {
  const int64_t hidden = model.hidden_size, dim = model.head_dim, inner = model.intermediate_size / tp;
  const int64_t q = model.n_heads / tp * dim, kv = model.n_kv_heads / tp * dim;
  const std::string prefix = absl::StrCat("layers.", layer, ".");
  std::vector<WorkspaceFile> files = {{prefix + "attention_norm.weight", {hidden}, dtype},
                                      {prefix + "ffn_norm.weight", {hidden}, dtype}};
  for (int file = 0; file < tp; ++file) {
    const auto add = [&](const char* name, const char* kind, std::vector<int64_t> shape, DType of) {
      files.push_back({absl::StrCat(prefix, name, ".", file, ".", kind), std::move(shape), of});
    };
    const auto add_matrix = [&](const char* name, int64_t n_in, int64_t n_out) {
      if (model.weight_bits == 0) return add(name, "weight", {n_in, n_out}, dtype);
      add(name, "qweight", {n_in, n_out}, DType::kInt4);
      add(name, "scales_zeros", {n_in / model.weight_group_size, 2 * n_out}, dtype);
    };
    add_matrix("attention.w_qkv", hidden, q + 2 * kv);
    if (model.has_qkv_bias) add("attention.w_qkv", "bias", {q + 2 * kv}, dtype);
    add_matrix("attention.wo", q, hidden);
    if (model.has_qkv_bias) add("attention.wo", "bias", {hidden}, dtype);
    if (model.weight_bits == 0) {
      add_matrix("feed_forward.w1", hidden, inner);
      add_matrix("feed_forward.w3", hidden, inner);
    } else {
      add_matrix("feed_forward.w13", hidden, 2 * inner);
    }
    add_matrix("feed_forward.w2", inner, hidden);
  }
  return files;
}

absl::Status CheckInt4Files(const ModelConfig& model, int tp) {
  for (const WorkspaceFile& file : LayerFiles(model, tp, 0, DType::kF16)) {
    if (file.dtype != DType::kInt4) continue;
    const int64_t n_in = file.shape[0], n_out = file.shape[1];
    if (n_in % model.weight_group_size != 0) {
      return absl::InvalidArgumentError(absl::StrCat("at tp=", tp, " ", file.name, " would have ", n_in,
                                                     " inputs, which are not whole groups of ",
                                                     model.weight_group_size));
    }
    if (n_in % kInt4Tile != 0 || n_out % kInt4Tile != 0) {
      return absl::InvalidArgumentError(absl::StrCat("at tp=", tp, " ", file.name, " would be [", n_in, ", ", n_out,
                                                     "], which is not of whole tiles of ", kInt4Tile, " × ",
                                                     kInt4Tile));
    }
  }
  return absl::OkStatus();
}

std::string ConfigDigest(const ModelConfig& model) { return Digest(FormatTurbomindConfig(FromModel(model))); }

std::string FormatManifest(const WorkspaceManifest& manifest) {
  json files = json::object();
  for (const auto& [name, file] : manifest.files) {
    files[name] = {
        {"shape", file.shape}, {"dtype", kernels::DTypeName(file.dtype)}, {"bytes", file.bytes}, {"xxh3", file.xxh3}};
  }
  const nlohmann::ordered_json text = {
      {"format_version", kFormatVersion}, {"layout", kLayout}, {"model", manifest.fingerprint},
      {"config", manifest.config},        {"tp", manifest.tp}, {"dtype", kernels::DTypeName(manifest.dtype)},
      {"eos_ids", manifest.eos_ids},      {"files", files}};
  return text.dump(1) + "\n";
}

absl::StatusOr<WorkspaceManifest> ParseManifest(const std::string& text) {
  RW_ASSIGN_OR_RETURN(const json object, ParseJsonObject(text, "manifest.json"));
  Members members(object);
  const int64_t version = members.Int("format_version", {0, 1e6});
  const std::string layout = members.String("layout");
  const std::string dtype = members.String("dtype");
  WorkspaceManifest manifest{.fingerprint = members.String("model"),
                             .config = members.String("config"),
                             .tp = static_cast<int>(members.Int("tp", {1, 1024}))};
  RW_RETURN_IF_ERROR(members.status());
  if (version != kFormatVersion || layout != kLayout) {
    return absl::UnimplementedError(absl::StrCat("format_version=", version, ", layout=", layout.substr(0, 80),
                                                 " is not ", kFormatVersion, ", ", kLayout));
  }
  RW_RETURN_IF_ERROR(CheckDigest("model", manifest.fingerprint));
  const bool is_bf16 = dtype == kernels::DTypeName(DType::kBF16);
  if (!is_bf16 && dtype != kernels::DTypeName(DType::kF16)) {
    return absl::InvalidArgumentError(absl::StrCat("dtype=", dtype.substr(0, 80), " is neither f16 nor bf16"));
  }
  manifest.dtype = is_bf16 ? DType::kBF16 : DType::kF16;
  const json &eos_ids = members.Get("eos_ids"), &files = members.Get("files");
  const auto is_id = [](const json& id) { return id.is_number_unsigned() && id.get<uint64_t>() < (1 << 22); };
  if (!eos_ids.is_array() || eos_ids.size() > 64 || !std::ranges::all_of(eos_ids, is_id)) {
    return absl::InvalidArgumentError("eos_ids is not a list of at most 64 token ids");
  }
  manifest.eos_ids = eos_ids.get<std::vector<int32_t>>();
  if (!files.is_object()) return absl::InvalidArgumentError("files is not an object");
  for (const auto& [name, entry] : files.items()) {
    RW_ASSIGN_OR_RETURN(manifest.files[name], ParseFile(name, entry, manifest.dtype));
  }
  return manifest;
}

}  // namespace rankwise::weights
