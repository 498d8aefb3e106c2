#include "kernels/token_draw.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "absl/strings/str_cat.h"
#include "base/check.h"

namespace rankwise::kernels {
namespace {

constexpr float kMasked = -std::numeric_limits<float>::infinity();
constexpr double kLn2 = 0x1.62e42fefa39efp-1;
constexpr uint64_t kIdMask = (uint64_t{1} << kMostVocabularyBits) - 1;

// Four at a time, by GCC's vector extension: where the processor has no vectors that wide, the same bits take longer.
using Floats [[gnu::vector_size(16)]] = float;
using Doubles [[gnu::vector_size(32)]] = double;
using Words [[gnu::vector_size(32)]] = uint64_t;
constexpr size_t kLanes = 4;

// log(x) for finite x > 0: Halley's iteration on exp(y) = x without its power of two; each step cubes an error of at
// first ln 2.
double Log(double x) {
  int exponent = 0;
  const double fraction = std::frexp(x, &exponent);
  double y = 0;
  for (int step = 0; step < 4; ++step) {
    Doubles e = {y};
    Exp<Words>(e);
    y += 2 * (fraction - e[0]) / (fraction + e[0]);
  }
  return exponent * kLn2 + y;
}

uint64_t Weight(double x) {
  uint64_t weight;
  Weigh(x, weight);
  return weight;
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

// Keys ascend by falling logit, then rising id.
uint64_t Key(float logit, int32_t id) { return uint64_t{Fall(logit)} << 32 | static_cast<uint32_t>(id); }

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

TokenDraw::TokenDraw(int32_t vocab_size) : vocab_size_(vocab_size), weight_(vocab_size) {
  RW_CHECK(vocab_size > 0 && vocab_size <= 1 << kMostVocabularyBits, absl::StrCat("vocab_size=", vocab_size));
}

double TokenDraw::LogSumExp(std::span<const float> logits) {
  const int32_t best = ArgMax(logits);
  if (best < 0 || std::isinf(logits[best])) return best < 0 ? kMasked : logits[best];
  return logits[best] + Log(static_cast<double>(Weigh(logits, logits[best], 1, weight_)) / kWeightOne);
}

std::vector<int32_t> TokenDraw::Best(std::span<const float> logits, int32_t count) {
  if (count <= 0) return {};
  SelectBest(logits, count, keys_);
  std::ranges::sort(keys_);
  std::vector<int32_t> best;
  for (const uint64_t key : keys_) best.push_back(static_cast<int32_t>(key & kIdMask));
  return best;
}

// Leaves a weight only to the likeliest tokens that together have `enough` of it, the fewest that do; equal weights by
// rising id. Returns what is left. Bucket sums find the weight where the cut falls, bisection the place among its like.
uint64_t TokenDraw::KeepNucleus(uint64_t enough) {
  std::array<uint64_t, kBuckets> sums{};
  for (const uint64_t weight : weight_) sums[BucketOf(weight)] += weight;
  size_t edge = kBuckets - 1;
  uint64_t sum = 0;
  for (; sum + sums[edge] < enough; --edge) sum += sums[edge];
  keys_.clear();
  for (int32_t id = 0; id < vocab_size_; ++id) {
    const size_t bucket = BucketOf(weight_[id]);
    if (bucket > edge) continue;
    if (bucket == edge) keys_.push_back((static_cast<uint64_t>(kWeightOne) - weight_[id]) << kMostVocabularyBits | id);
    weight_[id] = 0;
  }
  const auto weight_of = [](uint64_t key) { return static_cast<uint64_t>(kWeightOne) - (key >> kMostVocabularyBits); };
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

int32_t TokenDraw::Draw(std::span<const float> logits, const DrawRule& rule) {
  const int32_t best = ArgMax(logits);
  if (best < 0 || rule.temperature == 0 || std::isinf(logits[best])) return best;
  const double highest = logits[best], inverse = 1.0 / rule.temperature;
  uint64_t total = 0;
  if (rule.top_k > 0 && rule.top_k < vocab_size_) {
    SelectBest(logits, rule.top_k, keys_);
    std::ranges::fill(weight_, 0);
    for (const uint64_t key : keys_)
      total += weight_[key & kIdMask] = Weight((logits[key & kIdMask] - highest) * inverse);
  } else {
    total = Weigh(logits, highest, inverse, weight_);
  }
  if (rule.top_p < 1) {
    total = KeepNucleus(std::max<uint64_t>(1, static_cast<uint64_t>(rule.top_p * static_cast<double>(total))));
  }
  if (rule.min_p > 0) {
    const auto least = static_cast<uint64_t>(rule.min_p * kWeightOne);
    total = 0;
    for (uint64_t& weight : weight_) total += weight = weight < least ? 0 : weight;
  }
  uint64_t left = std::min(static_cast<uint64_t>(rule.uniform * static_cast<double>(total)), total - 1);
  for (int32_t id = 0;; ++id) {
    if (left < weight_[id]) return id;
    left -= weight_[id];
  }
}

}  // namespace rankwise::kernels
