#include "kernels/cuda/device.h"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/numbers.h"

// Ops on whole rows of activations.
namespace rankwise::kernels::cuda {
namespace {

constexpr int kThreads = 128;

template <Element kElement>
__global__ void __launch_bounds__(kThreads) WidenRowsKernel(const __grid_constant__ WidenTask task) {
  int64_t index = task.tokens ? task.tokens[blockIdx.x] : int64_t{blockIdx.x};
  if (task.drawn) index = task.drawn[index] < 0 ? 0 : task.drawn[index];
  const unsigned char* row = task.rows + index * task.row_bytes;
  for (int64_t i = threadIdx.x; i < task.width; i += kThreads) {
    float x;
    if constexpr (kElement == Element::kF32) {
      x = reinterpret_cast<const float*>(row)[i];
    } else {
      const uint16_t bits = reinterpret_cast<const uint16_t*>(row)[i];
      x = kElement == Element::kF16 ? HalfToFloat(bits) : BFloat16ToFloat(bits);
    }
    task.out[blockIdx.x * task.width + i] = x;
  }
}

// x += delta + bias; out = x / sqrt(mean(x²) + eps) * weight
//   Thread i sums the elements 4 (i + 128 j) + {0 .. 3} in one fma chain, then the 128 sums add up in a tree.
// Rounding the sum has relative error (width / 128 + 8) 2^-24 and enters under a square root: |out - exact| <=
//          (width / 256 + 9) 2^-24 |exact|, up to second order; the addition as in the CPU backend
// Launch   a block of 128 threads per row
__global__ void __launch_bounds__(kThreads) AddAndNormKernel(const __grid_constant__ NormTask task) {
  const Shared<float> sums(0, kThreads / 32);
  const int64_t first = blockIdx.x * task.width;
  float* x = task.x + first;
  float sum = 0;
  for (int64_t begin = threadIdx.x * 4; begin < task.width; begin += kThreads * 4) {
    const int64_t end = begin + 4 < task.width ? begin + 4 : task.width;
    for (int64_t i = begin; i < end; ++i) {
      float value = x[i];
      if (task.delta) {
        float added = task.delta[first + i];
        if (task.bias) added += task.bias[i];
        x[i] = value += added;
      }
      sum = fmaf(value, value, sum);
    }
  }
  if (!task.weight) return;
  const float squares = BlockSum<kThreads>(sum, sums);
  const float factor = 1.0f / sqrtf(squares / static_cast<float>(task.width) + task.eps);
  for (int64_t begin = threadIdx.x * 4; begin < task.width; begin += kThreads * 4) {
    const int64_t end = begin + 4 < task.width ? begin + 4 : task.width;
    for (int64_t i = begin; i < end; ++i) task.out[first + i] = x[i] * factor * task.weight[i];
  }
}

// Rounding expf within 2 units in the last place, then three roundings:
//          |out - exact| <= 8 * 2^-24 |exact| + 2^-126 |gate up|
__global__ void __launch_bounds__(kThreads)
    SiluMulKernel(float* out, const float* gate_up, int64_t count, int64_t width) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= count) return;
  const int64_t row = i / width;
  const float gate = gate_up[i + row * width], up = gate_up[i + (row + 1) * width];
  out[i] = gate / (1.0f + expf(-gate)) * up;
}

__global__ void __launch_bounds__(kThreads)
    PickRowsKernel(float* out, const float* x, const int32_t* picked, int64_t width) {
  const float* from = x + picked[blockIdx.x] * width;
  for (int64_t i = threadIdx.x; i < width; i += kThreads) out[blockIdx.x * width + i] = from[i];
}

}  // namespace

cudaError_t WidenRows(const WidenTask& task, Element element, cudaStream_t stream) {
  auto* kernel = element == Element::kF32   ? WidenRowsKernel<Element::kF32>
                 : element == Element::kF16 ? WidenRowsKernel<Element::kF16>
                                            : WidenRowsKernel<Element::kBF16>;
  return Launch(kernel, dim3(task.row_count), kThreads, 0, stream, task);
}

cudaError_t AddAndNorm(const NormTask& task, cudaStream_t stream) {
  return Launch(AddAndNormKernel, dim3(task.row_count), kThreads, kThreads / 32 * sizeof(float), stream, task);
}

cudaError_t SiluMul(float* out, const float* gate_up, int64_t row_count, int64_t width, cudaStream_t stream) {
  const int64_t count = row_count * width;
  return Launch(SiluMulKernel, dim3((count + kThreads - 1) / kThreads), kThreads, 0, stream, out, gate_up, count,
                width);
}

cudaError_t PickRows(float* out, const float* x, const int32_t* picked, int64_t count, int64_t width,
                     cudaStream_t stream) {
  return Launch(PickRowsKernel, dim3(count), kThreads, 0, stream, out, x, picked, width);
}

}  // namespace rankwise::kernels::cuda
