#include "worker/link/coordinator_link.h"

#include <grpcpp/grpcpp.h>

#include <deque>
#include <optional>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "proto/worker.grpc.pb.h"

namespace rankwise::link {
namespace {

using worker::v1::FromGroup;
using worker::v1::ToGroup;

constexpr int kMaxMessageBytes = 64 << 20;     // what the coordinator accepts and sends
constexpr size_t kMaxOutputsBytes = 16 << 20;  // outputs of more are sent sequence by sequence

absl::Status FromGrpc(const grpc::Status& status) {
  return absl::Status(static_cast<absl::StatusCode>(status.error_code()), status.error_message());
}

// gRPC's threads push what comes in and write what goes out; the engine's thread pops and pushes. The engine's thread
// also creates and destroys it: gRPC ends its callback threads with the last channel, and they must not end themselves.
class Stream : public grpc::ClientBidiReactor<FromGroup, ToGroup> {
 public:
  Stream(const std::shared_ptr<grpc::Channel>& channel, const worker::v1::Join& join)
      : stub_(worker::v1::Groups::NewStub(channel)) {
    stub_->async()->Attach(&context_, this);
    FromGroup first;
    *first.mutable_join() = join;
    Push(std::move(first));
    StartRead(&incoming_);
    StartCall();
  }
  // Waits for gRPC's last reaction. A cancelled call ends at once, whatever the peer does.
  ~Stream() override {
    context_.TryCancel();
    absl::MutexLock lock(&mutex_);
    mutex_.Await(absl::Condition(&is_done_));
  }

  void Push(FromGroup message) {
    absl::MutexLock lock(&mutex_);
    if (is_over_) return;
    outgoing_.push_back(std::move(message));
    WriteNext();
  }

  // Unless something else is on its way, which says as much.
  void PushHeartbeat() {
    absl::MutexLock lock(&mutex_);
    if (is_over_ || is_writing_ || should_half_close_) return;
    outgoing_.emplace_back().mutable_heartbeat();
    WriteNext();
  }

  void PushWritesDone() {
    absl::MutexLock lock(&mutex_);
    should_half_close_ = true;
    WriteNext();
  }

  // The next message; nothing after `wait`; Unavailable or the coordinator's own word once the stream has ended.
  absl::StatusOr<std::optional<ToGroup>> Pop(absl::Duration wait) {
    absl::MutexLock lock(&mutex_);
    const auto has_news = [this] { return !arrived_.empty() || is_done_; };
    if (!mutex_.AwaitWithTimeout(absl::Condition(&has_news), wait)) return std::nullopt;
    if (arrived_.empty()) return ended_.ok() ? absl::UnavailableError("the coordinator ended the stream") : ended_;
    std::optional<ToGroup> message = std::move(arrived_.front());
    arrived_.pop_front();
    return message;
  }

  bool AwaitDone(absl::Duration wait) {
    absl::MutexLock lock(&mutex_);
    return mutex_.AwaitWithTimeout(absl::Condition(&is_done_), wait);
  }

 private:
  void WriteNext() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (is_writing_ || is_over_) return;
    if (!outgoing_.empty()) {
      writing_ = std::move(outgoing_.front());
      outgoing_.pop_front();
      is_writing_ = true;
      StartWrite(&writing_);
    } else if (should_half_close_ && !is_half_closed_) {
      is_half_closed_ = true;
      StartWritesDone();
    }
  }

  void OnWriteDone(bool ok) override {
    absl::MutexLock lock(&mutex_);
    is_writing_ = false;
    if (ok) WriteNext();
  }

  // A read is always in flight, which keeps gRPC's call alive for the writes that the engine's thread starts.
  void OnReadDone(bool ok) override {
    absl::MutexLock lock(&mutex_);
    if (!ok) {
      is_over_ = true;
      return;
    }
    arrived_.push_back(std::move(incoming_));
    StartRead(&incoming_);
  }

  void OnDone(const grpc::Status& status) override {
    absl::MutexLock lock(&mutex_);
    ended_ = FromGrpc(status);
    is_done_ = true;
  }

  std::unique_ptr<worker::v1::Groups::Stub> stub_;
  grpc::ClientContext context_;
  ToGroup incoming_;

  absl::Mutex mutex_;
  FromGroup writing_ ABSL_GUARDED_BY(mutex_);
  std::deque<FromGroup> outgoing_ ABSL_GUARDED_BY(mutex_);
  std::deque<ToGroup> arrived_ ABSL_GUARDED_BY(mutex_);
  absl::Status ended_ ABSL_GUARDED_BY(mutex_);
  bool is_writing_ ABSL_GUARDED_BY(mutex_) = false;
  bool should_half_close_ ABSL_GUARDED_BY(mutex_) = false;
  bool is_half_closed_ ABSL_GUARDED_BY(mutex_) = false;
  bool is_over_ ABSL_GUARDED_BY(mutex_) = false;  // nothing may be written any more
  bool is_done_ ABSL_GUARDED_BY(mutex_) = false;
};

class GrpcLink : public CoordinatorLink {
 public:
  GrpcLink(std::unique_ptr<Stream> stream, const worker::v1::Welcome& welcome, absl::Duration heartbeat_interval)
      : stream_(std::move(stream)), welcome_(welcome) {
    if (heartbeat_interval == absl::InfiniteDuration()) return;
    beating_ = std::thread([this, heartbeat_interval] {
      while (!should_end_.WaitForNotificationWithTimeout(heartbeat_interval)) stream_->PushHeartbeat();
    });
  }
  ~GrpcLink() override {
    should_end_.Notify();
    if (beating_.joinable()) beating_.join();
  }

  uint64_t group() const override { return welcome_.group(); }
  uint64_t epoch() const override { return welcome_.epoch(); }

  absl::StatusOr<Inbox> Poll(absl::Duration wait) override {
    Inbox inbox;
    bool is_empty = true;
    while (true) {
      absl::StatusOr<std::optional<ToGroup>> message = stream_->Pop(is_empty ? wait : absl::ZeroDuration());
      // What came before the end is told first.
      if (!message.ok() && is_empty) return message.status();
      if (!message.ok() || !message->has_value()) break;
      is_empty = false;
      Take(**std::move(message), inbox);
    }
    return inbox;
  }

  void SendOutputs(worker::v1::Outputs outputs) override {
    if (outputs.ByteSizeLong() > kMaxOutputsBytes && outputs.sequences_size() > 1) {
      for (worker::v1::SequenceOutput& output : *outputs.mutable_sequences()) {
        worker::v1::Outputs single;
        single.set_epoch(outputs.epoch());
        *single.add_sequences() = std::move(output);
        SendOutputs(std::move(single));
      }
      return;
    }
    FromGroup message;
    *message.mutable_outputs() = std::move(outputs);
    stream_->Push(std::move(message));
  }

  void SendLoad(rankwise::v1::GroupLoad load) override {
    FromGroup message;
    *message.mutable_load() = std::move(load);
    stream_->Push(std::move(message));
  }

  absl::Status Finish(absl::Duration timeout) override {
    stream_->PushWritesDone();
    if (stream_->AwaitDone(timeout)) return absl::OkStatus();
    return absl::DeadlineExceededError(
        absl::StrCat("the coordinator did not end the stream within ", absl::FormatDuration(timeout)));
  }

 private:
  static void Take(ToGroup message, Inbox& inbox) {
    if (message.has_submit()) inbox.submits.push_back(std::move(*message.mutable_submit()));
    if (message.has_stop()) inbox.should_stop = true;
    for (const uint64_t sequence : message.cancel().sequences()) {
      // Came and went between two polls: it is as if it had never come.
      const auto is_it = [sequence](const worker::v1::Submit& submit) { return submit.sequence() == sequence; };
      if (std::erase_if(inbox.submits, is_it) == 0) inbox.cancels.push_back(sequence);
    }
  }

  const std::unique_ptr<Stream> stream_;
  const worker::v1::Welcome welcome_;
  absl::Notification should_end_;
  std::thread beating_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<CoordinatorLink>> CoordinatorLink::Connect(const LinkOptions& options,
                                                                          const worker::v1::Join& join) {
  grpc::ChannelArguments arguments;
  // Pings notice a coordinator whose host is gone: TCP alone would take minutes.
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 10'000);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 5'000);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  arguments.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  // A channel of its own: a pooled one would come with the back-off of an earlier failure.
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  arguments.SetMaxReceiveMessageSize(kMaxMessageBytes);
  arguments.SetMaxSendMessageSize(kMaxMessageBytes);
  const auto channel = wire::MakeChannel(options.address, options.credentials, arguments);
  const auto deadline = std::chrono::system_clock::now() + absl::ToChronoMilliseconds(options.connect_timeout);
  if (!channel->WaitForConnected(deadline)) {
    return absl::UnavailableError(absl::StrCat("nothing answers at ", options.address));
  }
  auto stream = std::make_unique<Stream>(channel, join);
  absl::StatusOr<std::optional<ToGroup>> first = stream->Pop(options.connect_timeout);
  if (first.ok() && first->has_value() && (*first)->has_welcome()) {
    return std::make_unique<GrpcLink>(std::move(stream), (*first)->welcome(), options.heartbeat_interval);
  }
  if (!first.ok()) return first.status();
  if (!first->has_value()) return absl::UnavailableError(absl::StrCat("no welcome from ", options.address, " in time"));
  return absl::InternalError(absl::StrCat(options.address, " did not begin with a welcome"));
}

}  // namespace rankwise::link
