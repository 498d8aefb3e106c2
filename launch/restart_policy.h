#pragma once

#include <algorithm>
#include <optional>

#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace rankwise::launch {

// When to start again what ended. Pure: time comes in as an argument.
class RestartPolicy {
 public:
  static constexpr int kLimit = 8;                                        // restarts in a row
  static constexpr absl::Duration kFirstDelay = absl::Milliseconds(250);  // doubles up to kLongestDelay
  static constexpr absl::Duration kLongestDelay = absl::Seconds(15);
  static constexpr absl::Duration kHealthy = absl::Seconds(60);

  // A run as long as `healthy` forgives all before it.
  explicit RestartPolicy(absl::Duration healthy = kHealthy) : healthy_(healthy) {}

  // How long to wait after a program ended that had run for `ran`; nullopt: it has failed too often, give up.
  std::optional<absl::Duration> NextDelay(absl::Duration ran) {
    if (ran >= healthy_) restarts_ = 0;
    if (restarts_ == kLimit) return std::nullopt;
    return std::min(kFirstDelay * (1 << restarts_++), kLongestDelay);
  }

 private:
  absl::Duration healthy_;
  int restarts_ = 0;
};

}  // namespace rankwise::launch
