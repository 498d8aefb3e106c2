// Included after row_kernels.h.
#pragma once

#include <type_traits>

#include "kernels/cpu/isa_kernels.h"

namespace rankwise::kernels::RW_ISA {

// Rotates one head in place: (a, b) -> (fma(a, cos, -(b sin)), fma(b, cos, a sin)), each as written, in f32. The order
// is the contract of all backends, so that they store the same K.
inline void RotateHead(float* x, const float* cos, const float* sin, int half) {
  ForLanes(half, [&](int64_t i, int n) {
    const Vec a = LoadFirst(x + i, n), b = LoadFirst(x + half + i, n);
    const Vec c = LoadFirst(cos + i, n), s = LoadFirst(sin + i, n);
    StoreFirst(x + i, Fma(a, c, Negate(Mul(b, s))), n);
    StoreFirst(x + half + i, Fma(b, c, Mul(a, s)), n);
  });
}

// Sixteen values, the first `count` of which matter, as they are stored. Each returns how many of those saturated.
inline int64_t Quantize(float* stored, Vec x, int, const float*, const float*) {
  Store(stored, x);
  return 0;
}
inline int64_t Quantize(F16* stored, Vec x, int count, const float*, const float*) {
  const Mask over = And(Less(Set(65519.996f), Abs(x)), Lanes(0, count));
  // NaN passes: Max and Min give their second argument.
  StoreF16(stored, Min(Set(65504.0f), Max(Set(-65504.0f), x)));
  return Count(over);
}
inline int64_t Quantize(int8_t* stored, Vec x, int count, const float* scale, const float* zero_point) {
  const Vec q = RoundHalfEven(Div(Sub(x, Load(zero_point)), Load(scale)));
  const Mask nan = IsNan(q);
  const Mask over = Or(nan, Or(Less(q, Set(-128.0f)), Less(Set(127.0f), q)));
  StoreI8(stored, Select(nan, Zero(), Min(Set(127.0f), Max(Set(-128.0f), q))));
  return Count(And(over, Lanes(0, count)));
}

// The range of one head's values, and the values as they are stored under it. Returns how many were not finite in f16.
template <typename T>
int64_t QuantizeOnline(const RopeAppendTask& task, const float* x, OnlineRange& range, uint8_t* stored) {
  const Vec most = Set(65504.0f), least = Set(-65504.0f);
  Vec min = most, max = least;
  ForLanes(task.head_dim, [&](int64_t i, int n) {
    const Vec v = LoadFirst(x + i, n);
    const Mask lanes = Lanes(0, n);
    // NaN passes the first, and not the second.
    const Vec clamped = Min(most, Max(least, v));
    min = Select(lanes, Min(clamped, min), min);
    max = Select(lanes, Max(clamped, max), max);
  });
  const float low = MinLane(min), high = MaxLane(max);
  range = low <= high ? task.online_range(low, high, T::kLevels) : task.online_range(0, 0, T::kLevels);
  const float scale = Widen(F16{range.scale});
  const Vec divisor = Set(scale > 0 ? scale : 1.0f), zero = Set(Widen(F16{range.zero}));
  int64_t saturated = 0;
  ForLanes(task.head_dim, [&](int64_t i, int n) {
    const Vec v = LoadFirst(x + i, n);
    const Mask nan = IsNan(v);
    saturated += Count(And(Or(nan, Less(most, Abs(v))), Lanes(0, n)));
    const Vec q = RoundHalfEven(Div(Sub(v, zero), divisor));
    alignas(16) uint8_t whole[16];
    StoreU8(whole, Select(nan, Zero(), Min(Set(T::kLevels), Max(Zero(), q))));
    std::memcpy(stored + i, whole, n);
  });
  return saturated;
}

// Element (major, minor) of a tile of stored integers.
template <typename T, typename Q>
inline void StorePaired(T* tile, int64_t major, int64_t minor, int64_t width, Q q) {
  static_assert(sizeof(T) == 1 && sizeof(Q) == 1);
  auto* bytes = reinterpret_cast<uint8_t*>(tile);
  if constexpr (std::is_same_v<T, U4>) {
    uint8_t& pair = bytes[PairedNibbleOffset(major, minor, width)];
    pair = static_cast<uint8_t>(IsUpperNibble(major) ? (pair & 0x0f) | q << 4 : (pair & 0xf0) | q);
  } else {
    bytes[PairedOffset(major, minor, width)] = static_cast<uint8_t>(q);
  }
}

template <typename T>
int64_t AppendOnline(const RopeAppendTask& task, const float* k, const float* v, const KvSlot& to) {
  alignas(64) uint8_t stored[kLargestHeadDim];
  OnlineRange range;
  int64_t saturated = QuantizeOnline<T>(task, k, range, stored);
  to.online->k_scale[to.slot] = range.scale;
  to.online->k_zero[to.slot] = range.zero;
  for (int32_t d = 0; d < task.head_dim; ++d) {
    StorePaired(static_cast<T*>(to.k), d, to.slot, kKvBlockTokens, stored[d]);
  }
  saturated += QuantizeOnline<T>(task, v, range, stored);
  to.online->v_scale[to.slot] = range.scale;
  to.online->v_zero[to.slot] = range.zero;
  for (int32_t d = 0; d < task.head_dim; ++d) {
    StorePaired(static_cast<T*>(to.v), to.slot, d, task.padded_dim, stored[d]);
  }
  return saturated;
}

// One head's K into the block's columns [head_dim, 16], or V into its rows [16, padded_dim].
template <typename T>
int64_t AppendK(const RopeAppendTask& task, const float* k, const KvSlot& to) {
  T* tile = static_cast<T*>(to.k);
  int64_t saturated = 0;
  ForLanes(task.head_dim, [&](int64_t i, int n) {
    T stored[16];
    saturated += Quantize(stored, LoadFirst(k + i, n), n, to.scales.k_scale + i, to.scales.k_zero_point + i);
    for (int j = 0; j < n; ++j) {
      if constexpr (kIsInteger<T>) {
        StorePaired(tile, i + j, to.slot, kKvBlockTokens, stored[j]);
      } else {
        tile[(i + j) * kKvBlockTokens + to.slot] = stored[j];
      }
    }
  });
  return saturated;
}
template <typename T>
int64_t AppendV(const RopeAppendTask& task, const float* v, const KvSlot& to) {
  T* tile = static_cast<T*>(to.v);
  int64_t saturated = 0;
  ForLanes(task.head_dim, [&](int64_t i, int n) {
    T stored[16];
    saturated += Quantize(stored, LoadFirst(v + i, n), n, to.scales.v_scale + i, to.scales.v_zero_point + i);
    if constexpr (kIsInteger<T>) {
      for (int j = 0; j < n; ++j) StorePaired(tile, to.slot, i + j, task.padded_dim, stored[j]);
    } else {
      std::memcpy(tile + int64_t{to.slot} * task.padded_dim + i, stored, sizeof(stored));
    }
  });
  return saturated;
}

// NaN leaves both as they are.
inline void Observe(float* min, float* max, const float* x, int64_t dims) {
  ForLanes(dims, [&](int64_t i, int n) {
    const Vec v = LoadFirst(x + i, n);
    StoreFirst(min + i, Min(v, LoadFirst(min + i, n)), n);
    StoreFirst(max + i, Max(v, LoadFirst(max + i, n)), n);
  });
}

template <typename T>
int64_t RopeAppendHead(const RopeAppendTask& task, int64_t row, int32_t position, int32_t head, const KvSlot& to) {
  const int64_t dims = task.head_dim;
  const int32_t group = task.n_heads / task.n_kv_heads, half = task.rotary_dim / 2;
  float* q = task.qkv + row * task.qkv_stride + head * group * dims;
  float* k = task.qkv + row * task.qkv_stride + (task.n_heads + head) * dims;
  const float* v = k + task.n_kv_heads * dims;
  for (int32_t h = 0; h <= group; ++h) {
    float* x = h < group ? q + h * dims : k;
    const float* norm = h < group ? task.q_norm : task.k_norm;
    if (norm) RmsNormRow(x, x, norm, dims, task.norm_eps);
    RotateHead(x, task.cos + int64_t{position} * half, task.sin + int64_t{position} * half, half);
  }
  if (task.k_min) {
    Observe(task.k_min + head * dims, task.k_max + head * dims, k, dims);
    Observe(task.v_min + head * dims, task.v_max + head * dims, v, dims);
  }
  if constexpr (kIsOnline<T>) {
    return AppendOnline<T>(task, k, v, to);
  } else {
    return AppendK<T>(task, k, to) + AppendV<T>(task, v, to);
  }
}

}  // namespace rankwise::kernels::RW_ISA
