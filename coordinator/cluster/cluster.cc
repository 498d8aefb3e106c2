#include "coordinator/cluster/cluster.h"

#include <algorithm>
#include <tuple>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "coordinator/cluster/retry_delay.h"
#include "proto/numerics.h"

namespace rankwise::cluster {
namespace {

using rankwise::v1::GetModelInfoResponse;
using worker::v1::SequenceOutput;
using worker::v1::ToGroup;

constexpr absl::Duration kDrainRetryDelay = absl::Seconds(5), kUnknownRetryDelay = absl::Seconds(5);
constexpr absl::Duration kLeastRetryDelay = absl::Milliseconds(100), kMostRetryDelay = absl::Seconds(60);

absl::Status CheckSame(const std::string& what, const std::string& serves, const std::string& joins) {
  if (serves == joins) return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrCat("this cluster serves ", what, " \"", serves, "\", the group has \"", joins, "\""));
}

absl::Status CheckSameModel(const GetModelInfoResponse& serves, const GetModelInfoResponse& joins) {
  const auto serving = wire::Numerics(serves), joining = wire::Numerics(joins);
  for (size_t i = 0; i < serving.size(); ++i) {
    RW_RETURN_IF_ERROR(CheckSame(serving[i].first, serving[i].second, joining[i].second));
  }
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
  group.heard = group.moved = now;
  group.room = rooms_.size();
  rooms_.push_back({.epoch = epoch, .group = group.id, .free = group.limit()});
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

void Cluster::TakeHeartbeat(uint64_t epoch, absl::Time now) {
  absl::MutexLock lock(&mutex_);
  if (const auto found = groups_.find(epoch); found != groups_.end()) found->second.heard = now;
}

void Cluster::TakeLoad(uint64_t epoch, const rankwise::v1::GroupLoad& load, absl::Time now) {
  absl::MutexLock lock(&mutex_);
  const auto found = groups_.find(epoch);
  if (found == groups_.end()) return;
  found->second.heard = found->second.moved = now;
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
  found->second.heard = found->second.moved = now;
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
  share_.Pay(requests_.at(sequence.request).request.tenant, FairShare::kOutputUnits * output.tokens_size());
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
  groups_.at(rooms_.back().epoch).room = found->second.room;
  rooms_[found->second.room] = rooms_.back();
  rooms_.pop_back();
  groups_.erase(found);
  if (groups_.empty()) alone_since_ = now;
  Dispatch();
}

void Cluster::Requeue(uint64_t number, absl::Time now) {
  Sequence& sequence = sequences_.at(number);
  LiveRequest& live = requests_.at(sequence.request);
  Release(groups_.at(sequence.epoch), number);
  Charge(sequence, -OutstandingTokens(sequence));
  sequence.epoch = 0;
  sequence.pending_since = now;
  AddPending(number);
  ++sequence.replays;
  const bool is_fruitful = sequence.generated.size() > sequence.generated_before;
  sequence.fruitless_replays = is_fruitful ? 0 : sequence.fruitless_replays + 1;
  if (sequence.fruitless_replays > options_.max_fruitless_replays) {
    Fail(sequence.request, absl::UnavailableError(absl::StrCat("lost its worker group ", sequence.fruitless_replays,
                                                               " times without a token from any")));
  } else if (sequence.generated.size() >= live.request.sequence.sampling().max_tokens()) {
    EndByLength(live, number, sequence.sample, sequence.generated.size(), sequence.replays);
    Erase(number, /*tells_group=*/false);
  }
}

// A group gets what it runs at once and half of that to keep it fed; what would wait longer can still go elsewhere. All
// of it may have to wait there, when memory is short.
uint64_t Cluster::Group::limit() const {
  return std::max<uint64_t>(
      1, std::min(uint64_t{join.max_running()} + join.max_running() / 2, uint64_t{join.max_waiting()}));
}

const Cluster::Room* Cluster::LeastLoaded() const {
  const Room* best = nullptr;
  for (const Room& room : rooms_) {
    if (room.free == 0) continue;
    if (best == nullptr ||
        std::tie(room.outstanding_tokens, room.group) < std::tie(best->outstanding_tokens, best->group)) {
      best = &room;
    }
  }
  return best;
}

void Cluster::Hold(Group& group, uint64_t number) {
  if (group.sequences.insert(number).second) --rooms_[group.room].free;
}

void Cluster::Release(Group& group, uint64_t number) { rooms_[group.room].free += group.sequences.erase(number); }

void Cluster::Dispatch() {
  while (pending_.size() > 0) {
    const Room* room = LeastLoaded();
    if (room == nullptr) return;
    const std::optional<uint64_t> number = pending_.Next(share_);
    Sequence& sequence = sequences_.at(*number);
    RemovePending(*number);
    if (!std::exchange(sequence.has_paid, true)) {
      const Request& request = requests_.at(sequence.request).request;
      share_.Pay(request.tenant, FairShare::kPromptUnits * request.sequence.prompt_size());
    }
    sequence.epoch = room->epoch;
    sequence.generated_before = sequence.generated.size();
    Group& group = groups_.at(room->epoch);
    Hold(group, *number);
    Charge(sequence, OutstandingTokens(sequence));
    ToGroup message;
    *message.mutable_submit() = MakeSubmit(*number);
    group.channel->Send(std::move(message));
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
  return CheckRoomLocked(samples, 0);
}

absl::Status Cluster::CheckRoomLocked(uint32_t samples, uint64_t tokens) const {
  if (is_draining_) {
    return WithRetryDelay(absl::UnavailableError("the coordinator drains and admits nothing more"), kDrainRetryDelay);
  }
  if (sequences_.size() + samples > options_.max_live) {
    return WithRetryDelay(
        absl::ResourceExhaustedError(absl::StrCat(sequences_.size(), " samples are live and ", samples,
                                                  " more would exceed the limit of ", options_.max_live)),
        TimeToEnd(sequences_.size() + samples - options_.max_live));
  }
  if (live_tokens_ + tokens > options_.max_live_tokens) {
    const uint64_t share = std::max<uint64_t>(live_tokens_ / std::max<size_t>(sequences_.size(), 1), 1);
    return WithRetryDelay(
        absl::ResourceExhaustedError(absl::StrCat("the live requests may need ", live_tokens_, " tokens and ", tokens,
                                                  " more would exceed the limit of ", options_.max_live_tokens)),
        TimeToEnd((live_tokens_ + tokens - options_.max_live_tokens) / share + 1));
  }
  return absl::OkStatus();
}

absl::Duration Cluster::TimeToEnd(uint64_t samples) const {
  if (ended_per_second_ <= 0) return kUnknownRetryDelay;
  return std::clamp(absl::Seconds(static_cast<double>(samples) / ended_per_second_), kLeastRetryDelay, kMostRetryDelay);
}

void Cluster::MeasureRate(absl::Time now) {
  const absl::Duration passed = now - rate_since_;
  if (passed < absl::Seconds(1)) return;
  const double rate = passed == absl::InfiniteDuration() ? 0 : ended_ / absl::ToDoubleSeconds(passed);
  ended_per_second_ = (ended_per_second_ + rate) / 2;
  ended_ = 0;
  rate_since_ = now;
}

absl::StatusOr<RequestKey> Cluster::Submit(Request request, absl::Time now) {
  absl::MutexLock lock(&mutex_);
  RW_CHECK(request.samples > 0 && request.listener != nullptr);
  const bool was_accepted = !request.delivered.empty();
  const uint64_t tokens_each = uint64_t(request.sequence.prompt_size()) + request.sequence.sampling().max_tokens();
  if (!was_accepted) RW_RETURN_IF_ERROR(CheckRoomLocked(request.samples, tokens_each * request.samples));
  const RequestKey key{next_request_++};
  if (!keys_.emplace(request.id, key).second) {
    return absl::AlreadyExistsError(absl::StrCat("request_id \"", request.id, "\" is live"));
  }
  LiveRequest& live = requests_[key];
  live.request = std::move(request);
  live.tokens_each = tokens_each;
  if (live.request.deadline != absl::InfiniteFuture()) deadlines_.emplace(live.request.deadline, key);
  const uint32_t samples = live.request.samples;
  for (uint32_t sample = 0; sample < samples; ++sample) Begin(key, sample, now);
  // What the journal has, the sequences have by now.
  if (const auto found = requests_.find(key); found != requests_.end()) {
    found->second.request.delivered.clear();
    if (found->second.sequences.empty()) EraseRequest(key);
  }
  const bool is_live = requests_.contains(key);
  Dispatch();
  return is_live ? key : RequestKey{};
}

void Cluster::Begin(RequestKey key, uint32_t sample, absl::Time now) {
  LiveRequest& live = requests_.at(key);
  Delivered delivered;
  if (sample < live.request.delivered.size()) delivered = std::move(live.request.delivered[sample]);
  if (delivered.is_over) return;
  const bool has_all = delivered.tokens.size() >= live.request.sequence.sampling().max_tokens();
  if (has_all) return EndByLength(live, 0, sample, delivered.tokens.size(), 0);
  const uint64_t number = next_sequence_++;
  sequences_[number] = {.request = key,
                        .sample = sample,
                        .generated = std::move(delivered.tokens),
                        .has_prompt_logprobs = delivered.has_prompt_logprobs,
                        .pending_since = now};
  live.sequences.insert(number);
  live_tokens_ += live.tokens_each;
  AddPending(number);
}

// The group, or the coordinator, was lost between the last token and the word that this was the last.
void Cluster::EndByLength(const LiveRequest& live, uint64_t number, uint32_t sample, size_t generated,
                          uint32_t replays) {
  SequenceOutput last;
  last.set_sequence(number);
  last.set_token_offset(static_cast<uint32_t>(generated));
  last.set_finished(true);
  last.set_reason(rankwise::v1::FINISH_REASON_LENGTH);
  live.request.listener->OnOutput(sample, last, replays);
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
  MeasureRate(now);
  std::vector<std::pair<uint64_t, absl::Status>> lost;
  for (const auto& [epoch, group] : groups_) {
    if (absl::Status alive = CheckAlive(group, now); !alive.ok()) lost.emplace_back(epoch, std::move(alive));
  }
  for (const auto& [epoch, reason] : lost) DropEpoch(epoch, reason, now);
  std::set<RequestKey> expired, stranded;
  for (auto next = deadlines_.begin(); next != deadlines_.end() && next->first <= now; ++next) {
    expired.insert(next->second);
  }
  if (groups_.empty() && now - alone_since_ > options_.group_wait) {
    for (const auto& [number, sequence] : sequences_) {
      if (now - sequence.pending_since > options_.group_wait) stranded.insert(sequence.request);
    }
  }
  for (const RequestKey key : expired) EndAll(key, Ending::kDeadline);
  for (const RequestKey key : stranded) {
    Fail(key, WithRetryDelay(absl::UnavailableError(
                                 absl::StrCat("no worker group for ", absl::FormatDuration(options_.group_wait))),
                             kUnknownRetryDelay));
  }
  Dispatch();
}

void Cluster::Excuse(absl::Duration time, absl::Time now) {
  absl::MutexLock lock(&mutex_);
  for (auto& [epoch, group] : groups_) {
    group.heard = std::min(group.heard + time, now);
    group.moved = std::min(group.moved + time, now);
  }
}

absl::Status Cluster::CheckAlive(const Group& group, absl::Time now) const {
  if (now - group.heard > options_.group_timeout) {
    return absl::UnavailableError(absl::StrCat("no heartbeat for ", absl::FormatDuration(now - group.heard)));
  }
  const absl::Duration longest_step = absl::Seconds(group.join.max_step_seconds());
  if (now - group.moved > std::max(options_.group_timeout, longest_step)) {
    return absl::UnavailableError(absl::StrCat("no step for ", absl::FormatDuration(now - group.moved)));
  }
  return absl::OkStatus();
}

void Cluster::Erase(uint64_t number, bool tells_group) {
  const auto found = sequences_.find(number);
  const Sequence& sequence = found->second;
  if (sequence.epoch == 0) {
    RemovePending(number);
  } else {
    Charge(sequence, -OutstandingTokens(sequence));
    Group& group = groups_.at(sequence.epoch);
    Release(group, number);
    if (tells_group) {
      ToGroup message;
      message.mutable_cancel()->add_sequences(number);
      group.channel->Send(std::move(message));
    }
  }
  const auto live = requests_.find(sequence.request);
  live->second.sequences.erase(number);
  live_tokens_ -= live->second.tokens_each;
  ++ended_;
  if (live->second.sequences.empty()) EraseRequest(sequence.request);
  sequences_.erase(found);
}

void Cluster::EraseRequest(RequestKey key) {
  const auto live = requests_.find(key);
  keys_.erase(live->second.request.id);
  deadlines_.erase({live->second.request.deadline, key});
  requests_.erase(live);
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
  rooms_[groups_.at(sequence.epoch).room].outstanding_tokens += tokens;
}

void Cluster::AddPending(uint64_t number) {
  const PendingQueue::Entry entry = EntryOf(number);
  pending_.Add(entry);
  share_.Arrive(entry.tenant);
}

void Cluster::RemovePending(uint64_t number) {
  const PendingQueue::Entry entry = EntryOf(number);
  pending_.Remove(entry);
  share_.Depart(entry.tenant);
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
  response.set_live_tokens(live_tokens_);
  response.set_max_live_tokens(options_.max_live_tokens);
  for (const auto& [epoch, group] : groups_) {
    rankwise::v1::GroupLoad& load = *response.add_groups();
    load = group.load;
    load.set_group(group.id);
    load.set_epoch(epoch);
    load.set_blocks_total(group.join.blocks_total());
    load.set_block_tokens(group.join.block_tokens());
    load.set_seconds_since_step(load.seconds_since_step() + absl::ToDoubleSeconds(now - group.moved));
    if (load.ranks().empty()) *load.mutable_ranks() = group.join.ranks();
  }
  return response;
}

void Cluster::CheckInvariants() const {
  absl::MutexLock lock(&mutex_);
  std::map<uint64_t, int64_t> group_tokens;
  size_t held = 0, pending = 0, owned = 0;
  uint64_t live_tokens = 0;
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
  }
  RW_CHECK(pending == pending_.size());
  for (const auto& [epoch, group] : groups_) {
    const Room& room = rooms_.at(group.room);
    RW_CHECK(room.epoch == epoch && room.group == group.id);
    RW_CHECK(room.free + group.sequences.size() == group.limit());
    RW_CHECK(group_tokens[epoch] == room.outstanding_tokens);
    held -= group.sequences.size();
  }
  RW_CHECK(held == 0 && rooms_.size() == groups_.size());
  for (const auto& [key, live] : requests_) {
    RW_CHECK(!live.sequences.empty() && keys_.at(live.request.id) == key);
    owned += live.sequences.size();
    live_tokens += live.tokens_each * live.sequences.size();
  }
  RW_CHECK(owned == sequences_.size() && keys_.size() == requests_.size());
  RW_CHECK(live_tokens == live_tokens_);
}

}  // namespace rankwise::cluster
