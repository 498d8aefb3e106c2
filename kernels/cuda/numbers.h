#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/cuda/device.h"

// Number formats and sums over threads, for kernels.
namespace rankwise::kernels::cuda {

constexpr uint32_t kAllLanes = 0xffffffff;

__device__ inline float HalfToFloat(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
__device__ inline uint16_t FloatToHalf(float x) { return __half_as_ushort(__float2half_rn(x)); }
__device__ inline float BFloat16ToFloat(uint16_t bits) { return __uint_as_float(uint32_t{bits} << 16); }

// Sum or maximum over a warp, the same bits in all lanes: lanes i and i ^ 16, then ^ 8, ...
__device__ inline float WarpSum(float x) {
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
  return x;
}
__device__ inline float WarpMax(float x) {
  for (int distance = 16; distance > 0; distance /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, distance));
  return x;
}

// Sum over a block, the same bits in all threads; `scratch` holds a float per warp.
template <int kThreads>
__device__ inline float BlockSum(float x, const Shared<float>& scratch) {
  x = WarpSum(x);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = scratch[0];
  for (int warp = 1; warp < kThreads / 32; ++warp) sum += scratch[warp];
  __syncthreads();
  return sum;
}

// x [2] = Σ of kTerms pairs of bf16, each with the next eight bits: exact for 8 kTerms bits of significand. An infinity
// becomes a NaN where there are two terms or more.
template <int kTerms>
__device__ inline void SplitPair(float x0, float x1, uint32_t (&terms)[kTerms]) {
#pragma unroll
  for (int i = 0; i < kTerms; ++i) {
    const uint32_t bits0 = __float_as_uint(x0), bits1 = __float_as_uint(x1);
    terms[i] = __byte_perm(bits0, bits1, 0x7632);
    if (i + 1 < kTerms) {
      x0 -= __uint_as_float(bits0 & 0xffff0000);
      x1 -= __uint_as_float(bits1 & 0xffff0000);
    }
  }
}

template <int kTerms>
__device__ inline void QuadToPairs(const float4& x, uint32_t (&terms)[kTerms][2]) {
  uint32_t first[kTerms], second[kTerms];
  SplitPair(x.x, x.y, first);
  SplitPair(x.z, x.w, second);
#pragma unroll
  for (int i = 0; i < kTerms; ++i) {
    terms[i][0] = first[i];
    terms[i][1] = second[i];
  }
}

}  // namespace rankwise::kernels::cuda
