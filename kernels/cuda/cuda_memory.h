#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

// Handles of CUDA's runtime, owned. What goes wrong when they are given back is not looked at: then the device is lost,
// and who used it last was told.
namespace rankwise::kernels {

struct DeviceFree {
  void operator()(std::byte* memory) const { cudaFree(memory); }
};
using DeviceMemory = std::unique_ptr<std::byte, DeviceFree>;
// `bytes` of the current device, not set to anything; at least one byte.
absl::StatusOr<DeviceMemory> AllocateDevice(int64_t bytes);
// The same, copied from the host or zeroed by the time `stream` gets there.
absl::StatusOr<DeviceMemory> UploadToDevice(const void* host, int64_t bytes, cudaStream_t stream);
absl::StatusOr<DeviceMemory> AllocateZeroed(int64_t bytes, cudaStream_t stream);

struct PinnedFree {
  void operator()(std::byte* memory) const { cudaFreeHost(memory); }
};
using PinnedMemory = std::unique_ptr<std::byte, PinnedFree>;  // of the host
absl::StatusOr<PinnedMemory> AllocatePinned(int64_t bytes);

struct StreamDestroy {
  void operator()(cudaStream_t stream) const { cudaStreamDestroy(stream); }
};
using Stream = std::unique_ptr<std::remove_pointer_t<cudaStream_t>, StreamDestroy>;

struct GraphDestroy {
  void operator()(cudaGraph_t graph) const { cudaGraphDestroy(graph); }
};
using Graph = std::unique_ptr<std::remove_pointer_t<cudaGraph_t>, GraphDestroy>;
struct GraphExecutableDestroy {
  void operator()(cudaGraphExec_t executable) const { cudaGraphExecDestroy(executable); }
};
using GraphExecutable = std::unique_ptr<std::remove_pointer_t<cudaGraphExec_t>, GraphExecutableDestroy>;

struct EventDestroy {
  void operator()(cudaEvent_t event) const { cudaEventDestroy(event); }
};
using Event = std::unique_ptr<std::remove_pointer_t<cudaEvent_t>, EventDestroy>;
absl::StatusOr<Event> CreateEvent();

// Bytes that go to the device once a step, through pinned memory, without waiting for the stream. Both sides grow to
// the largest step seen.
class Staging {
 public:
  // Pinned memory for `bytes`, valid until Send. Waits until what was sent last has left it.
  absl::StatusOr<std::byte*> Reserve(int64_t bytes);
  // Copies the first `bytes` of it to device(), in order with the stream.
  absl::Status Send(int64_t bytes, cudaStream_t stream);
  const std::byte* device() const { return device_.get(); }

 private:
  int64_t capacity_ = 0;
  PinnedMemory host_;
  DeviceMemory device_;
  Event sent_;
};

// The way back: bytes that a kernel leaves, read by the host once the stream is done. Grows as Staging does.
class ReadBack {
 public:
  // Device memory for `bytes`.
  absl::StatusOr<std::byte*> Reserve(int64_t bytes);
  // Waits for the stream; its first `bytes`, valid until the next Fetch.
  absl::StatusOr<const std::byte*> Fetch(int64_t bytes, cudaStream_t stream);

 private:
  int64_t capacity_ = 0;
  PinnedMemory host_;
  DeviceMemory device_;
};

}  // namespace rankwise::kernels
