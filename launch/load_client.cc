#include "launch/load_client.h"

#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "launch/client.h"

namespace rankwise::launch {
namespace {

using rankwise::v1::GenerateRequest;
using rankwise::v1::GenerateResponse;
using rankwise::v1::Inference;

constexpr absl::Duration kLook = absl::Milliseconds(50);  // how often for an interrupt and at the progress

// What streams and their starter share.
class Ledger {
 public:
  using Context = std::shared_ptr<grpc::ClientContext>;

  void Began(const Context& context) {
    const absl::MutexLock lock(&mutex_);
    running_.insert(context);
  }
  void Ended(const Context& context, RequestRecord record) {
    const absl::MutexLock lock(&mutex_);
    running_.erase(context);
    record.is_cut_off = is_cut_off_ && record.status.code() == absl::StatusCode::kCancelled;
    records_.push_back(std::move(record));
  }

  // True when fewer than `count` run; false at `deadline`.
  bool AwaitFewer(size_t count, absl::Time deadline) {
    const auto is_fewer = [this, count]() ABSL_SHARED_LOCKS_REQUIRED(mutex_) { return running_.size() < count; };
    const absl::MutexLock lock(&mutex_);
    return mutex_.AwaitWithDeadline(absl::Condition(&is_fewer), deadline);
  }
  void CutOff() {
    std::set<Context> running;
    {
      const absl::MutexLock lock(&mutex_);
      is_cut_off_ = true;
      running = running_;
    }
    for (const Context& context : running) context->TryCancel();
  }
  int64_t ended() const {
    const absl::MutexLock lock(&mutex_);
    return std::ssize(records_);
  }
  std::vector<RequestRecord> TakeRecords() {
    const absl::MutexLock lock(&mutex_);
    return std::move(records_);
  }

 private:
  mutable absl::Mutex mutex_;
  std::set<Context> running_ ABSL_GUARDED_BY(mutex_);
  std::vector<RequestRecord> records_ ABSL_GUARDED_BY(mutex_);
  bool is_cut_off_ ABSL_GUARDED_BY(mutex_) = false;
};

// One request; deletes itself at its end.
class Stream final : public grpc::ClientReadReactor<GenerateResponse> {
 public:
  Stream(Inference::Stub& stub, GenerateRequest request, absl::Time due, absl::Duration deadline,
         std::shared_ptr<Ledger> ledger)
      : request_(std::move(request)), due_(due), ledger_(std::move(ledger)) {
    record_.prompt_tokens = request_.token_ids().ids_size();
    context_->set_deadline(absl::ToChronoTime(due + deadline));
    ledger_->Began(context_);
    stub.async()->Generate(context_.get(), &request_, this);
    StartRead(&piece_);
    StartCall();
  }

  void OnReadDone(bool ok) override {
    if (!ok) return;
    if (piece_.token_ids_size() > 0) {
      const absl::Time now = absl::Now();
      if (record_.output_tokens == 0) {
        record_.first_token_ms = absl::ToDoubleMilliseconds(now - due_);
      } else {
        record_.gaps_ms.push_back(absl::ToDoubleMilliseconds(now - last_token_));
      }
      record_.output_tokens += piece_.token_ids_size();
      last_token_ = now;
    }
    if (piece_.has_finish()) {
      reason_ = piece_.finish().reason();
      record_.cached_prompt_tokens = static_cast<int32_t>(piece_.finish().cached_prompt_tokens());
    }
    StartRead(&piece_);
  }

  void OnDone(const grpc::Status& status) override {
    record_.total_ms = absl::ToDoubleMilliseconds(absl::Now() - due_);
    record_.status = FromGrpc(status);
    const auto asked = static_cast<int32_t>(request_.sampling().max_tokens());
    if (status.ok() && record_.output_tokens != asked) {
      record_.status = absl::DataLossError(absl::StrCat("ended after ", record_.output_tokens, " of ", asked,
                                                        " tokens: ", rankwise::v1::FinishReason_Name(reason_)));
    }
    ledger_->Ended(context_, std::move(record_));
    delete this;
  }

 private:
  const std::shared_ptr<grpc::ClientContext> context_ = std::make_shared<grpc::ClientContext>();
  const GenerateRequest request_;
  const absl::Time due_;
  const std::shared_ptr<Ledger> ledger_;
  GenerateResponse piece_;
  absl::Time last_token_;
  rankwise::v1::FinishReason reason_ = rankwise::v1::FINISH_REASON_UNSPECIFIED;
  RequestRecord record_;
};

GenerateRequest RequestFor(const LoadOptions& options, int64_t i) {
  const Arrival& arrival = options.arrivals[static_cast<size_t>(i)];
  GenerateRequest request;
  const std::vector<int32_t> ids = DrawPrompt(options.seed, options.first_index + i, arrival.prompt_tokens,
                                              options.shared_prefix, options.vocab_size);
  request.mutable_token_ids()->mutable_ids()->Add(ids.begin(), ids.end());
  request.mutable_sampling()->set_max_tokens(static_cast<uint32_t>(arrival.output_tokens));
  request.mutable_sampling()->set_temperature(0);
  request.mutable_sampling()->set_ignore_eos(true);
  return request;
}

}  // namespace

LoadOutcome RunLoad(const std::vector<std::unique_ptr<Inference::Stub>>& stubs, const LoadOptions& options,
                    const Interrupt& interrupt, ProgressBar& progress) {
  const auto ledger = std::make_shared<Ledger>();
  LoadOutcome outcome;
  const absl::Time begin = absl::Now();
  absl::Time next_look = begin;
  // True as soon as `is_due` is, which waits until the time that it gets; false when the load is interrupted.
  const auto wait = [&](const auto& is_due) {
    do {
      if (absl::Now() < next_look) continue;
      next_look = absl::Now() + kLook;
      progress.Update(ledger->ended());
      if (interrupt.has_come()) return false;
    } while (!is_due(next_look));
    return true;
  };
  const auto count = std::ssize(options.arrivals);
  for (int64_t i = 0; i < count; ++i) {
    GenerateRequest request = RequestFor(options, i);
    absl::Time due = begin + options.arrivals[static_cast<size_t>(i)].at;
    if (options.concurrency > 0) {
      outcome.is_interrupted =
          !wait([&](absl::Time until) { return ledger->AwaitFewer(static_cast<size_t>(options.concurrency), until); });
      due = absl::Now();
    } else {
      outcome.is_interrupted = !wait([&](absl::Time until) {
        absl::SleepFor(std::min(until, due) - absl::Now());
        return absl::Now() >= due;
      });
    }
    if (outcome.is_interrupted) break;
    new Stream(*stubs[static_cast<size_t>(i) % stubs.size()], std::move(request), due, options.deadline, ledger);
  }
  const auto all_ended = [&](absl::Time until) { return ledger->AwaitFewer(1, until); };
  if (outcome.is_interrupted || !wait(all_ended)) {
    outcome.is_interrupted = true;
    ledger->CutOff();
    all_ended(absl::InfiniteFuture());  // at once: calls that are cancelled end here, whatever the server does
  }
  progress.Update(ledger->ended());
  outcome.seconds = absl::ToDoubleSeconds(absl::Now() - begin);
  outcome.records = ledger->TakeRecords();
  return outcome;
}

}  // namespace rankwise::launch
