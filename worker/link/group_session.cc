#include "worker/link/group_session.h"

#include <algorithm>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/log.h"
#include "base/status_macros.h"

namespace rankwise::link {
namespace {

using engine::SequenceId;

constexpr absl::Duration kIdleWait = absl::Milliseconds(500);
constexpr absl::Duration kHeartbeatInterval = absl::Seconds(1);

engine::Request ToRequest(const worker::v1::Submit& submit) {
  engine::Request request{.id = SequenceId{submit.sequence()},
                          .prompt = {submit.prompt().begin(), submit.prompt().end()},
                          .generated = {submit.generated().begin(), submit.generated().end()},
                          .priority = submit.priority()};
  const rankwise::v1::SamplingParams& from = submit.sampling();
  engine::SamplingParams& to = request.sampling;
  to.max_tokens = static_cast<int32_t>(std::min<uint32_t>(from.max_tokens(), INT32_MAX));
  to.min_tokens = static_cast<int32_t>(std::min<uint32_t>(from.min_tokens(), INT32_MAX));
  if (from.has_temperature()) to.temperature = from.temperature();
  to.top_k = static_cast<int32_t>(std::min<uint32_t>(from.top_k(), INT32_MAX));
  if (from.has_top_p()) to.top_p = from.top_p();
  to.min_p = from.min_p();
  if (from.has_repetition_penalty()) to.repetition_penalty = from.repetition_penalty();
  to.frequency_penalty = from.frequency_penalty();
  to.presence_penalty = from.presence_penalty();
  to.logit_bias.assign(from.logit_bias().begin(), from.logit_bias().end());
  std::ranges::sort(to.logit_bias);
  to.seed = from.seed();
  to.stop_token_ids.assign(from.stop_token_ids().begin(), from.stop_token_ids().end());
  to.ignore_eos = from.ignore_eos();
  if (from.has_logprobs()) to.logprobs = static_cast<int32_t>(std::min<uint32_t>(from.logprobs(), INT32_MAX));
  if (from.has_prompt_logprobs()) {
    to.prompt_logprobs = static_cast<int32_t>(std::min<uint32_t>(from.prompt_logprobs(), INT32_MAX));
  }
  return request;
}

void CopyTo(const engine::SampledToken& from, worker::v1::Sampled& to) {
  to.set_id(from.id);
  to.set_logprob(from.logprob);
  for (const engine::Candidate& candidate : from.top) {
    worker::v1::Candidate& added = *to.add_top();
    added.set_id(candidate.id);
    added.set_logprob(candidate.logprob);
  }
}

void CopyTo(const engine::Output& from, worker::v1::SequenceOutput& to) {
  to.set_sequence(static_cast<uint64_t>(from.id));
  if (!from.error.ok()) {
    to.set_finished(true);
    to.set_error_code(static_cast<uint32_t>(from.error.code()));
    to.set_error_message(std::string(from.error.message()));
    return;
  }
  to.set_token_offset(from.token_offset);
  for (const auto& token : from.tokens) CopyTo(token, *to.add_tokens());
  for (const auto& token : from.prompt_logprobs) CopyTo(token, *to.add_prompt_logprobs());
  if (from.reason == engine::FinishReason::kNone) return;
  to.set_finished(true);
  to.set_reason(from.reason == engine::FinishReason::kStop ? rankwise::v1::FINISH_REASON_STOP
                                                           : rankwise::v1::FINISH_REASON_LENGTH);
  if (from.stop_token) to.set_stop_token_id(*from.stop_token);
  to.set_cached_prompt_tokens(from.cached_prompt_tokens);
  to.set_queue_seconds(absl::ToDoubleSeconds(from.queue_time));
  to.set_prefill_seconds(absl::ToDoubleSeconds(from.prefill_time));
  to.set_decode_seconds(absl::ToDoubleSeconds(from.decode_time));
}

// One epoch: from a welcome to the end of its stream.
class Session {
 public:
  Session(engine::Engine& engine, const SessionOptions& options, const std::atomic<bool>& should_stop,
          const std::function<std::string()>& report)
      : engine_(engine), options_(options), should_stop_(should_stop), report_(report) {}

  absl::Status Run() {
    absl::Status ended = ConnectAndServe();
    while (absl::IsUnavailable(ended) && !should_stop_) ended = ConnectAndServe();
    if (absl::IsUnavailable(ended) && should_stop_) ended = absl::OkStatus();
    RW_RETURN_IF_ERROR(ended);
    return engine_.Stop();
  }

 private:
  // Unavailable when the stream was lost (join again); any other error is final.
  absl::Status ConnectAndServe() {
    RW_RETURN_IF_ERROR(Connect());
    const absl::Status served = Serve();
    for (const SequenceId id : live_) engine_.Cancel(id);
    live_.clear();
    if (absl::IsUnavailable(served)) spdlog::warn("lost the coordinator: {}", std::string(served.message()));
    return served;
  }

  // Followers wait for a plan with a deadline, so the attempts are short and a heartbeat goes out between them.
  absl::Status Connect() {
    const absl::Time give_up = absl::Now() + options_.reconnect_limit;
    LinkOptions attempt = options_.link;
    attempt.connect_timeout = absl::Seconds(2);
    while (true) {
      auto connected = CoordinatorLink::Connect(attempt, options_.join);
      RW_RETURN_IF_ERROR(engine_.Heartbeat());
      if (connected.ok()) {
        link_ = *std::move(connected);
        spdlog::info("joined {} as group {}, epoch {}", options_.link.address, link_->group(), link_->epoch());
        return absl::OkStatus();
      }
      const bool may_come = absl::IsUnavailable(connected.status()) || absl::IsDeadlineExceeded(connected.status());
      if (!may_come || absl::Now() > give_up || should_stop_) {
        return absl::AbortedError(
            absl::StrCat("no coordinator at ", options_.link.address, ": ", std::string(connected.status().message())));
      }
      absl::SleepFor(absl::Milliseconds(100));
    }
  }

  absl::Status Serve() {
    bool is_stopping = false;
    while (true) {
      absl::StatusOr<Inbox> inbox = link_->Poll(engine_.has_work() ? absl::ZeroDuration() : kIdleWait);
      if (!inbox.ok() && is_stopping) return absl::OkStatus();
      if (!inbox.ok()) return absl::UnavailableError(inbox.status().message());
      TakeIn(*inbox);
      is_stopping = is_stopping || inbox->should_stop || should_stop_;
      RW_RETURN_IF_ERROR(Advance());
      if (is_stopping && !engine_.has_work()) {
        const absl::Status finished = link_->Finish(absl::Seconds(5));
        if (!finished.ok()) spdlog::warn("leaving without a goodbye: {}", std::string(finished.message()));
        return absl::OkStatus();
      }
    }
  }

  void TakeIn(const Inbox& inbox) {
    for (const uint64_t sequence : inbox.cancels) {
      engine_.Cancel(SequenceId{sequence});
      live_.erase(SequenceId{sequence});
    }
    worker::v1::Outputs refused;
    for (const worker::v1::Submit& submit : inbox.submits) {
      const SequenceId id{submit.sequence()};
      const absl::Status admitted = engine_.Submit(ToRequest(submit));
      if (admitted.ok()) {
        live_.insert(id);
        continue;
      }
      engine::Output output{.id = id};
      output.error = admitted;
      CopyTo(output, *refused.add_sequences());
    }
    if (refused.sequences_size() > 0) Send(std::move(refused));
  }

  absl::Status Advance() {
    if (engine_.has_work()) {
      RW_ASSIGN_OR_RETURN(const std::vector<engine::Output> outputs, engine_.Step());
      latest_step_ = absl::Now();
      latest_plan_ = latest_step_;
      worker::v1::Outputs message;
      for (const engine::Output& output : outputs) {
        CopyTo(output, *message.add_sequences());
        if (output.reason != engine::FinishReason::kNone || !output.error.ok()) live_.erase(output.id);
      }
      if (message.sequences_size() > 0) Send(std::move(message));
    } else if (absl::Now() - latest_plan_ >= kHeartbeatInterval) {
      RW_RETURN_IF_ERROR(engine_.Heartbeat());
      latest_plan_ = absl::Now();
    }
    if (absl::Now() - latest_report_ >= options_.report_interval) {
      RW_ASSIGN_OR_RETURN(rank_reports_, engine_.CollectReports(report_()));
      latest_report_ = latest_plan_ = absl::Now();
    }
    if (absl::Now() - latest_load_ >= options_.load_interval) {
      link_->SendLoad(Load());
      latest_load_ = absl::Now();
    }
    return absl::OkStatus();
  }

  void Send(worker::v1::Outputs message) {
    message.set_epoch(link_->epoch());
    link_->SendOutputs(std::move(message));
  }

  rankwise::v1::GroupLoad Load() const {
    const scheduler::SchedulerLoad load = engine_.scheduler().load();
    const engine::EngineCounters& counters = engine_.counters();
    rankwise::v1::GroupLoad message;
    message.set_group(link_->group());
    message.set_epoch(link_->epoch());
    message.set_serving(true);
    message.set_running(load.running);
    message.set_waiting(load.waiting);
    message.set_blocks_free(load.blocks_free);
    message.set_blocks_total(load.blocks_total);
    message.set_block_tokens(options_.join.block_tokens());
    message.set_steps(counters.steps);
    message.set_seconds_since_step(absl::ToDoubleSeconds(absl::Now() - latest_step_));
    message.set_step_seconds(absl::ToDoubleSeconds(counters.latest_step_time));
    message.set_prompt_tokens(counters.prompt_tokens);
    message.set_generated_tokens(counters.generated_tokens);
    message.set_cached_tokens(load.cached_tokens);
    message.set_preemptions(load.preemptions);
    message.set_drafted_tokens(load.drafted_tokens);
    message.set_accepted_tokens(load.accepted_tokens);
    for (const std::string& bytes : rank_reports_) message.add_ranks()->ParseFromString(bytes);
    return message;
  }

  engine::Engine& engine_;
  const SessionOptions& options_;
  const std::atomic<bool>& should_stop_;
  const std::function<std::string()>& report_;
  std::unique_ptr<CoordinatorLink> link_;
  absl::flat_hash_set<SequenceId> live_;
  std::vector<std::string> rank_reports_;
  absl::Time latest_step_ = absl::Now(), latest_plan_ = absl::Now();
  absl::Time latest_report_ = absl::InfinitePast(), latest_load_ = absl::InfinitePast();
};

}  // namespace

absl::Status ServeGroup(engine::Engine& engine, const SessionOptions& options, const std::atomic<bool>& should_stop,
                        const std::function<std::string()>& report) {
  return Session(engine, options, should_stop, report).Run();
}

}  // namespace rankwise::link
