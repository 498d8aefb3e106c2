#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <sstream>

#include "coordinator/text/detokenizer.h"
#include "coordinator/text/test_models.h"

// Real tokenizers against the ids and texts of their original implementations.
namespace rankwise::text {
namespace {

struct Reference {
  std::string name;       // of reference/<name>.inp and .out
  std::string directory;  // of the model, below tokenizers/
};

void PrintTo(const Reference& reference, std::ostream* out) { *out << reference.name << " by " << reference.directory; }

class HuggingFaceReferenceTest : public testing::TestWithParam<Reference> {};

// The texts of a .inp file, each followed by the separator.
std::vector<std::string> ReadTexts(const std::string& path) {
  const std::string separator = "\n__ggml_vocab_test__\n";
  const std::string contents = ReadAll(path);
  std::vector<std::string> texts;
  for (size_t begin = 0; begin < contents.size();) {
    const size_t end = contents.find(separator, begin);
    texts.push_back(contents.substr(begin, end - begin));
    begin = end == std::string::npos ? end : end + separator.size();
  }
  return texts;
}

std::vector<std::vector<int32_t>> ReadIds(const std::string& path) {
  std::istringstream contents(ReadAll(path));
  std::vector<std::vector<int32_t>> lines;
  for (std::string line; std::getline(contents, line);) {
    std::istringstream numbers(line);
    lines.emplace_back(std::istream_iterator<int32_t>(numbers), std::istream_iterator<int32_t>());
  }
  return lines;
}

TEST_P(HuggingFaceReferenceTest, EncodesAndDecodes) {
  if (TestData().empty()) GTEST_SKIP() << "no test data";
  const std::string root = TestData() + "/tokenizers/";
  const auto tokenizer = Tokenizer::Load(root + GetParam().directory);
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  const auto texts = ReadTexts(root + "reference/" + GetParam().name + ".inp");
  const auto ids = ReadIds(root + "reference/" + GetParam().name + ".out");
  ASSERT_EQ(texts.size(), ids.size());
  ASSERT_GE(texts.size(), 40u);
  for (size_t i = 0; i < texts.size(); ++i) {
    const auto encoded = (*tokenizer)->Encode(texts[i], {.add_bos = false});
    ASSERT_TRUE(encoded.ok()) << encoded.status();
    EXPECT_EQ(*encoded, ids[i]) << i << ": " << texts[i];
    EXPECT_EQ((*tokenizer)->Decode(*encoded), texts[i]) << i;
  }
}

INSTANTIATE_TEST_SUITE_P(Models, HuggingFaceReferenceTest,
                         testing::Values(Reference{"gpt-2", "gpt2"}, Reference{"llama-bpe", "llama3"},
                                         Reference{"qwen2", "qwen3"}, Reference{"deepseek-r1-qwen", "qwen3"},
                                         Reference{"llama-spm", "llama2"}, Reference{"llama-spm", "llama1-hf"}));

// The model files by their names in reference/sentencepiece.jsonl.
std::string SentencePieceFile(const std::string& name) {
  if (name == "unigram") return "sentencepiece-unigram/test_model.model";
  if (name == "stories260K") return "stories260K/tok512.model";
  return name + "/tokenizer.model";
}

class SentencePieceReferenceTest : public testing::TestWithParam<std::string> {};

TEST_P(SentencePieceReferenceTest, EncodesAndDecodes) {
  if (TestData().empty()) GTEST_SKIP() << "no test data";
  ModelFolder folder;
  folder.Link("tokenizer.model", TestData() + "/tokenizers/" + SentencePieceFile(GetParam()));
  const auto tokenizer = folder.Load();
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  std::istringstream lines(ReadAll(TestData() + "/tokenizers/reference/sentencepiece.jsonl"));
  int line_count = 0;
  for (std::string line; std::getline(lines, line); ++line_count) {
    const auto record = nlohmann::json::parse(line);
    const std::string text = record.at("text");
    const std::vector<int32_t> ids = record.at(GetParam());
    const auto encoded = (*tokenizer)->Encode(text, {.add_bos = false});
    ASSERT_TRUE(encoded.ok()) << encoded.status();
    EXPECT_EQ(*encoded, ids) << text;
    EXPECT_EQ((*tokenizer)->Decode(ids), record.at(GetParam() + "_decoded").get<std::string>());
  }
  EXPECT_EQ(line_count, 60);
}

INSTANTIATE_TEST_SUITE_P(Models, SentencePieceReferenceTest,
                         testing::Values("llama2", "internlm", "internlm2", "stories260K", "unigram"),
                         [](const auto& info) { return info.param; });

TEST(TokenizerReference, Llama3SpecialTokensFollowTheRanks) {
  if (TestData().empty()) GTEST_SKIP() << "no test data";
  const auto tokenizer = Tokenizer::Load(TestData() + "/tokenizers/llama3");
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_EQ((*tokenizer)->vocab_size(), 128256);
  EXPECT_EQ((*tokenizer)->bos_id(), 128000);
  EXPECT_THAT((*tokenizer)->eos_ids(), testing::ElementsAre(128001, 128009));
  // The prompt format of the Llama 3 model card.
  const auto ids = (*tokenizer)->Encode("<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>");
  ASSERT_TRUE(ids.ok()) << ids.status();
  EXPECT_THAT(*ids, testing::ElementsAre(128000, 128006, 882, 128007, 271, 13347, 128009));
  EXPECT_EQ((*tokenizer)->TokenText(128005), "<|reserved_special_token_3|>");
  EXPECT_EQ((*tokenizer)->TokenText(128008), "<|reserved_special_token_4|>");
  EXPECT_EQ((*tokenizer)->TokenText(128010), "<|reserved_special_token_5|>");
  EXPECT_EQ((*tokenizer)->TokenText(128255), "<|reserved_special_token_250|>");
}

TEST(TokenizerReference, Qwen3AddedTokens) {
  if (TestData().empty()) GTEST_SKIP() << "no test data";
  const auto tokenizer = Tokenizer::Load(TestData() + "/tokenizers/qwen3");
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_EQ((*tokenizer)->vocab_size(), 151669);
  EXPECT_FALSE((*tokenizer)->adds_bos());
  EXPECT_THAT((*tokenizer)->eos_ids(), testing::ElementsAre(151645));
  const auto ids = (*tokenizer)->Encode("<|im_start|>user\n<tool_call><|im_end|>");
  ASSERT_TRUE(ids.ok()) << ids.status();
  EXPECT_THAT(*ids, testing::ElementsAre(151644, 872, 198, 151657, 151645));
  EXPECT_EQ((*tokenizer)->Decode(*ids), "user\n<tool_call>");
  EXPECT_EQ((*tokenizer)->Decode(*ids, /*skip_special=*/false), "<|im_start|>user\n<tool_call><|im_end|>");
  // NFC joins the accent before the words are cut.
  EXPECT_EQ(*(*tokenizer)->Encode("Cafe\u0301"), *(*tokenizer)->Encode("Caf\u00e9"));
}

TEST(TokenizerReference, InternLm2NamesUnusedPieces) {
  if (TestData().empty()) GTEST_SKIP() << "no test data";
  ModelFolder folder;
  folder.Link("tokenizer.model", TestData() + "/tokenizers/internlm2/tokenizer.model");
  folder.Write("tokenizer_config.json",
               nlohmann::json{{"bos_token", "<s>"},
                              {"eos_token", "</s>"},
                              {"added_tokens_decoder",
                               {{"92542", {{"content", "<|im_end|>"}, {"special", true}}},
                                {"92543", {{"content", "<|im_start|>"}, {"special", true}}}}}});
  folder.Write("generation_config.json", nlohmann::json{{"eos_token_id", {2, 92542}}});
  const auto tokenizer = folder.Load();
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_THAT((*tokenizer)->eos_ids(), testing::ElementsAre(2, 92542));
  const auto ids = (*tokenizer)->Encode("<|im_start|>user\n<|im_end|>");
  ASSERT_TRUE(ids.ok()) << ids.status();
  EXPECT_EQ(ids->front(), 1);
  EXPECT_EQ((*ids)[1], 92543);
  EXPECT_EQ(ids->back(), 92542);
  EXPECT_EQ((*tokenizer)->Decode(*ids), "user\n");
}

TEST(TokenizerReference, SentencePieceWithoutLegacyPrefix) {
  if (TestData().empty()) GTEST_SKIP() << "no test data";
  ModelFolder folder;
  folder.Link("tokenizer.model", TestData() + "/tokenizers/llama2/tokenizer.model");
  nlohmann::json config{{"bos_token", "<s>"}, {"eos_token", "</s>"}, {"legacy", true}};
  folder.Write("tokenizer_config.json", config);
  const auto legacy = folder.Load();
  ASSERT_TRUE(legacy.ok()) << legacy.status();
  config["legacy"] = false;
  folder.Write("tokenizer_config.json", config);
  const auto modern = folder.Load();
  ASSERT_TRUE(modern.ok()) << modern.status();
  EXPECT_THAT(*(*legacy)->Encode("Hello</s>Hello"), testing::ElementsAre(1, 15043, 2, 15043));
  EXPECT_THAT(*(*modern)->Encode("Hello</s>Hello"), testing::ElementsAre(1, 15043, 2, 10994));
}

TEST(TokenizerReference, StoriesPromptsOfTheModelReference) {
  if (TestData().empty()) GTEST_SKIP() << "no test data";
  const std::string model = TestData() + "/models/stories260K-hf";
  const auto tokenizer = Tokenizer::Load(model);
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  const auto golden = nlohmann::json::parse(ReadAll(model + "/reference/greedy64.json"));
  for (const auto& prompt : golden.at("prompts")) {
    const std::vector<int32_t> input = prompt.at("input_ids");
    EXPECT_EQ(*(*tokenizer)->Encode(prompt.at("prompt").get<std::string>()), input);
  }
}

}  // namespace
}  // namespace rankwise::text
