// Included after simd.h.
#pragma once

#include "kernels/cpu/isa_kernels.h"

namespace rankwise::kernels::RW_ISA {

// Calls body(i, count) for each 16 or fewer elements of [0, width).
template <typename Body>
inline void ForLanes(int64_t width, Body&& body) {
  int64_t i = 0;
  for (; i + 16 <= width; i += 16) body(i, 16);
  if (i < width) body(i, static_cast<int>(width - i));
}

template <typename T>
void Widen(float* out, const void* row, int64_t width) {
  const T* from = static_cast<const T*>(row);
  ForLanes(width, [&](int64_t i, int n) {
    if (n == 16) {
      Store(out + i, Load(from + i));
    } else {
      StoreFirst(out + i, LoadFirst(from + i, n), n);
    }
  });
}

// Rounding |x - exact| <= 2^-24 (|x + delta + bias| + |delta + bias|), up to second order.
inline void AddRow(float* x, const float* delta, const float* bias, int64_t width) {
  ForLanes(width, [&](int64_t i, int n) {
    Vec d = LoadFirst(delta + i, n);
    if (bias) d = Add(d, LoadFirst(bias + i, n));
    StoreFirst(x + i, Add(LoadFirst(x + i, n), d), n);
  });
}

// out = x / sqrt(mean(x²) + eps) * weight
//   64 interleaved fma chains: element i belongs to chain i mod 64; four vectors add as (0 + 1) + (2 + 3), then
//   SumLanes.
// Rounding the sum has relative error (width / 64 + 8) 2^-24 and enters under a square root:
//          |out - exact| <= (width / 128 + 9) 2^-24 |exact|, up to second order
inline void RmsNormRow(float* out, const float* x, const float* weight, int64_t width, float eps) {
  Vec sum[4] = {Zero(), Zero(), Zero(), Zero()};
  int64_t i = 0;
  for (; i + 64 <= width; i += 64) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Vec v = Load(x + i + j * 16);
      sum[j] = Fma(v, v, sum[j]);
    }
  }
  for (int j = 0; i < width; i += 16, ++j) {
    const Vec v = LoadFirst(x + i, static_cast<int>(Smaller<int64_t>(16, width - i)));
    sum[j] = Fma(v, v, sum[j]);
  }
  const float squares = SumLanes(Add(Add(sum[0], sum[1]), Add(sum[2], sum[3])));
  const Vec factor = Set(1.0f / __builtin_sqrtf(squares / static_cast<float>(width) + eps));
  ForLanes(width, [&](int64_t k, int n) {
    StoreFirst(out + k, Mul(Mul(LoadFirst(x + k, n), factor), LoadFirst(weight + k, n)), n);
  });
}

// out = gate / (1 + exp(-gate)) * up
// Rounding the exponential within 2^-22, then three roundings: |out - exact| <= 8 * 2^-24 |exact| + 2^-126 |gate up|
inline void SiluMulRow(float* out, const float* gate, const float* up, int64_t width) {
  ForLanes(width, [&](int64_t i, int n) {
    const Vec g = LoadFirst(gate + i, n);
    const Vec silu = Div(g, Add(Set(1.0f), Exp(Negate(g))));
    StoreFirst(out + i, Mul(silu, LoadFirst(up + i, n)), n);
  });
}

}  // namespace rankwise::kernels::RW_ISA
