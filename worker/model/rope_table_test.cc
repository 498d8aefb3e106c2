#include "worker/model/rope_table.h"

#include <gtest/gtest.h>

#include <cmath>

namespace rankwise::model {
namespace {

using weights::RopeConfig;

// Frequencies 0, 8, 16, 24 and 31 of 32, and the amplitude, as transformers' modeling_rope_utils gives them for
// head_dim 64.
struct Golden {
  const char* name;
  RopeConfig rope;
  int64_t positions;
  double amplitude;
  std::vector<double> frequencies;
};

class RopeTableTest : public ::testing::TestWithParam<Golden> {};

TEST_P(RopeTableTest, EqualsTransformers) {
  const Golden& golden = GetParam();
  const kernels::RopeTable table = MakeRopeTable(golden.rope, golden.positions);
  ASSERT_EQ(table.cos.size(), static_cast<size_t>(golden.positions * 32));
  const int at[] = {0, 8, 16, 24, 31};
  for (int i = 0; i < 5; ++i) {
    for (const int64_t position : {int64_t{0}, int64_t{1}, int64_t{1000}, golden.positions - 1}) {
      const double angle = static_cast<double>(position) * golden.frequencies[i];
      const size_t index = position * 32 + at[i];
      // The golden frequencies are f32 values printed to 12 digits after the point.
      const double tolerance = 1e-6 + static_cast<double>(position) * (6e-8 * golden.frequencies[i] + 5e-13);
      EXPECT_NEAR(table.cos[index], golden.amplitude * std::cos(angle), tolerance) << position << " " << at[i];
      EXPECT_NEAR(table.sin[index], golden.amplitude * std::sin(angle), tolerance) << position << " " << at[i];
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Types, RopeTableTest,
    ::testing::Values(Golden{"linear",
                             {.theta = 500000, .rotary_dim = 64, .scaling = RopeConfig::Scaling::kLinear, .factor = 4},
                             2048,
                             1,
                             {0.25, 0.009401507676, 0.000353553361, 1.3295739e-05, 7.53465e-07}},
                      Golden{"llama3",
                             {.theta = 500000,
                              .rotary_dim = 64,
                              .scaling = RopeConfig::Scaling::kLlama3,
                              .factor = 8,
                              .original_max_position = 8192,
                              .low_freq_factor = 1,
                              .high_freq_factor = 4},
                             2048,
                             1,
                             {1.0, 0.037606030703, 0.000524846022, 6.64787e-06, 3.76732e-07}},
                      Golden{"yarn",
                             {.theta = 1e6,
                              .rotary_dim = 64,
                              .scaling = RopeConfig::Scaling::kYarn,
                              .factor = 4,
                              .original_max_position = 32768},
                             2048,
                             1.138629436111989,
                             {1.0, 0.031622778624, 0.000583333371, 7.905694e-06, 3.84982e-07}},
                      Golden{"dynamic",
                             {.theta = 10000,
                              .rotary_dim = 64,
                              .scaling = RopeConfig::Scaling::kDynamicNtk,
                              .factor = 2,
                              .original_max_position = 2048},
                             8192,
                             1,
                             {1.0, 0.060521569103, 0.003662860254, 0.000221682058, 1.9050307e-05}}),
    [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace rankwise::model
