#pragma once

#include <cstdint>
#include <string>

#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace rankwise::launch {

// Progress on stderr: a line that redraws itself on a terminal, one line per 10 % elsewhere.
class ProgressBar {
 public:
  ProgressBar(std::string label, int64_t total);
  ~ProgressBar();  // leaves the line
  void Update(int64_t done);

 private:
  const std::string label_;
  const int64_t total_;
  const bool is_terminal_;
  const absl::Time start_ = absl::Now();
  int64_t last_tenth_ = 0;
  bool has_drawn_ = false;
};

}  // namespace rankwise::launch
