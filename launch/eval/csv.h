#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace rankwise::eval {

struct CsvRow {
  int64_t line;  // where it begins, from 1
  std::vector<std::string> cells;
};

// RFC 4180: cells separated by commas, quoted where they hold commas, quotes (doubled) or line breaks. Empty lines are
// left out. InvalidArgument names `file` and line for a quote inside an unquoted cell, text behind a closing quote, and
// a quote that is never closed.
absl::StatusOr<std::vector<CsvRow>> ParseCsv(const std::string& text, const std::string& file);

// A cell as the above reads it back.
std::string CsvCell(const std::string& text);

}  // namespace rankwise::eval
