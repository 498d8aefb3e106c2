#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/mapped_file.h"
#include "base/program_folder.h"
#include "launch/child_process.h"
#include "tests/e2e/serving.h"

// `rankwise eval` from the command line: two KV formats of the demo model, on a few questions written here.
namespace rankwise::e2e {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;
using ::testing::SizeIs;

constexpr int kQuestions = 12;  // of lambada, and as many of crows_pairs; gsm8k has two, the text four windows
constexpr int kAnswers = 2 * kQuestions + 2 + 4;

class EvalCommand : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    const std::string folder = DataFolder();
    std::filesystem::create_directories(folder + "/fewshot");
    std::ofstream words(folder + "/lambada.test.jsonl"), pairs(folder + "/crows_pairs.csv");
    pairs << ",sent_more,sent_less\n";
    for (int i = 0; i < kQuestions; ++i) {
      words << json{{"text", absl::StrCat("Once there were ", i, " kings who lived in one old house")}} << "\n";
      pairs << i << ",\"The king, number " << i << ", was kind.\",The queen was kind.\n";
    }
    const json sum = {{"question", "What is 2 and 2?"}, {"answer", "It is <<2+2=4>>4.\n#### 4"}};
    std::ofstream(folder + "/gsm8k.test.jsonl") << sum << "\n" << sum << "\n";
    std::ofstream pool(folder + "/fewshot/gsm8k.train64.jsonl");
    for (int i = 0; i < 4; ++i) pool << sum << "\n";
  }
  static std::string DataFolder() { return ScratchFolder() + "/accuracy"; }
  static std::string WorkFolder(const std::string& name) { return ScratchFolder() + "/eval-" + name; }

  // Of the run that writes its report to `name`.json.
  static std::vector<std::string> Flags(const std::string& name, const std::vector<std::string>& more) {
    std::vector<std::string> flags = {"eval",
                                      "--data",
                                      DataFolder(),
                                      "--tasks",
                                      "lambada,crows_pairs,gsm8k,ppl,kl",
                                      "--text",
                                      DemoModel() + "/valid_sample.txt",
                                      "--windows",
                                      "4",
                                      "--window-tokens",
                                      "40",
                                      "--work-dir",
                                      WorkFolder(name),
                                      "--json",
                                      WorkFolder(name) + ".json"};
    flags.insert(flags.end(), more.begin(), more.end());
    return flags;
  }
  static std::vector<std::string> Clusters(const std::string& name, const std::string& scales) {
    return Flags(name, {DemoModel(), "--compare", "kv=f32,kv=int8", "--kv-scales", scales, "--threads", "1"});
  }
  static std::string Report(const std::string& name) {
    return ReadTextFile(WorkFolder(name) + ".json").value_or("none");
  }
  static int64_t CountLines(const std::string& folder) {
    int64_t lines = 0;
    std::error_code error;
    for (const auto& entry : std::filesystem::recursive_directory_iterator(folder, error)) {
      if (!entry.is_regular_file()) continue;
      for (const char c : ReadTextFile(entry.path()).value_or("")) lines += c == '\n';
    }
    return lines;
  }
};

TEST_F(EvalCommand, AKilledRunGoesOnToTheSameReport) {
  const auto scales = DemoScales(1);
  ASSERT_TRUE(scales.ok()) << scales.status();
  const auto whole = RunProgram("rankwise", Clusters("whole", *scales));
  ASSERT_TRUE(whole.ok()) << whole.status();
  ASSERT_TRUE(whole->state.is_success()) << whole->log;
  EXPECT_THAT(whole->log, HasSubstr("same top token %"));
  const json report = json::parse(Report("whole"), nullptr, false);
  ASSERT_TRUE(report.is_object());
  EXPECT_THAT(report["rows"], SizeIs(7));  // two of lambada, two of kl
  EXPECT_EQ(report["rows"][0]["n"], kQuestions);
  EXPECT_EQ(report["configurations"][1]["kv_format"], "int8");

  // Killed with an answer or two on disk, and with half a line behind them.
  std::vector<std::string> command = Clusters("killed", *scales);
  command.insert(command.begin(), ProgramFolder() + "/rankwise");
  auto child = launch::ChildProcess::Start({.command = command, .log_path = ScratchFolder() + "/eval-killed.log"});
  ASSERT_TRUE(child.ok()) << child.status();
  constexpr int kHeaders = 4;  // files of one configuration
  while (CountLines(WorkFolder("killed")) < kHeaders + 2)
    ASSERT_FALSE((*child)->Wait(absl::Now() + absl::Milliseconds(1)));
  kill((*child)->pid(), SIGKILL);
  ASSERT_TRUE((*child)->Wait(absl::Now() + kPatience));
  const int64_t before = CountLines(WorkFolder("killed"));
  EXPECT_LT(before, kHeaders + kAnswers) << "it was killed too late to show anything";
  std::ofstream(WorkFolder("killed") + "/f32/lambada.jsonl", std::ios::app) << R"({"greedy":fal)";

  const auto resumed = RunProgram("rankwise", Clusters("killed", *scales));
  ASSERT_TRUE(resumed.ok()) << resumed.status();
  ASSERT_TRUE(resumed->state.is_success()) << resumed->log;
  EXPECT_THAT(resumed->log, HasSubstr(absl::StrCat("f32: ", before - kHeaders, " of ", kAnswers, " answers are in")));
  EXPECT_EQ(Report("killed"), Report("whole"));
}

TEST_F(EvalCommand, RunningServersAreComparedAndNotMixed) {
  const auto baseline = Serve({.kv = "f32"});
  const auto other = Serve({.kv = "int8"});
  ASSERT_TRUE(baseline.ok() && other.ok()) << baseline.status() << other.status();
  const std::string a = (*baseline)->endpoint(), b = (*other)->endpoint();
  const auto run = RunProgram("rankwise", Flags("servers", {"--compare", absl::StrCat("a=", a, ",b=", b)}));
  ASSERT_TRUE(run.ok()) << run.status();
  ASSERT_TRUE(run->state.is_success()) << run->log;
  const json report = json::parse(Report("servers"), nullptr, false);
  ASSERT_TRUE(report.is_object());
  EXPECT_EQ(report["baseline"], "a");
  EXPECT_EQ(report["configurations"][1]["kv_format"], "int8");
  const json& kl = report["rows"][5];
  EXPECT_EQ(kl["task"], "kl");
  EXPECT_GT(kl["values"][1]["value"], 0);

  const auto swapped = RunProgram("rankwise", Flags("servers", {"--compare", absl::StrCat("a=", b, ",b=", a)}));
  ASSERT_TRUE(swapped.ok()) << swapped.status();
  EXPECT_EQ(swapped->state.code, 2) << swapped->log;
  EXPECT_THAT(swapped->log, HasSubstr("kv_format is \"f32\", not \"int8\""));
}

}  // namespace
}  // namespace rankwise::e2e
