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
// Rounds half to even, beyond the largest to infinity. Denormals become zeros, as AVX512-BF16 has it; NaN stays NaN.
inline uint16_t FloatToBFloat16(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  const uint32_t size = bits & 0x7fffffff;
  if (size > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
  if (size < 0x00800000) return static_cast<uint16_t>(bits >> 16 & 0x8000);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// FloatToBFloat16(HalfToFloat(half)), for whole matrices.
inline uint16_t HalfToBFloat16(uint16_t half) {
  const uint32_t sign = half & 0x8000u, size = half & 0x7fffu;
  if (size < 0x0400 || size >= 0x7c00) return FloatToBFloat16(HalfToFloat(half));
  constexpr uint32_t kExponents = 127 - 15;
  return static_cast<uint16_t>(sign | (((size + 3 + (size >> 3 & 1)) >> 3) + (kExponents << 7)));
}

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

inline uint32_t LoadWord(const std::byte* words, int64_t index) {
  uint32_t word;
  std::memcpy(&word, words + index * 4, sizeof(word));
  return word;
}

// Where in its word of a GroupedMatrix the value of output `out` begins, in bits.
constexpr int GroupedShift(int bits, int64_t out) {
  const auto in_word = static_cast<int>(out % (32 / bits));
  return bits * (bits == 4 ? (in_word % 2) * 4 + in_word / 2 : in_word);
}
// Value [row][out] of a tensor of GroupedMatrix's words.
inline int GroupedValue(const GroupedMatrix& m, const std::byte* words, int64_t row, int64_t out) {
  const int64_t per_word = 32 / m.bits;
  const uint32_t word = LoadWord(words, row * (m.n_out / per_word) + out / per_word);
  return static_cast<int>(word >> GroupedShift(m.bits, out) & ((1u << m.bits) - 1));
}
inline uint16_t GroupedScale(const GroupedMatrix& m, int64_t group, int64_t out) {
  uint16_t bits;
  std::memcpy(&bits, m.scales + (group * m.n_out + out) * 2, sizeof(bits));
  return bits;
}

inline float ElementAt(const MatrixView& view, int64_t row, int64_t col) {
  if (!view.grouped) return LoadAsFloat(view.data + (row * view.row_stride + col) * DTypeBytes(view.dtype), view.dtype);
  const GroupedMatrix& m = *view.grouped;
  const int64_t out = view.row_begin + row, in = view.col_begin + col, group = in / m.group_size;
  const int q = GroupedValue(m, m.qweight, in, out), zero = GroupedValue(m, m.qzeros, group, out);
  return static_cast<float>(q - zero) * HalfToFloat(GroupedScale(m, group, out));
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

// The f16 next to `bits` (finite, not the last one) towards +infinity, or towards -infinity.
inline uint16_t NextHalf(uint16_t bits, bool is_up) {
  const bool is_negative = (bits & 0x8000) != 0;
  if ((bits & 0x7fff) == 0) return is_up ? 0x0001 : 0x8001;
  return static_cast<uint16_t>(bits + (is_negative == is_up ? -1 : 1));
}

// The range of values in [min, max], both within the f16 range, in `levels` steps; KvFormat gives the formula. Scalar
// and shared by all backends, so that they store the same bits.
inline OnlineRange OnlineRangeOf(float min, float max, float levels) {
  uint16_t zero = FloatToHalf(min + 0.0f);  // -0 becomes 0
  if (HalfToFloat(zero) > min) zero = NextHalf(zero, /*is_up=*/false);
  const float step = (max - HalfToFloat(zero)) / levels;
  uint16_t scale = FloatToHalf(step);
  if (HalfToFloat(scale) < step) scale = NextHalf(scale, /*is_up=*/true);
  return {.scale = scale, .zero = zero};
}

// NaN becomes 0. A scale of 0 belongs to a constant that f16 holds: q = 0.
inline Stored<uint8_t> QuantizeOnline(float x, OnlineRange range, float levels) {
  const bool is_outside = !(std::fabs(x) <= 65504.0f);
  const float scale = HalfToFloat(range.scale);
  const float q = std::nearbyint((x - HalfToFloat(range.zero)) / (scale > 0 ? scale : 1.0f));
  if (!(q > 0)) return {0, is_outside};
  return {static_cast<uint8_t>(q < levels ? q : levels), is_outside};
}

}  // namespace rankwise::kernels
