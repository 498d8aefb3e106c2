#include "worker/scheduler/prompt_lookup.h"

#include <algorithm>
#include <bit>

namespace rankwise::scheduler {
namespace {

constexpr int32_t kGrams[] = {3, 2};  // the longest match is the best guess; a single token says too little

}  // namespace

// Multiply and fold, the constant being 2^64 / golden ratio.
int32_t& PromptLookup::LatestAfter(std::span<const int32_t> gram) {
  uint64_t hash = gram.size();
  for (const int32_t token : gram) {
    hash = (hash ^ static_cast<uint32_t>(token)) * 0x9E3779B97F4A7C15;
    hash ^= hash >> 32;
  }
  return latest_[hash & (latest_.size() - 1)];
}

void PromptLookup::Record(std::span<const int32_t> tokens, int32_t first_end, int32_t last_end) {
  for (int32_t end = first_end; end <= last_end; ++end) {
    for (const int32_t gram : kGrams) {
      if (end >= gram) LatestAfter(tokens.subspan(end - gram, gram)) = end;
    }
  }
}

// Where the last tokens of all stood before, as the index of the token behind them; 0 for nowhere.
int32_t PromptLookup::Find(std::span<const int32_t> tokens) {
  for (const int32_t gram : kGrams) {
    if (static_cast<int32_t>(tokens.size()) <= gram) continue;
    const auto latest = tokens.last(gram);
    const int32_t end = LatestAfter(latest);
    if (end >= gram && std::ranges::equal(tokens.subspan(end - gram, gram), latest)) return end;
  }
  return 0;
}

void PromptLookup::Draft(std::span<const int32_t> tokens, int32_t count, std::vector<int32_t>& drafts) {
  drafts.clear();
  if (latest_.size() < 4 * tokens.size()) {
    latest_.assign(std::bit_ceil(8 * tokens.size()), 0);
    recorded_ = 0;
  }
  const auto known = static_cast<int32_t>(tokens.size());
  Record(tokens, recorded_ + 1, known - 1);
  recorded_ = std::max(recorded_, known - 1);
  const int32_t begin = Find(tokens);
  if (begin == 0) return;
  for (int32_t i = begin; i < begin + count; ++i) drafts.push_back(i < known ? tokens[i] : drafts[i - known]);
}

}  // namespace rankwise::scheduler
