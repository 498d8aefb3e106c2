#include "launch/restart_policy.h"

#include <gtest/gtest.h>

namespace rankwise::launch {
namespace {

TEST(RestartPolicy, DoublesTheDelayUpToALimitThenGivesUp) {
  RestartPolicy policy;
  absl::Duration expected = RestartPolicy::kFirstDelay;
  for (int i = 0; i < RestartPolicy::kLimit; ++i) {
    EXPECT_EQ(policy.NextDelay(absl::Seconds(1)), std::min(expected, RestartPolicy::kLongestDelay)) << i;
    expected *= 2;
  }
  EXPECT_EQ(policy.NextDelay(absl::Seconds(1)), std::nullopt);
  EXPECT_EQ(policy.NextDelay(absl::Seconds(1)), std::nullopt);
}

TEST(RestartPolicy, AHealthyRunForgivesWhatWasBefore) {
  RestartPolicy policy;
  for (int i = 0; i < RestartPolicy::kLimit; ++i) ASSERT_TRUE(policy.NextDelay(absl::Seconds(1)));
  EXPECT_EQ(policy.NextDelay(RestartPolicy::kHealthy), RestartPolicy::kFirstDelay);
}

}  // namespace
}  // namespace rankwise::launch
