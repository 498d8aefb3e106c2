#include "launch/batch/input.h"

#include <algorithm>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "base/status_macros.h"
#include "launch/batch/question.h"

namespace rankwise::batch {

absl::StatusOr<Shard> ParseShard(const std::string& text) {
  const std::vector<std::string> parts = absl::StrSplit(text, '/');
  Shard shard;
  if (parts.size() != 2 || !absl::SimpleAtoi(parts[0], &shard.index) || !absl::SimpleAtoi(parts[1], &shard.count) ||
      shard.index < 0 || shard.index >= shard.count)
    return absl::InvalidArgumentError(absl::StrCat("--shard ", text, " is not INDEX/COUNT with 0 <= INDEX < COUNT"));
  return shard;
}

absl::StatusOr<std::optional<Shard>> ShardFromSlurm(GetVariable get) {
  if (get("SLURM_ARRAY_TASK_ID") == nullptr) return std::nullopt;
  int values[5] = {};
  const char* names[5] = {"SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX",
                          "SLURM_ARRAY_TASK_STEP", "SLURM_ARRAY_TASK_COUNT"};
  for (int i = 0; i < 5; ++i) {
    const char* text = get(names[i]);
    if (text == nullptr || !absl::SimpleAtoi(text, &values[i]))
      return absl::FailedPreconditionError(
          absl::StrCat(names[i], " is \"", text == nullptr ? "" : text, "\", not a number; give --shard INDEX/COUNT"));
  }
  const auto [id, least, most, step, count] = std::tie(values[0], values[1], values[2], values[3], values[4]);
  if (step <= 0 || count <= 0 || least + step * (count - 1) != most || id < least || id > most ||
      (id - least) % step != 0)
    return absl::FailedPreconditionError(absl::StrCat("the job array has ", count, " tasks from ", least, " to ", most,
                                                      " in steps of ", step,
                                                      ", which leaves gaps; give --shard INDEX/COUNT"));
  // One task out of an array that was submitted again would otherwise answer everything.
  if (count == 1 && least != 0)
    return absl::FailedPreconditionError(
        absl::StrCat("the job array is task ", id, " alone; give --shard INDEX/COUNT of the array it belongs to"));
  return Shard{.index = (id - least) / step, .count = count};
}

std::string ShardOutput(const std::string& output, const Shard& shard) {
  if (shard.count == 1) return output;
  const size_t slash = output.rfind('/');
  const size_t dot = output.rfind('.');
  const size_t end = dot == std::string::npos || (slash != std::string::npos && dot < slash) ? output.size() : dot;
  return absl::StrCat(output.substr(0, end), ".", shard.index, "-of-", shard.count, output.substr(end));
}

absl::StatusOr<Input> Input::Open(const std::string& path) {
  RW_ASSIGN_OR_RETURN(MappedFile file, MappedFile::Open(path));
  Input input(std::move(file));
  const std::string_view bytes(reinterpret_cast<const char*>(input.file_.bytes().data()), input.file_.bytes().size());
  int64_t number = 0;
  for (size_t begin = 0; begin < bytes.size();) {
    const size_t end = std::min(bytes.size(), bytes.find('\n', begin));
    ++number;
    if (bytes.substr(begin, end - begin).find_first_not_of(" \t\r") != std::string_view::npos)
      input.lines_.push_back({number, begin, end - begin, ""});
    begin = end + 1;
  }
  for (size_t i = 0; i < input.lines_.size(); ++i) {
    Line& line = input.lines_[i];
    if (auto id = ReadCustomId(input.text(line)); id.ok()) line.custom_id = *std::move(id);
  }
  for (size_t i = 0; i < input.lines_.size(); ++i) {
    const Line& line = input.lines_[i];
    if (line.custom_id.empty()) continue;
    const auto [other, is_new] = input.by_id_.emplace(line.custom_id, i);
    if (!is_new)
      return absl::InvalidArgumentError(absl::StrCat(path, ": custom_id \"", line.custom_id, "\" is on line ",
                                                     input.lines_[other->second].number, " and on line ", line.number));
  }
  return input;
}

std::string_view Input::text(const Line& line) const {
  return {reinterpret_cast<const char*>(file_.bytes().data()) + line.offset, line.size};
}

const Input::Line* Input::Find(const std::string& custom_id, int64_t number) const {
  if (!custom_id.empty()) {
    const auto it = by_id_.find(custom_id);
    return it == by_id_.end() ? nullptr : &lines_[it->second];
  }
  const auto it = std::lower_bound(lines_.begin(), lines_.end(), number,
                                   [](const Line& line, int64_t value) { return line.number < value; });
  return it == lines_.end() || it->number != number || !it->custom_id.empty() ? nullptr : &*it;
}

}  // namespace rankwise::batch
