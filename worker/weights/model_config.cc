#include "worker/weights/model_config.h"

#include <algorithm>
#include <array>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/mapped_file.h"
#include "base/status_macros.h"
#include "worker/weights/json.h"
#include "worker/weights/rope_config.h"

namespace rankwise::weights {
namespace {

using nlohmann::json;

constexpr size_t kConfigBytesMost = size_t{1} << 20;

// Far above any model known, far below where a product of two could overflow.
constexpr double kHiddenMost = 65536;
constexpr double kLayersMost = 1024;
constexpr double kHeadsMost = 1024;
constexpr int kHeadDimMost = 1024;
constexpr double kIntermediateMost = 1 << 20;
constexpr double kVocabMost = 1 << 22;
constexpr double kPositionMost = 1 << 24;
constexpr size_t kEosIdsMost = 64;

// In what the model types differ, and what their configuration classes in transformers assume when config.json is
// silent.
struct Family {
  const char* model_type;
  const char* bias_key;  // says whether q, k, v and o have biases; null: q, k and v have them by has_qkv_bias
  bool bias_default;
  bool has_qkv_bias;
  bool has_mlp_bias_key;
  bool has_qk_norm;
  bool has_fused_qkv;
  int n_kv_heads;  // 0: as many as query heads
  int head_dim;    // 0: hidden_size / n_heads
  int max_position;
  int sliding_window;           // 0: full attention
  bool has_window_layers_rule;  // Qwen's use_sliding_window, max_window_layers and layer_types
};
constexpr std::array<Family, 6> kFamilies = {{
    {.model_type = "llama", .bias_key = "attention_bias", .has_mlp_bias_key = true, .max_position = 2048},
    {.model_type = "internlm", .bias_key = "bias", .bias_default = true, .max_position = 2048},
    {.model_type = "internlm2", .bias_key = "bias", .bias_default = true, .has_fused_qkv = true, .max_position = 2048},
    {.model_type = "mistral", .n_kv_heads = 8, .max_position = 131072, .sliding_window = 4096},
    {.model_type = "qwen2",
     .has_qkv_bias = true,
     .n_kv_heads = 32,
     .max_position = 32768,
     .sliding_window = 4096,
     .has_window_layers_rule = true},
    {.model_type = "qwen3",
     .bias_key = "attention_bias",
     .has_qk_norm = true,
     .n_kv_heads = 32,
     .head_dim = 128,
     .max_position = 32768,
     .sliding_window = 4096,
     .has_window_layers_rule = true},
}};

absl::StatusOr<const Family*> FindFamily(const std::string& model_type) {
  for (const Family& family : kFamilies) {
    if (model_type == family.model_type) return &family;
  }
  return absl::UnimplementedError(absl::StrCat("model_type=", model_type.substr(0, 80),
                                               " is not one of llama, internlm, internlm2, mistral, qwen2, qwen3"));
}

absl::Status CheckSupported(Members& members) {
  const std::string activation = members.String("hidden_act", members.String("hidden_activation", "silu"));
  RW_RETURN_IF_ERROR(members.status());
  if (activation != "silu") {
    return absl::UnimplementedError(absl::StrCat("hidden_act=", activation.substr(0, 80), " is not silu"));
  }
  return absl::OkStatus();
}

// AWQ as AutoAWQ and transformers write it, of its layouts the one of GEMM. Eight bits are an extension of ours.
absl::Status ReadQuantization(const Members& members, ModelConfig& config) {
  const json& object = members.Get("quantization_config");
  if (object.is_null()) return absl::OkStatus();
  if (!object.is_object()) return absl::InvalidArgumentError("quantization_config is not an object");
  Members awq(object, "quantization_config.");
  const std::string method = awq.String("quant_method", ""), version = awq.String("version", "gemm");
  config.weight_bits = static_cast<int>(awq.Int("bits", {1, 64}, awq.Has("w_bit") ? awq.Int("w_bit", {1, 64}) : 4));
  config.weight_group_size =
      static_cast<int32_t>(awq.Int("group_size", {1, kIntermediateMost},
                                   awq.Has("q_group_size") ? awq.Int("q_group_size", {1, kIntermediateMost}) : 128));
  const bool has_zero_points = awq.Bool("zero_point", true);
  RW_RETURN_IF_ERROR(awq.status());
  if (method != "awq" || !absl::EqualsIgnoreCase(version, "gemm") || !has_zero_points) {
    return absl::UnimplementedError(absl::StrCat("quantization_config: quant_method=", method.substr(0, 80),
                                                 " version=", version.substr(0, 80), " zero_point=", has_zero_points,
                                                 " is not awq of version gemm with zero points"));
  }
  if (config.weight_bits != 4 && config.weight_bits != 8) {
    return absl::UnimplementedError(
        absl::StrCat("quantization_config: bits=", config.weight_bits, " is neither 4 nor 8"));
  }
  const json& kept = awq.Get("modules_to_not_convert");
  if (!kept.is_null() && !(kept.is_array() && (kept.empty() || kept == json::array({"lm_head"})))) {
    return absl::UnimplementedError("quantization_config: modules_to_not_convert keeps more than lm_head in floats");
  }
  return absl::OkStatus();
}

absl::Status ReadSizes(Members& members, ModelConfig& config) {
  config.hidden_size = members.Int("hidden_size", {1, kHiddenMost});
  config.n_layers = static_cast<int>(members.Int("num_hidden_layers", {1, kLayersMost}));
  config.n_heads = static_cast<int>(members.Int("num_attention_heads", {1, kHeadsMost}));
  config.intermediate_size = members.Int("intermediate_size", {1, kIntermediateMost});
  config.vocab_size = members.Int("vocab_size", {1, kVocabMost});
  config.rms_norm_eps = static_cast<float>(members.Real("rms_norm_eps", {1e-30, 1}, 1e-6));
  config.is_tied = members.Bool("tie_word_embeddings", false);
  return members.status();
}

absl::Status ReadHeads(Members& members, const Family& family, ModelConfig& config) {
  // A null num_key_value_heads is n_heads in every class; their defaults are for an absent one.
  const bool is_silent = family.n_kv_heads != 0 && !members.HasKey("num_key_value_heads");
  config.n_kv_heads = static_cast<int>(
      members.Int("num_key_value_heads", {1, kHeadsMost}, is_silent ? family.n_kv_heads : config.n_heads));
  const int64_t head_dim = members.Int("head_dim", {1, kHeadDimMost}, family.head_dim);
  RW_RETURN_IF_ERROR(members.status());
  if (config.n_heads % config.n_kv_heads != 0) {
    return absl::InvalidArgumentError(absl::StrCat("num_key_value_heads=", config.n_kv_heads,
                                                   " does not divide num_attention_heads=", config.n_heads));
  }
  if (head_dim == 0 && config.hidden_size % config.n_heads != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("hidden_size=", config.hidden_size, " is not divisible by num_attention_heads=", config.n_heads));
  }
  config.head_dim = static_cast<int>(head_dim != 0 ? head_dim : config.hidden_size / config.n_heads);
  if (config.head_dim % 2 != 0)
    return absl::InvalidArgumentError(absl::StrCat("head_dim=", config.head_dim, " is odd"));
  if (config.head_dim > kHeadDimMost) {
    return absl::InvalidArgumentError(absl::StrCat("head_dim=", config.head_dim, " exceeds ", kHeadDimMost));
  }
  return absl::OkStatus();
}

absl::Status ReadBiases(Members& members, const Family& family, ModelConfig& config) {
  const bool has_all = family.bias_key != nullptr && members.Bool(family.bias_key, family.bias_default);
  config.has_qkv_bias = family.has_qkv_bias || has_all;
  config.has_o_bias = has_all;
  config.has_mlp_bias = family.has_mlp_bias_key && members.Bool("mlp_bias", false);
  config.has_qk_norm = family.has_qk_norm;
  config.has_fused_qkv = family.has_fused_qkv;
  return members.status();
}

// Qwen: layer_types decide, or else the layers from max_window_layers on slide.
absl::Status ReadWindowLayers(Members& members, int32_t window, ModelConfig& config) {
  const int64_t first_sliding = members.Int("max_window_layers", {0, kPositionMost}, 28);
  RW_RETURN_IF_ERROR(members.status());
  const json& types = members.Get("layer_types");
  if (types.is_null()) {
    for (int64_t layer = first_sliding; layer < config.n_layers; ++layer) config.sliding_window[layer] = window;
    return absl::OkStatus();
  }
  if (!types.is_array() || types.size() != config.sliding_window.size()) {
    return absl::InvalidArgumentError(absl::StrCat("layer_types does not list num_hidden_layers=", config.n_layers));
  }
  for (int layer = 0; layer < config.n_layers; ++layer) {
    if (types[layer] == "sliding_attention" && window == 0) {
      return absl::InvalidArgumentError("layer_types has sliding_attention, but no sliding_window is in use");
    }
    if (types[layer] == "sliding_attention") {
      config.sliding_window[layer] = window;
    } else if (types[layer] != "full_attention") {
      return absl::UnimplementedError("layer_types has neither full_attention nor sliding_attention");
    }
  }
  return absl::OkStatus();
}

absl::Status ReadWindows(Members& members, const Family& family, ModelConfig& config) {
  config.sliding_window.assign(config.n_layers, 0);
  if (family.sliding_window == 0) return absl::OkStatus();
  const int64_t fallback = members.HasKey("sliding_window") ? 0 : family.sliding_window;
  auto window = static_cast<int32_t>(members.Int("sliding_window", {1, kPositionMost}, fallback));
  if (family.has_window_layers_rule) {
    if (!members.Bool("use_sliding_window", false)) window = 0;
    RW_RETURN_IF_ERROR(members.status());
    return ReadWindowLayers(members, window, config);
  }
  config.sliding_window.assign(config.n_layers, window);
  return members.status();
}

// One id, a list of them, or null.
absl::StatusOr<std::vector<int32_t>> ReadEosIds(const json& object, int64_t vocab_size) {
  const json& member = Members(object).Get("eos_token_id");
  const json list = member.is_array() ? member : json::array({member});
  std::vector<int32_t> ids;
  if (member.is_null()) return ids;
  if (list.size() > kEosIdsMost) {
    return absl::InvalidArgumentError(absl::StrCat("eos_token_id lists ", list.size(), " ids"));
  }
  for (const json& id : list) {
    const json single = {{"eos_token_id", id}};
    Members members(single);
    ids.push_back(static_cast<int32_t>(members.Int("eos_token_id", {0, static_cast<double>(vocab_size - 1)})));
    RW_RETURN_IF_ERROR(members.status());
  }
  return ids;
}

}  // namespace

shard::Dims ModelConfig::dims() const {
  return {.n_heads = n_heads,
          .n_kv_heads = n_kv_heads,
          .head_dim = head_dim,
          .intermediate_size = intermediate_size,
          .vocab_size = vocab_size};
}

absl::StatusOr<ModelConfig> ParseModelConfig(const std::string& config_json) {
  RW_ASSIGN_OR_RETURN(const json object, ParseJsonObject(config_json, "config.json"));
  Members members(object);
  ModelConfig config;
  config.model_type = members.String("model_type");
  RW_RETURN_IF_ERROR(members.status());
  RW_ASSIGN_OR_RETURN(const Family* family, FindFamily(config.model_type));
  RW_RETURN_IF_ERROR(CheckSupported(members));
  RW_RETURN_IF_ERROR(ReadQuantization(members, config));
  RW_RETURN_IF_ERROR(ReadSizes(members, config));
  config.max_position = members.Int("max_position_embeddings", {1, kPositionMost}, family->max_position);
  RW_RETURN_IF_ERROR(ReadHeads(members, *family, config));
  RW_RETURN_IF_ERROR(ReadBiases(members, *family, config));
  RW_RETURN_IF_ERROR(ReadWindows(members, *family, config));
  RW_RETURN_IF_ERROR(ReadRopeConfig(object, config));
  config.bos_id =
      static_cast<int32_t>(members.Int("bos_token_id", {0, static_cast<double>(config.vocab_size - 1)}, -1));
  RW_RETURN_IF_ERROR(members.status());
  RW_ASSIGN_OR_RETURN(config.eos_ids, ReadEosIds(object, config.vocab_size));
  return config;
}

absl::StatusOr<ModelConfig> ReadModelConfig(const std::string& model_dir) {
  const std::string config_path = absl::StrCat(model_dir, "/config.json");
  RW_ASSIGN_OR_RETURN(const std::string text, ReadTextFile(config_path, kConfigBytesMost));
  absl::StatusOr<ModelConfig> parsed = ParseModelConfig(text);
  if (!parsed.ok()) {
    return absl::Status(parsed.status().code(),
                        absl::StrCat(config_path, ": ", std::string(parsed.status().message())));
  }
  ModelConfig config = *std::move(parsed);
  const std::string path = absl::StrCat(model_dir, "/generation_config.json");
  const absl::StatusOr<std::string> generation = ReadTextFile(path, kConfigBytesMost);
  if (absl::IsNotFound(generation.status())) return config;
  RW_RETURN_IF_ERROR(generation.status());
  RW_ASSIGN_OR_RETURN(const json object, ParseJsonObject(*generation, path));
  RW_ASSIGN_OR_RETURN(std::vector<int32_t> eos_ids, ReadEosIds(object, config.vocab_size));
  if (!eos_ids.empty()) config.eos_ids = std::move(eos_ids);
  return config;
}

}  // namespace rankwise::weights
