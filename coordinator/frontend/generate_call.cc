#include "coordinator/frontend/generate_call.h"

#include <algorithm>
#include <utility>

#include "absl/algorithm/container.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/status_macros.h"
#include "coordinator/frontend/admission.h"
#include "coordinator/frontend/grpc_status.h"
#include "coordinator/frontend/inference_service.h"

namespace rankwise::frontend {

using cluster::RequestKey;
using rankwise::v1::GenerateRequest;
using rankwise::v1::GetModelInfoResponse;

namespace {

constexpr uint64_t kLongestTimeoutMs = uint64_t{1} << 40;  // 35 years

// Whether the tokens of a request that is begun anew are those of its first run.
bool CanBeginAnew(const GenerateRequest& request) {
  const bool has_tokens = absl::c_any_of(request.resume().token_offsets(), [](uint32_t offset) { return offset > 0; });
  const rankwise::v1::SamplingParams& sampling = request.sampling();
  return !has_tokens || sampling.has_seed() || (sampling.has_temperature() && sampling.temperature() == 0);
}

}  // namespace

GenerateCall::GenerateCall(InferenceService* service, const GenerateRequest* request)
    : service_(service),
      request_(request),
      request_id_(request->request_id().empty() ? service->FreshRequestId() : request->request_id()),
      arrived_(absl::Now()) {}

void GenerateCall::Begin(const GetModelInfoResponse& model) {
  if (const absl::Status opened = Open(model); !opened.ok()) Refuse(opened);
}

void GenerateCall::Refuse(const absl::Status& status) {
  absl::MutexLock lock(&mutex_);
  FinishOnce(status);
}

absl::Status GenerateCall::Open(const GetModelInfoResponse& model) {
  if (const auto kept = service_->kept_.Find(request_id_)) return Resume(kept);
  if (!CanBeginAnew(*request_)) {
    return absl::NotFoundError(
        absl::StrCat("request_id \"", request_id_, "\" is not known, and without a seed it cannot be begun anew"));
  }
  return Submit(model);
}

absl::Status GenerateCall::Resume(const std::shared_ptr<RequestStream>& kept) {
  if (!request_->has_resume()) {
    return absl::AlreadyExistsError(absl::StrCat("request_id \"", request_id_, "\" is known: set resume to have it"));
  }
  if (!kept->IsOf(*request_)) {
    return absl::InvalidArgumentError(absl::StrCat("request_id \"", request_id_, "\" was another request"));
  }
  SetStream(kept);
  kept->Attach(this, request_->resume());
  return absl::OkStatus();
}

absl::Status GenerateCall::Submit(const GetModelInfoResponse& model) {
  RW_RETURN_IF_ERROR(service_->cluster_->CheckRoom(std::max(request_->n(), 1u)));
  RW_ASSIGN_OR_RETURN(Admission admission, Admit(*request_, model, service_->tokenizer_, service_->FreshSeed()));
  RequestStream::Options options{.request = *request_,
                                 .prompt_tokens = static_cast<uint32_t>(admission.sequence.prompt_size()),
                                 .tokenizer = service_->tokenizer_,
                                 .journal = request_->linger_ms() > 0 ? service_->journal_ : nullptr,
                                 .started = arrived_};
  options.request.set_request_id(request_id_);
  options.request.clear_resume();
  options.request.mutable_sampling()->set_seed(admission.sequence.sampling().seed());
  RW_ASSIGN_OR_RETURN(const std::shared_ptr<RequestStream> stream, RequestStream::Create(std::move(options)));
  cluster::Request request{.id = request_id_,
                           .tenant = request_->tenant(),
                           .sequence = std::move(admission.sequence),
                           .samples = admission.samples,
                           .listener = stream.get()};
  if (request_->timeout_ms() > 0) {
    request.deadline = arrived_ + absl::Milliseconds(std::min(request_->timeout_ms(), kLongestTimeoutMs));
  }
  SetStream(stream);
  stream->Attach(this, request_->resume());
  return service_->SubmitStream(stream, std::move(request), model);
}

void GenerateCall::StartWriting(rankwise::v1::GenerateResponse piece) {
  absl::MutexLock lock(&mutex_);
  if (is_finished_) return;
  writing_ = std::move(piece);
  StartWrite(&writing_);
}

void GenerateCall::EndStream(const absl::Status& status) {
  absl::MutexLock lock(&mutex_);
  FinishOnce(status);
}

void GenerateCall::OnWriteDone(bool ok) {
  // Not ok: the client is gone, and OnCancel says so.
  if (const auto of = stream(); ok && of) of->OnWritten(this);
}

void GenerateCall::OnCancel() {
  Leave();
  absl::MutexLock lock(&mutex_);
  FinishOnce(absl::CancelledError("the client cancelled, or its deadline has passed"));
}

void GenerateCall::OnDone() {
  service_->StopWaiting(this);
  Leave();
  delete this;
}

void GenerateCall::Leave() {
  const auto of = stream();
  if (!of) return;
  of->Detach(this, absl::Now());
  if (!of->lingers()) service_->cluster_->Forget(of->key());
}

std::shared_ptr<RequestStream> GenerateCall::stream() {
  absl::MutexLock lock(&mutex_);
  return stream_;
}

void GenerateCall::SetStream(std::shared_ptr<RequestStream> stream) {
  absl::MutexLock lock(&mutex_);
  stream_ = std::move(stream);
}

void GenerateCall::FinishOnce(const absl::Status& status) {
  if (std::exchange(is_finished_, true)) return;
  Finish(ToGrpc(status));
}

}  // namespace rankwise::frontend
