#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define RW_ISA avx2
// After the name of the namespace.
#include "kernels/cpu/simd_pair.h"

// Sixteen f32 lanes in a pair of AVX2 registers: the same words, operations and lane order as simd_avx512.h.
namespace rankwise::kernels::avx2 {

inline constexpr const char* kName = "avx2";
inline constexpr int kAccumulators = 6;  // pairs: 12 of 16 registers; the rest hold weights and a broadcast
inline constexpr int kPairTileRows = 0;  // every vector is a pair

using Vec = Pair;
struct Mask {
  __m256 lo, hi;
};

inline Vec Zero() { return Words<Pair>::Zero(); }
inline Vec Set(float x) { return Words<Pair>::Set(x); }
inline Vec Load(const float* p) { return Words<Pair>::Load(p); }
inline Vec LoadF16(const void* p) { return Words<Pair>::LoadF16(p); }
inline Vec LoadBF16(const void* p) { return Words<Pair>::LoadBF16(p); }
inline Vec LoadU8(const void* p) {
  const __m128i x = LoadBytes(p);
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(x)),
          _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_unpackhi_epi64(x, x)))};
}
inline void StoreF16(void* p, Vec x) {
  auto* to = static_cast<__m128i*>(p);
  _mm_storeu_si128(to, _mm256_cvtps_ph(x.lo, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  _mm_storeu_si128(to + 1, _mm256_cvtps_ph(x.hi, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
// Lanes hold integers in [-128, 127].
inline void StoreI8(void* p, Vec x) {
  const __m256i lo = _mm256_cvtps_epi32(x.lo), hi = _mm256_cvtps_epi32(x.hi);
  const __m128i lo16 = _mm_packs_epi32(_mm256_castsi256_si128(lo), _mm256_extracti128_si256(lo, 1));
  const __m128i hi16 = _mm_packs_epi32(_mm256_castsi256_si128(hi), _mm256_extracti128_si256(hi, 1));
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm_packs_epi16(lo16, hi16));
}
// Lanes hold integers in [0, 255].
inline void StoreU8(void* p, Vec x) {
  const __m256i lo = _mm256_cvtps_epi32(x.lo), hi = _mm256_cvtps_epi32(x.hi);
  const __m128i lo16 = _mm_packs_epi32(_mm256_castsi256_si128(lo), _mm256_extracti128_si256(lo, 1));
  const __m128i hi16 = _mm_packs_epi32(_mm256_castsi256_si128(hi), _mm256_extracti128_si256(hi, 1));
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm_packus_epi16(lo16, hi16));
}

// Sixteen words of eight values of four bits; value kIndex, or `index`, of each.
struct NibbleWords {
  __m256i lo, hi;
};
inline NibbleWords LoadNibbleWords(const void* p) {
  const auto* from = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(from), _mm256_loadu_si256(from + 1)};
}
inline __m256 NibblesToFloats(__m256i words) {
  return _mm256_cvtepi32_ps(_mm256_and_si256(words, _mm256_set1_epi32(15)));
}
template <int kIndex>
inline Vec Nibble(NibbleWords x) {
  return {NibblesToFloats(_mm256_srli_epi32(x.lo, 4 * kIndex)), NibblesToFloats(_mm256_srli_epi32(x.hi, 4 * kIndex))};
}
inline Vec Nibble(NibbleWords x, int index) {
  const __m128i shift = _mm_cvtsi32_si128(4 * index);
  return {NibblesToFloats(_mm256_srl_epi32(x.lo, shift)), NibblesToFloats(_mm256_srl_epi32(x.hi, shift))};
}

inline Vec Add(Vec a, Vec b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline Vec Sub(Vec a, Vec b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline Vec Mul(Vec a, Vec b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline Vec Div(Vec a, Vec b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
// When either is NaN: b.
inline Vec Max(Vec a, Vec b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline Vec Min(Vec a, Vec b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline Vec Abs(Vec a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
inline Vec Negate(Vec a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_xor_ps(a.lo, sign), _mm256_xor_ps(a.hi, sign)};
}
inline Vec RoundHalfEven(Vec a) {
  return {_mm256_round_ps(a.lo, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
          _mm256_round_ps(a.hi, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline __m256 PowerOfTwo(__m256 n) {
  const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}
// a 2^n for whole n in [-126, 127], where the product is a normal number.
inline Vec TimesPowerOfTwo(Vec a, Vec n) {
  return {_mm256_mul_ps(a.lo, PowerOfTwo(n.lo)), _mm256_mul_ps(a.hi, PowerOfTwo(n.hi))};
}

inline Mask Less(Vec a, Vec b) {
  return {_mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ)};
}
inline Mask IsNan(Vec a) { return {_mm256_cmp_ps(a.lo, a.lo, _CMP_UNORD_Q), _mm256_cmp_ps(a.hi, a.hi, _CMP_UNORD_Q)}; }
inline Mask Or(Mask a, Mask b) { return {_mm256_or_ps(a.lo, b.lo), _mm256_or_ps(a.hi, b.hi)}; }
inline Mask And(Mask a, Mask b) { return {_mm256_and_ps(a.lo, b.lo), _mm256_and_ps(a.hi, b.hi)}; }
inline int Count(Mask m) { return __builtin_popcount(_mm256_movemask_ps(m.lo) | _mm256_movemask_ps(m.hi) << 8); }
inline __m256i LanesFrom(int first, int begin, int end) {
  const __m256i lane = _mm256_add_epi32(_mm256_set1_epi32(first), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  return _mm256_and_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(end), lane),
                          _mm256_cmpgt_epi32(lane, _mm256_set1_epi32(begin - 1)));
}
// Lanes [begin, end), 0 <= begin <= end <= 16.
inline Mask Lanes(int begin, int end) {
  return {_mm256_castsi256_ps(LanesFrom(0, begin, end)), _mm256_castsi256_ps(LanesFrom(8, begin, end))};
}
inline Vec Select(Mask m, Vec yes, Vec no) {
  return {_mm256_blendv_ps(no.lo, yes.lo, m.lo), _mm256_blendv_ps(no.hi, yes.hi, m.hi)};
}

inline Vec LoadFirst(const float* p, int count) {
  return {_mm256_maskload_ps(p, LanesFrom(0, 0, count)), _mm256_maskload_ps(p + 8, LanesFrom(8, 0, count))};
}
inline void StoreFirst(float* p, Vec x, int count) {
  _mm256_maskstore_ps(p, LanesFrom(0, 0, count), x.lo);
  _mm256_maskstore_ps(p + 8, LanesFrom(8, 0, count), x.hi);
}

inline __m256 LowHalf(Vec x) { return x.lo; }
inline __m256 HighHalf(Vec x) { return x.hi; }

}  // namespace rankwise::kernels::avx2
