#pragma once

#include <nlohmann/json.hpp>

#include "absl/status/status.h"
#include "worker/weights/model_config.h"

namespace rankwise::weights {

// Fills config.rope from config.json's rope_theta and rope_scaling (or rope_parameters, its newer form), and stretches
// config.max_position where scaling does. Requires config.head_dim and config.max_position.
absl::Status ReadRopeConfig(const nlohmann::json& config_json, ModelConfig& config);

}  // namespace rankwise::weights
