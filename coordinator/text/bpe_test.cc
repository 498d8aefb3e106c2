#include "coordinator/text/bpe.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

namespace rankwise::text {
namespace {

struct Merge {
  std::string left, right;
};

BpeModel MakeModel(const std::vector<std::string>& characters, const std::vector<Merge>& merges,
                   const BpeModel::Options& options = {}) {
  BpeModel model;
  int32_t next_id = 0;
  for (const std::string& character : characters) EXPECT_TRUE(model.AddToken(character, next_id++).ok());
  for (const auto& [left, right] : merges) {
    if (!model.Find(left + right)) {
      EXPECT_TRUE(model.AddToken(left + right, next_id++).ok());
    }
  }
  for (const auto& [left, right] : merges) EXPECT_TRUE(model.AddMerge(left, right).ok());
  model.set_options(options);
  return model;
}

std::vector<int32_t> Encode(const BpeModel& model, const std::string& word) {
  BpeModel::Scratch scratch;
  std::vector<int32_t> ids;
  const absl::Status status = model.Encode(word, scratch, ids);
  EXPECT_TRUE(status.ok()) << status;
  return ids;
}

// The definition: as long as there is a pair, merge the leftmost of the lowest rank.
std::vector<std::string> EncodeSlowly(const std::string& word, const std::vector<Merge>& merges) {
  std::vector<std::string> parts;
  for (const char c : word) parts.emplace_back(1, c);
  while (true) {
    size_t best_rank = merges.size(), best = 0;
    for (size_t i = 0; i + 1 < parts.size(); ++i)
      for (size_t rank = 0; rank < best_rank; ++rank)
        if (merges[rank].left == parts[i] && merges[rank].right == parts[i + 1]) best_rank = rank, best = i;
    if (best_rank == merges.size()) return parts;
    parts[best] += parts[best + 1];
    parts.erase(parts.begin() + static_cast<int64_t>(best) + 1);
  }
}

TEST(BpeModel, MergesAsTheDefinitionSays) {
  std::mt19937 random(20240607);
  for (int round = 0; round < 300; ++round) {
    const std::vector<std::string> characters = {"a", "b", "c"};
    std::vector<std::string> tokens = characters;
    std::vector<Merge> merges;
    for (int i = 0; i < 12; ++i) {
      const Merge merge{tokens[random() % tokens.size()], tokens[random() % tokens.size()]};
      // One way to spell a token only: of several, which counts is a matter of taste and not of this test.
      if (std::find(tokens.begin(), tokens.end(), merge.left + merge.right) != tokens.end()) continue;
      tokens.push_back(merge.left + merge.right);
      merges.push_back(merge);
    }
    const BpeModel model = MakeModel(characters, merges);
    std::string word;
    for (size_t i = random() % 40; i > 0; --i) word += static_cast<char>('a' + random() % 3);
    std::vector<int32_t> expected;
    for (const std::string& part : EncodeSlowly(word, merges)) expected.push_back(*model.Find(part));
    EXPECT_EQ(Encode(model, word), expected) << "round " << round << ", word " << word;
  }
}

TEST(BpeModel, RankFilesMergeByTheRankOfTheResult) {
  BpeModel model;
  int32_t rank = 0;
  for (const char* token : {"a", "b", "c", "bc", "ab", "abc"}) ASSERT_TRUE(model.AddToken(token, rank++).ok());
  model.AddMergesByRank();
  EXPECT_THAT(Encode(model, "abc"), testing::ElementsAre(5));  // bc first, then a + bc
  EXPECT_THAT(Encode(model, "abab"), testing::ElementsAre(4, 4));
}

TEST(BpeModel, CharactersWithoutTokens) {
  const std::vector<std::string> characters = {"a", "<unk>", "<0xC3>", "<0xA9>"};
  BpeModel::Scratch scratch;
  std::vector<int32_t> ids;
  EXPECT_EQ(MakeModel(characters, {}).Encode("ab", scratch, ids).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(Encode(MakeModel(characters, {}, {.unknown = 1}), "abba"), testing::ElementsAre(0, 1, 1, 0));
  EXPECT_THAT(Encode(MakeModel(characters, {}, {.unknown = 1, .fuse_unknown = true}), "abba"),
              testing::ElementsAre(0, 1, 0));
  const BpeModel fallback = MakeModel(characters, {}, {.unknown = 1, .fuse_unknown = true, .byte_fallback = true});
  EXPECT_THAT(Encode(fallback, "aéa"), testing::ElementsAre(0, 2, 3, 0));
  EXPECT_THAT(Encode(fallback, "aèa"), testing::ElementsAre(0, 1, 0));  // <0xA8> is missing
}

TEST(BpeModel, IgnoreMergesTakesWholeWords) {
  BpeModel model = MakeModel({"a", "b", "ab"}, {});
  EXPECT_THAT(Encode(model, "ab"), testing::ElementsAre(0, 1));
  model.set_options({.ignore_merges = true});
  EXPECT_THAT(Encode(model, "ab"), testing::ElementsAre(2));
}

TEST(BpeModel, RefusesWhatContradictsItself) {
  BpeModel model = MakeModel({"a", "b"}, {});
  EXPECT_EQ(model.AddToken("a", 7).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(model.AddMerge("a", "b").code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(model.AddMerge("c", "a").code(), absl::StatusCode::kInvalidArgument);
}

TEST(BpeModel, WorkIsLinearInTheWord) {
  // Doubling tokens of one letter: every merge makes its neighbours candidates again.
  std::vector<Merge> merges;
  for (size_t length = 1; length <= 256; length *= 2)
    merges.push_back({std::string(length, 'a'), std::string(length, 'a')});
  const BpeModel model = MakeModel({"a", "b"}, merges);
  constexpr int64_t kBytes = 1 << 18;
  BpeModel::Scratch scratch;
  std::vector<int32_t> ids;
  ASSERT_TRUE(model.Encode(std::string(kBytes, 'a'), scratch, ids).ok());
  EXPECT_EQ(ids.size(), static_cast<size_t>(kBytes / 512));
  // Each of the first n-1 pairs once, and at most two more for each of fewer than n merges.
  EXPECT_LT(scratch.candidates, 3 * kBytes);
}

}  // namespace
}  // namespace rankwise::text
