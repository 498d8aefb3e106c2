#include "coordinator/text/regex.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "coordinator/text/pre_tokenizer.h"

namespace rankwise::text {
namespace {

using testing::ElementsAre;

std::vector<std::string> Matches(const std::string& pattern, const std::string& text) {
  const auto regex = Regex::Compile(pattern);
  EXPECT_TRUE(regex.ok()) << regex.status();
  const auto ranges = regex->FindAll(text);
  EXPECT_TRUE(ranges.ok()) << ranges.status();
  std::vector<std::string> matches;
  for (const auto& [begin, end] : *ranges) matches.push_back(text.substr(begin, end - begin));
  return matches;
}

TEST(Regex, PatternsOfTheModels) {
  const std::string text = "I'LL  pay 1234€\n\n don't";
  EXPECT_THAT(Matches(kGpt2Pattern, text),
              ElementsAre("I", "'", "LL", " ", " pay", " 1234", "€", "\n\n", " don", "'t"));
  EXPECT_THAT(Matches(kLlama3Pattern, text),
              ElementsAre("I", "'LL", " ", " pay", " ", "123", "4", "€\n\n", " don", "'t"));
  EXPECT_THAT(Matches(kQwen2Pattern, text),
              ElementsAre("I", "'LL", " ", " pay", " ", "1", "2", "3", "4", "€\n\n", " don", "'t"));
}

TEST(Regex, ClassesAreThoseOfUnicode) {
  // NEL, ideographic space and no-break space are white space, the Mongolian vowel separator is not.
  EXPECT_THAT(Matches(R"(\s)", "a\u0085b\u3000c\u00a0d\u180e"), ElementsAre("\u0085", "\u3000", "\u00a0"));
  EXPECT_THAT(Matches(R"([^\sa-d])", "a\u0085b\u180e"), ElementsAre("\u180e"));
  EXPECT_THAT(Matches(R"(\S+)", "a\u180e b"), ElementsAre("a\u180e", "b"));
  EXPECT_THAT(Matches(R"([\s\S])", "a\u180e "), ElementsAre("a", "\u180e", " "));
  EXPECT_THAT(Matches(R"(\w+)", "e\u0301_\u203f1 \u2014x"), ElementsAre("e\u0301_\u203f1", "x"));
  EXPECT_THAT(Matches(R"(\W)", "a\u0301-b"), ElementsAre("-"));
  EXPECT_THAT(Matches(R"([\]\s]+|\\s)", "a] ]\\s"), ElementsAre("] ]", "\\s"));
  EXPECT_THAT(Matches(R"(^b$)", "a\nb\nc"), ElementsAre("b"));
}

TEST(Regex, EmptyMatchesAreSkipped) {
  EXPECT_THAT(Matches("x*", "axxéb"), ElementsAre("xx"));
  EXPECT_THAT(Matches("x", ""), ElementsAre());
}

TEST(Regex, LiteralsMatchThemselves) {
  for (const std::string text : {"a.b", "[", "\\E", "▁", "$^ #"}) {
    const auto regex = Regex::CompileLiteral(text);
    ASSERT_TRUE(regex.ok()) << regex.status();
    EXPECT_EQ(regex->FindAll("aXb" + text + "Y")->size(), 1u) << text;
  }
}

TEST(Regex, RefusesWhatItCannotReproduce) {
  for (const char* pattern : {"(", R"([\p{L}&&[^a]])", R"(\C)", R"([\W])", "[a[b]c]", "[[:alpha:]]", R"(\p{Nonsense})"})
    EXPECT_EQ(Regex::Compile(pattern).status().code(), absl::StatusCode::kInvalidArgument) << pattern;
}

}  // namespace
}  // namespace rankwise::text
