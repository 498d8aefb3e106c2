#pragma once

#include <cuda_runtime_api.h>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace rankwise::kernels {

// OK, or what went wrong and in which call. Out of memory is ResourceExhausted, a missing driver or GPU Unavailable,
// all else Internal: after that the device's context is not to be trusted, and the group must end.
inline absl::Status CudaStatus(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return absl::OkStatus();
  const std::string message = absl::StrCat(call, ": ", cudaGetErrorString(error));
  switch (error) {
    case cudaErrorMemoryAllocation:
      return absl::ResourceExhaustedError(message);
    case cudaErrorNoDevice:
    case cudaErrorInsufficientDriver:
    case cudaErrorStubLibrary:
      return absl::UnavailableError(message);
    default:
      return absl::InternalError(message);
  }
}

}  // namespace rankwise::kernels

// RW_CUDA(cudaMemsetAsync(...)): returns from the function with a status that names the call if it fails.
#define RW_CUDA(call) RW_RETURN_IF_ERROR(::rankwise::kernels::CudaStatus((call), #call))
