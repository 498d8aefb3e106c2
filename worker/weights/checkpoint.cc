#include "worker/weights/checkpoint.h"

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/digest.h"
#include "base/mapped_file.h"
#include "base/status_macros.h"
#include "worker/weights/json.h"
#include "worker/weights/matrix_parts.h"
#include "worker/weights/safetensors.h"
#include "worker/weights/workspace_checkpoint.h"
#include "worker/weights/workspace_layout.h"

namespace rankwise::weights {
namespace {

using kernels::DType;
using kernels::MatrixView;
using nlohmann::json;
using shard::Range;
using shard::ShardPlan;

constexpr size_t kMaxIndexBytes = 64 << 20;

// A family's tensor names; "{}" is the layer.
struct Names {
  const char *embedding, *final_norm, *output;
  const char *attention_norm, *mlp_norm;
  const char *q, *k, *v, *qkv, *o;  // either q, k, v or the fused qkv
  const char *q_norm, *k_norm;
  const char *gate, *up, *down;
};

constexpr Names kLlamaNames = {
    .embedding = "model.embed_tokens",
    .final_norm = "model.norm",
    .output = "lm_head",
    .attention_norm = "model.layers.{}.input_layernorm",
    .mlp_norm = "model.layers.{}.post_attention_layernorm",
    .q = "model.layers.{}.self_attn.q_proj",
    .k = "model.layers.{}.self_attn.k_proj",
    .v = "model.layers.{}.self_attn.v_proj",
    .qkv = nullptr,
    .o = "model.layers.{}.self_attn.o_proj",
    .q_norm = "model.layers.{}.self_attn.q_norm",
    .k_norm = "model.layers.{}.self_attn.k_norm",
    .gate = "model.layers.{}.mlp.gate_proj",
    .up = "model.layers.{}.mlp.up_proj",
    .down = "model.layers.{}.mlp.down_proj",
};

constexpr Names kInternLm2Names = {
    .embedding = "model.tok_embeddings",
    .final_norm = "model.norm",
    .output = "output",
    .attention_norm = "model.layers.{}.attention_norm",
    .mlp_norm = "model.layers.{}.ffn_norm",
    .q = nullptr,
    .k = nullptr,
    .v = nullptr,
    .qkv = "model.layers.{}.attention.wqkv",
    .o = "model.layers.{}.attention.wo",
    .q_norm = nullptr,
    .k_norm = nullptr,
    .gate = "model.layers.{}.feed_forward.w1",
    .up = "model.layers.{}.feed_forward.w3",
    .down = "model.layers.{}.feed_forward.w2",
};

std::string Name(const char* pattern, int layer, const char* kind) {
  std::string name = pattern;
  if (const size_t at = name.find("{}"); at != std::string::npos) name.replace(at, 2, absl::StrCat(layer));
  return absl::StrCat(name, ".", kind);
}

absl::StatusOr<DType> FloatDType(const std::string& name, const StoredTensor& tensor) {
  if (tensor.dtype == "F32") return DType::kF32;
  if (tensor.dtype == "F16") return DType::kF16;
  if (tensor.dtype == "BF16") return DType::kBF16;
  return absl::UnimplementedError(absl::StrCat("tensor ", name, " is ", tensor.dtype, ", not F32, F16 or BF16"));
}

// All of the configuration that changes what the weights compute, which the token ids do not.
std::string Canonical(const ModelConfig& config) {
  const RopeConfig& rope = config.rope;
  std::string text =
      absl::StrCat(config.model_type, " ", config.n_heads, " ", config.n_kv_heads, " ", config.head_dim, " ",
                   config.max_position, " ", config.is_tied ? "tied" : "untied", " ", rope.rotary_dim, " ",
                   static_cast<int>(rope.scaling), " ", rope.original_max_position);
  for (const double value :
       {static_cast<double>(config.rms_norm_eps), rope.theta, rope.factor, rope.low_freq_factor, rope.high_freq_factor,
        rope.beta_fast, rope.beta_slow, rope.mscale, rope.mscale_all_dim, rope.attention_factor}) {
    absl::StrAppendFormat(&text, " %.17g", value);
  }
  for (const int32_t window : config.sliding_window) absl::StrAppend(&text, " ", window);
  return text;
}

class HuggingFaceCheckpoint : public Checkpoint {
 public:
  absl::Status Load(const std::string& model_dir) {
    RW_ASSIGN_OR_RETURN(config_, ReadModelConfig(model_dir));
    names_ = config_.has_fused_qkv ? &kInternLm2Names : &kLlamaNames;
    RW_RETURN_IF_ERROR(OpenFiles(model_dir));
    RW_RETURN_IF_ERROR(CheckTensors());
    fingerprint_ = Fingerprint(std::nullopt);
    return absl::OkStatus();
  }

  const ModelConfig& config() const override { return config_; }
  const std::string& fingerprint() const override { return fingerprint_; }
  std::string FingerprintAs(DType dtype) const override { return Fingerprint(dtype); }
  std::vector<NamedTensor> tensors() const {
    std::vector<NamedTensor> tensors;
    for (const auto& [name, view] : matrices_) {
      tensors.push_back({name, view, vectors_.contains(name), linear_.contains(name)});
    }
    return tensors;
  }
  LayerNames layer_names(int layer) const {
    const auto weight = [&](const char* pattern) { return Name(pattern, layer, "weight"); };
    LayerNames names{.attention_norm = Name(names_->attention_norm, layer, ""),
                     .mlp_norm = Name(names_->mlp_norm, layer, ""),
                     .gate_up = {weight(names_->gate), weight(names_->up)},
                     .o = weight(names_->o),
                     .down = weight(names_->down),
                     .up = Name(names_->up, layer, "")};
    if (config_.has_fused_qkv) {
      names.qkv = {weight(names_->qkv)};
    } else {
      names.qkv = {weight(names_->q), weight(names_->k), weight(names_->v)};
      names.v = Name(names_->v, layer, "");
    }
    return names;
  }
  absl::Status Verify(const ShardPlan&) const override { return absl::OkStatus(); }  // nothing to compare with

  LayerWeights Layer(int layer, const ShardPlan& plan) const override {
    const int64_t dim = config_.head_dim;
    LayerWeights weights;
    weights.attention_norm = Vector(names_->attention_norm, layer, "weight");
    weights.mlp_norm = Vector(names_->mlp_norm, layer, "weight");
    weights.qkv = Qkv(layer, plan, "weight");
    if (config_.has_qkv_bias) {
      for (const MatrixView& part : Qkv(layer, plan, "bias")) {
        // A bias seen as a matrix of one column, so that the same slicing serves both.
        MatrixView row = part;
        row.cols = part.rows;
        const std::vector<float> values = Floats(row);
        weights.qkv_bias.insert(weights.qkv_bias.end(), values.begin(), values.end());
      }
    }
    if (config_.has_qk_norm) {
      weights.q_norm = Vector(names_->q_norm, layer, "weight");
      weights.k_norm = Vector(names_->k_norm, layer, "weight");
    }
    weights.wo = ColumnsOf(Matrix(names_->o, layer, "weight"), {plan.heads.begin * dim, plan.heads.end * dim});
    if (config_.has_o_bias) weights.wo_bias = Vector(names_->o, layer, "bias");
    weights.gate_up = {RowsOf(Matrix(names_->gate, layer, "weight"), plan.intermediate),
                       RowsOf(Matrix(names_->up, layer, "weight"), plan.intermediate)};
    weights.w2 = ColumnsOf(Matrix(names_->down, layer, "weight"), plan.intermediate);
    if (config_.has_mlp_bias) {
      for (const char* half : {names_->gate, names_->up}) {
        const std::vector<float> whole = Vector(half, layer, "bias");
        weights.gate_up_bias.insert(weights.gate_up_bias.end(), whole.begin() + plan.intermediate.begin,
                                    whole.begin() + plan.intermediate.end);
      }
      weights.w2_bias = Vector(names_->down, layer, "bias");
    }
    return weights;
  }

  OuterWeights Outer(const ShardPlan& plan) const override {
    OuterWeights outer;
    outer.embedding = Matrix(names_->embedding, 0, "weight");
    outer.final_norm = Vector(names_->final_norm, 0, "weight");
    outer.output = RowsOf(config_.is_tied ? outer.embedding : Matrix(names_->output, 0, "weight"), plan.vocab);
    return outer;
  }

 private:
  // model.safetensors, which goes first in transformers too, or else every file of the folder's index; tensors by name.
  absl::Status OpenFiles(const std::string& model_dir) {
    const std::string index_path = model_dir + "/model.safetensors.index.json",
                      single = model_dir + "/model.safetensors";
    if (std::filesystem::exists(single) || !std::filesystem::exists(index_path)) {
      RW_ASSIGN_OR_RETURN(SafetensorsFile file, SafetensorsFile::Open(single));
      files_.push_back(std::move(file));
      for (const auto& [name, tensor] : files_.back().tensors()) tensors_.emplace(name, tensor);
      return absl::OkStatus();
    }
    RW_ASSIGN_OR_RETURN(const std::string text, ReadTextFile(index_path, kMaxIndexBytes));
    RW_ASSIGN_OR_RETURN(const json index, ParseJsonObject(text, index_path));
    if (!index.contains("weight_map") || !index["weight_map"].is_object()) {
      return absl::InvalidArgumentError(absl::StrCat(index_path, " has no weight_map"));
    }
    std::map<std::string, std::set<std::string>> names_in_file;
    for (const auto& [name, file] : index["weight_map"].items()) {
      if (!file.is_string()) return absl::InvalidArgumentError(absl::StrCat(index_path, ": ", name, " names no file"));
      const std::string file_name = file.get<std::string>();
      if (file_name.empty() || file_name.find('/') != std::string::npos || file_name.front() == '.') {
        return absl::InvalidArgumentError(absl::StrCat(index_path, ": ", file_name, " is not a plain file name"));
      }
      names_in_file[file_name].insert(name);
    }
    for (const auto& [file_name, names] : names_in_file) {
      RW_ASSIGN_OR_RETURN(SafetensorsFile file, SafetensorsFile::Open(absl::StrCat(model_dir, "/", file_name)));
      files_.push_back(std::move(file));
      for (const std::string& name : names) {
        const auto found = files_.back().tensors().find(name);
        if (found == files_.back().tensors().end()) {
          return absl::InvalidArgumentError(absl::StrCat(file_name, " has no tensor ", name, ", as the index says"));
        }
        tensors_.emplace(name, found->second);
      }
    }
    return CheckEachIsOnce();
  }

  absl::Status CheckEachIsOnce() const {
    std::map<std::string, const SafetensorsFile*> holder;
    for (const SafetensorsFile& file : files_) {
      for (const auto& [name, tensor] : file.tensors()) {
        const auto [found, is_new] = holder.emplace(name, &file);
        if (is_new) continue;
        return absl::InvalidArgumentError(
            absl::StrCat("tensor ", name, " is in ", found->second->path(), " and in ", file.path()));
      }
    }
    return absl::OkStatus();
  }

  absl::Status CheckTensors() {
    const int64_t hidden = config_.hidden_size, dim = config_.head_dim, inter = config_.intermediate_size;
    const int64_t q_rows = config_.n_heads * dim, kv_rows = config_.n_kv_heads * dim;
    RW_RETURN_IF_ERROR(Require(names_->embedding, 0, "weight", {config_.vocab_size, hidden}));
    RW_RETURN_IF_ERROR(Require(names_->final_norm, 0, "weight", {hidden}));
    if (!config_.is_tied) RW_RETURN_IF_ERROR(Require(names_->output, 0, "weight", {config_.vocab_size, hidden}));
    for (int layer = 0; layer < config_.n_layers; ++layer) {
      const auto linear = [&](const char* name, int64_t rows, int64_t cols, bool has_bias) -> absl::Status {
        RW_RETURN_IF_ERROR(config_.weight_bits > 0 ? RequireGrouped(Name(name, layer, ""), rows, cols)
                                                   : Require(name, layer, "weight", {rows, cols}));
        linear_.insert(Name(name, layer, "weight"));
        return has_bias ? Require(name, layer, "bias", {rows}) : absl::OkStatus();
      };
      RW_RETURN_IF_ERROR(Require(names_->attention_norm, layer, "weight", {hidden}));
      RW_RETURN_IF_ERROR(Require(names_->mlp_norm, layer, "weight", {hidden}));
      if (config_.has_fused_qkv) {
        RW_RETURN_IF_ERROR(linear(names_->qkv, q_rows + 2 * kv_rows, hidden, config_.has_qkv_bias));
      } else {
        RW_RETURN_IF_ERROR(linear(names_->q, q_rows, hidden, config_.has_qkv_bias));
        RW_RETURN_IF_ERROR(linear(names_->k, kv_rows, hidden, config_.has_qkv_bias));
        RW_RETURN_IF_ERROR(linear(names_->v, kv_rows, hidden, config_.has_qkv_bias));
      }
      RW_RETURN_IF_ERROR(linear(names_->o, hidden, q_rows, config_.has_o_bias));
      if (config_.has_qk_norm) {
        RW_RETURN_IF_ERROR(Require(names_->q_norm, layer, "weight", {dim}));
        RW_RETURN_IF_ERROR(Require(names_->k_norm, layer, "weight", {dim}));
      }
      RW_RETURN_IF_ERROR(linear(names_->gate, inter, hidden, config_.has_mlp_bias));
      RW_RETURN_IF_ERROR(linear(names_->up, inter, hidden, config_.has_mlp_bias));
      RW_RETURN_IF_ERROR(linear(names_->down, hidden, inter, config_.has_mlp_bias));
    }
    return absl::OkStatus();
  }

  absl::StatusOr<StoredTensor> Find(const std::string& name, const std::vector<int64_t>& shape) const {
    const auto found = tensors_.find(name);
    if (found == tensors_.end()) return absl::InvalidArgumentError(absl::StrCat("tensor ", name, " is missing"));
    if (found->second.shape != shape) {
      return absl::InvalidArgumentError(absl::StrCat("tensor ", name, " is ", json(found->second.shape).dump(),
                                                     ", the configuration asks for ", json(shape).dump()));
    }
    return found->second;
  }

  // `name` ends in a dot.
  absl::Status RequireGrouped(const std::string& name, int64_t n_out, int64_t n_in) {
    const int64_t per_word = 32 / config_.weight_bits, groups = n_in / config_.weight_group_size;
    if (n_out % per_word != 0 || n_in % config_.weight_group_size != 0) {
      return absl::InvalidArgumentError(absl::StrCat(name, "qweight: [", n_out, ", ", n_in,
                                                     "] is not of whole words of ", per_word, " outputs and groups of ",
                                                     config_.weight_group_size, " inputs"));
    }
    RW_ASSIGN_OR_RETURN(const StoredTensor qweight, Find(name + "qweight", {n_in, n_out / per_word}));
    RW_ASSIGN_OR_RETURN(const StoredTensor qzeros, Find(name + "qzeros", {groups, n_out / per_word}));
    RW_ASSIGN_OR_RETURN(const StoredTensor scales, Find(name + "scales", {groups, n_out}));
    for (const auto& [tensor, dtype] :
         {std::pair(&qweight, "I32"), std::pair(&qzeros, "I32"), std::pair(&scales, "F16")}) {
      if (tensor->dtype == dtype) continue;
      return absl::UnimplementedError(
          absl::StrCat(name, "{qweight, qzeros, scales}: one is ", tensor->dtype, ", not ", dtype));
    }
    RW_RETURN_IF_ERROR(CheckFinite(name + "scales", scales));
    const kernels::GroupedMatrix& matrix = grouped_[name] = {.qweight = qweight.data,
                                                             .qzeros = qzeros.data,
                                                             .scales = scales.data,
                                                             .n_out = n_out,
                                                             .n_in = n_in,
                                                             .bits = config_.weight_bits,
                                                             .group_size = config_.weight_group_size};
    matrices_[name + "weight"] = {.dtype = config_.weight_bits == 4 ? DType::kInt4 : DType::kInt8,
                                  .rows = n_out,
                                  .cols = n_in,
                                  .grouped = &matrix};
    return absl::OkStatus();
  }

  static absl::Status CheckFinite(const std::string& name, const StoredTensor& halves) {
    for (int64_t i = 0; i < halves.bytes; i += 2) {
      uint16_t bits;
      std::memcpy(&bits, halves.data + i, sizeof bits);
      if ((bits & 0x7c00) == 0x7c00) {
        return absl::InvalidArgumentError(absl::StrCat("tensor ", name, " holds a value that is not finite"));
      }
    }
    return absl::OkStatus();
  }

  absl::Status Require(const char* pattern, int layer, const char* kind, const std::vector<int64_t>& shape) {
    const std::string name = Name(pattern, layer, kind);
    RW_ASSIGN_OR_RETURN(const StoredTensor tensor, Find(name, shape));
    if (shape.size() == 1) vectors_.insert(name);
    RW_ASSIGN_OR_RETURN(const DType dtype, FloatDType(name, tensor));
    // A vector becomes a column: n rows of one element.
    matrices_[name] = {.data = tensor.data,
                       .dtype = dtype,
                       .rows = shape[0],
                       .cols = shape.size() == 2 ? shape[1] : 1,
                       .row_stride = shape.size() == 2 ? shape[1] : 1};
    return absl::OkStatus();
  }

  const MatrixView& Matrix(const char* pattern, int layer, const char* kind) const {
    const auto found = matrices_.find(Name(pattern, layer, kind));
    RW_CHECK(found != matrices_.end(), Name(pattern, layer, kind));
    return found->second;
  }

  std::vector<float> Vector(const char* pattern, int layer, const char* kind) const {
    MatrixView row = Matrix(pattern, layer, kind);
    row.cols = row.rows;
    return Floats(row);
  }

  // Row blocks: Q of the rank's heads, K, then V of its KV heads.
  std::vector<MatrixView> Qkv(int layer, const ShardPlan& plan, const char* kind) const {
    const int64_t dim = config_.head_dim;
    const auto heads = [dim](const MatrixView& view, Range range) {
      return RowsOf(view, {range.begin * dim, range.end * dim});
    };
    if (!config_.has_fused_qkv) {
      return {heads(Matrix(names_->q, layer, kind), plan.heads), heads(Matrix(names_->k, layer, kind), plan.kv_heads),
              heads(Matrix(names_->v, layer, kind), plan.kv_heads)};
    }
    // InternLM2: for each KV head its query heads, its key, its value.
    const MatrixView& fused = Matrix(names_->qkv, layer, kind);
    const int64_t per_kv = config_.n_heads / config_.n_kv_heads;
    const auto fused_head = [&](int64_t kv_head, int64_t index) { return kv_head * (per_kv + 2) + index; };
    std::vector<MatrixView> blocks;
    for (int64_t head = plan.heads.begin; head < plan.heads.end; ++head) {
      const int64_t row = fused_head(head / per_kv, head % per_kv);
      blocks.push_back(heads(fused, {row, row + 1}));
    }
    for (const int64_t index : {per_kv, per_kv + 1}) {
      for (int64_t kv_head = plan.kv_heads.begin; kv_head < plan.kv_heads.end; ++kv_head) {
        const int64_t row = fused_head(kv_head, index);
        blocks.push_back(heads(fused, {row, row + 1}));
      }
    }
    return blocks;
  }

  // Every tensor as it is, or rounded to a 16-bit dtype.
  std::string Fingerprint(std::optional<DType> rounded) const {
    DigestStream digest;
    digest.Add(Canonical(config_));
    for (const auto& [name, view] : matrices_) {
      if (view.grouped) {
        AddGrouped(digest, name, *view.grouped);
        continue;
      }
      const DType dtype = rounded.value_or(view.dtype);
      digest.Add(absl::StrCat("\n", name, " ", kernels::DTypeName(dtype), " ", view.rows, " ", view.cols, " "));
      const int64_t count = view.rows * view.cols;
      const int64_t sample =
          std::min(count, static_cast<int64_t>(DigestStream::kEndBytes) / kernels::DTypeBytes(dtype));
      digest.Add(Elements(view, 0, sample, dtype));
      digest.Add(Elements(view, count - sample, sample, dtype));
    }
    return digest.Finish();
  }

  static void AddGrouped(DigestStream& digest, const std::string& name, const kernels::GroupedMatrix& m) {
    digest.Add(absl::StrCat("\n", name, " int", m.bits, " ", m.n_out, " ", m.n_in, " ", m.group_size, " "));
    const int64_t groups = m.n_in / m.group_size;
    for (const auto& [data, bytes] :
         {std::pair(m.qweight, m.n_in * m.n_out * m.bits / 8), std::pair(m.qzeros, groups * m.n_out * m.bits / 8),
          std::pair(m.scales, groups * m.n_out * 2)}) {
      digest.AddEnds({data, static_cast<size_t>(bytes)});
    }
  }

  // Of a whole tensor, in file order.
  static std::string Elements(const MatrixView& tensor, int64_t first, int64_t count, DType dtype) {
    const std::byte* source = tensor.data + first * kernels::DTypeBytes(tensor.dtype);
    if (dtype == tensor.dtype)
      return {reinterpret_cast<const char*>(source), static_cast<size_t>(count * kernels::DTypeBytes(dtype))};
    const MatrixView row{.data = source, .dtype = tensor.dtype, .rows = 1, .cols = count, .row_stride = count};
    std::vector<uint16_t> words(count);
    for (int64_t i = 0; i < count; ++i) words[i] = WordAt(row, 0, i, dtype);
    return {reinterpret_cast<const char*>(words.data()), words.size() * sizeof(uint16_t)};
  }

  ModelConfig config_;
  const Names* names_ = nullptr;
  std::vector<SafetensorsFile> files_;
  std::map<std::string, StoredTensor> tensors_;
  std::map<std::string, MatrixView> matrices_;  // those the configuration asks for
  std::map<std::string, kernels::GroupedMatrix> grouped_;
  std::set<std::string> linear_, vectors_;  // names
  std::string fingerprint_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Checkpoint>> Checkpoint::Open(const std::string& model_dir) {
  if (IsWorkspace(model_dir)) return OpenWorkspace(model_dir);
  auto checkpoint = std::make_unique<HuggingFaceCheckpoint>();
  RW_RETURN_IF_ERROR(checkpoint->Load(model_dir));
  return checkpoint;
}

absl::StatusOr<TensorListing> ListTensors(const std::string& model_dir) {
  auto checkpoint = std::make_unique<HuggingFaceCheckpoint>();
  RW_RETURN_IF_ERROR(checkpoint->Load(model_dir));
  TensorListing listing{.tensors = checkpoint->tensors()};
  for (int i = 0; i < checkpoint->config().n_layers; ++i) listing.layers.push_back(checkpoint->layer_names(i));
  listing.checkpoint = std::move(checkpoint);
  return listing;
}

}  // namespace rankwise::weights
