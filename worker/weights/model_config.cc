#include "worker/weights/model_config.h"

#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "base/mapped_file.h"
#include "base/status_macros.h"

namespace rankwise::weights {
namespace {

using nlohmann::json;

constexpr size_t kMaxConfigBytes = 1 << 20;

// Typed reads of one JSON object. The first bad value is kept; later reads return their fallback.
class Reader {
 public:
  explicit Reader(const json& object) : object_(object) {}

  bool Has(const char* key) const { return object_.contains(key) && !object_[key].is_null(); }

  int64_t Int(const char* key, int64_t fallback, int64_t least, int64_t most) {
    if (!Has(key)) {
      if (fallback < least) Fail(absl::StrCat(key, " is missing"));
      return fallback;
    }
    const json& value = object_[key];
    const bool is_small = value.is_number_integer() &&
                          (!value.is_number_unsigned() || value.get<uint64_t>() <= static_cast<uint64_t>(INT64_MAX));
    if (!is_small || value.get<int64_t>() < least || value.get<int64_t>() > most) {
      Fail(absl::StrCat(key, "=", value.dump(), " is not an integer in [", least, ", ", most, "]"));
      return least;
    }
    return value.get<int64_t>();
  }

  double Number(const char* key, double fallback, double least, double most) {
    if (!Has(key)) return fallback;
    const json& value = object_[key];
    if (!value.is_number() || !(value.get<double>() >= least && value.get<double>() <= most)) {
      Fail(absl::StrCat(key, "=", value.dump(), " is not a number in [", least, ", ", most, "]"));
      return fallback;
    }
    return value.get<double>();
  }

  bool Bool(const char* key, bool fallback) {
    if (!Has(key)) return fallback;
    if (!object_[key].is_boolean()) Fail(absl::StrCat(key, "=", object_[key].dump(), " is not true or false"));
    return object_[key].is_boolean() ? object_[key].get<bool>() : fallback;
  }

  std::string Text(const char* key, const std::string& fallback) {
    if (!Has(key)) return fallback;
    if (!object_[key].is_string()) Fail(absl::StrCat(key, "=", object_[key].dump(), " is not a string"));
    return object_[key].is_string() ? object_[key].get<std::string>() : fallback;
  }

  void Fail(const std::string& message) { status_.Update(absl::InvalidArgumentError(message)); }
  const absl::Status& status() const { return status_; }
  const json& object() const { return object_; }

 private:
  const json& object_;
  absl::Status status_;
};

// How the families differ beyond what their configuration files say.
struct Family {
  const char* model_type;
  const char* qkv_bias_key;  // null: never
  bool qkv_bias_default;
  const char* o_bias_key;  // null: never
  bool has_qk_norm;
  bool has_fused_qkv;
  bool reads_sliding_window;
};

constexpr Family kFamilies[] = {
    {"llama", "attention_bias", false, "attention_bias", false, false, false},
    {"internlm", "bias", true, "bias", false, false, false},
    {"internlm2", "bias", false, "bias", false, true, false},
    {"mistral", nullptr, false, nullptr, false, false, true},
    {"qwen2", "", true, nullptr, false, false, true},
    {"qwen3", "attention_bias", false, "attention_bias", true, false, true},
};

absl::Status ReadRope(Reader& root, const ModelConfig& config, RopeConfig& rope) {
  const json* source = &root.object();
  const json empty = json::object();
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    if (root.Has(key)) {
      if (!root.object()[key].is_object()) return absl::InvalidArgumentError(absl::StrCat(key, " is not an object"));
      source = &root.object()[key];
    }
  }
  Reader scaling(source == &root.object() ? empty : *source);
  rope.theta = scaling.Number("rope_theta", root.Number("rope_theta", 10000, 1, 1e12), 1, 1e12);
  const double partial = root.Number("partial_rotary_factor", 1, 0, 1);
  rope.rotary_dim = static_cast<int>(config.head_dim * partial) / 2 * 2;
  if (rope.rotary_dim < 2) return absl::InvalidArgumentError(absl::StrCat("partial_rotary_factor=", partial));
  const std::string type = scaling.Text("rope_type", scaling.Text("type", "default"));
  rope.original_max_position =
      scaling.Int("original_max_position_embeddings",
                  root.Int("original_max_position_embeddings", config.max_position, 1, 1 << 28), 1, 1 << 28);
  rope.factor = scaling.Number("factor", 1, 1e-3, 1e6);
  if (type == "default") {
    rope.scaling = RopeConfig::Scaling::kNone;
  } else if (type == "linear") {
    rope.scaling = RopeConfig::Scaling::kLinear;
  } else if (type == "dynamic") {
    rope.scaling = RopeConfig::Scaling::kDynamicNtk;
  } else if (type == "llama3") {
    rope.scaling = RopeConfig::Scaling::kLlama3;
    rope.low_freq_factor = scaling.Number("low_freq_factor", 1, 1e-3, 1e6);
    rope.high_freq_factor = scaling.Number("high_freq_factor", 4, 1e-3, 1e6);
    if (rope.high_freq_factor <= rope.low_freq_factor) scaling.Fail("high_freq_factor must exceed low_freq_factor");
  } else if (type == "yarn") {
    rope.scaling = RopeConfig::Scaling::kYarn;
    rope.beta_fast = scaling.Number("beta_fast", 32, 1e-3, 1e6);
    rope.beta_slow = scaling.Number("beta_slow", 1, 1e-3, 1e6);
    rope.mscale = scaling.Number("mscale", 0, 0, 1e3);
    rope.mscale_all_dim = scaling.Number("mscale_all_dim", 0, 0, 1e3);
    rope.attention_factor = scaling.Number("attention_factor", 0, 0, 1e3);
  } else {
    return absl::UnimplementedError(
        absl::StrCat("rope type ", type, " is not one of default, linear, dynamic, llama3, yarn"));
  }
  return scaling.status();
}

// transformers: Mistral slides in all layers, Qwen in those from max_window_layers on, and only when asked to.
std::vector<int32_t> ReadSlidingWindow(Reader& root, const ModelConfig& config, const Family& family) {
  std::vector<int32_t> windows(config.n_layers, 0);
  if (!family.reads_sliding_window || !root.Has("sliding_window")) return windows;
  const auto window = static_cast<int32_t>(root.Int("sliding_window", 0, 1, INT32_MAX));
  int64_t first = 0;
  if (config.model_type != "mistral") {
    if (!root.Bool("use_sliding_window", false)) return windows;
    first = root.Int("max_window_layers", config.n_layers, 0, 1 << 20);
  }
  for (int64_t layer = first; layer < config.n_layers; ++layer) windows[layer] = window;
  return windows;
}

absl::Status ReadEos(const json& object, const ModelConfig& config, std::vector<int32_t>& ids) {
  if (!object.contains("eos_token_id") || object["eos_token_id"].is_null()) return absl::OkStatus();
  const json& value = object["eos_token_id"];
  const json list = value.is_array() ? value : json::array({value});
  std::vector<int32_t> read;
  for (const json& id : list) {
    if (!id.is_number_integer() || id.get<int64_t>() < 0 || id.get<int64_t>() >= config.vocab_size) {
      return absl::InvalidArgumentError(
          absl::StrCat("eos_token_id=", value.dump(), " is outside the vocabulary of ", config.vocab_size));
    }
    read.push_back(id.get<int32_t>());
  }
  ids = read;
  return absl::OkStatus();
}

absl::StatusOr<json> ParseObject(const std::string& text, const std::string& name) {
  int depth = 0;
  for (const char c : text) {
    depth += (c == '[' || c == '{') - (c == ']' || c == '}');
    if (depth > 64) return absl::InvalidArgumentError(absl::StrCat(name, " is nested too deeply"));
  }
  json object = json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!object.is_object()) return absl::InvalidArgumentError(absl::StrCat(name, " is not a JSON object"));
  return object;
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
  RW_ASSIGN_OR_RETURN(const json object, ParseObject(config_json, "config.json"));
  Reader root(object);
  ModelConfig config;
  config.model_type = root.Text("model_type", "");
  const Family* family = nullptr;
  for (const Family& known : kFamilies) {
    if (config.model_type == known.model_type) family = &known;
  }
  if (family == nullptr) {
    return absl::UnimplementedError(absl::StrCat("model_type=", config.model_type,
                                                 " is not one of llama, internlm, internlm2, mistral, qwen2, qwen3"));
  }
  config.hidden_size = root.Int("hidden_size", -1, 1, 65536);
  config.n_layers = static_cast<int>(root.Int("num_hidden_layers", -1, 1, 1024));
  config.n_heads = static_cast<int>(root.Int("num_attention_heads", -1, 1, 1024));
  config.n_kv_heads = static_cast<int>(root.Int("num_key_value_heads", config.n_heads, 1, 1024));
  config.intermediate_size = root.Int("intermediate_size", -1, 1, 1 << 20);
  config.vocab_size = root.Int("vocab_size", -1, 1, 1 << 22);
  config.max_position = root.Int("max_position_embeddings", 2048, 1, 1 << 24);
  RW_RETURN_IF_ERROR(root.status());
  config.head_dim = static_cast<int>(root.Int("head_dim", config.hidden_size / config.n_heads, 1, 1024));
  if (config.n_heads % config.n_kv_heads != 0) {
    root.Fail(absl::StrCat("num_key_value_heads=", config.n_kv_heads,
                           " does not divide num_attention_heads=", config.n_heads));
  }
  if (config.head_dim % 2 != 0) root.Fail(absl::StrCat("head_dim=", config.head_dim, " is odd"));
  config.rms_norm_eps = static_cast<float>(root.Number("rms_norm_eps", 1e-6, 0, 1));
  const std::string activation = root.Text("hidden_act", root.Text("hidden_activation", "silu"));
  if (activation != "silu") return absl::UnimplementedError(absl::StrCat("hidden_act=", activation, " is not silu"));
  RW_RETURN_IF_ERROR(root.status());
  RW_RETURN_IF_ERROR(ReadRope(root, config, config.rope));
  config.sliding_window = ReadSlidingWindow(root, config, *family);
  if (family->qkv_bias_key != nullptr) {
    config.has_qkv_bias = *family->qkv_bias_key == '\0' || root.Bool(family->qkv_bias_key, family->qkv_bias_default);
  }
  config.has_o_bias = family->o_bias_key != nullptr && root.Bool(family->o_bias_key, family->qkv_bias_default);
  config.has_mlp_bias = config.model_type == "llama" && root.Bool("mlp_bias", false);
  config.has_qk_norm = family->has_qk_norm;
  config.has_fused_qkv = family->has_fused_qkv;
  config.is_tied = root.Bool("tie_word_embeddings", false);
  if (root.Has("bos_token_id")) {
    config.bos_id = static_cast<int32_t>(root.Int("bos_token_id", 0, 0, config.vocab_size - 1));
  }
  RW_RETURN_IF_ERROR(root.status());
  RW_RETURN_IF_ERROR(ReadEos(object, config, config.eos_ids));
  return config;
}

absl::StatusOr<ModelConfig> ReadModelConfig(const std::string& model_dir) {
  const std::string path = model_dir + "/config.json";
  RW_ASSIGN_OR_RETURN(const std::string text, ReadTextFile(path, kMaxConfigBytes));
  absl::StatusOr<ModelConfig> config = ParseModelConfig(text);
  if (!config.ok()) {
    return absl::Status(config.status().code(), absl::StrCat(path, ": ", std::string(config.status().message())));
  }
  const std::string generation_path = model_dir + "/generation_config.json";
  if (std::filesystem::exists(generation_path)) {
    RW_ASSIGN_OR_RETURN(const std::string generation, ReadTextFile(generation_path, kMaxConfigBytes));
    RW_ASSIGN_OR_RETURN(const json object, ParseObject(generation, generation_path));
    RW_RETURN_IF_ERROR(ReadEos(object, *config, config->eos_ids));
  }
  return config;
}

}  // namespace rankwise::weights
