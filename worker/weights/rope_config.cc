#include "worker/weights/rope_config.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "worker/weights/json.h"

namespace rankwise::weights {
namespace {

using nlohmann::json;
using Scaling = RopeConfig::Scaling;

constexpr Limits kThetaLimits = {1.001, 1e12};
constexpr Limits kFactorLimits = {1, 65536};
constexpr Limits kPositionLimits = {1, 1 << 24};
constexpr Limits kSmallLimits = {0, 1e6};

absl::Status ReadLlama3(Members& scaling, RopeConfig& rope) {
  rope.low_freq_factor = scaling.Real("low_freq_factor", {1e-3, 1e6});
  rope.high_freq_factor = scaling.Real("high_freq_factor", {1e-3, 1e6});
  RW_RETURN_IF_ERROR(scaling.status());
  if (rope.low_freq_factor < rope.high_freq_factor) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("low_freq_factor=", rope.low_freq_factor,
                                                 " is not less than high_freq_factor=", rope.high_freq_factor));
}

absl::Status ReadYarn(Members& scaling, RopeConfig& rope) {
  const auto read_or = [&](const char* key, double fallback) {
    const double value = scaling.Real(key, kSmallLimits, 0);
    return value == 0 ? fallback : value;
  };
  rope.beta_fast = read_or("beta_fast", 32);
  rope.beta_slow = read_or("beta_slow", 1);
  rope.mscale = read_or("mscale", 0);
  rope.mscale_all_dim = read_or("mscale_all_dim", 0);
  rope.attention_factor = scaling.Real("attention_factor", {1e-3, 1e3}, 0);
  const bool is_truncated = scaling.Bool("truncate", true);
  RW_RETURN_IF_ERROR(scaling.status());
  if (!is_truncated) return absl::UnimplementedError("rope_scaling.truncate=false is not supported");
  return absl::OkStatus();
}

absl::Status ReadScaling(const std::string& type, Members& whole, Members& scaling, ModelConfig& config) {
  RopeConfig& rope = config.rope;
  const int64_t trained_length = scaling.Int("original_max_position_embeddings", kPositionLimits, config.max_position);
  if (type == "linear") {
    rope.scaling = Scaling::kLinear;
  } else if (type == "dynamic") {
    // transformers takes the configured length, not an original one.
    rope.scaling = Scaling::kDynamicNtk;
    rope.original_max_position = config.max_position;
    if (rope.rotary_dim <= 2) return absl::InvalidArgumentError("dynamic RoPE needs more than two rotated dimensions");
  } else if (type == "llama3" || type == "yarn") {
    rope.scaling = type == "yarn" ? Scaling::kYarn : Scaling::kLlama3;
    rope.original_max_position = whole.Int("original_max_position_embeddings", kPositionLimits, trained_length);
  } else {
    return absl::UnimplementedError(absl::StrCat("rope_type=", type, " is not supported"));
  }
  std::optional<double> factor_default;
  if (type == "yarn" && scaling.HasKey("factor")) {
    factor_default = std::max(1.0, static_cast<double>(config.max_position) / rope.original_max_position);
  }
  rope.factor = scaling.Real("factor", kFactorLimits, factor_default);
  if (rope.scaling == Scaling::kLlama3) RW_RETURN_IF_ERROR(ReadLlama3(scaling, rope));
  if (rope.scaling == Scaling::kYarn) RW_RETURN_IF_ERROR(ReadYarn(scaling, rope));
  RW_RETURN_IF_ERROR(whole.status());
  return scaling.status();
}

// Linear and YaRN models state the length before scaling (YaRN's may also state the length after it). A llama3 config
// states the length after it. Dynamic NTK changes every angle once the table passes the trained length, so nothing is
// stretched unasked.
absl::Status StretchPositions(ModelConfig& config) {
  const RopeConfig& rope = config.rope;
  double length = static_cast<double>(config.max_position);
  if (rope.scaling == Scaling::kLinear) length *= rope.factor;
  if (rope.scaling == Scaling::kYarn) length = std::max(length, rope.original_max_position * rope.factor);
  if (length > kPositionLimits.most) {
    return absl::InvalidArgumentError(absl::StrCat("max_position_embeddings=", config.max_position,
                                                   " stretched by factor=", rope.factor, " exceeds ",
                                                   kPositionLimits.most));
  }
  config.max_position = static_cast<int64_t>(length);
  return absl::OkStatus();
}

// InternLM's own member: {"base": 10000, "type": "origin" or "dynamic", "scaling_factor": 1.0}.
absl::Status ReadInternlmRotary(const json& rotary, ModelConfig& config) {
  Members members(rotary, "rotary.");
  const std::string type = members.String("type", "origin");
  config.rope.theta = members.Real("base", kThetaLimits, config.rope.theta);
  config.rope.factor = members.Real("scaling_factor", kFactorLimits, 1);
  RW_RETURN_IF_ERROR(members.status());
  if (type == "origin") return absl::OkStatus();
  if (type != "dynamic") return absl::UnimplementedError(absl::StrCat("rotary.type=", type, " is not supported"));
  config.rope.scaling = Scaling::kDynamicNtk;
  config.rope.original_max_position = config.max_position;
  if (config.rope.rotary_dim <= 2)
    return absl::InvalidArgumentError("dynamic RoPE needs more than two rotated dimensions");
  return absl::OkStatus();
}

}  // namespace

absl::Status ReadRopeConfig(const json& config_json, ModelConfig& config) {
  Members whole(config_json);
  const std::string key = whole.Has("rope_scaling") ? "rope_scaling" : "rope_parameters";
  const json none = json::object();
  const json& object = whole.Has(key) ? whole.Get(key) : none;
  if (!object.is_object()) return absl::InvalidArgumentError(absl::StrCat(key, " is not an object"));
  Members scaling(object, key + ".");
  if (scaling.Has("full_attention") || scaling.Has("sliding_attention")) {
    return absl::UnimplementedError(absl::StrCat(key, " of its own for each layer type is not supported"));
  }
  const std::string type = scaling.String("rope_type", scaling.String("type", "default"));
  const double theta = whole.Real("rope_theta", kThetaLimits, 10000);
  config.rope.theta = scaling.Real("rope_theta", kThetaLimits, theta);
  const double part = whole.Real("partial_rotary_factor", {0, 1}, 1);
  config.rope.rotary_dim = static_cast<int>(config.head_dim * scaling.Real("partial_rotary_factor", {0, 1}, part));
  RW_RETURN_IF_ERROR(whole.status());
  RW_RETURN_IF_ERROR(scaling.status());
  if (config.rope.rotary_dim < 2 || config.rope.rotary_dim % 2 != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("rotary dimension ", config.rope.rotary_dim, " is not a positive even number"));
  }
  if (config.model_type == "internlm" && whole.Get("rotary").is_object()) {
    return ReadInternlmRotary(whole.Get("rotary"), config);
  }
  if (type == "default") return absl::OkStatus();
  RW_RETURN_IF_ERROR(ReadScaling(type, whole, scaling, config));
  return StretchPositions(config);
}

}  // namespace rankwise::weights
