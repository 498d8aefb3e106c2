#include "worker/kv/kv_clip.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "kernels/kv_histogram.h"

namespace rankwise::kv {
namespace {

constexpr double kNarrowest = 1.0 / 256;  // of the largest magnitude

struct Bin {
  double low, high, count;
};

// The bins that hold something, in order, cut to the extremes. One value of each extreme is there for certain and has a
// bin to itself: a lone outlier decides most of what clipping costs.
std::vector<Bin> BinsOf(const ValueSpread& spread) {
  RW_CHECK(spread.histogram.size() == kernels::kHistogramBins,
           absl::StrCat("a spread of ", spread.histogram.size(), " bins"));
  std::vector<Bin> bins = {{spread.min, spread.min, 1}};
  const int first = kernels::HistogramBin(spread.min), last = kernels::HistogramBin(spread.max);
  for (int b = first; b <= last; ++b) {
    const double count = static_cast<double>(spread.histogram[b]) - (b == first ? 1 : 0) - (b == last ? 1 : 0);
    if (count <= 0) continue;
    const double low = b == first ? spread.min : kernels::HistogramEdge(b);
    bins.push_back({.low = low, .high = b == last ? spread.max : kernels::HistogramEdge(b + 1), .count = count});
  }
  bins.push_back({spread.max, spread.max, 1});
  return bins;
}

std::vector<Bin> Mirrored(const std::vector<Bin>& bins) {
  std::vector<Bin> mirrored;
  for (auto bin = bins.rbegin(); bin != bins.rend(); ++bin) {
    mirrored.push_back({.low = -bin->high, .high = -bin->low, .count = bin->count});
  }
  return mirrored;
}

// What lies above a bound, in the time of a binary search.
class UpperTail {
 public:
  struct Sums {
    double count = 0, squares = 0;  // of the values above the bound, and of their distances to it
  };

  explicit UpperTail(const std::vector<Bin>& bins) : bins_(bins), moments_(bins.size() + 1) {
    for (size_t i = bins.size(); i-- > 0;) {
      const auto& [low, high, count] = bins[i];
      moments_[i] = {.count = moments_[i + 1].count + count,
                     .sum = moments_[i + 1].sum + count * (low + high) / 2,
                     .squares = moments_[i + 1].squares + count * (low * low + low * high + high * high) / 3};
    }
  }

  Sums Above(double bound) const {
    const auto first = std::ranges::upper_bound(bins_, bound, {}, &Bin::high);
    if (first == bins_.end()) return {};
    const bool is_cut = first->low < bound;
    const Moments& whole = moments_[first - bins_.begin() + (is_cut ? 1 : 0)];
    Sums sums{.count = whole.count,
              .squares = std::max(0.0, whole.squares - 2 * bound * whole.sum + bound * bound * whole.count)};
    if (is_cut) {
      const double length = first->high - bound, count = first->count * length / (first->high - first->low);
      sums.count += count;
      sums.squares += count * length * length / 3;
    }
    return sums;
  }

 private:
  struct Moments {
    double count = 0, sum = 0, squares = 0;
  };
  std::vector<Bin> bins_;
  std::vector<Moments> moments_;  // of bins i, i + 1, …
};

class Distribution {
 public:
  explicit Distribution(const ValueSpread& spread)
      : above_(BinsOf(spread)), below_(Mirrored(BinsOf(spread))), count_(CountAbove(-INFINITY)) {}

  double count() const { return count_; }
  double CountAbove(double bound) const { return above_.Above(bound).count; }
  double CountBelow(double bound) const { return below_.Above(-bound).count; }

  double ExpectedSquaredError(const Int8Parameters& parameters) const {
    const double scale = parameters.scale, zero_point = parameters.zero_point;
    const UpperTail::Sums above = above_.Above(zero_point + 127 * scale);
    const UpperTail::Sums below = below_.Above(-(zero_point - 128 * scale));
    const double inside = count_ - above.count - below.count;
    return (above.squares + below.squares + inside * scale * scale / 12) / count_;
  }

 private:
  UpperTail above_, below_;
  double count_;
};

// A constant is represented exactly: q = 0 with the zero point = the constant. The least normal scale has a reciprocal
// that is still finite.
float AtLeastNormal(float scale) { return std::max(scale, std::numeric_limits<float>::min()); }

Int8Parameters FromRange(float low, float high) {
  return {.scale = AtLeastNormal((high - low) / 255.0f), .zero_point = (low + high) / 2.0f};
}
Int8Parameters FromBound(float bound) { return {.scale = AtLeastNormal(bound / 127.0f), .zero_point = 0}; }

float AbsMax(const ValueSpread& spread) { return std::max(std::abs(spread.min), std::abs(spread.max)); }

// The least bound in [low, high] that `cut`, which falls as the bound rises, brings to at most `most`.
template <typename Cut>
double LeastBound(double low, double high, double most, const Cut& cut) {
  for (int i = 0; i < 64 && cut(low) > most; ++i) {
    const double middle = low + (high - low) / 2;
    (cut(middle) > most ? low : high) = middle;
  }
  return cut(low) > most ? high : low;
}

Int8Parameters OfPercentile(const ValueSpread& spread, const ClipOptions& options) {
  const Distribution values(spread);
  const double cut = values.count() * (1 - options.percentile / 100);
  if (options.is_symmetric) {
    const double bound =
        LeastBound(0, AbsMax(spread), cut, [&](double b) { return values.CountAbove(b) + values.CountBelow(-b); });
    return FromBound(static_cast<float>(bound));
  }
  const double high = LeastBound(spread.min, spread.max, cut / 2, [&](double b) { return values.CountAbove(b); });
  const double low = -LeastBound(-spread.max, -spread.min, cut / 2, [&](double b) { return values.CountBelow(-b); });
  return FromRange(static_cast<float>(std::min(low, high)), static_cast<float>(high));
}

// Bounds that kMse tries, in order of value.
std::vector<float> Candidates(float min, float max, float least_magnitude) {
  std::vector<float> bounds = {min};
  for (int edge = 0; edge <= kernels::kHistogramBins; ++edge) {
    const float bound = kernels::HistogramEdge(edge);
    if (min < bound && bound < max && std::abs(bound) >= least_magnitude) bounds.push_back(bound);
  }
  bounds.push_back(max);
  return bounds;
}

Int8Parameters OfLeastError(const ValueSpread& spread, bool is_symmetric) {
  const Distribution values(spread);
  const float largest = AbsMax(spread), least = largest * static_cast<float>(kNarrowest);
  Int8Parameters best = is_symmetric ? FromBound(largest) : FromRange(spread.min, spread.max);
  double least_error = values.ExpectedSquaredError(best);
  const auto consider = [&](const Int8Parameters& parameters) {
    const double error = values.ExpectedSquaredError(parameters);
    if (error < least_error) least_error = error, best = parameters;
  };
  if (is_symmetric) {
    for (const float bound : Candidates(least, largest, least)) consider(FromBound(bound));
    return best;
  }
  const std::vector<float> bounds = Candidates(spread.min, spread.max, least);
  for (size_t low = 0; low < bounds.size(); ++low) {
    for (size_t high = low + 1; high < bounds.size(); ++high) consider(FromRange(bounds[low], bounds[high]));
  }
  return best;
}

}  // namespace

const char* ClipMethodName(ClipMethod method) {
  switch (method) {
    case ClipMethod::kNone:
      return "none";
    case ClipMethod::kPercentile:
      return "percentile";
    case ClipMethod::kMse:
      return "mse";
  }
  return "?";
}

absl::StatusOr<ClipMethod> ParseClipMethod(const std::string& name) {
  for (const ClipMethod method : {ClipMethod::kNone, ClipMethod::kPercentile, ClipMethod::kMse}) {
    if (name == ClipMethodName(method)) return method;
  }
  return absl::InvalidArgumentError(absl::StrCat("clip=", name, " is not one of none, percentile, mse"));
}

Int8Parameters ChooseParameters(const ValueSpread& spread, const ClipOptions& options) {
  switch (options.method) {
    case ClipMethod::kNone:
      return options.is_symmetric ? FromBound(AbsMax(spread)) : FromRange(spread.min, spread.max);
    case ClipMethod::kPercentile:
      return OfPercentile(spread, options);
    case ClipMethod::kMse:
      return OfLeastError(spread, options.is_symmetric);
  }
  RW_CHECK(false, "no such clip method");
}

double ExpectedSquaredError(const ValueSpread& spread, const Int8Parameters& parameters) {
  return Distribution(spread).ExpectedSquaredError(parameters);
}

}  // namespace rankwise::kv
