#include "worker/weights/turbomind_config.h"

#include <functional>
#include <map>
#include <string_view>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "base/status_macros.h"
#include "worker/weights/json.h"

namespace rankwise::weights {
namespace {

constexpr Limits kAnyCount = {0, 1 << 24};
constexpr Limits kHeads = {1, 1024};
constexpr int64_t kHiddenMost = 65536;

using Values = std::map<std::string, std::string>;

std::string Shown(absl::string_view text) { return std::string(text.substr(0, 80)); }

// What Python's configparser writes: a section, then `key = value` lines; # and ; begin a comment line.
absl::StatusOr<Values> ParseSection(const std::string& text) {
  Values values;
  bool is_inside = false;
  int number = 0;
  for (absl::string_view line : absl::StrSplit(text, '\n')) {
    ++number;
    line = absl::StripAsciiWhitespace(line);
    if (line.empty() || line.front() == '#' || line.front() == ';') continue;
    const auto refuse = [&](const char* complaint) {
      return absl::InvalidArgumentError(absl::StrCat("line ", number, " \"", Shown(line), "\" ", complaint));
    };
    if (line.front() == '[') {
      if (line != "[llama]" || is_inside) return refuse("is not the one section [llama]");
      is_inside = true;
      continue;
    }
    const size_t equals = line.find('=');
    if (!is_inside) return refuse("stands before the section [llama]");
    if (equals == absl::string_view::npos) return refuse("is not key = value");
    const std::string key(absl::StripAsciiWhitespace(line.substr(0, equals)));
    const std::string value(absl::StripAsciiWhitespace(line.substr(equals + 1)));
    if (!values.emplace(key, value).second) return refuse("gives a key twice");
  }
  if (!is_inside) return absl::InvalidArgumentError("there is no section [llama]");
  return values;
}

bool ParseNumber(const std::string& text, int64_t& value) { return absl::SimpleAtoi(text, &value); }
bool ParseNumber(const std::string& text, double& value) { return absl::SimpleAtod(text, &value); }
bool ParseNumber(const std::string& text, bool& value) {
  value = text == "1" || text == "True";
  return value || text == "0" || text == "False";
}

// Takes keys out of the section; what is left at the end is of another version. The first error sticks.
class Section {
 public:
  explicit Section(Values values) : values_(std::move(values)) {}

  template <typename T>
  void Take(const char* key, T& value, const Limits& limits = {0, 1}) {
    const auto node = values_.extract(key);
    if (node.empty()) return;
    const std::string& text = node.mapped();
    if (!ParseNumber(text, value)) {
      status_.Update(absl::InvalidArgumentError(absl::StrCat(key, "=", Shown(text), " is not a number")));
    } else if (!(limits.least <= value && value <= limits.most)) {
      status_.Update(absl::InvalidArgumentError(
          absl::StrCat(key, "=", Shown(text), " is not in [", limits.least, ", ", limits.most, "]")));
    }
  }
  void Take(const char* key, std::string& value) {
    if (const auto node = values_.extract(key); !node.empty()) value = node.mapped();
  }
  void TakeRequired(const char* key, int64_t& value, const Limits& limits) {
    if (!values_.contains(key)) status_.Update(absl::InvalidArgumentError(absl::StrCat(key, " is missing")));
    Take(key, value, limits);
  }

  absl::Status Finish() const {
    RW_RETURN_IF_ERROR(status_);
    if (values_.empty()) return absl::OkStatus();
    return absl::UnimplementedError(absl::StrCat("key ", Shown(values_.begin()->first),
                                                 " is not of layout 0.2; the other keys may mean other things too"));
  }

 private:
  Values values_;
  absl::Status status_;
};

void TakeModel(Section& section, TurbomindConfig& config) {
  section.Take("model_name", config.model_name);
  section.Take("tensor_para_size", config.tensor_para_size, kHeads);
  section.TakeRequired("head_num", config.head_num, kHeads);
  section.Take("kv_head_num", config.kv_head_num, {0, kHeads.most});
  section.Take("size_per_head", config.size_per_head, kHeads);
  section.TakeRequired("num_layer", config.num_layer, {1, 1024});
  section.TakeRequired("inter_size", config.inter_size, {1, 1 << 20});
  section.TakeRequired("vocab_size", config.vocab_size, {1, 1 << 22});
  section.Take("norm_eps", config.norm_eps, {1e-30, 1});
  section.Take("attn_bias", config.attn_bias);
  section.Take("start_id", config.start_id, {-1, 1 << 22});
  section.Take("end_id", config.end_id, {-1, 1 << 22});
  section.Take("weight_type", config.weight_type);
  section.Take("group_size", config.group_size, kAnyCount);
  section.Take("rotary_embedding", config.rotary_embedding, {0, kHeads.most});
  section.Take("rope_theta", config.rope_theta, {1.001, 1e12});
  section.Take("rope_scaling_factor", config.rope_scaling_factor, {0, 65536});
  section.Take("use_dynamic_ntk", config.use_dynamic_ntk);
  section.Take("max_position_embeddings", config.max_position_embeddings, kAnyCount);
  section.Take("use_logn_attn", config.use_logn_attn);
  section.Take("quant_policy", config.quant_policy, kAnyCount);
}

void TakeEngine(Section& section, TurbomindConfig& config) {
  section.Take("session_len", config.session_len, kAnyCount);
  section.Take("max_batch_size", config.max_batch_size, kAnyCount);
  section.Take("max_context_token_num", config.max_context_token_num, kAnyCount);
  section.Take("step_length", config.step_length, kAnyCount);
  section.Take("cache_max_entry_count", config.cache_max_entry_count, kAnyCount);
  section.Take("cache_block_seq_len", config.cache_block_seq_len, kAnyCount);
  section.Take("cache_chunk_size", config.cache_chunk_size, {-1, kAnyCount.most});
  section.Take("use_context_fmha", config.use_context_fmha);
  section.Take("num_tokens_per_iter", config.num_tokens_per_iter, kAnyCount);
  section.Take("max_prefill_iters", config.max_prefill_iters, kAnyCount);
  section.Take("extra_tokens_per_iter", config.extra_tokens_per_iter, kAnyCount);
}

// 0 means absent, as in TurboMind's handleMissingParams.
void FillUp(TurbomindConfig& config) {
  const TurbomindConfig defaults;
  const auto fill = [](auto& value, auto fallback) {
    if (value == 0) value = fallback;
  };
  fill(config.kv_head_num, config.head_num);
  fill(config.rotary_embedding, config.size_per_head);
  fill(config.max_position_embeddings, defaults.max_position_embeddings);
  if (config.use_dynamic_ntk) fill(config.rope_scaling_factor, 1.0);
  fill(config.session_len, config.max_position_embeddings);
  fill(config.max_batch_size, defaults.max_batch_size);
  fill(config.max_context_token_num, config.session_len);
  if (config.max_context_token_num <= config.max_batch_size) config.max_context_token_num *= config.session_len;
  fill(config.step_length, defaults.step_length);
  fill(config.cache_max_entry_count, defaults.cache_max_entry_count);
  fill(config.cache_block_seq_len, defaults.cache_block_seq_len);
  fill(config.cache_chunk_size, config.cache_max_entry_count);
  fill(config.num_tokens_per_iter, config.max_context_token_num);
}

absl::Status CheckSizes(const TurbomindConfig& config) {
  if (config.head_num % config.kv_head_num != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("kv_head_num=", config.kv_head_num, " does not divide head_num=", config.head_num));
  }
  if (config.size_per_head % 2 != 0 || config.head_num * config.size_per_head > kHiddenMost) {
    return absl::InvalidArgumentError(absl::StrCat("head_num=", config.head_num,
                                                   " heads of size_per_head=", config.size_per_head,
                                                   " are odd or exceed a hidden size of ", kHiddenMost));
  }
  if (config.kv_head_num % config.tensor_para_size != 0 || config.inter_size % config.tensor_para_size != 0) {
    return absl::InvalidArgumentError(absl::StrCat("tensor_para_size=", config.tensor_para_size,
                                                   " does not divide kv_head_num=", config.kv_head_num,
                                                   " and inter_size=", config.inter_size));
  }
  if (config.start_id >= config.vocab_size || config.end_id >= config.vocab_size) {
    return absl::InvalidArgumentError(absl::StrCat("start_id=", config.start_id, " or end_id=", config.end_id,
                                                   " is not below vocab_size=", config.vocab_size));
  }
  if (config.rope_scaling_factor > 0 && config.rope_scaling_factor < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("rope_scaling_factor=", config.rope_scaling_factor, " is neither 0 nor at least 1"));
  }
  if (config.rope_scaling_factor > 0 && config.rotary_embedding <= 2) {
    return absl::InvalidArgumentError("dynamic RoPE needs more than two rotated dimensions");
  }
  return absl::OkStatus();
}

absl::Status CheckSupported(const TurbomindConfig& config) {
  if (config.weight_type != "fp16" && config.weight_type != "bf16" && config.weight_type != "int4") {
    return absl::UnimplementedError(
        absl::StrCat("weight_type=", Shown(config.weight_type), " is not supported: fp16, bf16 and int4 are"));
  }
  if (config.weight_type == "int4" && config.group_size < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("group_size=", config.group_size, ", but weight_type=int4 has its scales in groups"));
  }
  if (config.quant_policy != 0 && config.quant_policy != 4) {
    return absl::UnimplementedError(absl::StrCat("quant_policy=", config.quant_policy,
                                                 " is not of layout 0.2, which knows 0 and 4 (an int8 KV cache)"));
  }
  if (config.use_logn_attn) return absl::UnimplementedError("use_logn_attn=1 is not supported");
  if (config.rotary_embedding != config.size_per_head) {
    return absl::UnimplementedError(absl::StrCat("rotary_embedding=", config.rotary_embedding, " is not size_per_head=",
                                                 config.size_per_head, ": partly rotated heads are not supported"));
  }
  return absl::OkStatus();
}

// The fewest digits that bring back what matters of the value.
template <typename Meaning = std::identity>
std::string Shortest(double value, const Meaning& meaning = {}) {
  for (int digits = 6; digits < 17; ++digits) {
    const std::string text = absl::StrFormat("%.*g", digits, value);
    double back = 0;
    if (absl::SimpleAtod(text, &back) && meaning(back) == meaning(value)) return text;
  }
  return absl::StrFormat("%.17g", value);
}

}  // namespace

ModelConfig TurbomindConfig::ToModel() const {
  ModelConfig model;
  model.model_type = attn_bias ? "internlm" : "llama";
  model.hidden_size = head_num * size_per_head;
  model.n_layers = static_cast<int>(num_layer);
  model.n_heads = static_cast<int>(head_num);
  model.n_kv_heads = static_cast<int>(kv_head_num);
  model.head_dim = static_cast<int>(size_per_head);
  model.intermediate_size = inter_size;
  model.vocab_size = vocab_size;
  model.max_position = max_position_embeddings;
  model.rms_norm_eps = static_cast<float>(norm_eps);
  model.rope.theta = rope_theta;
  model.rope.rotary_dim = static_cast<int>(rotary_embedding);
  if (rope_scaling_factor > 0) {
    model.rope.scaling = RopeConfig::Scaling::kDynamicNtk;
    model.rope.factor = rope_scaling_factor;
    model.rope.original_max_position = max_position_embeddings;
  }
  model.sliding_window.assign(num_layer, 0);
  model.has_qkv_bias = model.has_o_bias = attn_bias;
  if (weight_type == "int4") {
    model.weight_bits = 4;
    model.weight_group_size = static_cast<int32_t>(group_size);
  }
  model.bos_id = static_cast<int32_t>(start_id);
  if (end_id >= 0) model.eos_ids = {static_cast<int32_t>(end_id)};
  return model;
}

TurbomindConfig FromModel(const ModelConfig& model) {
  const bool is_dynamic = model.rope.scaling == RopeConfig::Scaling::kDynamicNtk;
  return {.head_num = model.n_heads,
          .kv_head_num = model.n_kv_heads,
          .size_per_head = model.head_dim,
          .num_layer = model.n_layers,
          .inter_size = model.intermediate_size,
          .vocab_size = model.vocab_size,
          .norm_eps = model.rms_norm_eps,
          .attn_bias = model.has_qkv_bias || model.has_o_bias,
          .start_id = model.bos_id,
          .end_id = model.eos_ids.empty() ? -1 : model.eos_ids.front(),
          .weight_type = model.weight_bits == 0 ? "fp16" : absl::StrCat("int", model.weight_bits),
          .group_size = model.weight_group_size,
          .rotary_embedding = model.rope.rotary_dim,
          .rope_theta = model.rope.theta,
          .rope_scaling_factor = is_dynamic ? model.rope.factor : 0,
          .max_position_embeddings = model.max_position,
          .session_len = model.max_position + 8,
          .max_context_token_num = 1,
          .cache_max_entry_count = 0.5,
          .cache_chunk_size = -1};
}

absl::StatusOr<TurbomindConfig> ParseTurbomindConfig(const std::string& text) {
  RW_ASSIGN_OR_RETURN(Values values, ParseSection(text));
  Section section(std::move(values));
  TurbomindConfig config;
  TakeModel(section, config);
  TakeEngine(section, config);
  RW_RETURN_IF_ERROR(section.Finish());
  FillUp(config);
  RW_RETURN_IF_ERROR(CheckSizes(config));
  RW_RETURN_IF_ERROR(CheckSupported(config));
  return config;
}

std::string FormatTurbomindConfig(const TurbomindConfig& config) {
  std::string text = "[llama]\n";
  const auto put = [&text](const char* key, const auto& value) { absl::StrAppend(&text, key, " = ", value, "\n"); };
  put("model_name", config.model_name);
  put("tensor_para_size", config.tensor_para_size);
  put("head_num", config.head_num);
  put("kv_head_num", config.kv_head_num);
  put("vocab_size", config.vocab_size);
  put("num_layer", config.num_layer);
  put("inter_size", config.inter_size);
  put("norm_eps", Shortest(config.norm_eps, [](double x) { return static_cast<float>(x); }));
  put("attn_bias", int{config.attn_bias});
  put("start_id", config.start_id);
  put("end_id", config.end_id);
  put("session_len", config.session_len);
  put("weight_type", config.weight_type);
  put("rotary_embedding", config.rotary_embedding);
  put("rope_theta", Shortest(config.rope_theta));
  put("size_per_head", config.size_per_head);
  put("group_size", config.group_size);
  put("max_batch_size", config.max_batch_size);
  put("max_context_token_num", config.max_context_token_num);
  put("step_length", config.step_length);
  put("cache_max_entry_count", config.cache_max_entry_count);
  put("cache_block_seq_len", config.cache_block_seq_len);
  put("cache_chunk_size", config.cache_chunk_size);
  put("num_tokens_per_iter", config.num_tokens_per_iter);
  put("max_prefill_iters", config.max_prefill_iters);
  put("extra_tokens_per_iter", config.extra_tokens_per_iter);
  put("use_context_fmha", int{config.use_context_fmha});
  put("quant_policy", config.quant_policy);
  put("max_position_embeddings", config.max_position_embeddings);
  put("rope_scaling_factor", Shortest(config.rope_scaling_factor));
  put("use_logn_attn", int{config.use_logn_attn});
  return text;
}

}  // namespace rankwise::weights
