#pragma once

#include <CLI/CLI.hpp>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

// What a benchmark has found, in the one form that all of them print, keep and compare.
namespace rankwise::launch {

enum class Better { kNeither, kHigher, kLower };

// Name and unit together tell a figure from the others of its record.
struct Figure {
  std::string name, unit;
  double value = 0;
  Better better = Better::kNeither;
};

struct BenchRecord {
  std::string bench;    // "serve"
  std::string subject;  // what was measured: model, ranks, formats, device
  std::string version;  // of Rankwise
  std::string date;     // UTC, RFC 3339
  std::string cpu;      // its model
  int cores = 0;
  std::string command;
  std::vector<Figure> figures;
};

// Without figures: this program, this machine and this moment.
BenchRecord StartRecord(const std::string& bench);

// A figure beside the baseline's.
struct FigureChange {
  enum class Verdict { kSame, kBetter, kWorse };
  double baseline = 0;
  double ratio = 1;  // value / baseline; infinite when only the baseline is 0
  Verdict verdict = Verdict::kSame;
};
// Worse, or better, by more than `tolerance` (0.1: a tenth of the baseline). A figure of which neither is better stays
// the same.
FigureChange Compare(const Figure& figure, double baseline, double tolerance);

std::string ToJson(const BenchRecord& record);
// InvalidArgument for what ToJson has not written.
absl::StatusOr<BenchRecord> ParseRecord(const std::string& json);

// What every benchmark takes.
struct RecordFlags {
  bool is_json = false;
  std::string save, compare;
  double tolerance_percent = 10;
  bool fails_on_regression = false;
};
void AddRecordFlags(CLI::App& command, RecordFlags& flags);

// That of --compare, if any; read before a benchmark begins. InvalidArgument when it is no record of `bench`.
absl::StatusOr<std::optional<BenchRecord>> ReadBaseline(const RecordFlags& flags, const std::string& bench);

// Prints `text`, which shows the figures to a person, or the record as JSON; then the comparison, or with it in the
// JSON; saves the record. InvalidArgument when it has no figure in common with the baseline; OutOfRange, for exit
// code 1, when --fail-on-regression finds a worse one.
absl::Status Report(const BenchRecord& record, const std::string& text, const RecordFlags& flags,
                    const std::optional<BenchRecord>& baseline);

}  // namespace rankwise::launch
