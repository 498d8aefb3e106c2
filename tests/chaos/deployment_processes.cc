#include "tests/chaos/deployment_processes.h"

#include <signal.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <system_error>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace rankwise::chaos {
namespace {

constexpr char kMark[] = "RANKWISE_TEST_DEPLOYMENT";

// State and parent, the fields after the last parenthesis: the name before it may hold anything.
std::vector<std::string> StatOf(pid_t pid) {
  const std::string stat = ReadProc(pid, "stat");
  const size_t name_end = stat.rfind(") ");
  if (name_end == std::string::npos) return {};
  return absl::StrSplit(stat.substr(name_end + 2), ' ');
}

bool IsAlive(pid_t pid) {
  const std::vector<std::string> stat = StatOf(pid);
  return !stat.empty() && stat[0] != "Z";
}

std::vector<pid_t> AllProcesses() {
  std::vector<pid_t> pids;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator("/proc", error)) {
    int pid = 0;
    if (absl::SimpleAtoi(entry.path().filename().string(), &pid)) pids.push_back(pid);
  }
  return pids;
}

}  // namespace

void MarkDescendants() { setenv(kMark, absl::StrCat(getpid()).c_str(), 1); }

std::vector<pid_t> MarkedProcesses() {
  const std::string mark = absl::StrCat(kMark, "=", getpid());
  std::vector<pid_t> marked;
  for (const pid_t pid : AllProcesses()) {
    if (pid == getpid() || !IsAlive(pid)) continue;
    const std::string environment = ReadProc(pid, "environ");
    for (const absl::string_view entry : absl::StrSplit(environment, '\0')) {
      if (entry == mark) marked.push_back(pid);
    }
  }
  return marked;
}

std::string ReadProc(pid_t pid, const std::string& file) {
  std::ifstream stream(absl::StrCat("/proc/", pid, "/", file), std::ios::binary);
  return std::string(std::istreambuf_iterator<char>(stream), {});
}

pid_t ParentOf(pid_t pid) {
  const std::vector<std::string> stat = StatOf(pid);
  int parent = 0;
  return stat.size() > 1 && absl::SimpleAtoi(stat[1], &parent) ? parent : 0;
}

std::vector<pid_t> ChildrenOf(pid_t parent) {
  std::vector<pid_t> children;
  for (const pid_t pid : AllProcesses()) {
    if (ParentOf(pid) == parent && IsAlive(pid)) children.push_back(pid);
  }
  return children;
}

std::vector<pid_t> RanksOf(pid_t launcher) {
  std::vector<pid_t> ranks;
  for (const pid_t pid : ChildrenOf(launcher)) {
    const std::string program = ReadProc(pid, "cmdline");
    if (absl::EndsWith(program.substr(0, program.find('\0')), "/rankwise-worker")) ranks.push_back(pid);
  }
  return ranks;
}

bool HasHeartbeat(pid_t rank) {
  std::error_code error;
  for (const auto& thread : std::filesystem::directory_iterator(absl::StrCat("/proc/", rank, "/task"), error)) {
    std::string name;
    std::getline(std::ifstream(thread.path() / "comm"), name);
    if (name == "heartbeat") return true;
  }
  return false;
}

std::vector<std::string> OrphanedSegments() {
  std::vector<std::string> orphans;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator("/dev/shm", error)) {
    const std::string name = entry.path().filename();
    const std::vector<std::string> parts = absl::StrSplit(name, '-');  // rankwise-PID-SALT
    int pid = 0;
    const bool is_segment = parts.size() == 3 && parts[0] == "rankwise" && absl::SimpleAtoi(parts[1], &pid);
    if (is_segment && !IsAlive(pid)) orphans.push_back(name);
  }
  return orphans;
}

}  // namespace rankwise::chaos
