#include "kernels/cuda/device.h"
#include "worker/comm/nccl_sum.h"

namespace rankwise::comm {
namespace {

constexpr int kThreads = 128;
constexpr int kLevels = 11;  // of a tree over at most 2^10 parts

__device__ float4 Plus(float4 a, float4 b) { return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w}; }
__device__ float Plus(float a, float b) { return a + b; }

// The tree of AllReduceSum, from left to right: level l holds the sum of 2^l parts that waits for its right sibling.
// What waits at the end has no sibling and is added from the right, as p plus the others demands. A thread sums one T.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    SumPartsKernel(T* sum, const T* parts, int part_count, int64_t stride, int64_t count) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= count) return;
  T waiting[kLevels] = {};
#pragma unroll 4
  for (int part = 0; part < part_count; ++part) {
    T value = parts[part * stride + i];
#pragma unroll
    for (int level = 0; level < kLevels; ++level) {
      const int below = (1 << level) - 1;
      if ((part & below) != below) continue;  // merged on a level below
      if (part >> level & 1) {
        value = Plus(waiting[level], value);
      } else {
        waiting[level] = value;
      }
    }
  }
  T total = {};
  bool is_first = true;
#pragma unroll
  for (int level = 0; level < kLevels; ++level) {
    if (!(part_count >> level & 1)) continue;
    total = is_first ? waiting[level] : Plus(waiting[level], total);
    is_first = false;
  }
  sum[i] = total;
}

template <typename T>
cudaError_t Sum(T* sum, const T* parts, int part_count, int64_t stride, int64_t count, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((count + kThreads - 1) / kThreads));
  return kernels::cuda::Launch(SumPartsKernel<T>, grid, kThreads, 0, stream, sum, parts, part_count, stride, count);
}

bool IsAligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % sizeof(float4) == 0; }

}  // namespace

cudaError_t SumParts(float* sum, const float* parts, int part_count, int64_t stride, int64_t count,
                     cudaStream_t stream) {
  if (count % 4 != 0 || stride % 4 != 0 || !IsAligned(sum) || !IsAligned(parts)) {
    return Sum(sum, parts, part_count, stride, count, stream);
  }
  return Sum(reinterpret_cast<float4*>(sum), reinterpret_cast<const float4*>(parts), part_count, stride / 4, count / 4,
             stream);
}

}  // namespace rankwise::comm
