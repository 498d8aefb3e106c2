#include "kernels/cuda/cuda_memory.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "kernels/cuda/cuda_status.h"

namespace rankwise::kernels {

absl::StatusOr<DeviceMemory> AllocateDevice(int64_t bytes) {
  void* memory = nullptr;
  const cudaError_t error = cudaMalloc(&memory, std::max<int64_t>(bytes, 1));
  RW_RETURN_IF_ERROR(CudaStatus(error, absl::StrCat("cudaMalloc of ", bytes, " bytes").c_str()));
  return DeviceMemory(static_cast<std::byte*>(memory));
}

absl::StatusOr<DeviceMemory> UploadToDevice(const void* host, int64_t bytes, cudaStream_t stream) {
  RW_ASSIGN_OR_RETURN(DeviceMemory memory, AllocateDevice(bytes));
  RW_CUDA(cudaMemcpyAsync(memory.get(), host, bytes, cudaMemcpyHostToDevice, stream));
  RW_CUDA(cudaStreamSynchronize(stream));
  return memory;
}

absl::StatusOr<DeviceMemory> AllocateZeroed(int64_t bytes, cudaStream_t stream) {
  RW_ASSIGN_OR_RETURN(DeviceMemory memory, AllocateDevice(bytes));
  RW_CUDA(cudaMemsetAsync(memory.get(), 0, bytes, stream));
  return memory;
}

absl::StatusOr<PinnedMemory> AllocatePinned(int64_t bytes) {
  void* memory = nullptr;
  RW_CUDA(cudaMallocHost(&memory, bytes));
  return PinnedMemory(static_cast<std::byte*>(memory));
}

absl::StatusOr<Event> CreateEvent() {
  cudaEvent_t event = nullptr;
  RW_CUDA(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  return Event(event);
}

absl::StatusOr<std::byte*> Staging::Reserve(int64_t bytes) {
  if (sent_ == nullptr) {
    RW_ASSIGN_OR_RETURN(sent_, CreateEvent());
  } else {
    RW_CUDA(cudaEventSynchronize(sent_.get()));
  }
  if (bytes > capacity_) {
    const int64_t capacity = std::max(bytes, 2 * capacity_);
    RW_ASSIGN_OR_RETURN(host_, AllocatePinned(capacity));
    // cudaFree of the old one waits for the kernels that still read it.
    RW_ASSIGN_OR_RETURN(device_, AllocateDevice(capacity));
    capacity_ = capacity;
  }
  return host_.get();
}

absl::Status Staging::Send(int64_t bytes, cudaStream_t stream) {
  RW_CUDA(cudaMemcpyAsync(device_.get(), host_.get(), bytes, cudaMemcpyHostToDevice, stream));
  RW_CUDA(cudaEventRecord(sent_.get(), stream));
  return absl::OkStatus();
}

absl::StatusOr<std::byte*> ReadBack::Reserve(int64_t bytes) {
  if (bytes > capacity_) {
    RW_ASSIGN_OR_RETURN(host_, AllocatePinned(bytes));
    RW_ASSIGN_OR_RETURN(device_, AllocateDevice(bytes));
    capacity_ = bytes;
  }
  return device_.get();
}

absl::StatusOr<const std::byte*> ReadBack::Fetch(int64_t bytes, cudaStream_t stream) {
  RW_CUDA(cudaMemcpyAsync(host_.get(), device_.get(), bytes, cudaMemcpyDeviceToHost, stream));
  RW_CUDA(cudaStreamSynchronize(stream));
  return host_.get();
}

}  // namespace rankwise::kernels
