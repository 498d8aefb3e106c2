#include "worker/scheduler/block_ledger.h"

#include <algorithm>
#include <bit>

#include "absl/strings/str_cat.h"
#include "base/check.h"

namespace rankwise::scheduler {

BlockLedger::BlockLedger(int32_t block_count, int32_t block_tokens)
    : block_tokens_(block_tokens),
      blocks_(block_count),
      tokens_(static_cast<size_t>(block_count) * block_tokens),
      buckets_(std::bit_ceil(static_cast<uint32_t>(block_count)), kNoBlock) {
  RW_CHECK(block_count > 0 && block_tokens > 0);
  free_.reserve(block_count);
  for (int32_t block = block_count - 1; block >= 0; --block) free_.push_back(block);
}

int32_t BlockLedger::Take() {
  RW_CHECK(available() > 0);
  int32_t taken = oldest_idle_;
  if (free_.empty()) {
    DropIdle(taken);
    Unpublish(taken);
  } else {
    taken = free_.back();
    free_.pop_back();
  }
  RW_CHECK(blocks_[taken].references == 0);
  blocks_[taken].references = 1;
  return taken;
}

void BlockLedger::Hold(int32_t block) {
  RW_CHECK(blocks_[block].is_published);
  if (blocks_[block].references++ == 0) DropIdle(block);
}

void BlockLedger::Release(int32_t block) {
  Block& released = blocks_[block];
  RW_CHECK(released.references > 0, absl::StrCat("block ", block, " is released but not held"));
  if (--released.references > 0) return;
  if (released.is_published) {
    PushIdle(block);
  } else {
    free_.push_back(block);
  }
}

int32_t BlockLedger::Find(int32_t parent, std::span<const int32_t> tokens) const {
  RW_CHECK(static_cast<int32_t>(tokens.size()) == block_tokens_);
  int32_t block = buckets_[BucketOf(parent, tokens)];
  while (block != kNoBlock && !(blocks_[block].parent == parent && std::ranges::equal(TokensOf(block), tokens))) {
    block = blocks_[block].next_in_bucket;
  }
  return block;
}

int32_t BlockLedger::Publish(int32_t block, int32_t parent, std::span<const int32_t> tokens) {
  Block& published = blocks_[block];
  RW_CHECK(published.references > 0 && !published.is_published);
  RW_CHECK(parent == kNoBlock || (blocks_[parent].is_published && is_held(parent)));
  if (const int32_t equal = Find(parent, tokens); equal != kNoBlock) {
    Hold(equal);
    Release(block);
    return equal;
  }
  int32_t& bucket = buckets_[BucketOf(parent, tokens)];
  published.is_published = true;
  published.parent = parent;
  published.children = 0;
  published.next_in_bucket = bucket;
  bucket = block;
  std::ranges::copy(tokens, tokens_.begin() + static_cast<int64_t>(block) * block_tokens_);
  if (parent != kNoBlock) ++blocks_[parent].children;
  return block;
}

void BlockLedger::Check(std::span<const int32_t> held) const {
  int32_t held_count = 0, idle_published = 0;
  std::vector<int32_t> children(blocks_.size()), held_below(blocks_.size());
  for (int32_t b = 0; b < block_count(); ++b) {
    const Block& block = blocks_[b];
    RW_CHECK(block.references == held[b],
             absl::StrCat("block ", b, " has ", block.references, " references and ", held[b], " holders"));
    held_count += block.references > 0;
    if (!block.is_published) continue;
    idle_published += block.references == 0;
    RW_CHECK(Find(block.parent, TokensOf(b)) == b, absl::StrCat("published block ", b, " is not the one found"));
    if (block.parent == kNoBlock) continue;
    RW_CHECK(blocks_[block.parent].is_published, absl::StrCat("block ", b, " has lost its parent"));
    ++children[block.parent];
    held_below[block.parent] += block.references;
  }
  for (int32_t b = 0; b < block_count(); ++b) {
    if (!blocks_[b].is_published) continue;
    RW_CHECK(children[b] == blocks_[b].children, absl::StrCat("block ", b, " has ", children[b], " children"));
    RW_CHECK(held_below[b] <= held[b], absl::StrCat("children of block ", b, " are held without it"));
  }
  RW_CHECK(idle_published == idle_count_, absl::StrCat(idle_published, " cached, ", idle_count_, " on the list"));
  RW_CHECK(held_count + available() == block_count(),
           absl::StrCat(held_count, " held and ", available(), " available of ", block_count()));
}

std::span<const int32_t> BlockLedger::TokensOf(int32_t block) const {
  return std::span(tokens_).subspan(static_cast<size_t>(block) * block_tokens_, block_tokens_);
}

// Multiply and fold, the constant being 2^64 / golden ratio: neighbouring token ids spread over the buckets.
int32_t BlockLedger::BucketOf(int32_t parent, std::span<const int32_t> tokens) const {
  uint64_t hash = static_cast<uint32_t>(parent);
  for (const int32_t token : tokens) {
    hash = (hash ^ static_cast<uint32_t>(token)) * 0x9E3779B97F4A7C15;
    hash ^= hash >> 32;
  }
  return static_cast<int32_t>(hash & (buckets_.size() - 1));
}

void BlockLedger::Unpublish(int32_t block) {
  Block& gone = blocks_[block];
  RW_CHECK(gone.children == 0, absl::StrCat("block ", block, " is evicted before its children"));
  int32_t* link = &buckets_[BucketOf(gone.parent, TokensOf(block))];
  while (*link != block) link = &blocks_[*link].next_in_bucket;
  *link = gone.next_in_bucket;
  if (gone.parent != kNoBlock) --blocks_[gone.parent].children;
  gone.is_published = false;
}

void BlockLedger::PushIdle(int32_t block) {
  blocks_[block].older = newest_idle_;
  blocks_[block].newer = kNoBlock;
  (newest_idle_ == kNoBlock ? oldest_idle_ : blocks_[newest_idle_].newer) = block;
  newest_idle_ = block;
  ++idle_count_;
}

void BlockLedger::DropIdle(int32_t block) {
  const Block& dropped = blocks_[block];
  (dropped.older == kNoBlock ? oldest_idle_ : blocks_[dropped.older].newer) = dropped.newer;
  (dropped.newer == kNoBlock ? newest_idle_ : blocks_[dropped.newer].older) = dropped.older;
  --idle_count_;
}

}  // namespace rankwise::scheduler
