#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <thread>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "kernels/cuda/cuda_status.h"
#include "worker/comm/communicator_test_groups.h"
#include "worker/comm/nccl_communicator.h"

// The ranks are threads, each with a GPU of its own; their host communicator is that of threads.
namespace rankwise::comm {
namespace {

// Takes the sums of the suite, which lie in host memory, to the GPU and back.
class OnGpu final : public Communicator {
 public:
  OnGpu(std::unique_ptr<Communicator> inner, int gpu, cudaStream_t stream)
      : inner_(std::move(inner)), gpu_(gpu), stream_(stream) {}
  ~OnGpu() override { cudaFree(memory_); }

  int rank() const override { return inner_->rank(); }
  int size() const override { return inner_->size(); }
  std::string Description() const override { return inner_->Description(); }

  absl::Status AllReduceSum(std::span<float> values, absl::Duration timeout) override {
    RW_CUDA(cudaSetDevice(gpu_));
    RW_RETURN_IF_ERROR(Reserve(values.size_bytes()));
    RW_CUDA(cudaMemcpyAsync(memory_, values.data(), values.size_bytes(), cudaMemcpyHostToDevice, stream_));
    RW_RETURN_IF_ERROR(inner_->AllReduceSum({static_cast<float*>(memory_), values.size()}, timeout));
    RW_RETURN_IF_ERROR(inner_->Wait(timeout));
    RW_CUDA(cudaMemcpyAsync(values.data(), memory_, values.size_bytes(), cudaMemcpyDeviceToHost, stream_));
    return kernels::CudaStatus(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
  }
  absl::Status Wait(absl::Duration timeout) override { return inner_->Wait(timeout); }
  absl::Status Gather(std::span<const float> part, std::span<const int64_t> part_counts, std::span<float> all,
                      absl::Duration timeout) override {
    return inner_->Gather(part, part_counts, all, timeout);
  }
  absl::Status Broadcast(std::string& message, absl::Duration timeout) override {
    return inner_->Broadcast(message, timeout);
  }
  absl::Status GatherMessages(const std::string& message, std::vector<std::string>& messages,
                              absl::Duration timeout) override {
    return inner_->GatherMessages(message, messages, timeout);
  }
  absl::Status Barrier(absl::Duration timeout) override { return inner_->Barrier(timeout); }

 private:
  // The suite's largest, at once: to free memory would wait for a hanging stream.
  absl::Status Reserve(size_t bytes) {
    constexpr size_t kBytes = size_t{4} << 20;
    if (bytes > kBytes) return absl::InvalidArgumentError(absl::StrCat(bytes, " bytes are too many for this test"));
    if (memory_ == nullptr) RW_CUDA(cudaMalloc(&memory_, kBytes));
    return absl::OkStatus();
  }

  std::unique_ptr<Communicator> inner_;
  const int gpu_;
  const cudaStream_t stream_;
  void* memory_ = nullptr;
};

void RunRank(Communicator& host, const std::function<void(Communicator&)>& body) {
  cudaStream_t stream = nullptr;
  ASSERT_EQ(cudaSetDevice(host.rank()), cudaSuccess);
  ASSERT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
  {
    auto nccl = CreateNcclCommunicator(host, host.rank(), stream, absl::Seconds(60));
    ASSERT_TRUE(nccl.ok()) << nccl.status();
    OnGpu group(*std::move(nccl), host.rank(), stream);
    body(group);
  }
  EXPECT_EQ(cudaStreamDestroy(stream), cudaSuccess);
}

}  // namespace

std::vector<TestGroup> TestGroups() {
  std::vector<TestGroup> groups;
  for (const int size : {2, 3, 4}) groups.push_back({.kind = "nccl", .size = size, .knows_peers = false});
  return groups;
}

void RunOnRanks(const TestGroup& group, const std::function<void(Communicator&)>& body) {
  int gpus = 0;
  const cudaError_t error = cudaGetDeviceCount(&gpus);
  if (error != cudaSuccess) GTEST_SKIP() << cudaGetErrorString(error);
  if (gpus < group.size) GTEST_SKIP() << "needs " << group.size << " GPUs, this machine has " << gpus;
  const std::vector<std::unique_ptr<Communicator>> hosts = CreateThreadCommunicators(group.size);
  std::vector<std::jthread> threads;
  for (const auto& host : hosts) threads.emplace_back([&] { RunRank(*host, body); });
}

}  // namespace rankwise::comm
