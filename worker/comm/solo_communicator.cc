#include <algorithm>

#include "worker/comm/communicator.h"
#include "worker/comm/preconditions.h"

namespace rankwise::comm {
namespace {

class SoloCommunicator final : public Communicator {
 public:
  int rank() const override { return 0; }
  int size() const override { return 1; }
  std::string Description() const override { return "solo, 1 rank"; }

  absl::Status AllReduceSum(std::span<float>, absl::Duration) override { return broken_; }

  absl::Status Gather(std::span<const float> part, std::span<const int64_t> part_counts, std::span<float> all,
                      absl::Duration) override {
    CheckGatherShape(0, 1, part, part_counts, all);
    std::ranges::copy(part, all.begin());
    return broken_;
  }

  absl::Status Broadcast(std::string& message, absl::Duration) override {
    broken_.Update(CheckMessageSize(0, "Broadcast", message));
    return broken_;
  }

  absl::Status GatherMessages(const std::string& message, std::vector<std::string>& messages, absl::Duration) override {
    broken_.Update(CheckMessageSize(0, "GatherMessages", message));
    messages.assign(1, message);
    return broken_;
  }

  absl::Status Barrier(absl::Duration) override { return broken_; }

 private:
  absl::Status broken_;
};

}  // namespace

std::unique_ptr<Communicator> CreateSoloCommunicator() { return std::make_unique<SoloCommunicator>(); }

}  // namespace rankwise::comm
