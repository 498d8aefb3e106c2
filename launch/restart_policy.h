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
  static constexpr absl::Duration kHealthy = absl::Seconds(60);  // a run this long forgives all before it

  // How long to wait after a program ended that had run for `ran`; nullopt: it has failed too often, give up.
  std::optional<absl::Duration> NextDelay(absl::Duration ran) {
    if (ran >= kHealthy) restarts_ = 0;
    if (restarts_ == kLimit) return std::nullopt;
    return std::min(kFirstDelay * (1 << restarts_++), kLongestDelay);
  }

 private:
  int restarts_ = 0;
};

}  // namespace rankwise::launch
