#pragma once

#include <string>

#include "absl/status/statusor.h"

namespace rankwise::kernels {

// What this machine can do at best, as a ceiling for every measured number.
struct MachineLimits {
  double read_bytes_per_second = 0;
  double fma_flops_per_second = 0;  // an fma counts as two
};

// Of this host: reading 256 MiB, far beyond any cache, and independent f32 fma chains in registers. Medians over about
// a second with `threads` threads (0: the CPUs this process may run on). Zeros where the CPU has no AVX2.
MachineLimits MeasureMachineLimits(int threads);

// Of GPU `gpu`: the bytes read and written per second by a copy of 2 GiB within it, and the rate of a bf16 matmul
// [8192, 8192] x [8192, 8192] with f32 sums. Medians over a second, in a plug-in of its own, librankwise_cuda_limits.so
// in `folder`, which alone links cuBLASLt.
absl::StatusOr<MachineLimits> MeasureCudaLimits(const std::string& folder, int gpu);

}  // namespace rankwise::kernels
