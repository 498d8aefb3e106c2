#include "kernels/cpu/thread_team.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sched.h>

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

// Two CPUs of this machine, to which the calling thread is bound while this lives.
class TwoCpus {
 public:
  TwoCpus() {
    if (sched_getaffinity(0, sizeof(before_), &before_) != 0) return;
    for (int cpu = 0; cpu < CPU_SETSIZE && std::ssize(cpus) < 2; ++cpu) {
      if (CPU_ISSET(cpu, &before_)) cpus.push_back(cpu);
    }
    CPU_ZERO(&set);
    for (int cpu : cpus) CPU_SET(cpu, &set);
  }
  ~TwoCpus() { sched_setaffinity(0, sizeof(before_), &before_); }

  std::vector<int> cpus;
  cpu_set_t set;

 private:
  cpu_set_t before_;
};

TEST(ThreadTeamTest, TheCallerMovesOffAWorkersCpuAndStaysFree) {
  TwoCpus two;
  if (two.cpus.size() < 2) GTEST_SKIP() << "one CPU";
  ASSERT_EQ(sched_setaffinity(0, sizeof(two.set), &two.set), 0);
  ThreadTeam team(2, /*pin_threads=*/true);
  cpu_set_t workers;
  CPU_ZERO(&workers);
  CPU_SET(two.cpus[1], &workers);
  int moved = 0;
  for (int round = 0; round < 100; ++round) {
    ASSERT_EQ(sched_setaffinity(0, sizeof(workers), &workers), 0);
    ASSERT_EQ(sched_getcpu(), two.cpus[1]);
    ASSERT_EQ(sched_setaffinity(0, sizeof(two.set), &two.set), 0);
    std::vector<int> cpus(2, -1);
    team.For(2, [&](int64_t, int thread) { cpus[thread] = sched_getcpu(); });
    moved += cpus[0] == two.cpus[0] || cpus[0] == -1;  // -1: the worker was first to take both
    cpu_set_t now;
    ASSERT_EQ(sched_getaffinity(0, sizeof(now), &now), 0);
    ASSERT_TRUE(CPU_EQUAL(&now, &two.set));
  }
  // The kernel may move it once more.
  EXPECT_GE(moved, 90);
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
