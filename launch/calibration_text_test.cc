#include "launch/calibration_text.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <set>

#include "absl/algorithm/container.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "tests/support/test_data.h"

namespace rankwise::launch {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::SizeIs;

// One token per word; numbers are their own ids.
absl::StatusOr<std::vector<int32_t>> Words(const std::string& text) {
  std::vector<int32_t> ids;
  for (const auto word : absl::StrSplit(text, absl::ByAnyChar(" \n"), absl::SkipEmpty()))
    ids.push_back(std::stoi(std::string(word)));
  return ids;
}

std::string Numbers(int begin, int end) {
  std::string text;
  for (int i = begin; i < end; ++i) absl::StrAppend(&text, i, " ");
  return text;
}

class CalibrationText : public ::testing::Test {
 protected:
  void SetUp() override {
    folder_ = ::testing::TempDir() + absl::StrCat("/rankwise-calibration-", getpid());
    std::filesystem::create_directories(folder_);
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }
  std::string Write(const std::string& name, const std::string& text) {
    std::ofstream(folder_ + "/" + name) << text;
    return folder_ + "/" + name;
  }
  std::string folder_;
};

TEST_F(CalibrationText, NamesAreFoundInTheirFolder) {
  Write("ptb.test.txt", " worse \n");
  Write("ptb.valid.txt", " one two \n three \n\n");
  const auto ptb = ReadCalibrationSource("ptb", folder_);
  ASSERT_TRUE(ptb.ok()) << ptb.status();
  EXPECT_THAT(ptb->documents, ElementsAre("one two", "three"));

  Write("wikitext2.raw.valid.txt", " \n = Title = \n \n Text .\n");
  EXPECT_THAT(ReadCalibrationSource("wikitext2", folder_)->documents,
              ElementsAre("", " = Title = \n", "", " Text .\n"));

  Write("c4.b.jsonl", "{\"text\":\"b\"}\n");
  Write("c4.a.jsonl", "{\"text\":\"a\\n1\"}\n\n{\"text\":\"a2\",\"url\":\"x\"}");
  const auto c4 = ReadCalibrationSource("c4", folder_);
  EXPECT_THAT(c4->documents, ElementsAre("a\n1", "a2", "b"));
  EXPECT_EQ(c4->rule, SamplingRule::kDocuments);
}

TEST_F(CalibrationText, ErrorsSayWhereAndWhat) {
  const absl::Status missing = ReadCalibrationSource("pileval", folder_).status();
  EXPECT_TRUE(absl::IsNotFound(missing));
  EXPECT_THAT(std::string(missing.message()), HasSubstr(folder_));
  EXPECT_THAT(std::string(missing.message()), HasSubstr("pileval*.jsonl"));
  EXPECT_TRUE(absl::IsNotFound(ReadCalibrationSource(folder_ + "/none.txt", folder_).status()));
  for (const char* line : {"{\"text\":1}", "[]", "{\"text\":\"x\"", "7"}) {
    const std::string path = Write("bad.jsonl", absl::StrCat("{\"text\":\"fine\"}\n", line, "\n"));
    const absl::Status bad = ReadCalibrationSource(path, folder_).status();
    EXPECT_TRUE(absl::IsInvalidArgument(bad));
    EXPECT_THAT(std::string(bad.message()), HasSubstr("bad.jsonl:2"));
  }
  EXPECT_TRUE(absl::IsInvalidArgument(ReadCalibrationSource("", folder_).status()));
}

TEST_F(CalibrationText, StreamWindowsAreExactRandomAndRepeatable) {
  const CalibrationSource source{.name = "x", .documents = {Numbers(0, 500), Numbers(500, 1000)}};
  const WindowOptions options{.samples = 20, .window_tokens = 40};
  const auto windows = CutWindows(source, Words, options);
  ASSERT_TRUE(windows.ok()) << windows.status();
  ASSERT_THAT(windows->tokens, SizeIs(20));
  std::set<int32_t> starts;
  for (const auto& window : windows->tokens) {
    ASSERT_THAT(window, SizeIs(40));
    for (int i = 0; i < 40; ++i) EXPECT_EQ(window[i], window[0] + i);
    starts.insert(window[0]);
  }
  EXPECT_GT(starts.size(), 15u);
  EXPECT_EQ(windows->notice, "");
  EXPECT_EQ(CutWindows(source, Words, options)->tokens, windows->tokens);
  EXPECT_NE(CutWindows(source, Words, {.samples = 20, .window_tokens = 40, .seed = 1})->tokens, windows->tokens);
}

TEST_F(CalibrationText, ShortTextsOverlapAndSaySoOrAreRefused) {
  const CalibrationSource source{.name = "x", .documents = {Numbers(0, 10)}};
  const auto whole = CutWindows(source, Words, {.samples = 3, .window_tokens = 10});
  ASSERT_TRUE(whole.ok());
  EXPECT_THAT(whole->notice, HasSubstr("overlap"));
  for (const auto& window : whole->tokens) EXPECT_EQ(window.front(), 0);
  EXPECT_TRUE(absl::IsInvalidArgument(CutWindows(source, Words, {.samples = 1, .window_tokens = 11}).status()));
}

TEST_F(CalibrationText, DocumentWindowsStayWithinOneDocument) {
  CalibrationSource source{
      .name = "c4", .rule = SamplingRule::kDocuments, .documents = {Numbers(0, 5), Numbers(100, 130)}};
  const auto windows = CutWindows(source, Words, {.samples = 8, .window_tokens = 20});
  ASSERT_TRUE(windows.ok());
  for (const auto& window : windows->tokens) {
    EXPECT_GE(window.front(), 100);
    EXPECT_LT(window.back(), 130);
  }
  EXPECT_THAT(windows->notice, HasSubstr("8 windows come from 1 documents"));
  EXPECT_EQ(CutWindows(source, Words, {.samples = 1, .window_tokens = 20})->notice, "");
  EXPECT_EQ(CutWindows(source, Words, {.samples = 1, .window_tokens = 30})->tokens[0].front(), 100)
      << "exactly as long";
  const absl::Status refused = CutWindows(source, Words, {.samples = 2, .window_tokens = 31}).status();
  EXPECT_TRUE(absl::IsInvalidArgument(refused));
  EXPECT_THAT(std::string(refused.message()), HasSubstr("none of its 2 documents has the 31 tokens"));
  EXPECT_THAT(std::string(refused.message()), HasSubstr("the longest 30"));
}

TEST_F(CalibrationText, OneLongDocumentAmongThousandsIsFound) {
  CalibrationSource source{.name = "c4", .rule = SamplingRule::kDocuments};
  for (int i = 0; i < 3000; ++i) source.documents.push_back(i == 1234 ? Numbers(0, 20) : "7 8 9");
  const auto windows = CutWindows(source, Words, {.samples = 3, .window_tokens = 20});
  ASSERT_TRUE(windows.ok()) << windows.status();
  EXPECT_THAT(windows->tokens, SizeIs(3));
}

TEST_F(CalibrationText, EveryLongDocumentIsEquallyLikely) {
  CalibrationSource source{.name = "c4", .rule = SamplingRule::kDocuments};
  for (int i = 0; i < 40; ++i) source.documents.push_back(i % 4 == 0 ? Numbers(100 * i, 100 * i + 30) : "1 2");
  const auto windows = CutWindows(source, Words, {.samples = 2000, .window_tokens = 30});
  ASSERT_TRUE(windows.ok()) << windows.status();
  std::map<int32_t, int> drawn;
  for (const auto& window : windows->tokens) ++drawn[window.front() / 100];
  EXPECT_THAT(drawn, SizeIs(10));
  for (const auto& [document, times] : drawn) EXPECT_NEAR(times, 200, 70) << document;  // five standard deviations
}

TEST_F(CalibrationText, BlocksJoinShortDocumentsOnly) {
  const CalibrationSource source{.name = "pileval",
                                 .rule = SamplingRule::kBlocks,
                                 .documents = {Numbers(0, 600), Numbers(0, 30), Numbers(30, 60)}};
  const auto windows = CutWindows(source, Words, {.samples = 4, .window_tokens = 25});
  ASSERT_TRUE(windows.ok());
  EXPECT_THAT(windows->tokens, SizeIs(2));
  EXPECT_THAT(windows->notice, HasSubstr("fewer than the 4"));
  EXPECT_EQ(CutWindows(source, Words, {.samples = 4, .window_tokens = 25})->tokens, windows->tokens);
  const absl::Status refused = CutWindows(source, Words, {.samples = 4, .window_tokens = 61}).status();
  EXPECT_TRUE(absl::IsInvalidArgument(refused));
  EXPECT_THAT(std::string(refused.message()), HasSubstr("join to 60 tokens, fewer than one window of 61"));
  for (const auto& window : windows->tokens)
    for (const int32_t token : window) EXPECT_LT(token, 60);
}

TEST(VocabularyWindows, HoldEveryTokenBehindThePrefix) {
  const auto windows = VocabularyWindows(100, {1, 7}, {.window_tokens = 32, .seed = 3});
  ASSERT_THAT(windows, ::testing::AllOf(SizeIs(4), ::testing::Each(SizeIs(32))));
  std::vector<int32_t> seen;
  for (const auto& window : windows) {
    EXPECT_EQ(window[0], 1);
    EXPECT_EQ(window[1], 7);
    seen.insert(seen.end(), window.begin() + 2, window.end());
  }
  seen.resize(100);  // the last one was filled up
  EXPECT_FALSE(absl::c_is_sorted(seen));
  absl::c_sort(seen);
  for (int32_t token = 0; token < 100; ++token) EXPECT_EQ(seen[token], token);
  EXPECT_EQ(VocabularyWindows(100, {1, 7}, {.window_tokens = 32, .seed = 3}), windows);
  EXPECT_NE(VocabularyWindows(100, {1, 7}, {.window_tokens = 32, .seed = 4}), windows);
}

// The public texts, a byte a token.
TEST(CalibrationData, EveryCorpusGivesExactWindows) {
  const std::string folder = testing::TestData("calibration");
  if (folder.empty()) GTEST_SKIP() << "no test data";
  const Encode bytes = [](const std::string& text) -> absl::StatusOr<std::vector<int32_t>> {
    return std::vector<int32_t>(text.begin(), text.end());
  };
  for (const char* name : {"ptb", "wikitext2", "c4"}) {
    const auto source = ReadCalibrationSource(name, folder);
    ASSERT_TRUE(source.ok()) << source.status();
    const auto windows = CutWindows(*source, bytes, {.samples = 128, .window_tokens = 2048});
    ASSERT_TRUE(windows.ok()) << windows.status();
    EXPECT_THAT(windows->tokens, ::testing::AllOf(SizeIs(128), ::testing::Each(SizeIs(2048)))) << name;
    EXPECT_TRUE(absl::IsInvalidArgument(CutWindows(*source, bytes, {.window_tokens = 1 << 24}).status())) << name;
  }
  const auto c4 = ReadCalibrationSource("c4", folder);
  const auto windows = CutWindows(*c4, bytes, {.samples = 16, .window_tokens = 4096});
  ASSERT_TRUE(windows.ok()) << windows.status();
  for (const auto& window : windows->tokens) {
    const std::string text(window.begin(), window.end());
    EXPECT_TRUE(absl::c_any_of(c4->documents, [&](const std::string& d) { return absl::StrContains(d, text); }));
  }
}

}  // namespace
}  // namespace rankwise::launch
