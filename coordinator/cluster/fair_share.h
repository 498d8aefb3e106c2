#pragma once

#include <cstdint>
#include <set>
#include <string>
#include <utility>

#include "absl/container/flat_hash_map.h"

namespace rankwise::cluster {

// How much service each tenant has had, for a fair choice among those that wait: the virtual token counter of Sheng et
// al., "Fairness in Serving Large Language Models", OSDI 2024, algorithm 2. A tenant pays one unit for a prompt token
// when its sequence goes to a group, and two for each generated token when it comes; who has paid the least is next.
// Whoever comes to wait is lifted to the least counter of those that wait already (or, when none does, to the counter
// of the last that did): time in which a tenant asked for nothing is no credit. Work lost with a group is not paid
// again.
//
// Two tenants that both wait differ by at most 2 · max(prompt units of one request, output units that one tenant's
// running sequences can still draw): Sheng et al., theorem 4.4.
class FairShare {
 public:
  static constexpr int64_t kPromptUnits = 1, kOutputUnits = 2;  // the weights of the paper's evaluation

  // A sequence of `tenant` begins to wait, or ceases to.
  void Arrive(const std::string& tenant);
  void Depart(const std::string& tenant);
  void Pay(const std::string& tenant, int64_t units);

  int64_t paid(const std::string& tenant) const {
    const auto found = counters_.find(tenant);
    return found == counters_.end() ? 0 : found->second.paid;
  }
  size_t size() const { return counters_.size(); }

 private:
  struct Counter {
    int64_t paid = 0;
    int64_t waiting = 0;
  };
  // Bounds what hostile tenant names cost: the tenants that paid the least are forgotten, as if they were new.
  void Trim();

  static constexpr size_t kMostTenants = 1 << 14;
  absl::flat_hash_map<std::string, Counter> counters_;
  std::set<std::pair<int64_t, std::string>> waiting_;  // paid and name of the tenants that wait
  int64_t last_paid_ = 0;                              // of the last tenant that ceased to wait
};

}  // namespace rankwise::cluster
