#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "kernels/backend.h"

namespace rankwise::kernels {

// What this machine can do at best, as a ceiling for every measured number.
struct MachineLimits {
  double read_bytes_per_second = 0;
  double fma_flops_per_second = 0;   // an fma counts as two
  double int8_ops_per_second = 0;    // u8 times s8, summed in i32; a product and a sum count as two. 0 of a GPU
  double bf16_flops_per_second = 0;  // bf16 times bf16, summed in f32, likewise

  double ops_per_second(Activations activations) const {
    switch (activations) {
      case Activations::kFloat:
        return fma_flops_per_second;
      case Activations::kInt8:
        return int8_ops_per_second;
      case Activations::kBF16:
        return bf16_flops_per_second;
    }
    return 0;
  }
};

// Of this host: reading 256 MiB, far beyond any cache, and independent chains of f32 fma, of int8 and of bf16 products
// in registers; f32 fma again where the CPU has no products of bf16. Medians over about a second with `threads` threads
// (0: the CPUs this process may run on). Zeros where the CPU has no AVX2.
MachineLimits MeasureMachineLimits(int threads);

// Of GPU `gpu`: the bytes read and written per second by a copy of 2 GiB within it, and the rate of a bf16 matmul
// [8192, 8192] x [8192, 8192] with f32 sums, for floats too, which are sums of bf16. Medians over a second, in a
// plug-in of its own, librankwise_cuda_limits.so in `folder`, which alone links cuBLASLt.
absl::StatusOr<MachineLimits> MeasureCudaLimits(const std::string& folder, int gpu);

}  // namespace rankwise::kernels
