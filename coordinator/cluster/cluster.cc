#include "coordinator/cluster/cluster.h"

#include <algorithm>
#include <tuple>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"

namespace rankwise::cluster {
namespace {

using rankwise::v1::GetModelInfoResponse;
using worker::v1::SequenceOutput;
using worker::v1::ToGroup;

absl::Status CheckSame(const char* what, const std::string& serves, const std::string& joins) {
  if (serves == joins) return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrCat("this cluster serves ", what, " \"", serves, "\", the group has \"", joins, "\""));
}

absl::Status CheckSameModel(const GetModelInfoResponse& serves, const GetModelInfoResponse& joins) {
  RW_RETURN_IF_ERROR(CheckSame("fingerprint", serves.fingerprint(), joins.fingerprint()));
  RW_RETURN_IF_ERROR(CheckSame("kv_format", serves.kv_format(), joins.kv_format()));
  RW_RETURN_IF_ERROR(CheckSame("kv_scales_id", serves.kv_scales_id(), joins.kv_scales_id()));
  RW_RETURN_IF_ERROR(CheckSame("vocab_size", absl::StrCat(serves.vocab_size()), absl::StrCat(joins.vocab_size())));
  return CheckSame("max_tokens", absl::StrCat(serves.max_tokens()), absl::StrCat(joins.max_tokens()));
}

}  // namespace

// --- Groups.

absl::StatusOr<worker::v1::Welcome> Cluster::Join(const worker::v1::Join& join, GroupChannel* channel, absl::Time now) {
  if (join.model().vocab_size() == 0 || join.model().max_tokens() < 2 || join.max_running() == 0) {
    return absl::InvalidArgumentError(absl::StrCat("a join needs vocab_size=", join.model().vocab_size(),
                                                   " and max_running=", join.max_running(),
                                                   " above 0, and max_tokens=", join.model().max_tokens(), " above 1"));
  }
  absl::MutexLock lock(&mutex_);
  if (is_stopping_) return absl::UnavailableError("the coordinator is shutting down");
  const bool is_free = groups_.empty() && requests_.empty();
  if (model_ && !is_free) RW_RETURN_IF_ERROR(CheckSameModel(*model_, join.model()));
  model_ = join.model();

  std::set<uint64_t> taken;
  for (const auto& [epoch, other] : groups_) taken.insert(other.id);
  const uint64_t epoch = next_epoch_++;
  Group& group = groups_[epoch];
  for (group.id = 1; taken.contains(group.id);) ++group.id;
  group.join = join;
  group.channel = channel;
  group.heard = now;
  worker::v1::Welcome welcome;
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

void Cluster::TakeLoad(uint64_t epoch, const rankwise::v1::GroupLoad& load, absl::Time now) {
  absl::MutexLock lock(&mutex_);
  const auto found = groups_.find(epoch);
  if (found == groups_.end()) return;
  found->second.heard = now;
  found->second.load = load;
}

void Cluster::TakeOutputs(uint64_t epoch, const worker::v1::Outputs& outputs, absl::Time now) {
  absl::MutexLock lock(&mutex_);
  const auto found = groups_.find(epoch);
  if (found == groups_.end()) return;
  if (outputs.epoch() != epoch) {
    DropEpoch(epoch,
              absl::InvalidArgumentError(
                  absl::StrCat("output of epoch ", outputs.epoch(), " on the stream of epoch ", epoch)),
              now);
    return;
  }
  found->second.heard = now;
  for (const SequenceOutput& output : outputs.sequences()) {
    if (const absl::Status taken = TakeOutput(epoch, output); !taken.ok()) {
      DropEpoch(epoch, taken, now);
      return;
    }
  }
  Dispatch();
}

absl::Status Cluster::TakeOutput(uint64_t epoch, const SequenceOutput& output) {
  const uint64_t number = output.sequence();
  const auto found = sequences_.find(number);
  // Cancelled while this was on its way.
  if (found == sequences_.end() || found->second.epoch != epoch) return absl::OkStatus();
  Sequence& sequence = found->second;
  RW_RETURN_IF_ERROR(CheckOutput(sequence, output));
  if (output.error_code() != 0) {
    Fail(sequence.request, absl::Status(static_cast<absl::StatusCode>(output.error_code()), output.error_message()));
    return absl::OkStatus();
  }
  for (const worker::v1::Sampled& token : output.tokens()) sequence.generated.push_back(token.id());
  Charge(sequence, -output.tokens_size());
  sequence.has_prompt_logprobs = sequence.has_prompt_logprobs || output.prompt_logprobs_size() > 0;
  SampleListener* listener = requests_.at(sequence.request).request.listener;
  const bool wants_more = listener->OnOutput(sequence.sample, output, sequence.replays);
  if (output.finished() || !wants_more) Erase(number, /*tells_group=*/!output.finished());
  return absl::OkStatus();
}

absl::Status Cluster::CheckOutput(const Sequence& sequence, const SequenceOutput& output) const {
  const auto refuse = [&output](auto... what) {
    return absl::InvalidArgumentError(absl::StrCat("sequence ", output.sequence(), ": ", what...));
  };
  if (output.error_code() > static_cast<uint32_t>(absl::StatusCode::kUnauthenticated)) {
    return refuse("error_code=", output.error_code(), " is no status code");
  }
  if (output.error_code() != 0) return absl::OkStatus();
  const worker::v1::Submit& submit = requests_.at(sequence.request).request.sequence;
  if (output.token_offset() != sequence.generated.size()) {
    return refuse("token_offset=", output.token_offset(), " after ", sequence.generated.size(), " tokens");
  }
  if (output.tokens_size() + sequence.generated.size() > submit.sampling().max_tokens()) {
    return refuse(output.tokens_size(), " tokens after ", sequence.generated.size(),
                  " exceed max_tokens=", submit.sampling().max_tokens());
  }
  for (const worker::v1::Sampled& token : output.tokens()) {
    if (token.id() < 0 || static_cast<uint32_t>(token.id()) >= model_->vocab_size()) {
      return refuse("token ", token.id(), " is outside the vocabulary of ", model_->vocab_size());
    }
  }
  if (output.prompt_logprobs_size() >= submit.prompt_size()) {
    return refuse(output.prompt_logprobs_size(), " prompt_logprobs for a prompt of ", submit.prompt_size());
  }
  if (output.finished() && output.reason() != rankwise::v1::FINISH_REASON_STOP &&
      output.reason() != rankwise::v1::FINISH_REASON_LENGTH) {
    return refuse("finished with reason ", static_cast<int>(output.reason()));
  }
  return absl::OkStatus();
}

void Cluster::DropEpoch(uint64_t epoch, const absl::Status& reason, absl::Time now) {
  const auto found = groups_.find(epoch);
  if (found == groups_.end()) return;
  // Not a range loop: a request that fails here takes its other sequences out of the group.
  while (!found->second.sequences.empty()) Requeue(*found->second.sequences.begin(), now);
  found->second.channel->Close(reason);
  groups_.erase(found);
  if (groups_.empty()) alone_since_ = now;
  Dispatch();
}

void Cluster::Requeue(uint64_t number, absl::Time now) {
  Sequence& sequence = sequences_.at(number);
  LiveRequest& live = requests_.at(sequence.request);
  groups_.at(sequence.epoch).sequences.erase(number);
  Charge(sequence, -OutstandingTokens(sequence));
  sequence.epoch = 0;
  sequence.pending_since = now;
  pending_.Add(EntryOf(number));
  ++sequence.replays;
  const bool is_fruitful = sequence.generated.size() > sequence.generated_before;
  sequence.fruitless_replays = is_fruitful ? 0 : sequence.fruitless_replays + 1;
  if (sequence.fruitless_replays > options_.max_fruitless_replays) {
    Fail(sequence.request, absl::UnavailableError(absl::StrCat("lost its worker group ", sequence.fruitless_replays,
                                                               " times without a token from any")));
  } else if (sequence.generated.size() >= live.request.sequence.sampling().max_tokens()) {
    // The group was lost between its last token and the word that this was the last.
    SequenceOutput last;
    last.set_sequence(number);
    last.set_token_offset(static_cast<uint32_t>(sequence.generated.size()));
    last.set_finished(true);
    last.set_reason(rankwise::v1::FINISH_REASON_LENGTH);
    live.request.listener->OnOutput(sequence.sample, last, sequence.replays);
    Erase(number, /*tells_group=*/false);
  }
}

// A group gets what it runs at once and half of that to keep it fed; what would wait longer can still go elsewhere.
uint64_t Cluster::Group::limit() const {
  return uint64_t{join.max_running()} + std::min(join.max_waiting(), join.max_running() / 2);
}

Cluster::Group* Cluster::LeastLoaded() {
  Group* best = nullptr;
  for (auto& [epoch, group] : groups_) {
    if (group.sequences.size() >= group.limit()) continue;
    if (best == nullptr ||
        std::tie(group.outstanding_tokens, group.id) < std::tie(best->outstanding_tokens, best->id)) {
      best = &group;
    }
  }
  return best;
}

void Cluster::Dispatch() {
  while (true) {
    Group* group = LeastLoaded();
    const std::optional<uint64_t> number = pending_.Next(tenant_tokens_);
    if (group == nullptr || !number) return;
    Sequence& sequence = sequences_.at(*number);
    pending_.Remove(EntryOf(*number));
    for (const auto& [epoch, candidate] : groups_) {
      if (&candidate == group) sequence.epoch = epoch;
    }
    sequence.generated_before = sequence.generated.size();
    group->sequences.insert(*number);
    Charge(sequence, OutstandingTokens(sequence));
    ToGroup message;
    *message.mutable_submit() = MakeSubmit(*number);
    group->channel->Send(std::move(message));
  }
}

worker::v1::Submit Cluster::MakeSubmit(uint64_t number) const {
  const Sequence& sequence = sequences_.at(number);
  worker::v1::Submit submit = requests_.at(sequence.request).request.sequence;
  submit.set_sequence(number);
  submit.mutable_sampling()->set_seed(submit.sampling().seed() + sequence.sample);
  submit.mutable_generated()->Assign(sequence.generated.begin(), sequence.generated.end());
  if (sequence.has_prompt_logprobs) submit.mutable_sampling()->clear_prompt_logprobs();
  return submit;
}

void Cluster::StopGroups() {
  absl::MutexLock lock(&mutex_);
  is_stopping_ = true;
  for (auto& [epoch, group] : groups_) {
    ToGroup message;
    message.mutable_stop();
    group.channel->Send(std::move(message));
  }
}

// --- Requests.

absl::Status Cluster::CheckRoom(uint32_t samples) const {
  absl::MutexLock lock(&mutex_);
  return CheckRoomLocked(samples);
}

absl::Status Cluster::CheckRoomLocked(uint32_t samples) const {
  if (is_draining_) return absl::UnavailableError("the coordinator drains and admits nothing more");
  if (sequences_.size() + samples <= options_.max_live) return absl::OkStatus();
  return absl::ResourceExhaustedError(absl::StrCat(sequences_.size(), " samples are live and ", samples,
                                                   " more would exceed the limit of ", options_.max_live));
}

absl::StatusOr<RequestKey> Cluster::Submit(Request request, absl::Time now) {
  absl::MutexLock lock(&mutex_);
  RW_CHECK(request.samples > 0 && request.listener != nullptr);
  RW_RETURN_IF_ERROR(CheckRoomLocked(request.samples));
  const RequestKey key{next_request_++};
  if (!keys_.emplace(request.id, key).second) {
    return absl::AlreadyExistsError(absl::StrCat("request_id \"", request.id, "\" is live"));
  }
  LiveRequest& live = requests_[key];
  live.request = std::move(request);
  for (uint32_t sample = 0; sample < live.request.samples; ++sample) {
    const uint64_t number = next_sequence_++;
    sequences_[number] = {.request = key, .sample = sample, .pending_since = now};
    live.sequences.insert(number);
    pending_.Add(EntryOf(number));
  }
  Dispatch();
  return key;
}

void Cluster::Forget(RequestKey key) {
  absl::MutexLock lock(&mutex_);
  EraseAll(key);
  Dispatch();
}

bool Cluster::Abort(const std::string& id) {
  absl::MutexLock lock(&mutex_);
  const auto found = keys_.find(id);
  if (found == keys_.end()) return false;
  EndAll(found->second, Ending::kCancelled);
  Dispatch();
  return true;
}

void Cluster::FailAll(const absl::Status& status) {
  absl::MutexLock lock(&mutex_);
  while (!requests_.empty()) Fail(requests_.begin()->first, status);
}

void Cluster::Tick(absl::Time now) {
  absl::MutexLock lock(&mutex_);
  std::vector<uint64_t> silent;
  for (const auto& [epoch, group] : groups_) {
    if (now - group.heard > Patience(group)) silent.push_back(epoch);
  }
  for (const uint64_t epoch : silent) {
    const absl::Duration silence = now - groups_.at(epoch).heard;
    DropEpoch(epoch, absl::UnavailableError(absl::StrCat("no heartbeat for ", absl::FormatDuration(silence))), now);
  }
  std::set<RequestKey> expired, stranded;
  for (const auto& [key, live] : requests_) {
    if (now >= live.request.deadline) expired.insert(key);
  }
  if (groups_.empty() && now - alone_since_ > options_.group_wait) {
    for (const auto& [number, sequence] : sequences_) {
      if (now - sequence.pending_since > options_.group_wait) stranded.insert(sequence.request);
    }
  }
  for (const RequestKey key : expired) EndAll(key, Ending::kDeadline);
  for (const RequestKey key : stranded) {
    Fail(key, absl::UnavailableError(absl::StrCat("no worker group for ", absl::FormatDuration(options_.group_wait))));
  }
  Dispatch();
}

absl::Duration Cluster::Patience(const Group& group) const {
  if (group.sequences.empty()) return options_.group_timeout;
  return std::max(options_.group_timeout, absl::Seconds(group.join.max_step_seconds()));
}

void Cluster::Erase(uint64_t number, bool tells_group) {
  const auto found = sequences_.find(number);
  const Sequence& sequence = found->second;
  pending_.Remove(EntryOf(number));
  if (sequence.epoch != 0) {
    Charge(sequence, -OutstandingTokens(sequence));
    Group& group = groups_.at(sequence.epoch);
    group.sequences.erase(number);
    if (tells_group) {
      ToGroup message;
      message.mutable_cancel()->add_sequences(number);
      group.channel->Send(std::move(message));
    }
  }
  const auto live = requests_.find(sequence.request);
  live->second.sequences.erase(number);
  if (live->second.sequences.empty()) {
    keys_.erase(live->second.request.id);
    requests_.erase(live);
  }
  sequences_.erase(found);
}

void Cluster::EraseAll(RequestKey key) {
  const auto live = requests_.find(key);
  if (live == requests_.end()) return;
  const std::set<uint64_t> numbers = live->second.sequences;
  for (const uint64_t number : numbers) Erase(number, /*tells_group=*/true);
}

void Cluster::EndAll(RequestKey key, Ending ending) {
  const auto live = requests_.find(key);
  if (live == requests_.end()) return;
  SampleListener* listener = live->second.request.listener;
  const std::set<uint64_t> numbers = live->second.sequences;
  for (const uint64_t number : numbers) {
    const Sequence& sequence = sequences_.at(number);
    listener->OnEnd(sequence.sample, ending, sequence.replays);
    Erase(number, /*tells_group=*/true);
  }
}

void Cluster::Fail(RequestKey key, const absl::Status& status) {
  const auto live = requests_.find(key);
  if (live == requests_.end()) return;
  live->second.request.listener->OnFailed(status);
  EraseAll(key);
}

// --- Accounts.

int64_t Cluster::OutstandingTokens(const Sequence& sequence) const {
  const worker::v1::Submit& submit = requests_.at(sequence.request).request.sequence;
  return int64_t{submit.prompt_size()} + submit.sampling().max_tokens() -
         static_cast<int64_t>(sequence.generated.size());
}

void Cluster::Charge(const Sequence& sequence, int64_t tokens) {
  groups_.at(sequence.epoch).outstanding_tokens += tokens;
  const std::string& tenant = requests_.at(sequence.request).request.tenant;
  if ((tenant_tokens_[tenant] += tokens) == 0) tenant_tokens_.erase(tenant);
}

PendingQueue::Entry Cluster::EntryOf(uint64_t number) const {
  const Request& request = requests_.at(sequences_.at(number).request).request;
  return {.priority = request.sequence.priority(), .tenant = request.tenant, .sequence = number};
}

// --- State.

void Cluster::StartDrain() {
  absl::MutexLock lock(&mutex_);
  is_draining_ = true;
}

std::optional<GetModelInfoResponse> Cluster::model() const {
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
  response.set_queued(pending_.size());
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

void Cluster::CheckInvariants() const {
  absl::MutexLock lock(&mutex_);
  std::map<uint64_t, int64_t> group_tokens;
  absl::flat_hash_map<std::string, int64_t> tenant_tokens;
  size_t held = 0, pending = 0, owned = 0;
  for (const auto& [number, sequence] : sequences_) {
    const LiveRequest& live = requests_.at(sequence.request);
    RW_CHECK(live.sequences.contains(number));
    RW_CHECK(sequence.generated.size() < live.request.sequence.sampling().max_tokens() || sequence.epoch != 0);
    if (sequence.epoch == 0) {
      ++pending;
      continue;
    }
    ++held;
    RW_CHECK(groups_.at(sequence.epoch).sequences.contains(number));
    group_tokens[sequence.epoch] += OutstandingTokens(sequence);
    tenant_tokens[live.request.tenant] += OutstandingTokens(sequence);
  }
  RW_CHECK(pending == pending_.size());
  RW_CHECK(tenant_tokens == tenant_tokens_);
  for (const auto& [epoch, group] : groups_) {
    RW_CHECK(group.sequences.size() <= group.limit());
    RW_CHECK(group_tokens[epoch] == group.outstanding_tokens);
    held -= group.sequences.size();
  }
  RW_CHECK(held == 0);
  for (const auto& [key, live] : requests_) {
    RW_CHECK(!live.sequences.empty() && keys_.at(live.request.id) == key);
    owned += live.sequences.size();
  }
  RW_CHECK(owned == sequences_.size() && keys_.size() == requests_.size() && owned <= options_.max_live);
}

}  // namespace rankwise::cluster
