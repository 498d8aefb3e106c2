#include "worker/comm/staged_communicator.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <thread>

#include "kernels/backend.h"
#include "worker/comm/activity.h"

namespace rankwise::comm {
namespace {

constexpr absl::Duration kTimeout = absl::Seconds(20);

TEST(StagedCommunicatorTest, SumsWhatLiesInMemoryOfTheBackend) {
  const auto hosts = CreateThreadCommunicators(3);
  std::vector<std::jthread> threads;
  for (const auto& host : hosts) {
    threads.emplace_back([&host] {
      const auto backend = kernels::CreateReferenceBackend();
      const auto group = CreateStagedCommunicator(*host, *backend);
      auto values = backend->Allocate(1000);
      ASSERT_TRUE(values.ok());
      std::vector<float> mine(1000, static_cast<float>(1 + group->rank()));
      ASSERT_EQ(backend->CopyToDevice(mine, values->get()), absl::OkStatus());
      ASSERT_EQ(group->AllReduceSum({values->get(), 1000}, kTimeout), absl::OkStatus());
      ASSERT_EQ(group->Wait(kTimeout), absl::OkStatus());
      ASSERT_EQ(backend->CopyToHost(values->get(), mine), absl::OkStatus());
      EXPECT_THAT(mine, testing::Each(6.0f));
      EXPECT_EQ(group->Description(), "staged over threads, 3 ranks");
    });
  }
}

TEST(StagedCommunicatorTest, WhoeverWatchesTheHostHearsOfItsSteps) {
  Activity activity;
  WatchedCommunicator host(CreateSoloCommunicator(), &activity);
  const auto backend = kernels::CreateReferenceBackend();
  CreateStagedCommunicator(host, *backend)->EnterStep(7);
  EXPECT_EQ(activity.Snapshot().step, 7u);
}

TEST(StagedCommunicatorTest, AnErrorOfTheHostIsEveryLaterCalls) {
  const auto hosts = CreateThreadCommunicators(2);
  const auto backend = kernels::CreateReferenceBackend();
  const auto group = CreateStagedCommunicator(*hosts[0], *backend);
  std::vector<float> values(4);
  const absl::Status late = group->AllReduceSum(values, absl::Milliseconds(20));
  EXPECT_EQ(late.code(), absl::StatusCode::kDeadlineExceeded) << late;
  EXPECT_EQ(group->Barrier(kTimeout), late);
  std::string message;
  EXPECT_EQ(group->Broadcast(message, kTimeout), late);
  EXPECT_EQ(group->Wait(kTimeout), late);
}

}  // namespace
}  // namespace rankwise::comm
