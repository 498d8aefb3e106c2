#include "launch/bench_record.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "base/mapped_file.h"

namespace rankwise::launch {
namespace {

using nlohmann::json;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::SizeIs;
using Verdict = FigureChange::Verdict;

BenchRecord TwoFigures(double rate, double latency) {
  BenchRecord record = StartRecord("serve");
  record.subject = "a \"model\"";
  record.figures = {{"output", "tokens/s", rate, Better::kHigher},
                    {"ttft", "ms", latency, Better::kLower},
                    {"measured", "s", 12, Better::kNeither}};
  return record;
}

// What Report prints and returns.
struct Reported {
  absl::Status status;
  std::string out;
};
Reported ReportTo(const BenchRecord& record, const RecordFlags& flags, const std::optional<BenchRecord>& baseline) {
  ::testing::internal::CaptureStdout();
  absl::Status status = Report(record, "the figures\n", flags, baseline);
  return {status, ::testing::internal::GetCapturedStdout()};
}

TEST(BenchRecordTest, WorseIsAgainstTheFiguresOwnDirection) {
  const auto verdict = [](Better better, double value, double baseline) {
    return Compare({.value = value, .better = better}, baseline, 0.1).verdict;
  };
  EXPECT_EQ(verdict(Better::kLower, 110, 100), Verdict::kSame);
  EXPECT_EQ(verdict(Better::kLower, 111, 100), Verdict::kWorse);
  EXPECT_EQ(verdict(Better::kLower, 89, 100), Verdict::kBetter);
  EXPECT_EQ(verdict(Better::kHigher, 90, 100), Verdict::kSame);
  EXPECT_EQ(verdict(Better::kHigher, 89, 100), Verdict::kWorse);
  EXPECT_EQ(verdict(Better::kHigher, 111, 100), Verdict::kBetter);
  EXPECT_EQ(verdict(Better::kNeither, 1000, 100), Verdict::kSame);
  EXPECT_EQ(verdict(Better::kLower, 1, 0), Verdict::kWorse);
  EXPECT_EQ(verdict(Better::kLower, 0, 0), Verdict::kSame);
  EXPECT_EQ(Compare({.value = 150}, 100, 0).ratio, 1.5);
  EXPECT_EQ(Compare({.value = 0}, 0, 0).ratio, 1);
  EXPECT_TRUE(std::isinf(Compare({.value = 1}, 0, 0).ratio));
}

TEST(BenchRecordTest, KnowsTheMachineAndSurvivesItsFile) {
  const BenchRecord record = TwoFigures(1.0 / 3, 2e-9);
  EXPECT_THAT(record.command, HasSubstr("bench_record_test"));
  EXPECT_FALSE(record.cpu.empty());
  EXPECT_GE(record.cores, 1);
  EXPECT_THAT(record.version, HasSubstr("."));
  const auto read = ParseRecord(ToJson(record));
  ASSERT_TRUE(read.ok()) << read.status();
  EXPECT_EQ(ToJson(*read), ToJson(record));
  EXPECT_EQ(read->figures[0].value, 1.0 / 3);
  EXPECT_EQ(read->figures[1].better, Better::kLower);
  EXPECT_EQ(read->figures[2].better, Better::kNeither);
}

TEST(BenchRecordTest, OtherFilesAreRefused) {
  const json whole = json::parse(ToJson(TwoFigures(1, 2)));
  for (const char* key : {"bench", "subject", "version", "date", "cpu", "cores", "command", "figures"}) {
    json broken = whole;
    broken.erase(key);
    EXPECT_TRUE(absl::IsInvalidArgument(ParseRecord(broken.dump()).status())) << key;
    broken[key] = json::object();
    EXPECT_TRUE(absl::IsInvalidArgument(ParseRecord(broken.dump()).status())) << key;
  }
  for (const char* key : {"name", "unit", "value"}) {
    json broken = whole;
    broken["figures"][1][key] = nullptr;
    EXPECT_TRUE(absl::IsInvalidArgument(ParseRecord(broken.dump()).status())) << key;
  }
  for (const char* text : {"", "{", "[]", "null"}) EXPECT_FALSE(ParseRecord(text).ok()) << text;
  const std::string path = ::testing::TempDir() + "bench_record.json";
  ASSERT_TRUE(WriteFileAtomically(path, whole.dump()).ok());
  const auto other = ReadBaseline({.compare = path}, "engine");
  EXPECT_TRUE(absl::IsInvalidArgument(other.status()));
  EXPECT_THAT(std::string(other.status().message()), HasSubstr("`rankwise bench serve`, not of engine"));
  EXPECT_TRUE(absl::IsNotFound(ReadBaseline({.compare = path + ".none"}, "serve").status()));
  EXPECT_TRUE(ReadBaseline({.compare = path}, "serve")->has_value());
  EXPECT_FALSE(ReadBaseline({}, "serve")->has_value());
}

TEST(BenchRecordTest, TheComparisonStandsBesideEachFigure) {
  const BenchRecord baseline = TwoFigures(100, 10);
  BenchRecord now = TwoFigures(80, 10.5);
  now.subject = "another model";
  now.figures.push_back({"itl", "ms", 1, Better::kLower});
  const Reported plain = ReportTo(now, {}, baseline);
  EXPECT_TRUE(plain.status.ok()) << plain.status;
  EXPECT_THAT(plain.out,
              AllOf(HasSubstr("the figures\n"), HasSubstr("another subject: a \"model\""),
                    HasSubstr("80          100    0.800 WORSE\n"), HasSubstr("10.5           10    1.050\n"),
                    HasSubstr("1 of the figures are in only one of the two"), Not(HasSubstr("another machine"))));
  const Reported strict = ReportTo(now, {.fails_on_regression = true}, baseline);
  EXPECT_TRUE(absl::IsOutOfRange(strict.status)) << strict.status;
  EXPECT_THAT(std::string(strict.status.message()), HasSubstr("1 of 3 figures"));
  EXPECT_TRUE(ReportTo(now, {.tolerance_percent = 20, .fails_on_regression = true}, baseline).status.ok());
  const Reported machine = ReportTo(now, {.is_json = true}, baseline);
  const json out = json::parse(machine.out, nullptr, false);
  ASSERT_TRUE(out.is_object()) << machine.out;
  EXPECT_EQ(out["figures"][0]["baseline"], 100);
  EXPECT_EQ(out["figures"][0]["ratio"], 0.8);
  EXPECT_EQ(out["figures"][0]["worse"], true);
  EXPECT_EQ(out["figures"][1]["worse"], false);
  EXPECT_FALSE(out["figures"][3].contains("baseline"));
  EXPECT_EQ(out["baseline"]["date"], baseline.date);
}

TEST(BenchRecordTest, NothingInCommonIsAnError) {
  BenchRecord now = TwoFigures(1, 1);
  for (Figure& figure : now.figures) figure.unit += "2";
  EXPECT_TRUE(absl::IsInvalidArgument(ReportTo(now, {}, TwoFigures(1, 1)).status));
}

TEST(BenchRecordTest, WhatIsSavedIsABaseline) {
  const std::string path = ::testing::TempDir() + "bench_record_saved.json";
  const BenchRecord record = TwoFigures(100, 10);
  ASSERT_TRUE(ReportTo(record, {.save = path}, std::nullopt).status.ok());
  const auto baseline = ReadBaseline({.compare = path}, "serve");
  ASSERT_TRUE(baseline.ok() && *baseline) << baseline.status();
  EXPECT_EQ(ToJson(**baseline), ToJson(record));
  EXPECT_TRUE(ReportTo(record, {.tolerance_percent = 0, .fails_on_regression = true}, *baseline).status.ok());
}

}  // namespace
}  // namespace rankwise::launch
