// What a person looks at a cluster with: status, top, preflight.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "tests/e2e/serving.h"

namespace rankwise::e2e {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

TEST(Top, ShowsWhatStatusShowsAndRates) {
  const auto cluster = Serve({.tp = 2, .kv = "f16"});
  ASSERT_TRUE(cluster.ok()) << cluster.status();
  ASSERT_TRUE(Generate((*cluster)->stub(), Greedy("Once", 16)).status.ok());
  const auto status = RunProgram("rankwise", {"status", "--endpoint", (*cluster)->endpoint()});
  ASSERT_TRUE(status.ok() && status->state.is_success()) << status->log;
  EXPECT_THAT(status->log, AllOf(HasSubstr("model    demo_model"), HasSubstr("requests 0 live"), HasSubstr("MiB"),
                                 HasSubstr("cache    ")));
  const auto top = RunProgram("rankwise", {"top", "--endpoint", (*cluster)->endpoint(), "--once", "--interval", "0.1"});
  ASSERT_TRUE(top.ok() && top->state.is_success()) << top->log;
  EXPECT_THAT(top->log, AllOf(HasSubstr("model    demo_model"), HasSubstr("tokens/s"), HasSubstr("KV in use"),
                              HasSubstr("all groups"), Not(HasSubstr("\033"))));
  const auto no_terminal = RunProgram("rankwise", {"top", "--endpoint", (*cluster)->endpoint()});
  ASSERT_TRUE(no_terminal.ok());
  EXPECT_EQ(no_terminal->state.code, 2);
  EXPECT_THAT(no_terminal->log, HasSubstr("--once"));
  EXPECT_TRUE((*cluster)->Drain().ok());
}

TEST(Preflight, IsGoodWhereServeWillRun) {
  const auto ended = RunProgram("rankwise", {"preflight", DemoModel(), "--tp", "2", "--threads", "1", "--seq", "512",
                                             "--launcher", "mpirun", "--launch-timeout", "60"});
  ASSERT_TRUE(ended.ok()) << ended.status();
  EXPECT_TRUE(ended->state.is_success()) << ended->log;
  EXPECT_THAT(ended->log, AllOf(HasSubstr("good  model"), HasSubstr("good  memory"), HasSubstr("good  port"),
                                HasSubstr("mpirun starts 2 ranks that meet"), HasSubstr("allreduce")));
}

TEST(Preflight, SaysWhatIsBadAndWhatToDo) {
  const auto ended =
      RunProgram("rankwise", {"preflight", DemoModel(), "--tp", "3", "--listen", "192.0.2.1:1", "--device", "cuda",
                              "--batch", "1000000", "--launcher", "srun", "--launch-timeout", "5"});
  ASSERT_TRUE(ended.ok()) << ended.status();
  EXPECT_EQ(ended->state.code, 2) << ended->log;
  EXPECT_THAT(ended->log, AllOf(HasSubstr("BAD   model"), HasSubstr("BAD   port"), HasSubstr("BAD   launch"),
                                HasSubstr("fix: "), HasSubstr("checks are bad")));
}

}  // namespace
}  // namespace rankwise::e2e
