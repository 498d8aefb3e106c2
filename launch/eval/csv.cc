#include "launch/eval/csv.h"

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"

namespace rankwise::eval {

absl::StatusOr<std::vector<CsvRow>> ParseCsv(const std::string& text, const std::string& file) {
  enum class State { kBegin, kPlain, kQuoted, kClosed } state = State::kBegin;
  std::vector<CsvRow> rows;
  CsvRow row{.line = 1};
  std::string cell;
  int64_t line = 1, quote_line = 1;
  const auto error = [&](const char* what, int64_t at) {
    return absl::InvalidArgumentError(absl::StrCat(file, ":", at, ": ", what));
  };
  const auto end_row = [&] {
    if (!row.cells.empty() || state != State::kBegin) {
      row.cells.push_back(std::move(cell));
      rows.push_back(std::move(row));
    }
    cell.clear();
    state = State::kBegin;
    row = {.line = line + 1};
  };
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (state == State::kQuoted) {
      if (c == '\n') ++line;
      if (c != '"') {
        cell += c;
      } else if (i + 1 < text.size() && text[i + 1] == '"') {
        cell += text[++i];
      } else {
        state = State::kClosed;
      }
    } else if (c == ',') {
      row.cells.push_back(std::move(cell));
      cell.clear();
      state = State::kBegin;
    } else if (c == '\n') {
      end_row();
      ++line;
    } else if (c == '\r' && i + 1 < text.size() && text[i + 1] == '\n') {
      continue;
    } else if (state == State::kClosed) {
      return error("text behind a closing quote", line);
    } else if (c == '"') {
      if (state == State::kPlain) return error("a quote inside a cell that is not quoted", line);
      state = State::kQuoted;
      quote_line = line;
    } else {
      state = State::kPlain;
      cell += c;
    }
  }
  if (state == State::kQuoted) return error("a quote that is never closed", quote_line);
  end_row();
  return rows;
}

std::string CsvCell(const std::string& text) {
  if (text.find_first_of(",\"\r\n") == std::string::npos) return text;
  return absl::StrCat("\"", absl::StrReplaceAll(text, {{"\"", "\"\""}}), "\"");
}

}  // namespace rankwise::eval
