#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>

#include "coordinator/cluster/fair_share.h"

namespace rankwise::cluster {

// Sequences that wait for a group. Next: the highest priority; of one priority the tenant that has paid the least, so
// that a tenant's burst delays mostly itself; of one tenant the oldest sequence.
class PendingQueue {
 public:
  struct Entry {
    int32_t priority = 0;
    std::string tenant;
    uint64_t sequence = 0;  // numbers rise with arrival
  };

  void Add(const Entry& entry);
  // Idempotent.
  void Remove(const Entry& entry);
  std::optional<uint64_t> Next(const FairShare& share) const;
  uint32_t size() const { return size_; }

 private:
  using Tenants = std::map<std::string, std::set<uint64_t>>;  // no set is empty
  std::map<int32_t, Tenants, std::greater<>> priorities_;     // no map is empty
  uint32_t size_ = 0;
};

}  // namespace rankwise::cluster
