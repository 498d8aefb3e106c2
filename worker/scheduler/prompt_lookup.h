#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace rankwise::scheduler {

// Guesses how a sequence goes on: as it did after the last earlier place where its latest three tokens stood, or else
// its latest two (prompt lookup decoding, Saxena 2023). An index finds that place in constant time, 16 to 64 bytes a
// token; it may forget a place, never invent one.
class PromptLookup {
 public:
  // Writes up to `count` guesses, none where nothing repeats. `tokens` are those of the last call, and more behind
  // them. A place whose continuation reaches the end goes on with its own guesses, so that a period of any length is
  // followed.
  void Draft(std::span<const int32_t> tokens, int32_t count, std::vector<int32_t>& drafts);

 private:
  int32_t& LatestAfter(std::span<const int32_t> gram);
  void Record(std::span<const int32_t> tokens, int32_t first_end, int32_t last_end);
  int32_t Find(std::span<const int32_t> tokens);

  // By the hash of the tokens before it: where they ended last. Others of the same hash overwrite each other.
  std::vector<int32_t> latest_;
  int32_t recorded_ = 0;  // all ends up to this one are in latest_
};

}  // namespace rankwise::scheduler
