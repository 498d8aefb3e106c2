#include "worker/weights/input_statistics.h"

#include <bit>
#include <cmath>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "base/mapped_file.h"
#include "base/status_macros.h"
#include "worker/weights/safetensors.h"

namespace rankwise::weights {
namespace {

static_assert(std::endian::native == std::endian::little);

constexpr char kFormat[] = "rankwise-input-statistics-1";

std::string Name(int layer, const char* input) { return absl::StrCat("layers.", layer, ".", input, ".mean_square"); }

// Calls body(name, values) for each of the four.
template <typename Layer, typename Body>
absl::Status ForInputs(Layer& layer, Body&& body) {
  RW_RETURN_IF_ERROR(body("qkv", layer.qkv));
  RW_RETURN_IF_ERROR(body("o", layer.o));
  RW_RETURN_IF_ERROR(body("gate_up", layer.gate_up));
  return body("down", layer.down);
}

}  // namespace

InputStatistics EmptyInputStatistics(const ModelConfig& config, const std::string& model_fingerprint) {
  const std::vector<float> hidden(config.hidden_size);
  const InputMeanSquares layer{.qkv = hidden,
                               .o = std::vector<float>(static_cast<size_t>(config.n_heads) * config.head_dim),
                               .gate_up = hidden,
                               .down = std::vector<float>(config.intermediate_size)};
  return {.model_fingerprint = model_fingerprint, .layers = {static_cast<size_t>(config.n_layers), layer}};
}

absl::Status WriteInputStatistics(const std::string& path, const InputStatistics& statistics) {
  std::vector<TensorHeader> headers;
  std::string data;
  for (int i = 0; i < static_cast<int>(statistics.layers.size()); ++i) {
    RW_RETURN_IF_ERROR(ForInputs(statistics.layers[i], [&](const char* input, const std::vector<float>& values) {
      headers.push_back({Name(i, input), "F32", {static_cast<int64_t>(values.size())}});
      data.append(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float));
      return absl::OkStatus();
    }));
  }
  return WriteFileAtomically(
      path, SafetensorsHeader(headers, {{"format", kFormat}, {"model", statistics.model_fingerprint}}) + data);
}

absl::StatusOr<InputStatistics> ReadInputStatistics(const std::string& path, const ModelConfig& config) {
  RW_ASSIGN_OR_RETURN(const SafetensorsFile file, SafetensorsFile::Open(path));
  if (file.Metadata("format") != kFormat) {
    return absl::InvalidArgumentError(absl::StrCat(path, " is not an input statistics file"));
  }
  InputStatistics statistics = EmptyInputStatistics(config, file.Metadata("model"));
  for (int i = 0; i < config.n_layers; ++i) {
    const auto read = [&](const char* input, std::vector<float>& values) -> absl::Status {
      const std::string name = Name(i, input);
      const auto size = static_cast<int64_t>(values.size());
      const auto found = file.tensors().find(name);
      if (found == file.tensors().end() || found->second.dtype != "F32" ||
          found->second.shape != std::vector<int64_t>{size}) {
        return absl::InvalidArgumentError(absl::StrCat(path, ": ", name, " is not a F32 tensor [", size, "]"));
      }
      std::memcpy(values.data(), found->second.data, size * sizeof(float));
      for (const float value : values) {
        if (!(value >= 0) || !std::isfinite(value)) {
          return absl::InvalidArgumentError(absl::StrCat(path, ": ", name, " holds ", value));
        }
      }
      return absl::OkStatus();
    };
    RW_RETURN_IF_ERROR(ForInputs(statistics.layers[i], read));
  }
  return statistics;
}

}  // namespace rankwise::weights
