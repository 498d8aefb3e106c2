#pragma once

#include <cmath>

#include "kernels/cuda/device.h"
#include "kernels/cuda/kv_layout.h"
#include "kernels/cuda/numbers.h"

// The cache's values as operands of MultiplyTerms: what a lane loads, and the bf16 terms of it. Integers of eight bits
// are one term; f16 is two, f32 three.
//   K: a lane holds dims 16 t + 4 i + {0 .. 3} of one token and a slab of 64, for steps i = 0 .. 3
//   V: tokens 4 t + {0 .. 3} of dims 8 n + g of a slab of 32, for n = 0 .. 3
// VTerms tells whether all values were finite; others it replaces with 0.
//
// They come to a warp in pieces, of K eight tokens and 64 dims, of V sixteen tokens and 32 dims, copied into the warp's
// own ring of kStages pieces while it multiplies earlier ones. `place` is where a piece begins in it, in words.
namespace rankwise::kernels::cuda {

// Four bytes, none above 2^8 - 1, minus `offset`, as pairs of bf16.
__device__ inline void BytesToPairs(uint32_t bytes, float offset, uint32_t (&terms)[1][2]) {
  float x[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = __uint_as_float(__byte_perm(bytes, 0x4b000000, 0x7440 + i)) - offset;
  terms[0][0] = __byte_perm(__float_as_uint(x[0]), __float_as_uint(x[1]), 0x7632);
  terms[0][1] = __byte_perm(__float_as_uint(x[2]), __float_as_uint(x[3]), 0x7632);
}

__device__ inline bool MakeFinite(float& x) {
  if (fabsf(x) < INFINITY) return true;
  x = 0;
  return false;
}

// Words of 16 bytes, as many as 16 values have.
template <int kCount>
struct Words16 {
  uint4 words[kCount];
  __device__ uint32_t at(int i) const {
    const uint4& w = words[i / 4];
    return i % 4 == 0 ? w.x : i % 4 == 1 ? w.y : i % 4 == 2 ? w.z : w.w;
  }
};

// A piece of values of kBits, and the 16 of a lane: kUnits of 16 bytes, of int4 one of 8.
template <int kBits>
struct Pieces {
  static constexpr int kWords = kBits == 4 ? 2 : 4;
  static constexpr int kUnits = kBits / 2 / kWords;
  static constexpr int kTokenUnits = kUnits * 4;  // of K
  static constexpr int kPieceWords = kUnits * 32 * kWords;
  // 2 KiB for each warp, of f32 4, all but one piece of it on their way: more would cost a multiprocessor blocks.
  static constexpr int kStages = kBits == 32 ? 2 : 32 / kBits;
  static constexpr int kRingWords = kStages * kPieceWords;

  // Eight lanes' accesses meet all banks, both those of consecutive units and those of every lane's i-th one.
  __device__ static int KUnitAt(int token, int unit) {
    if constexpr (kBits == 32) unit ^= unit / 8 ^ token % 2 * 2;
    if constexpr (kBits == 16) unit ^= token % 2;
    return (token * kTokenUnits + unit) * kWords;
  }
  // `tile` begins with the eight tokens; past a row's padding all is zero.
  __device__ static void CopyK(const Shared<uint32_t>& ring, int place, const unsigned char* tile, int head_dim,
                               int slab, int lane) {
    const int row = static_cast<int>(RoundUp(head_dim, 16));
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const int token = (i * 32 + lane) / kTokenUnits, unit = (i * 32 + lane) % kTokenUnits;
      const int dim = slab + unit * (32 * kWords / kBits);
      const unsigned char* from = tile + (token * row + dim) * kBits / 8;
      ring.template CopyAsync<kWords>(place + KUnitAt(token, unit), dim < row ? from : tile, dim < row);
    }
  }
  __device__ static void CopyV(const Shared<uint32_t>& ring, int place, const unsigned char* tile, int slab, int lane) {
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const int unit = i * 32 + lane;
      ring.template CopyAsync<kWords>(place + unit * kWords, tile + (slab * kUnits * 32 + unit) * (kWords * 4), true);
    }
  }
};

// What formats of whole bytes share.
template <int kBits>
struct ByteFragments : Pieces<kBits> {
  using P = Pieces<kBits>;
  using KWords = Words16<P::kUnits>;
  using VWords = Words16<P::kUnits>;
  __device__ static void LoadK(const Shared<uint32_t>& ring, int place, int lane, KWords& k) {
#pragma unroll
    for (int i = 0; i < P::kUnits; ++i) {
      k.words[i] = ring.Load4(place + P::KUnitAt(lane / 4, lane % 4 * P::kUnits + i));
    }
  }
  __device__ static void LoadV(const Shared<uint32_t>& ring, int place, int lane, VWords& v) {
#pragma unroll
    for (int i = 0; i < P::kUnits; ++i) v.words[i] = ring.Load4(place + (i * 32 + lane) * 4);
  }
};

template <KvElement kFormat>
struct KvFragments;

template <>
struct KvFragments<KvElement::kF32> : ByteFragments<32> {
  static constexpr int kTerms = 3;
  static constexpr bool kHasInfinities = true;
  __device__ static float4 Quad(const Words16<4>& words, int i) {
    return {__uint_as_float(words.at(i * 4)), __uint_as_float(words.at(i * 4 + 1)),
            __uint_as_float(words.at(i * 4 + 2)), __uint_as_float(words.at(i * 4 + 3))};
  }
  __device__ static void KTerms(const KWords& k, int i, uint32_t (&terms)[3][2]) { QuadToPairs(Quad(k, i), terms); }
  __device__ static bool VTerms(const VWords& v, int n, uint32_t (&terms)[3][2]) {
    float4 x = Quad(v, n);
    const bool is_finite = MakeFinite(x.x) & MakeFinite(x.y) & MakeFinite(x.z) & MakeFinite(x.w);
    QuadToPairs(x, terms);
    return is_finite;
  }
  __device__ static float Value(const unsigned char* tile, int token, int dim) {
    return *reinterpret_cast<const float*>(tile + VBit(KvElement::kF32, token, dim) / 8);
  }
};

template <>
struct KvFragments<KvElement::kF16> : ByteFragments<16> {
  static constexpr int kTerms = 2;
  static constexpr bool kHasInfinities = true;
  __device__ static float4 Quad(const Words16<2>& words, int i) {
    const uint32_t a = words.at(i * 2), b = words.at(i * 2 + 1);
    return {HalfToFloat(static_cast<uint16_t>(a)), HalfToFloat(static_cast<uint16_t>(a >> 16)),
            HalfToFloat(static_cast<uint16_t>(b)), HalfToFloat(static_cast<uint16_t>(b >> 16))};
  }
  __device__ static void KTerms(const KWords& k, int i, uint32_t (&terms)[2][2]) { QuadToPairs(Quad(k, i), terms); }
  __device__ static bool VTerms(const VWords& v, int n, uint32_t (&terms)[2][2]) {
    float4 x = Quad(v, n);
    const bool is_finite = MakeFinite(x.x) & MakeFinite(x.y) & MakeFinite(x.z) & MakeFinite(x.w);
    QuadToPairs(x, terms);
    return is_finite;
  }
  __device__ static float Value(const unsigned char* tile, int token, int dim) {
    return HalfToFloat(*reinterpret_cast<const uint16_t*>(tile + VBit(KvElement::kF16, token, dim) / 8));
  }
};

// Integers are always finite.
struct IntegerFragments {
  static constexpr int kTerms = 1;
  static constexpr bool kHasInfinities = false;
  __device__ static float Value(const unsigned char*, int, int) { return 0; }
};

template <>
struct KvFragments<KvElement::kInt8> : ByteFragments<8>, IntegerFragments {
  __device__ static void KTerms(const KWords& k, int i, uint32_t (&terms)[1][2]) {
    BytesToPairs(k.at(i) ^ 0x80808080, 8388608.0f + 128.0f, terms);
  }
  __device__ static bool VTerms(const VWords& v, int n, uint32_t (&terms)[1][2]) {
    KTerms(v, n, terms);
    return true;
  }
};

template <>
struct KvFragments<KvElement::kInt8Online> : ByteFragments<8>, IntegerFragments {
  __device__ static void KTerms(const KWords& k, int i, uint32_t (&terms)[1][2]) {
    BytesToPairs(k.at(i), 8388608.0f, terms);
  }
  __device__ static bool VTerms(const VWords& v, int n, uint32_t (&terms)[1][2]) {
    KTerms(v, n, terms);
    return true;
  }
};

template <>
struct KvFragments<KvElement::kInt4Online> : Pieces<4>, IntegerFragments {
  using KWords = uint2;
  using VWords = uint2;
  __device__ static void LoadK(const Shared<uint32_t>& ring, int place, int lane, KWords& k) {
    k = ring.Load2(place + KUnitAt(lane / 4, lane % 4));
  }
  __device__ static void LoadV(const Shared<uint32_t>& ring, int place, int lane, VWords& v) {
    v = ring.Load2(place + lane * 2);
  }
  // Nibbles 4 i .. 4 i + 3 as bytes.
  __device__ static void KTerms(const KWords& k, int i, uint32_t (&terms)[1][2]) {
    const uint32_t nibbles = (i < 2 ? k.x : k.y) >> (i % 2 * 16);
    const uint32_t even = nibbles & 0x0f0f, odd = nibbles >> 4 & 0x0f0f;
    BytesToPairs(__byte_perm(even, odd, 0x5140), 8388608.0f, terms);
  }
  // The low or high nibbles of four bytes.
  __device__ static bool VTerms(const VWords& v, int n, uint32_t (&terms)[1][2]) {
    BytesToPairs((n < 2 ? v.x : v.y) >> (n % 2 * 4) & 0x0f0f0f0f, 8388608.0f, terms);
    return true;
  }
};

}  // namespace rankwise::kernels::cuda
