// Included after simd.h.
#pragma once

#include "kernels/cpu/isa_kernels.h"

// Sixteen i32 lanes, each the sum of products of four bytes. dot_avx2.h has the same words over pairs of registers.
namespace rankwise::kernels::RW_ISA {

inline constexpr const char* kDotName = "avx512-vnni";
inline constexpr int kDotTileRows = 8;     // with two vectors 16 of 32 registers; 12 rows are no faster
inline constexpr int kDotTileVectors = 2;  // of a panel's two, that one pass of a tile takes

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

struct Ints {
  __m512i v;
};
inline Ints ZeroInts() { return {_mm512_setzero_si512()}; }
inline Ints Add(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline Vec ToFloats(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }
// offset - zeros[i]
inline Ints OffsetMinus(int offset, const U8* zeros) {
  return {_mm512_sub_epi32(_mm512_set1_epi32(offset), _mm512_cvtepu8_epi32(LoadBytes(zeros)))};
}
// a[i] in sixteen bits times b, a number of sixteen bits whose upper half is 0.
inline Ints TimesSixteenBits(Ints a, uint32_t b) {
  return {_mm512_madd_epi16(a.v, _mm512_set1_epi32(static_cast<int>(b)))};
}

struct WordPair {
  __m512i even, odd;
};
inline WordPair LoadPair(const Bytes* pair, int v) {
  return {_mm512_loadu_si512(pair->words[0] + v * 16), _mm512_loadu_si512(pair->words[1] + v * 16)};
}
inline WordPair LoadPair(const Nibbles* pair, int v) {
  const __m512i words = _mm512_loadu_si512(pair->words + v * 16), lower = _mm512_set1_epi8(15);
  return {_mm512_and_si512(words, lower), _mm512_and_si512(_mm512_srli_epi16(words, 4), lower)};
}
// GCC 12 would hold the broadcasts in registers, and sums on the stack from 16 of them on.
inline void AddDot(Ints& sum, __m512i weights, const uint32_t& x) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum.v) : "v"(weights), "m"(x));
}

// One pair of words of V vectors from `v0` on times the words x [2, R]. Chain 0 takes the even words, the last the odd.
template <int C, int R, int V, typename Q>
[[gnu::always_inline]] inline void DotPair(const Q* pair, int v0, const uint32_t* x, Ints (&sums)[C][R][V]) {
  WordPair weights[V];
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) weights[v] = LoadPair(pair, v0 + v);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) AddDot(sums[0][r][v], weights[v].even, x[r]);
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) AddDot(sums[C - 1][r][v], weights[v].odd, x[R + r]);
  }
}

// Thirty-two i16, two of them in each lane of Ints.
struct Shorts {
  __m512i v;
};
inline Shorts WidenSigned(const void* p) {
  return {_mm512_cvtepi8_epi16(_mm256_loadu_si256(static_cast<const __m256i*>(p)))};
}
inline Shorts WidenUnsigned(const void* p) {
  return {_mm512_cvtepu8_epi16(_mm256_loadu_si256(static_cast<const __m256i*>(p)))};
}
inline Shorts LowerNibbles(Shorts bytes) { return {_mm512_and_si512(bytes.v, _mm512_set1_epi16(15))}; }
inline Shorts UpperNibbles(Shorts bytes) { return {_mm512_srli_epi16(bytes.v, 4)}; }
// sum + both products of each lane with the pair of i16 in `pair`.
inline void AddProducts(Ints& sum, Shorts a, const uint32_t& pair) {
  asm("vpdpwssd %2%{1to16%}, %1, %0" : "+v"(sum.v) : "v"(a.v), "m"(pair));
}
// Sixteen i16 in a row. Lanes hold integers in [-32768, 32767], or NaN, of which any number becomes.
inline void StoreI16(void* p, Vec x) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(x.v)));
}

inline int32_t DotBurst(int64_t iterations) {
  __m512i sums[kDotChains], a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(-5);
#pragma GCC unroll 12
  for (int i = 0; i < kDotChains; ++i) sums[i] = _mm512_set1_epi32(i);
  for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 12
    for (int i = 0; i < kDotChains; ++i) sums[i] = _mm512_dpbusd_epi32(sums[i], a, b);
    // Else the compiler might add up equal products.
    asm volatile("" : "+v"(a), "+v"(b));
  }
  __m512i sum = _mm512_setzero_si512();
#pragma GCC unroll 12
  for (int i = 0; i < kDotChains; ++i) sum = _mm512_add_epi32(sum, sums[i]);
  return _mm512_reduce_add_epi32(sum);
}

}  // namespace rankwise::kernels::RW_ISA
