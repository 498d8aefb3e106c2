#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "worker/comm/collective.h"
#include "worker/comm/communicator.h"

// What a rank is doing, for those who watch it: written by the thread that calls the communicator, read by any other.
namespace rankwise::comm {

// One look at it. Plain bytes, so that it can travel.
struct ActivitySnapshot {
  uint64_t step = 0;                          // of the latest plan; 0 before the first
  uint64_t calls = 0;                         // collectives begun
  Collective collective = Collective::kNone;  // it waits in; kNone: it computes
};

struct Activity {
  std::atomic<uint64_t> step = 0;
  std::atomic<uint64_t> calls = 0;
  std::atomic<Collective> collective = Collective::kNone;

  ActivitySnapshot Snapshot() const { return {step, calls, collective}; }
};

// Another communicator that tells in `activity`, which must outlive it, what it does.
class WatchedCommunicator final : public Communicator {
 public:
  WatchedCommunicator(std::unique_ptr<Communicator> inner, Activity* activity)
      : inner_(std::move(inner)), activity_(activity) {}

  int rank() const override { return inner_->rank(); }
  int size() const override { return inner_->size(); }
  std::string Description() const override { return inner_->Description(); }
  void EnterStep(uint64_t step) override {
    activity_->step.store(step, std::memory_order_relaxed);
    inner_->EnterStep(step);
  }

  absl::Status AllReduceSum(std::span<float> values, absl::Duration timeout) override {
    const Stay stay(activity_, Collective::kAllReduceSum);
    return inner_->AllReduceSum(values, timeout);
  }
  absl::Status Wait(absl::Duration timeout) override {
    const Stay stay(activity_, Collective::kAllReduceSum);
    return inner_->Wait(timeout);
  }
  absl::Status Gather(std::span<const float> part, std::span<const int64_t> part_counts, std::span<float> all,
                      absl::Duration timeout) override {
    const Stay stay(activity_, Collective::kGather);
    return inner_->Gather(part, part_counts, all, timeout);
  }
  absl::Status Broadcast(std::string& message, absl::Duration timeout) override {
    const Stay stay(activity_, Collective::kBroadcast);
    return inner_->Broadcast(message, timeout);
  }
  absl::Status GatherMessages(const std::string& message, std::vector<std::string>& messages,
                              absl::Duration timeout) override {
    const Stay stay(activity_, Collective::kGatherMessages);
    return inner_->GatherMessages(message, messages, timeout);
  }
  absl::Status Barrier(absl::Duration timeout) override {
    const Stay stay(activity_, Collective::kBarrier);
    return inner_->Barrier(timeout);
  }

 private:
  class Stay {
   public:
    Stay(Activity* activity, Collective collective) : activity_(activity) {
      activity_->calls.fetch_add(1, std::memory_order_relaxed);
      activity_->collective.store(collective, std::memory_order_relaxed);
    }
    ~Stay() { activity_->collective.store(Collective::kNone, std::memory_order_relaxed); }

   private:
    Activity* activity_;
  };

  const std::unique_ptr<Communicator> inner_;
  Activity* const activity_;
};

}  // namespace rankwise::comm
