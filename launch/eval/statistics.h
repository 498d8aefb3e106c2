#pragma once

#include <cstdint>
#include <span>
#include <vector>

// Paired comparisons: the same items, answered under two configurations. Pure.
namespace rankwise::eval {

// Two-sided exact sign test: the probability, were both configurations equally likely to win an item on which they
// differ, of a split at least as uneven as `wins` to `losses`. 1 when there are none.
double SignTest(int64_t wins, int64_t losses);

// Two-sided probability of a standard normal at least as far from 0 as `z`; 0 for infinity.
double NormalTwoSided(double z);

struct Estimate {
  double mean = 0;
  double standard_error = 0;  // NaN for less than two values
};

// Weighted mean with the standard error of a weighted mean of independent values,
//   se² = n / (n - 1) Σ w_i² (x_i - mean)²,   Σ w_i = 1,
// which for equal weights is the sample variance over n. Requires: as many weights as values, their sum is positive.
Estimate WeightedMean(std::span<const double> values, std::span<const double> weights);

// Of `other` less `baseline`, item by item.
Estimate PairedDifference(std::span<const double> baseline, std::span<const double> other,
                          std::span<const double> weights);

}  // namespace rankwise::eval
