#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

// What the .cu files offer the backend: functions that issue kernels on a stream. Sizes are checked by the caller. All
// pointers are device memory; `[...]` are shapes, row-major, f32 unless said otherwise.
namespace rankwise::kernels::cuda {

enum class Element : uint8_t { kF32, kF16, kBF16 };

// out [rows, width] = rows of `element` that are `row_bytes` apart.
cudaError_t WidenRows(float* out, const void* rows, Element element, int64_t row_bytes, int64_t row_count,
                      int64_t width, cudaStream_t stream);

// What the norm kernels do with a row: x += delta + bias first (delta and bias may be null), then, where `weight` is
// not null, out = x / sqrt(mean(x²) + eps) * weight. Without delta x is only read, and `out` may be x.
struct NormTask {
  float* out;
  float* x;
  const float *delta, *bias, *weight;
  int64_t row_count, width;
  float eps;
};
cudaError_t AddAndNorm(const NormTask& task, cudaStream_t stream);

// out [rows, width] = silu(gate) * up of gate_up [rows, 2 * width].
cudaError_t SiluMul(float* out, const float* gate_up, int64_t row_count, int64_t width, cudaStream_t stream);

// out [count, width] = x[picked[i]].
cudaError_t PickRows(float* out, const float* x, const int32_t* picked, int64_t count, int64_t width,
                     cudaStream_t stream);

}  // namespace rankwise::kernels::cuda
