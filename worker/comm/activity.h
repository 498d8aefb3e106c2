#pragma once

#include <atomic>
#include <chrono>
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

// Where the time of steps went. A rank that computes longer than the others makes them wait in their collectives. A
// device's sums are waited for as a whole, with what it computes before them.
struct StepTimes {
  uint64_t steps = 0;                      // that summed or gathered something
  std::chrono::nanoseconds compute{0};     // before and between AllReduceSum and Gather
  std::chrono::nanoseconds collective{0};  // in them
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
    step_is_new_ = true;
    left_ = Clock::now();
    inner_->EnterStep(step);
  }

  // Of the steps since the last call of this. The thread that calls the communicator.
  StepTimes TakeStepTimes() { return std::exchange(times_, {}); }

  absl::Status AllReduceSum(std::span<float> values, absl::Duration timeout) override {
    const Stay stay(*this, Collective::kAllReduceSum);
    return inner_->AllReduceSum(values, timeout);
  }
  absl::Status Wait(absl::Duration timeout) override {
    const Stay stay(*this, Collective::kAllReduceSum);
    return inner_->Wait(timeout);
  }
  absl::Status Gather(std::span<const float> part, std::span<const int64_t> part_counts, std::span<float> all,
                      absl::Duration timeout) override {
    const Stay stay(*this, Collective::kGather);
    return inner_->Gather(part, part_counts, all, timeout);
  }
  absl::Status Broadcast(std::string& message, absl::Duration timeout) override {
    const Stay stay(*this, Collective::kBroadcast);
    return inner_->Broadcast(message, timeout);
  }
  absl::Status GatherMessages(const std::string& message, std::vector<std::string>& messages,
                              absl::Duration timeout) override {
    const Stay stay(*this, Collective::kGatherMessages);
    return inner_->GatherMessages(message, messages, timeout);
  }
  absl::Status Barrier(absl::Duration timeout) override {
    const Stay stay(*this, Collective::kBarrier);
    return inner_->Barrier(timeout);
  }

 private:
  using Clock = std::chrono::steady_clock;

  class Stay {
   public:
    Stay(WatchedCommunicator& watched, Collective collective)
        : watched_(watched),
          is_timed_(collective == Collective::kAllReduceSum || collective == Collective::kGather),
          begun_(Clock::now()) {
      Activity& activity = *watched_.activity_;
      activity.calls.fetch_add(1, std::memory_order_relaxed);
      activity.collective.store(collective, std::memory_order_relaxed);
      if (!is_timed_) return;
      if (std::exchange(watched_.step_is_new_, false)) ++watched_.times_.steps;
      watched_.times_.compute += begun_ - watched_.left_;
    }
    ~Stay() {
      watched_.activity_->collective.store(Collective::kNone, std::memory_order_relaxed);
      if (!is_timed_) return;
      watched_.left_ = Clock::now();
      watched_.times_.collective += watched_.left_ - begun_;
    }

   private:
    WatchedCommunicator& watched_;
    const bool is_timed_;
    const Clock::time_point begun_;
  };

  const std::unique_ptr<Communicator> inner_;
  Activity* const activity_;
  StepTimes times_;
  bool step_is_new_ = true;
  Clock::time_point left_ = Clock::now();  // the step's latest collective, or its beginning
};

}  // namespace rankwise::comm
