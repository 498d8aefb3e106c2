#pragma once

#include <sys/types.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace rankwise::launch {

struct ExitState {
  int code = 0;    // when signal == 0
  int signal = 0;  // what killed it

  bool is_success() const { return code == 0 && signal == 0; }
  std::string ToString() const;  // "exit code 2", "killed by signal 9 (Killed)"
};

struct ChildOptions {
  std::vector<std::string> command;      // [0] is a path, or a name looked up in PATH
  std::vector<std::string> environment;  // "NAME=value", over our own
  std::string log_path;                  // its stdout and stderr are appended there; empty: both go to our stderr
};

// A program in a process group of its own, so that a Ctrl-C meant for us does not reach it. The kernel sends it SIGTERM
// when the thread that started it ends: call Start on a thread that lives as long as the program.
class ChildProcess {
 public:
  // NotFound or PermissionDenied when the program cannot be executed.
  static absl::StatusOr<std::unique_ptr<ChildProcess>> Start(const ChildOptions& options);
  // Kills its process group if it still runs.
  ~ChildProcess();

  ChildProcess(const ChildProcess&) = delete;
  ChildProcess& operator=(const ChildProcess&) = delete;

  pid_t pid() const { return pid_; }
  int pidfd() const { return pidfd_; }  // readable once the program has ended
  // Waits until `deadline` at most. nullopt: it still runs. Repeats the answer once it has ended.
  std::optional<ExitState> Wait(absl::Time deadline);
  // To its process group.
  void Signal(int signal) const;
  // The last lines of its log; empty without one.
  std::string LogTail(size_t lines = 20) const;

 private:
  ChildProcess(pid_t pid, int pidfd, std::string log_path) : pid_(pid), pidfd_(pidfd), log_path_(std::move(log_path)) {}

  const pid_t pid_;
  const int pidfd_;
  const std::string log_path_;
  std::optional<ExitState> exit_state_;
};

// Makes this process the parent of every descendant whose own parent dies, so that KillOrphans can find them. Ranks of
// a killed mpirun are such.
void AdoptOrphans();
// Kills and reaps the children of this process that no ChildProcess owns. Returns how many of them still ran.
int KillOrphans();

// A folder that nobody else can read, made in `parent` and removed with all it holds.
class PrivateFolder {
 public:
  static absl::StatusOr<PrivateFolder> Create(const std::string& parent);
  PrivateFolder(PrivateFolder&& other) noexcept : path_(std::exchange(other.path_, {})) {}
  PrivateFolder& operator=(PrivateFolder&&) = delete;
  ~PrivateFolder();

  const std::string& path() const { return path_; }

 private:
  explicit PrivateFolder(std::string path) : path_(std::move(path)) {}
  std::string path_;
};

// $XDG_RUNTIME_DIR, $TMPDIR or /tmp: the first that is a folder we may write to.
std::string TemporaryParent();

}  // namespace rankwise::launch
