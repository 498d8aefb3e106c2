#include "launch/eval/statistics.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/check.h"

namespace rankwise::eval {

double SignTest(int64_t wins, int64_t losses) {
  const int64_t n = wins + losses;
  const int64_t fewer = std::min(wins, losses);
  RW_CHECK(fewer >= 0, "counts are not negative");
  if (2 * fewer >= n) return 1;
  double sum = 0;
  for (int64_t k = 0; k <= fewer; ++k) {
    const auto choose = [](int64_t a) { return std::lgamma(static_cast<double>(a + 1)); };
    sum += std::exp(choose(n) - choose(k) - choose(n - k) - static_cast<double>(n) * std::log(2.0));
  }
  return std::min(1.0, 2 * sum);
}

double NormalTwoSided(double z) { return std::erfc(std::abs(z) / std::sqrt(2.0)); }

Estimate WeightedMean(std::span<const double> values, std::span<const double> weights) {
  RW_CHECK(values.size() == weights.size() && !values.empty(), "as many weights as values");
  double total = 0, sum = 0, squares = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    total += weights[i];
    sum += weights[i] * values[i];
  }
  RW_CHECK(total > 0, "weights sum to something");
  Estimate estimate{.mean = sum / total, .standard_error = std::numeric_limits<double>::quiet_NaN()};
  const auto n = static_cast<double>(values.size());
  if (values.size() < 2) return estimate;
  for (size_t i = 0; i < values.size(); ++i) {
    const double part = weights[i] / total * (values[i] - estimate.mean);
    squares += part * part;
  }
  estimate.standard_error = std::sqrt(n / (n - 1) * squares);
  return estimate;
}

Estimate PairedDifference(std::span<const double> baseline, std::span<const double> other,
                          std::span<const double> weights) {
  RW_CHECK(baseline.size() == other.size(), "the same items");
  std::vector<double> differences(baseline.size());
  for (size_t i = 0; i < differences.size(); ++i) differences[i] = other[i] - baseline[i];
  return WeightedMean(differences, weights);
}

}  // namespace rankwise::eval
