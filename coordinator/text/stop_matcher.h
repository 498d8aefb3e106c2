#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace rankwise::text {

// Finds stop strings in streamed text, across the borders of its pieces. The text ends at the stop string that is
// complete first; of several that end at the same byte the longest counts. How the text was cut into pieces changes
// nothing. One thread at a time.
class StopMatcher {
 public:
  static constexpr size_t kMaxStops = 64;
  static constexpr size_t kMaxStopBytes = 4096;

  struct Options {
    bool include_stop = false;  // deliver the stop string too
  };

  // No stops at all is fine. InvalidArgument names a stop that is empty, too long or not UTF-8.
  static absl::StatusOr<StopMatcher> Create(std::vector<std::string> stops, const Options& options);
  static absl::StatusOr<StopMatcher> Create(std::vector<std::string> stops) {
    return Create(std::move(stops), Options());
  }

  // Takes the next piece and returns the text that can be delivered now. Kept back is the longest end of the text that
  // may begin a stop string. After a stop nothing more comes.
  std::string Feed(std::string_view piece);

  // The text is over: what was kept back. Idempotent.
  std::string Flush();

  // Index of the stop string that ended the text.
  std::optional<int> matched() const { return matched_; }

 private:
  // One stop string and the Knuth-Morris-Pratt automaton that looks for it.
  struct Stop {
    std::string text;
    std::vector<int32_t> border;  // border[i]: longest proper prefix of text[0..i] that also ends there
    int32_t matched_bytes = 0;    // how much of `text` the stream ends with
  };
  static Stop MakeStop(std::string text);
  static void Advance(Stop& stop, char byte);

  StopMatcher() = default;

  std::vector<Stop> stops_;
  bool include_stop_ = false;
  std::string held_;  // not delivered yet
  std::optional<int> matched_;
};

}  // namespace rankwise::text
