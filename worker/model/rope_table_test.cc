#include "worker/model/rope_table.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

// The golden numbers are what transformers 5's _compute_*_parameters give for head_dim 16 with torch replaced by numpy
// in float64: cos(position * inv_freq[i]) * attention_factor, and sin likewise, printed with nine digits. To make them
// again, run those functions with a SimpleNamespace(arange=numpy.arange, where=numpy.where, clamp=numpy.clip) in place
// of torch.
namespace rankwise::model {
namespace {

using Scaling = weights::RopeConfig::Scaling;

struct Golden {
  int64_t position;
  int index;
  double cos, sin;
};

void ExpectGolden(const weights::RopeConfig& rope, int64_t position_count, const std::vector<Golden>& golden) {
  const kernels::RopeTable table = MakeRopeTable(rope, position_count);
  ASSERT_EQ(table.rotary_dim, rope.rotary_dim);
  ASSERT_EQ(table.position_count, position_count);
  const int half = rope.rotary_dim / 2;
  ASSERT_EQ(table.cos.size(), static_cast<size_t>(position_count * half));
  ASSERT_EQ(table.sin.size(), table.cos.size());
  for (const Golden& cell : golden) {
    // Half an ulp of f32, and the golden number's own rounding to nine digits.
    const auto tolerance = [](double value) { return std::abs(value) * 0x1p-24 + 6e-10; };
    const size_t at = cell.position * half + cell.index;
    EXPECT_NEAR(table.cos[at], cell.cos, tolerance(cell.cos))
        << "position " << cell.position << " index " << cell.index;
    EXPECT_NEAR(table.sin[at], cell.sin, tolerance(cell.sin))
        << "position " << cell.position << " index " << cell.index;
  }
}

TEST(RopeTable, WithoutScaling) {
  const weights::RopeConfig rope{.theta = 10000, .rotary_dim = 16};
  ExpectGolden(rope, 5000,
               {{1, 0, 0.540302306, 0.841470985},
                {1, 3, 0.999500042, 0.0316175064},
                {1, 7, 0.99999995, 0.000316227761},
                {5, 2, 0.877582562, 0.479425539},
                {17, 4, 0.985584767, 0.169182349},
                {100, 5, 0.95041528, 0.310983593},
                {1000, 6, 0.540302306, 0.841470985},
                {4000, 7, 0.301137463, 0.95358074}});
}

TEST(RopeTable, Linear) {
  const weights::RopeConfig rope{.theta = 10000, .rotary_dim = 16, .scaling = Scaling::kLinear, .factor = 4};
  ExpectGolden(rope, 5000,
               {{1, 0, 0.968912422, 0.247403959},
                {1, 3, 0.99996875, 0.0079056118},
                {1, 7, 0.999999997, 7.90569414e-05},
                {5, 2, 0.992197667, 0.124674733},
                {17, 4, 0.999097011, 0.0424872069},
                {100, 5, 0.996876627, 0.0789746163},
                {1000, 6, 0.968912422, 0.247403959},
                {4000, 7, 0.95041528, 0.310983593}});
}

TEST(RopeTable, DynamicNtk) {
  const weights::RopeConfig rope{
      .theta = 10000, .rotary_dim = 16, .scaling = Scaling::kDynamicNtk, .factor = 2, .original_max_position = 2048};
  ExpectGolden(rope, 4096,
               {{1, 0, 0.540302306, 0.841470985},
                {1, 3, 0.999805018, 0.0197465502},
                {1, 7, 0.999999994, 0.000105409255},
                {5, 2, 0.934016642, 0.357229495},
                {17, 4, 0.995885772, 0.0906174916},
                {100, 5, 0.98961002, 0.143777637},
                {1000, 6, 0.924917828, 0.380167084},
                {4000, 7, 0.912420205, 0.409254652}});
}

TEST(RopeTable, Llama3) {
  const weights::RopeConfig rope{.theta = 500000,
                                 .rotary_dim = 16,
                                 .scaling = Scaling::kLlama3,
                                 .factor = 8,
                                 .original_max_position = 8192,
                                 .low_freq_factor = 1,
                                 .high_freq_factor = 4};
  ExpectGolden(rope, 5000,
               {{1, 0, 0.540302306, 0.841470985},
                {1, 3, 0.999973409, 0.0072926001},
                {1, 7, 1, 1.28917317e-06},
                {5, 2, 0.982374352, 0.186924133},
                {17, 4, 0.999960196, 0.00892226635},
                {100, 5, 0.999994124, 0.00342809548},
                {1000, 6, 0.999977903, 0.00664782091},
                {4000, 7, 0.999986704, 0.00515666983}});
}

TEST(RopeTable, Yarn) {
  const weights::RopeConfig rope{
      .theta = 1e6, .rotary_dim = 16, .scaling = Scaling::kYarn, .factor = 4, .original_max_position = 32768};
  ExpectGolden(rope, 5000,
               {{1, 0, 0.61520411, 0.958123633},
                {1, 3, 1.13861931, 0.00480222366},
                {1, 7, 1.13862944, 1.60074597e-06},
                {5, 2, 1.1244262, 0.179283921},
                {17, 4, 1.1385883, 0.00967823366},
                {100, 5, 1.13861818, 0.00506198653},
                {1000, 6, 1.13859385, 0.00900156231},
                {4000, 7, 1.13861143, 0.00640295011}});
}

TEST(RopeTable, YarnWithMscale) {
  const weights::RopeConfig rope{.theta = 10000,
                                 .rotary_dim = 16,
                                 .scaling = Scaling::kYarn,
                                 .factor = 40,
                                 .original_max_position = 4096,
                                 .beta_fast = 16,
                                 .beta_slow = 2,
                                 .mscale = 0.707,
                                 .mscale_all_dim = 1};
  ExpectGolden(rope, 5000,
               {{1, 0, 0.497641308, 0.775030418},
                {1, 3, 0.920581873, 0.0291210626},
                {1, 7, 0.921042355, 7.28147916e-06},
                {5, 2, 0.80829071, 0.441571227},
                {17, 4, 0.914985065, 0.105457817},
                {100, 5, 0.915406727, 0.101732707},
                {1000, 6, 0.920754545, 0.0230236604},
                {4000, 7, 0.920581873, 0.0291210626}});
}

TEST(RopeTable, DynamicNtkIsPlainWithinTheTrainedLength) {
  const weights::RopeConfig plain{.rotary_dim = 16};
  weights::RopeConfig dynamic = plain;
  dynamic.scaling = Scaling::kDynamicNtk;
  dynamic.factor = 2;
  dynamic.original_max_position = 2048;
  EXPECT_EQ(MakeRopeTable(dynamic, 2048).cos, MakeRopeTable(plain, 2048).cos);
  EXPECT_NE(MakeRopeTable(dynamic, 2049).cos, MakeRopeTable(plain, 2049).cos);
}

TEST(RopeTable, YarnTakesAGivenAttentionFactor) {
  const weights::RopeConfig rope{
      .rotary_dim = 16, .scaling = Scaling::kYarn, .factor = 4, .original_max_position = 2048, .attention_factor = 1.5};
  const kernels::RopeTable table = MakeRopeTable(rope, 1);
  EXPECT_EQ(table.cos, std::vector<float>(8, 1.5f));
  EXPECT_EQ(table.sin, std::vector<float>(8, 0.0f));
}

TEST(RopeTable, ARowDependsOnItsPositionAlone) {
  const weights::RopeConfig rope{.rotary_dim = 64};
  const kernels::RopeTable few = MakeRopeTable(rope, 10), many = MakeRopeTable(rope, 1000);
  EXPECT_TRUE(std::equal(few.sin.begin(), few.sin.end(), many.sin.begin()));
}

}  // namespace
}  // namespace rankwise::model
