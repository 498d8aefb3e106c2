#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "kernels/token_draw.h"

namespace rankwise::engine {

// How one sequence is sampled; the defaults are plain sampling at temperature 1.
struct SamplingParams {
  int32_t max_tokens = 0;  // > 0 once validated
  int32_t min_tokens = 0;
  float temperature = 1;
  int32_t top_k = 0;
  float top_p = 1;
  float min_p = 0;
  float repetition_penalty = 1;
  float frequency_penalty = 0;
  float presence_penalty = 0;
  std::vector<std::pair<int32_t, float>> logit_bias;
  uint64_t seed = 0;
  std::vector<int32_t> stop_token_ids;
  bool ignore_eos = false;
  int32_t logprobs = -1;  // alternatives to report; -1: none at all
  int32_t prompt_logprobs = -1;
};

// InvalidArgument naming the field, its value and its limit; NaN and infinities are outside every limit.
absl::Status ValidateSamplingParams(const SamplingParams& params, int32_t vocab_size);

struct Candidate {
  int32_t id = 0;
  float logprob = 0;
};

struct SampledToken {
  int32_t id = 0;
  float logprob = 0;           // log-softmax of the raw logits, before penalties and temperature; 0 when not asked for
  std::vector<Candidate> top;  // by falling logprob, then rising id
};

// Philox4x32-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, 2011).
std::array<uint32_t, 4> Philox4x32(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key);

// Uniform in [0, 1): 53 bits of Philox4x32 of counter `position` under key `seed`. A pure function, so a replayed or
// preempted sequence draws the same numbers.
double UniformAt(uint64_t seed, uint64_t position);

// The rule by which Sample draws the token at `position`, where that is all it does: no logprobs are asked for, and
// nothing changes the logits. Then a backend may draw, and gets the same token.
std::optional<kernels::DrawRule> RawRule(const SamplingParams& params, int32_t position, int32_t prompt_count);

// Samples tokens from logits. Keeps scratch of vocabulary size, so one per thread. The result depends on its arguments
// alone, to the bit (kernels/token_draw.h).
class Sampler {
 public:
  explicit Sampler(int32_t vocab_size);

  // `logits` [vocab_size] is overwritten. `tokens` is prompt then generated, `prompt_count` the length of the prompt.
  // `eos_ids` are masked while fewer than min_tokens were generated, as are stop_token_ids. Order: bias, repetition,
  // frequency and presence penalties, then TokenDraw. The draw's counter is the position of the new token,
  // tokens.size().
  SampledToken Sample(std::span<float> logits, const SamplingParams& params, std::span<const int32_t> tokens,
                      int32_t prompt_count, std::span<const int32_t> eos_ids);

  // log-softmax of `logits` at `token`, with `count` alternatives: for prompt logprobs.
  SampledToken Score(std::span<const float> logits, int32_t token, int32_t count);

 private:
  void ApplyPenalties(std::span<float> logits, const SamplingParams& params, std::span<const int32_t> tokens,
                      int32_t prompt_count);
  std::vector<Candidate> Best(std::span<const float> logits, int32_t count, double log_sum);

  kernels::TokenDraw draw_;
  std::vector<int32_t> count_;  // occurrences by id; all 0 between calls
  std::vector<float> raw_;      // the logits as they came
};

}  // namespace rankwise::engine
