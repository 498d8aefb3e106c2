#include "worker/weights/activation_scaling.h"

#include <algorithm>
#include <cmath>
#include <span>

#include "base/check.h"
#include "kernels/number_formats.h"

namespace rankwise::weights {
namespace {

using kernels::MatrixView;

constexpr int64_t kSampledRows = 64;
constexpr int kExponents = 11;  // 0, 0.1, ... 1

using Tensors = std::map<std::string, const NamedTensor*>;

const MatrixView& ViewOf(const Tensors& tensors, const std::string& name) {
  const auto found = tensors.find(name);
  RW_CHECK(found != tensors.end(), name);
  return found->second->view;
}

// s of every channel for one exponent. Channels that never carried anything keep 1.
std::vector<float> ScalesFor(std::span<const float> mean_square, double exponent) {
  double least = INFINITY, largest = 0;
  for (const float m : mean_square) {
    if (m > 0) least = std::min(least, static_cast<double>(m));
    largest = std::max(largest, static_cast<double>(m));
  }
  std::vector<float> scales(mean_square.size(), 1.0f);
  if (largest == 0) return scales;
  const double middle = (std::log2(least) + std::log2(largest)) / 2;
  for (size_t i = 0; i < scales.size(); ++i) {
    if (mean_square[i] == 0) continue;
    const double log = exponent * (std::log2(static_cast<double>(mean_square[i])) - middle) / 2;
    scales[i] = std::ldexp(1.0f, static_cast<int>(std::clamp(std::nearbyint(log), -12.0, 12.0)));
  }
  return scales;
}

// Σ mean_square * (w - rounded w)² over the sampled outputs.
double RoundingCost(const MatrixView& w, std::span<const float> scales, std::span<const float> mean_square,
                    const QuantizeOptions& options) {
  const int64_t step = std::max<int64_t>(1, w.rows / kSampledRows);
  std::vector<float> values(options.group_size), weights(options.group_size);
  double cost = 0;
  for (int64_t row = 0; row < w.rows; row += step) {
    for (int64_t first = 0; first < w.cols; first += options.group_size) {
      for (int32_t i = 0; i < options.group_size; ++i) {
        const float s = scales[first + i];
        values[i] = kernels::ElementAt(w, row, first + i) * s;
        weights[i] = mean_square[first + i] / (s * s);
      }
      const QuantizedGroup group = QuantizeGroup(values, (1 << options.bits) - 1, weights);
      if (group.q.empty()) return INFINITY;
      const double scale = kernels::HalfToFloat(group.scale);
      for (int32_t i = 0; i < options.group_size; ++i) {
        const double error = (group.q[i] - group.zero) * scale - values[i];
        cost += weights[i] * error * error;
      }
    }
  }
  return cost;
}

std::vector<float> BestScales(const Tensors& tensors, const std::vector<std::string>& readers,
                              std::span<const float> mean_square, const QuantizeOptions& options) {
  std::vector<float> best(mean_square.size(), 1.0f);
  double least = INFINITY;
  for (int step = 0; step < kExponents; ++step) {
    const std::vector<float> scales = ScalesFor(mean_square, step / (kExponents - 1.0));
    double cost = 0;
    for (const std::string& name : readers) cost += RoundingCost(ViewOf(tensors, name), scales, mean_square, options);
    if (cost < least) {
      least = cost;
      best = scales;
    }
  }
  return best;
}

std::vector<float> Inverse(std::vector<float> scales) {
  for (float& s : scales) s = 1 / s;
  return scales;
}

// Query heads that share a KV head read the same V channels: the mean over them.
std::vector<float> MeanOverGroups(std::span<const float> of_heads, int64_t group, int64_t dim) {
  std::vector<float> mean(of_heads.size() / group);
  for (size_t i = 0; i < of_heads.size(); ++i) {
    mean[i / (group * dim) * dim + i % dim] += of_heads[i] / static_cast<float>(group);
  }
  return mean;
}

std::vector<float> RepeatForGroups(std::span<const float> of_kv_heads, int64_t group, int64_t dim) {
  std::vector<float> repeated(of_kv_heads.size() * group);
  for (size_t i = 0; i < repeated.size(); ++i) repeated[i] = of_kv_heads[i / (group * dim) * dim + i % dim];
  return repeated;
}

}  // namespace

Scalings ScaleByActivations(const TensorListing& listing, const InputStatistics& statistics,
                            const QuantizeOptions& options, const QuantizeProgress& progress) {
  Tensors tensors;
  for (const NamedTensor& tensor : listing.tensors) tensors[tensor.name] = &tensor;
  const ModelConfig& config = listing.checkpoint->config();
  const int64_t group = config.n_heads / config.n_kv_heads, dim = config.head_dim;
  Scalings scalings;
  const auto widen = [&](const std::vector<std::string>& readers, const std::vector<float>& scales,
                         std::span<const float> mean_square) {
    for (const std::string& name : readers) {
      scalings[name].cols = scales;
      scalings[name].mean_square.assign(mean_square.begin(), mean_square.end());
    }
  };
  const auto narrow = [&](const std::string& layer, const std::vector<float>& scales) {
    for (const char* kind : {"weight", "bias"}) {
      if (tensors.contains(layer + kind)) scalings[layer + kind].rows = Inverse(scales);
    }
  };
  for (size_t i = 0; i < listing.layers.size(); ++i) {
    const LayerNames& names = listing.layers[i];
    const InputMeanSquares& inputs = statistics.layers[i];
    for (const auto& [norm, readers, mean_square] : {std::tuple(&names.attention_norm, &names.qkv, &inputs.qkv),
                                                     {&names.mlp_norm, &names.gate_up, &inputs.gate_up}}) {
      const std::vector<float> scales = BestScales(tensors, *readers, *mean_square, options);
      widen(*readers, scales, *mean_square);
      narrow(*norm, scales);
    }
    const std::vector<float> down = BestScales(tensors, {names.down}, inputs.down, options);
    widen({names.down}, down, inputs.down);
    narrow(names.up, down);
    if (names.v.empty()) {
      scalings[names.o].mean_square = inputs.o;
    } else {
      const std::vector<float> shared = RepeatForGroups(MeanOverGroups(inputs.o, group, dim), group, dim);
      const std::vector<float> o = BestScales(tensors, {names.o}, shared, options);
      widen({names.o}, o, inputs.o);
      std::vector<float> of_v(static_cast<size_t>(config.n_kv_heads) * dim);
      for (size_t c = 0; c < of_v.size(); ++c) of_v[c] = o[c / dim * group * dim + c % dim];
      narrow(names.v, of_v);
    }
    if (progress) progress("choose scales", static_cast<int64_t>(i) + 1, static_cast<int64_t>(listing.layers.size()));
  }
  return scalings;
}

}  // namespace rankwise::weights
