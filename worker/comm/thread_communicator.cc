#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "worker/comm/communicator.h"
#include "worker/comm/pacer.h"
#include "worker/comm/preconditions.h"
#include "worker/comm/sum.h"

namespace rankwise::comm {
namespace {

// Where the ranks of one group meet. Each leaves the address of its arguments and sleeps; the last to arrive does the
// work of all, under the lock. So a rank that gives up knows that nobody will touch its arguments afterwards.
// std::mutex, because ThreadSanitizer cannot see into a prebuilt absl::Mutex.
class MeetingPoint {
 public:
  explicit MeetingPoint(int size) : visitors_(size) {}

  int size() const { return static_cast<int>(visitors_.size()); }

  // `work` gets the arguments of all ranks in rank order. One `collective` stands for one type T.
  template <typename T, typename Work>
  absl::Status Meet(int rank, const char* collective, T& arguments, absl::Duration timeout, const Work& work) {
    std::unique_lock lock(mutex_);
    if (!broken_.ok()) return broken_;
    visitors_[rank] = {collective, &arguments};
    if (++arrived_ < size()) return Wait(rank, timeout, lock);

    absl::Status status = CheckSameCollective(rank);
    if (status.ok()) {
      std::vector<T*> all;
      for (const Visitor& visitor : visitors_) all.push_back(static_cast<T*>(visitor.arguments));
      status = work(all);
    }
    if (!status.ok()) return Break(status);
    std::ranges::fill(visitors_, Visitor{});
    arrived_ = 0;
    ++meetings_;
    changed_.notify_all();
    return absl::OkStatus();
  }

 private:
  struct Visitor {
    const char* collective = nullptr;
    void* arguments = nullptr;
  };

  absl::Status Wait(int rank, absl::Duration timeout, std::unique_lock<std::mutex>& lock) {
    const int64_t meeting = meetings_;
    changed_.wait_until(lock, DeadlineAfter(timeout), [&] { return meetings_ != meeting || !broken_.ok(); });
    if (meetings_ != meeting) return absl::OkStatus();
    if (!broken_.ok()) return broken_;
    std::string missing;
    for (int peer = 0; peer < size(); ++peer) {
      if (visitors_[peer].arguments == nullptr) absl::StrAppend(&missing, missing.empty() ? "" : ", ", peer);
    }
    return Break(
        absl::DeadlineExceededError(absl::StrCat("rank ", rank, ": ", visitors_[rank].collective, ": rank ", missing,
                                                 " did not come within ", absl::FormatDuration(timeout))));
  }

  absl::Status CheckSameCollective(int rank) const {
    for (int peer = 0; peer < size(); ++peer) {
      if (std::strcmp(visitors_[peer].collective, visitors_[rank].collective) == 0) continue;
      return absl::InternalError(absl::StrCat("rank ", rank, ": ", visitors_[rank].collective, ": rank ", peer,
                                              " called ", visitors_[peer].collective));
    }
    return absl::OkStatus();
  }

  absl::Status Break(absl::Status status) {
    changed_.notify_all();
    return broken_ = std::move(status);
  }

  std::mutex mutex_;  // Guards all below.
  std::condition_variable changed_;
  std::vector<Visitor> visitors_;  // [size]
  int arrived_ = 0;
  int64_t meetings_ = 0;  // held so far
  absl::Status broken_;
};

absl::Status SumInTree(const std::vector<std::span<float>*>& ranks) {
  const int size = static_cast<int>(ranks.size());
  for (int rank = 1; rank < size; ++rank) {
    if (ranks[rank]->size() == ranks[0]->size()) continue;
    return absl::InternalError(absl::StrCat("AllReduceSum: rank 0 has ", ranks[0]->size(), " values, rank ", rank,
                                            " has ", ranks[rank]->size()));
  }
  for (int distance = 1; distance < size; distance *= 2) {
    for (int left = 0; left + distance < size; left += 2 * distance) {
      AddTo(*ranks[left], *ranks[left + distance]);
    }
  }
  for (int rank = 1; rank < size; ++rank) std::ranges::copy(*ranks[0], ranks[rank]->begin());
  return absl::OkStatus();
}

class ThreadCommunicator final : public Communicator {
 public:
  ThreadCommunicator(std::shared_ptr<MeetingPoint> group, int rank) : group_(std::move(group)), rank_(rank) {}

  int rank() const override { return rank_; }
  int size() const override { return group_->size(); }
  std::string Description() const override {
    return absl::StrCat("threads, ", size(), size() == 1 ? " rank" : " ranks");
  }

  absl::Status AllReduceSum(std::span<float> values, absl::Duration timeout) override {
    return group_->Meet(rank_, "AllReduceSum", values, timeout, SumInTree);
  }

  absl::Status Gather(std::span<const float> part, std::span<const int64_t> part_counts, std::span<float> all,
                      absl::Duration timeout) override {
    CheckGatherShape(rank_, size(), part, part_counts, all);
    struct Arguments {
      std::span<const float> part;
      std::span<float> all;
    } arguments{part, all};
    return group_->Meet(rank_, "Gather", arguments, timeout, [](const std::vector<Arguments*>& ranks) {
      int64_t total = 0;
      for (const Arguments* rank : ranks) total += std::ssize(rank->part);
      if (total != std::ssize(ranks[0]->all)) {
        return absl::InternalError(
            absl::StrCat("Gather: rank 0 expects ", ranks[0]->all.size(), " values, the ranks bring ", total));
      }
      auto out = ranks[0]->all.begin();
      for (const Arguments* rank : ranks) out = std::ranges::copy(rank->part, out).out;
      return absl::OkStatus();
    });
  }

  absl::Status Broadcast(std::string& message, absl::Duration timeout) override {
    return group_->Meet(rank_, "Broadcast", message, timeout, [](const std::vector<std::string*>& ranks) {
      RW_RETURN_IF_ERROR(CheckMessageSize(0, "Broadcast", *ranks[0]));
      for (std::string* message : ranks) {
        if (message != ranks[0]) *message = *ranks[0];
      }
      return absl::OkStatus();
    });
  }

  absl::Status GatherMessages(const std::string& message, std::vector<std::string>& messages,
                              absl::Duration timeout) override {
    struct Arguments {
      const std::string* message;
      std::vector<std::string>* messages;
    } arguments{&message, &messages};
    return group_->Meet(rank_, "GatherMessages", arguments, timeout, [](const std::vector<Arguments*>& ranks) {
      std::vector<std::string> all;
      for (size_t rank = 0; rank < ranks.size(); ++rank) {
        RW_RETURN_IF_ERROR(CheckMessageSize(static_cast<int>(rank), "GatherMessages", *ranks[rank]->message));
        all.push_back(*ranks[rank]->message);
        ranks[rank]->messages->clear();
      }
      ranks[0]->messages->swap(all);
      return absl::OkStatus();
    });
  }

  absl::Status Barrier(absl::Duration timeout) override {
    struct {
    } nothing;
    return group_->Meet(rank_, "Barrier", nothing, timeout, [](const auto&) { return absl::OkStatus(); });
  }

 private:
  std::shared_ptr<MeetingPoint> group_;  // Shared: it lives as long as the last of its ranks.
  const int rank_;
};

}  // namespace

std::vector<std::unique_ptr<Communicator>> CreateThreadCommunicators(int size) {
  RW_CHECK(size >= 1, absl::StrCat("size=", size));
  auto group = std::make_shared<MeetingPoint>(size);
  std::vector<std::unique_ptr<Communicator>> communicators;
  for (int rank = 0; rank < size; ++rank) communicators.push_back(std::make_unique<ThreadCommunicator>(group, rank));
  return communicators;
}

}  // namespace rankwise::comm
