#include "launch/eval/scoring.h"

#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

namespace rankwise::eval {
namespace {

TEST(Number, IsBehindTheMarkOrTheLast) {
  EXPECT_EQ(ExtractNumber("She makes 9 * 2 = $18.\n#### 18"), "18");
  EXPECT_EQ(ExtractNumber("#### 5\nno, 6. #### 1,234.00 dollars, or 7"), "1234");
  EXPECT_EQ(ExtractNumber("The answer is 18."), "18");
  EXPECT_EQ(ExtractNumber("3 apples cost $1,250.50, so"), "1250.5");
  EXPECT_EQ(ExtractNumber("x = -12"), "-12");
  EXPECT_EQ(ExtractNumber("10-12"), "12");  // a range, not a sign
  EXPECT_EQ(ExtractNumber("#### none, but 4 before"), "4");
  EXPECT_EQ(ExtractNumber("0.50"), "0.5");
  EXPECT_EQ(ExtractNumber("100"), "100");
  EXPECT_EQ(ExtractNumber("no number"), "");
  EXPECT_EQ(ExtractNumber(""), "");
  EXPECT_EQ(ExtractNumber("####"), "");
  EXPECT_EQ(ExtractNumber(",5"), "5");
}

TEST(Option, IsBehindAnswerIs) {
  EXPECT_EQ(ExtractOption(" (A) is odd. So the answer is (C)."), "C");
  EXPECT_EQ(ExtractOption("the answer is B"), "B");
  EXPECT_EQ(ExtractOption("I think (D)"), "D");
  EXPECT_EQ(ExtractOption("so it is E"), "E");
  EXPECT_EQ(ExtractOption("nothing"), "");
  EXPECT_EQ(ExtractOption("answer is ("), "");
}

TEST(Phrase, EndsWithItsLine) {
  EXPECT_EQ(ExtractPhrase("We sort. So the answer is barn damp grub.\n\nQ: next"), "barn damp grub");
  EXPECT_EQ(ExtractPhrase("So the answer is ] } ]."), "] } ]");
  EXPECT_EQ(ExtractPhrase(" Yes \nNo"), "Yes");
  EXPECT_EQ(ExtractPhrase(""), "");
}

TEST(Letter, StandsAlone) {
  EXPECT_EQ(ExtractLetter("Bananas are good: B.", 'B'), "B");
  EXPECT_EQ(ExtractLetter("(C)", 'D'), "C");
  EXPECT_EQ(ExtractLetter("C", 'B'), "");
  EXPECT_EQ(ExtractLetter("A's", 'D'), "");
  EXPECT_EQ(ExtractLetter("", 'D'), "");
  EXPECT_EQ(ExtractFirstCapital("答案是B，不是A"), "B");
  EXPECT_EQ(ExtractFirstCapital("b"), "");
}

TEST(Fact, IsNormalised) {
  EXPECT_EQ(NormalizeFact("The Beatles, of course"), "beatles");
  EXPECT_EQ(NormalizeFact("14 December 1972 UTC"), "14 december 1972 utc");
  EXPECT_EQ(NormalizeFact("an  Apple-pie!"), "applepie");
  EXPECT_EQ(NormalizeFact("another theory"), "another theory");
  EXPECT_EQ(ExtractFact("\n The answer is  The Moon.\nQ: and?"), "moon");
  EXPECT_EQ(ExtractFact("it is Paris"), "it is paris");
  EXPECT_EQ(ExtractFact(""), "");
}

TEST(Correctness, TakesAnyAliasAndNoEmptyAnswer) {
  const Item item{.answers = {"december 1972", "14 december 1972 utc", ""}, .extraction = Extraction::kFact};
  EXPECT_TRUE(IsCorrect(item, " The answer is December 1972."));
  EXPECT_FALSE(IsCorrect(item, "1972"));
  EXPECT_FALSE(IsCorrect(item, "  "));
}

TEST(Choice, IsByLengthWhereAsked) {
  const Item item{.choices = {{"c", " ab"}, {"c", " abcdefgh"}}};
  const std::vector<double> scores = {-2, -4};
  EXPECT_EQ(BestChoice(item, scores, false), 0u);  // -2 > -4
  EXPECT_EQ(BestChoice(item, scores, true), 1u);   // -2/2 < -4/8
  const std::vector<double> equal = {-1, -1};
  EXPECT_EQ(BestChoice(item, equal, false), 0u);
}

KnownTokens Known(int32_t id, const std::vector<double>& p, const std::vector<int32_t>& top) {
  KnownTokens known{.id = id, .log_probability = std::log(p[id])};
  for (const int32_t t : top) known.top.emplace_back(t, std::log(p[t]));
  return known;
}

TEST(Kl, IsExactWhenAllIsKnownAndLessOtherwise) {
  const std::vector<double> p = {0.5, 0.3, 0.15, 0.05}, q = {0.4, 0.4, 0.1, 0.1};
  const double exact = 0.05142956110979794;
  EXPECT_NEAR(KlLowerBound(Known(2, p, {0, 1, 2, 3}), Known(2, q, {0, 1, 2, 3})), exact, 1e-8);
  EXPECT_NEAR(KlLowerBound(Known(2, p, {0, 1}), Known(2, q, {1, 0})), exact, 1e-12);  // the bucket holds one token
  EXPECT_NEAR(KlLowerBound(Known(2, p, {0}), Known(2, q, {1})), 0.01223511445226829, 1e-12);
  EXPECT_EQ(KlLowerBound(Known(1, p, {0, 1}), Known(1, p, {0, 1})), 0);
}

}  // namespace
}  // namespace rankwise::eval
