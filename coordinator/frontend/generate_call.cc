#include "coordinator/frontend/generate_call.h"

#include <algorithm>
#include <utility>

#include "absl/time/clock.h"
#include "base/status_macros.h"
#include "coordinator/frontend/grpc_status.h"
#include "coordinator/frontend/inference_service.h"

namespace rankwise::frontend {

using cluster::Ending;
using cluster::RequestKey;
using rankwise::v1::GenerateRequest;
using rankwise::v1::GetModelInfoResponse;
using worker::v1::SequenceOutput;

namespace {

constexpr uint64_t kLongestTimeoutMs = uint64_t{1} << 40;  // 35 years

}  // namespace

GenerateCall::GenerateCall(InferenceService* service, const GenerateRequest* request)
    : service_(service),
      request_(request),
      request_id_(request->request_id().empty() ? service->FreshRequestId() : request->request_id()),
      arrived_(absl::Now()) {}

void GenerateCall::Begin(const GetModelInfoResponse& model) {
  if (const absl::Status submitted = Submit(model); !submitted.ok()) Refuse(submitted);
}

void GenerateCall::Refuse(const absl::Status& status) {
  absl::MutexLock lock(&mutex_);
  FinishOnce(status);
}

absl::Status GenerateCall::Submit(const GetModelInfoResponse& model) {
  RW_RETURN_IF_ERROR(service_->cluster_->CheckRoom(std::max(request_->n(), 1u)));
  RW_ASSIGN_OR_RETURN(Admission admission, Admit(*request_, model, service_->tokenizer_, service_->FreshSeed()));
  RW_RETURN_IF_ERROR(MakeStreams(admission));
  cluster::Request request{.id = request_id_,
                           .tenant = request_->tenant(),
                           .sequence = std::move(admission.sequence),
                           .samples = admission.samples,
                           .listener = this};
  if (request_->timeout_ms() > 0) {
    request.deadline = arrived_ + absl::Milliseconds(std::min(request_->timeout_ms(), kLongestTimeoutMs));
  }
  RW_ASSIGN_OR_RETURN(const RequestKey key, service_->cluster_->Submit(std::move(request), absl::Now()));
  absl::MutexLock lock(&mutex_);
  key_ = key;
  return absl::OkStatus();
}

absl::Status GenerateCall::MakeStreams(const Admission& admission) {
  absl::MutexLock lock(&mutex_);
  for (uint32_t index = 0; index < admission.samples; ++index) {
    RW_ASSIGN_OR_RETURN(
        SampleStream stream,
        SampleStream::Create(*request_, {.index = index,
                                         .request_id = request_id_,
                                         .prompt_tokens = static_cast<uint32_t>(admission.sequence.prompt_size()),
                                         .seed = admission.sequence.sampling().seed() + index,
                                         .tokenizer = service_->tokenizer_,
                                         .started = arrived_}));
    samples_.push_back(std::move(stream));
  }
  is_ready_.resize(admission.samples);
  unfinished_ = admission.samples;
  return absl::OkStatus();
}

bool GenerateCall::OnOutput(uint32_t sample, const SequenceOutput& output, uint32_t replays) {
  absl::MutexLock lock(&mutex_);
  const bool is_last = samples_[sample].Take(output, replays, absl::Now());
  if (is_last) --unfinished_;
  Ready(sample);
  return !is_last;
}

void GenerateCall::OnEnd(uint32_t sample, Ending ending, uint32_t replays) {
  absl::MutexLock lock(&mutex_);
  const auto reason =
      ending == Ending::kDeadline ? rankwise::v1::FINISH_REASON_DEADLINE : rankwise::v1::FINISH_REASON_CANCELLED;
  samples_[sample].End(reason, replays, absl::Now());
  --unfinished_;
  Ready(sample);
}

void GenerateCall::OnFailed(const absl::Status& status) {
  absl::MutexLock lock(&mutex_);
  unfinished_ = 0;
  ending_ = status;
  WriteNext();
}

void GenerateCall::OnWriteDone(bool ok) {
  absl::MutexLock lock(&mutex_);
  is_writing_ = false;
  // Not ok: the client is gone, and OnCancel says so.
  if (ok) WriteNext();
}

void GenerateCall::OnCancel() {
  ForgetRequest();
  absl::MutexLock lock(&mutex_);
  FinishOnce(absl::CancelledError("the client cancelled, or its deadline has passed"));
}

void GenerateCall::OnDone() {
  service_->StopWaiting(this);
  ForgetRequest();
  delete this;
}

void GenerateCall::Ready(uint32_t sample) {
  if (samples_[sample].has_piece() && !is_ready_[sample]) {
    is_ready_[sample] = true;
    ready_.push_back(sample);
  }
  WriteNext();
}

void GenerateCall::WriteNext() {
  if (is_writing_ || is_finished_) return;
  if (ready_.empty()) {
    if (unfinished_ == 0) FinishOnce(ending_);
    return;
  }
  const uint32_t sample = ready_.front();
  ready_.pop_front();
  writing_ = samples_[sample].TakePiece();
  if (samples_[sample].has_piece()) {
    ready_.push_back(sample);
  } else {
    is_ready_[sample] = false;
  }
  is_writing_ = true;
  StartWrite(&writing_);
}

void GenerateCall::FinishOnce(const absl::Status& status) {
  if (std::exchange(is_finished_, true)) return;
  Finish(ToGrpc(status));
}

void GenerateCall::ForgetRequest() {
  RequestKey key;
  {
    absl::MutexLock lock(&mutex_);
    key = key_;
  }
  service_->cluster_->Forget(key);
}

}  // namespace rankwise::frontend
