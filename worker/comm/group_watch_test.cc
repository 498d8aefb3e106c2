#include "worker/comm/group_watch.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <thread>

namespace rankwise::comm {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr absl::Duration kPatience = absl::Milliseconds(2500);

Beat MakeBeat(uint64_t calls, Collective collective = Collective::kNone, uint64_t step = 7) {
  Beat beat{.activity = {.step = step, .calls = calls, .collective = collective}};
  std::strcpy(beat.host, "node-b");
  return beat;
}

std::string Said(const GroupWatch& watch, absl::Duration now) { return std::string(watch.Check(now).message()); }

TEST(GroupWatchTest, RankZeroWatchesAllAndIsWatchedByAll) {
  EXPECT_THAT(GroupWatch(0, 4, kPatience, {}).peers(), ElementsAre(1, 2, 3));
  EXPECT_THAT(GroupWatch(3, 4, kPatience, {}).peers(), ElementsAre(0));
  EXPECT_THAT(GroupWatch(0, 1, kPatience, {}).peers(), IsEmpty());
}

TEST(GroupWatchTest, ASilentRankIsNamedWithHostStepAndCollective) {
  GroupWatch watch(0, 3, kPatience, absl::ZeroDuration());
  watch.Take(1, MakeBeat(40), absl::Seconds(1));
  watch.Take(2, MakeBeat(41, Collective::kAllReduceSum, 9), absl::Seconds(1));
  EXPECT_TRUE(watch.Check(absl::Seconds(3.5)).ok());
  watch.Take(1, MakeBeat(40), absl::Seconds(3));
  EXPECT_THAT(Said(watch, absl::Seconds(3.6)),
              AllOf(HasSubstr("from rank 2 on node-b (step 9, AllReduceSum, call 41)"), HasSubstr("2.6s")));
}

TEST(GroupWatchTest, ARankThatNeverSpokeIsSilentToo) {
  GroupWatch watch(1, 2, kPatience, absl::Seconds(10));
  EXPECT_TRUE(watch.Check(absl::Seconds(12.5)).ok());
  EXPECT_THAT(Said(watch, absl::Seconds(12.6)), HasSubstr("rank 0 on an unknown host"));
}

TEST(GroupWatchTest, ARankThatLeavesMayBeSilent) {
  GroupWatch watch(0, 2, kPatience, absl::ZeroDuration());
  Beat last = MakeBeat(5);
  last.is_leaving = 1;
  watch.Take(1, last, absl::ZeroDuration());
  EXPECT_TRUE(watch.Check(absl::Hours(1)).ok());
}

TEST(GroupWatchTest, AStuckCollectiveIsOneInWhichAllWaitAndNoneGetsOn) {
  GroupWatch watch(0, 2, kPatience, absl::ZeroDuration());
  const auto beat_both = [&](const Beat& own, const Beat& other, double seconds) {
    watch.Take(0, own, absl::Seconds(seconds));
    watch.Take(1, other, absl::Seconds(seconds));
    return watch.Check(absl::Seconds(seconds)).ok();
  };
  EXPECT_TRUE(beat_both(MakeBeat(1, Collective::kGather), MakeBeat(2, Collective::kBarrier), 0));
  EXPECT_TRUE(beat_both(MakeBeat(1, Collective::kGather), MakeBeat(2, Collective::kBarrier), 2.5));
  EXPECT_FALSE(beat_both(MakeBeat(1, Collective::kGather), MakeBeat(2, Collective::kBarrier), 2.6));
  EXPECT_THAT(Said(watch, absl::Seconds(2.6)), AllOf(HasSubstr("Gather, call 1"), HasSubstr("Barrier, call 2")));
  // One gets on.
  EXPECT_TRUE(beat_both(MakeBeat(1, Collective::kGather), MakeBeat(3, Collective::kBarrier), 2.7));
  // One computes, for as long as it takes: a long step, or, at rank 0, no work.
  EXPECT_TRUE(beat_both(MakeBeat(2), MakeBeat(3, Collective::kBarrier), 100));
  EXPECT_TRUE(beat_both(MakeBeat(2, Collective::kBarrier), MakeBeat(3), 200));
  EXPECT_TRUE(beat_both(MakeBeat(2, Collective::kBarrier), MakeBeat(3), 300));
}

TEST(GroupWatchTest, OthersThanRankZeroDoNotJudgeWhatTheyCannotSee) {
  GroupWatch watch(1, 2, kPatience, absl::ZeroDuration());
  watch.Take(1, MakeBeat(1, Collective::kBroadcast), absl::ZeroDuration());
  watch.Take(0, MakeBeat(1, Collective::kBroadcast), absl::Seconds(5));
  EXPECT_TRUE(watch.Check(absl::Seconds(6)).ok());
}

TEST(WatchedCommunicatorTest, TellsWhereItWaits) {
  auto ranks = CreateThreadCommunicators(2);
  Activity activity;
  WatchedCommunicator watched(std::move(ranks[0]), &activity);
  watched.EnterStep(12);
  std::thread waiting([&] { EXPECT_TRUE(watched.Barrier(absl::Seconds(20)).ok()); });
  while (activity.Snapshot().collective != Collective::kBarrier) std::this_thread::yield();
  EXPECT_EQ(activity.Snapshot().step, 12u);
  EXPECT_EQ(activity.Snapshot().calls, 1u);
  EXPECT_TRUE(ranks[1]->Barrier(absl::Seconds(20)).ok());
  waiting.join();
  EXPECT_EQ(activity.Snapshot().collective, Collective::kNone);
}

TEST(WatchedCommunicatorTest, TimesWhatAStepComputesAndWaits) {
  constexpr auto kWork = std::chrono::milliseconds(40);
  auto ranks = CreateThreadCommunicators(2);
  Activity activities[2];
  StepTimes times[2];
  const auto run = [&](int rank) {
    WatchedCommunicator watched(std::move(ranks[rank]), &activities[rank]);
    for (uint64_t step = 0; step < 3; ++step) {
      std::string plan = "plan";
      ASSERT_TRUE(watched.Broadcast(plan, absl::Seconds(20)).ok());
      watched.EnterStep(step);
      for (int layer = 0; layer < 2; ++layer) {
        if (rank == 1) std::this_thread::sleep_for(kWork);
        float sum[4] = {};
        ASSERT_TRUE(watched.AllReduceSum(sum, absl::Seconds(20)).ok());
      }
      if (rank == 0) std::this_thread::sleep_for(kWork);  // between steps: nobody's computing
    }
    times[rank] = watched.TakeStepTimes();
    EXPECT_EQ(watched.TakeStepTimes().steps, 0u);
  };
  std::thread other([&] { run(1); });
  run(0);
  other.join();
  EXPECT_EQ(times[0].steps, 3u);
  EXPECT_EQ(times[1].steps, 3u);
  EXPECT_GE(times[1].compute, 6 * kWork);
  EXPECT_LT(times[0].compute, times[1].compute / 2);
  EXPECT_GT(times[0].collective, 5 * kWork);
}

}  // namespace
}  // namespace rankwise::comm
