#pragma once

#include <bit>
#include <cstdint>
#include <limits>
#include <type_traits>

// What drawing a token is made of on every device (kernels/token_draw.h, kernels/cuda/draw.cu): in plain C++, so that
// .cu files can include it, and constexpr, so that they can call it.
namespace rankwise::kernels {

// How the token after one row is drawn.
struct DrawRule {
  double uniform = 0;     // in [0, 1): decides among what is left
  float temperature = 1;  // 0: the likeliest
  int32_t top_k = 0;      // 0: all
  float top_p = 1;
  float min_p = 0;
};

inline constexpr int kMostVocabularyBits = 23;
// Probabilities are integers, whose sums have no order: in units of 2^-40 of the likeliest token's. 2^23 of them add up
// to less than 2^64, and a double holds each.
inline constexpr double kWeightOne = 0x1p40;

// exp(x) for -700 < x < 700 within 2e-14, relative: 2^k times the Taylor polynomial at x - k ln 2, which is at most ln
// 2 / 2 and leaves a remainder of (ln 2 / 2)^12 / 12! = 6e-15. Below that, and for NaN, 0.
template <typename Words, typename Doubles>
[[gnu::always_inline]] constexpr void Exp(Doubles& x) {
  constexpr double kLn2 = 0x1.62e42fefa39efp-1;
  constexpr double kRound = 0x1.8p52;  // adding it leaves the nearest integer in the low bits
  // ln 2 in two parts; k times the first is exact.
  constexpr double kLn2High = 0x1.62e42fee00000p-1, kLn2Low = 0x1.a39ef35793c76p-33;
  const Doubles rounded = x * (1 / kLn2) + kRound;
  const Doubles k = rounded - kRound;
  const Doubles r = x - k * kLn2High - k * kLn2Low;
  const Doubles r2 = r * r, r4 = r2 * r2;
  const Doubles low = (1 + r) + r2 * (1.0 / 2 + r * (1.0 / 6));
  const Doubles middle = (1.0 / 24 + r * (1.0 / 120)) + r2 * (1.0 / 720 + r * (1.0 / 5040));
  const Doubles high = (1.0 / 40320 + r * (1.0 / 362880)) + r2 * (1.0 / 3628800 + r * (1.0 / 39916800));
  const Doubles polynomial = low + r4 * (middle + r4 * high);
  const Words bits = __builtin_bit_cast(Words, polynomial) + (__builtin_bit_cast(Words, rounded) << 52);
  if constexpr (std::is_same_v<Doubles, double>) {
    x = x > -700.0 ? __builtin_bit_cast(double, bits) : 0.0;
  } else {
    x = __builtin_bit_cast(Doubles, bits & __builtin_bit_cast(Words, x > -700.0));
  }
}

// weights = exp(x) for x <= 0 in units of 1 / kWeightOne, rounded. x is used up.
template <typename Words, typename Doubles>
[[gnu::always_inline]] constexpr void Weigh(Doubles& x, Words& weights) {
  constexpr double kInteger = 0x1p52;  // adding it leaves the nearest integer in the mantissa
  Exp<Words>(x);
  const Doubles scaled = x * kWeightOne + kInteger;
  weights = __builtin_bit_cast(Words, scaled) & ((uint64_t{1} << 52) - 1);
}

// Rises as the logit falls. NaN counts as -inf, and both zeros are one.
constexpr uint32_t Fall(float logit) {
  constexpr float kMasked = -std::numeric_limits<float>::infinity();
  const auto bits = std::bit_cast<uint32_t>((logit > kMasked ? logit : kMasked) + 0.0f);
  const uint32_t is_negative = 0 - (bits >> 31);  // all ones or none; a branch would be mispredicted half the time
  return bits ^ (~is_negative & 0x7FFFFFFF);
}

}  // namespace rankwise::kernels
