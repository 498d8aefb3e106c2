#include "worker/model/rope_table.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <vector>

namespace rankwise::model {
namespace {

using weights::RopeConfig;

constexpr double kTwoPi = 2 * std::numbers::pi;

std::vector<double> BaseFrequencies(double theta, int rotary_dim) {
  std::vector<double> frequencies(rotary_dim / 2);
  for (size_t i = 0; i < frequencies.size(); ++i) {
    frequencies[i] = std::pow(theta, -2.0 * static_cast<double>(i) / rotary_dim);
  }
  return frequencies;
}

// Long wavelengths are stretched by `factor`, short ones kept, those between interpolated (Llama 3.1).
void ScaleLlama3(const RopeConfig& rope, std::vector<double>& frequencies) {
  const auto original = static_cast<double>(rope.original_max_position);
  for (double& frequency : frequencies) {
    const double wavelength = kTwoPi / frequency;
    if (wavelength > original / rope.low_freq_factor) {
      frequency /= rope.factor;
    } else if (wavelength >= original / rope.high_freq_factor) {
      const double smooth =
          (original / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor);
      frequency = (1 - smooth) * frequency / rope.factor + smooth * frequency;
    }
  }
}

double YarnMscale(double factor, double mscale) { return factor <= 1 ? 1 : 0.1 * mscale * std::log(factor) + 1; }

// Peng et al. 2023 (YaRN), section 3.2; returns what cos and sin are multiplied with.
double ScaleYarn(const RopeConfig& rope, std::vector<double>& frequencies) {
  const auto original = static_cast<double>(rope.original_max_position);
  const auto dimension_of = [&](double rotations) {
    return rope.rotary_dim * std::log(original / (rotations * kTwoPi)) / (2 * std::log(rope.theta));
  };
  const double low = std::max(std::floor(dimension_of(rope.beta_fast)), 0.0);
  double high = std::min(std::ceil(dimension_of(rope.beta_slow)), rope.rotary_dim - 1.0);
  if (low == high) high += 0.001;
  for (size_t i = 0; i < frequencies.size(); ++i) {
    const double ramp = std::clamp((static_cast<double>(i) - low) / (high - low), 0.0, 1.0);
    frequencies[i] = frequencies[i] / rope.factor * ramp + frequencies[i] * (1 - ramp);
  }
  if (rope.attention_factor > 0) return rope.attention_factor;
  if (rope.mscale > 0 && rope.mscale_all_dim > 0) {
    return YarnMscale(rope.factor, rope.mscale) / YarnMscale(rope.factor, rope.mscale_all_dim);
  }
  return YarnMscale(rope.factor, 1);
}

}  // namespace

kernels::RopeTable MakeRopeTable(const RopeConfig& rope, int64_t position_count) {
  double theta = rope.theta;
  const auto original = static_cast<double>(rope.original_max_position);
  const auto positions = static_cast<double>(position_count);
  if (rope.scaling == RopeConfig::Scaling::kDynamicNtk && positions > original && rope.rotary_dim > 2) {
    theta *=
        std::pow(rope.factor * positions / original - (rope.factor - 1), rope.rotary_dim / (rope.rotary_dim - 2.0));
  }
  std::vector<double> frequencies = BaseFrequencies(theta, rope.rotary_dim);
  double amplitude = 1;
  if (rope.scaling == RopeConfig::Scaling::kLinear) {
    for (double& frequency : frequencies) frequency /= rope.factor;
  } else if (rope.scaling == RopeConfig::Scaling::kLlama3) {
    ScaleLlama3(rope, frequencies);
  } else if (rope.scaling == RopeConfig::Scaling::kYarn) {
    amplitude = ScaleYarn(rope, frequencies);
  }
  kernels::RopeTable table{.rotary_dim = rope.rotary_dim, .position_count = position_count};
  table.cos.reserve(position_count * frequencies.size());
  table.sin.reserve(position_count * frequencies.size());
  for (int64_t position = 0; position < position_count; ++position) {
    for (const double frequency : frequencies) {
      table.cos.push_back(static_cast<float>(amplitude * std::cos(static_cast<double>(position) * frequency)));
      table.sin.push_back(static_cast<float>(amplitude * std::sin(static_cast<double>(position) * frequency)));
    }
  }
  return table;
}

}  // namespace rankwise::model
