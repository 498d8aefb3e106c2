#include "worker/comm/faulty_communicator.h"

#include <gtest/gtest.h>

#include <thread>

namespace rankwise::comm {
namespace {

constexpr absl::Duration kTimeout = absl::Seconds(20);

// A run as an engine would make it. How many of its calls succeeded, and the first error.
struct Outcome {
  int64_t succeeded = 0;
  absl::Status status;
};

Outcome CallEach(Communicator& group, absl::Duration timeout) {
  Outcome outcome;
  std::vector<float> values(3, 1.0f);
  std::vector<float> all(group.rank() == 0 ? 3 * group.size() : 0);
  const std::vector<int64_t> part_counts(group.size(), 3);
  std::string message;
  std::vector<std::string> messages;
  for (int call = 0; call < 5 && outcome.status.ok(); ++call) {
    if (call == 0) outcome.status = group.Broadcast(message, timeout);
    if (call == 1) outcome.status = group.AllReduceSum(values, timeout);
    if (call == 2) outcome.status = group.Gather(values, part_counts, all, timeout);
    if (call == 3) outcome.status = group.GatherMessages(message, messages, timeout);
    if (call == 4) outcome.status = group.Barrier(timeout);
    if (outcome.status.ok()) ++outcome.succeeded;
  }
  return outcome;
}

// Rank 0 of two has the fault.
std::pair<Outcome, Outcome> RunTwo(const Fault& fault, absl::Duration peer_timeout) {
  auto ranks = CreateThreadCommunicators(2);
  FaultyCommunicator faulty(std::move(ranks[0]), fault);
  std::pair<Outcome, Outcome> outcomes;
  {
    std::jthread peer([&] { outcomes.second = CallEach(*ranks[1], peer_timeout); });
    outcomes.first = CallEach(faulty, kTimeout);
  }
  if (!outcomes.first.status.ok()) {
    EXPECT_EQ(faulty.Barrier(kTimeout), outcomes.first.status);
  }
  return outcomes;
}

TEST(FaultyCommunicatorTest, CountsTheCallsOfARunWithoutAFault) {
  FaultyCommunicator faulty(CreateSoloCommunicator(), {});
  EXPECT_EQ(CallEach(faulty, kTimeout).succeeded, 5);
  EXPECT_EQ(faulty.calls(), 5);
  EXPECT_EQ(faulty.Description(), "faulty solo, 1 rank");
}

TEST(FaultyCommunicatorTest, FailsAtTheCallAndStaysBroken) {
  const absl::Status lost = absl::InternalError("cable pulled");
  for (int64_t call = 1; call <= 5; ++call) {
    const auto [faulty, peer] = RunTwo({.call = call, .status = lost}, absl::Milliseconds(300));
    EXPECT_EQ(faulty.succeeded, call - 1);
    EXPECT_EQ(faulty.status, lost);
    EXPECT_EQ(peer.succeeded, call - 1);
    EXPECT_EQ(peer.status.code(), absl::StatusCode::kDeadlineExceeded) << peer.status;
  }
}

TEST(FaultyCommunicatorTest, ADelayWithinTheTimeoutHarmsNobody) {
  const auto [late, peer] = RunTwo({.call = 3, .delay = absl::Milliseconds(50)}, kTimeout);
  EXPECT_EQ(late.succeeded, 5);
  EXPECT_EQ(peer.succeeded, 5);
}

TEST(FaultyCommunicatorTest, ADelayBeyondTheTimeoutEndsTheGroup) {
  const auto [late, peer] = RunTwo({.call = 2, .delay = absl::Seconds(1)}, absl::Milliseconds(300));
  EXPECT_EQ(peer.status.code(), absl::StatusCode::kDeadlineExceeded) << peer.status;
  EXPECT_EQ(late.status, peer.status);
  EXPECT_EQ(late.succeeded, 1);
}

}  // namespace
}  // namespace rankwise::comm
