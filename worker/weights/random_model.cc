#include "worker/weights/random_model.h"

#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <numbers>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/mapped_file.h"
#include "base/status_macros.h"
#include "worker/weights/model_config.h"
#include "worker/weights/safetensors.h"

namespace rankwise::weights {
namespace {

using kernels::DType;

constexpr size_t kTableSize = 1 << 16;

uint64_t SplitMix(uint64_t& state) {
  uint64_t z = (state += 0x9E3779B97F4A7C15);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
  return z ^ (z >> 31);
}

struct Tensor {
  TensorHeader header;
  double mean = 0, deviation = 1;
};

std::string Encode(double value, DType dtype) {
  const auto real = static_cast<float>(value);
  uint32_t bits = 0;
  std::memcpy(&bits, &real, sizeof bits);
  std::string bytes(kernels::DTypeBytes(dtype), '\0');
  if (dtype == DType::kF32) std::memcpy(bytes.data(), &bits, 4);
  if (dtype == DType::kF16) {
    const auto half = static_cast<_Float16>(real);
    std::memcpy(bytes.data(), &half, 2);
  }
  if (dtype == DType::kBF16) {
    const auto word = static_cast<uint16_t>((bits + 0x8000) >> 16);
    std::memcpy(bytes.data(), &word, 2);
  }
  return bytes;
}

// kTableSize normals in the tensor's dtype, so that gigabytes are made by table look-up.
std::string NormalTable(const Tensor& tensor, DType dtype, uint64_t& state) {
  std::string table;
  for (size_t i = 0; i < kTableSize; ++i) {
    const double u = (static_cast<double>(SplitMix(state) >> 11) + 0.5) * 0x1p-53;
    const double v = static_cast<double>(SplitMix(state) >> 11) * 0x1p-53;
    const double normal = std::sqrt(-2 * std::log(u)) * std::cos(2 * std::numbers::pi * v);
    table += Encode(tensor.mean + tensor.deviation * normal, dtype);
  }
  return table;
}

class TensorList {
 public:
  TensorList(const RandomModelSpec& spec, const char* dtype) : dtype_(dtype) {
    const bool is_fused = spec.model_type == "internlm2";
    const int64_t hidden = spec.hidden_size, q = int64_t{spec.n_heads} * spec.head_dim,
                  kv = int64_t{spec.n_kv_heads} * spec.head_dim;
    const bool has_qkv_bias = spec.model_type == "qwen2" || (spec.has_bias && spec.model_type != "mistral");
    const bool has_o_bias = spec.has_bias && spec.model_type != "mistral" && spec.model_type != "qwen2";
    Matrix(is_fused ? "model.tok_embeddings" : "model.embed_tokens", spec.vocab_size, hidden, false, 1.0);
    for (int i = 0; i < spec.n_layers; ++i) {
      const std::string layer = absl::StrCat("model.layers.", i, ".");
      const std::string attention = layer + (is_fused ? "attention." : "self_attn.");
      const std::string mlp = layer + (is_fused ? "feed_forward." : "mlp.");
      Norm(layer + (is_fused ? "attention_norm" : "input_layernorm"), hidden);
      Norm(layer + (is_fused ? "ffn_norm" : "post_attention_layernorm"), hidden);
      if (is_fused) {
        Matrix(attention + "wqkv", q + 2 * kv, hidden, has_qkv_bias);
      } else {
        Matrix(attention + "q_proj", q, hidden, has_qkv_bias);
        Matrix(attention + "k_proj", kv, hidden, has_qkv_bias);
        Matrix(attention + "v_proj", kv, hidden, has_qkv_bias);
      }
      if (spec.model_type == "qwen3") {
        Norm(attention + "q_norm", spec.head_dim);
        Norm(attention + "k_norm", spec.head_dim);
      }
      Matrix(attention + (is_fused ? "wo" : "o_proj"), hidden, q, has_o_bias);
      const bool has_mlp_bias = spec.has_mlp_bias && spec.model_type == "llama";
      Matrix(mlp + (is_fused ? "w1" : "gate_proj"), spec.intermediate_size, hidden, has_mlp_bias);
      Matrix(mlp + (is_fused ? "w3" : "up_proj"), spec.intermediate_size, hidden, has_mlp_bias);
      Matrix(mlp + (is_fused ? "w2" : "down_proj"), hidden, spec.intermediate_size, has_mlp_bias);
    }
    Norm("model.norm", hidden);
    if (!spec.is_tied) Matrix(is_fused ? "output" : "lm_head", spec.vocab_size, hidden, false);
  }

  const std::vector<Tensor>& tensors() const { return tensors_; }

 private:
  void Matrix(const std::string& name, int64_t rows, int64_t cols, bool has_bias, double deviation = 0) {
    if (deviation == 0) deviation = 1 / std::sqrt(static_cast<double>(cols));
    tensors_.push_back({{name + ".weight", dtype_, {rows, cols}}, 0, deviation});
    if (has_bias) tensors_.push_back({{name + ".bias", dtype_, {rows}}, 0, 0.1});
  }
  void Norm(const std::string& name, int64_t width) {
    tensors_.push_back({{name + ".weight", dtype_, {width}}, 1, 0.05});
  }

  const std::string dtype_;
  std::vector<Tensor> tensors_;
};

std::string ConfigJson(const RandomModelSpec& spec) {
  const nlohmann::ordered_json config = {{"model_type", spec.model_type},
                                         {"hidden_act", "silu"},
                                         {"hidden_size", spec.hidden_size},
                                         {"num_hidden_layers", spec.n_layers},
                                         {"num_attention_heads", spec.n_heads},
                                         {"num_key_value_heads", spec.n_kv_heads},
                                         {"head_dim", spec.head_dim},
                                         {"intermediate_size", spec.intermediate_size},
                                         {"vocab_size", spec.vocab_size},
                                         {"max_position_embeddings", spec.max_position},
                                         {"rms_norm_eps", 1e-5},
                                         {"attention_bias", spec.has_bias},
                                         {"bias", spec.has_bias},
                                         {"mlp_bias", spec.has_mlp_bias},
                                         {"tie_word_embeddings", spec.is_tied},
                                         {"bos_token_id", 1},
                                         {"eos_token_id", 2}};
  std::string text = config.dump(2);
  if (!spec.extra_json.empty()) text.replace(text.rfind('}'), 1, absl::StrCat(",", spec.extra_json, "}"));
  return text + "\n";
}

}  // namespace

absl::StatusOr<RandomModelSpec> RandomModelShape(const std::string& name) {
  RandomModelSpec spec;
  if (name == "tiny") return spec;
  spec.head_dim = 64;
  spec.hidden_size = 2048;
  spec.n_layers = 22;
  spec.n_heads = 32;
  spec.n_kv_heads = 4;
  spec.intermediate_size = 5632;
  spec.vocab_size = 32000;
  spec.max_position = 2048;
  if (name == "tinyllama-1.1b") return spec;
  if (name != "llama-7b") {
    return absl::NotFoundError(absl::StrCat("no shape ", name, "; there are tiny, tinyllama-1.1b and llama-7b"));
  }
  spec.head_dim = 128;
  spec.hidden_size = 4096;
  spec.n_layers = 32;
  spec.n_kv_heads = 32;
  spec.intermediate_size = 11008;
  return spec;
}

absl::Status WriteRandomModel(const std::string& folder, const RandomModelSpec& spec,
                              const std::function<void(int64_t, int64_t)>& progress) {
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (error) return absl::InternalError(absl::StrCat("cannot create ", folder, ": ", error.message()));
  const std::string config = ConfigJson(spec);
  RW_RETURN_IF_ERROR(ParseModelConfig(config).status());
  for (const auto& entry : std::filesystem::directory_iterator(folder, error)) {
    const std::string name = entry.path().filename();
    if (name.starts_with("model") && name.find(".safetensors") != std::string::npos)
      std::filesystem::remove(entry, error);
  }
  RW_RETURN_IF_ERROR(WriteFileAtomically(folder + "/config.json", config));
  const char* dtype = spec.dtype == DType::kF32 ? "F32" : spec.dtype == DType::kF16 ? "F16" : "BF16";
  const TensorList list(spec, dtype);
  const int64_t element_bytes = kernels::DTypeBytes(spec.dtype);
  int64_t total = 0, done = 0;
  const auto count_of = [](const Tensor& tensor) {
    int64_t count = 1;
    for (const int64_t dim : tensor.header.shape) count *= dim;
    return count;
  };
  for (const Tensor& tensor : list.tensors()) total += count_of(tensor) * element_bytes;

  uint64_t state = spec.seed;
  nlohmann::ordered_json weight_map;
  const size_t per_file = (list.tensors().size() + spec.file_count - 1) / spec.file_count;
  for (int f = 0; f < spec.file_count; ++f) {
    const size_t begin = f * per_file, end = std::min(list.tensors().size(), begin + per_file);
    const std::string name = spec.file_count == 1
                                 ? "model.safetensors"
                                 : absl::StrFormat("model-%05d-of-%05d.safetensors", f + 1, spec.file_count);
    std::vector<TensorHeader> headers;
    for (size_t i = begin; i < end; ++i) {
      headers.push_back(list.tensors()[i].header);
      weight_map[headers.back().name] = name;
    }
    std::ofstream file(folder + "/" + name, std::ios::binary | std::ios::trunc);
    file << SafetensorsHeader(headers, {{"format", "pt"}});
    std::string buffer;
    for (size_t i = begin; i < end; ++i) {
      const std::string table = NormalTable(list.tensors()[i], spec.dtype, state);
      for (int64_t left = count_of(list.tensors()[i]); left > 0;) {
        const int64_t count = std::min<int64_t>(left, 1 << 20);
        buffer.resize(count * element_bytes);
        for (int64_t j = 0; j < count; ++j) {
          std::memcpy(buffer.data() + j * element_bytes, table.data() + (SplitMix(state) >> 48) * element_bytes,
                      element_bytes);
        }
        file.write(buffer.data(), static_cast<std::streamsize>(buffer.size()));
        left -= count;
        done += count * element_bytes;
        if (progress) progress(done, total);
      }
    }
    file.close();
    if (!file) return absl::InternalError(absl::StrCat("cannot write ", folder, "/", name));
  }
  if (spec.file_count == 1) return absl::OkStatus();
  const nlohmann::ordered_json index = {{"metadata", {{"total_size", total}}}, {"weight_map", weight_map}};
  return WriteFileAtomically(folder + "/model.safetensors.index.json", index.dump(2) + "\n");
}

}  // namespace rankwise::weights
