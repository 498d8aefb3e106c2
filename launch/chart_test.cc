#include "launch/chart.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>

#include "base/mapped_file.h"

namespace rankwise::launch {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;

Chart TwoLines() {
  return {.title = "a <model> & \"more\"",
          .x_title = "batch",
          .y_title = "MiB",
          .lines = {{.name = "f16", .points = {{10, 400}, {20, 800}}, .markers = {{10, 410}}},
                    {.name = "int8", .points = {{10, 200}, {20, 400}}}},
          .y_limit = 900};
}

TEST(ChartTest, TicksAreRoundAndReachTheMost) {
  EXPECT_THAT(ChartTicks(48), ElementsAre(0, 10, 20, 30, 40, 50));
  EXPECT_THAT(ChartTicks(50), ElementsAre(0, 10, 20, 30, 40, 50));
  EXPECT_THAT(ChartTicks(63553), ElementsAre(0, 20000, 40000, 60000, 80000));
  EXPECT_THAT(ChartTicks(1), ElementsAre(0, ::testing::DoubleEq(0.2), ::testing::DoubleEq(0.4),
                                         ::testing::DoubleEq(0.6), ::testing::DoubleEq(0.8), ::testing::DoubleEq(1)));
  EXPECT_THAT(ChartTicks(0), ElementsAre(0, 1));
}

// The picture is 760 × 460; batch 0 to 20 spans x 80 to 740 and 0 to 1000 MiB spans y 400 to 50.
TEST(ChartTest, SvgPutsPointsWhereTheyBelong) {
  const std::string svg = ChartSvg(TwoLines());
  EXPECT_THAT(svg, HasSubstr("points=\"410.0,260.0 740.0,120.0 \""));
  EXPECT_THAT(svg, HasSubstr("points=\"410.0,330.0 740.0,260.0 \""));
  EXPECT_THAT(svg, HasSubstr("<circle cx=\"410.0\" cy=\"256.5\""));
  EXPECT_THAT(svg, HasSubstr("<line x1=\"80.0\" y1=\"85.0\" x2=\"740.0\" y2=\"85.0\" stroke=\"#888\""));
  EXPECT_THAT(svg, HasSubstr(">900 MiB</text>"));
  EXPECT_THAT(svg, HasSubstr(">batch</text>"));
  EXPECT_THAT(svg, HasSubstr("a &lt;model&gt; &amp; \"more\"</text>"));
  EXPECT_THAT(svg, Not(HasSubstr("<model>")));
}

TEST(ChartTest, DecadesHoldAllThatIsDrawn) {
  EXPECT_THAT(DecadeTicks(2, 300), ElementsAre(1, 10, 100, 1000));
  EXPECT_THAT(DecadeTicks(0.5, 0.5), ElementsAre(::testing::DoubleEq(0.1), 1));
  EXPECT_THAT(DecadeTicks(10, 10), ElementsAre(10, 100));
}

TEST(ChartTest, ALogarithmicAxisIsOneOfDecades) {
  const Chart chart{
      .x_title = "ms", .lines = {{.name = "l", .points = {{1, 0}, {10, 1}, {100, 1}}}}, .is_x_logarithmic = true};
  EXPECT_THAT(ChartSvg(chart), HasSubstr("points=\"80.0,400.0 410.0,50.0 740.0,50.0 \""));
  EXPECT_THAT(ChartSvg(chart), HasSubstr("text-anchor=\"middle\">ms</text>"));
  const Chart empty{.lines = {{.name = "l"}}, .is_x_logarithmic = true};
  EXPECT_THAT(ChartSvg(empty), HasSubstr("</svg>"));
}

TEST(ChartTest, WithoutGnuplotThePngIsRefusedInWords) {
  const std::string path = ::testing::TempDir() + "chart_refused.png";
  const absl::Status status = WriteChartPng(path, TwoLines(), "no-such-gnuplot");
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()), HasSubstr("no-such-gnuplot, which is not installed"));
  EXPECT_FALSE(std::filesystem::exists(path));
}

TEST(ChartTest, GnuplotDrawsThePng) {
  if (std::system("command -v gnuplot >/dev/null") != 0) GTEST_SKIP() << "gnuplot is not installed";
  const std::string path = ::testing::TempDir() + "chart.png";
  Chart chart = TwoLines();
  chart.lines[0].name = "f16 \"quoted\" `id` \\";  // text, not a program
  ASSERT_EQ(WriteChartPng(path, chart), absl::OkStatus());
  EXPECT_THAT(*ReadTextFile(path), StartsWith("\x89PNG"));
  std::filesystem::remove(path);
}

}  // namespace
}  // namespace rankwise::launch
