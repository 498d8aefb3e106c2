#include "launch/batch/join.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "absl/strings/str_cat.h"
#include "base/mapped_file.h"
#include "launch/batch/question.h"

namespace rankwise::batch {
namespace {

using ::testing::HasSubstr;

class JoinTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::filesystem::remove_all(folder_);
    std::filesystem::create_directories(folder_);
    std::string text;
    for (int i = 0; i < 5; ++i)
      absl::StrAppend(&text, i == 3 ? "bad" : absl::StrCat("{\"custom_id\": \"", i, "\"}"), "\n");
    std::ofstream(folder_ + "/in.jsonl") << text;
    auto input = Input::Open(folder_ + "/in.jsonl");
    ASSERT_TRUE(input.ok()) << input.status();
    input_.emplace(*std::move(input));
  }
  std::string Result(int i) {
    const Input::Line& line = input_->lines()[i];
    const std::string id = ResultId(input_->text(line));
    return i == 3 ? UnreadableLine("", id, line.number, absl::InvalidArgumentError("is bad"))
                  : RefusedLine(line.custom_id, id, absl::InvalidArgumentError("no"));
  }
  void Write(int shard, const std::vector<std::string>& lines, const std::string& torn = "") {
    std::ofstream file(absl::StrCat(folder_, "/out.", shard, "-of-2.jsonl"));
    for (const std::string& line : lines) file << line << "\n";
    file << torn;
  }
  absl::StatusOr<Results> Join() { return JoinShards(*input_, folder_ + "/out.jsonl", 2); }

  const std::string folder_ =
      absl::StrCat(::testing::TempDir(), "/join-", ::testing::UnitTest::GetInstance()->current_test_info()->name());
  std::optional<Input> input_;
};

TEST_F(JoinTest, PutsResultsInTheOrderOfTheInput) {
  Write(0, {Result(4), Result(0), Result(2)}, "{\"torn");
  Write(1, {Result(3), Result(1)});
  const auto joined = Join();
  ASSERT_TRUE(joined.ok()) << joined.status();
  EXPECT_EQ(joined->errors, 5u);
  std::string expected;
  for (int i = 0; i < 5; ++i) absl::StrAppend(&expected, Result(i), "\n");
  EXPECT_EQ(ReadTextFile(folder_ + "/out.jsonl").value(), expected);
}

TEST_F(JoinTest, WritesNothingWhileLinesAreMissing) {
  Write(0, {Result(4), Result(0)});
  EXPECT_TRUE(absl::IsNotFound(Join().status()));
  Write(1, {Result(3), Result(1)});
  EXPECT_TRUE(absl::IsUnavailable(Join().status()));
  EXPECT_THAT(std::string(Join().status().message()), HasSubstr("1 of 5"));
  EXPECT_FALSE(std::filesystem::exists(folder_ + "/out.jsonl"));
}

TEST_F(JoinTest, RefusesAResultTwice) {
  Write(0, {Result(4), Result(0), Result(2)});
  Write(1, {Result(3), Result(1), Result(2)});
  EXPECT_THAT(std::string(Join().status().message()), HasSubstr("custom_id \"2\" again"));
}

TEST_F(JoinTest, RefusesTheResultOfAnotherQuestion) {
  Results results{.lines = std::vector<std::string>(5)};
  EXPECT_TRUE(
      absl::IsFailedPrecondition(AddResult(*input_, RefusedLine("9", "i", absl::InvalidArgumentError("no")), results)));
  EXPECT_THAT(std::string(AddResult(*input_, RefusedLine("1", "i", absl::InvalidArgumentError("")), results).message()),
              HasSubstr("asked something else"));
  EXPECT_EQ(results.missing(), 5u);
}

TEST_F(JoinTest, RefusesTheAnswersOfTwoModels) {
  Results results{.lines = std::vector<std::string>(5)};
  const auto answered = [&](int i, const std::string& fingerprint) {
    const Input::Line& line = input_->lines()[i];
    Question question;
    question.custom_id = line.custom_id;
    return AddResult(*input_, Answer().ToLine(question, ResultId(input_->text(line)), {"m", fingerprint}), results);
  };
  EXPECT_TRUE(answered(0, "f").ok());
  EXPECT_TRUE(answered(1, "f").ok());
  EXPECT_THAT(std::string(answered(2, "g").message()), HasSubstr("not one model"));
}

}  // namespace
}  // namespace rankwise::batch
