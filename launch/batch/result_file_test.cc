#include "launch/batch/result_file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <unistd.h>

#include <csignal>
#include <filesystem>
#include <fstream>
#include <set>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/mapped_file.h"

namespace rankwise::batch {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

class ResultFileTest : public ::testing::Test {
 protected:
  void SetUp() override { std::filesystem::remove(path_); }
  void Write(const std::string& text) { std::ofstream(path_, std::ios::binary) << text; }
  std::string Read() { return ReadTextFile(path_).value(); }
  std::unique_ptr<ResultFile> Open() {
    found_.clear();
    auto file = ResultFile::Open(path_, [this](std::string_view line) {
      found_.emplace_back(line);
      return absl::OkStatus();
    });
    EXPECT_TRUE(file.ok()) << file.status();
    return *std::move(file);
  }
  const std::string path_ = absl::StrCat(::testing::TempDir(), "/",
                                         ::testing::UnitTest::GetInstance()->current_test_info()->name(), ".jsonl");
  std::vector<std::string> found_;
};

TEST_F(ResultFileTest, CutsATornLastLineAtEveryByte) {
  const std::string whole = "{\"a\": 1}\n{\"b\": 2}\n", torn = "{\"c\": 3}";
  for (size_t size = 0; size <= torn.size(); ++size) {
    Write(whole + torn.substr(0, size));
    const auto file = Open();
    EXPECT_THAT(found_, ElementsAre("{\"a\": 1}", "{\"b\": 2}"));
    EXPECT_EQ(Read(), whole);
    ASSERT_TRUE(file->Append("{\"d\": 4}").ok());
    EXPECT_EQ(Read(), whole + "{\"d\": 4}\n");
  }
}

TEST_F(ResultFileTest, ALineThatIsRefusedIsNamed) {
  Write("good\nbad\n");
  const auto file = ResultFile::Open(path_, [](std::string_view line) {
    return line == "bad" ? absl::InvalidArgumentError("is bad") : absl::OkStatus();
  });
  EXPECT_THAT(std::string(file.status().message()), HasSubstr(".jsonl:2: is bad"));
}

TEST_F(ResultFileTest, ThreadsShareTheirSyncs) {
  const auto file = Open();
  constexpr int kThreads = 16, kLines = 50;
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t)
    threads.emplace_back([&, t] {
      for (int i = 0; i < kLines; ++i) EXPECT_TRUE(file->Append(absl::StrCat(t, " ", i)).ok());
    });
  for (std::thread& thread : threads) thread.join();
  Open();
  std::set<std::string> lines(found_.begin(), found_.end());
  EXPECT_EQ(found_.size(), size_t{kThreads * kLines});
  EXPECT_EQ(lines.size(), size_t{kThreads * kLines});
  EXPECT_LT(file->syncs(), kThreads * kLines);
}

// A disk that is full, as the kernel can play it: no file may grow beyond a limit.
TEST_F(ResultFileTest, AFullDiskLeavesWholeLinesAndStopsAll) {
  const auto file = Open();
  ASSERT_TRUE(file->Append("first").ok());
  rlimit before{};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
  std::signal(SIGXFSZ, SIG_IGN);
  const rlimit small{10, before.rlim_max};
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
  const absl::Status status = file->Append("second, too long");
  setrlimit(RLIMIT_FSIZE, &before);
  EXPECT_FALSE(status.ok());
  EXPECT_THAT(std::string(status.message()), HasSubstr(path_));
  EXPECT_EQ(Read(), "first\n");
  EXPECT_FALSE(file->Append("x").ok());
  EXPECT_EQ(Read(), "first\n");
}

TEST_F(ResultFileTest, OneRunAtATimeAndItsNameIsTold) {
  auto first = FileLock::Take(path_, absl::ZeroDuration());
  ASSERT_TRUE(first.ok()) << first.status();
  const auto second = FileLock::Take(path_, absl::Milliseconds(60));
  EXPECT_TRUE(absl::IsFailedPrecondition(second.status()));
  EXPECT_THAT(std::string(second.status().message()), HasSubstr(absl::StrCat("process ", getpid())));
  first->reset();
  EXPECT_FALSE(std::filesystem::exists(path_ + ".lock"));
  EXPECT_TRUE(FileLock::Take(path_, absl::ZeroDuration()).ok());
}

TEST_F(ResultFileTest, ALockIsWaitedFor) {
  auto first = FileLock::Take(path_, absl::ZeroDuration());
  ASSERT_TRUE(first.ok());
  absl::StatusOr<std::unique_ptr<FileLock>> second = absl::UnknownError("");
  std::thread waiting([&] { second = FileLock::Take(path_, absl::Seconds(20)); });
  first->reset();
  waiting.join();
  EXPECT_TRUE(second.ok()) << second.status();
}

TEST_F(ResultFileTest, TheLockOfADeadRunHoldsNobodyUp) {
  std::ofstream(path_ + ".lock") << "host x, process 1\n";
  EXPECT_TRUE(FileLock::Take(path_, absl::ZeroDuration()).ok());
}

}  // namespace
}  // namespace rankwise::batch
