#include "launch/child_process.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <csignal>
#include <filesystem>
#include <fstream>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "base/mapped_file.h"

namespace rankwise::launch {
namespace {

using ::testing::HasSubstr;

absl::Time Soon() { return absl::Now() + absl::Seconds(20); }

std::unique_ptr<ChildProcess> Shell(const std::string& script, const std::string& log = "") {
  auto child =
      ChildProcess::Start({.command = {"sh", "-c", script}, .environment = {"GREETING=hello"}, .log_path = log});
  EXPECT_TRUE(child.ok()) << child.status();
  return *std::move(child);
}

TEST(ChildProcess, ReportsExitCodesAndSignals) {
  EXPECT_EQ(Shell("exit 3")->Wait(Soon())->code, 3);
  const auto child = Shell("sleep 100");
  EXPECT_FALSE(child->Wait(absl::Now() + absl::Milliseconds(1)));
  child->Signal(SIGKILL);
  EXPECT_EQ(child->Wait(Soon())->signal, SIGKILL);
  EXPECT_THAT(child->Wait(Soon())->ToString(), HasSubstr("signal 9"));
}

TEST(ChildProcess, AProgramThatIsNotThereIsAnErrorOfStart) {
  EXPECT_TRUE(absl::IsNotFound(ChildProcess::Start({.command = {"/no/such/program"}}).status()));
  EXPECT_TRUE(absl::IsNotFound(ChildProcess::Start({.command = {"no-such-program"}}).status()));
}

TEST(ChildProcess, WritesItsLogAndSeesItsEnvironment) {
  auto folder = PrivateFolder::Create(TemporaryParent());
  ASSERT_TRUE(folder.ok());
  const std::string log = absl::StrCat(folder->path(), "/log");
  const auto child = Shell("for i in 1 2 3; do echo $GREETING $i; done; echo oops >&2", log);
  ASSERT_TRUE(child->Wait(Soon()));
  EXPECT_EQ(child->LogTail(), "hello 1\nhello 2\nhello 3\noops");
  EXPECT_EQ(child->LogTail(2), "hello 3\noops");
}

TEST(ChildProcess, TheDestructorKillsTheWholeGroup) {
  auto folder = PrivateFolder::Create(TemporaryParent());
  ASSERT_TRUE(folder.ok());
  const std::string path = absl::StrCat(folder->path(), "/pid");
  auto child = Shell(absl::StrCat("sleep 100 & echo $! > ", path, ".new; mv ", path, ".new ", path, "; wait"));
  while (!std::filesystem::exists(path)) ASSERT_FALSE(child->Wait(absl::Now() + absl::Milliseconds(5)));
  int grandchild = 0;
  ASSERT_TRUE(absl::SimpleAtoi(*ReadTextFile(path), &grandchild));
  AdoptOrphans();
  child.reset();
  KillOrphans();  // reaps it
  EXPECT_EQ(kill(grandchild, 0), -1);
}

TEST(KillOrphans, FindsWhatLostItsParentAndSparesTheOwned) {
  AdoptOrphans();
  const auto known = Shell("sleep 100");
  // The middle process ends at once: its background child becomes ours.
  const auto middle = Shell("sleep 100 & exit 0");
  ASSERT_TRUE(middle->Wait(Soon()));
  EXPECT_EQ(KillOrphans(), 1);
  EXPECT_FALSE(known->Wait(absl::InfinitePast()));
}

TEST(PrivateFolder, IsPrivateAndRemoved) {
  std::string path;
  {
    auto folder = PrivateFolder::Create(TemporaryParent());
    ASSERT_TRUE(folder.ok());
    path = folder->path();
    struct stat info {};
    ASSERT_EQ(stat(path.c_str(), &info), 0);
    EXPECT_EQ(info.st_mode & 0777, 0700);
    std::ofstream(path + "/file") << "x";
  }
  EXPECT_FALSE(std::filesystem::exists(path));
}

}  // namespace
}  // namespace rankwise::launch
