#include "coordinator/frontend/inference_service.h"

#include <algorithm>
#include <iterator>
#include <random>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "coordinator/cluster/retry_delay.h"
#include "coordinator/frontend/admission.h"
#include "coordinator/frontend/generate_call.h"
#include "coordinator/frontend/grpc_status.h"
#include "proto/credentials.h"
#include "proto/numerics.h"

namespace rankwise::frontend {

using rankwise::v1::GenerateRequest;
using rankwise::v1::GenerateResponse;

namespace {

constexpr int kMaxDetokenizeIds = 1 << 20;
// Of what a tick begins: each may wait for the journal's disk, and meanwhile nobody looks after groups and deadlines.
constexpr absl::Duration kTickBudget = absl::Milliseconds(50);
constexpr absl::Duration kDropInterval = absl::Milliseconds(250);  // each looks at every stream that is kept

grpc::ServerUnaryReactor* Reply(grpc::CallbackServerContext* context, const absl::Status& status = absl::OkStatus()) {
  auto* reactor = context->DefaultReactor();
  reactor->Finish(ToGrpc(status));
  return reactor;
}

absl::Status NoTokenizer() { return absl::FailedPreconditionError("this coordinator has no tokenizer"); }
absl::Status NoGroupYet() {
  return cluster::WithRetryDelay(absl::UnavailableError("no worker group has joined yet"), absl::Seconds(2));
}

}  // namespace

// Waits until nothing is live, and answers a little before the client's deadline.
class DrainCall final : public grpc::ServerUnaryReactor {
 public:
  DrainCall(InferenceService* service, rankwise::v1::DrainResponse* response, absl::Time deadline)
      : service_(service), response_(response) {
    const absl::Time now = absl::Now();
    answer_by_ = deadline - std::min(absl::Milliseconds(200), (deadline - now) / 4);
    absl::MutexLock lock(&service_->mutex_);
    service_->drains_.insert(this);
  }
  // With the service's lock held.
  bool FinishIfOver(uint32_t live, absl::Time now) {
    if (live > 0 && now < answer_by_) return false;
    response_->set_finished(live == 0);
    response_->set_live(live);
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
  absl::Time answer_by_;
};

InferenceService::InferenceService(cluster::Cluster* cluster, Options options)
    : cluster_(cluster),
      tokenizer_(options.tokenizer),
      journal_(options.journal),
      model_name_(std::move(options.model_name)),
      token_(std::move(options.token)),
      id_base_(FreshSeed()),
      kept_(options.max_kept_bytes) {
  if (journal_ != nullptr) std::ranges::move(journal_->TakeRecovered(), std::back_inserter(recovered_));
  has_restarted_ = recovered_.empty();
  if (!recovered_.empty()) spdlog::info("the journal has {} requests", recovered_.size());
}

absl::Status InferenceService::Authorize(const grpc::CallbackServerContext& context) const {
  return wire::CheckToken(context.client_metadata(), token_);
}

std::string InferenceService::FreshRequestId() { return absl::StrFormat("%016x-%d", id_base_, next_id_++); }

uint64_t InferenceService::FreshSeed() {
  std::random_device device;
  return uint64_t{device()} << 32 | device();
}

grpc::ServerWriteReactor<GenerateResponse>* InferenceService::Generate(grpc::CallbackServerContext* context,
                                                                       const GenerateRequest* request) {
  auto* call = new GenerateCall(this, request);
  const auto model = cluster_->model();
  if (const absl::Status authorized = Authorize(*context); !authorized.ok()) {
    call->Refuse(authorized);
  } else if (const absl::Status checked = CheckRequest(*request); !checked.ok()) {
    call->Refuse(checked);
  } else if (model && has_restarted_) {
    call->Begin(*model);
  } else if (!Wait(call)) {
    call->Refuse(
        cluster::WithRetryDelay(absl::ResourceExhaustedError(absl::StrCat(
                                    cluster_->options().max_live, " requests wait for the first worker group already")),
                                absl::Seconds(5)));
  }
  return call;
}

absl::Status InferenceService::SubmitStream(const std::shared_ptr<RequestStream>& stream, cluster::Request request,
                                            const rankwise::v1::GetModelInfoResponse& model) {
  const std::string id = stream->request_id();
  const auto give_up = [&](const absl::Status& why) {
    if (stream->lingers()) {
      kept_.Remove(id);
      if (journal_ != nullptr) journal_->Forget(id);
      stream->OnFailed(why);  // whoever has resumed it meanwhile hears of it
    }
    return why;
  };
  if (stream->lingers()) {
    if (!kept_.Add(stream)) return absl::AlreadyExistsError(absl::StrCat("request_id \"", id, "\" is known"));
    if (journal_ != nullptr && request.delivered.empty()) {
      const absl::Status journaled = journal_->Accept({.request = stream->request(),
                                                       .numerics = wire::NumericsLine(model),
                                                       .accepted = stream->started(),
                                                       .deadline = request.deadline});
      if (!journaled.ok()) return give_up(absl::UnavailableError(absl::StrCat("the journal: ", journaled.message())));
    }
  }
  const auto key = cluster_->Submit(std::move(request), absl::Now());
  if (!key.ok()) return give_up(key.status());
  stream->set_key(*key);
  return absl::OkStatus();
}

void InferenceService::Restart(journal::JournaledRequest request, const rankwise::v1::GetModelInfoResponse& model,
                               absl::Time now) {
  const std::string id = request.request.request_id();
  const absl::Status restarted = [&]() -> absl::Status {
    if (const std::string numerics = wire::NumericsLine(model); request.numerics != numerics) {
      return absl::FailedPreconditionError(absl::StrCat("it began with ", request.numerics, "; this is ", numerics));
    }
    RW_ASSIGN_OR_RETURN(Admission admission, Admit(request.request, model, tokenizer_, 0));
    RW_ASSIGN_OR_RETURN(const std::shared_ptr<RequestStream> stream,
                        RequestStream::Create({.request = request.request,
                                               .prompt_tokens = static_cast<uint32_t>(admission.sequence.prompt_size()),
                                               .tokenizer = tokenizer_,
                                               .journal = journal_,
                                               .started = std::min(request.accepted, now)}));
    return SubmitStream(stream,
                        {.id = id,
                         .tenant = request.request.tenant(),
                         .sequence = std::move(admission.sequence),
                         .samples = admission.samples,
                         .deadline = request.deadline,
                         .delivered = stream->Restore(request.samples),
                         .listener = stream.get()},
                        model);
  }();
  if (restarted.ok()) return;
  spdlog::warn("request \"{}\" of the journal is dropped: {}", id, std::string(restarted.message()));
  journal_->Forget(id);
}

void InferenceService::DropExpired(absl::Time now) {
  if (now - dropped_ < kDropInterval) return;
  dropped_ = now;
  for (const auto& stream : kept_.TakeExpired(now)) {
    cluster_->Forget(stream->key());
    if (journal_ != nullptr) journal_->Forget(stream->request_id());
  }
}

bool InferenceService::Wait(GenerateCall* call) {
  absl::MutexLock lock(&mutex_);
  return waiting_.size() < cluster_->options().max_live && waiting_.insert(call).second;
}

void InferenceService::StopWaiting(GenerateCall* call) {
  absl::MutexLock lock(&mutex_);
  waiting_.erase(call);
}

absl::Status InferenceService::WaitIsOver(const GenerateCall& call, absl::Time now) const {
  if (const absl::Status admits = cluster_->CheckRoom(0); !admits.ok()) return admits;
  return now - call.arrived() > cluster_->options().group_wait ? NoGroupYet() : absl::OkStatus();
}

// The lock keeps a call from ending, and so from going, while it is begun.
void InferenceService::Tick(absl::Time now) {
  const auto model = cluster_->model();
  DropExpired(now);
  absl::MutexLock lock(&mutex_);
  const absl::Time enough = absl::Now() + kTickBudget;
  for (; model && !recovered_.empty() && absl::Now() < enough; recovered_.pop_front()) {
    Restart(std::move(recovered_.front()), *model, now);
  }
  has_restarted_ = recovered_.empty();
  // Only then: some of the calls resume these.
  const bool may_begin = model && recovered_.empty();
  std::erase_if(waiting_, [&](GenerateCall* call) {
    if (may_begin && absl::Now() < enough) {
      call->Begin(*model);
      return true;
    }
    if (may_begin) return false;  // the next tick's
    const absl::Status over = WaitIsOver(*call, now);
    if (!over.ok()) call->Refuse(over);
    return !over.ok();
  });
  if (drains_.empty()) return;
  const uint32_t live = cluster_->live();
  std::erase_if(drains_, [&](DrainCall* call) { return call->FinishIfOver(live, now); });
}

grpc::ServerUnaryReactor* InferenceService::Tokenize(grpc::CallbackServerContext* context,
                                                     const rankwise::v1::TokenizeRequest* request,
                                                     rankwise::v1::TokenizeResponse* response) {
  if (const absl::Status authorized = Authorize(*context); !authorized.ok()) return Reply(context, authorized);
  if (tokenizer_ == nullptr) return Reply(context, NoTokenizer());
  if (request->text().size() > kMaxPromptBytes) {
    return Reply(context, absl::InvalidArgumentError(absl::StrCat("bytes of text=", request->text().size(),
                                                                  " exceeds the limit of ", kMaxPromptBytes)));
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
  if (const absl::Status authorized = Authorize(*context); !authorized.ok()) return Reply(context, authorized);
  if (tokenizer_ == nullptr) return Reply(context, NoTokenizer());
  if (request->token_ids_size() > kMaxDetokenizeIds) {
    return Reply(context, absl::InvalidArgumentError(absl::StrCat("count of token_ids=", request->token_ids_size(),
                                                                  " exceeds the limit of ", kMaxDetokenizeIds)));
  }
  // A model's logits, and so its ids, may be padded beyond the tokenizer's.
  const auto model = cluster_->model();
  const auto limit = std::max(tokenizer_->vocab_size(), model ? static_cast<int32_t>(model->vocab_size()) : 0);
  for (const int32_t id : request->token_ids()) {
    if (id < 0 || id >= limit) {
      return Reply(context,
                   absl::InvalidArgumentError(absl::StrCat("token_ids: token ", id, " is outside [0, ", limit, ")")));
    }
  }
  const std::vector<int32_t> ids(request->token_ids().begin(), request->token_ids().end());
  response->set_text(tokenizer_->Decode(ids, !request->keep_special()));
  return Reply(context);
}

grpc::ServerUnaryReactor* InferenceService::GetModelInfo(grpc::CallbackServerContext* context,
                                                         const rankwise::v1::GetModelInfoRequest*,
                                                         rankwise::v1::GetModelInfoResponse* response) {
  if (const absl::Status authorized = Authorize(*context); !authorized.ok()) return Reply(context, authorized);
  const auto model = cluster_->model();
  if (!model) return Reply(context, NoGroupYet());
  *response = *model;
  response->set_model_name(model_name_);
  return Reply(context);
}

grpc::ServerUnaryReactor* InferenceService::GetLoad(grpc::CallbackServerContext* context,
                                                    const rankwise::v1::GetLoadRequest*,
                                                    rankwise::v1::GetLoadResponse* response) {
  if (const absl::Status authorized = Authorize(*context); !authorized.ok()) return Reply(context, authorized);
  *response = cluster_->Load(absl::Now());
  const KeptStreams::Size kept = kept_.size();
  response->set_kept_streams(static_cast<uint32_t>(kept.streams));
  response->set_kept_bytes(kept.bytes);
  return Reply(context);
}

grpc::ServerUnaryReactor* InferenceService::Abort(grpc::CallbackServerContext* context,
                                                  const rankwise::v1::AbortRequest* request,
                                                  rankwise::v1::AbortResponse* response) {
  if (const absl::Status authorized = Authorize(*context); !authorized.ok()) return Reply(context, authorized);
  bool is_found = cluster_->Abort(request->request_id());
  if (!is_found) {
    absl::MutexLock lock(&mutex_);
    std::erase_if(waiting_, [&](GenerateCall* call) {
      if (call->request_id() != request->request_id()) return false;
      call->Refuse(absl::CancelledError("aborted before it began"));
      return is_found = true;
    });
  }
  response->set_found(is_found);
  return Reply(context);
}

grpc::ServerUnaryReactor* InferenceService::Drain(grpc::CallbackServerContext* context,
                                                  const rankwise::v1::DrainRequest*,
                                                  rankwise::v1::DrainResponse* response) {
  if (const absl::Status authorized = Authorize(*context); !authorized.ok()) return Reply(context, authorized);
  cluster_->StartDrain();
  return new DrainCall(this, response, absl::FromChrono(context->deadline()));
}

}  // namespace rankwise::frontend
