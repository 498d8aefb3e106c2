#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "proto/worker.pb.h"

// Which worker groups exist, what they hold, and the replay of what a lost one held. No socket, thread or clock of its own:
// time comes in as an argument.
namespace rankwise::cluster {

// The coordinator's end of one group's stream. Called with the cluster's lock held: it may only queue.
class GroupChannel {
 public:
  virtual ~GroupChannel() = default;
  virtual void Send(worker::v1::ToGroup message) = 0;
  // The epoch is over: end the stream.
  virtual void Close(const absl::Status& reason) = 0;
};

// What ends a sequence besides its own output.
enum class Ending : uint8_t { kCancelled, kDeadline };

// Who waits for a sequence's tokens. Called with the cluster's lock held, in order, and never after a call that ended the
// sequence: it may only queue, and must not call the cluster.
class SequenceListener {
 public:
  virtual ~SequenceListener() = default;
  // New tokens, each once and in order. False when the listener has seen enough (a stop string): the sequence ends.
  virtual bool OnOutput(uint64_t sequence, const worker::v1::SequenceOutput& output, uint32_t replays) = 0;
  virtual void OnEnd(uint64_t sequence, Ending ending, uint32_t replays) = 0;
  virtual void OnFailed(uint64_t sequence, const absl::Status& status) = 0;
};

struct ClusterOptions {
  uint32_t max_live = 1024;                         // sequences accepted and unfinished
  absl::Duration group_timeout = absl::Seconds(10); // without a heartbeat a group is lost
  absl::Duration group_wait = absl::Seconds(30);    // how long a sequence waits while there is no group
};

// Thread-safe: one lock, held for short work.
//
// Invariants: (1) A sequence is pending, or belongs to one live epoch. (2) Its delivered tokens are a prefix of what any group
// would generate for it, and `delivered.size()` is the only offset at which output is taken. (3) Output of a dead epoch
// changes nothing.
class Cluster {
 public:
  explicit Cluster(const ClusterOptions& options) : options_(options) {}

  // FailedPrecondition naming what differs when the group does not serve the same model in the same way as the first one.
  absl::StatusOr<worker::v1::Welcome> Join(const worker::v1::Join& join, GroupChannel* channel, absl::Time now);
  // The stream of `epoch` ended: what it held is submitted again, with the tokens delivered so far. Idempotent.
  void Leave(uint64_t epoch, absl::Time now);
  void TakeLoad(uint64_t epoch, const rankwise::v1::GroupLoad& load, absl::Time now);
  void TakeOutputs(uint64_t epoch, const worker::v1::Outputs& outputs, absl::Time now);

  // Accepts all sequences or none, and gives them their numbers; `accepted` hears them before the listener hears anything,
  // with the lock held. ResourceExhausted when they would exceed max_live, Unavailable while draining. `listener` must live
  // until each sequence has ended or Remove was called for it.
  absl::StatusOr<std::vector<uint64_t>> Submit(std::vector<worker::v1::Submit> sequences, SequenceListener* listener,
                                               absl::Time deadline, absl::Time now,
                                               const std::function<void(std::span<const uint64_t>)>& accepted);
  // Forgets the sequence and frees what its group holds for it. No call to its listener follows. Idempotent.
  void Remove(uint64_t sequence);
  // The same, after telling its listener.
  void End(uint64_t sequence, Ending ending);

  // Expires deadlines, waits and silent groups. Call it every few tens of milliseconds.
  void Tick(absl::Time now);

  void StartDrain();
  // Tells all groups to finish and end.
  void StopGroups();

  // Of the first group that joined; nothing before.
  std::optional<rankwise::v1::GetModelInfoResponse> model() const;
  bool is_serving() const;  // a group is there and the cluster is not draining
  uint32_t live() const;
  rankwise::v1::GetLoadResponse Load(absl::Time now) const;

 private:
  struct Group {
    uint64_t id = 0;
    worker::v1::Join join;
    GroupChannel* channel = nullptr;
    absl::Time heard;
    rankwise::v1::GroupLoad load;
    std::set<uint64_t> sequences;
    int64_t outstanding_tokens = 0;  // Σ over its sequences of prompt + max_tokens
  };
  struct Sequence {
    worker::v1::Submit submit;       // `generated` grows with what is delivered
    SequenceListener* listener = nullptr;
    uint64_t epoch = 0;              // 0: pending
    absl::Time deadline, pending_since;
    uint32_t replays = 0;
    int64_t tokens() const { return submit.prompt_size() + int64_t{submit.sampling().max_tokens()}; }
  };
  // Pending sequences: higher priority, then number, which is order of arrival.
  using PendingKey = std::pair<int32_t, uint64_t>;

  void DropEpoch(uint64_t epoch, const absl::Status& reason, absl::Time now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Dispatch() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void TakeOutput(uint64_t epoch, const worker::v1::SequenceOutput& output) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Erase(uint64_t number, bool tells_group) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const ClusterOptions options_;
  mutable absl::Mutex mutex_;
  std::map<uint64_t, Group> groups_ ABSL_GUARDED_BY(mutex_);  // by epoch
  std::map<uint64_t, Sequence> sequences_ ABSL_GUARDED_BY(mutex_);
  std::set<PendingKey> pending_ ABSL_GUARDED_BY(mutex_);
  std::optional<rankwise::v1::GetModelInfoResponse> model_ ABSL_GUARDED_BY(mutex_);
  uint64_t next_epoch_ ABSL_GUARDED_BY(mutex_) = 1;
  uint64_t next_sequence_ ABSL_GUARDED_BY(mutex_) = 1;
  bool is_draining_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace rankwise::cluster
