#include "launch/child_process.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <set>
#include <system_error>

#include "absl/algorithm/container.h"
#include "absl/base/thread_annotations.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/synchronization/mutex.h"
#include "base/check.h"
#include "base/status_macros.h"

namespace rankwise::launch {
namespace {

// The pids of all living ChildProcess objects: what KillOrphans spares.
struct Owned {
  absl::Mutex mutex;
  std::set<pid_t> pids ABSL_GUARDED_BY(mutex);
};
Owned& AllOwned() {
  static Owned& owned = *new Owned;
  return owned;
}

// Everything the child needs between fork and exec, where it may not allocate.
struct Launch {
  std::vector<char*> arguments, environment;
  std::string program;
  int output_fd;
  int error_fd;  // gets errno when exec fails; closed by a successful exec
  pid_t parent;
};

[[noreturn]] void RunChild(const Launch& launch) {
  setpgid(0, 0);
  prctl(PR_SET_PDEATHSIG, SIGTERM);
  if (getppid() != launch.parent) _exit(127);  // the parent died before the line above
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, nullptr);
  const int null_fd = open("/dev/null", O_RDONLY);
  dup2(null_fd, STDIN_FILENO);
  dup2(launch.output_fd, STDOUT_FILENO);
  dup2(launch.output_fd, STDERR_FILENO);
  execve(launch.program.c_str(), launch.arguments.data(), launch.environment.data());
  const int error = errno;
  [[maybe_unused]] const ssize_t written = write(launch.error_fd, &error, sizeof(error));
  _exit(127);
}

absl::StatusOr<std::string> FindProgram(const std::string& name) {
  if (absl::StrContains(name, "/")) return name;
  const char* path = std::getenv("PATH");
  for (absl::string_view folder : absl::StrSplit(path != nullptr ? path : "/usr/bin:/bin", ':')) {
    const std::string candidate = absl::StrCat(folder.empty() ? "." : folder, "/", name);
    if (access(candidate.c_str(), X_OK) == 0) return candidate;
  }
  return absl::NotFoundError(absl::StrCat("no program \"", name, "\" in PATH"));
}

// Ours, with `changes` over it.
std::vector<std::string> MergeEnvironment(const std::vector<std::string>& changes) {
  std::vector<std::string> merged = changes;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const absl::string_view name = absl::string_view(*entry).substr(0, absl::string_view(*entry).find('=') + 1);
    if (!absl::c_any_of(changes, [&](const std::string& c) { return absl::StartsWith(c, name); }))
      merged.emplace_back(*entry);
  }
  return merged;
}

std::vector<char*> Pointers(std::vector<std::string>& strings) {
  std::vector<char*> pointers;
  for (std::string& s : strings) pointers.push_back(s.data());
  pointers.push_back(nullptr);
  return pointers;
}

}  // namespace

std::string ExitState::ToString() const {
  if (signal != 0) return absl::StrCat("killed by signal ", signal, " (", strsignal(signal), ")");
  return absl::StrCat("exit code ", code);
}

absl::StatusOr<std::unique_ptr<ChildProcess>> ChildProcess::Start(const ChildOptions& options) {
  RW_CHECK(!options.command.empty());
  RW_ASSIGN_OR_RETURN(std::string program, FindProgram(options.command[0]));
  std::vector<std::string> arguments = options.command;
  std::vector<std::string> environment = MergeEnvironment(options.environment);

  int output_fd = STDERR_FILENO;
  if (!options.log_path.empty()) {
    output_fd = open(options.log_path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (output_fd < 0) return absl::ErrnoToStatus(errno, absl::StrCat("open ", options.log_path));
  }
  int error_pipe[2];
  RW_CHECK(pipe2(error_pipe, O_CLOEXEC) == 0, std::strerror(errno));
  const Launch launch{Pointers(arguments), Pointers(environment), std::move(program),
                      output_fd,           error_pipe[1],         getpid()};
  const pid_t pid = fork();
  if (pid == 0) RunChild(launch);
  const int fork_error = errno;
  if (output_fd != STDERR_FILENO) close(output_fd);
  close(error_pipe[1]);
  int error = pid < 0 ? fork_error : 0;
  // The write end closes in exec or _exit: this read cannot wait for long.
  while (pid > 0 && read(error_pipe[0], &error, sizeof(error)) < 0 && errno == EINTR) {
  }
  close(error_pipe[0]);
  if (error != 0) {
    if (pid > 0) waitpid(pid, nullptr, 0);
    return absl::ErrnoToStatus(error, absl::StrCat("start ", launch.program));
  }
  // Not through <sys/pidfd.h>: glibc 2.36 declares its functions as C++.
  const int pidfd = static_cast<int>(syscall(SYS_pidfd_open, pid, 0));
  RW_CHECK(pidfd >= 0, std::strerror(errno));
  fcntl(pidfd, F_SETFD, FD_CLOEXEC);
  Owned& owned = AllOwned();
  absl::MutexLock lock(&owned.mutex);
  owned.pids.insert(pid);
  return std::unique_ptr<ChildProcess>(new ChildProcess(pid, pidfd, options.log_path));
}

ChildProcess::~ChildProcess() {
  if (!Wait(absl::InfinitePast())) {
    Signal(SIGKILL);
    Wait(absl::Now() + absl::Seconds(10));
  }
  close(pidfd_);
  Owned& owned = AllOwned();
  absl::MutexLock lock(&owned.mutex);
  owned.pids.erase(pid_);
}

std::optional<ExitState> ChildProcess::Wait(absl::Time deadline) {
  while (!exit_state_) {
    siginfo_t info{};
    if (waitid(P_PIDFD, static_cast<id_t>(pidfd_), &info, WEXITED | WNOHANG) == 0 && info.si_pid == pid_) {
      exit_state_ =
          info.si_code == CLD_EXITED ? ExitState{.code = info.si_status} : ExitState{.signal = info.si_status};
      break;
    }
    const absl::Duration left = deadline - absl::Now();
    if (left <= absl::ZeroDuration()) return std::nullopt;
    pollfd end{pidfd_, POLLIN, 0};
    poll(&end, 1, static_cast<int>(absl::ToInt64Milliseconds(std::min(left, absl::Hours(1)))) + 1);
  }
  return exit_state_;
}

void ChildProcess::Signal(int signal) const {
  if (!exit_state_) kill(-pid_, signal);
}

std::string ChildProcess::LogTail(size_t lines) const {
  std::ifstream file(log_path_, std::ios::binary | std::ios::ate);
  if (log_path_.empty() || !file) return "";
  constexpr std::streamoff kTailBytes = 16 << 10;
  const std::streamoff size = file.tellg();
  std::string text(static_cast<size_t>(std::min(size, kTailBytes)), '\0');
  file.seekg(size - static_cast<std::streamoff>(text.size()));
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  std::vector<std::string> all = absl::StrSplit(text, '\n', absl::SkipWhitespace());
  if (all.size() > lines) all.erase(all.begin(), all.end() - static_cast<ptrdiff_t>(lines));
  return absl::StrJoin(all, "\n");
}

void AdoptOrphans() { RW_CHECK(prctl(PR_SET_CHILD_SUBREAPER, 1) == 0, std::strerror(errno)); }

int KillOrphans() {
  Owned& owned = AllOwned();
  absl::MutexLock lock(&owned.mutex);
  int count = 0;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator("/proc", error)) {
    int pid = 0;
    if (!absl::SimpleAtoi(entry.path().filename().string(), &pid) || owned.pids.contains(pid)) continue;
    std::ifstream file(entry.path() / "stat");
    std::string stat;
    std::getline(file, stat);
    // "pid (name) state ppid …"; the name may hold anything, so count from the last parenthesis.
    const std::vector<absl::string_view> fields = absl::StrSplit(
        absl::string_view(stat).substr(std::min(stat.size(), stat.rfind(')') + 1)), ' ', absl::SkipEmpty());
    int parent = 0;
    if (fields.size() < 2 || !absl::SimpleAtoi(fields[1], &parent) || parent != getpid()) continue;
    kill(pid, SIGKILL);
    waitpid(pid, nullptr, 0);
    if (fields[0] != "Z") ++count;
  }
  return count;
}

absl::StatusOr<PrivateFolder> PrivateFolder::Create(const std::string& parent) {
  std::string path = absl::StrCat(parent, "/rankwise-XXXXXX");
  if (mkdtemp(path.data()) == nullptr) return absl::ErrnoToStatus(errno, absl::StrCat("make a folder in ", parent));
  return PrivateFolder(std::move(path));
}

PrivateFolder::~PrivateFolder() {
  std::error_code error;
  if (!path_.empty()) std::filesystem::remove_all(path_, error);
}

std::string TemporaryParent() {
  for (const char* name : {"XDG_RUNTIME_DIR", "TMPDIR"}) {
    const char* folder = std::getenv(name);
    if (folder != nullptr && *folder != '\0' && access(folder, W_OK | X_OK) == 0) return folder;
  }
  return "/tmp";
}

}  // namespace rankwise::launch
