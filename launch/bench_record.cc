#include "launch/bench_record.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <thread>
#include <tuple>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "base/check.h"
#include "base/mapped_file.h"
#include "base/status_macros.h"

namespace rankwise::launch {

NLOHMANN_JSON_SERIALIZE_ENUM(Better,
                             {{Better::kNeither, nullptr}, {Better::kHigher, "higher"}, {Better::kLower, "lower"}})

namespace {

using Json = nlohmann::ordered_json;

std::string CpuModel() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (absl::StartsWith(line, "model name")) {
      return std::string(absl::StripAsciiWhitespace(line.substr(std::min(line.find(':'), line.size() - 1) + 1)));
    }
  }
  return "unknown";
}

std::string CommandLine() {
  std::ifstream file("/proc/self/cmdline");
  std::vector<std::string> words;
  for (std::string word; std::getline(file, word, '\0');) words.push_back(word);
  return absl::StrJoin(words, " ");
}

Json JsonOf(const Figure& figure) {
  return {{"name", figure.name}, {"unit", figure.unit}, {"value", figure.value}, {"better", figure.better}};
}

Json JsonOf(const BenchRecord& record) {
  Json json{{"bench", record.bench}, {"subject", record.subject}, {"version", record.version}, {"date", record.date},
            {"cpu", record.cpu},     {"cores", record.cores},     {"command", record.command}};
  json["figures"] = Json::array();
  for (const Figure& figure : record.figures) json["figures"].push_back(JsonOf(figure));
  return json;
}

std::string Dump(const Json& json) { return json.dump(2, ' ', false, Json::error_handler_t::replace) + "\n"; }

// False when `object` has no such text or number.
bool Take(const Json& object, const char* key, std::string& value) {
  if (!object.contains(key) || !object[key].is_string()) return false;
  value = object[key].get<std::string>();
  return true;
}
template <typename T>
bool Take(const Json& object, const char* key, T& value) {
  if (!object.contains(key) || !object[key].is_number()) return false;
  value = object[key].get<T>();
  return true;
}

const char* NameOf(FigureChange::Verdict verdict) {
  switch (verdict) {
    case FigureChange::Verdict::kSame:
      return "";
    case FigureChange::Verdict::kBetter:
      return " better";
    case FigureChange::Verdict::kWorse:
      return " WORSE";
  }
  RW_CHECK(false);
}

struct ComparedFigure {
  const Figure* figure;
  FigureChange change;
};

// Those that both have, in the record's order.
std::vector<ComparedFigure> CompareAll(const BenchRecord& record, const BenchRecord& baseline, double tolerance) {
  std::map<std::pair<std::string, std::string>, double> values;
  for (const Figure& figure : baseline.figures) values[{figure.name, figure.unit}] = figure.value;
  std::vector<ComparedFigure> compared;
  for (const Figure& figure : record.figures) {
    if (const auto found = values.find({figure.name, figure.unit}); found != values.end())
      compared.push_back({&figure, Compare(figure, found->second, tolerance)});
  }
  return compared;
}

std::string ComparisonText(const BenchRecord& record, const BenchRecord& baseline,
                           const std::vector<ComparedFigure>& compared) {
  std::string text = absl::StrCat("\nbaseline: ", baseline.date, ", version ", baseline.version, "\n");
  for (const auto& [what, now, then] : {std::tuple("subject", record.subject, baseline.subject),
                                        std::tuple("machine", absl::StrCat(record.cpu, ", ", record.cores, " cores"),
                                                   absl::StrCat(baseline.cpu, ", ", baseline.cores, " cores"))}) {
    if (now != then) absl::StrAppend(&text, "another ", what, ": ", then, "\n");
  }
  absl::StrAppendFormat(&text, "%-46s %-16s %12s %12s %8s\n", "figure", "unit", "now", "baseline", "ratio");
  for (const auto& [figure, change] : compared) {
    absl::StrAppendFormat(&text, "%-46s %-16s %12.6g %12.6g %8.3f%s\n", figure->name, figure->unit, figure->value,
                          change.baseline, change.ratio, NameOf(change.verdict));
  }
  if (const size_t apart = record.figures.size() + baseline.figures.size() - 2 * compared.size(); apart > 0)
    absl::StrAppend(&text, apart, " of the figures are in only one of the two\n");
  return text;
}

std::string ComparisonJson(const BenchRecord& record, const BenchRecord& baseline,
                           const std::vector<ComparedFigure>& compared) {
  Json json = JsonOf(record), old = JsonOf(baseline);
  old.erase("figures");
  json["baseline"] = std::move(old);
  for (const auto& [figure, change] : compared) {
    Json& there = json["figures"][static_cast<size_t>(figure - record.figures.data())];
    there["baseline"] = change.baseline;
    there["ratio"] = change.ratio;
    there["worse"] = change.verdict == FigureChange::Verdict::kWorse;
  }
  return Dump(json);
}

}  // namespace

BenchRecord StartRecord(const std::string& bench) {
  return {.bench = bench,
          .version = RANKWISE_VERSION,
          .date = absl::FormatTime("%Y-%m-%dT%H:%M:%SZ", absl::Now(), absl::UTCTimeZone()),
          .cpu = CpuModel(),
          .cores = static_cast<int>(std::thread::hardware_concurrency()),
          .command = CommandLine()};
}

FigureChange Compare(const Figure& figure, double baseline, double tolerance) {
  FigureChange change{.baseline = baseline};
  if (figure.value != baseline) change.ratio = figure.value / baseline;
  const double allowed = tolerance * std::abs(baseline), more = figure.value - baseline;
  if (figure.better == Better::kNeither || std::abs(more) <= allowed) return change;
  change.verdict =
      (more > 0) == (figure.better == Better::kHigher) ? FigureChange::Verdict::kBetter : FigureChange::Verdict::kWorse;
  return change;
}

std::string ToJson(const BenchRecord& record) { return Dump(JsonOf(record)); }

absl::StatusOr<BenchRecord> ParseRecord(const std::string& text) {
  const Json json = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  BenchRecord record;
  bool is_whole = json.is_object() && Take(json, "bench", record.bench) && Take(json, "subject", record.subject) &&
                  Take(json, "version", record.version) && Take(json, "date", record.date) &&
                  Take(json, "cpu", record.cpu) && Take(json, "cores", record.cores) &&
                  Take(json, "command", record.command) && json.contains("figures") && json["figures"].is_array();
  if (!is_whole) return absl::InvalidArgumentError("not the record of a benchmark");
  for (const Json& item : json["figures"]) {
    Figure figure;
    is_whole = item.is_object() && Take(item, "name", figure.name) && Take(item, "unit", figure.unit) &&
               Take(item, "value", figure.value) && item.contains("better");
    if (!is_whole) return absl::InvalidArgumentError(absl::StrCat("not a figure of a benchmark: ", item.dump()));
    figure.better = item["better"].get<Better>();
    record.figures.push_back(std::move(figure));
  }
  return record;
}

void AddRecordFlags(CLI::App& command, RecordFlags& flags) {
  command.add_flag("--json", flags.is_json, "Print JSON");
  command.add_option("--save", flags.save, "Also write the JSON to this file, as a baseline");
  CLI::Option* compare = command.add_option("--compare", flags.compare, "Baseline to print every figure beside");
  command.add_option("--tolerance", flags.tolerance_percent, "Percent that a figure may be off the baseline's")
      ->needs(compare)
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command
      .add_flag("--fail-on-regression", flags.fails_on_regression,
                "Exit code 1 when a figure is worse than the baseline's by more than that")
      ->needs(compare);
}

absl::StatusOr<std::optional<BenchRecord>> ReadBaseline(const RecordFlags& flags, const std::string& bench) {
  if (flags.compare.empty()) return std::nullopt;
  RW_ASSIGN_OR_RETURN(const std::string text, ReadTextFile(flags.compare));
  absl::StatusOr<BenchRecord> record = ParseRecord(text);
  if (!record.ok()) {
    return absl::InvalidArgumentError(absl::StrCat("--compare ", flags.compare, ": ", record.status().message()));
  }
  if (record->bench != bench) {
    return absl::InvalidArgumentError(
        absl::StrCat("--compare ", flags.compare, " is of `rankwise bench ", record->bench, "`, not of ", bench));
  }
  return *std::move(record);
}

absl::Status Report(const BenchRecord& record, const std::string& text, const RecordFlags& flags,
                    const std::optional<BenchRecord>& baseline) {
  std::vector<ComparedFigure> compared;
  if (baseline) compared = CompareAll(record, *baseline, flags.tolerance_percent / 100);
  if (flags.is_json) {
    absl::PrintF("%s", baseline ? ComparisonJson(record, *baseline, compared) : ToJson(record));
  } else {
    absl::PrintF("%s%s", text, baseline ? ComparisonText(record, *baseline, compared) : "");
  }
  std::fflush(stdout);
  if (!flags.save.empty()) RW_RETURN_IF_ERROR(WriteFileAtomically(flags.save, ToJson(record)));
  if (baseline && compared.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "--compare ", flags.compare, " has no figure in common with this run: it was made by ", baseline->command));
  }
  const auto worse = std::ranges::count_if(
      compared, [](const ComparedFigure& one) { return one.change.verdict == FigureChange::Verdict::kWorse; });
  if (worse > 0 && flags.fails_on_regression) {
    return absl::OutOfRangeError(absl::StrCat(worse, " of ", compared.size(), " figures are worse than in ",
                                              flags.compare, " by more than ", flags.tolerance_percent, " %"));
  }
  return absl::OkStatus();
}

}  // namespace rankwise::launch
