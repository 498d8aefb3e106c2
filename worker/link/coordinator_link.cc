#include "worker/link/coordinator_link.h"

#include <grpcpp/grpcpp.h>

#include <deque>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "proto/worker.grpc.pb.h"

namespace rankwise::link {
namespace {

using worker::v1::FromGroup;
using worker::v1::ToGroup;

absl::Status FromGrpc(const grpc::Status& status) {
  return absl::Status(static_cast<absl::StatusCode>(status.error_code()), status.error_message());
}

// gRPC's threads push what comes in and write what goes out; the engine's thread pops and pushes. The reactor owns
// itself while the call lives, so that a link can be dropped at any time.
class Stream : public grpc::ClientBidiReactor<FromGroup, ToGroup>, public std::enable_shared_from_this<Stream> {
 public:
  explicit Stream(const std::shared_ptr<grpc::Channel>& channel) : stub_(worker::v1::Groups::NewStub(channel)) {}

  void Start(const worker::v1::Join& join) {
    self_ = shared_from_this();
    stub_->async()->Attach(&context_, this);
    FromGroup first;
    *first.mutable_join() = join;
    Push(std::move(first));
    StartRead(&incoming_);
    StartCall();
  }

  void Push(FromGroup message) {
    absl::MutexLock lock(&mutex_);
    if (is_done_) return;
    outgoing_.push_back(std::move(message));
    WriteNext();
  }

  void PushWritesDone() {
    absl::MutexLock lock(&mutex_);
    should_half_close_ = true;
    WriteNext();
  }

  void Cancel() { context_.TryCancel(); }

  // The next message, or the error that ended the stream, or DeadlineExceeded after `wait`.
  absl::StatusOr<ToGroup> Pop(absl::Duration wait) {
    absl::MutexLock lock(&mutex_);
    const auto has_news = [this] { return !arrived_.empty() || is_done_; };
    if (!mutex_.AwaitWithTimeout(absl::Condition(&has_news), wait))
      return absl::DeadlineExceededError("no message in time");
    if (arrived_.empty()) return ended_.ok() ? absl::UnavailableError("the coordinator closed the stream") : ended_;
    ToGroup message = std::move(arrived_.front());
    arrived_.pop_front();
    return message;
  }

  bool AwaitDone(absl::Duration wait) {
    absl::MutexLock lock(&mutex_);
    return mutex_.AwaitWithTimeout(absl::Condition(&is_done_), wait);
  }

 private:
  void WriteNext() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (is_writing_) return;
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

  void OnReadDone(bool ok) override {
    if (!ok) return;
    {
      absl::MutexLock lock(&mutex_);
      arrived_.push_back(std::move(incoming_));
    }
    StartRead(&incoming_);
  }

  void OnDone(const grpc::Status& status) override {
    std::shared_ptr<Stream> self;  // may be the last reference, so it is declared before the lock and goes after it
    absl::MutexLock lock(&mutex_);
    ended_ = FromGrpc(status);
    is_done_ = true;
    self.swap(self_);
  }

  std::unique_ptr<worker::v1::Groups::Stub> stub_;
  grpc::ClientContext context_;
  std::shared_ptr<Stream> self_;  // while the call lives
  ToGroup incoming_;

  absl::Mutex mutex_;
  FromGroup writing_ ABSL_GUARDED_BY(mutex_);
  std::deque<FromGroup> outgoing_ ABSL_GUARDED_BY(mutex_);
  std::deque<ToGroup> arrived_ ABSL_GUARDED_BY(mutex_);
  absl::Status ended_ ABSL_GUARDED_BY(mutex_);
  bool is_writing_ ABSL_GUARDED_BY(mutex_) = false;
  bool should_half_close_ ABSL_GUARDED_BY(mutex_) = false;
  bool is_half_closed_ ABSL_GUARDED_BY(mutex_) = false;
  bool is_done_ ABSL_GUARDED_BY(mutex_) = false;
};

class GrpcLink : public CoordinatorLink {
 public:
  GrpcLink(std::shared_ptr<Stream> stream, const worker::v1::Welcome& welcome)
      : stream_(std::move(stream)), welcome_(welcome) {}
  ~GrpcLink() override { stream_->Cancel(); }

  uint64_t group() const override { return welcome_.group(); }
  uint64_t epoch() const override { return welcome_.epoch(); }

  absl::StatusOr<Inbox> Poll(absl::Duration wait) override {
    Inbox inbox;
    while (true) {
      absl::StatusOr<ToGroup> message = stream_->Pop(wait);
      if (absl::IsDeadlineExceeded(message.status())) return inbox;
      if (!message.ok()) return message.status();
      wait = absl::ZeroDuration();
      if (message->has_submit()) inbox.submits.push_back(std::move(*message->mutable_submit()));
      if (message->has_cancel()) {
        inbox.cancels.insert(inbox.cancels.end(), message->cancel().sequences().begin(),
                             message->cancel().sequences().end());
      }
      if (message->has_stop()) inbox.should_stop = true;
    }
  }

  void SendOutputs(worker::v1::Outputs outputs) override {
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
  const std::shared_ptr<Stream> stream_;
  const worker::v1::Welcome welcome_;
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
  arguments.SetMaxReceiveMessageSize(64 << 20);
  const auto channel = grpc::CreateCustomChannel(options.address, grpc::InsecureChannelCredentials(), arguments);
  const auto deadline = std::chrono::system_clock::now() + absl::ToChronoMilliseconds(options.connect_timeout);
  if (!channel->WaitForConnected(deadline)) {
    return absl::UnavailableError(absl::StrCat("nothing answers at ", options.address));
  }
  auto stream = std::make_shared<Stream>(channel);
  stream->Start(join);
  // gRPC's callback threads end with the last channel that used them, and abort when one of them drops it, as a stream
  // that outlives its link does. So the newest channel always lives.
  static auto& newest = *new std::shared_ptr<grpc::Channel>;
  newest = channel;
  absl::StatusOr<ToGroup> first = stream->Pop(options.connect_timeout);
  if (first.ok() && first->has_welcome()) return std::make_unique<GrpcLink>(std::move(stream), first->welcome());
  stream->Cancel();
  if (first.ok()) return absl::InternalError("the coordinator did not begin with a welcome");
  return first.status();
}

}  // namespace rankwise::link
