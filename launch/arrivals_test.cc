#include "launch/arrivals.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>

namespace rankwise::launch {
namespace {

using ::testing::HasSubstr;
using ::testing::SizeIs;

std::string Write(const std::string& name, const std::string& text) {
  const std::string path = ::testing::TempDir() + name;
  std::ofstream(path) << text;
  return path;
}

TEST(ArrivalsTest, ReadsAzuresLinesAndDividesLengths) {
  const auto trace = ReadTrace(Write("trace.csv",
                                     "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
                                     "2023-11-16 18:17:03.9799600,4808,10\r\n2023-11-16 18:17:04.4799600,3,8\r\n"),
                               8);
  ASSERT_TRUE(trace.ok()) << trace.status();
  ASSERT_THAT(*trace, SizeIs(2));
  EXPECT_EQ((*trace)[0].at, absl::ZeroDuration());
  EXPECT_EQ((*trace)[0].prompt_tokens, 601);
  EXPECT_EQ((*trace)[0].output_tokens, 1);
  EXPECT_EQ((*trace)[1].at, absl::Milliseconds(500));
  EXPECT_EQ((*trace)[1].prompt_tokens, 1);
}

TEST(ArrivalsTest, ReadsMooncakesLinesInOrderOfTime) {
  const auto trace =
      ReadTrace(Write("trace.jsonl",
                      "{\"timestamp\": 90, \"input_length\": 7, \"output_length\": 2}\n"
                      "{\"timestamp\": 40, \"input_length\": 700, \"output_length\": 5, \"hash_ids\": [0, 1]}\n"),
                1);
  ASSERT_TRUE(trace.ok()) << trace.status();
  ASSERT_THAT(*trace, SizeIs(2));
  EXPECT_EQ((*trace)[0].prompt_tokens, 700);
  EXPECT_EQ((*trace)[0].output_tokens, 5);
  EXPECT_EQ((*trace)[1].at, absl::Milliseconds(50));
}

TEST(ArrivalsTest, RefusalsNameTheLine) {
  EXPECT_TRUE(absl::IsNotFound(ReadTrace(::testing::TempDir() + "none.csv", 1).status()));
  for (const std::string bad :
       {"nonsense", "2023-11-16 18:17:03,1", "2023-11-16 18:17:03,1,99999999999", "2023-11-16 18:17:03,-1,1"}) {
    const absl::Status status = ReadTrace(Write("bad.csv", "a,b,c\n" + bad + "\n"), 1).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << bad;
    EXPECT_THAT(std::string(status.message()), HasSubstr("line 2")) << bad;
  }
  for (const std::string bad : {"[]", "{", R"({"timestamp": "1", "input_length": 1, "output_length": 1})",
                                R"({"timestamp": 1, "input_length": 1})"}) {
    EXPECT_TRUE(absl::IsInvalidArgument(ReadTrace(Write("bad.jsonl", bad + "\n"), 1).status())) << bad;
  }
}

TEST(ArrivalsTest, RangesAreReadAndRefused) {
  const auto one = ParseTokenRange("128"), two = ParseTokenRange("64:256");
  ASSERT_TRUE(one.ok() && two.ok()) << one.status() << two.status();
  EXPECT_EQ(one->least, 128);
  EXPECT_EQ(one->most, 128);
  EXPECT_EQ(two->least, 64);
  EXPECT_EQ(two->most, 256);
  for (const char* bad : {"", "0", "-1", "a", "4:", ":4", "5:4", "1:2:3", "1e3", "99999999999"}) {
    EXPECT_TRUE(absl::IsInvalidArgument(ParseTokenRange(bad).status())) << bad;
  }
}

TEST(ArrivalsTest, ThePoissonProcessHasItsRateAndItsSpread) {
  constexpr int kCount = 40'000;
  constexpr double kRate = 50;
  const std::vector<Arrival> arrivals = DrawArrivals(kCount, kRate, {4, 12}, {7, 7}, 1);
  ASSERT_THAT(arrivals, SizeIs(kCount));
  double last = 0, sum = 0, squares = 0, prompt = 0;
  for (const Arrival& arrival : arrivals) {
    const double gap = absl::ToDoubleSeconds(arrival.at) - last;
    ASSERT_GE(gap, 0);
    last += gap;
    sum += gap;
    squares += gap * gap;
    prompt += arrival.prompt_tokens;
    ASSERT_TRUE(arrival.prompt_tokens >= 4 && arrival.prompt_tokens <= 12);
    ASSERT_EQ(arrival.output_tokens, 7);
  }
  // Five standard errors. A gap's mean and standard deviation are both 1 / rate; that of the variance is sqrt(8) of it.
  const double mean = sum / kCount, error = 5 / std::sqrt(double{kCount});
  EXPECT_NEAR(mean * kRate, 1, error);
  EXPECT_NEAR((squares / kCount - mean * mean) * kRate * kRate, 1, error * std::sqrt(8.0));
  EXPECT_NEAR(prompt / kCount, 8, error * std::sqrt(80.0 / 12));
}

TEST(ArrivalsTest, TheSeedDecides) {
  const auto draw = [](uint64_t seed) { return DrawArrivals(20, 3, {1, 1000}, {1, 1000}, seed); };
  const auto prompts = [](const std::vector<Arrival>& arrivals) {
    std::vector<int32_t> tokens;
    for (const Arrival& arrival : arrivals) tokens.push_back(arrival.prompt_tokens);
    return tokens;
  };
  EXPECT_EQ(prompts(draw(1)), prompts(draw(1)));
  EXPECT_EQ(draw(1).back().at, draw(1).back().at);
  EXPECT_NE(prompts(draw(1)), prompts(draw(2)));
  EXPECT_EQ(DrawArrivals(3, 0, {}, {}, 1).back().at, absl::ZeroDuration());
}

TEST(ArrivalsTest, PromptsShareWhatTheyShouldAndNoMore) {
  const std::vector<int32_t> a = DrawPrompt(7, 0, 100, 32, 4096), b = DrawPrompt(7, 1, 60, 32, 4096);
  ASSERT_THAT(a, SizeIs(100));
  ASSERT_THAT(b, SizeIs(60));
  EXPECT_EQ(std::vector(a.begin(), a.begin() + 32), std::vector(b.begin(), b.begin() + 32));
  EXPECT_NE(std::vector(a.begin() + 32, a.begin() + 60), std::vector(b.begin() + 32, b.end()));
  EXPECT_THAT(a, ::testing::Each(::testing::AllOf(::testing::Ge(0), ::testing::Lt(4096))));
  EXPECT_EQ(a, DrawPrompt(7, 0, 100, 32, 4096));
  EXPECT_NE(a, DrawPrompt(8, 0, 100, 32, 4096));
  EXPECT_THAT(DrawPrompt(7, 3, 5, 32, 4096), SizeIs(5));
  const std::vector<int32_t> c = DrawPrompt(7, 0, 16, 0, 4096), d = DrawPrompt(7, 1, 16, 0, 4096);
  EXPECT_NE(c, d);
}

}  // namespace
}  // namespace rankwise::launch
