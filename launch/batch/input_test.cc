#include "launch/batch/input.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <map>
#include <string>

namespace rankwise::batch {
namespace {

using ::testing::HasSubstr;

std::string Write(const std::string& text) {
  const std::string path = ::testing::TempDir() + "/batch_input.jsonl";
  std::ofstream(path, std::ios::binary) << text;
  return path;
}

TEST(Input, KeepsNumbersAndIds) {
  const auto input = Input::Open(Write("{\"custom_id\": \"a\"}\n\n  \r\nbad\n{\"custom_id\": \"b\"}"));
  ASSERT_TRUE(input.ok()) << input.status();
  ASSERT_EQ(input->lines().size(), 3u);
  EXPECT_EQ(input->lines()[0].custom_id, "a");
  EXPECT_EQ(input->lines()[1].number, 4);
  EXPECT_EQ(input->lines()[1].custom_id, "");
  EXPECT_EQ(input->text(input->lines()[1]), "bad");
  EXPECT_EQ(input->text(input->lines()[2]), "{\"custom_id\": \"b\"}");
  EXPECT_EQ(input->Find("b", 0), &input->lines()[2]);
  EXPECT_EQ(input->Find("", 4), &input->lines()[1]);
  EXPECT_EQ(input->Find("", 5), nullptr);  // has an id, and goes by it
  EXPECT_EQ(input->Find("c", 0), nullptr);
  EXPECT_EQ(input->Find("", 99), nullptr);
}

TEST(Input, RefusesOneIdTwiceByName) {
  const auto input = Input::Open(Write("{\"custom_id\": \"a\"}\n{\"custom_id\": \"b\"}\n{\"custom_id\": \"a\"}\n"));
  EXPECT_TRUE(absl::IsInvalidArgument(input.status()));
  EXPECT_THAT(std::string(input.status().message()), HasSubstr("custom_id \"a\" is on line 1 and on line 3"));
}

TEST(Input, OfNothingHasNoLines) {
  const auto input = Input::Open(Write(""));
  ASSERT_TRUE(input.ok()) << input.status();
  EXPECT_TRUE(input->lines().empty());
}

TEST(Shards, CoverEveryLineOnce) {
  for (const int count : {1, 2, 3, 7}) {
    for (size_t line = 0; line < 20; ++line) {
      int holders = 0;
      for (int index = 0; index < count; ++index) holders += Shard{index, count}.Holds(line);
      EXPECT_EQ(holders, 1);
    }
  }
}

TEST(Shards, AreParsed) {
  EXPECT_EQ(ParseShard("3/8").value(), (Shard{3, 8}));
  for (const char* text : {"", "3", "8/8", "-1/8", "0/0", "a/b", "1/2/3"}) EXPECT_FALSE(ParseShard(text).ok()) << text;
}

TEST(Shards, NameTheirOutputs) {
  EXPECT_EQ(ShardOutput("a/b.jsonl", {3, 8}), "a/b.3-of-8.jsonl");
  EXPECT_EQ(ShardOutput("a.d/b", {3, 8}), "a.d/b.3-of-8");
  EXPECT_EQ(ShardOutput("b.jsonl", {0, 1}), "b.jsonl");
}

std::map<std::string, std::string> g_variables;
const char* Variable(const char* name) {
  const auto it = g_variables.find(name);
  return it == g_variables.end() ? nullptr : it->second.c_str();
}
auto OfArray(int id, int least, int most, int step, int count) {
  g_variables = {{"SLURM_ARRAY_TASK_ID", std::to_string(id)},
                 {"SLURM_ARRAY_TASK_MIN", std::to_string(least)},
                 {"SLURM_ARRAY_TASK_MAX", std::to_string(most)},
                 {"SLURM_ARRAY_TASK_STEP", std::to_string(step)},
                 {"SLURM_ARRAY_TASK_COUNT", std::to_string(count)}};
  return ShardFromSlurm(Variable);
}

TEST(Shards, FollowFromAJobArray) {
  g_variables.clear();
  EXPECT_EQ(ShardFromSlurm(Variable).value(), std::nullopt);
  EXPECT_EQ(OfArray(3, 0, 7, 1, 8).value(), (Shard{3, 8}));
  EXPECT_EQ(OfArray(5, 1, 9, 2, 5).value(), (Shard{2, 5}));
  EXPECT_EQ(OfArray(0, 0, 0, 1, 1).value(), (Shard{0, 1}));
  EXPECT_FALSE(OfArray(1, 1, 9, 1, 3).ok());  // 1,5,9
  EXPECT_FALSE(OfArray(3, 3, 3, 1, 1).ok());  // task 3 alone, submitted again
  g_variables.erase("SLURM_ARRAY_TASK_MAX");
  EXPECT_TRUE(absl::IsFailedPrecondition(ShardFromSlurm(Variable).status()));
}

}  // namespace
}  // namespace rankwise::batch
