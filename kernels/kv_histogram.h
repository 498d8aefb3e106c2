#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

// Counts of values by the bits of their floats, for percentiles and clipping of K and V. The bins do not depend on the
// data, so that counts of ranks, batches and runs are added exactly and in any order: each power of two from 2^-24 to
// 2^20 is cut into 16 bins of equal width, for either sign, with one bin for what is smaller. Larger values, infinities
// among them, count in the outermost bin; NaN nowhere.
namespace rankwise::kernels {

inline constexpr int kHistogramBinsPerOctave = 16;
inline constexpr int kHistogramLowExponent = -24;
inline constexpr int kHistogramHighExponent = 20;
inline constexpr int kHistogramHalf = kHistogramBinsPerOctave * (kHistogramHighExponent - kHistogramLowExponent);
inline constexpr int kHistogramBins = 2 * kHistogramHalf + 1;  // [negative, near zero, positive], in order of value

namespace histogram_internal {
inline constexpr uint32_t kLeastBits = (kHistogramLowExponent + 127u) << 23;
inline constexpr int kShift = 23 - std::countr_zero(unsigned{kHistogramBinsPerOctave});
}  // namespace histogram_internal

// Monotone in x; x is not NaN.
inline int HistogramBin(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffff;
  if (magnitude < histogram_internal::kLeastBits) return kHistogramHalf;
  const int step =
      std::min<int>((magnitude - histogram_internal::kLeastBits) >> histogram_internal::kShift, kHistogramHalf - 1);
  return bits >> 31 ? kHistogramHalf - 1 - step : kHistogramHalf + 1 + step;
}

// Bin b holds values from HistogramEdge(b) to HistogramEdge(b + 1); 0 <= edge <= kHistogramBins.
inline float HistogramEdge(int edge) {
  const bool is_positive = edge > kHistogramHalf;
  const int step = is_positive ? edge - kHistogramHalf - 1 : kHistogramHalf - edge;
  const auto magnitude = std::bit_cast<float>(histogram_internal::kLeastBits +
                                              (static_cast<uint32_t>(step) << histogram_internal::kShift));
  return is_positive ? magnitude : -magnitude;
}

// Adds the values to `counts` [kHistogramBins].
inline void CountValues(uint64_t* counts, const float* values, int64_t value_count) {
  for (int64_t i = 0; i < value_count; ++i) {
    if (!std::isnan(values[i])) ++counts[HistogramBin(values[i])];
  }
}

}  // namespace rankwise::kernels
