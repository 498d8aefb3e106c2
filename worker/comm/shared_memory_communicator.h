#pragma once

#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "worker/comm/communicator.h"

namespace rankwise::comm {

// The ranks of `bootstrap`, all of one host, acting as one over memory they share. A rank publishes what it brings in
// pieces; the others read them where they lie. Who waits looks for a moment and then sleeps in the kernel until the
// other publishes, so that ranks that share cores, with each other or with other programs, wake each other instead of
// waiting for each other's time slices to end; an idle group costs nothing.
//
// Collective over `bootstrap`, which is needed during the call only. An error (no room in /dev/shm, ranks that do not
// see each other's) is the same on all ranks, and leaves nothing behind.
absl::StatusOr<std::unique_ptr<Communicator>> CreateSharedMemoryCommunicator(Communicator& bootstrap,
                                                                             absl::Duration timeout);

// The same for threads of one process, rank i at index i. For tests.
std::vector<std::unique_ptr<Communicator>> CreateSharedMemoryCommunicators(int size);

}  // namespace rankwise::comm
