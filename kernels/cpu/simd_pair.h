#pragma once

// Included by simd_avx2.h and simd_avx512.h, which define RW_ISA: sixteen f32 lanes in a pair of 256-bit registers. The
// vector of AVX2; with AVX-512 the faster one for widening, because one conversion to 512 bits costs more than two to
// 256 (Zen 4, November 2026: matmuls of 2, 3, 4 and 6 rows ran 1.1, 1.3, 1.3 and 1.2 times as fast).
namespace rankwise::kernels::RW_ISA {

struct Pair {
  __m256 lo, hi;
};

template <typename Vector>
struct Words;
template <>
struct Words<Pair> {
  static Pair Zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static Pair Set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static Pair Load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static Pair LoadF16(const void* p) {
    const auto* from = static_cast<const __m128i*>(p);
    return {_mm256_cvtph_ps(_mm_loadu_si128(from)), _mm256_cvtph_ps(_mm_loadu_si128(from + 1))};
  }
  static __m256 WidenBF16(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
  static Pair LoadBF16(const void* p) {
    const auto* from = static_cast<const __m128i*>(p);
    return {WidenBF16(_mm_loadu_si128(from)), WidenBF16(_mm_loadu_si128(from + 1))};
  }
};

inline __m128i LoadBytes(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

inline void Store(float* p, Pair x) {
  _mm256_storeu_ps(p, x.lo);
  _mm256_storeu_ps(p + 8, x.hi);
}
inline Pair Fma(Pair a, Pair b, Pair c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}

}  // namespace rankwise::kernels::RW_ISA
