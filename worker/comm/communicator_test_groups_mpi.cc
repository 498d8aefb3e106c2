#include <gtest/gtest.h>

#include "worker/comm/communicator_test_groups.h"
#include "worker/comm/mpi_test_main.h"
#include "worker/comm/shared_memory_communicator.h"

namespace rankwise::comm {

// The tests are registered, and listed, before MPI starts: 0 is the size that mpirun gave.
std::vector<TestGroup> TestGroups() { return {{"mpi", 0}, {"shared memory", 0}}; }

void RunOnRanks(const TestGroup& group, const std::function<void(Communicator&)>& body) {
  auto communicator = CreateMpiCommunicator(TestSession(), absl::Seconds(20));
  ASSERT_TRUE(communicator.ok()) << communicator.status();
  if (group.kind == "mpi") {
    body(**communicator);
    return;
  }
  auto shared = CreateSharedMemoryCommunicator(**communicator, absl::Seconds(20));
  ASSERT_TRUE(shared.ok()) << shared.status();
  body(**shared);
}

}  // namespace rankwise::comm
