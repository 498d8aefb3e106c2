// Both sbatch files under a real Slurm of two nodes on this machine. Skips, with the reason, where that cannot run.

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "base/mapped_file.h"
#include "base/program_folder.h"
#include "launch/client.h"
#include "nlohmann/json.hpp"
#include "tests/e2e/serving.h"

namespace rankwise::e2e {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::UnorderedElementsAre;

constexpr absl::Duration kJobPatience = absl::Minutes(5);
const std::string kSource = RANKWISE_SOURCE_DIR;

bool WaitUntil(const std::function<bool()>& condition, absl::Duration patience = kJobPatience) {
  for (const absl::Time deadline = absl::Now() + patience; !condition();) {
    if (absl::Now() > deadline) return false;
    absl::SleepFor(absl::Milliseconds(20));
  }
  return true;
}

// One cluster for all tests of this program.
class SlurmCluster : public ::testing::Environment {
 public:
  void SetUp() override {
    root_ = ScratchFolder() + "/slurm";
    const Output up = Shell(absl::StrCat(kSource, "/tests/slurm/slurm_cluster up ", root_));
    is_up_ = up.code == 0;
    why_not_ = up.text;
    if (!is_up_) return;
    setenv("SLURM_CONF", up.text.c_str(), 1);
    setenv("RANKWISE_BIN", ProgramFolder().c_str(), 1);
    // Two ranks of two nodes share two CPUs here.
    setenv("OMPI_MCA_mpi_yield_when_idle", "1", 1);
  }
  void TearDown() override {
    if (is_up_) Shell(absl::StrCat(kSource, "/tests/slurm/slurm_cluster down ", root_));
  }
  bool is_up() const { return is_up_; }
  const std::string& why_not() const { return why_not_; }

 private:
  std::string root_, why_not_;
  bool is_up_ = false;
};
SlurmCluster& g_cluster = *static_cast<SlurmCluster*>(::testing::AddGlobalTestEnvironment(new SlurmCluster));

class Slurm : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!g_cluster.is_up()) GTEST_SKIP() << g_cluster.why_not();
    static int count = 0;
    folder_ = absl::StrCat(ScratchFolder(), "/jobs-", count++);
    std::filesystem::create_directories(folder_);
  }
  void TearDown() override {
    if (!g_cluster.is_up()) return;
    for (const std::string& job : jobs_) Shell("scancel " + job);
    EXPECT_TRUE(WaitUntil([] { return Shell("squeue -h").text.empty(); }, absl::Minutes(1))) << Shell("squeue").text;
    EXPECT_TRUE(WaitUntil([&] { return Processes().empty(); }, absl::Minutes(1))) << "left: " << Processes()[0];
    if (HasFailure())
      for (const std::string& job : jobs_) ADD_FAILURE() << "job " << job << ":\n" << JobLog(job);
  }

  // `options` and `arguments` as typed; the job's name.
  std::string Submit(const std::string& options, const std::string& script, const std::string& arguments) {
    const Output output = Shell(absl::StrCat("cd ", folder_, " && sbatch --parsable -o %j.log ", options, " ", kSource,
                                             "/launch/slurm/", script, " ", arguments));
    EXPECT_EQ(output.code, 0) << output.text;
    jobs_.push_back(output.text);
    return output.text;
  }
  std::string JobLog(const std::string& job) {
    return ReadTextFile(absl::StrCat(folder_, "/", job, ".log")).value_or("no log");
  }
  // A field of `scontrol show job`.
  std::string Field(const std::string& job, const std::string& name) {
    for (const absl::string_view word : absl::StrSplit(Shell("scontrol show job -o " + job).text, ' '))
      if (absl::StartsWith(word, name + "=")) return std::string(word.substr(name.size() + 1));
    return "";
  }
  bool WaitState(const std::string& job, const std::string& state, absl::Duration patience = kJobPatience) {
    const bool is_there = WaitUntil([&] { return Field(job, "JobState") == state; }, patience);
    EXPECT_TRUE(is_there) << "job " << job << " is " << Field(job, "JobState") << ", not " << state << "\n"
                          << JobLog(job);
    return is_there;
  }

  // Programs of ours that belong to a job of these tests.
  std::vector<int64_t> Processes(const std::string& name = "", const std::string& job = "") {
    std::vector<int64_t> pids;
    for (const auto& entry : std::filesystem::directory_iterator("/proc")) {
      int64_t pid = 0;
      if (!absl::SimpleAtoi(entry.path().filename().string(), &pid)) continue;
      const std::string program = ReadProc(pid, "cmdline");
      if (!absl::StartsWith(program, ProgramFolder()) || !IsRunning(pid)) continue;
      const std::string environment = ReadProc(pid, "environ");
      if (!absl::StrContains(environment, std::string("SLURM_CONF=") + getenv("SLURM_CONF"))) continue;
      if (!absl::StrContains(environment, "SLURM_JOB_ID=" + job)) continue;
      // A rank's guard is a fork of it.
      const bool is_guard = absl::StartsWith(ReadProc(pid, "comm"), "rankwise-guard");
      if (absl::StrContains(program, name) && (name.empty() || !is_guard)) pids.push_back(pid);
    }
    return pids;
  }
  static std::string ReadProc(int64_t pid, const std::string& file) {
    std::ifstream stream(absl::StrCat("/proc/", pid, "/", file), std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(stream), {});
  }
  static std::string Variable(int64_t pid, const std::string& name) {
    const std::string environment = ReadProc(pid, "environ");
    for (const absl::string_view entry : absl::StrSplit(environment, '\0'))
      if (absl::StartsWith(entry, name + "=")) return std::string(entry.substr(name.size() + 1));
    return "";
  }

  void WriteQuestions(int count, int tokens) {
    std::ofstream file(folder_ + "/questions.jsonl");
    for (int i = 0; i < count; ++i) {
      json body = {
          {"prompt", absl::StrCat("Tale ", i, ": Once upon a time")}, {"max_tokens", tokens}, {"ignore_eos", true}};
      if (i % 2 == 0) body["temperature"] = 0;
      file << json{{"custom_id", absl::StrCat("q", i)}, {"url", "/v1/completions"}, {"body", body}}.dump() << "\n";
    }
    file << "a bad line\n";
  }
  // What the batch gives when nobody disturbs it, sorted.
  std::vector<std::string> Undisturbed() {
    const auto ended = RunProgram("rankwise", {"batch", DemoModel(), "--threads", "1", "--input",
                                               folder_ + "/questions.jsonl", "--output", folder_ + "/calm.jsonl"});
    EXPECT_TRUE(ended.ok() && ended->state.is_success()) << (ended.ok() ? ended->log : ended.status().ToString());
    return Lines("calm.jsonl");
  }
  std::vector<std::string> Lines(const std::string& name) {
    std::vector<std::string> lines =
        absl::StrSplit(ReadTextFile(folder_ + "/" + name).value_or(""), '\n', absl::SkipEmpty());
    std::sort(lines.begin(), lines.end());
    return lines;
  }
  size_t CountLines(const std::string& name) {
    const std::string text = ReadTextFile(folder_ + "/" + name).value_or("");
    return static_cast<size_t>(std::count(text.begin(), text.end(), '\n'));
  }
  bool WaitLines(size_t count, const std::string& job) {
    const bool is_there = WaitUntil([&] { return CountLines("out.jsonl") >= count; });
    EXPECT_TRUE(is_there) << CountLines("out.jsonl") << " lines\n" << JobLog(job);
    return is_there;
  }
  const std::string kBatch =
      absl::StrCat("questions.jsonl --output out.jsonl --model ", DemoModel(), " --grace 5 --tp ");

  std::string folder_;
  std::vector<std::string> jobs_;
};

TEST_F(Slurm, BatchCompletesWithAGroupOverTwoNodes) {
  WriteQuestions(40, 48);
  const std::string job = Submit("-N 2 --ntasks-per-node=1 -t 10", "batch.sbatch", kBatch + "2 --window 8");
  ASSERT_TRUE(WaitUntil([&] { return Processes("rankwise-worker", job).size() == 2; })) << JobLog(job);
  std::vector<std::string> nodes;
  for (const int64_t pid : Processes("rankwise-worker", job)) nodes.push_back(Variable(pid, "SLURMD_NODENAME"));
  EXPECT_THAT(nodes, UnorderedElementsAre("n1", "n2"));
  ASSERT_TRUE(WaitState(job, "COMPLETED"));
  EXPECT_EQ(Lines("out.jsonl"), Undisturbed());
}

TEST_F(Slurm, BatchSurvivesRequeueKilledStepAndCancel) {
  WriteQuestions(200, 100);
  const std::vector<std::string> expected = Undisturbed();
  const std::string job = Submit("-N 1 --ntasks=2 -t 10", "batch.sbatch", kBatch + "2 --window 8");
  ASSERT_TRUE(WaitLines(20, job));
  ASSERT_EQ(Shell("scontrol requeue " + job).code, 0);
  ASSERT_TRUE(WaitUntil([&] { return Field(job, "Restarts") == "1" && Field(job, "JobState") == "RUNNING"; }));

  const size_t after_requeue = CountLines("out.jsonl");
  ASSERT_TRUE(WaitLines(after_requeue + 20, job));
  const std::vector<int64_t> ranks = Processes("rankwise-worker", job);
  ASSERT_EQ(ranks.size(), 2u);
  kill(static_cast<pid_t>(ranks[1]), SIGKILL);
  const size_t after_kill = CountLines("out.jsonl");
  ASSERT_TRUE(WaitLines(after_kill + 20, job));  // by the step that took its place
  EXPECT_FALSE(IsRunning(ranks[0]) || IsRunning(ranks[1]));

  ASSERT_EQ(Shell("scancel " + job).code, 0);
  ASSERT_TRUE(WaitState(job, "CANCELLED"));
  ASSERT_TRUE(WaitUntil([&] { return Processes().empty(); }, absl::Minutes(1)));
  ASSERT_LT(CountLines("out.jsonl"), expected.size()) << "it had finished before it was cancelled";

  const std::string again = Submit("-N 1 --ntasks=2 -t 10", "batch.sbatch", kBatch + "2 --window 8");
  ASSERT_TRUE(WaitState(again, "COMPLETED"));
  EXPECT_EQ(Lines("out.jsonl"), expected);
}

TEST_F(Slurm, BatchQueuesItselfAgainBeforeItsTimeLimit) {
  WriteQuestions(160, 600);
  const std::vector<std::string> expected = Undisturbed();
  // Slurm's shortest limit is a minute, and its word comes 45 s before.
  const std::string job = Submit("-N 1 --ntasks=2 -t 1 --signal=B:USR1@45", "batch.sbatch",
                                 absl::StrCat(kBatch, "2 --window 1 --end-margin 30"));
  ASSERT_TRUE(WaitUntil([&] { return absl::StrContains(JobLog(job), "queueing job"); })) << JobLog(job);
  const size_t first_run = CountLines("out.jsonl");
  EXPECT_GT(first_run, 0u);
  EXPECT_LT(first_run, expected.size());
  ASSERT_TRUE(WaitState(job, "COMPLETED", 3 * kJobPatience));
  EXPECT_NE(Field(job, "Restarts"), "0");
  EXPECT_EQ(Lines("out.jsonl"), expected);
}

TEST_F(Slurm, ArrayTasksSplitTheLines) {
  WriteQuestions(31, 32);
  const std::string job = Submit("-N 1 --ntasks=1 -t 10 --array=0-1", "batch.sbatch", kBatch + "1");
  ASSERT_TRUE(WaitUntil([&] { return Shell("squeue -h").text.empty(); })) << Shell("squeue").text;
  EXPECT_EQ(CountLines("out.0-of-2.jsonl"), 16u);
  EXPECT_EQ(CountLines("out.1-of-2.jsonl"), 16u);
  const auto joined = RunProgram("rankwise", {"batch", "--input", folder_ + "/questions.jsonl", "--output",
                                              folder_ + "/out.jsonl", "--join", "2"});
  ASSERT_TRUE(joined.ok() && joined->state.is_success()) << joined->log;
  EXPECT_EQ(Lines("out.jsonl"), Undisturbed());
}

TEST_F(Slurm, BatchSaysWhatItCannotRun) {
  WriteQuestions(3, 8);
  const std::string no_model = Submit("-N 1 -t 10", "batch.sbatch", "questions.jsonl --model /no/such/model");
  ASSERT_TRUE(WaitState(no_model, "FAILED"));
  EXPECT_EQ(Field(no_model, "ExitCode"), "2:0");
  EXPECT_THAT(JobLog(no_model), HasSubstr("/no/such/model"));
  const std::string no_tp = Submit("-N 1 --ntasks=2 -t 10", "batch.sbatch", absl::StrCat(kBatch, "2 --kv int8"));
  ASSERT_TRUE(WaitState(no_tp, "FAILED"));
  EXPECT_EQ(Field(no_tp, "ExitCode"), "1:0");
  EXPECT_THAT(JobLog(no_tp), HasSubstr("refused its configuration"));
}

TEST_F(Slurm, ServeLosesAStepAndNoTokenAndDrainsWhenTold) {
  const std::string job = Submit("-N 2 --ntasks-per-node=2 --gres=gpu:2 -t 10", "serve.sbatch",
                                 absl::StrCat("--model ", DemoModel(), " --tp 2 --replicas 2 --listen-host 127.0.0.1"));
  const std::string endpoint_file = absl::StrCat(folder_, "/rankwise-", job, ".endpoint");
  ASSERT_TRUE(WaitUntil([&] { return std::filesystem::exists(endpoint_file); })) << JobLog(job);
  EXPECT_EQ(std::filesystem::status(endpoint_file).permissions(),
            std::filesystem::perms::owner_read | std::filesystem::perms::owner_write);
  const auto connected = launch::Connect({.endpoint_file = endpoint_file});  // with the token beside it
  ASSERT_TRUE(connected.ok()) << connected.status();
  const auto& stub = *connected;
  const auto is_serving = [&](int groups) {
    return WaitUntil([&] {
      const auto load = Load(*stub);
      return load.ok() && std::count_if(load->groups().begin(), load->groups().end(),
                                        [](const auto& g) { return g.serving(); }) == groups;
    });
  };
  ASSERT_TRUE(is_serving(2)) << JobLog(job);

  // Each rank has one GPU of its node, and no other.
  std::vector<std::string> places;
  for (const int64_t pid : Processes("rankwise-worker", job))
    places.push_back(absl::StrCat(Variable(pid, "SLURMD_NODENAME"), " ", Variable(pid, "CUDA_VISIBLE_DEVICES"), " of ",
                                  Variable(pid, "SLURM_LOCALID")));
  EXPECT_THAT(places, UnorderedElementsAre("n1 0 of 0", "n1 1 of 1", "n2 0 of 0", "n2 1 of 1"));

  GenerateRequest request = Sampled("Once upon a time", 900, 11);
  request.mutable_sampling()->set_ignore_eos(true);
  const Reply undisturbed = Generate(*stub, request, {.deadline = kJobPatience});
  ASSERT_TRUE(undisturbed.status.ok()) << undisturbed.status;
  {
    std::vector<std::unique_ptr<Stream>> streams;
    for (int i = 0; i < 4; ++i)
      streams.push_back(std::make_unique<Stream>(*stub, request, CallOptions{.deadline = kJobPatience}));
    ASSERT_TRUE(WaitUntil([&] {
      return std::all_of(streams.begin(), streams.end(), [](const auto& s) { return s->received() >= 20; });
    }));
    const std::vector<int64_t> ranks = Processes("rankwise-worker", job);
    ASSERT_EQ(ranks.size(), 4u);
    kill(static_cast<pid_t>(ranks[3]), SIGKILL);
    for (const auto& stream : streams) {
      const Reply reply = stream->Join();
      EXPECT_TRUE(reply.status.ok()) << reply.status;
      EXPECT_FALSE(reply.has_gap);
      EXPECT_EQ(reply.ids, undisturbed.ids);
    }
    EXPECT_FALSE(IsRunning(ranks[3]));
  }
  EXPECT_TRUE(is_serving(2)) << JobLog(job);  // by a new step
  EXPECT_THAT(JobLog(job), HasSubstr("ended with code"));

  Stream last(*stub, request, {.deadline = kJobPatience});
  ASSERT_TRUE(WaitUntil([&] { return last.received() >= 20; }));
  ASSERT_EQ(Shell("scancel --batch --signal=TERM " + job).code, 0);
  EXPECT_EQ(last.Join().ids, undisturbed.ids);
  EXPECT_TRUE(WaitState(job, "COMPLETED"));
  EXPECT_FALSE(std::filesystem::exists(endpoint_file));
  EXPECT_THAT(Processes(), IsEmpty());
}

}  // namespace
}  // namespace rankwise::e2e
