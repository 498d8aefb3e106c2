#include "worker/comm/nccl_communicator.h"

#include <cuda_runtime_api.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <bit>
#include <cstring>
#include <random>
#include <span>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/nccl_emulation/nccl_emulation.h"
#include "worker/comm/nccl_sum.h"

// What the communicator suite cannot ask for: errors of NCCL itself, and the sum on its own.
namespace rankwise::comm {
namespace {

using testing::HasSubstr;

constexpr absl::Duration kTimeout = absl::Seconds(20);
constexpr absl::Duration kShort = absl::Milliseconds(200);

struct DeviceFloats {
  explicit DeviceFloats(int64_t count) {
    void* memory = nullptr;
    EXPECT_EQ(cudaMalloc(&memory, count * sizeof(float)), cudaSuccess);
    values = {static_cast<float*>(memory), static_cast<size_t>(count)};
  }
  ~DeviceFloats() { EXPECT_EQ(cudaFree(values.data()), cudaSuccess); }
  std::span<float> values;
};

class NcclCommunicatorTest : public testing::Test {
 protected:
  void SetUp() override {
    for (cudaStream_t& stream : streams_) {
      ASSERT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
    }
  }
  void TearDown() override {
    EXPECT_EQ(nccl_emulation::LiveCommunicators(), 0);
    for (const cudaStream_t stream : streams_) EXPECT_EQ(cudaStreamDestroy(stream), cudaSuccess);
    nccl_emulation::FailCall(0, ncclSuccess);
  }

  // Two ranks; `body` with each one's communicator. What the start returned.
  std::vector<absl::Status> RunTwo(const std::function<void(Communicator&)>& body, absl::Duration start = kTimeout) {
    const auto hosts = CreateThreadCommunicators(2);
    std::vector<absl::Status> started(2);
    std::vector<std::jthread> threads;
    for (int rank = 0; rank < 2; ++rank) {
      threads.emplace_back([&, rank] {
        const auto group = CreateNcclCommunicator(*hosts[rank], rank, streams_[rank], start);
        started[rank] = group.status();
        if (group.ok()) body(**group);
      });
    }
    threads.clear();
    return started;
  }

  std::array<cudaStream_t, 2> streams_{};  // of each rank
};

TEST_F(NcclCommunicatorTest, AnErrorOfNcclIsNamedAndIsEveryLaterCalls) {
  RunTwo([&](Communicator& group) {
    DeviceFloats memory(4);
    ASSERT_EQ(group.Barrier(kTimeout), absl::OkStatus());
    if (group.rank() == 0) nccl_emulation::FailCall(1, ncclSystemError);
    ASSERT_EQ(group.Barrier(kTimeout), absl::OkStatus());
    if (group.rank() == 1) {
      // Makes its call after the other's has failed, and waits in vain.
      while (nccl_emulation::LiveCommunicators() == 2) std::this_thread::yield();
      const absl::Status late = group.AllReduceSum(memory.values, kShort);
      EXPECT_EQ(late,
                absl::DeadlineExceededError("rank 1: AllReduceSum: not done within 200ms: a rank did not come, or "
                                            "a GPU hangs"));
      return;
    }
    const absl::Status failed = group.AllReduceSum(memory.values, kTimeout);
    EXPECT_EQ(failed, absl::InternalError("rank 0: AllReduceSum: ncclAllGather: unhandled system error"));
    EXPECT_EQ(group.Wait(kTimeout), failed);
    EXPECT_EQ(group.AllReduceSum(memory.values, kTimeout), failed);
    EXPECT_EQ(group.Barrier(kTimeout), failed);
    EXPECT_EQ(nccl_emulation::LiveCommunicators(), 1);  // aborted at once, not when it is destroyed
  });
}

// Calls of the start: two to join, two to register, then the sums of the warm-up and what is shared. (On a busy machine
// a rank may come too late for its peer to hear of it.)
TEST_F(NcclCommunicatorTest, AnErrorAtTheStartIsEveryRanks) {
  for (int call = 1; call <= 12; ++call) {
    SCOPED_TRACE(call);
    nccl_emulation::FailCall(call, ncclRemoteError);
    for (const absl::Status& status : RunTwo([](Communicator&) { FAIL() << "started"; }, kShort)) {
      EXPECT_FALSE(status.ok());
      EXPECT_THAT(std::string(status.message()),
                  testing::AnyOf(HasSubstr("remote process exited"), HasSubstr("not done within 200ms"),
                                 HasSubstr("did not come within")));
    }
  }
}

TEST_F(NcclCommunicatorTest, DifferentCountsEndAtTheDeadline) {
  RunTwo([](Communicator& group) {
    DeviceFloats memory(8);
    const absl::Status status = group.AllReduceSum(memory.values.first(group.rank() == 0 ? 4 : 8), kShort);
    EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded) << status;
  });
}

TEST_F(NcclCommunicatorTest, ALostHostEndsNcclToo) {
  RunTwo([](Communicator& group) {
    if (group.rank() == 1) return;
    const absl::Status status = group.Barrier(kShort);
    EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded) << status;
    DeviceFloats memory(4);
    EXPECT_EQ(group.AllReduceSum(memory.values, kTimeout), status);
  });
}

// All-reduces of `values`, one by one, as a graph.
void RecordSums(Communicator& group, cudaStream_t stream, const std::vector<std::span<float>>& values,
                cudaGraphExec_t& executable) {
  ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), cudaSuccess);
  for (const std::span<float> each : values) EXPECT_EQ(group.AllReduceSum(each, kTimeout), absl::OkStatus());
  cudaGraph_t graph = nullptr;
  ASSERT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
  ASSERT_EQ(cudaGraphInstantiate(&executable, graph, 0), cudaSuccess);
  EXPECT_EQ(cudaGraphDestroy(graph), cudaSuccess);
}

// Of one exchange and of two, in one graph.
TEST_F(NcclCommunicatorTest, SumsAreRecordedAndDoneAgain) {
  RunTwo([&](Communicator& group) {
    const cudaStream_t stream = streams_[group.rank()];
    ASSERT_NE(group.on_stream(), nullptr);
    DeviceFloats few(7), many(70'002);
    cudaGraphExec_t executable = nullptr;
    ASSERT_NO_FATAL_FAILURE(RecordSums(group, stream, {few.values, many.values}, executable));
    for (const int round : {1, 2, 3}) {
      for (const auto values : {few.values, many.values}) {
        for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i % 100 * round + group.rank());
      }
      ASSERT_EQ(cudaGraphLaunch(executable, stream), cudaSuccess);
      ASSERT_EQ(group.Wait(kTimeout), absl::OkStatus());
      for (const auto values : {few.values, many.values}) {
        for (size_t i = 0; i < values.size(); ++i) ASSERT_EQ(values[i], 2 * (i % 100 * round) + 1) << i;
      }
      // Nobody writes what the other still reads.
      ASSERT_EQ(group.Barrier(kTimeout), absl::OkStatus());
    }
    EXPECT_EQ(cudaGraphExecDestroy(executable), cudaSuccess);
  });
}

// Of one piece and of several, uneven, to a rank that wants them and to one that does not.
TEST_F(NcclCommunicatorTest, ColumnsOfAllRanksBecomeRows) {
  RunTwo([&](Communicator& group) {
    for (const auto& [rows, left, right] :
         std::vector<std::array<int64_t, 3>>{{1, 1, 1}, {5, 3, 2}, {37, 70'001, 70'000}}) {
      const std::array widths = {left, right};
      const int64_t own = widths[group.rank()], begin = group.rank() * left, whole = left + right;
      const auto value = [](int64_t row, int64_t column) { return static_cast<float>(row * 200'000 + column); };
      DeviceFloats part(rows * own), all(rows * whole);
      for (int64_t i = 0; i < rows * own; ++i) part.values[i] = value(i / own, begin + i % own);
      std::ranges::fill(all.values, -1.0f);
      const bool is_wanted = group.rank() == 0;
      ASSERT_EQ(group.on_stream()->GatherColumns(part.values, widths, rows, is_wanted ? all.values : std::span<float>(),
                                                 kTimeout),
                absl::OkStatus());
      ASSERT_EQ(group.Wait(kTimeout), absl::OkStatus());
      for (int64_t i = 0; i < rows * whole; ++i) {
        ASSERT_EQ(all.values[i], is_wanted ? value(i / whole, i % whole) : -1) << i << " of width " << whole;
      }
    }
  });
}

TEST_F(NcclCommunicatorTest, TheFirstRanksBitsAreShared) {
  RunTwo([](Communicator& group) {
    DeviceFloats ids(3);
    const std::array<int32_t, 3> sent = {-1, 7, 0x7fc00001};
    if (group.rank() == 0) std::memcpy(ids.values.data(), sent.data(), sizeof sent);
    ASSERT_EQ(group.on_stream()->Share(ids.values, kTimeout), absl::OkStatus());
    ASSERT_EQ(group.Wait(kTimeout), absl::OkStatus());
    EXPECT_EQ(std::memcmp(ids.values.data(), sent.data(), sizeof sent), 0);
  });
}

// What a rank waits for may lie before the last that it issued, or never come.
TEST_F(NcclCommunicatorTest, WaitsUntilItIsTold) {
  RunTwo([](Communicator& group) {
    int asked = 0;
    EXPECT_EQ(group.on_stream()->WaitUntil([&] { return ++asked == 3; }, kTimeout), absl::OkStatus());
    EXPECT_EQ(asked, 3);
    ASSERT_EQ(group.Barrier(kTimeout), absl::OkStatus());
    const absl::Status late = group.on_stream()->WaitUntil([] { return false; }, kShort);
    EXPECT_EQ(late.code(), absl::StatusCode::kDeadlineExceeded) << late;
    EXPECT_EQ(group.Wait(kTimeout), late);
  });
}

TEST_F(NcclCommunicatorTest, WhatIsAskedMayFailToo) {
  RunTwo([](Communicator& group) {
    const absl::Status failed = group.on_stream()->WaitUntil([] { return absl::InternalError("no event"); }, kTimeout);
    EXPECT_EQ(failed, absl::InternalError(absl::StrCat("rank ", group.rank(), ": AllReduceSum: no event")));
    EXPECT_EQ(group.Wait(kTimeout), failed);
  });
}

// An error that NCCL has of a step that runs ends the wait for it, long before the deadline.
TEST_F(NcclCommunicatorTest, WaitingHearsOfAnErrorInTheBackground) {
  RunTwo([&](Communicator& group) {
    if (group.rank() == 1) return;
    const cudaStream_t stream = streams_[0];
    DeviceFloats memory(4);
    cudaGraphExec_t executable = nullptr;
    ASSERT_NO_FATAL_FAILURE(RecordSums(group, stream, {memory.values}, executable));
    nccl_emulation::FailCall(1, ncclRemoteError);
    ASSERT_EQ(cudaGraphLaunch(executable, stream), cudaSuccess);
    const absl::Status failed = group.on_stream()->WaitUntil([] { return false; }, kTimeout);
    EXPECT_EQ(failed, absl::InternalError("rank 0: AllReduceSum: ncclCommGetAsyncError: remote process exited"));
    EXPECT_EQ(group.Wait(kTimeout), failed);
    EXPECT_EQ(cudaGraphExecDestroy(executable), cudaSuccess);
  });
}

float TreeSum(std::span<const float> parts) {
  if (parts.size() == 1) return parts[0];
  const size_t split = std::bit_floor(parts.size() - 1);
  return TreeSum(parts.first(split)) + TreeSum(parts.subspan(split));
}

TEST_F(NcclCommunicatorTest, PartsAreAddedInTheOrderOfTheTree) {
  std::mt19937 random(7);
  for (const int part_count : {1, 2, 3, 4, 5, 6, 7, 8, 11, 16, 31, 32, 100}) {
    for (const auto& [stride, count, offset] :
         std::vector<std::array<int, 3>>{{4, 4, 0}, {1032, 1030, 0}, {1032, 1032, 0}, {7, 7, 0}, {12, 8, 1}}) {
      SCOPED_TRACE(testing::Message() << part_count << " parts, stride " << stride << ", count " << count);
      DeviceFloats parts(int64_t{part_count} * stride + offset), sum(count + 2);
      for (float& value : parts.values)
        value = std::ldexp(static_cast<float>(random() | 1), static_cast<int>(random() % 32));
      std::ranges::fill(sum.values, 42.0f);
      ASSERT_EQ(SumParts(sum.values.data(), parts.values.data() + offset, part_count, stride, count, streams_[0]),
                cudaSuccess);
      for (int i = 0; i < count; ++i) {
        std::vector<float> column;
        for (int part = 0; part < part_count; ++part) column.push_back(parts.values[offset + part * stride + i]);
        ASSERT_EQ(sum.values[i], TreeSum(column)) << i;
      }
      EXPECT_EQ(sum.values[count], 42.0f);
      EXPECT_EQ(sum.values[count + 1], 42.0f);
    }
  }
}

}  // namespace
}  // namespace rankwise::comm
