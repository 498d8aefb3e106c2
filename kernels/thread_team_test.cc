#include "kernels/cpu/thread_team.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <csignal>
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

// A worker of which a signal has got hold, as the kernel has of one that waits for a CPU.
std::atomic<bool> is_away = false, may_return = false;

TEST(ThreadTeamTest, AWorkerThatDoesNotComeIsNotWaitedFor) {
  ThreadTeam team(2, /*pin_threads=*/false);
  std::atomic<bool> has_come = false;
  pthread_t worker{};
  while (!has_come) {
    team.For(2, [&](int64_t, int thread) {
      if (thread != 1) return;
      worker = pthread_self();
      has_come = true;
    });
  }
  struct sigaction wait = {}, before;
  wait.sa_handler = [](int) {
    is_away = true;
    is_away.notify_one();
    may_return.wait(false);
  };
  ASSERT_EQ(sigaction(SIGUSR1, &wait, &before), 0);
  ASSERT_EQ(pthread_kill(worker, SIGUSR1), 0);
  is_away.wait(false);
  for (int round = 0; round < 100; ++round) {
    int items = 0;
    team.For(5, [&](int64_t, int thread) {
      EXPECT_EQ(thread, 0);
      ++items;
    });
    ASSERT_EQ(items, 5);
  }
  may_return = true;
  may_return.notify_one();
  has_come = false;
  while (!has_come) {
    team.For(2, [&](int64_t, int thread) {
      if (thread == 1) has_come = true;
    });
  }
  sigaction(SIGUSR1, &before, nullptr);
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
