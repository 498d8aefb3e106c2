#include "worker/engine/sampler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>

namespace rankwise::engine {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// The known answers for philox4x32-10 in Random123, tests/kat_vectors.
TEST(Philox4x32Test, GivesTheKnownAnswers) {
  using Words = std::array<uint32_t, 4>;
  EXPECT_EQ(Philox4x32({0, 0, 0, 0}, {0, 0}), (Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  constexpr uint32_t kOnes = 0xffffffff;
  EXPECT_EQ(Philox4x32({kOnes, kOnes, kOnes, kOnes}, {kOnes, kOnes}),
            (Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(Philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
            (Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(UniformAtTest, CountsPositionsUnderTheSeed) {
  constexpr uint64_t kBits = ((uint64_t{0xe169c58d} << 32) | 0x6627e8d5) >> 11;
  EXPECT_EQ(UniformAt(0, 0), static_cast<double>(kBits) * 0x1p-53);
  EXPECT_LT(UniformAt(0, 0), 1);
  const std::array draws = {UniformAt(0, 0), UniformAt(0, 1), UniformAt(0, uint64_t{1} << 32), UniformAt(1, 0),
                            UniformAt(uint64_t{1} << 32, 0)};
  for (size_t i = 0; i < draws.size(); ++i) EXPECT_EQ(std::ranges::count(draws, draws[i]), 1);
}

SampledToken Sample(std::vector<float> logits, const SamplingParams& params, std::vector<int32_t> tokens = {0},
                    int32_t prompt_count = 1, std::vector<int32_t> eos = {}) {
  Sampler sampler(static_cast<int32_t>(logits.size()));
  return sampler.Sample(logits, params, tokens, prompt_count, eos);
}

SamplingParams Greedy() { return {.max_tokens = 10, .temperature = 0}; }

TEST(SamplerTest, GreedyTakesTheLowestOfTheBest) {
  EXPECT_EQ(Sample({1, 3, 3, 2}, Greedy()).id, 1);
  EXPECT_EQ(Sample({kNaN, -5, kNaN}, Greedy()).id, 1);
  EXPECT_EQ(Sample({kNaN, kNaN}, Greedy()).id, -1);
}

TEST(SamplerTest, PenaltiesBiasAndMinimum) {
  SamplingParams params = Greedy();
  params.repetition_penalty = 2;
  EXPECT_EQ(Sample({3, 2, 0}, params, {0, 0}, 2).id, 1);
  params = Greedy();
  params.frequency_penalty = 0.6f;
  EXPECT_EQ(Sample({3, 2, 0}, params, {0, 0, 0}, 1).id, 1);  // twice generated: 3 - 1.2
  EXPECT_EQ(Sample({3, 2, 0}, params, {0, 0, 0}, 3).id, 0);  // prompt tokens do not count
  params = Greedy();
  params.presence_penalty = 1.5f;
  EXPECT_EQ(Sample({3, 2, 0}, params, {5, 0}, 1).id, 1);
  params = Greedy();
  params.logit_bias = {{2, 4.0f}};
  EXPECT_EQ(Sample({3, 2, 0}, params).id, 2);
  params = Greedy();
  params.min_tokens = 2;
  EXPECT_EQ(Sample({3, 2, 0}, params, {1, 1}, 1, {0}).id, 1);
  EXPECT_EQ(Sample({3, 2, 0}, params, {1, 1, 1}, 1, {0}).id, 0);
}

// Pearson's chi-square of 20,000 draws at consecutive positions against the probabilities that should remain.
double ChiSquare(const std::vector<float>& logits, SamplingParams params, const std::vector<double>& expected) {
  Sampler sampler(static_cast<int32_t>(logits.size()));
  std::vector<int> seen(logits.size(), 0);
  std::vector<int32_t> tokens;
  constexpr int kDraws = 20000;
  for (int i = 0; i < kDraws; ++i) {
    std::vector<float> copy = logits;
    params.seed = 99 + i;
    ++seen[sampler.Sample(copy, params, tokens, 0, {}).id];
  }
  double total = 0, chi = 0;
  for (const double p : expected) total += p;
  for (size_t i = 0; i < expected.size(); ++i) {
    if (expected[i] == 0) {
      EXPECT_EQ(seen[i], 0) << "token " << i;
      continue;
    }
    const double mean = kDraws * expected[i] / total;
    chi += (seen[i] - mean) * (seen[i] - mean) / mean;
  }
  return chi;
}

TEST(SamplerTest, DrawsFromTheDistributionThatIsLeft) {
  const std::vector<float> logits = {0, 1, 2, -1, 0.5f};
  std::vector<double> p;
  for (const float logit : logits) p.push_back(std::exp(logit));
  constexpr double kLimit = 18.5;  // chi-square with 4 degrees of freedom exceeds it with probability 0.001
  const SamplingParams plain{.max_tokens = 1};
  EXPECT_LT(ChiSquare(logits, plain, p), kLimit);
  EXPECT_GT(ChiSquare(logits, plain, {1, 1, 1, 1, 1}), kLimit) << "the test can fail";
  EXPECT_LT(ChiSquare(logits, {.max_tokens = 1, .top_k = 2}, {0, p[1], p[2], 0, 0}), kLimit);
  EXPECT_LT(ChiSquare(logits, {.max_tokens = 1, .top_p = 0.8f}, {0, p[1], p[2], 0, p[4]}), kLimit);
  EXPECT_LT(ChiSquare(logits, {.max_tokens = 1, .min_p = 0.3f}, {0, p[1], p[2], 0, 0}), kLimit);
  std::vector<double> hot;
  for (const float logit : logits) hot.push_back(std::exp(logit / 2));
  EXPECT_LT(ChiSquare(logits, {.max_tokens = 1, .temperature = 2}, hot), kLimit);
}

// What Sample does, written from its contract: logits in the order of falling probability, then sums in long double.
struct Reference {
  std::vector<int32_t> kept;  // by rising id
  std::vector<long double> weight;
  long double total = 0;

  Reference(const std::vector<float>& logits, const SamplingParams& params) : weight(logits.size()) {
    std::vector<int32_t> order(logits.size());
    std::iota(order.begin(), order.end(), 0);
    std::ranges::stable_sort(order, [&](int32_t a, int32_t b) { return logits[a] > logits[b]; });
    const float highest = logits[order[0]];
    for (size_t i = 0; i < logits.size(); ++i) {
      weight[i] = std::exp((static_cast<long double>(logits[i]) - highest) / params.temperature);
    }
    if (params.top_k > 0) order.resize(std::min<size_t>(order.size(), params.top_k));
    long double all = 0, sum = 0;
    for (const int32_t id : order) all += weight[id];
    for (const int32_t id : order) {
      if (sum >= params.top_p * all && params.top_p < 1) break;
      sum += weight[id];
      if (weight[id] < params.min_p) continue;
      kept.push_back(id);
      total += weight[id];
    }
    std::ranges::sort(kept);
  }

  // Whether `id` is drawn for `uniform`, give or take a rounding.
  bool Allows(int32_t id, double uniform) const {
    constexpr long double kRounding = 1e-8L;
    long double before = 0;
    for (const int32_t one : kept) {
      if (one == id)
        return uniform >= before / total - kRounding && uniform <= (before + weight[id]) / total + kRounding;
      before += weight[one];
    }
    return false;
  }
};

TEST(SamplerTest, EqualsASortedReference) {
  for (uint64_t seed = 1; seed <= 3000; ++seed) {
    std::mt19937_64 random(seed);
    const auto below = [&](int n) { return static_cast<int>(random() % n); };
    std::vector<float> logits(1 + below(seed % 50 == 0 ? 20000 : 300));
    const float spread = std::array{0.01f, 1.0f, 4.0f, 15.0f}[below(4)];
    for (float& logit : logits) {
      logit = std::round(spread * static_cast<float>(below(2001) - 1000) * 0.1f) * 0.01f;  // ties are common
    }
    SamplingParams params{.max_tokens = 1, .temperature = 0.25f * static_cast<float>(1 + below(8)), .seed = seed};
    if (below(2) == 0) params.top_k = 1 + below(static_cast<int>(logits.size()) + 3);
    if (below(2) == 0) params.top_p = 0.05f + 0.0499f * static_cast<float>(below(20)) + 0.0013f;
    if (below(3) == 0) params.min_p = 0.02f * static_cast<float>(below(20)) + 0.0013f;
    const Reference reference(logits, params);
    for (int32_t position = 0; position < 8; ++position) {
      const std::vector<int32_t> tokens(position, 0);
      const int32_t id = Sample(logits, params, tokens, 0).id;
      ASSERT_TRUE(reference.Allows(id, UniformAt(seed, position)))
          << "seed " << seed << " drew " << id << " of " << logits.size() << ", top_k=" << params.top_k
          << " top_p=" << params.top_p << " min_p=" << params.min_p << " temperature=" << params.temperature;
    }
  }
}

TEST(SamplerTest, TiesAtTheCutGoToTheLowestIds) {
  std::vector<float> logits = {-0.0f, 1, 0.0f, 1, 0, 1, 1, -0.0f};
  for (uint64_t seed = 0; seed < 200; ++seed) {
    EXPECT_LE(Sample(logits, {.max_tokens = 1, .top_k = 3, .seed = seed}).id, 5);
    EXPECT_LE(Sample(logits, {.max_tokens = 1, .top_p = 0.1f, .seed = seed}).id, 1);
  }
  EXPECT_EQ(Sample({-0.0f, 0.0f}, {.max_tokens = 1, .top_k = 1}).id, 0);
}

TEST(SamplerTest, NeitherNaNNorMaskedIsEverDrawn) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (uint64_t seed = 0; seed < 200; ++seed) {
    for (const SamplingParams& params :
         {SamplingParams{.seed = seed}, SamplingParams{.top_k = 3, .seed = seed},
          SamplingParams{.top_p = 0.99f, .seed = seed}, SamplingParams{.temperature = 1e-30f, .seed = seed}}) {
      EXPECT_EQ(Sample({kNaN, -kInfinity, 2, kNaN, -kNaN}, params).id, 2);
      EXPECT_EQ(Sample({kNaN, -kInfinity}, params).id, -1);
      EXPECT_EQ(Sample({3e38f, kInfinity, -3e38f, kInfinity}, params).id, 1);
    }
  }
  const SamplingParams masked{.max_tokens = 5, .min_tokens = 1, .stop_token_ids = {1}};
  EXPECT_EQ(Sample({1, 2}, masked, {0}, 1, {0}).id, -1);
}

TEST(SamplerTest, TheDrawDependsOnSeedAndPositionAlone) {
  const std::vector<float> logits(1000, 0.5f);
  const SamplingParams params{.max_tokens = 9, .seed = 5};
  const int32_t id = Sample(logits, params, {1, 2, 3}, 1).id;
  EXPECT_EQ(Sample(logits, params, {7, 8, 9}, 3).id, id);
  EXPECT_NE(Sample(logits, params, {1, 2}, 1).id, id);
  EXPECT_EQ(id, static_cast<int32_t>(UniformAt(5, 3) * 1000));
  Sampler used(1000);
  std::vector<float> other(1000, -1.0f);
  other[3] = 4;
  used.Sample(
      other,
      {.max_tokens = 9, .top_k = 7, .top_p = 0.5f, .repetition_penalty = 1.3f, .frequency_penalty = 1, .logprobs = 3},
      std::vector<int32_t>{3, 3}, 1, {});
  std::vector<float> copy = logits;
  EXPECT_EQ(used.Sample(copy, params, std::vector<int32_t>{1, 2, 3}, 1, {}).id, id) << "scratch is left clean";
}

// The bits of 64 draws over 5,003 tokens, folded into one number: every machine, compiler and build must find the same.
TEST(SamplerTest, DrawsTheSameBitsEverywhere) {
  std::vector<float> logits(5003);
  for (size_t i = 0; i < logits.size(); ++i) logits[i] = static_cast<float>(12 * UniformAt(77, i) - 6);
  uint64_t hash = 0;
  Sampler sampler(static_cast<int32_t>(logits.size()));
  for (uint64_t seed = 0; seed < 64; ++seed) {
    const SamplingParams params{.max_tokens = 9,
                                .temperature = 0.7f,
                                .top_k = seed % 2 == 0 ? 0 : 100,
                                .top_p = seed % 4 < 2 ? 1 : 0.9f,
                                .seed = seed,
                                .logprobs = 2};
    std::vector<float> copy = logits;
    const SampledToken sampled = sampler.Sample(copy, params, {}, 0, {});
    hash = (hash ^ static_cast<uint64_t>(sampled.id)) * 0x9E3779B97F4A7C15;
    hash = (hash ^ std::bit_cast<uint32_t>(sampled.logprob)) * 0x9E3779B97F4A7C15;
  }
  EXPECT_EQ(hash, 11578561887848725877u);
}

TEST(SamplerTest, LogprobsAreExactToTheFloat) {
  for (uint64_t seed = 0; seed < 50; ++seed) {
    std::vector<float> logits(1 + seed * 37);
    for (size_t i = 0; i < logits.size(); ++i) logits[i] = static_cast<float>(60 * UniformAt(seed, i) - 30);
    long double sum = 0;
    for (const float logit : logits) sum += std::exp(static_cast<long double>(logit));
    Sampler sampler(static_cast<int32_t>(logits.size()));
    const SampledToken scored = sampler.Score(logits, static_cast<int32_t>(seed % logits.size()), 20);
    ASSERT_EQ(scored.top.size(), std::min<size_t>(20, logits.size()));
    for (size_t i = 0; i < scored.top.size(); ++i) {
      const long double exact = logits[scored.top[i].id] - std::log(sum);
      // The sum loses at most 2^-41 a token, the result is rounded to 24 bits.
      const long double bound = 0x1p-41L * logits.size() + 0x1p-24L * std::abs(exact);
      EXPECT_NEAR(scored.top[i].logprob, exact, static_cast<double>(bound));
      EXPECT_TRUE(i == 0 || logits[scored.top[i - 1].id] >= logits[scored.top[i].id]);
    }
    const float best = *std::ranges::max_element(logits);
    EXPECT_EQ(logits[scored.top[0].id], best);
    EXPECT_NEAR(scored.logprob, logits[scored.id] - std::log(sum), 1e-5);
  }
}

TEST(SamplerTest, ScoresOfHopelessLogitsAreDefined) {
  Sampler sampler(3);
  const SampledToken scored = sampler.Score(std::array{kNaN, 1.0f, -std::numeric_limits<float>::infinity()}, 0, 3);
  EXPECT_EQ(scored.logprob, -std::numeric_limits<float>::infinity());
  EXPECT_EQ(scored.top[0].id, 1);
  EXPECT_EQ(scored.top[0].logprob, 0);
  EXPECT_EQ(scored.top[1].id, 0);
  EXPECT_EQ(sampler.Score(std::array{kNaN, kNaN, kNaN}, 0, 3).logprob, -std::numeric_limits<float>::infinity());
}

TEST(SamplerTest, LogprobsAreOfTheRawLogits) {
  SamplingParams params = Greedy();
  params.logprobs = 2;
  params.logit_bias = {{0, 50.0f}};
  const SampledToken sampled = Sample({0, std::log(3.0f), -std::numeric_limits<float>::infinity()}, params);
  EXPECT_EQ(sampled.id, 0);
  EXPECT_NEAR(sampled.logprob, std::log(0.25), 1e-6);
  ASSERT_EQ(sampled.top.size(), 2u);
  EXPECT_EQ(sampled.top[0].id, 1);
  EXPECT_NEAR(sampled.top[0].logprob, std::log(0.75), 1e-6);
}

TEST(ValidateSamplingParamsTest, NamesFieldValueAndLimit) {
  const auto message = [](SamplingParams params) {
    params.max_tokens = std::max(params.max_tokens, 1);
    return std::string(ValidateSamplingParams(params, 100).message());
  };
  EXPECT_EQ(message({}), "");
  EXPECT_EQ(message({.temperature = kNaN}), "temperature=nan is outside [0, 100]");
  EXPECT_EQ(message({.min_p = 1.5f}), "min_p=1.5 is outside [0, 1]");
  EXPECT_NE(message({.top_p = 0}), "");
  EXPECT_NE(message({.repetition_penalty = std::numeric_limits<float>::infinity()}), "");
  EXPECT_EQ(message({.stop_token_ids = {100}}), "stop_token_ids names token 100, outside [0, 100)");
  EXPECT_NE(message({.logit_bias = {{1, kNaN}}}), "");
}

}  // namespace
}  // namespace rankwise::engine
