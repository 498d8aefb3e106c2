#include "worker/engine/sampler.h"

#include <limits>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"

namespace rankwise::engine {
namespace {

constexpr float kMasked = -std::numeric_limits<float>::infinity();

kernels::DrawRule RuleAt(const SamplingParams& params, size_t position) {
  return {.uniform = UniformAt(params.seed, position),
          .temperature = params.temperature,
          .top_k = params.top_k,
          .top_p = params.top_p,
          .min_p = params.min_p};
}

// NaN is in no range.
absl::Status InRange(const char* name, double value, double least, double most) {
  if (value >= least && value <= most) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(name, "=", value, " is outside [", least, ", ", most, "]"));
}

absl::Status TokenInVocabulary(const char* name, int32_t id, int32_t vocab_size) {
  if (id >= 0 && id < vocab_size) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(name, " names token ", id, ", outside [0, ", vocab_size, ")"));
}

float LogProbability(float logit, double log_sum) {
  return logit > kMasked ? static_cast<float>(logit - log_sum) : kMasked;
}

}  // namespace

absl::Status ValidateSamplingParams(const SamplingParams& params, int32_t vocab_size) {
  RW_RETURN_IF_ERROR(InRange("max_tokens", params.max_tokens, 1, INT32_MAX));
  RW_RETURN_IF_ERROR(InRange("min_tokens", params.min_tokens, 0, params.max_tokens));
  RW_RETURN_IF_ERROR(InRange("temperature", params.temperature, 0, 100));
  RW_RETURN_IF_ERROR(InRange("top_k", params.top_k, 0, INT32_MAX));
  RW_RETURN_IF_ERROR(InRange("top_p", params.top_p, std::numeric_limits<float>::min(), 1));
  RW_RETURN_IF_ERROR(InRange("min_p", params.min_p, 0, 1));
  RW_RETURN_IF_ERROR(InRange("repetition_penalty", params.repetition_penalty, 0.01, 100));
  RW_RETURN_IF_ERROR(InRange("frequency_penalty", params.frequency_penalty, -2, 2));
  RW_RETURN_IF_ERROR(InRange("presence_penalty", params.presence_penalty, -2, 2));
  RW_RETURN_IF_ERROR(InRange("logprobs", params.logprobs, -1, 20));
  RW_RETURN_IF_ERROR(InRange("prompt_logprobs", params.prompt_logprobs, -1, 20));
  for (const auto& [id, bias] : params.logit_bias) {
    RW_RETURN_IF_ERROR(TokenInVocabulary("logit_bias", id, vocab_size));
    RW_RETURN_IF_ERROR(InRange("logit_bias", bias, -100, 100));
  }
  for (const int32_t id : params.stop_token_ids)
    RW_RETURN_IF_ERROR(TokenInVocabulary("stop_token_ids", id, vocab_size));
  return absl::OkStatus();
}

std::array<uint32_t, 4> Philox4x32(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t left = uint64_t{0xD2511F53} * counter[0], right = uint64_t{0xCD9E8D57} * counter[2];
    counter = {static_cast<uint32_t>(right >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(right),
               static_cast<uint32_t>(left >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(left)};
    key[0] += 0x9E3779B9;
    key[1] += 0xBB67AE85;
  }
  return counter;
}

double UniformAt(uint64_t seed, uint64_t position) {
  const auto words = Philox4x32({static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32)},
                                {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)});
  return static_cast<double>((uint64_t{words[1]} << 32 | words[0]) >> 11) * 0x1p-53;
}

Sampler::Sampler(int32_t vocab_size) : draw_(vocab_size), count_(vocab_size) {}

std::vector<Candidate> Sampler::Best(std::span<const float> logits, int32_t count, double log_sum) {
  std::vector<Candidate> best;
  for (const int32_t id : draw_.Best(logits, count)) {
    best.push_back({.id = id, .logprob = LogProbability(logits[id], log_sum)});
  }
  return best;
}

SampledToken Sampler::Score(std::span<const float> logits, int32_t token, int32_t count) {
  const double log_sum = draw_.LogSumExp(logits);
  return {.id = token, .logprob = LogProbability(logits[token], log_sum), .top = Best(logits, count, log_sum)};
}

void Sampler::ApplyPenalties(std::span<float> logits, const SamplingParams& params, std::span<const int32_t> tokens,
                             int32_t prompt_count) {
  for (const auto& [id, bias] : params.logit_bias) logits[id] += bias;
  if (params.repetition_penalty != 1) {
    for (const int32_t id : tokens) {
      if (count_[id]++ > 0) continue;
      logits[id] = logits[id] > 0 ? logits[id] / params.repetition_penalty : logits[id] * params.repetition_penalty;
    }
    for (const int32_t id : tokens) count_[id] = 0;
  }
  if (params.frequency_penalty == 0 && params.presence_penalty == 0) return;
  const auto generated = tokens.subspan(prompt_count);
  for (const int32_t id : generated) ++count_[id];
  for (const int32_t id : generated) {
    if (count_[id] == 0) continue;
    logits[id] -= params.frequency_penalty * static_cast<float>(count_[id]) + params.presence_penalty;
    count_[id] = 0;
  }
}

std::optional<kernels::DrawRule> RawRule(const SamplingParams& params, int32_t position, int32_t prompt_count) {
  const bool is_raw = params.logprobs < 0 && params.logit_bias.empty() && params.repetition_penalty == 1 &&
                      params.frequency_penalty == 0 && params.presence_penalty == 0 &&
                      position - prompt_count >= params.min_tokens;
  return is_raw ? std::optional(RuleAt(params, position)) : std::nullopt;
}

SampledToken Sampler::Sample(std::span<float> logits, const SamplingParams& params, std::span<const int32_t> tokens,
                             int32_t prompt_count, std::span<const int32_t> eos_ids) {
  RW_CHECK(logits.size() == count_.size());
  SampledToken sampled;
  const bool has_logprobs = params.logprobs >= 0;
  const double log_sum = has_logprobs ? draw_.LogSumExp(logits) : 0;
  if (has_logprobs) {
    sampled.top = Best(logits, params.logprobs, log_sum);
    raw_.assign(logits.begin(), logits.end());
  }
  ApplyPenalties(logits, params, tokens, prompt_count);
  if (static_cast<int32_t>(tokens.size()) - prompt_count < params.min_tokens) {
    for (const int32_t id : eos_ids) logits[id] = kMasked;
    for (const int32_t id : params.stop_token_ids) logits[id] = kMasked;
  }
  sampled.id = draw_.Draw(logits, RuleAt(params, tokens.size()));
  if (has_logprobs && sampled.id >= 0) sampled.logprob = LogProbability(raw_[sampled.id], log_sum);
  return sampled;
}

}  // namespace rankwise::engine
