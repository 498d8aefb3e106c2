#pragma once

#include <sched.h>

#include <algorithm>
#include <chrono>
#include <thread>

#include "absl/time/time.h"

namespace rankwise::comm {

// Not the wall clock: a deadline must not move when somebody sets the time.
using Clock = std::chrono::steady_clock;

// A year stands for "for ever", so that the sum cannot overflow.
inline Clock::time_point DeadlineAfter(absl::Duration timeout) {
  return Clock::now() + absl::ToChronoNanoseconds(std::clamp(timeout, absl::ZeroDuration(), absl::Hours(24 * 365)));
}

// Spaces the looks at something that can only be polled. At first it spins, for the peer that is a message away; then
// it gives the core to whoever else wants it, for ranks that share cores; then it sleeps, for a group without work. A
// pause is a 32nd of the time already waited, so it adds about 3 % to the wait until the longest pause is reached.
class Pacer {
 public:
  static constexpr std::chrono::milliseconds kYieldFor{2};

  explicit Pacer(Clock::time_point deadline, Clock::duration yield_for = kYieldFor)
      : deadline_(deadline), yield_for_(yield_for) {}

  // Call after a look that found nothing. False when the deadline has passed.
  bool Pause() {
    if (++looks_ <= kSpinLooks) return true;
    const Clock::time_point now = Clock::now();
    if (now >= deadline_) return false;
    if (looks_ == kSpinLooks + 1) start_ = now;
    const Clock::duration waited = now - start_;
    if (waited < yield_for_) {
      sched_yield();
    } else {
      const Clock::duration pause = std::min<Clock::duration>(waited / 32, kLongestPause);
      std::this_thread::sleep_for(std::min(pause, deadline_ - now));
    }
    return true;
  }

 private:
  static constexpr int kSpinLooks = 32;
  // A sleep costs up to 50 us of CPU on a virtual machine (measured: 1 ms pauses, 4.3 % of a core; 2 ms, 2.5 %).
  static constexpr std::chrono::milliseconds kLongestPause{2};

  Clock::time_point deadline_;
  Clock::duration yield_for_;
  Clock::time_point start_;
  int64_t looks_ = 0;
};

}  // namespace rankwise::comm
