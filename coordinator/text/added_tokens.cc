#include "coordinator/text/added_tokens.h"

#include <algorithm>

#include "base/status_macros.h"
#include "coordinator/text/json_file.h"
#include "coordinator/text/utf8.h"

namespace rankwise::text {

absl::StatusOr<AddedToken> ParseAddedToken(int32_t id, const nlohmann::json& object) {
  AddedToken token{.id = id};
  RW_ASSIGN_OR_RETURN(token.content, StringMember(object, "content"));
  RW_ASSIGN_OR_RETURN(token.special, BoolOr(object, "special", false));
  RW_ASSIGN_OR_RETURN(token.normalized, BoolOr(object, "normalized", !token.special));
  RW_ASSIGN_OR_RETURN(token.lstrip, BoolOr(object, "lstrip", false));
  RW_ASSIGN_OR_RETURN(token.rstrip, BoolOr(object, "rstrip", false));
  RW_ASSIGN_OR_RETURN(token.single_word, BoolOr(object, "single_word", false));
  return token;
}

void AddedTokenMatcher::Add(const std::string& spelling, const AddedToken& token) {
  if (spelling.empty()) return;
  uint32_t node = 0;
  for (const char c : spelling) {
    const auto [edge, is_new] =
        edges_.try_emplace(uint64_t{node} << 8 | static_cast<uint8_t>(c), static_cast<uint32_t>(ends_.size()));
    if (is_new) ends_.push_back(-1);
    node = edge->second;
  }
  if (ends_[node] >= 0) return;
  ends_[node] = static_cast<int32_t>(tokens_.size());
  tokens_.push_back(token);
}

std::optional<AddedTokenMatcher::Match> AddedTokenMatcher::LongestAt(std::string_view text) const {
  std::optional<Match> longest;
  uint32_t node = 0;
  for (size_t i = 0; i < text.size(); ++i) {
    const auto edge = edges_.find(uint64_t{node} << 8 | static_cast<uint8_t>(text[i]));
    if (edge == edges_.end()) break;
    node = edge->second;
    if (ends_[node] >= 0) longest = Match{&tokens_[static_cast<size_t>(ends_[node])], i + 1};
  }
  return longest;
}

std::vector<AddedTokenMatcher::Segment> AddedTokenMatcher::Split(std::string_view text, bool parse_special) const {
  std::vector<Segment> segments;
  size_t done = 0;  // bytes of `text` that are in segments
  for (size_t at = 0; at < text.size();) {
    const std::optional<Match> match = LongestAt(text.substr(at));
    if (!match) {
      ++at;
      continue;
    }
    const AddedToken& token = *match->token;
    size_t begin = at;
    size_t end = at + match->length;
    at = end;
    if (token.special && !parse_special) continue;
    if (token.single_word && (EndsWithWord(text.substr(0, begin)) || BeginsWithWord(text.substr(end)))) continue;
    if (token.lstrip) begin = std::max(done, begin - TrailingSpaceBytes(text.substr(0, begin)));
    if (token.rstrip) end += LeadingSpaceBytes(text.substr(end));
    if (done < begin) segments.push_back({text.substr(done, begin - done), std::nullopt});
    segments.push_back({text.substr(begin, end - begin), token.id});
    done = at = end;
  }
  if (done < text.size()) segments.push_back({text.substr(done), std::nullopt});
  return segments;
}

}  // namespace rankwise::text
