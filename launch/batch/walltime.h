#pragma once

#include <cmath>
#include <optional>

#include "absl/time/time.h"

namespace rankwise::batch {

// Whether there is time for one more line before the job ends. Pure: time comes in as an argument. Not thread-safe.
class Walltime {
 public:
  // `end` is when the job will be killed; `margin` is what its end itself takes.
  Walltime(std::optional<absl::Time> end, absl::Duration margin) : end_(end), margin_(margin) {}

  // How long a line took. The estimate is TCP's for its timeouts (RFC 6298): smoothed mean plus four times the smoothed
  // deviation, so that lines of very different length are not begun in vain.
  void Observe(absl::Duration took) {
    const double seconds = absl::ToDoubleSeconds(took);
    if (!mean_) {
      mean_ = seconds;
      deviation_ = seconds / 2;
      return;
    }
    deviation_ += 0.25 * (std::abs(seconds - *mean_) - deviation_);
    *mean_ += 0.125 * (seconds - *mean_);
  }

  absl::Duration estimate() const { return absl::Seconds(mean_.value_or(0) + 4 * deviation_); }
  bool HasTimeFor(absl::Time now) const { return !end_ || now + estimate() + margin_ <= *end_; }
  // When what still runs must be given up.
  absl::Time last_moment() const { return end_ ? *end_ - margin_ : absl::InfiniteFuture(); }

 private:
  const std::optional<absl::Time> end_;
  const absl::Duration margin_;
  std::optional<double> mean_;  // seconds
  double deviation_ = 0;
};

}  // namespace rankwise::batch
