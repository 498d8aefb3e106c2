#include "coordinator/frontend/groups_service.h"

#include <atomic>
#include <deque>
#include <string>
#include <utility>

#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "base/log.h"
#include "coordinator/frontend/grpc_status.h"
#include "proto/credentials.h"

namespace rankwise::frontend {
namespace {

using worker::v1::FromGroup;
using worker::v1::ToGroup;

// One epoch's stream, from the dial to gRPC's last word; deletes itself then. Lock order: the cluster's, then this
// one's, so nothing here calls the cluster with the lock held.
class Attachment final : public grpc::ServerBidiReactor<FromGroup, ToGroup>, public cluster::GroupChannel {
 public:
  Attachment(cluster::Cluster* cluster, std::string peer) : cluster_(cluster), peer_(std::move(peer)) {
    StartRead(&incoming_);
  }

  void Send(ToGroup message) override {
    absl::MutexLock lock(&mutex_);
    outgoing_.push_back(std::move(message));
    WriteNext();
  }

  void Close(const absl::Status& reason) override {
    if (!reason.ok()) spdlog::warn("epoch of {} is over: {}", peer_, reason.ToString());
    absl::MutexLock lock(&mutex_);
    FinishOnce(reason);
  }

  void OnReadDone(bool ok) override {
    if (!ok) return Leave(absl::OkStatus());
    if (const absl::Status taken = Take(); !taken.ok()) {
      spdlog::warn("refused {}: {}", peer_, taken.ToString());
      return Leave(taken);
    }
    absl::MutexLock lock(&mutex_);
    if (!is_finished_) StartRead(&incoming_);
  }

  void OnWriteDone(bool ok) override {
    absl::MutexLock lock(&mutex_);
    is_writing_ = false;
    if (ok) WriteNext();
  }

  void OnCancel() override { Leave(absl::CancelledError("the group's stream broke")); }

  void OnDone() override {
    Leave(absl::OkStatus());
    if (epoch_ != 0) spdlog::info("epoch {} ended", epoch_);
    delete this;
  }

 private:
  absl::Status Take() {
    const absl::Time now = absl::Now();
    if (epoch_ == 0) return Join(now);
    if (incoming_.has_outputs()) {
      cluster_->TakeOutputs(epoch_, incoming_.outputs(), now);
    } else if (incoming_.has_load()) {
      cluster_->TakeLoad(epoch_, incoming_.load(), now);
    } else if (incoming_.has_heartbeat()) {
      cluster_->TakeHeartbeat(epoch_, now);
    } else {
      return absl::InvalidArgumentError("neither outputs, load nor heartbeat follow a join");
    }
    return absl::OkStatus();
  }

  absl::Status Join(absl::Time now) {
    if (!incoming_.has_join()) return absl::InvalidArgumentError("the first message must be a join");
    const auto welcome = cluster_->Join(incoming_.join(), this, now);
    if (!welcome.ok()) return welcome.status();
    epoch_ = welcome->epoch();
    const rankwise::v1::GetModelInfoResponse& model = incoming_.join().model();
    spdlog::info("group {} joined as epoch {} from {}: tp {}, kv {}, {} activations, {}", welcome->group(),
                 welcome->epoch(), peer_, model.tp(), model.kv_format(), model.activations(), model.backend());
    return absl::OkStatus();
  }

  void WriteNext() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (is_writing_ || is_finished_ || outgoing_.empty()) return;
    writing_ = std::move(outgoing_.front());
    outgoing_.pop_front();
    is_writing_ = true;
    StartWrite(&writing_);
  }

  void Leave(const absl::Status& reason) {
    if (epoch_ != 0) cluster_->Leave(epoch_, absl::Now());
    absl::MutexLock lock(&mutex_);
    FinishOnce(reason);
  }

  void FinishOnce(const absl::Status& reason) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (std::exchange(is_finished_, true)) return;
    outgoing_.clear();
    Finish(ToGrpc(reason));
  }

  cluster::Cluster* const cluster_;
  const std::string peer_;
  FromGroup incoming_;               // of the reading reaction
  std::atomic<uint64_t> epoch_ = 0;  // 0 before the welcome

  absl::Mutex mutex_;
  ToGroup writing_ ABSL_GUARDED_BY(mutex_);
  std::deque<ToGroup> outgoing_ ABSL_GUARDED_BY(mutex_);
  bool is_writing_ ABSL_GUARDED_BY(mutex_) = false;
  bool is_finished_ ABSL_GUARDED_BY(mutex_) = false;
};

// A call that ends before it has begun.
class Refusal final : public grpc::ServerBidiReactor<FromGroup, ToGroup> {
 public:
  explicit Refusal(const absl::Status& status) { Finish(ToGrpc(status)); }
  void OnDone() override { delete this; }
};

}  // namespace

grpc::ServerBidiReactor<FromGroup, ToGroup>* GroupsService::Attach(grpc::CallbackServerContext* context) {
  if (const absl::Status authorized = wire::CheckToken(context->client_metadata(), token_); !authorized.ok()) {
    spdlog::warn("refused {}: {}", context->peer(), std::string(authorized.message()));
    return new Refusal(authorized);
  }
  return new Attachment(cluster_, context->peer());
}

}  // namespace rankwise::frontend
