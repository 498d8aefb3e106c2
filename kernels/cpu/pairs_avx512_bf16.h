// Included after simd.h.
#pragma once

#include "kernels/cpu/isa_kernels.h"

// Sixteen words of two bf16, and their products by vdpbf16ps: of each lane first an fma of the upper halves, then one
// of the lower, both rounded half to even, denormals taken for zeros on the way in and out (Intel SDM; AMD's Zen 4
// gives the bits of two fmas under FTZ and DAZ).
namespace rankwise::kernels::RW_ISA {

struct BF16Pair {
  uint32_t bits;  // the earlier column in the upper half
};
struct Pairs {
  __m512bh v;
};

template <typename Vector>
inline Pairs LoadAs(const BF16Pair* p) {
  return {reinterpret_cast<__m512bh>(_mm512_loadu_si512(p))};
}
// Words of x are broadcast as if they were floats.
inline Vec Fma(Vec x, Pairs weights, Vec sum) {
  return {_mm512_dpbf16_ps(sum.v, weights.v, reinterpret_cast<__m512bh>(x.v))};
}

// The first `count` columns at x, 32 at most, as pairs; zeros behind them.
inline void PairColumns(const float* x, int count, uint32_t* words) {
  const Vec first = LoadFirst(x, Smaller(count, 16));
  const Vec second = count > 16 ? LoadFirst(x + 16, count - 16) : Zero();
  const auto columns = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second.v, first.v));
  _mm512_storeu_si512(words, _mm512_rol_epi32(columns, 16));
}

inline float DotBurst(int64_t iterations) {
  __m512 sums[kPairChains];
  __m512i a = _mm512_set1_epi32(0x3f7f3f7f), b = _mm512_set1_epi32(0x3c003c00);
#pragma GCC unroll 24
  for (int i = 0; i < kPairChains; ++i) sums[i] = _mm512_set1_ps(static_cast<float>(i));
  for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 24
    for (int i = 0; i < kPairChains; ++i) {
      sums[i] = _mm512_dpbf16_ps(sums[i], reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
    }
    // Else the compiler might add up equal products.
    asm volatile("" : "+v"(a), "+v"(b));
  }
  Vec sum = Zero();
#pragma GCC unroll 24
  for (int i = 0; i < kPairChains; ++i) sum = Add(sum, Vec{sums[i]});
  return SumLanes(sum);
}

}  // namespace rankwise::kernels::RW_ISA
