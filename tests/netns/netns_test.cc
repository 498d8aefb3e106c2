// Tensor parallelism over two hosts, whose cable is pulled out. The hosts are network namespaces on this machine; the
// test itself, the coordinator and rank 0 are on the first. Skips, with the reason, where that cannot be.

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/strip.h"
#include "tests/e2e/serving.h"

namespace rankwise::e2e {
namespace {

constexpr absl::Duration kLongPatience = absl::Minutes(2);
const std::string kHosts = RANKWISE_SOURCE_DIR "/tests/netns/hosts";

class TwoHosts : public ::testing::Environment {
 public:
  void SetUp() override {
    const Output up = Shell(absl::StrCat(kHosts, " up ", name_));
    is_up_ = up.code == 0;
    why_not_ = up.text;
    if (!is_up_) return;
    setenv("RANKWISE_HOSTS", name_.c_str(), 1);
    // Before any other thread: they and all programs begin on the first host.
    const int fd = open(absl::StrCat("/run/netns/", name_, "-a").c_str(), O_RDONLY | O_CLOEXEC);
    is_up_ = fd >= 0 && setns(fd, CLONE_NEWNET) == 0;
    close(fd);
    if (!is_up_) why_not_ = "cannot enter the first host's network";
  }
  void TearDown() override { Shell(absl::StrCat(kHosts, " down ", name_)); }
  bool is_up() const { return is_up_; }
  const std::string& why_not() const { return why_not_; }
  void Cut() { EXPECT_EQ(Shell(absl::StrCat(kHosts, " cut ", name_)).code, 0); }
  void Heal() { EXPECT_EQ(Shell(absl::StrCat(kHosts, " heal ", name_)).code, 0); }

 private:
  const std::string name_ = absl::StrCat("rw", getpid());
  std::string why_not_;
  bool is_up_ = false;
};
TwoHosts& g_hosts = *static_cast<TwoHosts*>(::testing::AddGlobalTestEnvironment(new TwoHosts));

class OverTwoHosts : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!g_hosts.is_up()) GTEST_SKIP() << g_hosts.why_not();
    request_ = Sampled("Once upon a time", 200, 11);
    request_.mutable_sampling()->set_ignore_eos(true);
  }
  void Start() {
    static int count = 0;
    launch::ClusterOptions options{.model = DemoModel(), .tp = 2};
    options.mpirun = ScratchFolder() + "/mpirun";
    if (FILE* file = fopen(options.mpirun.c_str(), "w"); file != nullptr) {
      absl::FPrintF(file, "#!/bin/sh\nexec %s mpirun \"$@\"\n", kHosts);
      fclose(file);
      std::filesystem::permissions(options.mpirun, std::filesystem::perms::owner_all);
    }
    options.log_folder = absl::StrCat(ScratchFolder(), "/logs-", count++);
    std::filesystem::create_directories(options.log_folder);
    options.coordinator_flags = {"--group-timeout", "2", "--group-wait", "120"};
    options.worker_flags = {"--device", "cpu", "--threads", "1", "--kv", "f16", "--step-timeout", "2"};
    auto cluster = launch::LocalCluster::Start(options);
    ASSERT_TRUE(cluster.ok()) << cluster.status();
    cluster_ = *std::move(cluster);
  }
  void ExpectServing() {
    const absl::Status status = cluster_->WaitServing(1, absl::Now() + kLongPatience);
    ASSERT_TRUE(status.ok()) << status;
  }
  bool SuperviseUntil(const std::function<bool()>& condition, absl::Duration patience = kLongPatience) {
    return e2e::SuperviseUntil(*cluster_, condition, patience);
  }
  void ExpectTwoHostNames() {
    const auto load = Load(cluster_->stub());
    ASSERT_TRUE(load.ok() && load->groups_size() == 1 && load->groups(0).ranks_size() == 2);
    EXPECT_NE(load->groups(0).ranks(0).host(), load->groups(0).ranks(1).host());
  }
  bool IsServing() {
    const auto load = Load(cluster_->stub());
    return load.ok() && load->groups_size() > 0 && load->groups(0).serving();
  }

  GenerateRequest request_;
  std::unique_ptr<launch::LocalCluster> cluster_;
};

TEST_F(OverTwoHosts, ACableCutInDecodeCostsNoToken) {
  Start();
  ExpectServing();
  ExpectTwoHostNames();
  const Reply undisturbed = Generate(cluster_->stub(), request_, {.deadline = kLongPatience});
  ASSERT_TRUE(undisturbed.status.ok()) << undisturbed.status;
  Stream stream(cluster_->stub(), request_, {.deadline = kLongPatience});
  ASSERT_TRUE(SuperviseUntil([&] { return stream.received() >= 20; }));
  const std::vector<int64_t> pids = RankPids(cluster_->stub());
  ASSERT_EQ(pids.size(), 2u);
  g_hosts.Cut();
  const absl::Time cut = absl::Now();
  ASSERT_TRUE(SuperviseUntil([&] { return !IsServing(); }));
  const absl::Duration detected = absl::Now() - cut;
  EXPECT_LT(detected, absl::Seconds(10));
  // Both sides end by themselves, also the one that nobody can reach.
  ASSERT_TRUE(SuperviseUntil([&] { return !IsRunning(pids[0]) && !IsRunning(pids[1]); }, absl::Seconds(60)));
  const absl::Duration ended = absl::Now() - cut;
  EXPECT_FALSE(stream.is_finished());
  g_hosts.Heal();
  const absl::Time healed = absl::Now();
  ASSERT_TRUE(SuperviseUntil([&] { return stream.is_finished(); }));
  const Reply reply = stream.Join();
  EXPECT_TRUE(reply.status.ok()) << reply.status;
  EXPECT_FALSE(reply.has_gap);
  EXPECT_EQ(reply.ids, undisturbed.ids);
  EXPECT_EQ(reply.text, undisturbed.text);
  ASSERT_TRUE(reply.finish);
  EXPECT_GE(reply.finish->replays(), 1u);
  absl::PrintF("detected after %s, ranks gone after %s, stream finished %s after the cable was back\n",
               absl::FormatDuration(detected), absl::FormatDuration(ended), absl::FormatDuration(absl::Now() - healed));
  EXPECT_TRUE(cluster_->Drain().ok());
}

TEST_F(OverTwoHosts, ABlipIsNotNoticed) {
  Start();
  ExpectServing();
  const Reply undisturbed = Generate(cluster_->stub(), request_, {.deadline = kLongPatience});
  ASSERT_TRUE(undisturbed.status.ok()) << undisturbed.status;
  Stream stream(cluster_->stub(), request_, {.deadline = kLongPatience});
  ASSERT_TRUE(SuperviseUntil([&] { return stream.received() >= 20; }));
  g_hosts.Cut();
  ASSERT_TRUE(cluster_->Supervise(absl::Now() + absl::Milliseconds(300)).ok());
  EXPECT_FALSE(stream.is_finished());
  g_hosts.Heal();
  ASSERT_TRUE(SuperviseUntil([&] { return stream.is_finished(); }));
  const Reply reply = stream.Join();
  EXPECT_TRUE(reply.status.ok()) << reply.status;
  EXPECT_EQ(reply.ids, undisturbed.ids);
  ASSERT_TRUE(reply.finish);
  EXPECT_EQ(reply.finish->replays(), 0u);
  EXPECT_EQ(cluster_->failures(), 0);
  EXPECT_TRUE(cluster_->Drain().ok());
}

TEST_F(OverTwoHosts, ACableCutWhileTheyStartIsSurvived) {
  Start();
  // The second host has its rank, and the two have not met yet or only just.
  ASSERT_TRUE(SuperviseUntil([] { return Shell("pgrep -f 'rankwise-worker.*demo_model' >/dev/null").code == 0; }));
  g_hosts.Cut();
  ASSERT_TRUE(cluster_->Supervise(absl::Now() + absl::Seconds(5)).ok());
  EXPECT_FALSE(IsServing());
  g_hosts.Heal();
  ExpectServing();
  ExpectTwoHostNames();
  const Reply reply = Generate(cluster_->stub(), request_, {.deadline = kLongPatience});
  EXPECT_TRUE(reply.status.ok()) << reply.status;
  EXPECT_EQ(reply.ids.size(), 200u);
  EXPECT_TRUE(cluster_->Drain().ok());
}

}  // namespace
}  // namespace rankwise::e2e
