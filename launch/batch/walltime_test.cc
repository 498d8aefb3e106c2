#include "launch/batch/walltime.h"

#include <gtest/gtest.h>

namespace rankwise::batch {
namespace {

const absl::Time kStart = absl::FromUnixSeconds(1'000'000);

TEST(Walltime, WithoutAnEndThereIsAlwaysTime) {
  Walltime walltime(std::nullopt, absl::Seconds(20));
  walltime.Observe(absl::Hours(100));
  EXPECT_TRUE(walltime.HasTimeFor(kStart));
  EXPECT_EQ(walltime.last_moment(), absl::InfiniteFuture());
}

TEST(Walltime, BeginsNothingThatWouldNotEndInTime) {
  Walltime walltime(kStart + absl::Seconds(100), absl::Seconds(20));
  EXPECT_TRUE(walltime.HasTimeFor(kStart));  // nothing is known yet
  EXPECT_TRUE(walltime.HasTimeFor(kStart + absl::Seconds(80)));
  EXPECT_FALSE(walltime.HasTimeFor(kStart + absl::Seconds(81)));
  walltime.Observe(absl::Seconds(10));  // mean 10, deviation 5
  EXPECT_EQ(walltime.estimate(), absl::Seconds(30));
  EXPECT_TRUE(walltime.HasTimeFor(kStart + absl::Seconds(50)));
  EXPECT_FALSE(walltime.HasTimeFor(kStart + absl::Seconds(51)));
  EXPECT_EQ(walltime.last_moment(), kStart + absl::Seconds(80));
}

TEST(Walltime, ASteadyLoadIsTrustedAndAnUnsteadyOneIsNot) {
  Walltime steady(kStart, absl::ZeroDuration()), unsteady(kStart, absl::ZeroDuration());
  for (int i = 0; i < 100; ++i) {
    steady.Observe(absl::Seconds(10));
    unsteady.Observe(absl::Seconds(i % 2 == 0 ? 1 : 19));
  }
  EXPECT_LT(steady.estimate(), absl::Seconds(11));
  EXPECT_GT(unsteady.estimate(), absl::Seconds(25));
}

}  // namespace
}  // namespace rankwise::batch
