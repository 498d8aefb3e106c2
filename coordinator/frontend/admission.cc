#include "coordinator/frontend/admission.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

namespace rankwise::frontend {
namespace {

using rankwise::v1::GenerateRequest;
using rankwise::v1::GetModelInfoResponse;
using rankwise::v1::SamplingParams;

// NaN is in no range.
absl::Status InRange(const char* name, double value, double least, double most) {
  if (value >= least && value <= most) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(name, "=", value, " is outside [", least, ", ", most, "]"));
}

absl::Status AtMost(const char* name, size_t value, size_t most) {
  if (value <= most) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(name, " of ", value, " exceeds the limit of ", most));
}

absl::Status TokenExists(const char* name, int32_t id, uint32_t vocab_size) {
  if (id >= 0 && static_cast<uint32_t>(id) < vocab_size) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(name, " names token ", id, ", outside [0, ", vocab_size, ")"));
}

absl::Status CheckSampling(const SamplingParams& sampling, uint32_t vocab_size) {
  if (sampling.has_temperature()) RW_RETURN_IF_ERROR(InRange("temperature", sampling.temperature(), 0, 100));
  if (sampling.has_top_p()) RW_RETURN_IF_ERROR(InRange("top_p", sampling.top_p(), 1e-6, 1));
  RW_RETURN_IF_ERROR(InRange("min_p", sampling.min_p(), 0, 1));
  if (sampling.has_repetition_penalty()) {
    RW_RETURN_IF_ERROR(InRange("repetition_penalty", sampling.repetition_penalty(), 0.01, 100));
  }
  RW_RETURN_IF_ERROR(InRange("frequency_penalty", sampling.frequency_penalty(), -2, 2));
  RW_RETURN_IF_ERROR(InRange("presence_penalty", sampling.presence_penalty(), -2, 2));
  RW_RETURN_IF_ERROR(AtMost("logprobs", sampling.logprobs(), 20));
  RW_RETURN_IF_ERROR(AtMost("prompt_logprobs", sampling.prompt_logprobs(), 20));
  RW_RETURN_IF_ERROR(AtMost("number of stop_token_ids", sampling.stop_token_ids_size(), 64));
  RW_RETURN_IF_ERROR(AtMost("number of logit_bias entries", sampling.logit_bias_size(), 1024));
  for (const int32_t id : sampling.stop_token_ids()) RW_RETURN_IF_ERROR(TokenExists("stop_token_ids", id, vocab_size));
  for (const auto& [id, bias] : sampling.logit_bias()) {
    RW_RETURN_IF_ERROR(TokenExists("logit_bias", id, vocab_size));
    RW_RETURN_IF_ERROR(InRange("logit_bias", bias, -100, 100));
  }
  return absl::OkStatus();
}

absl::Status CheckRequest(const GenerateRequest& request) {
  RW_RETURN_IF_ERROR(AtMost("n", request.n(), kMaxSamples));
  RW_RETURN_IF_ERROR(AtMost("number of stop strings", request.stop_size(), 16));
  for (const std::string& stop : request.stop()) {
    if (stop.empty()) return absl::InvalidArgumentError("a stop string is empty");
    RW_RETURN_IF_ERROR(AtMost("length of a stop string", stop.size(), 256));
  }
  RW_RETURN_IF_ERROR(InRange("priority", request.priority(), -100, 100));
  RW_RETURN_IF_ERROR(AtMost("length of tenant", request.tenant().size(), 128));
  return AtMost("length of request_id", request.request_id().size(), 128);
}

absl::StatusOr<std::vector<int32_t>> PromptTokens(const GenerateRequest& request, const GetModelInfoResponse& model,
                                                  const text::Tokenizer* tokenizer) {
  std::vector<int32_t> tokens;
  if (request.prompt_case() == GenerateRequest::kTokenIds) {
    const auto& ids = request.token_ids().ids();
    RW_RETURN_IF_ERROR(AtMost("number of prompt tokens", ids.size(), model.max_tokens() - 1));
    for (const int32_t id : ids) RW_RETURN_IF_ERROR(TokenExists("the prompt", id, model.vocab_size()));
    tokens.assign(ids.begin(), ids.end());
  } else {
    if (tokenizer == nullptr) return absl::FailedPreconditionError("no tokenizer is loaded: send token_ids");
    RW_RETURN_IF_ERROR(AtMost("number of prompt bytes", request.text().size(), kMaxPromptBytes));
    text::EncodeOptions options;
    if (request.omit_special()) options.add_bos = false;
    RW_ASSIGN_OR_RETURN(tokens, tokenizer->Encode(request.text(), options));
    RW_RETURN_IF_ERROR(AtMost("number of prompt tokens", tokens.size(), model.max_tokens() - 1));
    for (const int32_t id : tokens) RW_RETURN_IF_ERROR(TokenExists("the tokenizer", id, model.vocab_size()));
  }
  if (tokens.empty()) return absl::InvalidArgumentError("the prompt is empty");
  return tokens;
}

}  // namespace

absl::StatusOr<Admission> Admit(const GenerateRequest& request, const GetModelInfoResponse& model,
                                const text::Tokenizer* tokenizer, uint64_t fresh_seed) {
  RW_RETURN_IF_ERROR(CheckRequest(request));
  RW_RETURN_IF_ERROR(CheckSampling(request.sampling(), model.vocab_size()));
  RW_ASSIGN_OR_RETURN(const std::vector<int32_t> tokens, PromptTokens(request, model, tokenizer));
  const auto room = static_cast<uint32_t>(model.max_tokens() - tokens.size());
  const uint32_t asked = request.sampling().max_tokens();
  if (asked > room) {
    return absl::InvalidArgumentError(absl::StrCat("max_tokens=", asked, " after a prompt of ", tokens.size(),
                                                   " tokens exceeds the context of ", model.max_tokens()));
  }
  const uint32_t max_tokens = asked > 0 ? asked : room;
  RW_RETURN_IF_ERROR(AtMost("min_tokens", request.sampling().min_tokens(), max_tokens));
  if (request.stop_size() > 0 && tokenizer == nullptr) {
    return absl::FailedPreconditionError("no tokenizer is loaded: stop strings need one");
  }
  Admission admission{.prompt_tokens = static_cast<uint32_t>(tokens.size())};
  for (uint32_t sample = 0; sample < std::max(request.n(), 1u); ++sample) {
    worker::v1::Submit& submit = admission.sequences.emplace_back();
    submit.mutable_prompt()->Assign(tokens.begin(), tokens.end());
    *submit.mutable_sampling() = request.sampling();
    submit.mutable_sampling()->set_max_tokens(max_tokens);
    submit.mutable_sampling()->set_seed((request.sampling().has_seed() ? request.sampling().seed() : fresh_seed) + sample);
    submit.set_priority(request.priority());
  }
  return admission;
}

}  // namespace rankwise::frontend
