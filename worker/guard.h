#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "worker/comm/group_watch.h"

namespace rankwise {

// A small child process that kills this one when it stands still: a stopped process can do nothing about itself, and
// neither Open MPI nor the kernel minds. It says on stderr whom it killed, where, and in which step and collective.
// Ends with this process.
class Guard {
 public:
  // Forks: call it before there is a thread. `start_patience` is for the first beat: until then ranks wait for each
  // other where nobody watches, in the start of MPI. An error of the system, when it cannot.
  static absl::StatusOr<std::unique_ptr<Guard>> Start(absl::Duration patience, absl::Duration start_patience);
  ~Guard();

  Guard(const Guard&) = delete;
  Guard& operator=(const Guard&) = delete;

  // This process lives; `rank` is for the guard's words. A leaving one disarms the guard. Never
  // blocks. One thread.
  void Take(int rank, const comm::Beat& beat) const;

 private:
  explicit Guard(int pipe) : pipe_(pipe) {}
  const int pipe_;
};

}  // namespace rankwise
