#include "launch/batch/join.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "base/mapped_file.h"
#include "base/status_macros.h"
#include "launch/batch/question.h"

namespace rankwise::batch {

size_t Results::missing() const {
  return static_cast<size_t>(std::count_if(lines.begin(), lines.end(), [](const auto& l) { return l.empty(); }));
}

absl::Status AddResult(const Input& input, std::string_view text, Results& results) {
  RW_ASSIGN_OR_RETURN(const ResultKey key, ReadResult(text));
  const std::string name =
      key.custom_id.empty() ? absl::StrCat("line ", key.number) : absl::StrCat("custom_id \"", key.custom_id, "\"");
  const Input::Line* line = input.Find(key.custom_id, key.number);
  if (line == nullptr)
    return absl::FailedPreconditionError(absl::StrCat("is the result of ", name, ", which is not in the input"));
  if (ResultId(input.text(*line)) != key.id)
    return absl::FailedPreconditionError(
        absl::StrCat(name, " asked something else when it was answered; give another --output"));
  if (!key.fingerprint.empty()) {
    if (results.fingerprint.empty()) results.fingerprint = key.fingerprint;
    if (results.fingerprint != key.fingerprint)
      return absl::FailedPreconditionError(absl::StrCat(name, " was answered by ", key.fingerprint, ", others by ",
                                                        results.fingerprint, ": not one model, KV format and scales"));
  }
  std::string& place = results.lines[static_cast<size_t>(line - input.lines().data())];
  if (!place.empty()) return absl::InvalidArgumentError(absl::StrCat("answers ", name, " again"));
  place = text;
  results.errors += key.is_error;
  return absl::OkStatus();
}

absl::StatusOr<Results> JoinShards(const Input& input, const std::string& output, int count) {
  Results results{.lines = std::vector<std::string>(input.lines().size())};
  for (int index = 0; index < count; ++index) {
    const std::string path = ShardOutput(output, {.index = index, .count = count});
    RW_ASSIGN_OR_RETURN(const MappedFile file, MappedFile::Open(path));
    const std::string_view bytes(reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size());
    int64_t number = 0;
    size_t begin = 0;
    // A torn last line is no result.
    for (size_t end; (end = bytes.find('\n', begin)) != std::string_view::npos; begin = end + 1) {
      ++number;
      const absl::Status status = AddResult(input, bytes.substr(begin, end - begin), results);
      if (!status.ok()) return absl::Status(status.code(), absl::StrCat(path, ":", number, ": ", status.message()));
    }
  }
  if (const size_t missing = results.missing(); missing > 0)
    return absl::UnavailableError(absl::StrCat(missing, " of ", results.lines.size(), " lines have no result yet"));
  std::string all;
  for (const std::string& line : results.lines) absl::StrAppend(&all, line, "\n");
  RW_RETURN_IF_ERROR(WriteFileAtomically(output, all));
  return results;
}

}  // namespace rankwise::batch
