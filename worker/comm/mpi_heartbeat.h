#pragma once

#include <functional>
#include <memory>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "worker/comm/activity.h"
#include "worker/comm/group_watch.h"
#include "worker/comm/mpi_communicator.h"

namespace rankwise::comm {

struct HeartbeatOptions {
  absl::Duration interval = absl::Milliseconds(250);
  absl::Duration patience = absl::Seconds(2.5);  // GroupWatch's
  // Called, on the heartbeat's thread, with each of this rank's own beats.
  std::function<void(const Beat&)> on_beat = [](const Beat&) {};
  // Called there once when the group has ceased to act as one; the thread ends when it returns.
  std::function<void(const absl::Status&)> on_failure;
};

// A thread that sends this rank's beats over MPI to the ranks that watch it, and watches them, from its start to its
// end; it needs neither the thread that computes nor the collectives.
class MpiHeartbeat {
 public:
  // Collective. `activity` is this rank's; it and the session must outlive the heartbeat.
  static absl::StatusOr<std::unique_ptr<MpiHeartbeat>> Start(const MpiSession& session, const Activity& activity,
                                                             HeartbeatOptions options, absl::Duration timeout);
  // Says goodbye to the others first. Before the session ends.
  virtual ~MpiHeartbeat() = default;

  // CPU time that the thread has used so far.
  virtual absl::Duration cpu_time() const = 0;
};

}  // namespace rankwise::comm
