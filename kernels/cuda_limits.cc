// librankwise_cuda_limits.so: what a GPU can do at best.

#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda_plugin.h"

namespace rankwise::kernels {
namespace {

constexpr int64_t kCopyBytes = int64_t{2} << 30;
constexpr int64_t kMatrix = 8192;
constexpr int64_t kMatrixBytes = kMatrix * kMatrix * 2;
constexpr int64_t kWorkspaceBytes = int64_t{64} << 20;
constexpr int kWarmUps = 3, kRepeats = 25;

absl::Status LtStatus(cublasStatus_t status, const char* call) {
  if (status == CUBLAS_STATUS_SUCCESS) return absl::OkStatus();
  return absl::InternalError(absl::StrCat(call, ": cuBLAS status ", static_cast<int>(status)));
}
#define RW_LT(call) RW_RETURN_IF_ERROR(LtStatus((call), #call))

template <typename Handle, auto kDestroy>
struct Destroy {
  void operator()(Handle handle) const { kDestroy(handle); }
};
template <typename Handle, auto kDestroy>
using Owned = std::unique_ptr<std::remove_pointer_t<Handle>, Destroy<Handle, kDestroy>>;

using Event = Owned<cudaEvent_t, cudaEventDestroy>;
using Memory = Owned<void*, cudaFree>;

absl::StatusOr<Event> MakeEvent() {
  cudaEvent_t event = nullptr;
  RW_CUDA(cudaEventCreate(&event));
  return Event(event);
}

absl::StatusOr<Memory> Take(int64_t bytes) {
  void* memory = nullptr;
  RW_CUDA(cudaMalloc(&memory, bytes));
  return Memory(memory);
}

// Of `issue`, by the GPU's clock.
template <typename Issue>
absl::StatusOr<double> MedianSeconds(const Issue& issue) {
  RW_ASSIGN_OR_RETURN(const Event begin, MakeEvent());
  RW_ASSIGN_OR_RETURN(const Event end, MakeEvent());
  std::vector<float> milliseconds;
  for (int i = -kWarmUps; i < kRepeats; ++i) {
    RW_CUDA(cudaEventRecord(begin.get(), nullptr));
    RW_RETURN_IF_ERROR(issue());
    RW_CUDA(cudaEventRecord(end.get(), nullptr));
    RW_CUDA(cudaEventSynchronize(end.get()));
    float elapsed = 0;
    RW_CUDA(cudaEventElapsedTime(&elapsed, begin.get(), end.get()));
    if (i >= 0) milliseconds.push_back(elapsed);
  }
  std::ranges::nth_element(milliseconds, milliseconds.begin() + kRepeats / 2);
  return milliseconds[kRepeats / 2] * 1e-3;
}

absl::StatusOr<double> CopyBytesPerSecond() {
  RW_ASSIGN_OR_RETURN(const Memory from, Take(kCopyBytes));
  RW_ASSIGN_OR_RETURN(const Memory to, Take(kCopyBytes));
  RW_CUDA(cudaMemset(from.get(), 1, kCopyBytes));
  RW_ASSIGN_OR_RETURN(const double seconds, MedianSeconds([&] {
                        return CudaStatus(
                            cudaMemcpyAsync(to.get(), from.get(), kCopyBytes, cudaMemcpyDeviceToDevice, nullptr),
                            "cudaMemcpyAsync");
                      }));
  return 2.0 * kCopyBytes / seconds;
}

absl::StatusOr<double> MatMulFlopsPerSecond() {
  cublasLtHandle_t raw_handle = nullptr;
  RW_LT(cublasLtCreate(&raw_handle));
  const Owned<cublasLtHandle_t, cublasLtDestroy> handle(raw_handle);
  cublasLtMatmulDesc_t raw_product = nullptr;
  RW_LT(cublasLtMatmulDescCreate(&raw_product, CUBLAS_COMPUTE_32F, CUDA_R_32F));
  const Owned<cublasLtMatmulDesc_t, cublasLtMatmulDescDestroy> product(raw_product);
  const cublasOperation_t transposed = CUBLAS_OP_T;  // as weights [n_out, n_in] are read
  RW_LT(cublasLtMatmulDescSetAttribute(product.get(), CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof transposed));
  cublasLtMatrixLayout_t raw_layout = nullptr;
  RW_LT(cublasLtMatrixLayoutCreate(&raw_layout, CUDA_R_16BF, kMatrix, kMatrix, kMatrix));
  const Owned<cublasLtMatrixLayout_t, cublasLtMatrixLayoutDestroy> layout(raw_layout);
  cublasLtMatmulPreference_t raw_preference = nullptr;
  RW_LT(cublasLtMatmulPreferenceCreate(&raw_preference));
  const Owned<cublasLtMatmulPreference_t, cublasLtMatmulPreferenceDestroy> preference(raw_preference);
  const size_t workspace_bytes = kWorkspaceBytes;
  RW_LT(cublasLtMatmulPreferenceSetAttribute(preference.get(), CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                             &workspace_bytes, sizeof workspace_bytes));
  cublasLtMatmulHeuristicResult_t choice;
  int choices = 0;
  RW_LT(cublasLtMatmulAlgoGetHeuristic(handle.get(), product.get(), layout.get(), layout.get(), layout.get(),
                                       layout.get(), preference.get(), 1, &choice, &choices));
  if (choices == 0) return absl::InternalError("cublasLtMatmulAlgoGetHeuristic found no bf16 matmul");

  RW_ASSIGN_OR_RETURN(const Memory a, Take(kMatrixBytes));
  RW_ASSIGN_OR_RETURN(const Memory b, Take(kMatrixBytes));
  RW_ASSIGN_OR_RETURN(const Memory c, Take(kMatrixBytes));
  RW_ASSIGN_OR_RETURN(const Memory workspace, Take(kWorkspaceBytes));
  // Bits that flip cost power, and power costs clock: random ones, as of weights, not zeros.
  std::vector<uint16_t> values(kMatrix * kMatrix);
  uint32_t state = 1;
  for (uint16_t& value : values) {
    state = state * 1664525u + 1013904223u;
    value = static_cast<uint16_t>((state >> 16 & 0x807f) | 0x3f00);  // ±[0.5, 1)
  }
  RW_CUDA(cudaMemcpy(a.get(), values.data(), kMatrixBytes, cudaMemcpyHostToDevice));
  RW_CUDA(cudaMemcpy(b.get(), values.data(), kMatrixBytes, cudaMemcpyHostToDevice));
  const float one = 1, zero = 0;
  RW_ASSIGN_OR_RETURN(const double seconds, MedianSeconds([&] {
                        return LtStatus(
                            cublasLtMatmul(handle.get(), product.get(), &one, a.get(), layout.get(), b.get(),
                                           layout.get(), &zero, c.get(), layout.get(), c.get(), layout.get(),
                                           &choice.algo, workspace.get(), kWorkspaceBytes, nullptr),
                            "cublasLtMatmul");
                      }));
  return 2.0 * kMatrix * kMatrix * kMatrix / seconds;
}

absl::StatusOr<MachineLimits> Measure(int gpu) {
  RW_CUDA(cudaSetDevice(gpu));
  MachineLimits limits;
  RW_ASSIGN_OR_RETURN(limits.read_bytes_per_second, CopyBytesPerSecond());
  RW_ASSIGN_OR_RETURN(limits.bf16_flops_per_second, MatMulFlopsPerSecond());
  limits.fma_flops_per_second = limits.bf16_flops_per_second;
  return limits;
}

}  // namespace

extern "C" const CudaLimitsPlugin rankwise_cuda_limits_plugin;
const CudaLimitsPlugin rankwise_cuda_limits_plugin = {.build = CudaPluginBuild(), .measure = Measure};

}  // namespace rankwise::kernels
