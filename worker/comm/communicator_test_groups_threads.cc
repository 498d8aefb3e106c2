#include <thread>

#include "worker/comm/communicator_test_groups.h"
#include "worker/comm/shared_memory_communicator.h"

namespace rankwise::comm {

std::vector<TestGroup> TestGroups() {
  return {{"solo", 1},          {"threads", 1},       {"threads", 2},       {"threads", 3},
          {"threads", 4},       {"threads", 5},       {"shared memory", 1}, {"shared memory", 2},
          {"shared memory", 3}, {"shared memory", 4}, {"shared memory", 7}};
}

void RunOnRanks(const TestGroup& group, const std::function<void(Communicator&)>& body) {
  if (group.kind == "solo") {
    body(*CreateSoloCommunicator());
    return;
  }
  const std::vector<std::unique_ptr<Communicator>> ranks =
      group.kind == "threads" ? CreateThreadCommunicators(group.size) : CreateSharedMemoryCommunicators(group.size);
  std::vector<std::jthread> threads;
  for (const auto& rank : ranks) threads.emplace_back([&] { body(*rank); });
}

}  // namespace rankwise::comm
