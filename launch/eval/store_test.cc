#include "launch/eval/store.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <thread>

#include "absl/strings/str_cat.h"

namespace rankwise::eval {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;

class Store : public ::testing::Test {
 protected:
  void TearDown() override { std::filesystem::remove_all(folder_); }
  absl::StatusOr<std::unique_ptr<AnswerStore>> Open(const json& header) const {
    return AnswerStore::Open(path_, header);
  }
  std::string Contents() const {
    std::ifstream file(path_);
    return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  }
  void Write(const std::string& text) const { std::ofstream(path_) << text; }

  const std::string folder_ = ::testing::TempDir() + absl::StrCat("/rankwise-eval-store-", getpid());
  const std::string path_ = folder_ + "/f16/nq.jsonl";
  const json header_ = {{"kv_format", "f16"}, {"task", "nq"}};
};

TEST_F(Store, FindsAgainWhatWasWritten) {
  {
    const auto store = Open(header_);
    ASSERT_TRUE(store.ok()) << store.status();
    EXPECT_EQ((*store)->Find("1"), nullptr);
    ASSERT_TRUE((*store)->Append("1", {{"logprobs", {-1.25, -0.1}}}).ok());
    EXPECT_EQ((*store)->Find("1")->at("logprobs")[1], -0.1);
  }
  const auto store = Open(header_);
  ASSERT_TRUE(store.ok()) << store.status();
  ASSERT_NE((*store)->Find("1"), nullptr);
  EXPECT_EQ((*store)->Find("1")->at("logprobs"), json({-1.25, -0.1}));
  EXPECT_EQ((*store)->Find("2"), nullptr);
}

// Whatever byte a crash stops at, what was whole is kept and the file goes on as if the crash had not been.
TEST_F(Store, ATornLastLineIsCutOffAtEveryByte) {
  { ASSERT_TRUE(Open(header_).value()->Append("1", {{"text", "one\n"}}).ok()); }
  const std::string one = Contents();
  { ASSERT_TRUE(Open(header_).value()->Append("2", {{"text", "zwei ü"}}).ok()); }
  const std::string two = Contents();
  for (size_t size = 0; size < two.size(); ++size) {
    Write(two.substr(0, size));
    const auto store = Open(header_);
    ASSERT_TRUE(store.ok()) << size << ": " << store.status();
    EXPECT_EQ((*store)->Find("1") != nullptr, size >= one.size()) << size;
    EXPECT_EQ((*store)->Find("2"), nullptr) << size;
    if ((*store)->Find("1") == nullptr) {
      ASSERT_TRUE((*store)->Append("1", {{"text", "one\n"}}).ok());
    }
    ASSERT_TRUE((*store)->Append("2", {{"text", "zwei ü"}}).ok());
    EXPECT_EQ(Contents(), two) << size;
  }
}

TEST_F(Store, AnotherRunIsRefusedAndNamed) {
  { ASSERT_TRUE(Open(header_).value()->Append("1", {{"text", "a"}}).ok()); }
  const std::string before = Contents();
  json other = header_;
  other["kv_format"] = "int8";
  other["shots"] = 4;
  const absl::Status status = Open(other).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()), HasSubstr("kv_format is \"f16\", not \"int8\"; shots is null, not 4"));
  EXPECT_EQ(Contents(), before);
}

TEST_F(Store, LinesThatDoNotBelongAreRefused) {
  { ASSERT_TRUE(Open(header_).value()->Append("1", {{"text", "a"}}).ok()); }
  const std::string good = Contents();
  const std::string line = good.substr(good.find('\n') + 1);
  for (const auto& [extra, what] : std::vector<std::pair<std::string, std::string>>{
           {line, ":3: answers \"1\" again"},
           {"{\"id\":\"2\",\"run\":\"0123456789abcdef\"}\n", ":3: is of another run"},
           {"{\"id\":\"2\"}\n", ":3: is of another run"},
           {"{\"id\":2,\"run\":\"\"}\n", ":3: has no \"id\""},
           {"{\"id\":\"2\"\n", ":3: is no JSON object"},
           {"[]\n", ":3: is no JSON object"},
           {"\n", ":3: is no JSON object"},
           {std::string("\0\0\0\n", 4), ":3: is no JSON object"},
           {"\xFF\n", ":3: is no JSON object"}}) {
    Write(good + extra);
    const absl::Status status = Open(header_).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << extra;
    EXPECT_THAT(std::string(status.message()), HasSubstr(what)) << extra;
    EXPECT_EQ(Contents(), good + extra) << "a refused file is left as it is";
  }
}

TEST_F(Store, OneAtATime) {
  const auto first = Open(header_);
  ASSERT_TRUE(first.ok());
  EXPECT_THAT(std::string(Open(header_).status().message()), HasSubstr("another process is writing it"));
}

TEST_F(Store, ThreadsDoNotMixTheirLines) {
  constexpr int kThreads = 4, kEach = 100;
  {
    const auto store = Open(header_);
    std::vector<std::thread> threads;
    for (int t = 0; t < kThreads; ++t) {
      threads.emplace_back([&, t] {
        for (int i = 0; i < kEach; ++i)
          ASSERT_TRUE((*store)->Append(absl::StrCat(t, "/", i), {{"text", std::string(1000, 'x')}}).ok());
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
  const auto store = Open(header_);
  ASSERT_TRUE(store.ok()) << store.status();
  for (int t = 0; t < kThreads; ++t) {
    for (int i = 0; i < kEach; ++i) EXPECT_NE((*store)->Find(absl::StrCat(t, "/", i)), nullptr);
  }
}

}  // namespace
}  // namespace rankwise::eval
