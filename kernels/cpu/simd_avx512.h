#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#ifndef RW_ISA
#define RW_ISA avx512
#endif
// After the name of the namespace.
#include "kernels/cpu/simd_pair.h"

// Sixteen f32 lanes in one AVX-512 register. simd_avx2.h has the same words over a pair of AVX2 registers.
namespace rankwise::kernels::RW_ISA {

inline constexpr const char* kName = "avx512";
inline constexpr int kAccumulators = 24;  // of 32 registers; the rest hold weights and a broadcast
inline constexpr int kPairTileRows = 6;   // rows up to which a tile of 16-bit weights uses pairs

struct Vec {
  __m512 v;
};
struct Mask {
  __mmask16 bits;
};

inline Vec Zero() { return {_mm512_setzero_ps()}; }
inline Vec Set(float x) { return {_mm512_set1_ps(x)}; }
inline Vec Load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void Store(float* p, Vec x) { _mm512_storeu_ps(p, x.v); }

inline Vec LoadF16(const void* p) {
  const Pair halves = Words<Pair>::LoadF16(p);
  return {_mm512_insertf32x8(_mm512_castps256_ps512(halves.lo), halves.hi, 1)};
}
inline Vec LoadBF16(const void* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline Vec LoadU8(const void* p) { return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(LoadBytes(p)))}; }
inline void StoreF16(void* p, Vec x) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
// Lanes hold integers in [-128, 127].
inline void StoreI8(void* p, Vec x) {
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x.v)));
}
// Lanes hold integers in [0, 255].
inline void StoreU8(void* p, Vec x) {
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x.v)));
}

// Sixteen words of eight values of four bits; value kIndex, or `index`, of each.
struct NibbleWords {
  __m512i words;
};
inline NibbleWords LoadNibbleWords(const void* p) { return {_mm512_loadu_si512(p)}; }
// A permutation looks at four bits of each word: one instruction instead of a mask and a conversion.
inline Vec NibblesToFloats(__m512i words) {
  const __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return {_mm512_permutexvar_ps(words, table)};
}
template <int kIndex>
inline Vec Nibble(NibbleWords x) {
  return NibblesToFloats(_mm512_srli_epi32(x.words, 4 * kIndex));
}
inline Vec Nibble(NibbleWords x, int index) {
  return NibblesToFloats(_mm512_srl_epi32(x.words, _mm_cvtsi32_si128(4 * index)));
}

inline Vec Fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec Add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec Sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec Mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec Div(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
// When either is NaN: b.
inline Vec Max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec Min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec Abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
inline Vec Negate(Vec a) { return {_mm512_xor_ps(a.v, _mm512_set1_ps(-0.0f))}; }
inline Vec RoundHalfEven(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// a 2^n for whole n in [-126, 127], where the product is a normal number.
inline Vec TimesPowerOfTwo(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }

inline Mask Less(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
inline Mask IsNan(Vec a) { return {_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q)}; }
inline Mask Or(Mask a, Mask b) { return {static_cast<__mmask16>(a.bits | b.bits)}; }
inline Mask And(Mask a, Mask b) { return {static_cast<__mmask16>(a.bits & b.bits)}; }
inline int Count(Mask m) { return __builtin_popcount(m.bits); }
// Lanes [begin, end), 0 <= begin <= end <= 16.
inline Mask Lanes(int begin, int end) { return {static_cast<__mmask16>((0xffffu << begin) & ((1u << end) - 1))}; }
inline Vec Select(Mask m, Vec yes, Vec no) { return {_mm512_mask_blend_ps(m.bits, no.v, yes.v)}; }

inline Vec LoadFirst(const float* p, int count) { return {_mm512_maskz_loadu_ps(Lanes(0, count).bits, p)}; }
inline void StoreFirst(float* p, Vec x, int count) { _mm512_mask_storeu_ps(p, Lanes(0, count).bits, x.v); }

template <>
struct Words<Vec> {
  static Vec Zero() { return RW_ISA::Zero(); }
  static Vec Set(float x) { return RW_ISA::Set(x); }
  static Vec Load(const float* p) { return RW_ISA::Load(p); }
  static Vec LoadF16(const void* p) { return RW_ISA::LoadF16(p); }
  static Vec LoadBF16(const void* p) { return RW_ISA::LoadBF16(p); }
};

inline __m256 LowHalf(Vec x) { return _mm512_castps512_ps256(x.v); }
inline __m256 HighHalf(Vec x) { return _mm512_extractf32x8_ps(x.v, 1); }

}  // namespace rankwise::kernels::RW_ISA
