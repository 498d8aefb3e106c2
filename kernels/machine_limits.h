#pragma once

namespace rankwise::kernels {

// What this machine can do at best, as a ceiling for every measured number.
struct MachineLimits {
  double read_bytes_per_second = 0;  // reading 256 MiB, far beyond any cache
  double fma_flops_per_second = 0;   // independent f32 fma chains in registers; an fma counts as two
};

// Medians over about a second with `threads` threads (0: the CPUs this process may run on). Zeros where the CPU has no
// AVX2.
MachineLimits MeasureMachineLimits(int threads);

}  // namespace rankwise::kernels
