#include "launch/memory_chart.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <filesystem>
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

double Most(const Chart& chart, bool of_batch) {
  double most = of_batch ? 0 : chart.limit_mib;
  for (const ChartLine& line : chart.lines) {
    for (const auto* points : {&line.points, &line.markers}) {
      for (const auto& [batch, mib] : *points) most = std::max(most, of_batch ? batch : mib);
    }
  }
  return most;
}

std::string XmlText(const std::string& text) {
  return absl::StrReplaceAll(text, {{"&", "&amp;"}, {"<", "&lt;"}, {">", "&gt;"}});
}

// From a batch and MiB to the picture's units.
class Scale {
 public:
  explicit Scale(const Chart& chart)
      : batch_ticks_(ChartTicks(Most(chart, true))), mib_ticks_(ChartTicks(Most(chart, false))) {}

  double x(double batch) const { return kLeft + (kRight - kLeft) * batch / batch_ticks_.back(); }
  double y(double mib) const { return kBottom - (kBottom - kTop) * mib / mib_ticks_.back(); }
  const std::vector<double>& batch_ticks() const { return batch_ticks_; }
  const std::vector<double>& mib_ticks() const { return mib_ticks_; }

 private:
  const std::vector<double> batch_ticks_, mib_ticks_;
};

std::string SvgText(double x, double y, const std::string& anchor, const std::string& text) {
  return absl::StrFormat("<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"%s\">%s</text>\n", x, y, anchor, XmlText(text));
}

std::string SvgLevel(double x1, double y1, double x2, double y2, const std::string& style) {
  return absl::StrFormat("<line x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\" %s/>\n", x1, y1, x2, y2, style);
}

std::string SvgAxes(const Scale& scale) {
  std::string svg;
  for (const double mib : scale.mib_ticks()) {
    absl::StrAppend(&svg, SvgLevel(kLeft, scale.y(mib), kRight, scale.y(mib), "stroke=\"#ddd\""),
                    SvgText(kLeft - 8, scale.y(mib) + 4, "end", absl::StrFormat("%g", mib)));
  }
  for (const double batch : scale.batch_ticks()) {
    absl::StrAppend(&svg, SvgLevel(scale.x(batch), kBottom, scale.x(batch), kBottom + 5, "stroke=\"#333\""),
                    SvgText(scale.x(batch), kBottom + 20, "middle", absl::StrFormat("%g", batch)));
  }
  absl::StrAppend(&svg, SvgLevel(kLeft, kBottom, kRight, kBottom, "stroke=\"#333\""),
                  SvgLevel(kLeft, kTop, kLeft, kBottom, "stroke=\"#333\""),
                  SvgText((kLeft + kRight) / 2, kBottom + 44, "middle", "batch (sequences at full length)"),
                  SvgText(kLeft - 8, kTop - 12, "end", "MiB"));
  return svg;
}

std::string SvgLine(const Scale& scale, const ChartLine& line, size_t index) {
  std::string svg =
      absl::StrFormat("<polyline fill=\"none\" stroke-width=\"2\" stroke=\"%s\" points=\"", ColourOf(index));
  for (const auto& [batch, mib] : line.points) absl::StrAppendFormat(&svg, "%.1f,%.1f ", scale.x(batch), scale.y(mib));
  absl::StrAppend(&svg, "\"/>\n");
  for (const auto& [batch, mib] : line.markers) {
    absl::StrAppendFormat(&svg,
                          "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"4\" fill=\"white\" stroke=\"%s\" stroke-width=\"2\"/>\n",
                          scale.x(batch), scale.y(mib), ColourOf(index));
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
  for (const auto& [batch, mib] : points) absl::StrAppendFormat(&block, "%.17g %.17g\n", batch, mib);
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
  if (chart.limit_mib > 0)
    absl::StrAppendFormat(&plots, ", %.17g with lines lw 2 dt 2 lc rgb '#888888' title 'limit'", chart.limit_mib);
  return absl::StrCat("set terminal pngcairo noenhanced size ", kWidth, ",", kHeight, "\nset output ", Quoted(output),
                      "\nset title ", Quoted(chart.title),
                      "\nset xlabel 'batch (sequences at full length)'\nset ylabel 'MiB'\nset xrange [0:*]\nset yrange "
                      "[0:*]\nset grid ytics\nset key top left opaque\n",
                      blocks, "plot ", plots, "\n");
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

std::string ChartSvg(const Chart& chart) {
  const Scale scale(chart);
  std::string svg = absl::StrFormat(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %g %g\" font-family=\"sans-serif\" font-size=\"12\">\n"
      "<rect width=\"%g\" height=\"%g\" fill=\"white\"/>\n",
      kWidth, kHeight, kWidth, kHeight);
  absl::StrAppend(&svg, SvgText(kWidth / 2, 22, "middle", chart.title), SvgAxes(scale));
  for (size_t i = 0; i < chart.lines.size(); ++i) absl::StrAppend(&svg, SvgLine(scale, chart.lines[i], i));
  if (chart.limit_mib > 0) {
    const double y = scale.y(chart.limit_mib);
    absl::StrAppend(&svg, SvgLevel(kLeft, y, kRight, y, "stroke=\"#888\" stroke-dasharray=\"6 4\""),
                    SvgText(kRight, y - 5, "end", absl::StrFormat("%g MiB", chart.limit_mib)));
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
