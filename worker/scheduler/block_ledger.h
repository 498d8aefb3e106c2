#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace rankwise::scheduler {

constexpr int32_t kNoBlock = -1;

// Who holds which block of the paged cache, and which full blocks others may share.
//
// A block is unused (on free_), held (references > 0), or cached (published, held by nobody, on the idle list). A
// published block has its tokens and the published block before it on record; that chain names all tokens up to its
// end, so equal records mean equal K and V. Hashes only find the records: they are compared token by token.
//
// Invariants: (1) free + held + cached = block_count. (2) Who holds a published block holds its parent. (3) Hence a
// parent goes idle after its children, and the least recently used idle block has none.
class BlockLedger {
 public:
  BlockLedger(int32_t block_count, int32_t block_tokens);

  int32_t available() const { return static_cast<int32_t>(free_.size()) + idle_count_; }
  int32_t cached() const { return idle_count_; }
  int32_t block_count() const { return static_cast<int32_t>(blocks_.size()); }
  bool is_held(int32_t block) const { return blocks_[block].references > 0; }

  // A block with one reference; evicts the least recently used cached one if need be. Requires available() > 0.
  int32_t Take();
  // One more reference, for a block that Find returned.
  void Hold(int32_t block);
  // One reference less. A sequence releases its last block first: invariant 3.
  void Release(int32_t block);

  // The published block with these tokens [block_tokens] behind `parent` (kNoBlock: at the start), or kNoBlock.
  int32_t Find(int32_t parent, std::span<const int32_t> tokens) const;

  // Makes a held, full block findable and returns it; or, if an equal one is published already, moves the caller's
  // reference to that one and returns it. Requires the caller to hold `parent`.
  int32_t Publish(int32_t block, int32_t parent, std::span<const int32_t> tokens);

  // Aborts on a broken invariant; `held[b]` is how often block b is held.
  void Check(std::span<const int32_t> held) const;

 private:
  struct Block {
    int32_t references = 0;
    bool is_published = false;
    int32_t parent = kNoBlock;  // while published, as are the next two
    int32_t children = 0;       // published blocks behind it
    int32_t next_in_bucket = kNoBlock;
    int32_t older = 0, newer = 0;  // neighbours on the idle list
  };

  std::span<const int32_t> TokensOf(int32_t block) const;
  int32_t BucketOf(int32_t parent, std::span<const int32_t> tokens) const;
  void Unpublish(int32_t block);
  void PushIdle(int32_t block);
  void DropIdle(int32_t block);

  const int32_t block_tokens_;
  std::vector<Block> blocks_;
  std::vector<int32_t> tokens_;   // [block_count, block_tokens], of published blocks
  std::vector<int32_t> buckets_;  // first published block of each, kNoBlock if none; the count is a power of two
  std::vector<int32_t> free_;
  int32_t oldest_idle_ = kNoBlock, newest_idle_ = kNoBlock;
  int32_t idle_count_ = 0;
};

}  // namespace rankwise::scheduler
