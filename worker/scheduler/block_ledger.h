#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <vector>

#include "absl/container/flat_hash_map.h"

namespace rankwise::scheduler {

// Who holds which block of the paged cache, and which blocks hold a prefix that others may share.
//
// Invariants: (1) A block is unused, held, or cached: free_.size() + held + idle_.size() == block_count. (2) References are the
// number of its holders. (3) A published block is found by the chain of all tokens up to its end, compared token by token:
// equal hashes of different prefixes never share.
class BlockLedger {
 public:
  BlockLedger(int32_t block_count, int32_t block_tokens);

  // Names the content of a published prefix; kRoot is the empty one.
  enum class PrefixId : uint64_t {};
  static constexpr PrefixId kRoot{0};

  int32_t available() const { return static_cast<int32_t>(free_.size() + idle_.size()); }
  int32_t cached() const { return static_cast<int32_t>(idle_.size()); }
  int32_t block_count() const { return static_cast<int32_t>(blocks_.size()); }

  // A block with one reference; evicts the least recently used cached one if need be. Requires available() > 0.
  int32_t Take();
  void Release(int32_t block);

  // Makes a full block with the tokens behind `parent` findable. When another block has the same content already, that one
  // stays, and its id is returned.
  PrefixId Publish(int32_t block, PrefixId parent, std::span<const int32_t> tokens);

  struct Match {
    std::vector<int32_t> blocks;  // each with a reference for the caller
    PrefixId prefix = kRoot;      // of the last one
  };
  // The longest published prefix of `tokens` in whole blocks, at most `block_limit`.
  Match Find(std::span<const int32_t> tokens, int32_t block_limit);

  // Aborts on a broken invariant; `held[b]` is how often block b is held.
  void Check(std::span<const int32_t> held) const;

 private:
  struct Key {
    PrefixId parent;
    std::vector<int32_t> tokens;
    bool operator==(const Key&) const = default;
    template <typename H>
    friend H AbslHashValue(H state, const Key& key) {
      return H::combine(std::move(state), key.parent, key.tokens);
    }
  };
  struct Published {
    int32_t block;
    PrefixId id;
  };
  struct Block {
    int32_t references = 0;
    bool is_published = false;
    Key key;              // while published
    uint64_t idle_since = 0;  // key in idle_, while published and not held
  };

  const int32_t block_tokens_;
  std::vector<Block> blocks_;
  std::vector<int32_t> free_;
  std::map<uint64_t, int32_t> idle_;  // published, not held; least recently used first
  absl::flat_hash_map<Key, Published> published_;
  uint64_t next_prefix_ = 1;
  uint64_t next_use_ = 0;
};

}  // namespace rankwise::scheduler
