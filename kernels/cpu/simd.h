// Included after simd_avx2.h or simd_avx512.h: what both instruction sets spell alike.
#pragma once

namespace rankwise::kernels::RW_ISA {

// Stored elements by type, so that a kernel is one template. None needs alignment.
struct F16 {
  uint16_t bits;
};
struct BF16 {
  uint16_t bits;
};
// Quantised elements of the online cache formats; a U4 is two.
struct U8 {
  static constexpr float kLevels = 255;
  uint8_t bits;
};
struct U4 {
  static constexpr float kLevels = 15;
  uint8_t bits;
};

template <typename T>
inline constexpr bool kIsStatic = false;
template <>
inline constexpr bool kIsStatic<int8_t> = true;
template <typename T>
inline constexpr bool kIsOnline = false;
template <>
inline constexpr bool kIsOnline<U8> = true;
template <>
inline constexpr bool kIsOnline<U4> = true;

// Stored integers of the cache: pairs of them are multiplied as integers.
template <typename T>
inline constexpr bool kIsInteger = kIsStatic<T> || kIsOnline<T>;

template <typename Vector>
inline Vector LoadAs(const float* p) {
  return Words<Vector>::Load(p);
}
template <typename Vector>
inline Vector LoadAs(const F16* p) {
  return Words<Vector>::LoadF16(p);
}
template <typename Vector>
inline Vector LoadAs(const BF16* p) {
  return Words<Vector>::LoadBF16(p);
}
inline Vec Load(const F16* p) { return LoadF16(p); }
inline Vec Load(const BF16* p) { return LoadBF16(p); }
inline Vec Load(const U8* p) { return LoadU8(p); }
inline float Widen(F16 x) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(x.bits))); }

// The first `count` elements, zeros after.
template <typename T>
inline Vec LoadFirst(const T* p, int count) {
  alignas(64) T whole[16] = {};
  std::memcpy(whole, p, count * sizeof(T));
  return Load(whole);
}

template <typename T>
constexpr T Smaller(T a, T b) {
  return a < b ? a : b;
}
template <typename T>
constexpr T Larger(T a, T b) {
  return a < b ? b : a;
}

// Lane i with lane i + 8, then i + 4, i + 2, i + 1.
inline float SumLanes(Vec x) {
  const __m256 eight = _mm256_add_ps(LowHalf(x), HighHalf(x));
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
inline float MaxLane(Vec x) {
  const __m256 eight = _mm256_max_ps(LowHalf(x), HighHalf(x));
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

inline float MinLane(Vec x) { return -MaxLane(Negate(x)); }

// exp(x) within 2^-22 of it; 0 below -87.33, where f32 leaves its normal range; exp(88.37) from there on; NaN for NaN.
//   n = round(x / ln 2), r = x - n ln 2 in two pieces, e^r = 1 + r + r² P(r)
// Source: Cephes expf (Moshier), its polynomial and its two pieces of ln 2.
inline Vec Exp(Vec x) {
  const Vec lowest = Set(-87.33f);
  const Vec clamped = Min(Set(88.37f), Max(lowest, x));
  const Vec n = RoundHalfEven(Mul(clamped, Set(1.44269504f)));
  Vec r = Fma(n, Set(-0.693359375f), clamped);
  r = Fma(n, Set(2.12194440e-4f), r);
  Vec p = Set(1.9875691500e-4f);
  p = Fma(p, r, Set(1.3981999507e-3f));
  p = Fma(p, r, Set(8.3334519073e-3f));
  p = Fma(p, r, Set(4.1665795894e-2f));
  p = Fma(p, r, Set(1.6666665459e-1f));
  p = Fma(p, r, Set(5.0000001201e-1f));
  p = Add(Fma(Mul(r, r), p, r), Set(1.0f));
  return Select(Less(x, lowest), Zero(), TimesPowerOfTwo(p, n));
}
inline float Exp(float x) {
  alignas(64) float lanes[16];
  Store(lanes, Exp(Set(x)));
  return lanes[0];
}

}  // namespace rankwise::kernels::RW_ISA
