#include "worker/engine/sampler.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace rankwise::engine {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// The known-answer test of Random123's philox4x32-10 for a zero counter and key: first words 6627e8d5 e169c58d.
TEST(UniformAtTest, IsPhilox4x32x10) {
  const uint64_t bits = ((uint64_t{0xe169c58d} << 32) | 0x6627e8d5) >> 11;
  EXPECT_EQ(UniformAt(0, 0), static_cast<double>(bits) * 0x1p-53);
  EXPECT_NE(UniformAt(0, 1), UniformAt(0, 0));
  EXPECT_NE(UniformAt(1, 0), UniformAt(0, 0));
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
