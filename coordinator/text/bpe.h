#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"

namespace rankwise::text {

// Byte-pair encoding of one word: its characters are merged pair by pair, the pair of the lowest rank first and of
// equal ranks the leftmost. Constant once filled; Encode may be called from several threads.
class BpeModel {
 public:
  struct Options {
    std::optional<int32_t> unknown;  // for characters without a token
    bool fuse_unknown = false;       // one unknown for a run of them
    bool byte_fallback = false;      // "<0xE2>" tokens for characters without a token
    bool ignore_merges = false;      // a word that is a token is that token, whatever the merges say
  };

  BpeModel() = default;

  void set_options(const Options& options) { options_ = options; }

  // InvalidArgument when the spelling is taken. Ids are the caller's to check.
  absl::Status AddToken(const std::string& spelling, int32_t id);
  // Ranks are dealt in the order of the calls. InvalidArgument names a token that the vocabulary lacks. Requires: all
  // tokens are added.
  absl::Status AddMerge(const std::string& left, const std::string& right);
  // Merges that yield the tokens of a rank file: any two tokens merge into the token they spell, whose id is the rank.
  void AddMergesByRank();

  std::optional<int32_t> Find(std::string_view spelling) const;

  // Buffers that one caller reuses from word to word.
  struct Scratch {
    struct Symbol {
      int32_t id;
      int32_t previous, next;  // indices of neighbours, -1 at the ends; a merged symbol has id -1
    };
    struct Candidate {
      uint64_t order;  // rank << 32 | index of the left symbol
      int32_t merged;
    };
    std::vector<Symbol> symbols;
    std::vector<Candidate> heap;
    int64_t candidates = 0;  // how many there were, all words together: the work done
  };
  // Appends the ids of `word`, in time O(n log n). InvalidArgument for a character without a token where there is no
  // unknown token either. Requires: `word` is UTF-8.
  absl::Status Encode(std::string_view word, Scratch& scratch, std::vector<int32_t>& ids) const;

 private:
  struct Merge {
    int32_t rank;
    int32_t id;
  };
  static uint64_t PairKey(int32_t left, int32_t right) {
    return uint64_t{static_cast<uint32_t>(left)} << 32 | static_cast<uint32_t>(right);
  }
  absl::Status FillSymbols(std::string_view word, Scratch& scratch) const;
  bool AppendBytes(std::string_view character, Scratch& scratch) const;
  void PushCandidate(int32_t left_index, Scratch& scratch) const;
  void MergeSymbols(Scratch& scratch) const;

  Options options_;
  absl::flat_hash_map<std::string, int32_t> ids_;
  absl::flat_hash_map<uint64_t, Merge> merges_;
  int32_t next_rank_ = 0;
};

}  // namespace rankwise::text
