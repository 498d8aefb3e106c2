#include "launch/arrivals.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>

namespace rankwise::launch {
namespace {

using ::testing::HasSubstr;
using ::testing::SizeIs;

std::string Write(const std::string& name, const std::string& text) {
  const std::string path = ::testing::TempDir() + name;
  std::ofstream(path) << text;
  return path;
}

TEST(ArrivalsTest, ReadsAzuresLinesAndDividesLengths) {
  const auto trace = ReadTrace(Write("trace.csv",
                                     "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
                                     "2023-11-16 18:17:03.9799600,4808,10\r\n2023-11-16 18:17:04.4799600,3,8\r\n"),
                               8);
  ASSERT_TRUE(trace.ok()) << trace.status();
  ASSERT_THAT(*trace, SizeIs(2));
  EXPECT_EQ((*trace)[0].at, absl::ZeroDuration());
  EXPECT_EQ((*trace)[0].prompt_tokens, 601);
  EXPECT_EQ((*trace)[0].output_tokens, 1);
  EXPECT_EQ((*trace)[1].at, absl::Milliseconds(500));
  EXPECT_EQ((*trace)[1].prompt_tokens, 1);
}

TEST(ArrivalsTest, ReadsMooncakesLinesInOrderOfTime) {
  const auto trace =
      ReadTrace(Write("trace.jsonl",
                      "{\"timestamp\": 90, \"input_length\": 7, \"output_length\": 2}\n"
                      "{\"timestamp\": 40, \"input_length\": 700, \"output_length\": 5, \"hash_ids\": [0, 1]}\n"),
                1);
  ASSERT_TRUE(trace.ok()) << trace.status();
  ASSERT_THAT(*trace, SizeIs(2));
  EXPECT_EQ((*trace)[0].prompt_tokens, 700);
  EXPECT_EQ((*trace)[0].output_tokens, 5);
  EXPECT_EQ((*trace)[1].at, absl::Milliseconds(50));
}

TEST(ArrivalsTest, RefusalsNameTheLine) {
  EXPECT_TRUE(absl::IsNotFound(ReadTrace(::testing::TempDir() + "none.csv", 1).status()));
  for (const std::string bad :
       {"nonsense", "2023-11-16 18:17:03,1", "2023-11-16 18:17:03,1,99999999999", "2023-11-16 18:17:03,-1,1"}) {
    const absl::Status status = ReadTrace(Write("bad.csv", "a,b,c\n" + bad + "\n"), 1).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << bad;
    EXPECT_THAT(std::string(status.message()), HasSubstr("line 2")) << bad;
  }
  for (const std::string bad : {"[]", "{", R"({"timestamp": "1", "input_length": 1, "output_length": 1})",
                                R"({"timestamp": 1, "input_length": 1})"}) {
    EXPECT_TRUE(absl::IsInvalidArgument(ReadTrace(Write("bad.jsonl", bad + "\n"), 1).status())) << bad;
  }
}

}  // namespace
}  // namespace rankwise::launch
