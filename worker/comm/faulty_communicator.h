#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "absl/time/clock.h"
#include "base/status_macros.h"
#include "worker/comm/communicator.h"

namespace rankwise::comm {

// What goes wrong, once: before call number `call` (the first is 1) the rank waits `delay`; then, unless `status` is
// OK, it does not take part, returns `status`, and is broken as a real communicator would be.
struct Fault {
  int64_t call = 0;
  absl::Duration delay = absl::ZeroDuration();
  absl::Status status = absl::OkStatus();
};

// For tests: another communicator, with a fault in one of its calls.
class FaultyCommunicator final : public Communicator {
 public:
  FaultyCommunicator(std::unique_ptr<Communicator> inner, Fault fault)
      : inner_(std::move(inner)), fault_(std::move(fault)) {}

  // Collectives called so far: a run without a fault tells how many places there are to put one.
  int64_t calls() const { return calls_; }

  int rank() const override { return inner_->rank(); }
  int size() const override { return inner_->size(); }
  std::string Description() const override { return "faulty " + inner_->Description(); }
  void EnterStep(uint64_t step) override { inner_->EnterStep(step); }

  absl::Status AllReduceSum(std::span<float> values, absl::Duration timeout) override {
    RW_RETURN_IF_ERROR(NextCall());
    return inner_->AllReduceSum(values, timeout);
  }
  absl::Status Wait(absl::Duration timeout) override {
    RW_RETURN_IF_ERROR(broken_);
    return inner_->Wait(timeout);
  }
  absl::Status Gather(std::span<const float> part, std::span<const int64_t> part_counts, std::span<float> all,
                      absl::Duration timeout) override {
    RW_RETURN_IF_ERROR(NextCall());
    return inner_->Gather(part, part_counts, all, timeout);
  }
  absl::Status Broadcast(std::string& message, absl::Duration timeout) override {
    RW_RETURN_IF_ERROR(NextCall());
    return inner_->Broadcast(message, timeout);
  }
  absl::Status GatherMessages(const std::string& message, std::vector<std::string>& messages,
                              absl::Duration timeout) override {
    RW_RETURN_IF_ERROR(NextCall());
    return inner_->GatherMessages(message, messages, timeout);
  }
  absl::Status Barrier(absl::Duration timeout) override {
    RW_RETURN_IF_ERROR(NextCall());
    return inner_->Barrier(timeout);
  }

 private:
  absl::Status NextCall() {
    RW_RETURN_IF_ERROR(broken_);
    if (++calls_ != fault_.call) return absl::OkStatus();
    absl::SleepFor(fault_.delay);
    return broken_ = fault_.status;
  }

  std::unique_ptr<Communicator> inner_;
  Fault fault_;
  int64_t calls_ = 0;
  absl::Status broken_;
};

}  // namespace rankwise::comm
