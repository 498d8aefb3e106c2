#include "launch/latency_report.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/check.h"

namespace rankwise::launch {
namespace {

constexpr double kLeastDrawnMs = 0.01;  // on logarithmic axes
constexpr int kBins = 12, kBarWidth = 50;
constexpr size_t kCurvePoints = 400;

struct Series {
  const char* name;   // in words
  const char* label;  // of its figures
  const std::vector<double>& values;
};

std::array<Series, 4> SeriesOf(const LatencyReport& report) {
  return {{{"time to first token (TTFT)", "ttft", report.first_token},
           {"inter-token latency (ITL)", "itl", report.gap},
           {"time per output token (TPOT)", "tpot", report.per_output_token},
           {"end to end", "e2e", report.total}}};
}

constexpr std::array<std::pair<const char*, double>, 4> kQuantiles = {
    {{"p50", 0.5}, {"p90", 0.9}, {"p99", 0.99}, {"max", 1}}};

double PerSecond(int64_t count, const LatencyReport& report) {
  return report.seconds > 0 ? static_cast<double>(count) / report.seconds : 0;
}

bool HasSlo(const LatencyReport& report) { return report.slo.first_token_ms > 0 || report.slo.per_output_token_ms > 0; }

}  // namespace

LatencyReport Summarize(std::span<const RequestRecord> records, double seconds, const Slo& slo) {
  LatencyReport report{.seconds = seconds, .slo = slo};
  for (const RequestRecord& record : records) {
    report.output_tokens += record.output_tokens;
    if (record.output_tokens > 0) report.prompt_tokens += record.prompt_tokens;
    report.cached_prompt_tokens += record.cached_prompt_tokens;
    if (record.is_cut_off) {
      ++report.cut_off;
      continue;
    }
    if (!record.status.ok()) {
      ++report.failed;
      auto& failures = report.failures[absl::StatusCodeToString(record.status.code())];
      if (failures.count++ == 0) failures.example = std::string(record.status.message());
      continue;
    }
    ++report.succeeded;
    report.first_token.push_back(record.first_token_ms);
    report.total.push_back(record.total_ms);
    report.gap.insert(report.gap.end(), record.gaps_ms.begin(), record.gaps_ms.end());
    double per_output_token = 0;
    if (record.output_tokens > 1) {
      per_output_token =
          std::accumulate(record.gaps_ms.begin(), record.gaps_ms.end(), 0.0) / (record.output_tokens - 1);
      report.per_output_token.push_back(per_output_token);
    }
    report.good += (slo.first_token_ms == 0 || record.first_token_ms <= slo.first_token_ms) &&
                   (slo.per_output_token_ms == 0 || per_output_token <= slo.per_output_token_ms);
  }
  for (auto* values : {&report.first_token, &report.gap, &report.per_output_token, &report.total})
    std::ranges::sort(*values);
  return report;
}

double Quantile(std::span<const double> sorted, double q) {
  if (sorted.empty()) return 0;
  const auto rank = static_cast<int64_t>(std::ceil(q * static_cast<double>(sorted.size())));
  return sorted[static_cast<size_t>(std::clamp<int64_t>(rank, 1, std::ssize(sorted)) - 1)];
}

std::vector<Figure> FiguresOf(const LatencyReport& report) {
  std::vector<Figure> figures;
  for (const Series& series : SeriesOf(report)) {
    for (const auto& [name, q] : kQuantiles) {
      figures.push_back({absl::StrCat(series.label, " ", name), "ms", Quantile(series.values, q), Better::kLower});
    }
  }
  figures.push_back({"succeeded", "requests/s", PerSecond(report.succeeded, report), Better::kHigher});
  figures.push_back({"output", "tokens/s", PerSecond(report.output_tokens, report), Better::kHigher});
  figures.push_back(
      {"total", "tokens/s", PerSecond(report.prompt_tokens + report.output_tokens, report), Better::kHigher});
  if (HasSlo(report)) figures.push_back({"goodput", "requests/s", PerSecond(report.good, report), Better::kHigher});
  figures.push_back({"succeeded", "requests", static_cast<double>(report.succeeded), Better::kNeither});
  figures.push_back({"failed", "requests", static_cast<double>(report.failed), Better::kLower});
  for (const auto& [code, failures] : report.failures) {
    figures.push_back({absl::StrCat("failed ", code), "requests", static_cast<double>(failures.count), Better::kLower});
  }
  figures.push_back({"prompt", "tokens", static_cast<double>(report.prompt_tokens), Better::kNeither});
  figures.push_back({"prompt cached", "tokens", static_cast<double>(report.cached_prompt_tokens), Better::kNeither});
  figures.push_back({"output", "tokens", static_cast<double>(report.output_tokens), Better::kNeither});
  figures.push_back({"measured", "s", report.seconds, Better::kNeither});
  return figures;
}

std::string LatencyText(const LatencyReport& report) {
  std::string text = absl::StrFormat("%-28s", "ms");
  for (const auto& [name, q] : kQuantiles) absl::StrAppendFormat(&text, " %10s", name);
  text += "\n";
  for (const Series& series : SeriesOf(report)) {
    absl::StrAppendFormat(&text, "%-28s", series.name);
    for (const auto& [name, q] : kQuantiles) absl::StrAppendFormat(&text, " %10.2f", Quantile(series.values, q));
    text += "\n";
  }
  absl::StrAppendFormat(&text, "\nrequests  %d succeeded in %.2f s: %.2f/s; %d failed", report.succeeded,
                        report.seconds, PerSecond(report.succeeded, report), report.failed);
  if (report.cut_off > 0) absl::StrAppendFormat(&text, ", %d cut off", report.cut_off);
  absl::StrAppendFormat(&text, "\ntokens    %.1f/s output, %.1f/s with prompts; %d of %d prompt tokens were cached\n",
                        PerSecond(report.output_tokens, report),
                        PerSecond(report.prompt_tokens + report.output_tokens, report), report.cached_prompt_tokens,
                        report.prompt_tokens);
  if (HasSlo(report)) {
    const int64_t ended = report.succeeded + report.failed;
    absl::StrAppendFormat(&text, "goodput   %.2f requests/s, %.1f %%, within", PerSecond(report.good, report),
                          ended > 0 ? 100.0 * static_cast<double>(report.good) / static_cast<double>(ended) : 0.0);
    if (report.slo.first_token_ms > 0) absl::StrAppendFormat(&text, " TTFT %g ms", report.slo.first_token_ms);
    if (report.slo.per_output_token_ms > 0) absl::StrAppendFormat(&text, " TPOT %g ms", report.slo.per_output_token_ms);
    text += "\n";
  }
  for (const auto& [code, failures] : report.failures) {
    absl::StrAppendFormat(&text, "failed    %d x %s: %s\n", failures.count, code, failures.example);
  }
  if (!report.first_token.empty()) absl::StrAppend(&text, "\nTTFT, ms\n", Histogram(report.first_token));
  if (!report.gap.empty()) absl::StrAppend(&text, "\nITL, ms\n", Histogram(report.gap));
  return text;
}

std::string Histogram(std::span<const double> sorted_ms) {
  if (sorted_ms.empty()) return "";
  const double least = std::max(sorted_ms.front(), kLeastDrawnMs), most = std::max(sorted_ms.back(), least);
  const int bins = most > least ? kBins : 1;
  const double factor = std::pow(most / least, 1.0 / bins);
  std::vector<int64_t> counts;
  auto from = sorted_ms.begin();
  double end = least;
  std::vector<double> ends;
  for (int bin = 0; bin < bins; ++bin) {
    ends.push_back(end *= factor);
    const auto to = bin + 1 < bins ? std::upper_bound(from, sorted_ms.end(), end) : sorted_ms.end();
    counts.push_back(to - from);
    from = to;
  }
  const int64_t tallest = *std::ranges::max_element(counts);
  std::string text;
  for (size_t bin = 0; bin < counts.size(); ++bin) {
    const auto width =
        static_cast<size_t>(std::ceil(kBarWidth * static_cast<double>(counts[bin]) / static_cast<double>(tallest)));
    absl::StrAppendFormat(&text, "%10.2f - %9.2f  %-*s %d\n", bin == 0 ? sorted_ms.front() : ends[bin - 1],
                          bin + 1 < counts.size() ? ends[bin] : sorted_ms.back(), kBarWidth, std::string(width, '#'),
                          counts[bin]);
  }
  return text;
}

Chart LatencyChart(const LatencyReport& report, const std::string& title) {
  Chart chart{.title = title, .x_title = "ms", .y_title = "share", .is_x_logarithmic = true};
  for (const Series& series : SeriesOf(report)) {
    ChartLine& line = chart.lines.emplace_back(ChartLine{.name = series.name});
    const size_t count = series.values.size(), points = std::min(count, kCurvePoints);
    for (size_t i = 1; i <= points; ++i) {
      const size_t rank = i * count / points;
      line.points.emplace_back(std::max(series.values[rank - 1], kLeastDrawnMs),
                               static_cast<double>(rank) / static_cast<double>(count));
    }
  }
  return chart;
}

}  // namespace rankwise::launch
