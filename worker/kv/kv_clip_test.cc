#include "worker/kv/kv_clip.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <random>
#include <string>

#include "kernels/kv_histogram.h"

namespace rankwise::kv {
namespace {

ValueSpread SpreadOf(const std::vector<float>& values) {
  ValueSpread spread{.min = *std::ranges::min_element(values),
                     .max = *std::ranges::max_element(values),
                     .histogram = std::vector<uint64_t>(kernels::kHistogramBins)};
  kernels::CountValues(spread.histogram.data(), values.data(), static_cast<int64_t>(values.size()));
  return spread;
}

// Quantised and back, value by value.
double TrueSquaredError(const std::vector<float>& values, const Int8Parameters& p) {
  double sum = 0;
  for (const float x : values) {
    const float q = std::clamp(std::nearbyint((x - p.zero_point) / p.scale), -128.0f, 127.0f);
    const double error = double{x} - (double{q} * p.scale + p.zero_point);
    sum += error * error;
  }
  return sum / static_cast<double>(values.size());
}

struct Sample {
  std::string name;
  std::vector<float> values;
};

// Shapes that K and V take: bells, heavy tails, one-sided and shifted ones, and a lone outlier.
std::vector<Sample> Samples() {
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  std::student_t_distribution<float> heavy(3);
  std::lognormal_distribution<float> one_sided(0, 1);
  std::uniform_real_distribution<float> uniform(-1, 1);
  const auto draw = [](const std::function<float()>& value) {
    std::vector<float> values(20000);
    std::ranges::generate(values, value);
    return values;
  };
  std::vector<Sample> samples = {{"normal", draw([&] { return normal(random); })},
                                 {"heavy", draw([&] { return heavy(random); })},
                                 {"one-sided", draw([&] { return one_sided(random); })},
                                 {"one-sided below", draw([&] { return -one_sided(random); })},
                                 {"shifted", draw([&] { return 20 + heavy(random); })},
                                 {"uniform", draw([&] { return uniform(random); })},
                                 {"large", draw([&] { return 1e3f * heavy(random); })},
                                 {"small", draw([&] { return 1e-6f * normal(random); })},
                                 {"outlier", draw([&] { return normal(random); })}};
  samples.back().values[77] = 300;
  return samples;
}

// The least true error over a grid of bounds, 2.5 % of the range apart towards the middle and closer outside.
double BruteForce(const std::vector<float>& values, const ValueSpread& spread, bool is_symmetric) {
  double least = INFINITY;
  const double range = spread.max - spread.min, middle = spread.min + range / 2, half = range / 2;
  const double largest = std::max(std::abs(spread.min), std::abs(spread.max));
  const auto consider = [&](double low, double high) {
    const Int8Parameters p =
        is_symmetric ? Int8Parameters{static_cast<float>(high / 127), 0}
                     : Int8Parameters{static_cast<float>((high - low) / 255), static_cast<float>((low + high) / 2)};
    least = std::min(least, TrueSquaredError(values, p));
  };
  if (is_symmetric) {
    for (double bound = largest; bound > largest / 200; bound *= 0.97) consider(-bound, bound);
    return least;
  }
  for (int i = 0; i < 40; ++i) {
    for (int j = 0; j < 40; ++j) {
      // The middle of the values need not be that of the range.
      for (const double centre : {middle, static_cast<double>(values[0])}) {
        const double low = centre - (centre - spread.min) * std::pow(0.9, i);
        const double high = centre + (spread.max - centre) * std::pow(0.9, j);
        if (low < high) consider(low, high);
      }
    }
  }
  EXPECT_GT(half, 0);
  return least;
}

// The search sees bins of a sixteenth of an octave, and noise where rounding is: it may lose a few percent to a grid of
// true errors, no more. (Seen: at most 4.1 %.)
TEST(KvClipTest, MseIsTheLeastOfABruteForce) {
  for (const Sample& sample : Samples()) {
    const std::vector<float> few(sample.values.begin(), sample.values.begin() + 10000);
    const ValueSpread spread = SpreadOf(few);
    for (const bool is_symmetric : {false, true}) {
      SCOPED_TRACE(sample.name + (is_symmetric ? ", symmetric" : ""));
      const Int8Parameters chosen =
          ChooseParameters(spread, {.method = ClipMethod::kMse, .is_symmetric = is_symmetric});
      const double least = BruteForce(few, spread, is_symmetric), error = TrueSquaredError(few, chosen);
      EXPECT_LE(error, 1.06 * least);
      const Int8Parameters whole = ChooseParameters(spread, {.is_symmetric = is_symmetric});
      EXPECT_LE(error, 1.02 * TrueSquaredError(few, whole));
      if (is_symmetric) {
        EXPECT_EQ(chosen.zero_point, 0);
      }
      RecordProperty(sample.name + (is_symmetric ? " symmetric" : ""), std::to_string(error / least));
    }
  }
}

// Twenty million bell-shaped values and one of 30: keeping it costs (34 / 255)² / 12 a value, losing it 26² / 2e7.
TEST(KvClipTest, MseDropsALoneOutlierOfMany) {
  std::vector<float> values = Samples()[0].values;
  ValueSpread spread = SpreadOf(values);
  for (uint64_t& count : spread.histogram) count *= 1000;
  ++spread.histogram[kernels::HistogramBin(30)];
  const float bell = spread.max;
  spread.max = 30;
  const Int8Parameters whole = ChooseParameters(spread, {}),
                       chosen = ChooseParameters(spread, {.method = ClipMethod::kMse});
  EXPECT_LT(ExpectedSquaredError(spread, chosen), 0.2 * ExpectedSquaredError(spread, whole));
  EXPECT_LT(chosen.zero_point + 127 * chosen.scale, 2 * bell);
  // And keeps it where it is one of twenty thousand.
  values[0] = 30;
  EXPECT_GT(ChooseParameters(SpreadOf(values), {.method = ClipMethod::kMse}).scale, 0.8f * whole.scale);
}

TEST(KvClipTest, TheObjectiveIsTheErrorOfTheQuantiser) {
  std::mt19937 random(5);
  for (const Sample& sample : Samples()) {
    const ValueSpread spread = SpreadOf(sample.values);
    std::vector<float> sorted = sample.values;
    std::ranges::sort(sorted);
    for (int round = 0; round < 20; ++round) {
      // Bounds among the outer values: as wide as sensible clipping is.
      const float low = sorted[random() % (sorted.size() / 4)];
      const float high = sorted[sorted.size() - 1 - random() % (sorted.size() / 4)];
      const Int8Parameters p{.scale = (high - low) / 255, .zero_point = (low + high) / 2};
      const double truth = TrueSquaredError(sample.values, p);
      EXPECT_NEAR(ExpectedSquaredError(spread, p), truth, 0.05 * truth) << sample.name << " " << low << " " << high;
    }
  }
}

TEST(KvClipTest, PercentilesCutEqualSharesOfBothSides) {
  for (const Sample& sample : Samples()) {
    SCOPED_TRACE(sample.name);
    const ValueSpread spread = SpreadOf(sample.values);
    std::vector<float> sorted = sample.values;
    std::ranges::sort(sorted);
    const Int8Parameters p = ChooseParameters(spread, {.method = ClipMethod::kPercentile, .percentile = 99});
    const float low = p.zero_point - 127.5f * p.scale, high = p.zero_point + 127.5f * p.scale;
    // 100 of 20,000 on each side; a bin is 6 % wide and holds up to some tens there.
    EXPECT_NEAR(std::ranges::lower_bound(sorted, low) - sorted.begin(), 100, 30);
    EXPECT_NEAR(sorted.end() - std::ranges::upper_bound(sorted, high), 100, 30);
    const Int8Parameters s =
        ChooseParameters(spread, {.method = ClipMethod::kPercentile, .percentile = 99, .is_symmetric = true});
    EXPECT_EQ(s.zero_point, 0);
    if (sample.name != "shifted") {
      EXPECT_NEAR(std::ranges::count_if(sorted, [&](float x) { return std::abs(x) > 127 * s.scale; }), 200, 60);
    }
    const Int8Parameters all = ChooseParameters(spread, {.method = ClipMethod::kPercentile, .percentile = 100});
    const Int8Parameters whole = ChooseParameters(spread, {});
    EXPECT_FLOAT_EQ(all.scale, whole.scale);
    EXPECT_NEAR(all.zero_point, whole.zero_point, 1e-3f * whole.scale);
  }
}

TEST(KvClipTest, CountsAddUpWhateverTheirOrder) {
  const std::vector<float> values = Samples()[1].values;
  ValueSpread parts = SpreadOf({values.begin() + 5000, values.end()});
  const ValueSpread first = SpreadOf({values.begin(), values.begin() + 5000});
  for (int b = 0; b < kernels::kHistogramBins; ++b) parts.histogram[b] += first.histogram[b];
  EXPECT_EQ(parts.histogram, SpreadOf(values).histogram);
}

TEST(KvClipTest, ConstantsStayExact) {
  for (const float constant : {0.0f, 3.0f, -1e-7f, 2e6f}) {
    const ValueSpread spread = SpreadOf({constant, constant});
    for (const ClipMethod method : {ClipMethod::kNone, ClipMethod::kPercentile, ClipMethod::kMse}) {
      const Int8Parameters p = ChooseParameters(spread, {.method = method});
      EXPECT_EQ(p.zero_point, constant) << ClipMethodName(method);
      EXPECT_GT(p.scale, 0);
      EXPECT_GT(1 / p.scale, 0);
      const Int8Parameters s = ChooseParameters(spread, {.method = method, .is_symmetric = true});
      EXPECT_NEAR(TrueSquaredError({constant}, s), 0, 1e-6 * constant * constant) << ClipMethodName(method);
    }
  }
}

}  // namespace
}  // namespace rankwise::kv
