// Included after simd.h.
#pragma once

#include "kernels/cpu/isa_kernels.h"

// Sixteen i32 lanes in a pair of AVX2 registers, each the sum of products of four bytes: the words of
// dot_avx512_vnni.h. maddubs adds two products in sixteen bits and saturates, so bytes are first moved to [-128, 127],
// and their signs to the activations: 2 * 128 * 127 < 2^15. Bytes below 16 have room for four products.
namespace rankwise::kernels::RW_ISA {

inline constexpr const char* kDotName = "avx2";
inline constexpr int kDotTileRows = 4;     // with one vector 8 of 16 registers
inline constexpr int kDotTileVectors = 1;  // of a panel's two, that one pass of a tile takes

// How a pair of words of 32 columns is stored: of bytes; of four bits, where one word holds both.
struct Bytes {
  uint32_t words[2][kPanelColumns];
};
struct Nibbles {
  uint32_t words[kPanelColumns];
};
// What is subtracted from weights before they are multiplied.
template <typename Q>
inline constexpr int kWeightOffset = 0;
template <>
inline constexpr int kWeightOffset<Bytes> = 128;

struct Ints {
  __m256i lo, hi;
};
inline Ints ZeroInts() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline Ints Add(Ints a, Ints b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
inline Vec ToFloats(Ints a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
// offset - zeros[i]
inline Ints OffsetMinus(int offset, const U8* zeros) {
  const __m128i x = LoadBytes(zeros);
  const __m256i from = _mm256_set1_epi32(offset);
  return {_mm256_sub_epi32(from, _mm256_cvtepu8_epi32(x)),
          _mm256_sub_epi32(from, _mm256_cvtepu8_epi32(_mm_unpackhi_epi64(x, x)))};
}
// a[i] in sixteen bits times b, a number of sixteen bits whose upper half is 0.
inline Ints TimesSixteenBits(Ints a, uint32_t b) {
  const __m256i x = _mm256_set1_epi32(static_cast<int>(b));
  return {_mm256_madd_epi16(a.lo, x), _mm256_madd_epi16(a.hi, x)};
}

inline Ints LoadWords(const uint32_t* words) {
  const auto* from = reinterpret_cast<const __m256i*>(words);
  return {_mm256_loadu_si256(from), _mm256_loadu_si256(from + 1)};
}

struct WordPair {
  Ints even, odd;
};
inline WordPair LoadPair(const Nibbles* pair, int v) {
  const Ints words = LoadWords(pair->words + v * 16);
  const __m256i lower = _mm256_set1_epi8(15);
  return {{_mm256_and_si256(words.lo, lower), _mm256_and_si256(words.hi, lower)},
          {_mm256_and_si256(_mm256_srli_epi16(words.lo, 4), lower),
           _mm256_and_si256(_mm256_srli_epi16(words.hi, 4), lower)}};
}
inline __m256i DotOfSmall(__m256i sum, __m256i even, __m256i odd, __m256i x_even, __m256i x_odd) {
  const __m256i four = _mm256_add_epi16(_mm256_maddubs_epi16(even, x_even), _mm256_maddubs_epi16(odd, x_odd));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(four, _mm256_set1_epi16(1)));
}
inline __m256i DotOfSigned(__m256i sum, __m256i weights, __m256i size, __m256i x) {
  const __m256i two = _mm256_maddubs_epi16(size, _mm256_sign_epi8(x, weights));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(two, _mm256_set1_epi16(1)));
}

// One pair of words of V vectors from `v0` on times the words x [2, R]. One chain takes both.
template <int C, int R, int V>
[[gnu::always_inline]] inline void DotPair(const Nibbles* pair, int v0, const uint32_t* x, Ints (&sums)[C][R][V]) {
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) {
    const WordPair w = LoadPair(pair, v0 + v);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const __m256i even = _mm256_set1_epi32(static_cast<int>(x[r])),
                    odd = _mm256_set1_epi32(static_cast<int>(x[R + r]));
      Ints& sum = sums[0][r][v];
      sum = {DotOfSmall(sum.lo, w.even.lo, w.odd.lo, even, odd), DotOfSmall(sum.hi, w.even.hi, w.odd.hi, even, odd)};
    }
  }
}
template <int C, int R, int V>
[[gnu::always_inline]] inline void DotPair(const Bytes* pair, int v0, const uint32_t* x, Ints (&sums)[C][R][V]) {
  const __m256i offset = _mm256_set1_epi8(-128);
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const Ints words = LoadWords(pair->words[half] + (v0 + v) * 16);
      const __m256i lo = _mm256_xor_si256(words.lo, offset), hi = _mm256_xor_si256(words.hi, offset);
      const __m256i lo_size = _mm256_abs_epi8(lo), hi_size = _mm256_abs_epi8(hi);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const __m256i a = _mm256_set1_epi32(static_cast<int>(x[half * R + r]));
        Ints& sum = sums[0][r][v];
        sum = {DotOfSigned(sum.lo, lo, lo_size, a), DotOfSigned(sum.hi, hi, hi_size, a)};
      }
    }
  }
}

// Thirty-two i16, two of them in each lane of Ints.
struct Shorts {
  __m256i lo, hi;
};
inline Shorts WidenSigned(const void* p) {
  const auto* from = static_cast<const __m128i*>(p);
  return {_mm256_cvtepi8_epi16(_mm_loadu_si128(from)), _mm256_cvtepi8_epi16(_mm_loadu_si128(from + 1))};
}
inline Shorts WidenUnsigned(const void* p) {
  const auto* from = static_cast<const __m128i*>(p);
  return {_mm256_cvtepu8_epi16(_mm_loadu_si128(from)), _mm256_cvtepu8_epi16(_mm_loadu_si128(from + 1))};
}
inline Shorts LowerNibbles(Shorts bytes) {
  const __m256i lower = _mm256_set1_epi16(15);
  return {_mm256_and_si256(bytes.lo, lower), _mm256_and_si256(bytes.hi, lower)};
}
inline Shorts UpperNibbles(Shorts bytes) { return {_mm256_srli_epi16(bytes.lo, 4), _mm256_srli_epi16(bytes.hi, 4)}; }
// sum + both products of each lane with the pair of i16 in `pair`.
inline void AddProducts(Ints& sum, Shorts a, const uint32_t& pair) {
  const __m256i b = _mm256_set1_epi32(static_cast<int>(pair));
  sum = Add(sum, {_mm256_madd_epi16(a.lo, b), _mm256_madd_epi16(a.hi, b)});
}
// Sixteen i16 in a row. Lanes hold integers in [-32768, 32767], or NaN, of which any number becomes.
inline void StoreI16(void* p, Vec x) {
  const __m256i pairs = _mm256_packs_epi32(_mm256_cvtps_epi32(x.lo), _mm256_cvtps_epi32(x.hi));
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm256_permute4x64_epi64(pairs, 0xd8));
}

// Two maddubs to a madd: what bytes below 16 reach.
inline int32_t DotBurst(int64_t iterations) {
  __m256i sums[kDotChains], a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(-5);
#pragma GCC unroll 12
  for (int i = 0; i < kDotChains; ++i) sums[i] = _mm256_set1_epi32(i);
  for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 12
    for (int i = 0; i < kDotChains; ++i) {
      sums[i] = DotOfSmall(sums[i], a, b, b, a);
      // Else the compiler would multiply once for all.
      asm volatile("" : "+x"(a), "+x"(b));
    }
  }
  __m256i sum = _mm256_setzero_si256();
#pragma GCC unroll 12
  for (int i = 0; i < kDotChains; ++i) sum = _mm256_add_epi32(sum, sums[i]);
  return _mm256_extract_epi32(sum, 0) ^ _mm256_extract_epi32(sum, 5);
}

}  // namespace rankwise::kernels::RW_ISA
