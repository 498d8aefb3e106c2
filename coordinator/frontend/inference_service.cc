#include "coordinator/frontend/inference_service.h"

#include <deque>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "coordinator/frontend/admission.h"
#include "coordinator/frontend/sample_stream.h"

namespace rankwise::frontend {

using cluster::Ending;
using rankwise::v1::GenerateRequest;
using rankwise::v1::GenerateResponse;
using worker::v1::SequenceOutput;

namespace {

// Responses of one slow client that may wait; it is then given up.
constexpr size_t kMaxWaitingResponses = 1 << 16;

grpc::Status ToGrpc(const absl::Status& status) {
  return grpc::Status(static_cast<grpc::StatusCode>(status.code()), std::string(status.message()));
}

grpc::ServerUnaryReactor* Reply(grpc::CallbackServerContext* context, const absl::Status& status = absl::OkStatus()) {
  auto* reactor = context->DefaultReactor();
  reactor->Finish(ToGrpc(status));
  return reactor;
}

uint64_t RandomNumber() {
  std::random_device device;
  return uint64_t{device()} << 32 | device();
}

}  // namespace

// One Generate stream. Lock order: the cluster's, then this one's, so nothing here calls the cluster with the lock held.
class GenerateCall : public grpc::ServerWriteReactor<GenerateResponse>, public cluster::SequenceListener {
 public:
  GenerateCall(InferenceService* service, const GenerateRequest& request) : service_(service) {
    const absl::Status begun = Begin(request);
    absl::MutexLock lock(&mutex_);
    if (!begun.ok()) FinishOnce(begun);
    is_begun_ = true;
    WriteNext();
  }

  bool OnOutput(uint64_t sequence, const SequenceOutput& output, uint32_t replays) override {
    absl::MutexLock lock(&mutex_);
    Sample& sample = samples_.at(sequence);
    return !Deliver(sample, sample.stream.Take(output, replays));
  }

  void OnEnd(uint64_t sequence, Ending ending, uint32_t replays) override {
    absl::MutexLock lock(&mutex_);
    Sample& sample = samples_.at(sequence);
    Deliver(sample, sample.stream.End(ending == Ending::kDeadline ? rankwise::v1::FINISH_REASON_DEADLINE
                                                                  : rankwise::v1::FINISH_REASON_CANCELLED,
                                      replays));
  }

  void OnFailed(uint64_t, const absl::Status& status) override {
    absl::MutexLock lock(&mutex_);
    FinishOnce(status);
  }

  void OnWriteDone(bool ok) override {
    absl::MutexLock lock(&mutex_);
    is_writing_ = false;
    if (ok) WriteNext();
  }

  void OnCancel() override {
    RemoveSequences();
    absl::MutexLock lock(&mutex_);
    FinishOnce(absl::CancelledError("the client is gone or its deadline has passed"));
  }

  void OnDone() override {
    RemoveSequences();
    {
      absl::MutexLock lock(&service_->mutex_);
      if (is_registered_) service_->live_.erase(request_id_);
    }
    delete this;
  }

 private:
  struct Sample {
    SampleStream stream;
    bool is_first = true;
  };

  absl::Status Begin(const GenerateRequest& request) {
    const auto model = service_->cluster_->model();
    if (!model) return absl::UnavailableError("no worker group has joined yet");
    absl::StatusOr<Admission> admission = Admit(request, *model, service_->tokenizer_, RandomNumber());
    if (!admission.ok()) return admission.status();
    request_id_ = request.request_id().empty() ? service_->FreshRequestId() : request.request_id();
    {
      absl::MutexLock lock(&service_->mutex_);
      if (!service_->live_.try_emplace(request_id_).second) {
        return absl::AlreadyExistsError(absl::StrCat("request ", request_id_, " is live"));
      }
      is_registered_ = true;
    }
    std::vector<SampleStream> streams;
    for (const worker::v1::Submit& submit : admission->sequences) {
      auto stream = SampleStream::Create(request, {.index = static_cast<uint32_t>(streams.size()),
                                                   .prompt_tokens = admission->prompt_tokens,
                                                   .seed = submit.sampling().seed(),
                                                   .tokenizer = service_->tokenizer_});
      if (!stream.ok()) return stream.status();
      streams.push_back(*std::move(stream));
    }
    const absl::Time now = absl::Now();
    const absl::Time deadline =
        request.timeout_ms() > 0 ? now + absl::Milliseconds(std::min<uint64_t>(request.timeout_ms(), 1ull << 40)) : absl::InfiniteFuture();
    return SubmitAll(*std::move(admission), std::move(streams), deadline, now);
  }

  // Output may arrive before the numbers are known here, so it waits at the lock until the samples are in place.
  absl::Status SubmitAll(Admission admission, std::vector<SampleStream> streams, absl::Time deadline, absl::Time now) {
    absl::StatusOr<std::vector<uint64_t>> numbers =
        service_->cluster_->Submit(std::move(admission.sequences), this, deadline, now, [&](std::span<const uint64_t> given) {
          absl::MutexLock lock(&mutex_);
          for (size_t i = 0; i < given.size(); ++i) samples_.emplace(given[i], Sample{std::move(streams[i])});
          unfinished_ = given.size();
        });
    if (!numbers.ok()) return numbers.status();
    absl::MutexLock lock(&service_->mutex_);
    service_->live_[request_id_] = *std::move(numbers);
    return absl::OkStatus();
  }

  // True when it was the sample's last message.
  bool Deliver(Sample& sample, SampleStream::Piece piece) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (std::exchange(sample.is_first, false)) piece.message.set_request_id(request_id_);
    const bool is_last = piece.is_last;
    outgoing_.push_back(std::move(piece.message));
    if (is_last) --unfinished_;
    if (outgoing_.size() > kMaxWaitingResponses) {
      FinishOnce(absl::ResourceExhaustedError("the client reads too slowly"));
    }
    WriteNext();
    return is_last || is_finished_;
  }

  void WriteNext() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (!is_begun_ || is_writing_ || is_finished_) return;
    if (outgoing_.empty()) {
      if (unfinished_ == 0) FinishOnce(absl::OkStatus());
      return;
    }
    writing_ = std::move(outgoing_.front());
    outgoing_.pop_front();
    is_writing_ = true;
    StartWrite(&writing_);
  }

  void FinishOnce(const absl::Status& status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (std::exchange(is_finished_, true)) return;
    Finish(ToGrpc(status));
  }

  void RemoveSequences() {
    std::vector<uint64_t> numbers;
    {
      absl::MutexLock lock(&mutex_);
      for (const auto& [number, sample] : samples_) numbers.push_back(number);
    }
    for (const uint64_t number : numbers) service_->cluster_->Remove(number);
  }

  InferenceService* const service_;
  std::string request_id_;
  bool is_registered_ = false;

  absl::Mutex mutex_;
  std::map<uint64_t, Sample> samples_ ABSL_GUARDED_BY(mutex_);
  size_t unfinished_ ABSL_GUARDED_BY(mutex_) = 0;
  std::deque<GenerateResponse> outgoing_ ABSL_GUARDED_BY(mutex_);
  GenerateResponse writing_ ABSL_GUARDED_BY(mutex_);
  bool is_begun_ ABSL_GUARDED_BY(mutex_) = false;
  bool is_writing_ ABSL_GUARDED_BY(mutex_) = false;
  bool is_finished_ ABSL_GUARDED_BY(mutex_) = false;
};

// Waits until nothing is live. Finished by the ticker, or by its own deadline.
class DrainCall : public grpc::ServerUnaryReactor {
 public:
  DrainCall(InferenceService* service, rankwise::v1::DrainResponse* response) : service_(service), response_(response) {
    absl::MutexLock lock(&service_->mutex_);
    service_->drains_.insert(this);
  }
  // Requires the service's lock.
  bool FinishIfEmpty() {
    const uint32_t live = service_->cluster_->live();
    if (live > 0) return false;
    response_->set_finished(true);
    Finish(grpc::Status::OK);
    return true;
  }
  void OnCancel() override {
    absl::MutexLock lock(&service_->mutex_);
    if (service_->drains_.erase(this) == 1) Finish(grpc::Status::CANCELLED);
  }
  void OnDone() override { delete this; }

 private:
  InferenceService* const service_;
  rankwise::v1::DrainResponse* const response_;
};

InferenceService::InferenceService(cluster::Cluster* cluster, const text::Tokenizer* tokenizer, std::string model_name)
    : cluster_(cluster), tokenizer_(tokenizer), model_name_(std::move(model_name)), id_base_(RandomNumber()) {}

InferenceService::~InferenceService() = default;

std::string InferenceService::FreshRequestId() { return absl::StrFormat("rw-%016x-%d", id_base_, next_id_++); }

grpc::ServerWriteReactor<GenerateResponse>* InferenceService::Generate(grpc::CallbackServerContext*,
                                                                       const GenerateRequest* request) {
  return new GenerateCall(this, *request);
}

grpc::ServerUnaryReactor* InferenceService::Tokenize(grpc::CallbackServerContext* context,
                                                     const rankwise::v1::TokenizeRequest* request,
                                                     rankwise::v1::TokenizeResponse* response) {
  if (tokenizer_ == nullptr) return Reply(context, absl::FailedPreconditionError("no tokenizer is loaded"));
  if (request->text().size() > kMaxPromptBytes) {
    return Reply(context, absl::InvalidArgumentError(absl::StrCat("text of ", request->text().size(),
                                                                  " bytes exceeds the limit of ", kMaxPromptBytes)));
  }
  text::EncodeOptions options;
  if (request->omit_special()) options.add_bos = false;
  const auto ids = tokenizer_->Encode(request->text(), options);
  if (!ids.ok()) return Reply(context, ids.status());
  response->mutable_token_ids()->Assign(ids->begin(), ids->end());
  return Reply(context);
}

grpc::ServerUnaryReactor* InferenceService::Detokenize(grpc::CallbackServerContext* context,
                                                       const rankwise::v1::DetokenizeRequest* request,
                                                       rankwise::v1::DetokenizeResponse* response) {
  if (tokenizer_ == nullptr) return Reply(context, absl::FailedPreconditionError("no tokenizer is loaded"));
  for (const int32_t id : request->token_ids()) {
    if (id < 0 || id >= tokenizer_->vocab_size()) {
      return Reply(context, absl::InvalidArgumentError(absl::StrCat("token ", id, " is outside [0, ", tokenizer_->vocab_size(), ")")));
    }
  }
  const std::vector<int32_t> ids(request->token_ids().begin(), request->token_ids().end());
  response->set_text(tokenizer_->Decode(ids, !request->keep_special()));
  return Reply(context);
}

grpc::ServerUnaryReactor* InferenceService::GetModelInfo(grpc::CallbackServerContext* context,
                                                         const rankwise::v1::GetModelInfoRequest*,
                                                         rankwise::v1::GetModelInfoResponse* response) {
  const auto model = cluster_->model();
  if (!model) return Reply(context, absl::UnavailableError("no worker group has joined yet"));
  *response = *model;
  response->set_model_name(model_name_);
  return Reply(context);
}

grpc::ServerUnaryReactor* InferenceService::GetLoad(grpc::CallbackServerContext* context,
                                                    const rankwise::v1::GetLoadRequest*,
                                                    rankwise::v1::GetLoadResponse* response) {
  *response = cluster_->Load(absl::Now());
  return Reply(context);
}

grpc::ServerUnaryReactor* InferenceService::Abort(grpc::CallbackServerContext* context,
                                                  const rankwise::v1::AbortRequest* request,
                                                  rankwise::v1::AbortResponse* response) {
  std::vector<uint64_t> numbers;
  {
    absl::MutexLock lock(&mutex_);
    const auto found = live_.find(request->request_id());
    response->set_found(found != live_.end());
    if (found != live_.end()) numbers = found->second;
  }
  for (const uint64_t number : numbers) cluster_->End(number, Ending::kCancelled);
  return Reply(context);
}

grpc::ServerUnaryReactor* InferenceService::Drain(grpc::CallbackServerContext*, const rankwise::v1::DrainRequest*,
                                                  rankwise::v1::DrainResponse* response) {
  cluster_->StartDrain();
  return new DrainCall(this, response);
}

void InferenceService::Tick() {
  absl::MutexLock lock(&mutex_);
  std::erase_if(drains_, [](DrainCall* call) { return call->FinishIfEmpty(); });
}

}  // namespace rankwise::frontend
