#include "worker/comm/nccl_communicator.h"

#include <cuda_runtime_api.h>
#include <nccl.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <numeric>
#include <string>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "kernels/cuda/cuda_status.h"
#include "worker/comm/exchange.h"
#include "worker/comm/nccl_sum.h"
#include "worker/comm/pacer.h"

static_assert(NCCL_VERSION_CODE >= NCCL_VERSION(2, 28, 0), "ncclAlltoAll and symmetric windows need NCCL 2.28");

namespace rankwise::comm {
namespace {

constexpr int64_t kScratchFloats = int64_t{4} << 20;
// Below it the latency of a second exchange costs more than its bytes save (public figures for 8 GPUs on NVLink put the
// change of algorithm between 256 KiB and 512 KiB).
constexpr int64_t kOneExchangeFloats = int64_t{64} << 10;
// A step takes some milliseconds, which a sleeping poll would prolong by its pauses.
constexpr std::chrono::milliseconds kYieldFor{100};

struct NcclFree {
  void operator()(float* memory) const { ncclMemFree(memory); }
};

struct CudaFree {
  void operator()(float* memory) const { cudaFree(memory); }
};

struct EventDestroy {
  void operator()(cudaEvent_t event) const { cudaEventDestroy(event); }
};

int64_t RoundUpTo4(int64_t count) { return (count + 3) / 4 * 4; }

class NcclCommunicator final : public Communicator, private StreamCollectives {
 public:
  NcclCommunicator(Communicator& host, int gpu, cudaStream_t stream)
      : host_(host), gpu_(gpu), stream_(stream), rank_(host.rank()), size_(host.size()) {}
  ~NcclCommunicator() override { Abort(); }

  absl::Status Start(absl::Duration timeout);

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  std::string Description() const override { return absl::StrCat("nccl, ", size_, " ranks"); }
  void EnterStep(uint64_t step) override { host_.EnterStep(step); }

  StreamCollectives* on_stream() override { return this; }
  absl::Status AllReduceSum(std::span<float> values, absl::Duration timeout) override;
  absl::Status Wait(absl::Duration timeout) override;

  absl::Status Gather(std::span<const float> part, std::span<const int64_t> part_counts, std::span<float> all,
                      absl::Duration timeout) override {
    return OnHost([&] { return host_.Gather(part, part_counts, all, timeout); });
  }
  absl::Status Broadcast(std::string& message, absl::Duration timeout) override {
    return OnHost([&] { return host_.Broadcast(message, timeout); });
  }
  absl::Status GatherMessages(const std::string& message, std::vector<std::string>& messages,
                              absl::Duration timeout) override {
    return OnHost([&] { return host_.GatherMessages(message, messages, timeout); });
  }
  absl::Status Barrier(absl::Duration timeout) override {
    return OnHost([&] { return host_.Barrier(timeout); });
  }

 private:
  // Of the start; each on all ranks or on none.
  absl::Status Prepare();
  absl::Status Join(absl::Duration timeout);
  absl::Status RegisterScratch(absl::Duration timeout);
  absl::Status WarmUp(absl::Duration timeout);

  absl::Status GatherColumns(std::span<const float> part, std::span<const int64_t> widths, int64_t row_count,
                             std::span<float> all, absl::Duration timeout) override;
  absl::Status Share(std::span<float> values, absl::Duration timeout) override;
  absl::Status WaitUntil(const std::function<absl::StatusOr<bool>()>& has_come, absl::Duration timeout) override;

  absl::Status SumInOneExchange(std::span<float> values);
  absl::Status SumInTwoExchanges(std::span<float> values);

  absl::Status Begin(const char* collective, absl::Duration timeout);
  template <typename Call>
  absl::Status OnHost(const Call& call) {
    RW_RETURN_IF_ERROR(broken_);
    const absl::Status status = call();
    return status.ok() ? status : Fail(status);
  }
  // `result` of an NCCL call that goes on in the background: until it is through.
  absl::Status Finish(ncclResult_t result, const char* call);
  absl::Status Cuda(cudaError_t error, const char* call);

  absl::Status Fail(absl::Status status);
  absl::Status FailLate();
  void Abort();
  std::string Here() const { return absl::StrCat("rank ", rank_, ": ", collective_, ": "); }

  Communicator& host_;
  const int gpu_;
  const cudaStream_t stream_;
  const int rank_;
  const int size_;
  const int64_t one_exchange_floats_ = std::min(kOneExchangeFloats, kScratchFloats / size_ / 4 * 4);
  std::unique_ptr<float, NcclFree> scratch_;  // [kScratchFloats]
  std::unique_ptr<CUevent_st, EventDestroy> issued_;
  ncclComm_t comm_ = nullptr;  // null once aborted

  const char* collective_ = "CreateNcclCommunicator";
  absl::Duration timeout_;
  Clock::time_point deadline_;
  absl::Status broken_;
};

absl::Status NcclCommunicator::Start(absl::Duration timeout) {
  RW_RETURN_IF_ERROR(Agree(Prepare(), host_, timeout));
  RW_RETURN_IF_ERROR(Agree(Join(timeout), host_, 2 * timeout));
  RW_RETURN_IF_ERROR(Agree(RegisterScratch(timeout), host_, 2 * timeout));
  return Agree(WarmUp(timeout), host_, 2 * timeout);
}

absl::Status NcclCommunicator::Prepare() {
  RW_CUDA(cudaSetDevice(gpu_));
  cudaEvent_t event = nullptr;
  RW_CUDA(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  issued_.reset(event);
  void* memory = nullptr;
  RW_RETURN_IF_ERROR(Finish(ncclMemAlloc(&memory, kScratchFloats * sizeof(float)), "ncclMemAlloc"));
  scratch_.reset(static_cast<float*>(memory));
  RW_CUDA(cudaMemsetAsync(memory, 0, kScratchFloats * sizeof(float), stream_));
  return absl::OkStatus();
}

absl::Status NcclCommunicator::Join(absl::Duration timeout) {
  ncclUniqueId id = {};
  absl::StatusOr<std::string> text = "";
  if (rank_ == 0) {
    const absl::Status made = Finish(ncclGetUniqueId(&id), "ncclGetUniqueId");
    text = made.ok() ? absl::StatusOr<std::string>(absl::BytesToHexString({id.internal, sizeof id.internal})) : made;
  }
  RW_ASSIGN_OR_RETURN(const std::vector<std::string> texts, Exchange(text, host_, timeout));
  const std::string bytes = absl::HexStringToBytes(texts[0]);
  RW_CHECK(bytes.size() == sizeof id.internal);
  std::memcpy(id.internal, bytes.data(), sizeof id.internal);

  RW_RETURN_IF_ERROR(Begin("ncclCommInitRankConfig", timeout));
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 0;
  config.commName = "rankwise";
  return Finish(ncclCommInitRankConfig(&comm_, size_, id, rank_, &config), "ncclCommInitRankConfig");
}

absl::Status NcclCommunicator::RegisterScratch(absl::Duration timeout) {
  RW_RETURN_IF_ERROR(Begin("ncclCommWindowRegister", timeout));
  ncclWindow_t window = nullptr;  // freed with the communicator; null where the hardware has no symmetric memory
  return Finish(
      ncclCommWindowRegister(comm_, scratch_.get(), kScratchFloats * sizeof(float), &window, NCCL_WIN_COLL_SYMMETRIC),
      "ncclCommWindowRegister");
}

// NCCL connects ranks when it first needs to, which it must not while a graph is captured, nor should in a step.
absl::Status NcclCommunicator::WarmUp(absl::Duration timeout) {
  const int64_t count = one_exchange_floats_ + size_;
  void* memory = nullptr;
  RW_RETURN_IF_ERROR(Cuda(cudaMalloc(&memory, count * sizeof(float)), "cudaMalloc"));
  const std::unique_ptr<float, CudaFree> values(static_cast<float*>(memory));
  RW_RETURN_IF_ERROR(Cuda(cudaMemsetAsync(memory, 0, count * sizeof(float), stream_), "cudaMemsetAsync"));
  RW_RETURN_IF_ERROR(AllReduceSum({values.get(), static_cast<size_t>(size_)}, timeout));
  RW_RETURN_IF_ERROR(AllReduceSum({values.get(), static_cast<size_t>(count)}, timeout));
  RW_RETURN_IF_ERROR(Share({values.get(), static_cast<size_t>(size_)}, timeout));
  return Wait(timeout);
}

absl::Status NcclCommunicator::AllReduceSum(std::span<float> values, absl::Duration timeout) {
  RW_RETURN_IF_ERROR(Begin("AllReduceSum", timeout));
  while (!values.empty()) {
    if (std::ssize(values) <= one_exchange_floats_) return SumInOneExchange(values);
    const int64_t piece = std::min(std::ssize(values), kScratchFloats) / size_ * size_;
    RW_RETURN_IF_ERROR(SumInTwoExchanges(values.first(piece)));
    values = values.subspan(piece);
  }
  return absl::OkStatus();
}

absl::Status NcclCommunicator::SumInOneExchange(std::span<float> values) {
  const int64_t stride = RoundUpTo4(std::ssize(values));
  float* own = scratch_.get() + rank_ * stride;
  RW_RETURN_IF_ERROR(Cuda(cudaMemcpyAsync(own, values.data(), values.size_bytes(), cudaMemcpyDeviceToDevice, stream_),
                          "cudaMemcpyAsync"));
  RW_RETURN_IF_ERROR(Finish(ncclAllGather(own, scratch_.get(), stride, ncclFloat, comm_, stream_), "ncclAllGather"));
  return Cuda(SumParts(values.data(), scratch_.get(), size_, stride, std::ssize(values), stream_), "SumParts");
}

absl::Status NcclCommunicator::SumInTwoExchanges(std::span<float> values) {
  const int64_t slice = std::ssize(values) / size_;
  float* own = values.data() + rank_ * slice;
  RW_RETURN_IF_ERROR(
      Finish(ncclAlltoAll(values.data(), scratch_.get(), slice, ncclFloat, comm_, stream_), "ncclAlltoAll"));
  RW_RETURN_IF_ERROR(Cuda(SumParts(own, scratch_.get(), size_, slice, slice, stream_), "SumParts"));
  return Finish(ncclAllGather(own, values.data(), slice, ncclFloat, comm_, stream_), "ncclAllGather");
}

// In pieces of rows whose parts fit the scratch.
absl::Status NcclCommunicator::GatherColumns(std::span<const float> part, std::span<const int64_t> widths,
                                             int64_t row_count, std::span<float> all, absl::Duration timeout) {
  const int64_t own_width = widths[rank_], widest = RoundUpTo4(std::ranges::max(widths));
  const int64_t whole_width = std::accumulate(widths.begin(), widths.end(), int64_t{0});
  const int64_t piece_rows = kScratchFloats / size_ / widest;
  RW_CHECK(std::ssize(widths) == size_ && std::ssize(part) == row_count * own_width && piece_rows > 0 &&
           (all.empty() || std::ssize(all) == row_count * whole_width));
  RW_RETURN_IF_ERROR(Begin("GatherColumns", timeout));
  for (int64_t row = 0; row < row_count; row += piece_rows) {
    const int64_t rows = std::min(piece_rows, row_count - row), stride = rows * widest;
    float* own = scratch_.get() + rank_ * stride;
    RW_RETURN_IF_ERROR(Cuda(cudaMemcpyAsync(own, part.data() + row * own_width, rows * own_width * sizeof(float),
                                            cudaMemcpyDeviceToDevice, stream_),
                            "cudaMemcpyAsync"));
    RW_RETURN_IF_ERROR(Finish(ncclAllGather(own, scratch_.get(), stride, ncclFloat, comm_, stream_), "ncclAllGather"));
    if (all.empty()) continue;
    float* to = all.data() + row * whole_width;
    for (int rank = 0; rank < size_; to += widths[rank++]) {
      const size_t bytes = widths[rank] * sizeof(float);
      RW_RETURN_IF_ERROR(Cuda(cudaMemcpy2DAsync(to, whole_width * sizeof(float), scratch_.get() + rank * stride, bytes,
                                                bytes, rows, cudaMemcpyDeviceToDevice, stream_),
                              "cudaMemcpy2DAsync"));
    }
  }
  return absl::OkStatus();
}

absl::Status NcclCommunicator::Share(std::span<float> values, absl::Duration timeout) {
  RW_RETURN_IF_ERROR(Begin("Share", timeout));
  return Finish(ncclBroadcast(values.data(), values.data(), values.size(), ncclFloat, 0, comm_, stream_),
                "ncclBroadcast");
}

absl::Status NcclCommunicator::Wait(absl::Duration timeout) {
  RW_RETURN_IF_ERROR(Begin("AllReduceSum", timeout));
  RW_RETURN_IF_ERROR(Cuda(cudaEventRecord(issued_.get(), stream_), "cudaEventRecord"));
  return WaitUntil(
      [this]() -> absl::StatusOr<bool> {
        const cudaError_t state = cudaEventQuery(issued_.get());
        if (state == cudaErrorNotReady) return false;
        RW_RETURN_IF_ERROR(kernels::CudaStatus(state, "cudaEventQuery"));
        return true;
      },
      timeout);
}

absl::Status NcclCommunicator::WaitUntil(const std::function<absl::StatusOr<bool>()>& has_come,
                                         absl::Duration timeout) {
  RW_RETURN_IF_ERROR(Begin("AllReduceSum", timeout));
  Pacer pacer(deadline_, kYieldFor);
  for (;;) {
    const absl::StatusOr<bool> come = has_come();
    if (!come.ok()) return Fail(absl::Status(come.status().code(), absl::StrCat(Here(), come.status().message())));
    if (*come) return absl::OkStatus();
    ncclResult_t async = ncclSuccess;
    const ncclResult_t asked = ncclCommGetAsyncError(comm_, &async);
    RW_RETURN_IF_ERROR(Finish(asked == ncclSuccess ? async : asked, "ncclCommGetAsyncError"));
    if (!pacer.Pause()) return FailLate();
  }
}

absl::Status NcclCommunicator::Begin(const char* collective, absl::Duration timeout) {
  RW_RETURN_IF_ERROR(broken_);
  collective_ = collective;
  timeout_ = timeout;
  deadline_ = DeadlineAfter(timeout);
  return Cuda(cudaSetDevice(gpu_), "cudaSetDevice");
}

absl::Status NcclCommunicator::Finish(ncclResult_t result, const char* call) {
  Pacer pacer(deadline_, kYieldFor);
  while (result == ncclInProgress) {
    const ncclResult_t asked = ncclCommGetAsyncError(comm_, &result);
    if (asked != ncclSuccess) result = asked;
    if (result == ncclInProgress && !pacer.Pause()) return FailLate();
  }
  if (result == ncclSuccess) return absl::OkStatus();
  const char* detail = ncclGetLastError(comm_);
  return Fail(absl::InternalError(absl::StrCat(Here(), call, ": ", ncclGetErrorString(result),
                                               detail == nullptr || *detail == '\0' ? "" : ": ",
                                               detail == nullptr ? "" : detail)));
}

absl::Status NcclCommunicator::Cuda(cudaError_t error, const char* call) {
  const absl::Status status = kernels::CudaStatus(error, call);
  return status.ok() ? status : Fail(absl::Status(status.code(), absl::StrCat(Here(), status.message())));
}

absl::Status NcclCommunicator::FailLate() {
  return Fail(absl::DeadlineExceededError(absl::StrCat(Here(), "not done within ", absl::FormatDuration(timeout_),
                                                       ": a rank did not come, or a GPU hangs")));
}

absl::Status NcclCommunicator::Fail(absl::Status status) {
  broken_ = std::move(status);
  Abort();
  return broken_;
}

void NcclCommunicator::Abort() {
  if (comm_ != nullptr) ncclCommAbort(std::exchange(comm_, nullptr));
}

}  // namespace

absl::StatusOr<std::unique_ptr<Communicator>> CreateNcclCommunicator(Communicator& host, int gpu, void* stream,
                                                                     absl::Duration timeout) {
  RW_CHECK(host.size() >= 2, "one rank needs no NCCL");
  auto communicator = std::make_unique<NcclCommunicator>(host, gpu, static_cast<cudaStream_t>(stream));
  RW_RETURN_IF_ERROR(communicator->Start(timeout));
  return communicator;
}

}  // namespace rankwise::comm
