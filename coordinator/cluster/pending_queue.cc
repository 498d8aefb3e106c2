#include "coordinator/cluster/pending_queue.h"

#include <utility>

namespace rankwise::cluster {

void PendingQueue::Add(const Entry& entry) {
  if (priorities_[entry.priority][entry.tenant].insert(entry.sequence).second) ++size_;
}

void PendingQueue::Remove(const Entry& entry) {
  const auto level = priorities_.find(entry.priority);
  if (level == priorities_.end()) return;
  const auto tenant = level->second.find(entry.tenant);
  if (tenant == level->second.end() || tenant->second.erase(entry.sequence) == 0) return;
  --size_;
  if (tenant->second.empty()) level->second.erase(tenant);
  if (level->second.empty()) priorities_.erase(level);
}

std::optional<uint64_t> PendingQueue::Next(const FairShare& share) const {
  if (priorities_.empty()) return std::nullopt;
  std::optional<std::pair<int64_t, uint64_t>> best;
  for (const auto& [tenant, sequences] : priorities_.begin()->second) {
    const std::pair<int64_t, uint64_t> candidate(share.paid(tenant), *sequences.begin());
    if (!best || candidate < *best) best = candidate;
  }
  return best->second;
}

}  // namespace rankwise::cluster
