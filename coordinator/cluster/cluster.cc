#include "coordinator/cluster/cluster.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"

namespace rankwise::cluster {
namespace {

using worker::v1::Join;
using worker::v1::SequenceOutput;
using worker::v1::Submit;
using worker::v1::ToGroup;
using worker::v1::Welcome;

absl::Status CheckSame(const char* what, const std::string& serves, const std::string& joins) {
  if (serves == joins) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat("this cluster serves ", what, " ", serves, ", the group has ", joins));
}

absl::Status CheckSameModel(const rankwise::v1::GetModelInfoResponse& serves, const rankwise::v1::GetModelInfoResponse& joins) {
  RW_RETURN_IF_ERROR(CheckSame("model fingerprint", serves.fingerprint(), joins.fingerprint()));
  RW_RETURN_IF_ERROR(CheckSame("kv format", serves.kv_format(), joins.kv_format()));
  RW_RETURN_IF_ERROR(CheckSame("kv scales", serves.kv_scales_id(), joins.kv_scales_id()));
  RW_RETURN_IF_ERROR(CheckSame("vocab_size", absl::StrCat(serves.vocab_size()), absl::StrCat(joins.vocab_size())));
  return CheckSame("max_tokens", absl::StrCat(serves.max_tokens()), absl::StrCat(joins.max_tokens()));
}

}  // namespace

absl::StatusOr<Welcome> Cluster::Join(const worker::v1::Join& join, GroupChannel* channel, absl::Time now) {
  if (join.model().vocab_size() == 0 || join.model().max_tokens() == 0 || join.max_running() == 0) {
    return absl::InvalidArgumentError("a join needs vocab_size, max_tokens and max_running");
  }
  absl::MutexLock lock(&mutex_);
  if (is_draining_) return absl::UnavailableError("the coordinator drains");
  if (model_) {
    RW_RETURN_IF_ERROR(CheckSameModel(*model_, join.model()));
  } else {
    model_ = join.model();
  }
  const uint64_t epoch = next_epoch_++;
  std::set<uint64_t> taken;
  for (const auto& [other_epoch, other] : groups_) taken.insert(other.id);
  Group& group = groups_[epoch];
  for (group.id = 1; taken.contains(group.id);) ++group.id;
  group.join = join;
  group.channel = channel;
  group.heard = now;
  Welcome welcome;
  welcome.set_group(group.id);
  welcome.set_epoch(epoch);
  ToGroup message;
  *message.mutable_welcome() = welcome;
  channel->Send(std::move(message));
  Dispatch();
  return welcome;
}

void Cluster::Leave(uint64_t epoch, absl::Time now) {
  absl::MutexLock lock(&mutex_);
  DropEpoch(epoch, absl::OkStatus(), now);
}

void Cluster::DropEpoch(uint64_t epoch, const absl::Status& reason, absl::Time now) {
  const auto found = groups_.find(epoch);
  if (found == groups_.end()) return;
  for (const uint64_t number : found->second.sequences) {
    Sequence& sequence = sequences_.at(number);
    sequence.epoch = 0;
    sequence.pending_since = now;
    ++sequence.replays;
    pending_.emplace(-sequence.submit.priority(), number);
  }
  found->second.channel->Close(reason);
  groups_.erase(found);
  Dispatch();
}

void Cluster::TakeLoad(uint64_t epoch, const rankwise::v1::GroupLoad& load, absl::Time now) {
  absl::MutexLock lock(&mutex_);
  const auto found = groups_.find(epoch);
  if (found == groups_.end()) return;
  found->second.heard = now;
  found->second.load = load;
  found->second.load.set_group(found->second.id);
  found->second.load.set_epoch(epoch);
}

// The least loaded group first; a group is given no more than it runs at once plus half of that waiting, so that what waits
// longer can still go elsewhere.
void Cluster::Dispatch() {
  while (!pending_.empty()) {
    Group* best = nullptr;
    uint64_t best_epoch = 0;
    for (auto& [epoch, group] : groups_) {
      const uint64_t limit = group.join.max_running() + std::min(group.join.max_waiting(), group.join.max_running() / 2);
      if (group.sequences.size() >= limit) continue;
      if (best == nullptr || group.outstanding_tokens < best->outstanding_tokens) best = &group, best_epoch = epoch;
    }
    if (best == nullptr) return;
    const uint64_t number = pending_.begin()->second;
    pending_.erase(pending_.begin());
    Sequence& sequence = sequences_.at(number);
    sequence.epoch = best_epoch;
    best->sequences.insert(number);
    best->outstanding_tokens += sequence.tokens();
    ToGroup message;
    *message.mutable_submit() = sequence.submit;
    best->channel->Send(std::move(message));
  }
}

void Cluster::TakeOutputs(uint64_t epoch, const worker::v1::Outputs& outputs, absl::Time now) {
  absl::MutexLock lock(&mutex_);
  const auto found = groups_.find(epoch);
  if (found == groups_.end() || outputs.epoch() != epoch) return;
  found->second.heard = now;
  for (const SequenceOutput& output : outputs.sequences()) TakeOutput(epoch, output);
  Dispatch();
}

void Cluster::TakeOutput(uint64_t epoch, const SequenceOutput& output) {
  const uint64_t number = output.sequence();
  const auto found = sequences_.find(number);
  if (found == sequences_.end() || found->second.epoch != epoch) return;
  Sequence& sequence = found->second;
  if (output.error_code() != 0) {
    SequenceListener* listener = sequence.listener;
    const absl::Status status(static_cast<absl::StatusCode>(output.error_code()), output.error_message());
    Erase(number, /*tells_group=*/false);
    listener->OnFailed(number, status);
    return;
  }
  if (static_cast<int>(output.token_offset()) != sequence.submit.generated_size()) {
    SequenceListener* listener = sequence.listener;
    Erase(number, /*tells_group=*/true);
    listener->OnFailed(number, absl::DataLossError(absl::StrCat("the group sent token ", output.token_offset(), " after ",
                                                                sequence.submit.generated_size())));
    return;
  }
  for (const worker::v1::Sampled& token : output.tokens()) sequence.submit.add_generated(token.id());
  const bool wants_more = sequence.listener->OnOutput(number, output, sequence.replays);
  if (output.finished() || !wants_more) Erase(number, /*tells_group=*/!output.finished());
}

absl::StatusOr<std::vector<uint64_t>> Cluster::Submit(
    std::vector<worker::v1::Submit> sequences, SequenceListener* listener, absl::Time deadline, absl::Time now,
    const std::function<void(std::span<const uint64_t>)>& accepted) {
  absl::MutexLock lock(&mutex_);
  if (is_draining_) return absl::UnavailableError("the coordinator drains and admits nothing more");
  if (sequences_.size() + sequences.size() > options_.max_live) {
    return absl::ResourceExhaustedError(absl::StrCat(sequences_.size(), " sequences are live and ", sequences.size(),
                                                     " more would exceed the limit of ", options_.max_live));
  }
  std::vector<uint64_t> numbers;
  for (worker::v1::Submit& submit : sequences) {
    const uint64_t number = next_sequence_++;
    submit.set_sequence(number);
    pending_.emplace(-submit.priority(), number);
    sequences_[number] = {.submit = std::move(submit), .listener = listener, .deadline = deadline, .pending_since = now};
    numbers.push_back(number);
  }
  accepted(numbers);
  Dispatch();
  return numbers;
}

void Cluster::Erase(uint64_t number, bool tells_group) {
  const auto found = sequences_.find(number);
  Sequence& sequence = found->second;
  if (const auto group = groups_.find(sequence.epoch); group != groups_.end()) {
    group->second.sequences.erase(number);
    group->second.outstanding_tokens -= sequence.tokens();
    if (tells_group) {
      ToGroup message;
      message.mutable_cancel()->add_sequences(number);
      group->second.channel->Send(std::move(message));
    }
  }
  pending_.erase({-sequence.submit.priority(), number});
  sequences_.erase(found);
}

void Cluster::Remove(uint64_t number) {
  absl::MutexLock lock(&mutex_);
  if (!sequences_.contains(number)) return;
  Erase(number, /*tells_group=*/true);
  Dispatch();
}

void Cluster::End(uint64_t number, Ending ending) {
  absl::MutexLock lock(&mutex_);
  const auto found = sequences_.find(number);
  if (found == sequences_.end()) return;
  SequenceListener* listener = found->second.listener;
  const uint32_t replays = found->second.replays;
  Erase(number, /*tells_group=*/true);
  listener->OnEnd(number, ending, replays);
  Dispatch();
}

void Cluster::Tick(absl::Time now) {
  absl::MutexLock lock(&mutex_);
  std::vector<uint64_t> silent, expired, stranded;
  for (const auto& [epoch, group] : groups_) {
    if (now - group.heard > options_.group_timeout) silent.push_back(epoch);
  }
  for (const uint64_t epoch : silent) {
    DropEpoch(epoch, absl::UnavailableError(absl::StrCat("no heartbeat for ", absl::FormatDuration(options_.group_timeout))), now);
  }
  for (const auto& [number, sequence] : sequences_) {
    if (now >= sequence.deadline) {
      expired.push_back(number);
    } else if (sequence.epoch == 0 && groups_.empty() && now - sequence.pending_since > options_.group_wait) {
      stranded.push_back(number);
    }
  }
  for (const uint64_t number : expired) {
    const Sequence& sequence = sequences_.at(number);
    SequenceListener* listener = sequence.listener;
    const uint32_t replays = sequence.replays;
    Erase(number, /*tells_group=*/true);
    listener->OnEnd(number, Ending::kDeadline, replays);
  }
  for (const uint64_t number : stranded) {
    SequenceListener* listener = sequences_.at(number).listener;
    Erase(number, /*tells_group=*/false);
    listener->OnFailed(number, absl::UnavailableError(absl::StrCat("no worker group for ", absl::FormatDuration(options_.group_wait))));
  }
  Dispatch();
}

void Cluster::StartDrain() {
  absl::MutexLock lock(&mutex_);
  is_draining_ = true;
}

void Cluster::StopGroups() {
  absl::MutexLock lock(&mutex_);
  for (auto& [epoch, group] : groups_) {
    ToGroup message;
    message.mutable_stop();
    group.channel->Send(std::move(message));
  }
}

std::optional<rankwise::v1::GetModelInfoResponse> Cluster::model() const {
  absl::MutexLock lock(&mutex_);
  return model_;
}

bool Cluster::is_serving() const {
  absl::MutexLock lock(&mutex_);
  return !groups_.empty() && !is_draining_;
}

uint32_t Cluster::live() const {
  absl::MutexLock lock(&mutex_);
  return static_cast<uint32_t>(sequences_.size());
}

rankwise::v1::GetLoadResponse Cluster::Load(absl::Time now) const {
  absl::MutexLock lock(&mutex_);
  rankwise::v1::GetLoadResponse response;
  response.set_queued(static_cast<uint32_t>(pending_.size()));
  response.set_live(static_cast<uint32_t>(sequences_.size()));
  response.set_max_live(options_.max_live);
  response.set_draining(is_draining_);
  for (const auto& [epoch, group] : groups_) {
    rankwise::v1::GroupLoad& load = *response.add_groups();
    load = group.load;
    load.set_group(group.id);
    load.set_epoch(epoch);
    load.set_blocks_total(group.join.blocks_total());
    load.set_block_tokens(group.join.block_tokens());
    load.set_seconds_since_step(load.seconds_since_step() + absl::ToDoubleSeconds(now - group.heard));
    if (load.ranks().empty()) *load.mutable_ranks() = group.join.ranks();
  }
  return response;
}

}  // namespace rankwise::cluster
