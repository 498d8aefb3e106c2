#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/node_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "coordinator/cluster/fair_share.h"
#include "coordinator/cluster/pending_queue.h"
#include "proto/worker.pb.h"

// Which worker groups exist, what they hold, and the replay of what a lost one held. No socket, thread or clock of its
// own: time comes in as an argument.
namespace rankwise::cluster {

enum class RequestKey : uint64_t {};

// The coordinator's end of one group's stream. Called with the cluster's lock held: it may only queue.
class GroupChannel {
 public:
  virtual ~GroupChannel() = default;
  virtual void Send(worker::v1::ToGroup message) = 0;
  // The epoch is over: end the stream. No call follows.
  virtual void Close(const absl::Status& reason) = 0;
};

// What ends a sample besides its own output.
enum class Ending : uint8_t { kCancelled, kDeadline };

// Who waits for a request's tokens. Called with the cluster's lock held: it may only queue, and must not call the
// cluster. `sample` counts from 0; no call follows the one that ended a sample.
class SampleListener {
 public:
  virtual ~SampleListener() = default;
  // New tokens, each once and in order; output.finished() ends the sample. False when the listener has seen enough (a
  // stop string), which ends it too.
  virtual bool OnOutput(uint32_t sample, const worker::v1::SequenceOutput& output, uint32_t replays) = 0;
  virtual void OnEnd(uint32_t sample, Ending ending, uint32_t replays) = 0;
  // Ends all samples of the request.
  virtual void OnFailed(const absl::Status& status) = 0;
};

struct ClusterOptions {
  uint32_t max_live = 1024;                      // samples accepted and unfinished
  uint64_t max_live_tokens = uint64_t{1} << 24;  // prompt + max_tokens of these
  // A group from which nothing is heard for so long is lost. So is one that beats, but shows neither a step nor a load
  // for as long as it announced that a step can take.
  absl::Duration group_timeout = absl::Seconds(2.5);
  absl::Duration group_wait = absl::Seconds(30);  // how long a sample waits while there is no group
  // A sample that loses so many groups in a row and gets no token from any is taken for their end, and fails.
  uint32_t max_fruitless_replays = 4;
};

// What a journal knows of a sample: what its listener has had before.
struct Delivered {
  std::vector<int32_t> tokens;
  bool has_prompt_logprobs = false;
  bool is_over = false;
};

struct Request {
  std::string id;  // unique among the live ones
  std::string tenant;
  worker::v1::Submit sequence;  // sample i uses its seed + i; `sequence` and `generated` are not set
  uint32_t samples = 1;
  absl::Time deadline = absl::InfiniteFuture();
  std::vector<Delivered> delivered;    // by sample, of a request that was accepted before; else empty
  SampleListener* listener = nullptr;  // must outlive the request
};

// Thread-safe: one lock, held for short work.
//
// Invariants: (1) A sequence waits in `pending_`, or belongs to exactly one live epoch. (2) `generated` of a sequence
// is what its listener got, and its length is the only offset at which output is taken. (3) Messages of a dead epoch
// change nothing. (4) A group's outstanding tokens are the sum over the sequences that it holds; the live tokens
// are prompt and max_tokens of all live samples.
class Cluster {
 public:
  explicit Cluster(const ClusterOptions& options) : options_(options) {}

  // Groups. `channel` must live until Leave. FailedPrecondition names what differs when the group does not serve the
  // same model in the same way as the others. The welcome is sent on `channel` before any work.
  absl::StatusOr<worker::v1::Welcome> Join(const worker::v1::Join& join, GroupChannel* channel, absl::Time now);
  // The stream of `epoch` ended: what it held is submitted again, with the tokens delivered so far. Idempotent.
  void Leave(uint64_t epoch, absl::Time now);
  void TakeHeartbeat(uint64_t epoch, absl::Time now);
  void TakeLoad(uint64_t epoch, const rankwise::v1::GroupLoad& load, absl::Time now);
  // A group that breaks the protocol loses its epoch.
  void TakeOutputs(uint64_t epoch, const worker::v1::Outputs& outputs, absl::Time now);

  // Requests. ResourceExhausted when `samples` more would exceed max_live, Unavailable while draining: Submit would
  // refuse. Both name a retry delay (retry_delay.h): how long, at the present rate, until there is room.
  absl::Status CheckRoom(uint32_t samples) const;
  // All samples or none. As CheckRoom, also for max_live_tokens; AlreadyExists when a live request has the same id. One
  // that was accepted before finds room always; its key is 0 when all its samples are over.
  absl::StatusOr<RequestKey> Submit(Request request, absl::Time now);
  // Forgets the request and frees what groups hold for it. No call to its listener follows. Idempotent.
  void Forget(RequestKey key);
  // Cancels the request and tells its listener. False when there is none.
  bool Abort(const std::string& id);
  void FailAll(const absl::Status& status);

  // Expires deadlines, waits and silent groups. Call it every few tens of milliseconds.
  void Tick(absl::Time now);
  // This process stood still for `time`, until now: what it did not hear meanwhile is no group's silence.
  void Excuse(absl::Duration time, absl::Time now);
  // From now on no request is accepted.
  void StartDrain();
  // Tells all groups to finish and end, and lets none join.
  void StopGroups();

  const ClusterOptions& options() const { return options_; }
  // What all groups serve; absent before the first one.
  std::optional<rankwise::v1::GetModelInfoResponse> model() const;
  bool is_serving() const;  // a group is there and the cluster is not draining
  uint32_t live() const;
  rankwise::v1::GetLoadResponse Load(absl::Time now) const;
  // Aborts the process on a broken invariant. For tests.
  void CheckInvariants() const;

 private:
  struct Group {
    uint64_t id = 0;  // the lowest free one: a relaunched group mostly gets its old one
    worker::v1::Join join;
    GroupChannel* channel = nullptr;
    absl::Time heard;  // any message
    absl::Time moved;  // a load or outputs: its engine got on
    rankwise::v1::GroupLoad load;
    std::set<uint64_t> sequences;
    size_t room = 0;  // its place in rooms_

    uint64_t limit() const;
  };
  // What routing wants to know of a group. Side by side, because each sequence that is sent looks at every group.
  struct Room {
    uint64_t epoch = 0;
    uint64_t group = 0;  // its id
    int64_t outstanding_tokens = 0;
    uint64_t free = 0;  // sequences that it still takes
  };
  struct LiveRequest {
    Request request;
    std::set<uint64_t> sequences;
    uint64_t tokens_each = 0;  // prompt + max_tokens of one sample
  };
  struct Sequence {
    RequestKey request{};
    uint32_t sample = 0;
    std::vector<int32_t> generated;
    bool has_prompt_logprobs = false;  // they were delivered
    bool has_paid = false;             // for its prompt
    uint64_t epoch = 0;                // 0: pending
    absl::Time pending_since;
    size_t generated_before = 0;  // when it got its epoch
    uint32_t replays = 0, fruitless_replays = 0;
  };

  absl::Status CheckRoomLocked(uint32_t samples, uint64_t tokens) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  static void EndByLength(const LiveRequest& live, uint64_t number, uint32_t sample, size_t generated,
                          uint32_t replays);
  void Begin(RequestKey key, uint32_t sample, absl::Time now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // How long until so many samples have ended.
  absl::Duration TimeToEnd(uint64_t samples) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void MeasureRate(absl::Time now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void AddPending(uint64_t number) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void RemovePending(uint64_t number) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void DropEpoch(uint64_t epoch, const absl::Status& reason, absl::Time now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Requeue(uint64_t number, absl::Time now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Dispatch() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  const Room* LeastLoaded() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);  // null: all are full
  void Hold(Group& group, uint64_t number) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Release(Group& group, uint64_t number) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  worker::v1::Submit MakeSubmit(uint64_t number) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // OK, or why the group is lost.
  absl::Status CheckAlive(const Group& group, absl::Time now) const;
  absl::Status TakeOutput(uint64_t epoch, const worker::v1::SequenceOutput& output)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::Status CheckOutput(const Sequence& sequence, const worker::v1::SequenceOutput& output) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  // Ends of a sequence and of a whole request; the request goes with its last sequence.
  void EraseRequest(RequestKey key) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Erase(uint64_t number, bool tells_group) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void EndAll(RequestKey key, Ending ending) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Fail(RequestKey key, const absl::Status& status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void EraseAll(RequestKey key) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  int64_t OutstandingTokens(const Sequence& sequence) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Adds to what the sequence's group holds.
  void Charge(const Sequence& sequence, int64_t tokens) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  PendingQueue::Entry EntryOf(uint64_t number) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const ClusterOptions options_;
  mutable absl::Mutex mutex_;
  std::map<uint64_t, Group> groups_ ABSL_GUARDED_BY(mutex_);  // by epoch
  std::vector<Room> rooms_ ABSL_GUARDED_BY(mutex_);           // of all groups, in no order
  absl::node_hash_map<RequestKey, LiveRequest> requests_ ABSL_GUARDED_BY(mutex_);
  std::set<std::pair<absl::Time, RequestKey>> deadlines_ ABSL_GUARDED_BY(mutex_);  // the finite ones
  absl::flat_hash_map<std::string, RequestKey> keys_ ABSL_GUARDED_BY(mutex_);      // by request id
  absl::node_hash_map<uint64_t, Sequence> sequences_ ABSL_GUARDED_BY(mutex_);
  PendingQueue pending_ ABSL_GUARDED_BY(mutex_);
  FairShare share_ ABSL_GUARDED_BY(mutex_);
  uint64_t live_tokens_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t ended_ ABSL_GUARDED_BY(mutex_) = 0;           // samples, since rate_since_
  double ended_per_second_ ABSL_GUARDED_BY(mutex_) = 0;  // of the last seconds
  absl::Time rate_since_ ABSL_GUARDED_BY(mutex_) = absl::InfinitePast();
  std::optional<rankwise::v1::GetModelInfoResponse> model_ ABSL_GUARDED_BY(mutex_);
  absl::Time alone_since_ ABSL_GUARDED_BY(mutex_) = absl::InfinitePast();  // when the last group was lost
  uint64_t next_epoch_ ABSL_GUARDED_BY(mutex_) = 1;
  uint64_t next_sequence_ ABSL_GUARDED_BY(mutex_) = 1;
  uint64_t next_request_ ABSL_GUARDED_BY(mutex_) = 1;
  bool is_draining_ ABSL_GUARDED_BY(mutex_) = false;
  bool is_stopping_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace rankwise::cluster
