#include "coordinator/text/stop_matcher.h"

#include <gtest/gtest.h>

#include <random>

namespace rankwise::text {
namespace {

struct Outcome {
  std::string text;
  std::optional<int> matched;
  bool operator==(const Outcome&) const = default;
};

// The definition: the stop that ends first, of several the longest.
Outcome MatchSlowly(const std::string& text, const std::vector<std::string>& stops, bool include_stop) {
  for (size_t end = 1; end <= text.size(); ++end) {
    Outcome outcome;
    size_t longest = 0;
    for (size_t i = 0; i < stops.size(); ++i) {
      if (!std::string_view(text).substr(0, end).ends_with(stops[i]) || stops[i].size() <= longest) continue;
      longest = stops[i].size();
      outcome = {text.substr(0, include_stop ? end : end - longest), static_cast<int>(i)};
    }
    if (outcome.matched) return outcome;
  }
  return {text, std::nullopt};
}

TEST(StopMatcher, AgreesWithTheDefinitionHoweverTheTextIsCut) {
  std::mt19937 random(7);
  int matches = 0;
  for (int round = 0; round < 5000; ++round) {
    const auto word = [&](size_t length) {
      std::string made;
      for (size_t i = 0; i < length; ++i) made += static_cast<char>('a' + random() % 2);
      return made;
    };
    std::vector<std::string> stops;
    for (size_t i = random() % 4; i > 0; --i) stops.push_back(word(1 + random() % 6));
    const std::string text = word(random() % 30);
    const bool include_stop = random() % 2 == 0;
    auto matcher = StopMatcher::Create(stops, {.include_stop = include_stop});
    ASSERT_TRUE(matcher.ok());
    std::string delivered;
    for (size_t at = 0; at < text.size();) {
      const size_t length = 1 + random() % 5;
      delivered += matcher->Feed(text.substr(at, length));
      at += length;
    }
    delivered += matcher->Flush();
    EXPECT_EQ((Outcome{delivered, matcher->matched()}), MatchSlowly(text, stops, include_stop)) << text;
    matches += matcher->matched().has_value();
  }
  EXPECT_GT(matches, 1000);
  EXPECT_LT(matches, 4900);
}

TEST(StopMatcher, KeepsBackOnlyWhatMayBeginAStop) {
  auto matcher = StopMatcher::Create({"</s>", "\n\nUser:"});
  ASSERT_TRUE(matcher.ok());
  EXPECT_EQ(matcher->Feed("Hello <"), "Hello ");
  EXPECT_EQ(matcher->Feed("b>"), "<b>");
  EXPECT_EQ(matcher->Feed("\n\nUs"), "");
  EXPECT_EQ(matcher->Feed("e\n"), "\n\nUse");
  EXPECT_EQ(matcher->Feed("\nUser: more"), "");
  EXPECT_EQ(matcher->matched(), 1);
  EXPECT_EQ(matcher->Feed("</s>"), "");
  EXPECT_EQ(matcher->Flush(), "");
}

TEST(StopMatcher, FlushDeliversTheRest) {
  auto matcher = StopMatcher::Create({"END"});
  ASSERT_TRUE(matcher.ok());
  EXPECT_EQ(matcher->Feed("the EN"), "the ");
  EXPECT_EQ(matcher->Flush(), "EN");
  EXPECT_EQ(matcher->Flush(), "");
  EXPECT_FALSE(matcher->matched());
}

TEST(StopMatcher, RefusesBadStops) {
  using Stops = std::vector<std::string>;
  for (const Stops& stops :
       {Stops{""}, Stops{"ok", "\xE2\x82"}, Stops{std::string(StopMatcher::kMaxStopBytes + 1, 'a')},
        Stops(StopMatcher::kMaxStops + 1, "a")})
    EXPECT_EQ(StopMatcher::Create(stops).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(StopMatcher::Create({}).ok());
}

}  // namespace
}  // namespace rankwise::text
