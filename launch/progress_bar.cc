#include "launch/progress_bar.h"

#include <unistd.h>

#include <cstdio>
#include <utility>

#include "absl/strings/str_format.h"

namespace rankwise::launch {

ProgressBar::ProgressBar(std::string label, int64_t total)
    : label_(std::move(label)), total_(total), is_terminal_(isatty(STDERR_FILENO) == 1) {}

ProgressBar::~ProgressBar() {
  if (has_drawn_ && is_terminal_) absl::FPrintF(stderr, "\n");
}

void ProgressBar::Update(int64_t done) {
  const double fraction = total_ > 0 ? static_cast<double>(done) / static_cast<double>(total_) : 1;
  const double seconds = absl::ToDoubleSeconds(absl::Now() - start_);
  const double left = done > 0 ? seconds / fraction - seconds : 0;
  if (is_terminal_) {
    constexpr int kWidth = 32;
    const int filled = static_cast<int>(fraction * kWidth);
    absl::FPrintF(stderr, "\r\033[K%s [%s%s] %d/%d  %.0f s, %.0f s left", label_, std::string(filled, '#'),
                  std::string(kWidth - filled, '.'), done, total_, seconds, left);
    std::fflush(stderr);
    has_drawn_ = true;
  } else if (const int64_t tenth = static_cast<int64_t>(fraction * 10); tenth > last_tenth_) {
    last_tenth_ = tenth;
    absl::FPrintF(stderr, "%s %d/%d (%d %%, %.0f s, %.0f s left)\n", label_, done, total_, tenth * 10, seconds, left);
  }
}

}  // namespace rankwise::launch
