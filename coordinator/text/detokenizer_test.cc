#include "coordinator/text/detokenizer.h"

#include <gtest/gtest.h>

#include <random>

#include "coordinator/text/sentencepiece_model.h"
#include "coordinator/text/test_models.h"
#include "coordinator/text/utf8.h"

namespace rankwise::text {
namespace {

std::vector<int32_t> RandomIds(std::mt19937& random, int32_t limit) {
  std::vector<int32_t> ids(random() % 30);
  for (int32_t& id : ids) id = static_cast<int32_t>(random() % static_cast<uint32_t>(limit));
  return ids;
}

// Every piece by itself is UTF-8, and together they are Decode of all.
void ExpectPiecesAreTheWhole(const Tokenizer& tokenizer, const std::vector<int32_t>& ids, bool skip_special) {
  IncrementalDetokenizer detokenizer(&tokenizer, {.skip_special = skip_special});
  std::string joined;
  for (const int32_t id : ids) {
    const std::string piece = detokenizer.Append(id);
    ASSERT_TRUE(ValidateUtf8(piece).ok());
    joined += piece;
  }
  joined += detokenizer.Flush();
  EXPECT_EQ(joined, tokenizer.Decode(ids, skip_special)) << testing::PrintToString(ids);
}

TEST(IncrementalDetokenizer, ByteLevelIsTheBytesMadeValid) {
  ModelFolder folder;
  folder.Write("tokenizer.json", ByteLevelModel({{"h", "e"}, {"\xC3", "\xA9"}, {" ", "\xE2"}, {"\x82", "\xAC"}}));
  const auto tokenizer = folder.Load();
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  std::mt19937 random(11);
  for (int round = 0; round < 3000; ++round) {
    // Ids beyond the vocabulary add nothing.
    const std::vector<int32_t> ids = RandomIds(random, (*tokenizer)->vocab_size() + 5);
    std::string bytes;
    for (const int32_t id : ids)
      if (!(*tokenizer)->IsSpecial(id)) bytes += (*tokenizer)->TokenBytes(id);
    EXPECT_EQ((*tokenizer)->Decode(ids), ToValidUtf8(bytes)) << testing::PrintToString(ids);
    ExpectPiecesAreTheWhole(**tokenizer, ids, /*skip_special=*/true);
    ExpectPiecesAreTheWhole(**tokenizer, ids, /*skip_special=*/false);
  }
}

TEST(IncrementalDetokenizer, HoldsBackIncompleteCharacters) {
  ModelFolder folder;
  folder.Write("tokenizer.json", ByteLevelModel({}));
  const auto tokenizer = folder.Load();
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  IncrementalDetokenizer detokenizer(tokenizer->get());
  EXPECT_EQ(detokenizer.Append(0xE2), "");
  EXPECT_EQ(detokenizer.Append(0x82), "");
  EXPECT_EQ(detokenizer.Append(0xAC), "€");
  EXPECT_EQ(detokenizer.Append('a'), "a");
  EXPECT_EQ(detokenizer.Append(0xF0), "");
  EXPECT_EQ(detokenizer.Append('b'), "\uFFFDb");
  EXPECT_EQ(detokenizer.Append(0xF0), "");
  EXPECT_EQ(detokenizer.Append(0x9F), "");
  EXPECT_EQ(detokenizer.Flush(), "\uFFFD");
  EXPECT_EQ(detokenizer.Flush(), "");
}

TEST(IncrementalDetokenizer, DummyPrefixOfTheFirstToken) {
  ModelFolder folder;
  folder.Write("tokenizer.json", ByteFallbackModel());
  const auto tokenizer = folder.Load();
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  const auto ids = (*tokenizer)->Encode("ab ab");
  ASSERT_TRUE(ids.ok()) << ids.status();
  EXPECT_EQ((*tokenizer)->Decode(*ids), "ab ab");
  IncrementalDetokenizer behind_prompt(tokenizer->get(), {.continues_text = true});
  std::string text;
  for (const int32_t id : *ids) text += behind_prompt.Append(id);
  EXPECT_EQ(text, " ab ab");
  std::mt19937 random(13);
  for (int round = 0; round < 3000; ++round)
    ExpectPiecesAreTheWhole(**tokenizer, RandomIds(random, (*tokenizer)->vocab_size()), round % 2 == 0);
}

class SentencePieceDecodeTest : public testing::TestWithParam<const char*> {};

TEST_P(SentencePieceDecodeTest, RandomIdsDecodeAsInTheLibrary) {
  if (TestData().empty()) GTEST_SKIP() << "no test data";
  ModelFolder folder;
  const std::string path = TestData() + "/tokenizers/" + GetParam();
  folder.Link("tokenizer.model", path);
  const auto tokenizer = folder.Load();
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  std::string error;
  const auto library = SentencePieceModel::Create(error);
  ASSERT_NE(library, nullptr) << error;
  ASSERT_EQ(library->Load(ReadAll(path)), "");
  std::mt19937 random(17);
  for (int round = 0; round < 3000; ++round) {
    // Every second text of byte and control tokens mostly.
    const std::vector<int32_t> ids = RandomIds(random, round % 2 == 0 ? 270 : (*tokenizer)->vocab_size());
    EXPECT_EQ((*tokenizer)->Decode(ids), library->DecodeIds(ids)) << testing::PrintToString(ids);
    ExpectPiecesAreTheWhole(**tokenizer, ids, /*skip_special=*/true);
  }
}

INSTANTIATE_TEST_SUITE_P(Models, SentencePieceDecodeTest,
                         testing::Values("llama2/tokenizer.model", "internlm/tokenizer.model",
                                         "internlm2/tokenizer.model", "stories260K/tok512.model",
                                         "sentencepiece-unigram/test_model.model"));

}  // namespace
}  // namespace rankwise::text
