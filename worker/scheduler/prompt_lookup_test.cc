#include "worker/scheduler/prompt_lookup.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <random>

namespace rankwise::scheduler {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

std::vector<int32_t> Draft(PromptLookup& lookup, const std::vector<int32_t>& tokens, int32_t count) {
  std::vector<int32_t> drafts{99};
  lookup.Draft(tokens, count, drafts);
  return drafts;
}
std::vector<int32_t> DraftOnce(const std::vector<int32_t>& tokens, int32_t count) {
  PromptLookup lookup;
  return Draft(lookup, tokens, count);
}

TEST(PromptLookupTest, GoesOnAsAfterTheLatestPlaceOfTheLastThreeTokens) {
  EXPECT_THAT(DraftOnce({1, 2, 3, 4, 5, 6, 9, 1, 2, 3, 7, 8, 9, 1, 2, 3}, 3), ElementsAre(7, 8, 9));
}

TEST(PromptLookupTest, ThreeTokensSayMoreThanTwo) {
  EXPECT_THAT(DraftOnce({1, 2, 3, 4, 5, 2, 3, 7, 8, 1, 2, 3}, 2), ElementsAre(4, 5));
  EXPECT_THAT(DraftOnce({1, 2, 3, 4, 5, 2, 3, 7, 8, 6, 2, 3}, 2), ElementsAre(7, 8));
}

TEST(PromptLookupTest, GuessesNothingWhereNothingRepeats) {
  EXPECT_THAT(DraftOnce({}, 4), IsEmpty());
  EXPECT_THAT(DraftOnce({1}, 4), IsEmpty());
  EXPECT_THAT(DraftOnce({1, 1}, 4), IsEmpty()) << "the pair must have stood before";
  EXPECT_THAT(DraftOnce({1, 2, 3, 4, 5, 2}, 4), IsEmpty()) << "one token is too little";
}

TEST(PromptLookupTest, FollowsAPeriodBeyondTheEnd) {
  EXPECT_THAT(DraftOnce({7, 7, 7}, 4), ElementsAre(7, 7, 7, 7));
  EXPECT_THAT(DraftOnce({1, 2, 3, 1, 2, 3}, 7), ElementsAre(1, 2, 3, 1, 2, 3, 1));
}

// Token by token or all at once, and whatever the sizes of the index were on the way, a guess is what stood behind the
// same tokens at some earlier place; and the index forgets seldom.
TEST(PromptLookupTest, NeverInventsAPlace) {
  int64_t found = 0, there = 0;
  for (uint64_t seed = 1; seed <= 200; ++seed) {
    std::mt19937_64 random(seed);
    const int32_t vocab = 2 + static_cast<int32_t>(random() % 60);
    PromptLookup lookup;
    std::vector<int32_t> tokens;
    while (tokens.size() < 400) {
      for (uint64_t n = 1 + random() % 5; n > 0; --n) tokens.push_back(static_cast<int32_t>(random() % vocab));
      const std::vector<int32_t> drafts = Draft(lookup, tokens, 3);
      const auto stands = [&](size_t gram) {
        const auto last = tokens.end() - static_cast<int64_t>(gram);
        return tokens.size() > gram &&
               std::search(tokens.begin(), tokens.end() - 1, last, tokens.end()) < tokens.end() - 1;
      };
      there += stands(2);
      if (drafts.empty()) continue;
      ++found;
      std::vector<int32_t> longer(tokens.end() - 2, tokens.end());
      longer.insert(longer.end(), drafts.begin(), drafts.end());
      std::vector<int32_t> all = tokens;
      all.insert(all.end(), drafts.begin(), drafts.end());
      ASSERT_EQ(drafts.size(), 3u);
      ASSERT_LT(std::search(all.begin(), all.end() - 1, longer.begin(), longer.end()), all.end() - 1)
          << "seed " << seed;
    }
  }
  EXPECT_GT(found, 9 * there / 10);
  EXPECT_LE(found, there);
}

}  // namespace
}  // namespace rankwise::scheduler
