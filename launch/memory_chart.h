#pragma once

#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"

// Memory against batch, one line for each KV format.
namespace rankwise::launch {

struct ChartLine {
  std::string name;                                // in the legend
  std::vector<std::pair<double, double>> points;   // batch, MiB; rising batch
  std::vector<std::pair<double, double>> markers;  // what was measured: drawn as circles
};

struct Chart {
  std::string title;
  std::vector<ChartLine> lines;
  double limit_mib = 0;  // drawn as a level; 0: none
};

// Round values from 0 to at least `most`, about five of them; {0, 1} for what is not positive.
std::vector<double> ChartTicks(double most);

// A whole SVG file. Names and title may hold any text.
std::string ChartSvg(const Chart& chart);

// Draws a PNG by running `gnuplot`. FailedPrecondition when it is not installed.
absl::Status WriteChartPng(const std::string& path, const Chart& chart, const std::string& gnuplot = "gnuplot");

}  // namespace rankwise::launch
