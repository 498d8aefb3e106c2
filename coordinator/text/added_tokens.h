#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"

namespace rankwise::text {

// A token that is found in the text before anything is merged. The flags are those of Hugging Face files.
struct AddedToken {
  int32_t id = 0;
  std::string content;
  bool special = false;      // control token: its text is skipped when decoding
  bool normalized = false;   // looked for in the normalized text
  bool lstrip = false;       // takes the white space on its left
  bool rstrip = false;       // takes the white space on its right
  bool single_word = false;  // only where no word character touches it
};

// `object` holds the flags and "content", as in tokenizer.json and tokenizer_config.json.
absl::StatusOr<AddedToken> ParseAddedToken(int32_t id, const nlohmann::json& object);

// Cuts a text at the added tokens in it: leftmost first, the longest of those that begin there.
class AddedTokenMatcher {
 public:
  AddedTokenMatcher() = default;

  // Looks for `spelling`, the content or its normalized form. An empty spelling matches nothing; of two tokens spelt
  // alike the first counts.
  void Add(const std::string& spelling, const AddedToken& token);

  struct Segment {
    std::string_view text;         // borrows from the text that was split
    std::optional<int32_t> token;  // the added token that `text` is, or absent for ordinary text
  };
  // Segments in order, none empty. Without parse_special, special tokens are ordinary text. Requires: `text` is UTF-8.
  std::vector<Segment> Split(std::string_view text, bool parse_special) const;

 private:
  struct Match {
    const AddedToken* token;
    size_t length;
  };
  std::optional<Match> LongestAt(std::string_view text) const;

  std::vector<AddedToken> tokens_;
  // A trie of bytes: (node << 8 | byte) to node; node 0 is the root. ends_[node] is an index into tokens_, or -1.
  absl::flat_hash_map<uint64_t, uint32_t> edges_;
  std::vector<int32_t> ends_ = {-1};
};

}  // namespace rankwise::text
