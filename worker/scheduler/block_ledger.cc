#include "worker/scheduler/block_ledger.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"

namespace rankwise::scheduler {

BlockLedger::BlockLedger(int32_t block_count, int32_t block_tokens) : block_tokens_(block_tokens), blocks_(block_count) {
  for (int32_t block = block_count - 1; block >= 0; --block) free_.push_back(block);
}

int32_t BlockLedger::Take() {
  RW_CHECK(available() > 0);
  int32_t taken = 0;
  if (!free_.empty()) {
    taken = free_.back();
    free_.pop_back();
  } else {
    taken = idle_.begin()->second;
    idle_.erase(idle_.begin());
    published_.erase(blocks_[taken].key);
    blocks_[taken].is_published = false;
  }
  RW_CHECK(blocks_[taken].references == 0);
  blocks_[taken].references = 1;
  return taken;
}

void BlockLedger::Release(int32_t block) {
  Block& released = blocks_[block];
  RW_CHECK(released.references > 0, absl::StrCat("block ", block, " is released but not held"));
  if (--released.references > 0) return;
  if (released.is_published) {
    released.idle_since = next_use_++;
    idle_.emplace(released.idle_since, block);
  } else {
    free_.push_back(block);
  }
}

BlockLedger::PrefixId BlockLedger::Publish(int32_t block, PrefixId parent, std::span<const int32_t> tokens) {
  RW_CHECK(static_cast<int32_t>(tokens.size()) == block_tokens_ && blocks_[block].references > 0);
  Key key{.parent = parent, .tokens = {tokens.begin(), tokens.end()}};
  const auto [found, is_new] = published_.try_emplace(key, Published{block, PrefixId{next_prefix_}});
  if (is_new) {
    ++next_prefix_;
    RW_CHECK(!blocks_[block].is_published);
    blocks_[block].is_published = true;
    blocks_[block].key = std::move(key);
  }
  return found->second.id;
}

BlockLedger::Match BlockLedger::Find(std::span<const int32_t> tokens, int32_t block_limit) {
  Match match;
  Key key;
  while (static_cast<int32_t>(match.blocks.size()) < block_limit) {
    const auto next = tokens.subspan(match.blocks.size() * block_tokens_);
    if (static_cast<int32_t>(next.size()) < block_tokens_) break;
    key.parent = match.prefix;
    key.tokens.assign(next.begin(), next.begin() + block_tokens_);
    const auto found = published_.find(key);
    if (found == published_.end()) break;
    Block& block = blocks_[found->second.block];
    if (block.references++ == 0) idle_.erase(block.idle_since);
    match.blocks.push_back(found->second.block);
    match.prefix = found->second.id;
  }
  return match;
}

void BlockLedger::Check(std::span<const int32_t> held) const {
  int32_t held_count = 0;
  for (size_t b = 0; b < blocks_.size(); ++b) {
    RW_CHECK(blocks_[b].references == held[b],
             absl::StrCat("block ", b, " has ", blocks_[b].references, " references and ", held[b], " holders"));
    held_count += held[b] > 0;
  }
  RW_CHECK(held_count + available() == block_count(),
           absl::StrCat(held_count, " held and ", available(), " available of ", block_count()));
}

}  // namespace rankwise::scheduler
