#include "worker/comm/staged_communicator.h"

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

namespace rankwise::comm {
namespace {

class StagedCommunicator final : public Communicator {
 public:
  StagedCommunicator(Communicator& host, kernels::Backend& backend) : host_(host), backend_(backend) {}

  int rank() const override { return host_.rank(); }
  int size() const override { return host_.size(); }
  std::string Description() const override { return absl::StrCat("staged over ", host_.Description()); }
  void EnterStep(uint64_t step) override { host_.EnterStep(step); }

  // A rank whose device fails leaves its peers to their deadline.
  absl::Status AllReduceSum(std::span<float> values, absl::Duration timeout) override {
    RW_RETURN_IF_ERROR(broken_);
    if (staging_.size() < values.size()) staging_.resize(values.size());
    const std::span<float> staged = std::span(staging_).first(values.size());
    broken_.Update(backend_.CopyToHost(values.data(), staged));
    if (broken_.ok()) broken_.Update(host_.AllReduceSum(staged, timeout));
    if (broken_.ok()) broken_.Update(backend_.CopyToDevice(staged, values.data()));
    return broken_;
  }

  absl::Status Wait(absl::Duration) override { return broken_; }

  absl::Status Gather(std::span<const float> part, std::span<const int64_t> part_counts, std::span<float> all,
                      absl::Duration timeout) override {
    RW_RETURN_IF_ERROR(broken_);
    return broken_ = host_.Gather(part, part_counts, all, timeout);
  }
  absl::Status Broadcast(std::string& message, absl::Duration timeout) override {
    RW_RETURN_IF_ERROR(broken_);
    return broken_ = host_.Broadcast(message, timeout);
  }
  absl::Status GatherMessages(const std::string& message, std::vector<std::string>& messages,
                              absl::Duration timeout) override {
    RW_RETURN_IF_ERROR(broken_);
    return broken_ = host_.GatherMessages(message, messages, timeout);
  }
  absl::Status Barrier(absl::Duration timeout) override {
    RW_RETURN_IF_ERROR(broken_);
    return broken_ = host_.Barrier(timeout);
  }

 private:
  Communicator& host_;
  kernels::Backend& backend_;
  // Kept until the end: the host may still write there when a call has failed.
  std::vector<float> staging_;
  absl::Status broken_;
};

}  // namespace

std::unique_ptr<Communicator> CreateStagedCommunicator(Communicator& host, kernels::Backend& backend) {
  return std::make_unique<StagedCommunicator>(host, backend);
}

}  // namespace rankwise::comm
