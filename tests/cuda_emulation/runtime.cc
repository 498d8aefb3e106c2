#include <cuda_runtime.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/cuda_emulation/emulator.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size)
#define ASAN_UNPOISON_MEMORY_REGION(address, size)
#endif

namespace rankwise::cuda_emulation {
namespace {

constexpr size_t kGuardBytes = 256;
constexpr unsigned char kGuard = 0xa5;

size_t RoundUp(size_t x, size_t unit) { return (x + unit - 1) / unit * unit; }

// Ranks are threads of one process: one table for all. What was freed last is kept as one guard band, so that a launch
// that still names it is noticed.
struct Allocations {
  struct Freed {
    std::unique_ptr<unsigned char[], void (*)(void*)> memory;
    size_t bytes;
  };
  static constexpr size_t kMostFreedBytes = 256 << 10;

  std::mutex mutex;
  std::map<unsigned char*, size_t> bytes;
  std::deque<Freed> freed;
  size_t freed_bytes = 0;
};
Allocations& TheAllocations() {
  static auto* allocations = new Allocations();
  return *allocations;
}

// AddressSanitizer guards the bands itself, and reading them is what it forbids.
bool IsIntact([[maybe_unused]] const unsigned char* begin, [[maybe_unused]] const unsigned char* end) {
#if !defined(__SANITIZE_ADDRESS__)
  for (const unsigned char* p = begin; p < end; ++p) {
    if (*p != kGuard) return false;
  }
#endif
  return true;
}

void Keep(Allocations& all, const std::pair<unsigned char* const, size_t>& allocation) {
  const auto [memory, bytes] = allocation;
  std::memset(memory, kGuard, bytes);
  const size_t whole = RoundUp(bytes, kGuardBytes) + 2 * kGuardBytes;
  ASAN_POISON_MEMORY_REGION(memory - kGuardBytes, whole);
  all.freed.push_back({{memory - kGuardBytes, std::free}, whole});
  for (all.freed_bytes += whole; all.freed_bytes > Allocations::kMostFreedBytes; all.freed.pop_front()) {
    all.freed_bytes -= all.freed.front().bytes;
    ASAN_UNPOISON_MEMORY_REGION(all.freed.front().memory.get(), all.freed.front().bytes);
  }
}

thread_local std::string last_fault;
thread_local std::vector<std::string> open_ranges, ranges;
std::atomic<int64_t> bytes_to_host{0}, copies_to_device{0}, graph_launches{0};

}  // namespace

std::string CheckAllocations() {
  Allocations& all = TheAllocations();
  const std::lock_guard lock(all.mutex);
  for (const auto& [memory, bytes] : all.bytes) {
    const unsigned char* end = memory + bytes;
    if (!IsIntact(memory - kGuardBytes, memory) || !IsIntact(end, memory + RoundUp(bytes, kGuardBytes) + kGuardBytes)) {
      return absl::StrCat("a kernel wrote beside an allocation of ", bytes, " bytes");
    }
  }
  for (const auto& [memory, bytes] : all.freed) {
    if (!IsIntact(memory.get(), memory.get() + bytes)) return "a kernel wrote to memory that was freed";
  }
  return "";
}

int64_t BytesToHost() { return bytes_to_host; }
int64_t CopiesToDevice() { return copies_to_device; }

int EnterRange(const char* name) {
  const int depth = static_cast<int>(open_ranges.size());
  open_ranges.push_back(depth == 0 ? name : absl::StrCat(open_ranges.back(), "/", name));
  ranges.push_back(open_ranges.back());
  return depth;
}
int LeaveRange() {
  const int depth = static_cast<int>(open_ranges.size());
  if (depth == 0) return -1;
  open_ranges.pop_back();
  return depth;
}
std::vector<std::string> TakeRanges() { return std::exchange(ranges, {}); }

int64_t GraphLaunches() { return graph_launches; }

}  // namespace rankwise::cuda_emulation

using namespace rankwise::cuda_emulation;

struct CUgraph_st {
  std::vector<std::function<std::string()>> works;
};
struct CUgraphExec_st {
  CUgraph_st graph;
};
struct CUstream_st {
  std::unique_ptr<CUgraph_st> captured;  // null: not capturing
  bool is_broken = false;
  std::deque<std::function<std::string()>> undone;
  int64_t given = 0;  // works so far

  int64_t done() const { return given - static_cast<int64_t>(undone.size()); }
};
struct CUevent_st {
  cudaStream_t stream = nullptr;
  int64_t place = 0;  // in the works of the stream, when it was recorded
};

namespace {

thread_local cudaStream_t capturing = nullptr;  // the stream that this thread captures

// What must not be called while this thread captures.
cudaError_t NeedsNoCapture() {
  if (capturing == nullptr) return cudaSuccess;
  capturing->is_broken = true;
  return cudaErrorStreamCaptureUnsupported;
}

cudaError_t NeedsStream(cudaStream_t stream) { return stream ? NeedsNoCapture() : cudaErrorInvalidValue; }

cudaError_t Do(const std::function<std::string()>& work) {
  const std::string fault = work();
  if (fault.empty()) return cudaSuccess;
  last_fault = fault;
  return cudaErrorLaunchFailure;
}

std::atomic<bool> are_late{false};
std::set<cudaStream_t> late_streams;  // that have been given something

// The first `place` works of the stream.
cudaError_t CatchUp(cudaStream_t stream, int64_t place) {
  while (stream->done() < place) {
    const auto work = std::move(stream->undone.front());
    stream->undone.pop_front();
    if (const cudaError_t error = Do(work); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t DoInOrder(cudaStream_t stream, std::function<std::string()> work) {
  if (!are_late) return Do(work);
  late_streams.insert(stream);
  stream->undone.push_back(std::move(work));
  ++stream->given;
  return cudaSuccess;
}

}  // namespace

namespace rankwise::cuda_emulation {

void SetStreamsLate(bool late) {
  for (const cudaStream_t stream : std::exchange(late_streams, {})) CatchUp(stream, stream->given);
  are_late = late;
}

cudaError_t Issue(cudaStream_t stream, std::function<std::string()> work) {
  if (stream == nullptr) return cudaErrorInvalidValue;
  if (stream->captured == nullptr) return DoInOrder(stream, std::move(work));
  stream->captured->works.push_back(std::move(work));
  return cudaSuccess;
}

}  // namespace rankwise::cuda_emulation

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorLaunchFailure:
      return last_fault.c_str();
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated:
      return "operation failed due to a previous error during capture";
    default:
      return "invalid argument";
  }
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 2;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return device == 0 || device == 1 ? cudaSuccess : cudaErrorInvalidDevice; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {
      .name = "emulated", .totalGlobalMem = size_t{4} << 30, .major = 8, .minor = 0, .multiProcessorCount = 6};
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = new CUstream_st;
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  if (are_late) late_streams.erase(stream);
  delete stream;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (const cudaError_t error = NeedsStream(stream); error != cudaSuccess) return error;
  return CatchUp(stream, stream->given);
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new CUevent_st;
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  if (const cudaError_t error = NeedsStream(stream); error != cudaSuccess) return error;
  *event = {stream, stream->given};
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  if (const cudaError_t error = NeedsNoCapture(); error != cudaSuccess) return error;
  return event->stream == nullptr ? cudaSuccess : CatchUp(event->stream, event->place);
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  if (const cudaError_t error = NeedsNoCapture(); error != cudaSuccess) return error;
  if (event->stream == nullptr || event->stream->done() >= event->place) return cudaSuccess;
  const cudaError_t error = CatchUp(event->stream, event->stream->done() + 1);
  return error == cudaSuccess ? cudaErrorNotReady : error;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  if (const cudaError_t error = NeedsStream(stream); error != cudaSuccess) return error;
  stream->captured = std::make_unique<CUgraph_st>();
  capturing = stream;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  *graph = nullptr;
  if (stream != capturing || stream == nullptr) return cudaErrorInvalidValue;
  capturing = nullptr;
  const std::unique_ptr<CUgraph_st> captured = std::move(stream->captured);
  if (std::exchange(stream->is_broken, false)) return cudaErrorStreamCaptureInvalidated;
  *graph = new CUgraph_st(*captured);
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = stream->captured == nullptr ? cudaStreamCaptureStatusNone : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  *executable = new CUgraphExec_st{*graph};
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  delete executable;
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  if (const cudaError_t error = NeedsStream(stream); error != cudaSuccess) return error;
  ++graph_launches;
  for (const auto& work : executable->graph.works) {
    if (const cudaError_t error = DoInOrder(stream, work); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** memory, size_t bytes) {
  if (const cudaError_t error = NeedsNoCapture(); error != cudaSuccess) return error;
  const size_t whole = RoundUp(bytes, kGuardBytes) + 2 * kGuardBytes;
  auto* begin = static_cast<unsigned char*>(std::aligned_alloc(kGuardBytes, whole));
  if (begin == nullptr) return cudaErrorMemoryAllocation;
  std::memset(begin, kGuard, whole);
  std::memset(begin + kGuardBytes, 0xff, bytes);
  ASAN_POISON_MEMORY_REGION(begin, kGuardBytes);
  ASAN_POISON_MEMORY_REGION(begin + kGuardBytes + bytes, whole - kGuardBytes - bytes);
  *memory = begin + kGuardBytes;
  Allocations& all = TheAllocations();
  const std::lock_guard lock(all.mutex);
  all.bytes[begin + kGuardBytes] = bytes;
  return cudaSuccess;
}

cudaError_t cudaFree(void* memory) {
  if (memory == nullptr) return cudaSuccess;
  if (const cudaError_t error = NeedsNoCapture(); error != cudaSuccess) return error;
  if (are_late) {
    for (const cudaStream_t stream : late_streams) CatchUp(stream, stream->given);
  }
  const std::string fault = CheckAllocations();
  {
    Allocations& all = TheAllocations();
    const std::lock_guard lock(all.mutex);
    const auto place = all.bytes.find(static_cast<unsigned char*>(memory));
    if (place == all.bytes.end()) return cudaErrorInvalidValue;
    Keep(all, *place);
    all.bytes.erase(place);
  }
  last_fault = fault;
  return fault.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

cudaError_t cudaMallocHost(void** memory, size_t bytes) {
  *memory = std::malloc(bytes);
  return *memory ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaFreeHost(void* memory) {
  std::free(memory);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  return Issue(stream, [=] {
    if (kind == cudaMemcpyDeviceToHost) bytes_to_host += static_cast<int64_t>(bytes);
    if (kind == cudaMemcpyHostToDevice) ++copies_to_device;
    if (bytes > 0) std::memcpy(to, from, bytes);
    return "";
  });
}
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind, cudaStream_t stream) {
  if (width > to_pitch || width > from_pitch) return cudaErrorInvalidValue;
  return Issue(stream, [=] {
    for (size_t row = 0; row < height; ++row) {
      std::memcpy(static_cast<char*>(to) + row * to_pitch, static_cast<const char*>(from) + row * from_pitch, width);
    }
    return "";
  });
}
cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream) {
  return Issue(stream, [=] {
    if (bytes > 0) std::memset(memory, value, bytes);
    return "";
  });
}
