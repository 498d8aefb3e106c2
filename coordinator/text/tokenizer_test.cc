#include "coordinator/text/tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "coordinator/text/test_models.h"

namespace rankwise::text {
namespace {

using nlohmann::json;
using testing::ElementsAre;
using testing::HasSubstr;

std::unique_ptr<Tokenizer> MustLoad(const ModelFolder& folder) {
  auto tokenizer = folder.Load();
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status();
  return tokenizer.ok() ? *std::move(tokenizer) : nullptr;
}

std::unique_ptr<Tokenizer> MustLoad(const json& model) {
  ModelFolder folder;
  folder.Write("tokenizer.json", model);
  return MustLoad(folder);
}

// The error of a tokenizer.json, which must not load.
absl::Status ErrorOf(const json& model) {
  ModelFolder folder;
  folder.Write("tokenizer.json", model);
  return folder.Load().status();
}

std::vector<int32_t> Encode(const Tokenizer& tokenizer, const std::string& text, const EncodeOptions& options = {}) {
  const auto ids = tokenizer.Encode(text, options);
  EXPECT_TRUE(ids.ok()) << ids.status();
  return ids.value_or(std::vector<int32_t>{});
}

constexpr int32_t kEnd = 258, kTool = 259;  // of ByteLevelModel with two merges

TEST(Tokenizer, OfAWorkspaceLiesInAFolderOfItsOwn) {
  const ModelFolder folder;
  folder.Write("tokenizer.json", json("not this one"));
  std::filesystem::create_directories(folder.path() + "/triton_models/tokenizer");
  folder.Write("triton_models/tokenizer/tokenizer.json", ByteLevelModel({{"h", "e"}, {" ", "he"}}));
  const auto tokenizer = MustLoad(folder);
  ASSERT_NE(tokenizer, nullptr);
  EXPECT_THAT(Encode(*tokenizer, "he he"), ElementsAre(256, 257));
}

TEST(Tokenizer, ByteLevel) {
  const auto tokenizer = MustLoad(ByteLevelModel({{"h", "e"}, {" ", "he"}}));
  EXPECT_EQ(tokenizer->vocab_size(), 260);
  EXPECT_THAT(Encode(*tokenizer, "he he"), ElementsAre(256, 257));
  EXPECT_THAT(Encode(*tokenizer, "h\xC3\xA9\n"), ElementsAre('h', 0xC3, 0xA9, '\n'));
  EXPECT_THAT(Encode(*tokenizer, ""), ElementsAre());
  EXPECT_EQ(tokenizer->Decode(std::vector<int32_t>{256, 257, 0xC3, 0xA9}), "he heé");
  EXPECT_EQ(tokenizer->TokenBytes(257), " he");
  EXPECT_EQ(tokenizer->TokenBytes(0xC3), "\xC3");
  EXPECT_EQ(tokenizer->TokenText(0xC3), "\uFFFD");
  EXPECT_EQ(tokenizer->TokenText(kEnd), "<|end|>");
  EXPECT_EQ(tokenizer->TokenText(-1), "");
  EXPECT_TRUE(tokenizer->IsSpecial(kEnd));
  EXPECT_FALSE(tokenizer->IsSpecial(kTool));
  EXPECT_FALSE(tokenizer->IsSpecial(1 << 30));
}

TEST(Tokenizer, ByteFallbackWithDummyPrefixAndTemplateBos) {
  const auto tokenizer = MustLoad(ByteFallbackModel());
  EXPECT_EQ(tokenizer->bos_id(), 1);
  EXPECT_THAT(Encode(*tokenizer, "ab c"), ElementsAre(1, 265, 259, 262));
  EXPECT_THAT(Encode(*tokenizer, "ab c", {.add_bos = false}), ElementsAre(265, 259, 262));
  EXPECT_THAT(Encode(*tokenizer, "è", {.add_bos = false}), ElementsAre(259, 3 + 0xC3, 3 + 0xA8));
  EXPECT_EQ(tokenizer->Decode(std::vector<int32_t>{1, 265, 259, 262}), "ab c");
  EXPECT_EQ(tokenizer->Decode(std::vector<int32_t>{3 + 0xC3, 3 + 0xA8, 265}), "è ab");
}

TEST(Tokenizer, SpecialTextIsTextWhenItIsNotParsed) {
  const auto tokenizer = MustLoad(ByteLevelModel({{"h", "e"}, {" ", "he"}}));
  EXPECT_THAT(Encode(*tokenizer, "a<|end|>b"), ElementsAre('a', kEnd, 'b'));
  EXPECT_EQ(Encode(*tokenizer, "a<|end|>b", {.parse_special = false}).size(), 9u);
  EXPECT_THAT(Encode(*tokenizer, "<tool>", {.parse_special = false}), ElementsAre(kTool));
  EXPECT_EQ(tokenizer->Decode(std::vector<int32_t>{'a', kEnd, kTool}), "a<tool>");
  EXPECT_EQ(tokenizer->Decode(std::vector<int32_t>{'a', kEnd, kTool}, /*skip_special=*/false), "a<|end|><tool>");
}

TEST(Tokenizer, FlagsOfAddedTokens) {
  json model = ByteLevelModel({{"h", "e"}, {" ", "he"}});
  const auto add = [&](int32_t id, const char* content, const char* flag) {
    json token{{"id", id}, {"content", content}, {"special", false}, {"normalized", false}};
    if (*flag != 0) token[flag] = true;
    model["added_tokens"].push_back(token);
  };
  add(260, "<L>", "lstrip");
  add(261, "<R>", "rstrip");
  add(262, "word", "single_word");
  add(263, "<R><R>", "");
  const auto tokenizer = MustLoad(model);
  EXPECT_THAT(Encode(*tokenizer, "a \u3000<L> b"), ElementsAre('a', 260, ' ', 'b'));
  EXPECT_THAT(Encode(*tokenizer,
                     "a <R> \n\u3000"
                     "b"),
              ElementsAre('a', ' ', 261, 'b'));
  EXPECT_THAT(Encode(*tokenizer, "<R> <L>"), ElementsAre(261, 260));
  EXPECT_THAT(Encode(*tokenizer, "a word."), ElementsAre('a', ' ', 262, '.'));
  EXPECT_EQ(Encode(*tokenizer, "words éword").size(), 5u + 1 + 2 + 4);
  EXPECT_THAT(Encode(*tokenizer, "<R><R><R>"), ElementsAre(263, 261));  // the longest
}

TEST(Tokenizer, NormalizedAddedTokensAreFoundInNormalizedText) {
  json model = ByteLevelModel({});
  model["normalizer"] = {{"type", "Replace"}, {"pattern", {{"Regex", "[0-9]"}}}, {"content", "N"}};
  model["added_tokens"].push_back({{"id", 258}, {"content", "<1>"}, {"special", false}, {"normalized", true}});
  const auto tokenizer = MustLoad(model);
  EXPECT_THAT(Encode(*tokenizer, "7<2>"), ElementsAre('N', 258));
}

TEST(Tokenizer, NfcComposesAndOrdersMarks) {
  json model = ByteLevelModel({});
  model["normalizer"] = {{"type", "NFC"}};
  const auto tokenizer = MustLoad(model);
  const auto normalized = [&](const std::string& text) { return tokenizer->Decode(Encode(*tokenizer, text)); };
  EXPECT_EQ(normalized("e\u0301"), "\u00e9");
  EXPECT_EQ(normalized("a\u0301\u0323"), "\u1ea1\u0301");  // dot below before acute
  EXPECT_EQ(normalized("\u1112\u1161\u11ab"), "\ud55c");   // Hangul
  EXPECT_EQ(normalized("\u212b"), "\u00c5");               // Angstrom sign
  EXPECT_EQ(normalized("\ufb01"), "\ufb01");               // compatibility characters stay
}

TEST(Tokenizer, SplitBehaviors) {
  // "-" delimits; merges of "a-", "-b" and "--" show where words were cut.
  json model = ByteLevelModel({{"a", "-"}, {"-", "b"}, {"-", "-"}});
  const auto encode = [&](const char* behavior, bool invert) {
    model["pre_tokenizer"] = {
        {"type", "Sequence"},
        {"pretokenizers",
         {{{"type", "Split"}, {"pattern", {{"String", "-"}}}, {"behavior", behavior}, {"invert", invert}},
          {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}}}}};
    return Encode(*MustLoad(model), "a--b");
  };
  EXPECT_THAT(encode("Isolated", false), ElementsAre('a', '-', '-', 'b'));
  EXPECT_THAT(encode("Removed", false), ElementsAre('a', 'b'));
  EXPECT_THAT(encode("Removed", true), ElementsAre('-', '-'));
  EXPECT_THAT(encode("MergedWithPrevious", false), ElementsAre(256, '-', 'b'));
  EXPECT_THAT(encode("MergedWithNext", false), ElementsAre('a', '-', 257));
  EXPECT_THAT(encode("Contiguous", false), ElementsAre('a', 258, 'b'));
}

TEST(Tokenizer, MetaspacePrependsByScheme) {
  json model = ByteFallbackModel();
  model["normalizer"] = nullptr;
  const auto encode = [&](const char* scheme, const std::string& text) {
    model["pre_tokenizer"] = {
        {"type", "Metaspace"}, {"replacement", "▁"}, {"prepend_scheme", scheme}, {"split", false}};
    return Encode(*MustLoad(model), text, {.add_bos = false});
  };
  EXPECT_THAT(encode("always", "ab</s>ab"), ElementsAre(265, 2, 265));
  EXPECT_THAT(encode("first", "ab</s>ab"), ElementsAre(265, 2, 264));
  EXPECT_THAT(encode("never", "ab ab"), ElementsAre(264, 265));
}

TEST(Tokenizer, VocabularyAndMerges) {
  const json source = ByteLevelModel({{"h", "e"}});
  ModelFolder folder;
  folder.Write("vocab.json", source["model"]["vocab"]);
  folder.Write("merges.txt", std::string("#version: 0.2\nh e\n"));
  EXPECT_THAT(Encode(*MustLoad(folder), "he"), ElementsAre(256));
  folder.Write("tokenizer_config.json", json{{"tokenizer_class", "BertTokenizer"}});
  EXPECT_EQ(folder.Load().status().code(), absl::StatusCode::kUnimplemented);
}

TEST(Tokenizer, RankFileAndItsSpecialTokens) {
  std::string ranks;
  for (int byte = 0; byte < 256; ++byte)
    absl::StrAppend(&ranks, absl::Base64Escape(std::string(1, static_cast<char>(byte))), " ", byte, "\n");
  absl::StrAppend(&ranks, absl::Base64Escape("he"), " 256\n");
  ModelFolder folder;
  folder.Write("tokenizer.model", ranks);
  const auto tokenizer = MustLoad(folder);
  EXPECT_EQ(tokenizer->vocab_size(), 257 + 256);
  EXPECT_THAT(Encode(*tokenizer, "he<|eot_id|>"), ElementsAre(257, 256, 257 + 9));
  // Llama 3.1 names reserved tokens.
  folder.Write("tokenizer_config.json",
               json{{"added_tokens_decoder", {{"265", {{"content", "<|eom_id|>"}, {"special", true}}}}}});
  EXPECT_THAT(Encode(*MustLoad(folder), "<|eom_id|>", {.add_bos = false}), ElementsAre(265));
  folder.Write("tokenizer.model", ranks + "!!! 300\n");
  EXPECT_THAT(folder.Load().status().message(), HasSubstr("line 258"));
}

TEST(Tokenizer, BosAndEosOfTheSmallFiles) {
  ModelFolder folder;
  folder.Write("tokenizer.json", ByteLevelModel({{"h", "e"}, {" ", "he"}}));
  EXPECT_EQ(MustLoad(folder)->Encode("a", {.add_bos = true}).status().code(), absl::StatusCode::kInvalidArgument);
  folder.Write("generation_config.json", json{{"eos_token_id", {5, 3}}, {"bos_token_id", 7}});
  folder.Write("config.json", json{{"eos_token_id", 3}, {"bos_token_id", 8}});
  auto tokenizer = MustLoad(folder);
  EXPECT_THAT(tokenizer->eos_ids(), ElementsAre(3, 5));
  EXPECT_THAT(Encode(*tokenizer, "a"), ElementsAre('a'));
  EXPECT_THAT(Encode(*tokenizer, "a", {.add_bos = true}), ElementsAre(7, 'a'));
  folder.Write("tokenizer_config.json",
               json{{"bos_token", {{"content", "<|end|>"}}}, {"eos_token", "<tool>"}, {"add_bos_token", true}});
  tokenizer = MustLoad(folder);
  EXPECT_THAT(tokenizer->eos_ids(), ElementsAre(3, 5, kTool));
  EXPECT_TRUE(tokenizer->IsSpecial(kTool));
  EXPECT_THAT(Encode(*tokenizer, "a"), ElementsAre(kEnd, 'a'));
  folder.Write("config.json", json{{"eos_token_id", 260}});
  EXPECT_THAT(folder.Load().status().message(), HasSubstr("260"));
  folder.Write("config.json", json{{"eos_token_id", 1e300}});
  EXPECT_EQ(folder.Load().status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(Tokenizer, RefusesTextThatIsNotUtf8) {
  const auto tokenizer = MustLoad(ByteLevelModel({}));
  for (const char* text :
       {"abc\xFF", "abc\xC0\x80", "abc\xED\xA0\x80", "abc\xE2\x82", "abc\xF4\x90\x80\x80", "abc\x80"}) {
    const absl::Status status = tokenizer->Encode(text).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(status.message(), HasSubstr("byte 3"));
  }
  EXPECT_THAT(Encode(*tokenizer, std::string("a\0b", 3)), ElementsAre('a', 0, 'b'));
}

TEST(Tokenizer, NamesWhatItCannotReproduce) {
  const auto expect_refused = [](const char* member, const json& value, const char* word) {
    json model = ByteLevelModel({});
    model[json::json_pointer(member)] = value;
    const absl::Status status = ErrorOf(model);
    EXPECT_EQ(status.code(), absl::StatusCode::kUnimplemented) << status;
    EXPECT_THAT(status.message(), HasSubstr(word));
    EXPECT_THAT(status.message(), HasSubstr("tokenizer.json"));
  };
  expect_refused("/normalizer", {{"type", "Precompiled"}}, "Precompiled");
  expect_refused("/pre_tokenizer", {{"type", "UnicodeScripts"}}, "UnicodeScripts");
  expect_refused("/decoder", {{"type", "WordPiece"}}, "WordPiece");
  expect_refused("/decoder", nullptr, "decoder");
  expect_refused("/post_processor", {{"type", "RobertaProcessing"}}, "RobertaProcessing");
  expect_refused("/model/type", "Unigram", "Unigram");
  expect_refused("/model/end_of_word_suffix", "</w>", "</w>");
  expect_refused("/model/dropout", 0.1, "dropout");
}

TEST(Tokenizer, RefusesContradictions) {
  const auto expect_refused = [](const char* member, const json& value) {
    json model = ByteLevelModel({});
    model[json::json_pointer(member)] = value;
    EXPECT_EQ(ErrorOf(model).code(), absl::StatusCode::kInvalidArgument) << member << " " << value;
  };
  expect_refused("/model/vocab/twice", 65);
  expect_refused("/model/vocab/big", 1 << 22);
  expect_refused("/model/vocab/big", 1e300);
  expect_refused("/model/vocab/big", 18446744073709551615u);
  expect_refused("/model/vocab/negative", -1);
  expect_refused("/model/vocab/word", "7");
  expect_refused("/model/vocab", json::array());
  expect_refused("/model/merges", {"a zzz"});
  expect_refused("/model/merges", {"a"});
  expect_refused("/model/merges", {{"a", "b", "c"}});
  expect_refused("/model/unk_token", "<nothing>");
  expect_refused("/added_tokens/0/id", 65);
  expect_refused("/added_tokens/0/id", 257);
  expect_refused("/added_tokens/0/content", 3);
  expect_refused("/added_tokens/0/content", "<tool>");
  expect_refused("/pre_tokenizer/use_regex", "yes");
  expect_refused("/pre_tokenizer", nullptr);
  expect_refused("/pre_tokenizer", {{"type", "Sequence"}});
  expect_refused("/normalizer", {{"type", "Sequence"}, {"normalizers", "NFC"}});
  expect_refused("/normalizer", {{"type", "Replace"}, {"pattern", {{"Regex", "(("}}}, {"content", ""}});
  EXPECT_EQ(ErrorOf(json::array()).code(), absl::StatusCode::kInvalidArgument);
  ModelFolder folder;
  EXPECT_EQ(folder.Load().status().code(), absl::StatusCode::kNotFound);
  folder.Write("tokenizer.model", std::string("\x0A\xFF garbage"));
  EXPECT_EQ(folder.Load().status().code(), absl::StatusCode::kInvalidArgument);
}

// A chain of Sequences may not overflow the stack.
TEST(Tokenizer, RefusesDeepNesting) {
  for (const auto& [member, list] :
       {std::pair{"normalizer", "normalizers"}, std::pair{"pre_tokenizer", "pretokenizers"},
        std::pair{"decoder", "decoders"}, std::pair{"post_processor", "processors"}}) {
    std::string nested;
    for (int i = 0; i < 100000; ++i) absl::StrAppend(&nested, R"({"type":"Sequence",")", list, R"(":[)");
    for (int i = 0; i < 100000; ++i) nested += "]}";
    json model = ByteLevelModel({});
    model[member] = "HERE";
    std::string contents = model.dump();
    contents.replace(contents.find("\"HERE\""), 6, nested);
    ModelFolder folder;
    folder.Write("tokenizer.json", contents);
    EXPECT_THAT(folder.Load().status().message(), HasSubstr("nested")) << member;
  }
}

// A pattern that backtracks without end is cut off.
TEST(Tokenizer, HostilePatternEnds) {
  json model = ByteLevelModel({});
  model["normalizer"] = {{"type", "Replace"}, {"pattern", {{"Regex", "(a+)+[bc]"}}}, {"content", ""}};
  EXPECT_EQ(MustLoad(model)->Encode(std::string(40, 'a')).status().code(), absl::StatusCode::kResourceExhausted);
}

// Texts of a megabyte that are one word, one run of blanks, one run of marks, or all short words: quadratic work would
// take hours.
TEST(Tokenizer, LongRuns) {
  json model = ByteLevelModel({{"a", "a"}, {" ", " "}, {"aa", "aa"}});
  model["normalizer"] = {{"type", "NFC"}};
  const auto byte_level = MustLoad(model);
  const auto fallback = MustLoad(ByteFallbackModel());
  constexpr size_t kBytes = 1 << 20;
  EXPECT_EQ(Encode(*byte_level, std::string(kBytes, 'a')).size(), kBytes / 4);
  EXPECT_EQ(Encode(*byte_level, std::string(kBytes, ' ')).size(), kBytes / 2);
  EXPECT_EQ(Encode(*byte_level, std::string(kBytes, '\n')).size(), kBytes);
  EXPECT_EQ(Encode(*byte_level, std::string(kBytes, '<')).size(), kBytes);
  std::string marks, words;
  for (size_t i = 0; i < kBytes / 2; ++i) words += " b";
  EXPECT_EQ(Encode(*byte_level, words).size(), kBytes);
  for (size_t i = 0; i < kBytes / 4; ++i) marks += "\u0301\u0323";
  EXPECT_EQ(Encode(*byte_level, "a" + marks).size(), kBytes + 1);
  EXPECT_EQ(Encode(*fallback, std::string(kBytes, 'c'), {.add_bos = false}).size(), kBytes + 1);
}

// Any change of a byte gives a tokenizer or a status.
TEST(Tokenizer, MutatedFilesNeverCrash) {
  std::mt19937 random(20240608);
  for (const std::string& original : {ByteLevelModel({{"h", "e"}, {" ", "he"}}).dump(), ByteFallbackModel().dump()}) {
    int loaded = 0;
    for (int round = 0; round < 500; ++round) {
      std::string mutated = original;
      for (size_t i = 1 + random() % 3; i > 0; --i) {
        const size_t at = random() % mutated.size();
        switch (random() % 4) {
          case 0:
            mutated[at] = static_cast<char>(random());
            break;
          case 1:
            mutated.erase(at, 1 + random() % 40);
            break;
          case 2:
            mutated.insert(at, mutated.substr(random() % mutated.size(), random() % 40));
            break;
          default:
            mutated[at] = "0123456789-,:\"[]{}e\\"[random() % 20];
        }
      }
      ModelFolder folder;
      folder.Write("tokenizer.json", mutated);
      const auto tokenizer = folder.Load();
      if (!tokenizer.ok()) continue;
      ++loaded;
      const auto ids = (*tokenizer)->Encode("he he <|end|>  ab é\n<s>");
      if (ids.ok()) (*tokenizer)->Decode(*ids);
    }
    EXPECT_GT(loaded, 10);
    EXPECT_LT(loaded, 490);
  }
}

}  // namespace
}  // namespace rankwise::text
