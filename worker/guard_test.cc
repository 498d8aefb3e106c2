#include "worker/guard.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <string>

#include "absl/time/clock.h"

namespace rankwise {
namespace {

using ::testing::HasSubstr;

// A process that beats for a while, then does as `end` says. Its stderr, and how it ended.
struct Ended {
  int wait_status = 0;
  std::string said;
  absl::Duration took;
};

Ended RunGuarded(int beats, bool stops) {
  int ends[2];
  EXPECT_EQ(pipe(ends), 0);
  const absl::Time begin = absl::Now();
  const pid_t pid = fork();
  if (pid == 0) {
    dup2(ends[1], STDERR_FILENO);
    close(ends[0]);
    close(ends[1]);
    signal(SIGPIPE, SIG_IGN);
    const auto guard = Guard::Start(absl::Milliseconds(300), absl::Milliseconds(600));
    comm::Beat beat{.activity = {.step = 5, .calls = 6, .collective = comm::Collective::kGather}};
    std::strcpy(beat.host, "here");
    for (int i = 0; i < beats; ++i) {
      (*guard)->Take(3, beat);
      absl::SleepFor(absl::Milliseconds(100));
    }
    if (stops) kill(getpid(), SIGSTOP);
    _exit(7);
  }
  close(ends[1]);
  Ended ended;
  waitpid(pid, &ended.wait_status, 0);
  ended.took = absl::Now() - begin;
  char text[512];
  for (ssize_t n; (n = read(ends[0], text, sizeof text)) > 0;) ended.said.append(text, static_cast<size_t>(n));
  close(ends[0]);
  return ended;
}

TEST(GuardTest, KillsAProcessThatStandsStillAndSaysWhere) {
  const Ended ended = RunGuarded(3, true);
  ASSERT_TRUE(WIFSIGNALED(ended.wait_status));
  EXPECT_EQ(WTERMSIG(ended.wait_status), SIGKILL);
  EXPECT_THAT(ended.said, HasSubstr("rank 3 on here stood still for 300 ms (step 5, Gather, call 6)"));
  EXPECT_LT(ended.took, absl::Seconds(5));
}

TEST(GuardTest, KillsAProcessThatNeverBegins) {
  const Ended ended = RunGuarded(0, true);
  ASSERT_TRUE(WIFSIGNALED(ended.wait_status));
  EXPECT_THAT(ended.said, HasSubstr("met no other rank within 600 ms"));
  EXPECT_GE(ended.took, absl::Milliseconds(600));
  EXPECT_LT(ended.took, absl::Seconds(5));
}

TEST(GuardTest, LeavesAloneWhatBeatsAndEndsWithIt) {
  // The read of its stderr ends only when the guard has ended too.
  const Ended ended = RunGuarded(8, false);
  ASSERT_TRUE(WIFEXITED(ended.wait_status));
  EXPECT_EQ(WEXITSTATUS(ended.wait_status), 7);
  EXPECT_EQ(ended.said, "");
}

}  // namespace
}  // namespace rankwise
