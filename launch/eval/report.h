#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "launch/eval/tasks.h"
#include "nlohmann/json.hpp"

// From answers to the table of configurations side by side. Pure.
namespace rankwise::eval {

struct Configuration {
  std::string name;
  std::string kv_format, kv_scales, activations, backend;
  uint32_t tp = 1;
};

// One configuration's value of a metric, compared with the first configuration's on the same items.
struct Cell {
  double value = 0;
  // Absent for the first configuration, and where the value is itself a comparison.
  std::optional<double> difference;
  std::optional<double> standard_error;  // of the paired difference, or of such a value
  std::optional<double> p_value;         // two-sided
  std::optional<int64_t> wins, losses;   // 0/1 metrics: items on which only this, only the first is right
};

struct Row {
  std::string task, metric;
  std::string unit;  // "%", or empty
  std::string test;  // "sign test", "paired z", or empty
  int64_t items = 0;
  int64_t skipped = 0;      // did not fit the context
  int64_t fewer_shots = 0;  // got fewer exemplars than asked for
  std::vector<Cell> cells;  // one for each configuration
};

// The answer to an item under configuration `index`; null when there is none.
using FindAnswer = std::function<const nlohmann::json*(size_t index, const Item& item)>;

// The rows of one task over its first `limit` items. `shots` is what was asked for. `rows` names which of "ppl" and
// "kl" are wanted of a text. InvalidArgument names an item whose answer is missing or malformed: answers come from a
// file.
absl::StatusOr<std::vector<Row>> MakeRows(const Task& task, size_t limit, int shots, size_t configuration_count,
                                          const std::vector<std::string>& text_rows, const FindAnswer& find);

struct Report {
  std::string model, fingerprint;
  std::vector<Configuration> configurations;  // the first is the baseline
  uint64_t seed = 0;
  std::vector<Row> rows;
};

// What a reader must know beside the numbers, one sentence each.
std::vector<std::string> Notes(const Report& report);

std::string ToTable(const Report& report);
std::string ToCsv(const Report& report);  // one line for each row and configuration
nlohmann::json ToJson(const Report& report);

}  // namespace rankwise::eval
