#include "coordinator/text/bpe.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "coordinator/text/byte_symbols.h"
#include "coordinator/text/utf8.h"

namespace rankwise::text {
namespace {

// std heaps have the largest in front; the least order comes first.
constexpr auto kComesLater = [](const BpeModel::Scratch::Candidate& a, const BpeModel::Scratch::Candidate& b) {
  return a.order > b.order;
};

}  // namespace

absl::Status BpeModel::AddToken(const std::string& spelling, int32_t id) {
  const auto [known, is_new] = ids_.try_emplace(spelling, id);
  if (is_new) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("token '", ToValidUtf8(spelling), "' has ids ", known->second, " and ", id));
}

absl::Status BpeModel::AddMerge(const std::string& left, const std::string& right) {
  const std::string merged = absl::StrCat(left, right);
  for (const std::string* spelling : {&left, &right, &merged})
    if (!ids_.contains(*spelling))
      return absl::InvalidArgumentError(absl::StrCat("merge '", ToValidUtf8(left), "' + '", ToValidUtf8(right), "': '",
                                                     ToValidUtf8(*spelling), "' is not in the vocabulary"));
  merges_[PairKey(ids_[left], ids_[right])] = {next_rank_++, ids_[merged]};
  return absl::OkStatus();
}

void BpeModel::AddMergesByRank() {
  for (const auto& [spelling, id] : ids_) {
    for (size_t at = 0; at < spelling.size();) {
      at += static_cast<size_t>(ReadUtf8(std::string_view(spelling).substr(at)).length);
      const std::optional<int32_t> left = Find(std::string_view(spelling).substr(0, at));
      const std::optional<int32_t> right = Find(std::string_view(spelling).substr(at));
      if (left && right) merges_[PairKey(*left, *right)] = {id, id};
    }
  }
}

std::optional<int32_t> BpeModel::Find(std::string_view spelling) const {
  const auto found = ids_.find(absl::string_view(spelling.data(), spelling.size()));
  return found == ids_.end() ? std::nullopt : std::optional<int32_t>(found->second);
}

absl::Status BpeModel::Encode(std::string_view word, Scratch& scratch, std::vector<int32_t>& ids) const {
  if (options_.ignore_merges) {
    if (const std::optional<int32_t> id = Find(word)) {
      ids.push_back(*id);
      return absl::OkStatus();
    }
  }
  if (absl::Status status = FillSymbols(word, scratch); !status.ok()) return status;
  MergeSymbols(scratch);
  for (const Scratch::Symbol& symbol : scratch.symbols)
    if (symbol.id >= 0) ids.push_back(symbol.id);
  return absl::OkStatus();
}

absl::Status BpeModel::FillSymbols(std::string_view word, Scratch& scratch) const {
  scratch.symbols.clear();
  const auto append = [&](int32_t id) {
    const auto index = static_cast<int32_t>(scratch.symbols.size());
    scratch.symbols.push_back({id, index - 1, index + 1});
  };
  bool was_unknown = false;
  for (size_t at = 0; at < word.size();) {
    const std::string_view character = word.substr(at, static_cast<size_t>(ReadUtf8(word.substr(at)).length));
    at += character.size();
    if (const std::optional<int32_t> id = Find(character)) {
      append(*id);
      was_unknown = false;
    } else if (options_.byte_fallback && AppendBytes(character, scratch)) {
      was_unknown = false;
    } else if (!options_.unknown) {
      return absl::InvalidArgumentError(
          absl::StrCat("character '", std::string(character), "' has no token, and the model has no unknown token"));
    } else {
      if (!was_unknown || !options_.fuse_unknown) append(*options_.unknown);
      was_unknown = true;
    }
  }
  if (!scratch.symbols.empty()) scratch.symbols.back().next = -1;
  return absl::OkStatus();
}

bool BpeModel::AppendBytes(std::string_view character, Scratch& scratch) const {
  const size_t size_before = scratch.symbols.size();
  for (const char byte : character) {
    const std::optional<int32_t> id = Find(ByteTokenName(static_cast<uint8_t>(byte)));
    if (!id) {
      scratch.symbols.resize(size_before);
      return false;
    }
    const auto index = static_cast<int32_t>(scratch.symbols.size());
    scratch.symbols.push_back({*id, index - 1, index + 1});
  }
  return true;
}

void BpeModel::PushCandidate(int32_t left_index, Scratch& scratch) const {
  const Scratch::Symbol& left = scratch.symbols[static_cast<size_t>(left_index)];
  if (left.next < 0) return;
  const auto merge = merges_.find(PairKey(left.id, scratch.symbols[static_cast<size_t>(left.next)].id));
  if (merge == merges_.end()) return;
  const uint64_t order = uint64_t{static_cast<uint32_t>(merge->second.rank)} << 32 | static_cast<uint32_t>(left_index);
  scratch.heap.push_back({order, merge->second.id});
  ++scratch.candidates;
}

void BpeModel::MergeSymbols(Scratch& scratch) const {
  auto& [symbols, heap, candidates] = scratch;
  heap.clear();
  for (size_t i = 0; i < symbols.size(); ++i) PushCandidate(static_cast<int32_t>(i), scratch);
  std::make_heap(heap.begin(), heap.end(), kComesLater);
  const auto push = [&](int32_t left_index) {
    const size_t size_before = heap.size();
    PushCandidate(left_index, scratch);
    if (heap.size() > size_before) std::push_heap(heap.begin(), heap.end(), kComesLater);
  };
  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end(), kComesLater);
    const Scratch::Candidate candidate = heap.back();
    heap.pop_back();
    const auto left_index = static_cast<int32_t>(candidate.order & 0xFFFFFFFF);
    Scratch::Symbol& left = symbols[static_cast<size_t>(left_index)];
    if (left.id < 0 || left.next < 0) continue;
    Scratch::Symbol& right = symbols[static_cast<size_t>(left.next)];
    // Stale when the pair is not what it was. A pair that spells the same token by another cut still counts, as in
    // Hugging Face tokenizers.
    const auto merge = merges_.find(PairKey(left.id, right.id));
    if (merge == merges_.end() || merge->second.id != candidate.merged) continue;
    left.id = candidate.merged;
    right.id = -1;
    left.next = right.next;
    if (left.next >= 0) symbols[static_cast<size_t>(left.next)].previous = left_index;
    if (left.previous >= 0) push(left.previous);
    push(left_index);
  }
}

}  // namespace rankwise::text
