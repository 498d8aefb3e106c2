#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "worker/comm/communicator.h"

namespace rankwise::comm {

// This process in its MPI job: MPI lives as long as this object. One per process, in its life too.
class MpiSession {
 public:
  // Waits, without a deadline, for all processes of the job; the launcher ends the job when one of them dies.
  // MPI_THREAD_MULTIPLE, although the collectives come from one thread: Abort must be free to interrupt a call.
  static absl::StatusOr<std::unique_ptr<MpiSession>> Start();

  // Waits for the peers to finish too; aborts the job when they do not within 30 s.
  ~MpiSession();

  MpiSession(const MpiSession&) = delete;
  MpiSession& operator=(const MpiSession&) = delete;

  int rank() const { return rank_; }
  int size() const { return size_; }
  // The position of this rank, and the number of ranks, on this machine.
  int host_rank() const { return host_rank_; }
  int host_size() const { return host_size_; }

  // Ends all processes of the job, now. The way out after an error of a communicator, when peers may hang. Any thread.
  [[noreturn]] void Abort(int code) const;

 private:
  MpiSession() = default;

  int rank_ = 0;
  int size_ = 1;
  int host_rank_ = 0;
  int host_size_ = 1;
};

// All ranks of the job, in world order. Collective. The session must outlive the communicator.
//
// After an error MPI may go on reading and writing the memory given to the failed call when the late peer comes after
// all: keep that memory, and end the process with MpiSession::Abort.
absl::StatusOr<std::unique_ptr<Communicator>> CreateMpiCommunicator(const MpiSession& session, absl::Duration timeout);

// What a group should use: shared memory where all ranks are of one host and can have it, else MPI.
absl::StatusOr<std::unique_ptr<Communicator>> CreateGroupCommunicator(const MpiSession& session,
                                                                      absl::Duration timeout);

}  // namespace rankwise::comm
