#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/comm/communicator.h"
#include "worker/engine/engine.h"
#include "worker/engine/rank.h"

namespace rankwise::testing {

// A whole worker group in one process: the ranks are threads, joined by a thread communicator. Rank 0's engine is the
// caller's.
class ThreadGroup {
 public:
  static absl::StatusOr<std::unique_ptr<ThreadGroup>> Start(const engine::RankOptions& options, int tp,
                                                            int threads_per_rank = 1);
  // On backends that `make` makes, one for each rank, and what `join`, called by all ranks at once, makes of each one's
  // communicator.
  using MakeBackend = std::function<absl::StatusOr<std::unique_ptr<kernels::Backend>>(int rank)>;
  using Join = std::function<absl::StatusOr<std::unique_ptr<comm::Communicator>>(comm::Communicator& host,
                                                                                 kernels::Backend& backend)>;
  static absl::StatusOr<std::unique_ptr<ThreadGroup>> Start(const engine::RankOptions& options, int tp,
                                                            const MakeBackend& make, const Join& join = nullptr);
  // Ends the followers and checks that they ended well and that the scheduler's books balance.
  ~ThreadGroup();

  engine::Engine& engine() { return *engine_; }
  const engine::Rank& rank(int r = 0) const { return ranks_[r]; }

  // Ends serving, then runs a collective on every rank's thread. The first error of any rank.
  absl::Status Finish(const std::function<absl::Status(const engine::Rank&, comm::Communicator&)>& collective);

 private:
  ThreadGroup() = default;
  void StopServing();
  comm::Communicator& communicator(int r) const { return joined_[r] ? *joined_[r] : *hosts_[r]; }

  std::vector<std::unique_ptr<comm::Communicator>> hosts_;
  std::vector<std::unique_ptr<kernels::Backend>> backends_;
  std::vector<std::unique_ptr<comm::Communicator>> joined_;  // over hosts_; null where these are all
  std::vector<engine::Rank> ranks_;
  std::unique_ptr<engine::Engine> engine_;
  std::vector<std::jthread> followers_;
  std::vector<absl::Status> follower_status_;
};

// All that a request produced; `==` compares every bit, log-probabilities included.
struct Result {
  std::vector<int32_t> tokens;
  std::vector<float> logprobs;         // of each token, then of its alternatives
  std::vector<float> prompt_logprobs;  // likewise
  engine::FinishReason reason = engine::FinishReason::kNone;
  int32_t cached_prompt_tokens = 0;
  absl::Status error;
  bool operator==(const Result& other) const {
    return tokens == other.tokens && logprobs == other.logprobs && prompt_logprobs == other.prompt_logprobs &&
           reason == other.reason && error == other.error;
  }
};

// One request of five tokens for each way to draw, request i of prompts[i], 4 of them: the greediest first.
std::vector<engine::Request> RequestsOfAllDraws(const std::vector<std::vector<int32_t>>& prompts, int32_t logprobs);

// Adds a step's outputs to `results`, checking that no token is repeated or missing.
void Collect(const std::vector<engine::Output>& outputs, std::map<engine::SequenceId, Result>& results);

// Submits all requests and steps until they are done.
std::map<engine::SequenceId, Result> RunAll(engine::Engine& engine, const std::vector<engine::Request>& requests);
Result RunAlone(engine::Engine& engine, const engine::Request& request);

}  // namespace rankwise::testing
