#include "coordinator/journal/journal.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <filesystem>
#include <fstream>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"

namespace rankwise::journal {
namespace {

using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;
using worker::v1::SequenceOutput;

class JournalTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = ::testing::TempDir() + "/journal-XXXXXX";
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    folder_ = pattern + "/in/two";
    root_ = pattern;
  }
  void TearDown() override { std::filesystem::remove_all(root_); }

  std::unique_ptr<Journal> Open(bool syncs = false) {
    auto journal = Journal::Open({.folder = folder_, .syncs = syncs, .interval = absl::Milliseconds(1)});
    EXPECT_TRUE(journal.ok()) << journal.status();
    return journal.ok() ? *std::move(journal) : nullptr;
  }

  std::string root_, folder_;
};

JournaledRequest MakeRequest(const std::string& id, uint32_t n = 1) {
  JournaledRequest request{.numerics = "f", .accepted = absl::FromUnixSeconds(1000)};
  request.request.set_request_id(id);
  request.request.set_text(absl::StrCat("prompt of ", id));
  request.request.set_n(n);
  request.request.mutable_sampling()->set_seed(7);
  return request;
}

SequenceOutput Token(int32_t id, bool finished = false) {
  SequenceOutput output;
  output.add_tokens()->set_id(id);
  output.set_finished(finished);
  if (finished) output.set_reason(rankwise::v1::FINISH_REASON_LENGTH);
  return output;
}

TEST_F(JournalTest, WhatWasAcceptedAndDeliveredComesBackInOrder) {
  {
    auto journal = Open();
    EXPECT_THAT(journal->TakeRecovered(), IsEmpty());
    JournaledRequest timed = MakeRequest("b", 2);
    timed.deadline = absl::FromUnixSeconds(2000);
    ASSERT_TRUE(journal->Accept(timed).ok());
    ASSERT_TRUE(journal->Accept(MakeRequest("a")).ok());
    for (int token = 0; token < 5; ++token) {
      journal->Append("b", 1, Token(token, token == 4));
      absl::SleepFor(absl::Milliseconds(2));  // over several commits
    }
    journal->Append("a", 0, Token(9));
    journal->Append("unknown", 0, Token(9));
  }
  auto journal = Open();
  const auto recovered = journal->TakeRecovered();
  ASSERT_THAT(recovered, SizeIs(2));
  EXPECT_EQ(recovered[0].request.text(), "prompt of b");
  EXPECT_EQ(recovered[0].numerics, "f");
  EXPECT_EQ(recovered[0].deadline, absl::FromUnixSeconds(2000));
  EXPECT_EQ(recovered[0].accepted, absl::FromUnixSeconds(1000));
  ASSERT_THAT(recovered[0].samples, SizeIs(2));
  EXPECT_THAT(recovered[0].samples[0].tokens(), IsEmpty());
  ASSERT_THAT(recovered[0].samples[1].tokens(), SizeIs(5));
  for (int token = 0; token < 5; ++token) EXPECT_EQ(recovered[0].samples[1].tokens(token).id(), token);
  EXPECT_TRUE(recovered[0].samples[1].finished());
  EXPECT_EQ(recovered[1].deadline, absl::InfiniteFuture());
  EXPECT_EQ(recovered[1].samples[0].tokens(0).id(), 9);
  EXPECT_FALSE(recovered[1].samples[0].finished());
}

TEST_F(JournalTest, WhatWasForgottenIsGoneAndItsIdFree) {
  {
    auto journal = Open();
    ASSERT_TRUE(journal->Accept(MakeRequest("a")).ok());
    journal->Append("a", 0, Token(1));
    journal->Forget("a");
    journal->Append("a", 0, Token(2));
    ASSERT_TRUE(journal->Accept(MakeRequest("a")).ok());
    journal->Append("a", 0, Token(3));
    ASSERT_TRUE(journal->Accept(MakeRequest("b")).ok());
    journal->Forget("b");
  }
  const auto recovered = Open()->TakeRecovered();
  ASSERT_THAT(recovered, SizeIs(1));
  ASSERT_THAT(recovered[0].samples[0].tokens(), SizeIs(1));
  EXPECT_EQ(recovered[0].samples[0].tokens(0).id(), 3);
}

TEST_F(JournalTest, AClosedJournalKeepsWhatItHas) {
  {
    auto journal = Open();
    ASSERT_TRUE(journal->Accept(MakeRequest("a")).ok());
    journal->Close();
    journal->Forget("a");
    EXPECT_FALSE(journal->Accept(MakeRequest("b")).ok());
  }
  EXPECT_THAT(Open()->TakeRecovered(), SizeIs(1));
}

// The log may not grow for a while, as on a full disk.
TEST_F(JournalTest, TokensThatCouldNotBeWrittenAreWrittenLater) {
  {
    auto journal = Open();
    ASSERT_TRUE(journal->Accept(MakeRequest("a")).ok());
    rlimit before;
    ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
    const auto handler = signal(SIGXFSZ, SIG_IGN);
    const rlimit small{.rlim_cur = 1, .rlim_max = before.rlim_max};
    ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
    journal->Append("a", 0, Token(0));
    absl::SleepFor(absl::Milliseconds(50));
    EXPECT_FALSE(journal->Accept(MakeRequest("refused")).ok());
    ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &before), 0);
    signal(SIGXFSZ, handler);
    journal->Append("a", 0, Token(1, true));
  }
  const auto recovered = Open()->TakeRecovered();
  ASSERT_THAT(recovered, SizeIs(1));
  ASSERT_THAT(recovered[0].samples[0].tokens(), SizeIs(2));
  EXPECT_EQ(recovered[0].samples[0].tokens(0).id(), 0);
  EXPECT_EQ(recovered[0].samples[0].tokens(1).id(), 1);
  EXPECT_TRUE(recovered[0].samples[0].finished());
}

// The child is killed with requests accepted and tokens on their way. It tells of each acceptance only afterwards.
TEST_F(JournalTest, AKilledProcessLosesNoAcceptedRequest) {
  for (const bool syncs : {false, true}) {
    int ends[2];
    ASSERT_EQ(pipe(ends), 0);
    const pid_t child = fork();
    if (child == 0) {
      auto journal = Journal::Open({.folder = folder_, .syncs = syncs});
      if (!journal.ok()) _exit(1);
      for (int32_t i = 0;; ++i) {
        const std::string id = absl::StrCat(syncs, "-", i);
        if (!(*journal)->Accept(MakeRequest(id)).ok()) _exit(1);
        for (int32_t token = 0; token < 100; ++token) (*journal)->Append(id, 0, Token(token));
        if (write(ends[1], &i, sizeof i) != sizeof i) _exit(1);
      }
    }
    close(ends[1]);
    int32_t told = 0;
    while (told < 20 && read(ends[0], &told, sizeof told) == sizeof told) continue;
    kill(child, SIGKILL);
    while (read(ends[0], &told, sizeof told) == sizeof told) continue;
    close(ends[0]);
    waitpid(child, nullptr, 0);
    ASSERT_GE(told, 20);
    auto journal = Open();
    ASSERT_NE(journal, nullptr);
    const auto recovered = journal->TakeRecovered();
    EXPECT_GE(recovered.size(), static_cast<size_t>(told) + 1);
    for (const auto& request : recovered) {
      const auto& tokens = request.samples[0].tokens();
      for (int token = 0; token < tokens.size(); ++token) EXPECT_EQ(tokens[token].id(), token);
      journal->Forget(request.request.request_id());
    }
  }
}

TEST_F(JournalTest, IsOfOneProcessAndPrivate) {
  auto journal = Open();
  const auto second = Journal::Open({.folder = folder_});
  EXPECT_TRUE(absl::IsFailedPrecondition(second.status())) << second.status();
  EXPECT_THAT(std::string(second.status().message()), HasSubstr("another coordinator"));
  for (const auto& entry : std::filesystem::directory_iterator(folder_)) {
    struct stat info {};
    ASSERT_EQ(stat(entry.path().c_str(), &info), 0);
    EXPECT_EQ(info.st_mode & 077, 0u) << entry.path();
  }
}

TEST_F(JournalTest, RefusesWhatIsNoJournal) {
  std::filesystem::create_directories(folder_);
  std::ofstream(folder_ + "/journal.sqlite") << std::string(8192, 'x');
  const auto journal = Journal::Open({.folder = folder_});
  EXPECT_TRUE(absl::IsFailedPrecondition(journal.status())) << journal.status();
  const auto nowhere = Journal::Open({.folder = "/dev/null/x"});
  EXPECT_TRUE(absl::IsUnavailable(nowhere.status())) << nowhere.status();
}

}  // namespace
}  // namespace rankwise::journal
