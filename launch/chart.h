#pragma once

#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"

// A few lines over two axes, as a picture.
namespace rankwise::launch {

struct ChartLine {
  std::string name;                                // in the legend
  std::vector<std::pair<double, double>> points;   // rising x
  std::vector<std::pair<double, double>> markers;  // what was measured: drawn as circles
};

struct Chart {
  std::string title;
  std::string x_title, y_title;
  std::vector<ChartLine> lines;
  double y_limit = 0;             // drawn as a level; 0: none
  bool is_x_logarithmic = false;  // in whole decades; every x is positive then. Else both axes begin at 0
};

// Round values from 0 to at least `most`, about five of them; {0, 1} for what is not positive.
std::vector<double> ChartTicks(double most);
// The powers of ten from the last one that is not above `least` to the first one that is not below `most`, two at
// least. REQUIRES: 0 < least <= most.
std::vector<double> DecadeTicks(double least, double most);

// A whole SVG file. Names and titles may hold any text.
std::string ChartSvg(const Chart& chart);

// Draws a PNG by running `gnuplot`. FailedPrecondition when it is not installed.
absl::Status WriteChartPng(const std::string& path, const Chart& chart, const std::string& gnuplot = "gnuplot");

}  // namespace rankwise::launch
