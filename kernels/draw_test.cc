// Drawing a token: on every backend what TokenDraw draws, whatever shares the call. That TokenDraw draws what it should
// is said by worker/engine/sampler_test.cc.

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <limits>

#include "kernels/test_support.h"
#include "kernels/token_draw.h"

namespace rankwise::kernels {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

class DrawTest : public ::testing::TestWithParam<std::string> {
 protected:
  // The tokens of all rows drawn at once, against those of TokenDraw one by one.
  void Check(const std::vector<std::vector<float>>& rows, const std::vector<DrawRule>& rules) {
    const auto vocab_size = static_cast<int32_t>(rows[0].size());
    TokenDraw draw(vocab_size);
    std::vector<int32_t> expected, drawn(rows.size(), -2);
    std::vector<float> logits;
    for (size_t r = 0; r < rows.size(); ++r) {
      expected.push_back(draw.Draw(rows[r], rules[r]));
      logits.insert(logits.end(), rows[r].begin(), rows[r].end());
    }
    const absl::Status status = backend_->Draw(drawn, logits.data(), rules, vocab_size);
    ASSERT_TRUE(status.ok()) << status;
    for (size_t r = 0; r < rows.size(); ++r) {
      ASSERT_EQ(drawn[r], expected[r]) << "row " << r << " of vocab_size=" << vocab_size
                                       << ", temperature=" << rules[r].temperature << " top_k=" << rules[r].top_k
                                       << " top_p=" << rules[r].top_p << " min_p=" << rules[r].min_p
                                       << " uniform=" << rules[r].uniform;
    }
  }

  const std::unique_ptr<Backend> backend_ = MakeBackend(GetParam(), 2);
};

TEST_P(DrawTest, IsTokenDrawsToTheBit) {
  Random random(TestSeed());
  SCOPED_TRACE(TestSeed());
  for (const int vocab_size : {1, 2, 3, 31, 64, 511, 512, 513, 700, 1025, 2048, 20000}) {
    std::vector<std::vector<float>> rows;
    std::vector<DrawRule> rules;
    for (int r = 0; r < 24; ++r) {
      const float spread = std::array{0.0f, 0.01f, 1.0f, 4.0f, 15.0f}[random.Int(0, 4)];
      auto& row = rows.emplace_back(random.Floats(vocab_size, -spread, spread));
      if (r % 3 > 0) {
        for (float& logit : row) logit = std::round(logit * 10) * 0.1f;  // ties, zeros of both signs
      }
      if (r % 4 == 3) {
        for (float& logit : row) {
          if (random.Int(0, 2) == 0) logit = random.Int(0, 1) == 0 ? kNaN : -kInfinity;
        }
      }
      rules.push_back({.uniform = random.Uniform(0, 1),
                       .temperature = r == 20 ? 0 : 0.25f * static_cast<float>(random.Int(1, 8)),
                       .top_k = r % 2 == 0 ? random.Int(1, vocab_size + 2) : 0,
                       .top_p = r % 4 < 2 ? random.Uniform(0.02f, 1) : 1,
                       .min_p = r % 3 == 1 ? random.Uniform(0, 1) : 0});
    }
    Check(rows, rules);
  }
}

TEST_P(DrawTest, OfTiesTakesTheLowestIds) {
  std::vector<std::vector<float>> rows;
  std::vector<DrawRule> rules;
  for (int r = 0; r < 12; ++r) {
    auto& row = rows.emplace_back(std::vector<float>(600, 1.0f));
    row[0] = -0.0f;
    row[599] = 1.0f + 0x1p-23f;  // a logit of its own, and at temperature 100 the same weight
    rules.push_back({.uniform = r / 12.0, .temperature = 100, .top_p = 0.3f});
    if (r % 3 == 1) rules.back() = {.uniform = r / 12.0, .top_k = 5};
    if (r % 3 == 2) rules.back() = {.uniform = r / 12.0, .top_k = 300, .top_p = 0.5f, .min_p = 0.9f};
  }
  Check(rows, rules);
}

TEST_P(DrawTest, HasAnAnswerForEveryRow) {
  const float lowest = std::numeric_limits<float>::lowest(), highest = std::numeric_limits<float>::max();
  const std::vector<std::vector<float>> rows = {
      {kNaN, -kInfinity, 2, kNaN},       {kNaN, -kInfinity, kNaN, -kInfinity}, {highest, kInfinity, lowest, kInfinity},
      {lowest, lowest, highest, lowest}, {-kNaN, lowest, lowest, kNaN},        {0.0f, -0.0f, -0.0f, 0.0f}};
  for (const DrawRule& rule :
       {DrawRule{.temperature = 0}, DrawRule{.uniform = 0.7}, DrawRule{.uniform = 1 - 0x1p-53, .top_k = 3},
        DrawRule{.uniform = 0.4, .top_p = 0x1p-126f}, DrawRule{.uniform = 0.9, .temperature = 1e-30f, .min_p = 1}}) {
    Check(rows, std::vector<DrawRule>(rows.size(), rule));
  }
}

INSTANTIATE_TEST_SUITE_P(Backends, DrawTest, testing::ValuesIn(BackendNames()), [](const auto& i) { return i.param; });

}  // namespace
}  // namespace rankwise::kernels
