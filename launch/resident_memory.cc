#include "launch/resident_memory.h"

#include <cerrno>
#include <fstream>
#include <iterator>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "base/status_macros.h"

namespace rankwise::launch {
namespace {

// These files have no size to map by.
absl::StatusOr<std::string> ReadProcFile(pid_t pid, const char* name) {
  const std::string path = absl::StrCat("/proc/", pid, "/", name);
  errno = 0;
  std::ifstream file(path);
  std::string text(std::istreambuf_iterator<char>(file), {});
  if (!file.bad() && !text.empty()) return text;
  return absl::ErrnoToStatus(errno != 0 ? errno : ESRCH, path);
}

}  // namespace

absl::StatusOr<int64_t> KilobyteField(const std::string& text, const std::string& key) {
  for (absl::string_view line : absl::StrSplit(text, '\n')) {
    if (!absl::ConsumePrefix(&line, absl::StrCat(key, ":")) || !absl::ConsumeSuffix(&line, " kB")) continue;
    int64_t kilobytes = 0;
    if (absl::SimpleAtoi(line, &kilobytes) && kilobytes >= 0) return kilobytes * 1024;
  }
  return absl::DataLossError(absl::StrCat("no line \"", key, ": N kB\""));
}

absl::StatusOr<ResidentMemory> ReadResidentMemory(pid_t pid) {
  // `status` has all three, but its counters may be late by some pages of each thread.
  RW_ASSIGN_OR_RETURN(const std::string rollup, ReadProcFile(pid, "smaps_rollup"));
  RW_ASSIGN_OR_RETURN(const std::string status, ReadProcFile(pid, "status"));
  ResidentMemory memory;
  RW_ASSIGN_OR_RETURN(memory.anonymous, KilobyteField(rollup, "Anonymous"));
  RW_ASSIGN_OR_RETURN(memory.file, KilobyteField(status, "RssFile"));
  RW_ASSIGN_OR_RETURN(memory.shared, KilobyteField(status, "RssShmem"));
  return memory;
}

}  // namespace rankwise::launch
