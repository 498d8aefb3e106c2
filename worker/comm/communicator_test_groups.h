#pragma once

#include <functional>
#include <string>
#include <vector>

#include "worker/comm/communicator.h"

// What the communicator suite runs on: communicator_test links the file for threads, communicator_mpi_test the one for
// MPI.
namespace rankwise::comm {

struct TestGroup {
  std::string kind;
  int size;
  // Whether an error says which ranks are late, and that counts differ. NCCL knows neither.
  bool knows_peers = true;
};

std::vector<TestGroup> TestGroups();

// Runs `body` once for each rank of a new group, at the same time.
void RunOnRanks(const TestGroup& group, const std::function<void(Communicator&)>& body);

}  // namespace rankwise::comm
