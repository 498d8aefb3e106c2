#include "launch/eval/statistics.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

namespace rankwise::eval {
namespace {

// Exact binomial sums in rational arithmetic (Python's fractions), independent of this code.
TEST(SignTest, EqualsExactBinomialSums) {
  struct Case {
    int64_t wins, losses;
    double p;
  };
  for (const Case& c : std::vector<Case>{{0, 0, 1.0},
                                         {0, 1, 1.0},
                                         {0, 5, 0.0625},
                                         {0, 6, 0.03125},
                                         {1, 9, 0.021484375},
                                         {3, 12, 0.03515625},
                                         {10, 10, 1.0},
                                         {20, 5, 0.004077315330505371},
                                         {45, 60, 0.17156469715424208},
                                         {480, 400, 0.007707305043339141},
                                         {1000, 1100, 0.030720707864242296}}) {
    EXPECT_NEAR(SignTest(c.wins, c.losses), c.p, 1e-9 * c.p) << c.wins << ":" << c.losses;
    EXPECT_EQ(SignTest(c.wins, c.losses), SignTest(c.losses, c.wins));
  }
}

TEST(Normal, IsTwoSided) {
  EXPECT_DOUBLE_EQ(NormalTwoSided(0), 1);
  EXPECT_NEAR(NormalTwoSided(0.5), 0.6170750774519738, 1e-15);
  EXPECT_NEAR(NormalTwoSided(1.959963984540054), 0.05, 1e-15);
  EXPECT_NEAR(NormalTwoSided(-3), 0.0026997960632601913, 1e-15);
  EXPECT_EQ(NormalTwoSided(INFINITY), 0);
}

TEST(PairedDifference, EqualWeightsGiveTheSampleFormula) {
  const std::vector<double> baseline = {1, 2, 4, 3.5}, other = {1.5, 1.75, 5, 4.5}, equal(4, 0.3);
  const Estimate estimate = PairedDifference(baseline, other, equal);
  EXPECT_DOUBLE_EQ(estimate.mean, 0.5625);
  EXPECT_NEAR(estimate.standard_error, 0.295363476640788, 1e-15);
}

TEST(PairedDifference, WeightsMoveTheMean) {
  const std::vector<double> baseline = {1, 2, 4, 3.5}, other = {1.5, 1.75, 5, 4.5}, weights = {1, 1, 0.5, 0.5};
  const Estimate estimate = PairedDifference(baseline, other, weights);
  EXPECT_NEAR(estimate.mean, 0.4166666666666667, 1e-15);
  EXPECT_NEAR(estimate.standard_error, 0.30344388163285074, 1e-15);
}

TEST(WeightedMean, OneValueHasNoError) {
  const Estimate estimate = WeightedMean(std::vector<double>{3}, std::vector<double>{1});
  EXPECT_EQ(estimate.mean, 3);
  EXPECT_TRUE(std::isnan(estimate.standard_error));
}

}  // namespace
}  // namespace rankwise::eval
