#include "launch/latency_report.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace rankwise::launch {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;
using ::testing::SizeIs;

// Three tokens, the first after `first` ms, the others `gap` apart.
RequestRecord Whole(double first, double gap) {
  return {.prompt_tokens = 10,
          .output_tokens = 3,
          .first_token_ms = first,
          .total_ms = first + 2 * gap,
          .gaps_ms = {gap, gap}};
}

std::map<std::string, double> Values(const LatencyReport& report) {
  std::map<std::string, double> values;
  for (const Figure& figure : FiguresOf(report)) {
    EXPECT_TRUE(values.emplace(absl::StrCat(figure.name, ", ", figure.unit), figure.value).second) << figure.name;
  }
  return values;
}

TEST(LatencyReportTest, QuantilesAreNearestRanks) {
  std::vector<double> values(100);
  for (int i = 0; i < 100; ++i) values[static_cast<size_t>(i)] = i + 1;
  EXPECT_EQ(Quantile(values, 0.5), 50);
  EXPECT_EQ(Quantile(values, 0.99), 99);
  EXPECT_EQ(Quantile(values, 1), 100);
  EXPECT_EQ(Quantile({{7.0}}, 0.5), 7);
  EXPECT_EQ(Quantile({{1.0, 2.0, 3.0}}, 0.5), 2);
  EXPECT_EQ(Quantile({{1.0, 2.0, 3.0}}, 0.9), 3);
  EXPECT_EQ(Quantile({}, 0.5), 0);
}

TEST(LatencyReportTest, CountsWhatSucceededAndRatesWhatWasReceived) {
  RequestRecord failed{
      .status = absl::UnavailableError("gone"), .prompt_tokens = 10, .output_tokens = 1, .first_token_ms = 5000};
  const RequestRecord refused{.status = absl::ResourceExhaustedError("full"), .prompt_tokens = 10};
  RequestRecord cut_off = Whole(9000, 9000);
  cut_off.is_cut_off = true;
  cut_off.output_tokens = 2;
  RequestRecord drafted{.prompt_tokens = 10,
                        .cached_prompt_tokens = 4,
                        .output_tokens = 5,
                        .first_token_ms = 30,
                        .total_ms = 50,
                        .gaps_ms = {20}};  // four tokens in one message
  const std::vector<RequestRecord> records = {Whole(40, 10), Whole(20, 30), failed, drafted, refused, cut_off, failed};
  const LatencyReport report = Summarize(records, 2, {.first_token_ms = 35, .per_output_token_ms = 20});
  EXPECT_THAT(report.first_token, ElementsAre(20, 30, 40));
  EXPECT_THAT(report.gap, ElementsAre(10, 10, 20, 30, 30));
  EXPECT_THAT(report.per_output_token, ElementsAre(5, 10, 30));
  EXPECT_THAT(report.total, ElementsAre(50, 60, 80));
  EXPECT_EQ(report.succeeded, 3);
  EXPECT_EQ(report.failed, 3);
  EXPECT_EQ(report.cut_off, 1);
  EXPECT_EQ(report.good, 1);  // the drafted one: 40 ms are too long for a first token, 30 for another
  EXPECT_EQ(report.failures.at("UNAVAILABLE").count, 2);
  EXPECT_EQ(report.failures.at("RESOURCE_EXHAUSTED").example, "full");
  auto values = Values(report);
  EXPECT_EQ(values["ttft p50, ms"], 30);
  EXPECT_EQ(values["itl max, ms"], 30);
  EXPECT_EQ(values["succeeded, requests/s"], 1.5);
  EXPECT_EQ(values["goodput, requests/s"], 0.5);
  EXPECT_EQ(values["output, tokens/s"], (3 + 3 + 1 + 5 + 2 + 1) / 2.0);
  EXPECT_EQ(values["total, tokens/s"], (15 + 60) / 2.0);
  EXPECT_EQ(values["prompt cached, tokens"], 4);
  EXPECT_EQ(values["failed UNAVAILABLE, requests"], 2);
  EXPECT_THAT(
      LatencyText(report),
      AllOf(HasSubstr("3 succeeded in 2.00 s: 1.50/s; 3 failed, 1 cut off"), HasSubstr("2 x UNAVAILABLE: gone"),
            HasSubstr("goodput   0.50 requests/s, 16.7 %, within TTFT 35 ms TPOT 20 ms"), HasSubstr("ITL, ms")));
}

TEST(LatencyReportTest, OfNothingThereIsNothing) {
  const LatencyReport report = Summarize({}, 0, {});
  for (const auto& [name, value] : Values(report)) EXPECT_EQ(value, 0) << name;
  EXPECT_THAT(LatencyText(report),
              AllOf(HasSubstr("0 succeeded"), Not(HasSubstr("goodput")), Not(HasSubstr("TTFT, ms"))));
  EXPECT_THAT(Histogram({}), IsEmpty());
  EXPECT_THAT(ChartSvg(LatencyChart(report, "none")), HasSubstr("</svg>"));
}

TEST(LatencyReportTest, HistogramCountsEveryValueOnce) {
  std::vector<double> values;
  for (double value = 1; value < 4096; value *= 1.01) values.push_back(value);
  const std::vector<std::string> lines = absl::StrSplit(Histogram(values), '\n', absl::SkipEmpty());
  EXPECT_THAT(lines, SizeIs(12));
  size_t sum = 0;
  for (const std::string& line : lines) {
    const size_t count = std::stoul(line.substr(line.rfind(' ')));
    EXPECT_NEAR(count, values.size() / 12.0, 2) << line;  // as many in each factor
    sum += count;
  }
  EXPECT_EQ(sum, values.size());
  EXPECT_THAT(lines.front(), HasSubstr("      1.00 -"));
  EXPECT_THAT(Histogram({{3.0, 3.0}}),
              HasSubstr("      3.00 -      3.00  ################################################## 2"));
}

TEST(LatencyReportTest, TheChartHasADistributionFunctionOfEach) {
  std::vector<RequestRecord> records;
  for (int i = 1; i <= 1000; ++i) records.push_back(Whole(i, 2));
  const Chart chart = LatencyChart(Summarize(records, 1, {}), "title");
  ASSERT_THAT(chart.lines, SizeIs(4));
  EXPECT_TRUE(chart.is_x_logarithmic);
  const auto& points = chart.lines[0].points;
  EXPECT_LE(points.size(), 400u);
  EXPECT_EQ(points.back(), std::pair(1000.0, 1.0));
  for (size_t i = 1; i < points.size(); ++i) {
    EXPECT_GT(points[i].second, points[i - 1].second);
    EXPECT_EQ(points[i].first, 1000 * points[i].second);
  }
}

}  // namespace
}  // namespace rankwise::launch
