#include "worker/comm/exchange.h"

#include <algorithm>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "base/check.h"
#include "base/status_macros.h"

namespace rankwise::comm {
namespace {

// A line of each rank: a status code, '|' and a text.
absl::StatusOr<std::vector<std::string>> ReadAnswers(const std::string& lines) {
  std::vector<std::string> texts;
  int code = 0, failed_rank = -1;
  for (const absl::string_view line : absl::StrSplit(lines, '\n')) {
    const std::pair<absl::string_view, absl::string_view> answer = absl::StrSplit(line, absl::MaxSplits('|', 1));
    int own_code = 0;
    if (!absl::SimpleAtoi(answer.first, &own_code)) {
      return absl::InternalError(absl::StrCat("not an answer of a rank: ", line));
    }
    if (own_code != 0 && failed_rank < 0) {
      failed_rank = static_cast<int>(texts.size());
      code = own_code;
    }
    texts.emplace_back(answer.second);
  }
  if (failed_rank < 0) return texts;
  const std::string& text = texts[failed_rank];
  const bool is_everybodys = std::ranges::all_of(texts, [&](const std::string& other) { return other == text; });
  return absl::Status(static_cast<absl::StatusCode>(code),
                      is_everybodys ? text : absl::StrCat("rank ", failed_rank, ": ", text));
}

}  // namespace

absl::StatusOr<std::vector<std::string>> Exchange(const absl::StatusOr<std::string>& own, Communicator& communicator,
                                                  absl::Duration timeout) {
  RW_CHECK(!own.ok() || own->find('\n') == std::string::npos);
  const std::string text = own.ok() ? *own : absl::StrReplaceAll(own.status().message(), {{"\n", " "}});
  std::vector<std::string> all;
  RW_RETURN_IF_ERROR(
      communicator.GatherMessages(absl::StrCat(static_cast<int>(own.status().code()), "|", text), all, timeout));
  std::string lines = absl::StrJoin(all, "\n");
  RW_RETURN_IF_ERROR(communicator.Broadcast(lines, timeout));
  return ReadAnswers(lines);
}

absl::Status Agree(const absl::Status& own, Communicator& communicator, absl::Duration timeout) {
  const absl::StatusOr<std::string> answer = own.ok() ? absl::StatusOr<std::string>("") : own;
  return Exchange(answer, communicator, timeout).status();
}

}  // namespace rankwise::comm
