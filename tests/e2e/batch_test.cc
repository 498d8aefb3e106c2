// `rankwise batch`: every line answered once, whatever is killed.

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/match.h"
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

using launch::ChildProcess;
using nlohmann::json;
using ::testing::HasSubstr;

constexpr int kNotFinished = 75;

std::string Question(int i, int max_tokens) {
  json body = {{"prompt", absl::StrCat("Tale ", i, ": Once upon a time")}, {"max_tokens", max_tokens}};
  if (i % 3 == 0) body["temperature"] = 0;
  if (i % 3 == 1) body["seed"] = i;
  if (i % 7 == 0) body["n"] = 2;
  if (i % 5 == 0) body["logprobs"] = 1;
  return json{{"custom_id", absl::StrCat("q", i)}, {"method", "POST"}, {"url", "/v1/completions"}, {"body", body}}
      .dump();
}

class BatchCommand : public ::testing::Test {
 protected:
  void SetUp() override {
    static int count = 0;
    folder_ = absl::StrCat(ScratchFolder(), "/batch-", count++);
    std::filesystem::create_directories(folder_);
  }
  // `count` questions and three lines that cannot be answered.
  std::string WriteQuestions(int count, int max_tokens) {
    const std::string path = folder_ + "/questions.jsonl";
    std::ofstream file(path);
    for (int i = 0; i < count; ++i) {
      file << Question(i, max_tokens) << "\n";
      if (i == 1) file << "not JSON\n";
      if (i == 2)
        file << R"({"custom_id": "wrong", "url": "/v1/completions", "body": {"prompt": 7}})"
             << "\n";
    }
    file << R"({"custom_id": "long", "url": "/v1/completions", "body": {"prompt": "x", "max_tokens": 1000000}})"
         << "\n";
    return path;
  }
  std::unique_ptr<ChildProcess> Start(std::vector<std::string> arguments,
                                      const std::vector<std::string>& environment = {}) {
    arguments.insert(arguments.begin(), {ProgramFolder() + "/rankwise", "batch"});
    auto child = ChildProcess::Start({.command = arguments, .environment = environment, .log_path = folder_ + "/log"});
    EXPECT_TRUE(child.ok()) << child.status();
    return *std::move(child);
  }
  // Its exit code, or minus the signal that ended it.
  int Run(const std::vector<std::string>& arguments, const std::vector<std::string>& environment = {}) {
    const auto child = Start(arguments, environment);
    const auto state = child->Wait(absl::Now() + 3 * kPatience);
    if (!state) ADD_FAILURE() << "does not end: " << child->LogTail();
    return !state ? -1 : state->signal != 0 ? -state->signal : state->code;
  }
  std::vector<std::string> Lines(const std::string& path) {
    std::vector<std::string> lines = absl::StrSplit(ReadTextFile(path).value_or(""), '\n');
    EXPECT_EQ(lines.back(), "") << "a torn last line";
    lines.pop_back();
    std::sort(lines.begin(), lines.end());
    return lines;
  }
  size_t CountLines(const std::string& path) {
    const std::string text = ReadTextFile(path).value_or("");
    return static_cast<size_t>(std::count(text.begin(), text.end(), '\n'));
  }
  bool WaitLines(const std::string& path, size_t count, const ChildProcess& child) {
    for (const absl::Time deadline = absl::Now() + kPatience; CountLines(path) < count;) {
      if (absl::Now() > deadline) return ADD_FAILURE() << child.LogTail(), false;
      absl::SleepFor(absl::Milliseconds(2));
    }
    return true;
  }
  std::string Log() { return ReadTextFile(folder_ + "/log").value_or(""); }
  std::vector<std::string> Arguments(const std::string& output) {
    return {DemoModel(), "--tp", "2",        "--threads", "1", "--kv", "f16", "--input", folder_ + "/questions.jsonl",
            "--output",  output, "--window", "16"};
  }
  std::string folder_;
};

TEST_F(BatchCommand, KilledInTheMiddleItGoesOnToTheSameBytes) {
  constexpr int kQuestions = 120;
  WriteQuestions(kQuestions, 48);
  const std::string calm = folder_ + "/calm.jsonl", hurt = folder_ + "/hurt.jsonl";
  ASSERT_EQ(Run(Arguments(calm)), 0) << Log();
  const std::vector<std::string> expected = Lines(calm);
  EXPECT_EQ(expected.size(), size_t{kQuestions + 3});

  for (const size_t lines : {10, 40, 80}) {
    const auto child = Start(Arguments(hurt));
    ASSERT_TRUE(WaitLines(hurt, lines, *child));
    kill(child->pid(), SIGKILL);
    ASSERT_TRUE(child->Wait(absl::Now() + kPatience));
    ASSERT_LT(CountLines(hurt), expected.size()) << "it had finished before it was killed";
  }
  std::ofstream(hurt, std::ios::app) << "{\"id\": \"batch_req_";  // what a lost host may leave
  ASSERT_EQ(Run(Arguments(hurt)), 0) << Log();
  EXPECT_EQ(Lines(hurt), expected);
  EXPECT_FALSE(std::filesystem::exists(hurt + ".lock"));

  // A finished batch needs no server, and changes nothing.
  const absl::Time begin = absl::Now();
  EXPECT_EQ(Run(Arguments(hurt)), 0);
  EXPECT_LT(absl::Now() - begin, absl::Seconds(5));
  EXPECT_EQ(Lines(hurt), expected);

  std::map<std::string, json> by_id;
  for (const std::string& line : expected) {
    json result = json::parse(line);
    const std::string id = result["custom_id"].is_null() ? "" : result["custom_id"].get<std::string>();
    by_id[id] = std::move(result);
  }
  EXPECT_EQ(by_id.size(), size_t{kQuestions + 3});
  EXPECT_THAT(by_id[""]["error"]["message"].get<std::string>(), HasSubstr("line 3: is not JSON"));
  EXPECT_THAT(by_id["wrong"]["error"]["message"].get<std::string>(), HasSubstr("prompt is 7"));
  EXPECT_EQ(by_id["long"]["response"]["status_code"], 400);
  EXPECT_EQ(by_id["q7"]["response"]["body"]["choices"].size(), 2u);
  EXPECT_EQ(by_id["q8"]["response"]["body"]["usage"]["completion_tokens"], 48);
}

TEST_F(BatchCommand, StopsWhenToldAndSaysThatItIsNotFinished) {
  WriteQuestions(300, 64);
  const std::string output = folder_ + "/out.jsonl";
  for (const int signal : {SIGUSR1, SIGTERM}) {
    const size_t before = std::filesystem::exists(output) ? CountLines(output) : 0;
    const auto child = Start(Arguments(output));
    ASSERT_TRUE(WaitLines(output, before + 5, *child));
    kill(child->pid(), signal);
    const auto state = child->Wait(absl::Now() + kPatience);
    ASSERT_TRUE(state) << child->LogTail();
    EXPECT_EQ(state->code, kNotFinished) << state->ToString() << Log();
    EXPECT_LT(CountLines(output), 303u);
  }
  EXPECT_THAT(Log(), HasSubstr("run the same command again"));
  EXPECT_EQ(Lines(output).size(), CountLines(output));
}

TEST_F(BatchCommand, BeginsNothingThatItsJobHasNoTimeFor) {
  WriteQuestions(4, 16);
  const std::string output = folder_ + "/out.jsonl";
  std::vector<std::string> arguments = Arguments(output);
  arguments.insert(arguments.end(), {"--end-margin", "100"});
  const std::string soon = absl::StrCat("SLURM_JOB_END_TIME=", absl::ToUnixSeconds(absl::Now()) + 60);
  EXPECT_EQ(Run(arguments, {soon}), kNotFinished) << Log();
  EXPECT_EQ(CountLines(output), 0u);
  EXPECT_THAT(Log(), HasSubstr("out of time"));
  const std::string late = absl::StrCat("SLURM_JOB_END_TIME=", absl::ToUnixSeconds(absl::Now()) + 3600);
  EXPECT_EQ(Run(arguments, {late}), 0) << Log();
  EXPECT_EQ(CountLines(output), 7u);
}

TEST_F(BatchCommand, OneOutputHasOneWriter) {
  WriteQuestions(300, 64);
  const std::string output = folder_ + "/out.jsonl";
  const auto first = Start(Arguments(output));
  ASSERT_TRUE(WaitLines(output, 1, *first));
  EXPECT_EQ(Run(Arguments(output)), 2);
  EXPECT_THAT(Log(), HasSubstr(absl::StrCat("process ", first->pid())));
  first->Signal(SIGKILL);
}

TEST_F(BatchCommand, RefusesAnIdThatComesTwice) {
  std::ofstream(WriteQuestions(3, 8), std::ios::app) << Question(1, 8) << "\n";
  EXPECT_EQ(Run(Arguments(folder_ + "/out.jsonl")), 2);
  EXPECT_THAT(Log(), HasSubstr("custom_id \"q1\" is on line 2 and on line 7"));
}

TEST_F(BatchCommand, DoesNotMixTheAnswersOfTwoKvFormats) {
  WriteQuestions(3, 8);
  const std::string output = folder_ + "/out.jsonl";
  ASSERT_EQ(Run(Arguments(output)), 0) << Log();
  std::ofstream(folder_ + "/questions.jsonl", std::ios::app) << Question(50, 8) << "\n";
  std::vector<std::string> other = Arguments(output);
  std::replace(other.begin(), other.end(), std::string("f16"), std::string("f32"));
  EXPECT_EQ(Run(other), 2);
  EXPECT_THAT(Log(), HasSubstr("not one model, KV format and scales"));
  EXPECT_EQ(Run(Arguments(output)), 0);
  EXPECT_EQ(CountLines(output), 7u);
}

// A server that loses ranks and its coordinator while shards of a batch use it.
TEST_F(BatchCommand, ShardsOfARunningServerJoinToTheUndisturbedResults) {
  WriteQuestions(150, 64);
  const std::string calm = folder_ + "/calm.jsonl", output = folder_ + "/out.jsonl";
  ASSERT_EQ(Run(Arguments(calm)), 0) << Log();

  const auto cluster = Serve({.tp = 2, .replicas = 2, .kv = "f16"});
  ASSERT_TRUE(cluster.ok()) << cluster.status();
  const auto shard = [&](const std::string& name) {
    return std::vector<std::string>{"--endpoint", (*cluster)->endpoint(),
                                    "--input",    folder_ + "/questions.jsonl",
                                    "--output",   output,
                                    "--window",   "16",
                                    "--shard",    name};
  };
  const auto a = Start(shard("0/2")), b = Start(shard("1/2"));
  const std::string a_output = folder_ + "/out.0-of-2.jsonl";
  bool has_killed_rank = false, has_killed_coordinator = false;
  std::optional<launch::ExitState> a_ended, b_ended;
  for (const absl::Time deadline = absl::Now() + 3 * kPatience; !a_ended || !b_ended;) {
    ASSERT_LT(absl::Now(), deadline) << Log();
    ASSERT_TRUE((*cluster)->Supervise(absl::Now() + absl::Milliseconds(5)).ok());
    a_ended = a->Wait(absl::InfinitePast());
    b_ended = b->Wait(absl::InfinitePast());
    const size_t lines = std::filesystem::exists(a_output) ? CountLines(a_output) : 0;
    if (lines >= 10 && !has_killed_rank) {
      has_killed_rank = true;
      const auto load = Load((*cluster)->stub());
      ASSERT_TRUE(load.ok());
      kill(static_cast<pid_t>(load->groups(0).ranks(1).pid()), SIGKILL);
    }
    if (lines >= 30 && !has_killed_coordinator) {
      has_killed_coordinator = true;
      kill((*cluster)->pid(-1), SIGKILL);
    }
  }
  EXPECT_TRUE(has_killed_rank && has_killed_coordinator);
  EXPECT_EQ(a_ended->code, 0) << Log();
  EXPECT_EQ(b_ended->code, 0) << Log();
  EXPECT_THAT(Log(), HasSubstr("attempts had to be repeated"));
  ASSERT_EQ(Run({"--input", folder_ + "/questions.jsonl", "--output", output, "--join", "2"}), 0) << Log();
  EXPECT_EQ(Lines(output), Lines(calm));
  const std::string joined = ReadTextFile(output).value();
  EXPECT_TRUE(absl::StrContains(joined.substr(0, joined.find('\n')), "\"q0\""));  // in the order of the input
  EXPECT_TRUE((*cluster)->Drain().ok());
}

}  // namespace
}  // namespace rankwise::e2e
