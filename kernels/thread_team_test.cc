#include "kernels/cpu/thread_team.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <vector>

#include "kernels/machine_limits.h"

namespace rankwise::kernels {
namespace {

TEST(ThreadTeamTest, VisitsEachItemOnce) {
  for (int threads : {1, 2, 3, 8}) {
    ThreadTeam team(threads, /*pin_threads=*/true);
    EXPECT_EQ(team.size(), threads);
    for (int64_t count : {0, 1, 2, 3, 7, 64, 1000}) {
      std::vector<std::atomic<int>> visits(count);
      std::atomic<bool> has_foreign_thread = false;
      team.For(count, [&](int64_t item, int thread) {
        visits[item].fetch_add(1);
        if (thread < 0 || thread >= threads) has_foreign_thread = true;
      });
      for (const auto& v : visits) ASSERT_EQ(v.load(), 1) << threads << " threads, " << count << " items";
      EXPECT_FALSE(has_foreign_thread);
    }
  }
}

// Many short loops one after the other: a late worker must never run the body of a loop that has ended.
TEST(ThreadTeamTest, LoopsDoNotOverlap) {
  ThreadTeam team(4, /*pin_threads=*/false);
  for (int round = 0; round < 3000; ++round) {
    std::vector<int> results(5, -1);
    team.For(5, [&results, round](int64_t item, int) { results[item] = round; });
    ASSERT_THAT(results, testing::Each(round));
  }
}

TEST(MachineLimitsTest, AreOfAPlausibleSize) {
  const MachineLimits limits = MeasureMachineLimits(1);
  EXPECT_GT(limits.read_bytes_per_second, 1e8);
  EXPECT_LT(limits.read_bytes_per_second, 1e13);
  EXPECT_GT(limits.fma_flops_per_second, 1e8);
  EXPECT_LT(limits.fma_flops_per_second, 1e13);
  EXPECT_GT(limits.int8_ops_per_second, 1e8);
  EXPECT_LT(limits.int8_ops_per_second, 1e14);
  EXPECT_GT(limits.bf16_flops_per_second, 1e8);
  EXPECT_LT(limits.bf16_flops_per_second, 1e13);
}

}  // namespace
}  // namespace rankwise::kernels
