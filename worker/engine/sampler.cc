#include "worker/engine/sampler.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"

namespace rankwise::engine {
namespace {

constexpr float kMasked = -std::numeric_limits<float>::infinity();
constexpr double kLn2 = 0x1.62e42fefa39efp-1;

// NaN is in no range.
absl::Status InRange(const char* name, double value, double least, double most) {
  if (value >= least && value <= most) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(name, "=", value, " is outside [", least, ", ", most, "]"));
}

absl::Status TokenInVocabulary(const char* name, int32_t id, int32_t vocab_size) {
  if (id >= 0 && id < vocab_size) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(name, " names token ", id, ", outside [0, ", vocab_size, ")"));
}

constexpr int kIdBits = 23;
constexpr uint64_t kIdMask = (uint64_t{1} << kIdBits) - 1;
constexpr double kWeightOne = 0x1p40;  // 2^23 of them add up to less than 2^64, and no sum loses a bit

// Four at a time, by GCC's vector extension: where the processor has no vectors that wide, the same bits take longer.
using Floats [[gnu::vector_size(16)]] = float;
using Doubles [[gnu::vector_size(32)]] = double;
using Words [[gnu::vector_size(32)]] = uint64_t;
constexpr size_t kLanes = 4;

// exp(x) for -700 < x < 700 within 2e-14, relative: 2^k times the Taylor polynomial at x - k ln 2, which is at most ln
// 2 / 2 and leaves a remainder of (ln 2 / 2)^12 / 12! = 6e-15. Below that, and for NaN, 0.
[[gnu::always_inline]] inline void Exp(Doubles& x) {
  constexpr double kRound = 0x1.8p52;  // adding it leaves the nearest integer in the low bits
  // ln 2 in two parts; k times the first is exact.
  constexpr double kLn2High = 0x1.62e42fee00000p-1, kLn2Low = 0x1.a39ef35793c76p-33;
  const Doubles rounded = x * (1 / kLn2) + kRound;
  const Doubles k = rounded - kRound;
  const Doubles r = x - k * kLn2High - k * kLn2Low;
  const Doubles r2 = r * r, r4 = r2 * r2;
  const Doubles low = (1 + r) + r2 * (1.0 / 2 + r * (1.0 / 6));
  const Doubles middle = (1.0 / 24 + r * (1.0 / 120)) + r2 * (1.0 / 720 + r * (1.0 / 5040));
  const Doubles high = (1.0 / 40320 + r * (1.0 / 362880)) + r2 * (1.0 / 3628800 + r * (1.0 / 39916800));
  const Doubles polynomial = low + r4 * (middle + r4 * high);
  const Words bits = __builtin_bit_cast(Words, polynomial) + (__builtin_bit_cast(Words, rounded) << 52);
  x = __builtin_bit_cast(Doubles, bits & __builtin_bit_cast(Words, x > -700.0));
}

// log(x) for finite x > 0: Halley's iteration on exp(y) = x without its power of two; each step cubes an error of at
// first ln 2.
double Log(double x) {
  int exponent = 0;
  const double fraction = std::frexp(x, &exponent);
  double y = 0;
  for (int step = 0; step < 4; ++step) {
    Doubles e = {y};
    Exp(e);
    y += 2 * (fraction - e[0]) / (fraction + e[0]);
  }
  return exponent * kLn2 + y;
}

// exp(x) for x <= 0 in units of 1 / kWeightOne, rounded.
[[gnu::always_inline]] inline void Weigh(Doubles& x, Words& weights) {
  constexpr double kInteger = 0x1p52;  // adding it leaves the nearest integer in the mantissa
  Exp(x);
  weights = __builtin_bit_cast(Words, x * kWeightOne + kInteger) & ((uint64_t{1} << 52) - 1);
}

uint64_t Weight(double x) {
  Doubles lanes = {x};
  Words weights;
  Weigh(lanes, weights);
  return weights[0];
}

// weights[i] = Weight((logits[i] - highest) * inverse), and their sum. NaN weighs nothing.
[[gnu::always_inline]] inline uint64_t WeighInLanes(std::span<const float> logits, double highest, double inverse,
                                                    uint64_t* weights) {
  Words sums = {};
  const size_t whole = logits.size() / kLanes * kLanes;
  for (size_t i = 0; i < whole; i += kLanes) {
    Floats floats;
    std::memcpy(&floats, &logits[i], sizeof floats);
    Doubles x = (__builtin_convertvector(floats, Doubles) - highest) * inverse;
    Words lanes;
    Weigh(x, lanes);
    sums += lanes;
    std::memcpy(weights + i, &lanes, sizeof lanes);
  }
  uint64_t total = sums[0] + sums[1] + sums[2] + sums[3];
  for (size_t i = whole; i < logits.size(); ++i) total += weights[i] = Weight((logits[i] - highest) * inverse);
  return total;
}

[[gnu::target("avx2")]] uint64_t WeighAvx2(std::span<const float> logits, double highest, double inverse,
                                           uint64_t* weights) {
  return WeighInLanes(logits, highest, inverse, weights);
}

uint64_t Weigh(std::span<const float> logits, double highest, double inverse, std::span<uint64_t> weights) {
  static const bool has_avx2 = __builtin_cpu_supports("avx2") > 0;
  return has_avx2 ? WeighAvx2(logits, highest, inverse, weights.data())
                  : WeighInLanes(logits, highest, inverse, weights.data());
}

float LogProbability(float logit, double log_sum) {
  return logit > kMasked ? static_cast<float>(logit - log_sum) : kMasked;
}

// Keys ascend by falling logit, then rising id. NaN counts as -inf, and both zeros are one.
uint64_t Key(float logit, int32_t id) {
  const auto bits = std::bit_cast<uint32_t>((logit > kMasked ? logit : kMasked) + 0.0f);
  const uint32_t is_negative = 0 - (bits >> 31);  // all ones or none; a branch would be mispredicted half the time
  const uint32_t falling = bits ^ (~is_negative & 0x7FFFFFFF);
  return uint64_t{falling} << 32 | static_cast<uint32_t>(id);
}

// The `count` smallest keys of all ids, in any order; all when there are fewer. One pass, for small counts with little
// more than a comparison each: what is behind the worst of `count` better ones need not be kept.
void SelectBest(std::span<const float> logits, size_t count, std::vector<uint64_t>& keys) {
  const size_t room = count + std::max<size_t>(count, 512);
  uint64_t worst = std::numeric_limits<uint64_t>::max();
  const auto shrink = [&] {
    std::ranges::nth_element(keys, keys.begin() + static_cast<int64_t>(count) - 1);
    keys.resize(count);
    worst = keys.back();
  };
  keys.clear();
  for (size_t id = 0; id < logits.size(); ++id) {
    const uint64_t key = Key(logits[id], static_cast<int32_t>(id));
    if (key >= worst) continue;
    keys.push_back(key);
    if (keys.size() == room) shrink();
  }
  if (keys.size() > count) shrink();
}

std::vector<Candidate> Best(std::span<const float> logits, int32_t count, double log_sum) {
  if (count <= 0) return {};
  std::vector<uint64_t> keys;
  SelectBest(logits, count, keys);
  std::ranges::sort(keys);
  std::vector<Candidate> best;
  for (const uint64_t key : keys) {
    best.push_back(
        {.id = static_cast<int32_t>(key & kIdMask), .logprob = LogProbability(logits[key & kIdMask], log_sum)});
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

// Rises with the weight, in steps of at most a sixteenth: the exponent and four bits of the mantissa. 0 for no weight.
size_t BucketOf(uint64_t weight) {
  constexpr uint64_t kBelowOne = (std::bit_cast<uint64_t>(1.0) >> 48) - 1;
  return weight == 0 ? 0
                     : (std::bit_cast<uint64_t>(static_cast<double>(static_cast<int64_t>(weight))) >> 48) - kBelowOne;
}
constexpr size_t kBuckets = 40 * 16 + 2;

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

Sampler::Sampler(int32_t vocab_size) : vocab_size_(vocab_size), weight_(vocab_size), count_(vocab_size) {
  RW_CHECK(vocab_size > 0 && vocab_size <= 1 << kIdBits, absl::StrCat("vocab_size=", vocab_size));
}

double Sampler::LogSumExp(std::span<const float> logits) {
  const int32_t best = ArgMax(logits);
  if (best < 0 || std::isinf(logits[best])) return best < 0 ? kMasked : logits[best];
  return logits[best] + Log(static_cast<double>(Weigh(logits, logits[best], 1, weight_)) / kWeightOne);
}

SampledToken Sampler::Score(std::span<const float> logits, int32_t token, int32_t count) {
  const double log_sum = LogSumExp(logits);
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

// Leaves a weight only to the likeliest tokens that together have `enough` of it, the fewest that do; equal weights by
// rising id. Returns what is left. Bucket sums find the weight where the cut falls, bisection the place among its like.
uint64_t Sampler::KeepNucleus(uint64_t enough) {
  std::array<uint64_t, kBuckets> sums{};
  for (const uint64_t weight : weight_) sums[BucketOf(weight)] += weight;
  size_t edge = kBuckets - 1;
  uint64_t sum = 0;
  for (; sum + sums[edge] < enough; --edge) sum += sums[edge];
  keys_.clear();
  for (int32_t id = 0; id < vocab_size_; ++id) {
    const size_t bucket = BucketOf(weight_[id]);
    if (bucket > edge) continue;
    if (bucket == edge) keys_.push_back((static_cast<uint64_t>(kWeightOne) - weight_[id]) << kIdBits | id);
    weight_[id] = 0;
  }
  const auto weight_of = [](uint64_t key) { return static_cast<uint64_t>(kWeightOne) - (key >> kIdBits); };
  // The best `begin` of the keys are too few, the best `end` are enough.
  size_t begin = 0, end = keys_.size();
  while (end - begin > 1) {
    const size_t middle = (begin + end) / 2;
    std::nth_element(keys_.begin() + begin, keys_.begin() + middle, keys_.begin() + end);
    uint64_t half = sum;
    for (size_t i = begin; i < middle; ++i) half += weight_of(keys_[i]);
    if (half >= enough) {
      end = middle;
    } else {
      sum = half;
      begin = middle;
    }
  }
  for (size_t i = 0; i < end; ++i) weight_[keys_[i] & kIdMask] = weight_of(keys_[i]);
  return sum + weight_of(keys_[begin]);
}

// One draw from the softmax of what temperature, top-k, top-p and min-p leave, by rising id.
int32_t Sampler::Draw(std::span<const float> logits, const SamplingParams& params, double uniform) {
  const int32_t best = ArgMax(logits);
  if (best < 0 || params.temperature == 0 || std::isinf(logits[best])) return best;
  const double highest = logits[best], inverse = 1.0 / params.temperature;
  uint64_t total = 0;
  if (params.top_k > 0 && params.top_k < vocab_size_) {
    SelectBest(logits, params.top_k, keys_);
    std::ranges::fill(weight_, 0);
    for (const uint64_t key : keys_)
      total += weight_[key & kIdMask] = Weight((logits[key & kIdMask] - highest) * inverse);
  } else {
    total = Weigh(logits, highest, inverse, weight_);
  }
  if (params.top_p < 1) {
    total = KeepNucleus(std::max<uint64_t>(1, static_cast<uint64_t>(params.top_p * static_cast<double>(total))));
  }
  if (params.min_p > 0) {
    const auto least = static_cast<uint64_t>(params.min_p * kWeightOne);
    total = 0;
    for (uint64_t& weight : weight_) total += weight = weight < least ? 0 : weight;
  }
  uint64_t left = std::min(static_cast<uint64_t>(uniform * static_cast<double>(total)), total - 1);
  for (int32_t id = 0;; ++id) {
    if (left < weight_[id]) return id;
    left -= weight_[id];
  }
}

SampledToken Sampler::Sample(std::span<float> logits, const SamplingParams& params, std::span<const int32_t> tokens,
                             int32_t prompt_count, std::span<const int32_t> eos_ids) {
  RW_CHECK(static_cast<int32_t>(logits.size()) == vocab_size_);
  SampledToken sampled;
  const bool has_logprobs = params.logprobs >= 0;
  const double log_sum = has_logprobs ? LogSumExp(logits) : 0;
  if (has_logprobs) {
    sampled.top = Best(logits, params.logprobs, log_sum);
    raw_.assign(logits.begin(), logits.end());
  }
  ApplyPenalties(logits, params, tokens, prompt_count);
  if (static_cast<int32_t>(tokens.size()) - prompt_count < params.min_tokens) {
    for (const int32_t id : eos_ids) logits[id] = kMasked;
    for (const int32_t id : params.stop_token_ids) logits[id] = kMasked;
  }
  sampled.id = Draw(logits, params, UniformAt(params.seed, tokens.size()));
  if (has_logprobs && sampled.id >= 0) sampled.logprob = LogProbability(raw_[sampled.id], log_sum);
  return sampled;
}

}  // namespace rankwise::engine
