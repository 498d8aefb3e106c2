#include <thread>

#include "worker/comm/communicator_test_groups.h"

namespace rankwise::comm {

std::vector<TestGroup> TestGroups() {
  return {{"solo", 1}, {"threads", 1}, {"threads", 2}, {"threads", 3}, {"threads", 4}, {"threads", 5}};
}

void RunOnRanks(const TestGroup& group, const std::function<void(Communicator&)>& body) {
  if (group.kind == "solo") {
    body(*CreateSoloCommunicator());
    return;
  }
  const std::vector<std::unique_ptr<Communicator>> ranks = CreateThreadCommunicators(group.size);
  std::vector<std::jthread> threads;
  for (const auto& rank : ranks) threads.emplace_back([&] { body(*rank); });
}

}  // namespace rankwise::comm
