#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/cuda/kernels.h"

// Where the values of one KV head lie in one block of kBlockTokens tokens: {K tile, V tile, OnlineParameters}. Both
// tiles are in the order in which attention's fragments take them, so that a lane loads 16 bytes at a time (8 of int4).
namespace rankwise::kernels::cuda {

constexpr int kBlockTokens = 16;

// Scales and zeros of the online formats, f16.
struct OnlineParameters {
  uint16_t k_scale[kBlockTokens], k_zero[kBlockTokens], v_scale[kBlockTokens], v_zero[kBlockTokens];
};

constexpr int BitsOf(KvElement format) {
  return format == KvElement::kF32 ? 32 : format == KvElement::kF16 ? 16 : format == KvElement::kInt4Online ? 4 : 8;
}
constexpr bool IsOnline(KvElement format) {
  return format == KvElement::kInt8Online || format == KvElement::kInt4Online;
}
// body(std::integral_constant of `format`), which names a kernel's instantiation.
template <typename Body>
cudaError_t WithFormat(KvElement format, Body&& body) {
  switch (format) {
    case KvElement::kF32:
      return body(std::integral_constant<KvElement, KvElement::kF32>());
    case KvElement::kF16:
      return body(std::integral_constant<KvElement, KvElement::kF16>());
    case KvElement::kInt8:
      return body(std::integral_constant<KvElement, KvElement::kInt8>());
    case KvElement::kInt8Online:
      return body(std::integral_constant<KvElement, KvElement::kInt8Online>());
    case KvElement::kInt4Online:
      return body(std::integral_constant<KvElement, KvElement::kInt4Online>());
  }
  return cudaErrorInvalidValue;
}

constexpr int64_t RoundUp(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

// K [tokens, head_dim rounded up to 16]; a row's padding is zero. Where a value begins, in bits.
constexpr int64_t KTileBytes(KvElement format, int64_t head_dim) {
  return kBlockTokens * RoundUp(head_dim, 16) * BitsOf(format) / 8;
}
constexpr int64_t KBit(KvElement format, int64_t head_dim, int token, int64_t dim) {
  return (token * RoundUp(head_dim, 16) + dim) * BitsOf(format);
}

// V [head_dim / 32][loads][lane = dim % 8 * 4 + token / 4] words of 16 bytes, each some of the lane's sixteen values
// [dim / 8 % 4][token % 4]. Of int4 a byte holds dims d and d + 8 of one token, d % 16 < 8, so that no two tokens share
// one; a lane's eight bytes are [dim / 16 % 2][token % 4].
constexpr int64_t VTileBytes(KvElement format, int64_t head_dim) {
  return kBlockTokens * RoundUp(head_dim, 32) * BitsOf(format) / 8;
}
constexpr int64_t VBit(KvElement format, int token, int64_t dim) {
  const int bits = BitsOf(format);
  const int64_t lane = dim % 8 * 4 + token / 4, part = dim / 8 % 4, slab_bits = int64_t{512} * bits;
  if (format == KvElement::kInt4Online) {
    return dim / 32 * slab_bits + lane * 64 + (part / 2 * 4 + token % 4) * 8 + part % 2 * 4;
  }
  const int64_t index = part * 4 + token % 4, per_word = 128 / bits;
  return dim / 32 * slab_bits + index / per_word * (32 * 128) + lane * 128 + index % per_word * bits;
}

constexpr int64_t KvBlockBytes(KvElement format, int64_t head_dim) {
  return KTileBytes(format, head_dim) + VTileBytes(format, head_dim) +
         (IsOnline(format) ? static_cast<int64_t>(sizeof(OnlineParameters)) : 0);
}

}  // namespace rankwise::kernels::cuda
