#include "worker/engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"

namespace rankwise::engine {
namespace {

constexpr float kMasked = -std::numeric_limits<float>::infinity();

// NaN is in no range.
absl::Status InRange(const char* name, double value, double least, double most) {
  if (value >= least && value <= most) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(name, "=", value, " is outside [", least, ", ", most, "]"));
}

absl::Status TokenInVocabulary(const char* name, int32_t id, int32_t vocab_size) {
  if (id >= 0 && id < vocab_size) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(name, " names token ", id, ", outside [0, ", vocab_size, ")"));
}

// log Σ exp(logit), in double; NaN counts as -inf.
double LogSumExp(std::span<const float> logits) {
  float highest = kMasked;
  for (const float logit : logits) highest = logit > highest ? logit : highest;
  if (!(highest > kMasked)) return kMasked;
  double sum = 0;
  for (const float logit : logits) {
    if (logit > kMasked) sum += std::exp(static_cast<double>(logit) - highest);
  }
  return highest + std::log(sum);
}

// The `count` best: falling logit, then rising id.
std::vector<Candidate> Best(std::span<const float> logits, int32_t count, double log_sum) {
  std::vector<int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  count = std::min(count, static_cast<int32_t>(logits.size()));
  std::ranges::partial_sort(order, order.begin() + count, [&](int32_t a, int32_t b) {
    return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
  });
  std::vector<Candidate> best;
  for (int32_t i = 0; i < count; ++i) {
    best.push_back({.id = order[i], .logprob = static_cast<float>(logits[order[i]] - log_sum)});
  }
  return best;
}

int32_t ArgMax(std::span<const float> logits) {
  int32_t best = -1;
  float highest = kMasked;
  for (size_t i = 0; i < logits.size(); ++i) {
    if (logits[i] > highest) highest = logits[i], best = static_cast<int32_t>(i);
  }
  return best;
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

double UniformAt(uint64_t seed, uint64_t position) {
  uint32_t counter[4] = {static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32), 0, 0};
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t left = uint64_t{0xD2511F53} * counter[0], right = uint64_t{0xCD9E8D57} * counter[2];
    const uint32_t next[4] = {static_cast<uint32_t>(right >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(right),
                              static_cast<uint32_t>(left >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(left)};
    std::copy(next, next + 4, counter);
    key[0] += 0x9E3779B9;
    key[1] += 0xBB67AE85;
  }
  const uint64_t bits = (uint64_t{counter[1]} << 32 | counter[0]) >> 11;
  return static_cast<double>(bits) * 0x1p-53;
}

Sampler::Sampler(int32_t vocab_size)
    : vocab_size_(vocab_size), order_(vocab_size), weight_(vocab_size), count_(vocab_size, 0) {}

SampledToken Sampler::Score(std::span<const float> logits, int32_t token, int32_t count) const {
  const double log_sum = LogSumExp(logits);
  return {.id = token,
          .logprob = static_cast<float>(logits[token] - log_sum),
          .top = count > 0 ? Best(logits, count, log_sum) : std::vector<Candidate>()};
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

// Softmax weights of what temperature, top-k, top-p and min-p leave, then one draw.
int32_t Sampler::Draw(std::span<const float> logits, const SamplingParams& params, double uniform) {
  const int32_t best = ArgMax(logits);
  if (best < 0 || params.temperature == 0) return best;
  const double highest = logits[best], inverse = 1.0 / params.temperature;
  const bool is_sorted = params.top_k > 0 || params.top_p < 1;
  int32_t kept = 0;
  for (int32_t id = 0; id < vocab_size_; ++id) {
    weight_[id] = logits[id] > kMasked ? std::exp((logits[id] - highest) * inverse) : 0;
    if (weight_[id] > 0 && weight_[id] >= params.min_p) order_[kept++] = id;
  }
  const auto order = std::span(order_).first(kept);
  double total = 0;
  if (is_sorted) {
    const auto goes_first = [&](int32_t a, int32_t b) {
      return weight_[a] != weight_[b] ? weight_[a] > weight_[b] : a < b;
    };
    if (params.top_k > 0 && params.top_k < kept) {
      std::ranges::partial_sort(order, order.begin() + params.top_k, goes_first);
      kept = params.top_k;
    } else {
      std::ranges::sort(order, goes_first);
    }
    for (int32_t i = 0; i < kept; ++i) total += weight_[order[i]];
    if (params.top_p < 1) {
      double sum = 0;
      const double enough = params.top_p * total;
      int32_t i = 0;
      while (i < kept && sum < enough) sum += weight_[order[i++]];
      kept = std::max(i, 1);
      total = sum;
    }
  } else {
    for (const int32_t id : order) total += weight_[id];
  }
  const double target = uniform * total;
  double sum = 0;
  for (int32_t i = 0; i < kept; ++i) {
    sum += weight_[order[i]];
    if (sum > target) return order[i];
  }
  return order[kept - 1];
}

SampledToken Sampler::Sample(std::span<float> logits, const SamplingParams& params, std::span<const int32_t> tokens,
                             int32_t prompt_count, std::span<const int32_t> eos_ids) {
  RW_CHECK(static_cast<int32_t>(logits.size()) == vocab_size_);
  SampledToken sampled;
  const bool has_logprobs = params.logprobs >= 0;
  const double log_sum = has_logprobs ? LogSumExp(logits) : 0;
  if (params.logprobs > 0) sampled.top = Best(logits, params.logprobs, log_sum);
  if (has_logprobs) raw_.assign(logits.begin(), logits.end());

  ApplyPenalties(logits, params, tokens, prompt_count);
  if (static_cast<int32_t>(tokens.size()) - prompt_count < params.min_tokens) {
    for (const int32_t id : eos_ids) logits[id] = kMasked;
    for (const int32_t id : params.stop_token_ids) logits[id] = kMasked;
  }
  sampled.id = Draw(logits, params, UniformAt(params.seed, tokens.size()));
  if (has_logprobs && sampled.id >= 0) sampled.logprob = static_cast<float>(raw_[sampled.id] - log_sum);
  return sampled;
}

}  // namespace rankwise::engine
