#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"

// From how values spread to the int8 parameters that represent them.
namespace rankwise::kv {

enum class ClipMethod : uint8_t {
  kNone,        // the whole range
  kPercentile,  // a share of the values, the rest cut off in equal parts on both sides (by magnitude when symmetric)
  kMse,         // the range whose ExpectedSquaredError is least
};
const char* ClipMethodName(ClipMethod method);  // as on the command line and in the manifest
absl::StatusOr<ClipMethod> ParseClipMethod(const std::string& name);

struct ClipOptions {
  ClipMethod method = ClipMethod::kNone;
  double percentile = 99.99;  // of kPercentile: percent of the values that are kept; in (0, 100]
  bool is_symmetric = false;  // the zero point is 0
};

// Values that share one scale. `histogram` [kernels::kHistogramBins] counts them, from the bin of `min` to that of
// `max`; each of the two is taken as there once, and a bin's other values as uniform. Without a histogram (empty) only
// kNone can be chosen.
struct ValueSpread {
  float min = 0, max = 0;
  std::vector<uint64_t> histogram;
};

// x ≈ q * scale + zero_point, q in [-128, 127].
struct Int8Parameters {
  float scale, zero_point;
};

// Asymmetric: zero point = (low + high) / 2, scale = (high - low) / 255. Symmetric: 0 and bound / 127. In f32; a scale
// is at least the least normal number, which keeps a constant exact. kMse tries every pair of histogram edges, beside
// the extremes themselves, that lie in the outer eight octaves of the range: narrower ones than a 256th of it would cut
// the extremes by 128 steps.
Int8Parameters ChooseParameters(const ValueSpread& spread, const ClipOptions& options);

// E[(x - x̂)²]: scale² / 12 for a value between the outermost codes, as if it lay anywhere in its step; beyond them the
// square of the distance to the code. Requires a histogram.
double ExpectedSquaredError(const ValueSpread& spread, const Int8Parameters& parameters);

}  // namespace rankwise::kv
