#include "coordinator/cluster/fair_share.h"

#include <algorithm>
#include <vector>

#include "base/check.h"

namespace rankwise::cluster {

void FairShare::Arrive(const std::string& tenant) {
  if (counters_.size() >= kMostTenants && !counters_.contains(tenant)) Trim();
  Counter& counter = counters_[tenant];
  if (counter.waiting++ > 0) return;
  counter.paid = std::max(counter.paid, waiting_.empty() ? last_paid_ : waiting_.begin()->first);
  waiting_.emplace(counter.paid, tenant);
}

void FairShare::Depart(const std::string& tenant) {
  Counter& counter = counters_.at(tenant);
  RW_CHECK(counter.waiting > 0);
  if (--counter.waiting > 0) return;
  waiting_.erase({counter.paid, tenant});
  last_paid_ = counter.paid;
}

void FairShare::Pay(const std::string& tenant, int64_t units) {
  Counter& counter = counters_[tenant];
  if (counter.waiting > 0) {
    auto place = waiting_.extract({counter.paid, tenant});
    place.value().first += units;
    waiting_.insert(std::move(place));
  }
  counter.paid += units;
}

void FairShare::Trim() {
  std::vector<int64_t> paid;
  for (const auto& [name, counter] : counters_) {
    if (counter.waiting == 0) paid.push_back(counter.paid);
  }
  if (paid.empty()) return;
  std::ranges::nth_element(paid, paid.begin() + static_cast<ptrdiff_t>(paid.size() / 2));
  const int64_t median = paid[paid.size() / 2];
  absl::erase_if(counters_,
                 [median](const auto& entry) { return entry.second.waiting == 0 && entry.second.paid <= median; });
}

}  // namespace rankwise::cluster
