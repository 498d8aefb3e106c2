#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/weights/model_config.h"

namespace rankwise::weights {

// Mean squares, over calibration text, of what the linear layers of one decoder layer read: per input channel.
struct InputMeanSquares {
  std::vector<float> qkv, o, gate_up, down;  // [hidden], [heads * head_dim], [hidden], [intermediate]
};

// Of the whole model. Sums over the text are in double, in the order in which rows came: another cut of the work gives
// the same numbers but for their last bits.
struct InputStatistics {
  static constexpr char kFileName[] = "input_statistics.safetensors";

  std::string model_fingerprint;
  std::vector<InputMeanSquares> layers;
};

// Zeros, in the shapes of a model's layers.
InputStatistics EmptyInputStatistics(const ModelConfig& config, const std::string& model_fingerprint);

// One safetensors file: layers.{layer}.{qkv,o,gate_up,down}.mean_square, F32.
absl::Status WriteInputStatistics(const std::string& path, const InputStatistics& statistics);
// Not trusted: InvalidArgument where shapes are not those of `config`, or a value is negative or not finite.
absl::StatusOr<InputStatistics> ReadInputStatistics(const std::string& path, const ModelConfig& config);

}  // namespace rankwise::weights
