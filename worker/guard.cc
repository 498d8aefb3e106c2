#include "worker/guard.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>

namespace rankwise {
namespace {

struct Message {
  int rank = 0;
  comm::Beat beat;
};

// Only what a forked child may do: no allocation, no lock.
[[noreturn]] void Watch(int pipe, pid_t guarded, int patience_ms, int start_patience_ms) {
  setpgid(0, 0);  // what stops the rank's process group must not stop its guard
  prctl(PR_SET_NAME, "rankwise-guard");
  for (const int signal : {SIGTERM, SIGINT, SIGHUP}) ::signal(signal, SIG_IGN);
  close(STDIN_FILENO);
  close(STDOUT_FILENO);
  Message latest;
  bool has_begun = false;
  for (int wait_ms = start_patience_ms;;) {
    pollfd event{pipe, POLLIN, 0};
    const int ready = poll(&event, 1, wait_ms);
    if (ready < 0 && errno == EINTR) continue;
    if (ready == 0) break;
    if (read(pipe, &latest, sizeof latest) != sizeof latest) _exit(0);  // the rank has ended
    has_begun = true;
    wait_ms = latest.beat.is_leaving == 0 ? patience_ms : -1;
  }
  if (has_begun) {
    dprintf(STDERR_FILENO,
            "rankwise-guard: rank %d on %s stood still for %d ms (step %llu, %s, call %llu) and is killed\n",
            latest.rank, latest.beat.host, patience_ms, static_cast<unsigned long long>(latest.beat.activity.step),
            Name(latest.beat.activity.collective), static_cast<unsigned long long>(latest.beat.activity.calls));
  } else {
    dprintf(STDERR_FILENO, "rankwise-guard: process %d met no other rank within %d ms and is killed\n", guarded,
            start_patience_ms);
  }
  kill(guarded, SIGKILL);
  _exit(0);
}

}  // namespace

absl::StatusOr<std::unique_ptr<Guard>> Guard::Start(absl::Duration patience, absl::Duration start_patience) {
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) return absl::ErrnoToStatus(errno, "guard: pipe");
  const pid_t guarded = getpid();
  const pid_t child = fork();
  if (child < 0) return absl::ErrnoToStatus(errno, "guard: fork");
  if (child == 0) {
    close(ends[1]);
    Watch(ends[0], guarded, static_cast<int>(absl::ToInt64Milliseconds(patience)),
          static_cast<int>(absl::ToInt64Milliseconds(start_patience)));
  }
  close(ends[0]);
  fcntl(ends[1], F_SETFL, O_NONBLOCK);
  return std::unique_ptr<Guard>(new Guard(ends[1]));
}

Guard::~Guard() { close(pipe_); }

void Guard::Take(int rank, const comm::Beat& beat) const {
  const Message message{rank, beat};
  // Whole or not at all: it is smaller than PIPE_BUF. A full pipe or a dead guard is no reason to end.
  static_assert(sizeof(Message) <= 512);
  [[maybe_unused]] const ssize_t written = write(pipe_, &message, sizeof message);
}

}  // namespace rankwise
