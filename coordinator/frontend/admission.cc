#include "coordinator/frontend/admission.h"

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

namespace rankwise::frontend {
namespace {

using rankwise::v1::GenerateRequest;
using rankwise::v1::GetModelInfoResponse;
using rankwise::v1::SamplingParams;

constexpr uint32_t kMaxSamples = 64;
constexpr uint64_t kMaxLingerMs = 3'600'000;
// Text of longer tokens on average is hardly any; so what cannot fit the context is refused before it is tokenised.
constexpr size_t kMaxBytesPerToken = 32;

// NaN is in no range.
absl::Status InRange(absl::string_view name, double value, double least, double most) {
  if (value >= least && value <= most) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(name, "=", value, " is outside [", least, ", ", most, "]"));
}

absl::Status AtMost(absl::string_view name, size_t value, size_t most) {
  if (value <= most) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(name, "=", value, " exceeds the limit of ", most));
}

absl::Status TokenExists(absl::string_view name, int32_t id, uint32_t vocab_size) {
  if (id >= 0 && static_cast<uint32_t>(id) < vocab_size) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(name, ": token ", id, " is outside [0, ", vocab_size, ")"));
}

absl::Status CheckSampling(const SamplingParams& sampling) {
  if (sampling.has_temperature()) RW_RETURN_IF_ERROR(InRange("temperature", sampling.temperature(), 0, 100));
  if (sampling.has_top_p()) {
    RW_RETURN_IF_ERROR(InRange("top_p", sampling.top_p(), std::numeric_limits<float>::min(), 1));
  }
  RW_RETURN_IF_ERROR(InRange("min_p", sampling.min_p(), 0, 1));
  if (sampling.has_repetition_penalty()) {
    RW_RETURN_IF_ERROR(InRange("repetition_penalty", sampling.repetition_penalty(), 0.01, 100));
  }
  RW_RETURN_IF_ERROR(InRange("frequency_penalty", sampling.frequency_penalty(), -2, 2));
  RW_RETURN_IF_ERROR(InRange("presence_penalty", sampling.presence_penalty(), -2, 2));
  RW_RETURN_IF_ERROR(AtMost("logprobs", sampling.logprobs(), 20));
  RW_RETURN_IF_ERROR(AtMost("prompt_logprobs", sampling.prompt_logprobs(), 20));
  RW_RETURN_IF_ERROR(AtMost("count of stop_token_ids", sampling.stop_token_ids_size(), 64));
  RW_RETURN_IF_ERROR(AtMost("count of logit_bias", sampling.logit_bias_size(), 1024));
  for (const auto& [id, bias] : sampling.logit_bias()) {
    RW_RETURN_IF_ERROR(InRange(absl::StrCat("logit_bias of token ", id), bias, -100, 100));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<int32_t>> PromptTokens(const GenerateRequest& request, const GetModelInfoResponse& model,
                                                  const text::Tokenizer* tokenizer) {
  const size_t max_prompt = model.max_tokens() - 1;
  std::vector<int32_t> tokens;
  if (request.prompt_case() == GenerateRequest::kText) {
    if (tokenizer == nullptr) return absl::FailedPreconditionError("this coordinator has no tokenizer: send token_ids");
    RW_RETURN_IF_ERROR(AtMost("bytes of the prompt", request.text().size(),
                              std::min(kMaxPromptBytes, max_prompt * kMaxBytesPerToken)));
    text::EncodeOptions options;
    if (request.omit_special()) options.add_bos = false;
    RW_ASSIGN_OR_RETURN(tokens, tokenizer->Encode(request.text(), options));
  } else {
    tokens.assign(request.token_ids().ids().begin(), request.token_ids().ids().end());
  }
  if (tokens.empty()) return absl::InvalidArgumentError("the prompt is empty");
  RW_RETURN_IF_ERROR(AtMost("tokens of the prompt", tokens.size(), max_prompt));
  for (const int32_t id : tokens) RW_RETURN_IF_ERROR(TokenExists("prompt", id, model.vocab_size()));
  return tokens;
}

}  // namespace

absl::Status CheckRequest(const GenerateRequest& request) {
  RW_RETURN_IF_ERROR(AtMost("n", request.n(), kMaxSamples));
  RW_RETURN_IF_ERROR(AtMost("count of stop", request.stop_size(), 16));
  for (const std::string& stop : request.stop()) {
    if (stop.empty()) return absl::InvalidArgumentError("stop: a string is empty");
    RW_RETURN_IF_ERROR(AtMost("bytes of a stop string", stop.size(), 256));
  }
  RW_RETURN_IF_ERROR(InRange("priority", request.priority(), -100, 100));
  RW_RETURN_IF_ERROR(AtMost("bytes of tenant", request.tenant().size(), 128));
  RW_RETURN_IF_ERROR(AtMost("bytes of request_id", request.request_id().size(), 128));
  RW_RETURN_IF_ERROR(AtMost("linger_ms", request.linger_ms(), kMaxLingerMs));
  if ((request.linger_ms() > 0 || request.has_resume()) && request.request_id().empty()) {
    return absl::InvalidArgumentError("linger_ms and resume need a request_id");
  }
  RW_RETURN_IF_ERROR(
      AtMost("count of resume.token_offsets", request.resume().token_offsets_size(), std::max(request.n(), 1u)));
  if (request.prompt_case() == GenerateRequest::PROMPT_NOT_SET) {
    return absl::InvalidArgumentError("the prompt is missing: set text or token_ids");
  }
  return CheckSampling(request.sampling());
}

absl::StatusOr<Admission> Admit(const GenerateRequest& request, const GetModelInfoResponse& model,
                                const text::Tokenizer* tokenizer, uint64_t fresh_seed) {
  const SamplingParams& sampling = request.sampling();
  for (const int32_t id : sampling.stop_token_ids()) {
    RW_RETURN_IF_ERROR(TokenExists("stop_token_ids", id, model.vocab_size()));
  }
  for (const auto& [id, bias] : sampling.logit_bias()) {
    RW_RETURN_IF_ERROR(TokenExists("logit_bias", id, model.vocab_size()));
  }
  if (request.stop_size() > 0 && tokenizer == nullptr) {
    return absl::FailedPreconditionError("this coordinator has no tokenizer: stop needs one");
  }
  RW_ASSIGN_OR_RETURN(const std::vector<int32_t> tokens, PromptTokens(request, model, tokenizer));
  const auto room = static_cast<uint32_t>(model.max_tokens() - tokens.size());
  if (sampling.max_tokens() > room) {
    return absl::InvalidArgumentError(absl::StrCat("max_tokens=", sampling.max_tokens(), " after a prompt of ",
                                                   tokens.size(), " tokens exceeds the limit of ", model.max_tokens(),
                                                   " for both"));
  }
  const uint32_t max_tokens = sampling.max_tokens() > 0 ? sampling.max_tokens() : room;
  RW_RETURN_IF_ERROR(AtMost("min_tokens", sampling.min_tokens(), max_tokens));

  Admission admission{.samples = std::max(request.n(), 1u)};
  admission.sequence.mutable_prompt()->Assign(tokens.begin(), tokens.end());
  admission.sequence.set_priority(request.priority());
  SamplingParams& chosen = *admission.sequence.mutable_sampling();
  chosen = sampling;
  chosen.set_max_tokens(max_tokens);
  if (!chosen.has_seed()) chosen.set_seed(fresh_seed);
  return admission;
}

}  // namespace rankwise::frontend
