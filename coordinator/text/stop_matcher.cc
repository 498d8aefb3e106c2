#include "coordinator/text/stop_matcher.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "coordinator/text/utf8.h"

namespace rankwise::text {

absl::StatusOr<StopMatcher> StopMatcher::Create(std::vector<std::string> stops, const Options& options) {
  if (stops.size() > kMaxStops)
    return absl::InvalidArgumentError(absl::StrCat(stops.size(), " stop strings, at most ", kMaxStops, " are allowed"));
  StopMatcher matcher;
  matcher.include_stop_ = options.include_stop;
  for (size_t i = 0; i < stops.size(); ++i) {
    if (stops[i].empty()) return absl::InvalidArgumentError(absl::StrCat("stop string ", i, " is empty"));
    if (stops[i].size() > kMaxStopBytes)
      return absl::InvalidArgumentError(
          absl::StrCat("stop string ", i, " has ", stops[i].size(), " bytes, at most ", kMaxStopBytes, " are allowed"));
    if (absl::Status status = ValidateUtf8(stops[i]); !status.ok())
      return absl::InvalidArgumentError(absl::StrCat("stop string ", i, ": ", status.message()));
    matcher.stops_.push_back(MakeStop(std::move(stops[i])));
  }
  return matcher;
}

StopMatcher::Stop StopMatcher::MakeStop(std::string text) {
  Stop stop{.text = std::move(text)};
  stop.border.resize(stop.text.size(), 0);
  for (size_t i = 1; i < stop.text.size(); ++i) {
    int32_t length = stop.border[i - 1];
    while (length > 0 && stop.text[i] != stop.text[length]) length = stop.border[length - 1];
    stop.border[i] = length + (stop.text[i] == stop.text[length] ? 1 : 0);
  }
  return stop;
}

void StopMatcher::Advance(Stop& stop, char byte) {
  int32_t& length = stop.matched_bytes;
  while (length > 0 && stop.text[length] != byte) length = stop.border[length - 1];
  if (stop.text[length] == byte) ++length;
}

std::string StopMatcher::Feed(std::string_view piece) {
  if (matched_) return "";
  for (const char byte : piece) {
    held_ += byte;
    size_t longest = 0;
    for (size_t i = 0; i < stops_.size(); ++i) {
      Advance(stops_[i], byte);
      const bool is_whole = static_cast<size_t>(stops_[i].matched_bytes) == stops_[i].text.size();
      if (!is_whole || stops_[i].text.size() <= longest) continue;
      longest = stops_[i].text.size();
      matched_ = static_cast<int>(i);
    }
    if (!matched_) continue;
    RW_CHECK(held_.size() >= longest, "a stop string began in text that was delivered");
    if (!include_stop_) held_.resize(held_.size() - longest);
    return std::exchange(held_, "");
  }
  size_t keep = 0;
  for (const Stop& stop : stops_) keep = std::max(keep, static_cast<size_t>(stop.matched_bytes));
  std::string text = held_.substr(0, held_.size() - keep);
  held_.erase(0, held_.size() - keep);
  return text;
}

std::string StopMatcher::Flush() { return std::exchange(held_, ""); }

}  // namespace rankwise::text
