#include "tests/support/thread_group.h"

#include <gtest/gtest.h>

#include "base/check.h"
#include "base/status_macros.h"

namespace rankwise::testing {

absl::StatusOr<std::unique_ptr<ThreadGroup>> ThreadGroup::Start(const engine::RankOptions& options, int tp,
                                                                int threads_per_rank) {
  return Start(options, tp, [threads_per_rank](int) {
    return kernels::CreateCpuBackend({.threads = threads_per_rank, .pin_threads = false});
  });
}

absl::StatusOr<std::unique_ptr<ThreadGroup>> ThreadGroup::Start(const engine::RankOptions& options, int tp,
                                                                const MakeBackend& make, const Join& join) {
  auto group = std::unique_ptr<ThreadGroup>(new ThreadGroup());
  group->hosts_ = comm::CreateThreadCommunicators(tp);
  group->joined_.resize(tp);
  group->ranks_.resize(tp);
  group->follower_status_.resize(tp);
  for (int r = 0; r < tp; ++r) {
    RW_ASSIGN_OR_RETURN(auto backend, make(r));
    group->backends_.push_back(std::move(backend));
  }
  std::vector<absl::Status> loaded(tp);
  {
    std::vector<std::jthread> loaders;
    for (int r = 0; r < tp; ++r) {
      loaders.emplace_back([&, r] {
        if (join) {
          auto joined = join(*group->hosts_[r], *group->backends_[r]);
          loaded[r] = joined.status();
          if (!joined.ok()) return;
          group->joined_[r] = *std::move(joined);
        }
        auto rank = engine::LoadRank(options, *group->backends_[r], group->communicator(r));
        loaded[r] = rank.status();
        if (rank.ok()) group->ranks_[r] = *std::move(rank);
      });
    }
  }
  for (const absl::Status& status : loaded) RW_RETURN_IF_ERROR(status);
  engine::Rank& lead = group->ranks_[0];
  group->engine_ = std::make_unique<engine::Engine>(lead.scheduler_options, *lead.executor, group->communicator(0),
                                                    lead.decoder->config().eos_ids, options.collective_timeout);
  for (int r = 1; r < tp; ++r) {
    group->followers_.emplace_back([raw = group.get(), r, timeout = options.collective_timeout] {
      raw->follower_status_[r] = engine::Follow(*raw->ranks_[r].executor, raw->communicator(r), timeout,
                                                [r] { return "rank " + std::to_string(r); });
    });
  }
  return group;
}

ThreadGroup::~ThreadGroup() { StopServing(); }

void ThreadGroup::StopServing() {
  if (engine_ == nullptr) return;
  engine_->scheduler().CheckInvariants();
  EXPECT_EQ(engine_->Stop(), absl::OkStatus());
  followers_.clear();
  for (const absl::Status& status : follower_status_) EXPECT_EQ(status, absl::OkStatus());
  engine_ = nullptr;
}

absl::Status ThreadGroup::Finish(
    const std::function<absl::Status(const engine::Rank&, comm::Communicator&)>& collective) {
  StopServing();
  std::vector<absl::Status> ended(ranks_.size());
  {
    std::vector<std::jthread> threads;
    for (size_t r = 0; r < ranks_.size(); ++r) {
      threads.emplace_back([&, r] { ended[r] = collective(ranks_[r], communicator(r)); });
    }
  }
  for (const absl::Status& status : ended) RW_RETURN_IF_ERROR(status);
  return absl::OkStatus();
}

std::vector<engine::Request> RequestsOfAllDraws(const std::vector<std::vector<int32_t>>& prompts, int32_t logprobs) {
  RW_CHECK(prompts.size() == 4);
  std::vector<engine::Request> requests;
  for (int i = 0; i < 4; ++i) {
    engine::Request request{.id = engine::SequenceId{static_cast<uint64_t>(i + 1)}, .prompt = prompts[i]};
    request.sampling = {.max_tokens = 5,
                        .temperature = 0.5f * static_cast<float>(i),
                        .top_k = i == 2 ? 40 : 0,
                        .top_p = i >= 2 ? 0.9f : 1.0f,
                        .min_p = i == 3 ? 0.02f : 0.0f,
                        .seed = 11 + static_cast<uint64_t>(i),
                        .ignore_eos = true,
                        .logprobs = logprobs};
    requests.push_back(std::move(request));
  }
  return requests;
}

void Collect(const std::vector<engine::Output>& outputs, std::map<engine::SequenceId, Result>& results) {
  const auto append = [](const std::vector<engine::SampledToken>& tokens, std::vector<float>& logprobs) {
    for (const engine::SampledToken& token : tokens) {
      logprobs.push_back(token.logprob);
      for (const engine::Candidate& candidate : token.top) logprobs.push_back(candidate.logprob);
    }
  };
  for (const engine::Output& output : outputs) {
    Result& result = results[output.id];
    if (!output.error.ok()) {
      result.error = output.error;
      continue;
    }
    RW_CHECK(output.token_offset == static_cast<int32_t>(result.tokens.size()), "a token is repeated or missing");
    for (const engine::SampledToken& token : output.tokens) result.tokens.push_back(token.id);
    append(output.tokens, result.logprobs);
    append(output.prompt_logprobs, result.prompt_logprobs);
    result.reason = output.reason;
    if (output.reason != engine::FinishReason::kNone) result.cached_prompt_tokens = output.cached_prompt_tokens;
  }
}

std::map<engine::SequenceId, Result> RunAll(engine::Engine& engine, const std::vector<engine::Request>& requests) {
  std::map<engine::SequenceId, Result> results;
  for (const engine::Request& request : requests) {
    results[request.id].tokens = request.generated;
    const absl::Status admitted = engine.Submit(request);
    if (!admitted.ok()) results[request.id].error = admitted;
  }
  while (engine.has_work()) {
    auto outputs = engine.Step();
    RW_CHECK(outputs.ok(), std::string(outputs.status().message()));
    Collect(*outputs, results);
    engine.scheduler().CheckInvariants();
  }
  return results;
}

Result RunAlone(engine::Engine& engine, const engine::Request& request) {
  return RunAll(engine, {request}).at(request.id);
}

}  // namespace rankwise::testing
