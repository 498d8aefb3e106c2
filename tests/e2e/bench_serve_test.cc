// `rankwise bench serve` against a real deployment of the demo model.

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>

#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/mapped_file.h"
#include "base/program_folder.h"
#include "launch/arrivals.h"
#include "launch/child_process.h"
#include "tests/e2e/serving.h"

namespace rankwise::e2e {
namespace {

using nlohmann::json;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

class BenchServe : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    auto cluster = Serve({.kv = "f16"});
    ASSERT_TRUE(cluster.ok()) << cluster.status();
    cluster_ = cluster->release();
  }
  static void TearDownTestSuite() {
    if (cluster_ == nullptr) return;
    EXPECT_TRUE(cluster_->Drain().ok());
    delete std::exchange(cluster_, nullptr);
  }

  static std::string Command(const std::string& flags, const std::string& endpoint = cluster_->endpoint()) {
    return absl::StrCat(ProgramFolder(), "/rankwise bench serve --endpoint ", endpoint, " ", flags);
  }
  // Figures of a run, by "name, unit"; what it says on stderr goes nowhere.
  static std::map<std::string, double> Figures(const std::string& flags, int code = 0) {
    const Output output = Shell(Command(flags + " --json 2>/dev/null"));
    EXPECT_EQ(output.code, code) << output.text;
    const json record = json::parse(output.text, nullptr, false);
    std::map<std::string, double> figures;
    if (!record.is_object()) {
      ADD_FAILURE() << "no JSON: " << output.text;
      return figures;
    }
    EXPECT_EQ(record["bench"], "serve");
    EXPECT_THAT(record["subject"].get<std::string>(), HasSubstr("demo_model, tp 1, kv f16"));
    EXPECT_THAT(record["command"].get<std::string>(), HasSubstr("bench serve --endpoint"));
    for (const json& figure : record["figures"]) {
      figures[absl::StrCat(figure["name"].get<std::string>(), ", ", figure["unit"].get<std::string>())] =
          figure["value"];
    }
    return figures;
  }
  static void ExpectOrder(std::map<std::string, double>& figures) {
    for (const char* series : {"ttft", "itl", "tpot", "e2e"}) {
      double last = 0;
      for (const char* quantile : {"p50", "p90", "p99", "max"}) {
        const double value = figures.at(absl::StrCat(series, " ", quantile, ", ms"));
        EXPECT_GE(value, last) << series << " " << quantile;
        last = value;
      }
      EXPECT_GT(last, 0) << series;
    }
    EXPECT_GE(figures.at("e2e p50, ms"), figures.at("ttft p50, ms"));
  }

  static launch::LocalCluster* cluster_;
};
launch::LocalCluster* BenchServe::cluster_ = nullptr;

TEST_F(BenchServe, AClosedLoopCountsEveryTokenOnce) {
  auto figures = Figures("--concurrency 4 --requests 20 --prompt-tokens 24 --output-tokens 12 --seed 1 --warmup 3");
  EXPECT_EQ(figures.at("succeeded, requests"), 20);
  EXPECT_EQ(figures.at("failed, requests"), 0);
  EXPECT_EQ(figures.at("prompt, tokens"), 20 * 24);
  EXPECT_EQ(figures.at("output, tokens"), 20 * 12);
  EXPECT_EQ(figures.at("prompt cached, tokens"), 0);
  ExpectOrder(figures);
  const double seconds = figures.at("measured, s");
  EXPECT_NEAR(figures.at("output, tokens/s") * seconds, 20 * 12, 1e-6 * 20 * 12);
  EXPECT_NEAR(figures.at("total, tokens/s") * seconds, 20 * 36, 1e-6 * 20 * 36);
}

TEST_F(BenchServe, APoissonProcessKeepsItsTimes) {
  const std::string svg = ScratchFolder() + "/latencies.svg";
  auto figures = Figures(absl::StrCat(
      "--rate 20 --requests 30 --prompt-tokens 4:20 --output-tokens 2:9 --seed 2 --slo-ttft 60000 --svg ", svg));
  EXPECT_EQ(figures.at("succeeded, requests"), 30);
  ExpectOrder(figures);
  EXPECT_EQ(figures.at("goodput, requests/s"), figures.at("succeeded, requests/s"));
  const std::vector<launch::Arrival> arrivals = launch::DrawArrivals(30, 20, {4, 20}, {2, 9}, 2);
  EXPECT_GE(figures.at("measured, s"), absl::ToDoubleSeconds(arrivals.back().at));
  double output = 0;
  for (const launch::Arrival& arrival : arrivals) output += arrival.output_tokens;
  EXPECT_EQ(figures.at("output, tokens"), output);
  EXPECT_THAT(ReadTextFile(svg).value_or(""), AllOf(HasSubstr("inter-token latency"), HasSubstr("</svg>")));
  const auto impossible = Figures("--rate 40 --requests 5 --output-tokens 8 --seed 3 --slo-tpot 0.000001");
  EXPECT_EQ(impossible.at("goodput, requests/s"), 0);
}

TEST_F(BenchServe, ATraceIsReplayed) {
  const std::string trace = ScratchFolder() + "/trace.csv";
  std::ofstream(trace) << "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.0,40,6\n"
                          "2023-11-16 18:17:23.0,80,10\n2023-11-16 18:17:43.0,4000,10\n";
  auto figures = Figures(absl::StrCat("--trace ", trace, " --speed 100 --requests 2 --divisor 2 --seed 4"));
  EXPECT_EQ(figures.at("prompt, tokens"), 60);
  EXPECT_EQ(figures.at("output, tokens"), 8);
  EXPECT_GE(figures.at("measured, s"), 0.2);
  EXPECT_LT(figures.at("measured, s"), 15);  // 20 at the trace's own speed
  const Output refused = Shell(Command(absl::StrCat("--trace ", trace)));
  EXPECT_EQ(refused.code, 2);
  EXPECT_THAT(refused.text, AllOf(HasSubstr("request 2 has 4000 + 10 tokens"), HasSubstr("--divisor")));
}

TEST_F(BenchServe, PrefixesAreSharedWhenTheyShallBe) {
  const auto figures =
      Figures("--concurrency 1 --requests 5 --prompt-tokens 80 --shared-prefix 64 --output-tokens 2 --seed 5");
  EXPECT_EQ(figures.at("prompt cached, tokens"), 4 * 64);
}

TEST_F(BenchServe, TheTableSaysWhatTheJsonSays) {
  const Output output = Shell(Command("--concurrency 2 --requests 6 --output-tokens 5 --seed 6 --slo-tpot 60000"));
  EXPECT_EQ(output.code, 0) << output.text;
  EXPECT_THAT(output.text, AllOf(HasSubstr("demo_model, tp 1, kv f16"), HasSubstr("time to first token (TTFT)"),
                                 HasSubstr("6 succeeded"), HasSubstr("0 failed"), HasSubstr("100.0 %"),
                                 HasSubstr("TTFT, ms"), HasSubstr("ITL, ms"), HasSubstr("####")));
  EXPECT_THAT(output.text, Not(HasSubstr("cut off")));
}

TEST_F(BenchServe, ABaselineTellsARegression) {
  const std::string saved = ScratchFolder() + "/baseline.json",
                    flags = "--concurrency 2 --requests 8 --output-tokens 6 --compare " + saved;
  ASSERT_EQ(Shell(Command("--concurrency 2 --requests 8 --output-tokens 6 --seed 8 --save " + saved)).code, 0);
  const Output same = Shell(Command(flags + " --seed 9 --tolerance 1e9 --fail-on-regression"));
  EXPECT_EQ(same.code, 0) << same.text;
  EXPECT_THAT(same.text, AllOf(HasSubstr("baseline: "), Not(HasSubstr("another m")), Not(HasSubstr("WORSE"))));
  // As if a thousand times as many had been answered.
  json record = json::parse(*ReadTextFile(saved));
  for (json& figure : record["figures"]) {
    if (figure["unit"] == "requests/s") figure["value"] = 1000 * figure["value"].get<double>();
  }
  std::ofstream(saved) << record;
  const Output worse = Shell(Command(flags + " --seed 10"));
  EXPECT_EQ(worse.code, 0) << worse.text;
  EXPECT_THAT(worse.text, HasSubstr("WORSE"));
  const Output failed = Shell(Command(flags + " --seed 11 --tolerance 90 --fail-on-regression"));
  EXPECT_EQ(failed.code, 1) << failed.text;
  EXPECT_THAT(failed.text, HasSubstr("are worse than in"));
  EXPECT_EQ(Shell(Command(flags + "x")).code, 2);
}

TEST_F(BenchServe, AnInterruptPrintsWhatWasMeasured) {
  const std::string log = ScratchFolder() + "/interrupted.log";
  auto child = launch::ChildProcess::Start(
      {.command = {ProgramFolder() + "/rankwise", "bench", "serve", "--endpoint", cluster_->endpoint(), "--concurrency",
                   "2", "--requests", "1000000", "--output-tokens", "40", "--seed", "7"},
       .log_path = log});
  ASSERT_TRUE(child.ok()) << child.status();
  ASSERT_FALSE((*child)->Wait(absl::Now() + absl::Seconds(2)));
  kill((*child)->pid(), SIGINT);
  const auto ended = (*child)->Wait(absl::Now() + kPatience);
  ASSERT_TRUE(ended);
  EXPECT_EQ(ended->code, 130);
  EXPECT_THAT(ReadTextFile(log).value_or(""), AllOf(HasSubstr("time to first token"), HasSubstr("0 failed"),
                                                    HasSubstr("cut off"), HasSubstr("of 1000000 requests")));
  EXPECT_TRUE(WaitIdle(cluster_->stub()).ok());
}

TEST_F(BenchServe, FailedRequestsAreCountedAndFail) {
  const auto full = Serve({.coordinator_flags = {"--max-live", "1"}});
  ASSERT_TRUE(full.ok()) << full.status();
  const Output output =
      Shell(Command("--concurrency 4 --requests 12 --output-tokens 64", (*full)->endpoint()) + " 2>&1");
  EXPECT_EQ(output.code, 1) << output.text;
  EXPECT_THAT(output.text, AllOf(HasSubstr("x RESOURCE_EXHAUSTED"), HasSubstr("of 12 requests failed")));
}

TEST_F(BenchServe, NoCoordinatorAndNoLoadAreSaidInWords) {
  const Output dead = Shell(Command("--rate 1", "127.0.0.1:1"));
  EXPECT_EQ(dead.code, 1);
  EXPECT_THAT(dead.text, AllOf(HasSubstr("UNAVAILABLE"), HasSubstr("127.0.0.1:1")));
  const Output none = Shell(Command(""));
  EXPECT_EQ(none.code, 2);
  EXPECT_THAT(none.text, HasSubstr("--concurrency"));
  EXPECT_EQ(Shell(Command("--rate 1 --concurrency 2")).code, 2);
  const Output range = Shell(Command("--rate 1 --prompt-tokens 9:8"));
  EXPECT_EQ(range.code, 2);
  EXPECT_THAT(range.text, HasSubstr("\"9:8\""));
}

}  // namespace
}  // namespace rankwise::e2e
