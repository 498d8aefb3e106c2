#include "launch/chart.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <filesystem>
#include <limits>
#include <system_error>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"
#include "absl/time/clock.h"
#include "base/mapped_file.h"
#include "base/status_macros.h"
#include "launch/child_process.h"

namespace rankwise::launch {
namespace {

constexpr double kWidth = 760, kHeight = 460;
constexpr double kLeft = 80, kRight = 740, kTop = 50, kBottom = 400;
constexpr std::array<const char*, 6> kColours = {"#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf"};
constexpr absl::Duration kPatience = absl::Seconds(60);

const char* ColourOf(size_t line) { return kColours[line % kColours.size()]; }

std::string XmlText(const std::string& text) {
  return absl::StrReplaceAll(text, {{"&", "&amp;"}, {"<", "&lt;"}, {">", "&gt;"}});
}

// From values to the picture's units.
class Scale {
 public:
  explicit Scale(const Chart& chart) : is_x_logarithmic_(chart.is_x_logarithmic) {
    double x_least = std::numeric_limits<double>::infinity(), x_most = 0, y_most = chart.y_limit;
    for (const ChartLine& line : chart.lines) {
      for (const auto* points : {&line.points, &line.markers}) {
        for (const auto& [x, y] : *points) {
          x_least = std::min(x_least, x);
          x_most = std::max(x_most, x);
          y_most = std::max(y_most, y);
        }
      }
    }
    if (is_x_logarithmic_) {
      x_ticks_ = x_most > 0 ? DecadeTicks(x_least, x_most) : std::vector<double>{1, 10};
    } else {
      x_ticks_ = ChartTicks(x_most);
    }
    y_ticks_ = ChartTicks(y_most);
  }

  double x(double value) const {
    const double first = Along(x_ticks_.front()), last = Along(x_ticks_.back());
    return kLeft + (kRight - kLeft) * (Along(value) - first) / (last - first);
  }
  double y(double value) const { return kBottom - (kBottom - kTop) * value / y_ticks_.back(); }
  const std::vector<double>& x_ticks() const { return x_ticks_; }
  const std::vector<double>& y_ticks() const { return y_ticks_; }

 private:
  double Along(double x) const { return is_x_logarithmic_ ? std::log10(x) : x; }

  const bool is_x_logarithmic_;
  std::vector<double> x_ticks_, y_ticks_;
};

std::string SvgText(double x, double y, const std::string& anchor, const std::string& text) {
  return absl::StrFormat("<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"%s\">%s</text>\n", x, y, anchor, XmlText(text));
}

std::string SvgLevel(double x1, double y1, double x2, double y2, const std::string& style) {
  return absl::StrFormat("<line x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\" %s/>\n", x1, y1, x2, y2, style);
}

std::string SvgAxes(const Chart& chart, const Scale& scale) {
  std::string svg;
  for (const double y : scale.y_ticks()) {
    absl::StrAppend(&svg, SvgLevel(kLeft, scale.y(y), kRight, scale.y(y), "stroke=\"#ddd\""),
                    SvgText(kLeft - 8, scale.y(y) + 4, "end", absl::StrFormat("%g", y)));
  }
  for (const double x : scale.x_ticks()) {
    absl::StrAppend(&svg, SvgLevel(scale.x(x), kBottom, scale.x(x), kBottom + 5, "stroke=\"#333\""),
                    SvgText(scale.x(x), kBottom + 20, "middle", absl::StrFormat("%g", x)));
  }
  absl::StrAppend(&svg, SvgLevel(kLeft, kBottom, kRight, kBottom, "stroke=\"#333\""),
                  SvgLevel(kLeft, kTop, kLeft, kBottom, "stroke=\"#333\""),
                  SvgText((kLeft + kRight) / 2, kBottom + 44, "middle", chart.x_title),
                  SvgText(kLeft - 8, kTop - 12, "end", chart.y_title));
  return svg;
}

std::string SvgLine(const Scale& scale, const ChartLine& line, size_t index) {
  std::string svg =
      absl::StrFormat("<polyline fill=\"none\" stroke-width=\"2\" stroke=\"%s\" points=\"", ColourOf(index));
  for (const auto& [x, y] : line.points) absl::StrAppendFormat(&svg, "%.1f,%.1f ", scale.x(x), scale.y(y));
  absl::StrAppend(&svg, "\"/>\n");
  for (const auto& [x, y] : line.markers) {
    absl::StrAppendFormat(&svg,
                          "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"4\" fill=\"white\" stroke=\"%s\" stroke-width=\"2\"/>\n",
                          scale.x(x), scale.y(y), ColourOf(index));
  }
  const double y = kTop + 16 + 18 * static_cast<double>(index);
  absl::StrAppend(&svg,
                  SvgLevel(kLeft + 12, y - 4, kLeft + 36, y - 4,
                           absl::StrCat("stroke-width=\"2\" stroke=\"", ColourOf(index), "\"")),
                  SvgText(kLeft + 42, y, "start", line.name + (line.markers.empty() ? "" : " (circles: measured)")));
  return svg;
}

// In gnuplot's double quotes, with its enhanced text off.
std::string Quoted(const std::string& text) {
  return absl::StrCat("\"", absl::StrReplaceAll(text, {{"\\", "\\\\"}, {"\"", "\\\""}, {"\n", " "}, {"`", "'"}}), "\"");
}

std::string GnuplotBlock(const std::string& name, const std::vector<std::pair<double, double>>& points) {
  std::string block = absl::StrCat("$", name, " << END\n");
  for (const auto& [x, y] : points) absl::StrAppendFormat(&block, "%.17g %.17g\n", x, y);
  return block + "END\n";
}

std::string GnuplotScript(const Chart& chart, const std::string& output) {
  std::string blocks, plots;
  for (size_t i = 0; i < chart.lines.size(); ++i) {
    const ChartLine& line = chart.lines[i];
    absl::StrAppend(&blocks, GnuplotBlock(absl::StrCat("line", i), line.points));
    absl::StrAppendFormat(&plots, "%s$line%d using 1:2 with lines lw 2 lc rgb '%s' title %s", i > 0 ? ", " : "", i,
                          ColourOf(i), Quoted(line.name));
    if (line.markers.empty()) continue;
    absl::StrAppend(&blocks, GnuplotBlock(absl::StrCat("markers", i), line.markers));
    absl::StrAppendFormat(&plots, ", $markers%d using 1:2 with points pt 6 ps 1.5 lw 2 lc rgb '%s' title %s", i,
                          ColourOf(i), Quoted(line.name + ", measured"));
  }
  if (chart.y_limit > 0)
    absl::StrAppendFormat(&plots, ", %.17g with lines lw 2 dt 2 lc rgb '#888888' title 'limit'", chart.y_limit);
  return absl::StrCat("set terminal pngcairo noenhanced size ", kWidth, ",", kHeight, "\nset output ", Quoted(output),
                      "\nset title ", Quoted(chart.title), "\nset xlabel ", Quoted(chart.x_title), "\nset ylabel ",
                      Quoted(chart.y_title), chart.is_x_logarithmic ? "\nset logscale x" : "\nset xrange [0:*]",
                      "\nset yrange [0:*]\nset grid ytics\nset key top left opaque\n", blocks, "plot ", plots, "\n");
}

}  // namespace

std::vector<double> ChartTicks(double most) {
  if (!(most > 0)) return {0, 1};
  const double rough = most / 5;
  const double power = std::pow(10, std::floor(std::log10(rough)));
  double step = 10 * power;
  for (const double factor : {5.0, 2.0, 1.0}) {
    if (rough <= factor * power) step = factor * power;
  }
  std::vector<double> ticks = {0};
  while (ticks.back() < most) ticks.push_back(static_cast<double>(ticks.size()) * step);
  return ticks;
}

std::vector<double> DecadeTicks(double least, double most) {
  const int first = static_cast<int>(std::floor(std::log10(least)));
  const int last = std::max(first + 1, static_cast<int>(std::ceil(std::log10(most))));
  std::vector<double> ticks;
  for (int power = first; power <= last; ++power) ticks.push_back(std::pow(10, power));
  return ticks;
}

std::string ChartSvg(const Chart& chart) {
  const Scale scale(chart);
  std::string svg = absl::StrFormat(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %g %g\" font-family=\"sans-serif\" font-size=\"12\">\n"
      "<rect width=\"%g\" height=\"%g\" fill=\"white\"/>\n",
      kWidth, kHeight, kWidth, kHeight);
  absl::StrAppend(&svg, SvgText(kWidth / 2, 22, "middle", chart.title), SvgAxes(chart, scale));
  for (size_t i = 0; i < chart.lines.size(); ++i) absl::StrAppend(&svg, SvgLine(scale, chart.lines[i], i));
  if (chart.y_limit > 0) {
    const double y = scale.y(chart.y_limit);
    absl::StrAppend(&svg, SvgLevel(kLeft, y, kRight, y, "stroke=\"#888\" stroke-dasharray=\"6 4\""),
                    SvgText(kRight, y - 5, "end", absl::StrFormat("%g %s", chart.y_limit, chart.y_title)));
  }
  return svg + "</svg>\n";
}

absl::Status WriteChartPng(const std::string& path, const Chart& chart, const std::string& gnuplot) {
  RW_ASSIGN_OR_RETURN(const PrivateFolder folder, PrivateFolder::Create(TemporaryParent()));
  const std::string script = folder.path() + "/chart.gp", picture = folder.path() + "/chart.png";
  RW_RETURN_IF_ERROR(WriteFileAtomically(script, GnuplotScript(chart, picture)));
  auto child = ChildProcess::Start({.command = {gnuplot, script}, .log_path = folder.path() + "/log"});
  if (absl::IsNotFound(child.status())) {
    return absl::FailedPreconditionError(absl::StrCat(
        "a PNG needs ", gnuplot, ", which is not installed (apt-get install gnuplot-nox); an SVG needs nothing"));
  }
  RW_RETURN_IF_ERROR(child.status());
  const auto ended = (*child)->Wait(absl::Now() + kPatience);
  if (!ended || !ended->is_success()) {
    return absl::InternalError(
        absl::StrCat(gnuplot, ": ", ended ? ended->ToString() : "did not end", ": ", (*child)->LogTail()));
  }
  RW_ASSIGN_OR_RETURN(const std::string bytes, ReadTextFile(picture));
  return WriteFileAtomically(path, bytes);
}

}  // namespace rankwise::launch
