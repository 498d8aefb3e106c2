#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/mapped_file.h"

namespace rankwise::batch {

// Which part of the lines a run answers: those whose index modulo `count` is `index`.
struct Shard {
  int index = 0, count = 1;

  bool Holds(size_t line_index) const { return line_index % static_cast<size_t>(count) == static_cast<size_t>(index); }
  bool operator==(const Shard&) const = default;
};

// "3/8": the fourth of eight.
absl::StatusOr<Shard> ParseShard(const std::string& text);
// From the variables of a Slurm job array; nullopt outside of one. FailedPrecondition when the array's indices are not
// evenly spaced, so that a part of the lines would be answered by nobody. `get` is getenv, or a test's.
using GetVariable = const char* (*)(const char* name);
absl::StatusOr<std::optional<Shard>> ShardFromSlurm(GetVariable get);
// "answers.jsonl" of shard 3/8: "answers.3-of-8.jsonl"; of the only shard: as it is.
std::string ShardOutput(const std::string& output, const Shard& shard);

// A file of questions, mapped. Lines of white space alone are no lines.
class Input {
 public:
  struct Line {
    int64_t number;         // in the file, from 1
    size_t offset, size;    // bytes, without the newline
    std::string custom_id;  // empty: the line cannot be understood
  };

  // InvalidArgument when two lines have one custom_id, with both numbers: nobody could tell their answers apart.
  static absl::StatusOr<Input> Open(const std::string& path);

  const std::vector<Line>& lines() const { return lines_; }
  std::string_view text(const Line& line) const;
  // The line of a result: by its custom_id, else by its number. nullptr: there is none.
  const Line* Find(const std::string& custom_id, int64_t number) const;

 private:
  explicit Input(MappedFile file) : file_(std::move(file)) {}

  MappedFile file_;
  std::vector<Line> lines_;
  std::map<std::string_view, size_t> by_id_;  // borrows from lines_
};

}  // namespace rankwise::batch
