#include <gtest/gtest.h>

#include "worker/comm/communicator_test_groups.h"
#include "worker/comm/mpi_test_main.h"

namespace rankwise::comm {

// The tests are registered, and listed, before MPI starts: 0 is the size that mpirun gave.
std::vector<TestGroup> TestGroups() { return {{"mpi", 0}}; }

void RunOnRanks(const TestGroup&, const std::function<void(Communicator&)>& body) {
  auto communicator = CreateMpiCommunicator(TestSession(), absl::Seconds(20));
  ASSERT_TRUE(communicator.ok()) << communicator.status();
  body(**communicator);
}

}  // namespace rankwise::comm
