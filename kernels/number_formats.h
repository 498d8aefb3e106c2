#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels/backend.h"

// One value at a time, for code that is not in a hurry. The vector code of the CPU backend gives the same bits.
namespace rankwise::kernels {

inline float HalfToFloat(uint16_t bits) { return static_cast<float>(std::bit_cast<_Float16>(bits)); }
inline uint16_t FloatToHalf(float x) { return std::bit_cast<uint16_t>(static_cast<_Float16>(x)); }
inline float BFloat16ToFloat(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

// The element at `data`, which need not be aligned.
inline float LoadAsFloat(const std::byte* data, DType dtype) {
  if (dtype == DType::kF32) {
    float x;
    std::memcpy(&x, data, sizeof(x));
    return x;
  }
  uint16_t bits;
  std::memcpy(&bits, data, sizeof(bits));
  return dtype == DType::kF16 ? HalfToFloat(bits) : BFloat16ToFloat(bits);
}

// A stored value, and whether the original lay outside what the format holds.
template <typename T>
struct Stored {
  T value;
  bool saturated;
};

// q = round_half_even((x - zero_point) / scale) in f32, clamped to [-128, 127]. NaN becomes 0 and counts as saturated.
inline Stored<int8_t> QuantizeInt8(float x, float scale, float zero_point) {
  float q = std::nearbyint((x - zero_point) / scale);
  if (std::isnan(q)) return {0, true};
  if (q < -128.0f) return {-128, true};
  if (q > 127.0f) return {127, true};
  return {static_cast<int8_t>(q), false};
}

// Rounds half to even and clamps to the largest finite f16. NaN stays NaN.
inline Stored<uint16_t> QuantizeF16(float x) {
  // 65520 is half way from the largest f16, 65504, to the next power of two: from there on IEEE rounds to infinity.
  if (std::fabs(x) >= 65520.0f) return {static_cast<uint16_t>(std::signbit(x) ? 0xfbff : 0x7bff), true};
  return {FloatToHalf(x), false};
}

}  // namespace rankwise::kernels
