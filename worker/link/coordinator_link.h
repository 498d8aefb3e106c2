#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "proto/credentials.h"
#include "proto/worker.pb.h"

// Rank 0's stream to the coordinator: joins, takes work in, sends tokens out.
namespace rankwise::link {

struct LinkOptions {
  std::string address;  // "host:port"
  absl::Duration connect_timeout = absl::Seconds(30);
  wire::Credentials credentials;
  // Between heartbeats, which a thread of the link sends whatever the engine does. Infinite: none.
  absl::Duration heartbeat_interval = absl::InfiniteDuration();
};

// What came in since the last Poll, in order of arrival. No sequence is in both lists: cancel first, so that what is
// submitted finds the room.
struct Inbox {
  std::vector<worker::v1::Submit> submits;
  std::vector<uint64_t> cancels;  // of earlier polls' submits
  bool should_stop = false;       // finish what runs, admit no more
};

// One epoch of this group. Poll and the Send methods are called by the engine's thread; gRPC's threads only push and
// pop. The outgoing queue is bounded by what the engine produces between two writes; nothing is dropped.
class CoordinatorLink {
 public:
  // Dials, sends `join`, waits for the welcome. Unavailable when nobody answers in time, or the coordinator's own
  // refusal.
  static absl::StatusOr<std::unique_ptr<CoordinatorLink>> Connect(const LinkOptions& options,
                                                                  const worker::v1::Join& join);
  virtual ~CoordinatorLink() = default;

  virtual uint64_t group() const = 0;
  virtual uint64_t epoch() const = 0;

  // Waits at most `wait` for the first message; returns at once when some are there. An error means that the stream is
  // gone and the epoch with it: drop every sequence, then Connect again. It comes after all that arrived before it.
  virtual absl::StatusOr<Inbox> Poll(absl::Duration wait) = 0;
  // Outputs of an ended stream go nowhere.
  virtual void SendOutputs(worker::v1::Outputs outputs) = 0;
  virtual void SendLoad(rankwise::v1::GroupLoad load) = 0;
  // Half-closes after what is queued and waits for the coordinator's end of the stream.
  virtual absl::Status Finish(absl::Duration timeout) = 0;
};

}  // namespace rankwise::link
