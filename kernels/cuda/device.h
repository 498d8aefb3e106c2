#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

// All that kernels do in CUDA's own syntax or in PTX. tests/cuda_emulation has a twin of this header, in plain C++ and
// found before it, so that the same .cu files run on a CPU. Kernels therefore use no `<<<>>>`, no `__shared__` and no
// asm of their own.
namespace rankwise::kernels::cuda {

// kernel<<<...>>> with the arguments converted to its parameters. An empty grid is no work. The launch's error is
// returned; the kernel's own is found by whoever waits for the stream.
template <typename... Parameters, typename... Arguments>
cudaError_t Launch(void (*kernel)(Parameters...), dim3 grid, int threads, int64_t shared_bytes, cudaStream_t stream,
                   Arguments... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  constexpr int64_t kWithoutAsking = 48 << 10;
  if (shared_bytes > kWithoutAsking) {
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, threads, shared_bytes, stream>>>(static_cast<Parameters>(arguments)...);
  return cudaGetLastError();
}

extern __shared__ __align__(16) unsigned char dynamic_shared[];

// `count` elements of the block's shared memory from byte `offset` on. The emulation's twin refuses what is outside of
// it or was not written, and finds races.
template <typename T>
class Shared {
 public:
  __device__ Shared(int64_t offset, int64_t) : data_(reinterpret_cast<T*>(dynamic_shared + offset)) {}
  __device__ T& operator[](int64_t i) const { return data_[i]; }
  // Elements [i, i + 4), as one access; i is a multiple of 4.
  using Four = std::conditional_t<std::is_same_v<T, float>, float4, uint4>;
  __device__ Four Load4(int64_t i) const { return *reinterpret_cast<const Four*>(data_ + i); }
  // Elements i and i + 1; i is even.
  __device__ uint2 Load2(int64_t i) const { return *reinterpret_cast<const uint2*>(data_ + i); }
  // Elements [i, i + kCount), four or two, from global memory at `from`, or zeros where `is_there` is not; i is a
  // multiple of kCount. The thread goes on: what it copied is there, for itself, after WaitForCopies, and for others
  // after a barrier behind that.
  template <int kCount>
  __device__ void CopyAsync(int64_t i, const void* from, bool is_there) const {
    static_assert(kCount == 4 || kCount == 2);
    const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(data_ + i));
    const int bytes = is_there ? kCount * 4 : 0;
    if constexpr (kCount == 4) {
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from), "r"(bytes) : "memory");
    } else {
      asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;\n" ::"r"(to), "l"(from), "r"(bytes) : "memory");
    }
  }

 private:
  T* data_;
};

// What this thread copied since its last CommitCopies is one group, which may be empty. WaitForCopies<n> waits for all
// of its groups but the last n.
__device__ inline void CommitCopies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
template <int kLeft>
__device__ inline void WaitForCopies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kLeft) : "memory");
}

// 16 bytes of global memory that no kernel writes while this one runs, past the first-level cache's needs.
__device__ inline uint4 Load16(const void* p) { return __ldg(static_cast<const uint4*>(p)); }

// Two floats rounded to bf16, half to even: x in the lower half.
__device__ inline uint32_t RoundPair(float x, float y) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(pair) : "f"(y), "f"(x));
  return pair;
}

// high += a[0] · b[0], low += Σ a[i] · b[j] of all others, in this order, for a [16, 16] and b [16, 8] given as terms
// in bf16, each product exact. Fragments as mma.m16n8k16 has them (PTX ISA, "Matrix Fragments for mma.m16n8k16"): with
// g = lane / 4, t = lane % 4,
//   a: {[g][2t, 2t+1], [g+8][2t, 2t+1], [g][2t+8, 2t+9], [g+8][2t+8, 2t+9]}   b: {[2t, 2t+1][g], [2t+8, 2t+9][g]}
//   sums: {[g][2t], [g][2t+1], [g+8][2t], [g+8][2t+1]}
// All lanes of a warp call together.
template <int kTermsA, int kTermsB>
__device__ inline void MultiplyTerms(float (&high)[4], float (&low)[4], const uint32_t (&a)[kTermsA][4],
                                     const uint32_t (&b)[kTermsB][2]) {
#pragma unroll
  for (int i = 0; i < kTermsA; ++i) {
#pragma unroll
    for (int j = 0; j < kTermsB; ++j) {
      float(&sum)[4] = i + j == 0 ? high : low;
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
          "{%0,%1,%2,%3};\n"
          : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
          : "r"(a[i][0]), "r"(a[i][1]), "r"(a[i][2]), "r"(a[i][3]), "r"(b[j][0]), "r"(b[j][1]));
    }
  }
}

}  // namespace rankwise::kernels::cuda
