#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "proto/inference.pb.h"
#include "proto/worker.pb.h"

namespace rankwise::journal {

// Appends what `output` says of a sequence to `kept`, which then says all of it.
void Merge(const worker::v1::SequenceOutput& output, worker::v1::SequenceOutput& kept);

struct JournaledRequest {
  rankwise::v1::GenerateRequest request;  // with request_id and seed
  std::string numerics;                   // wire::NumericsLine of the model that says them; column `fingerprint`
  absl::Time accepted;
  absl::Time deadline = absl::InfiniteFuture();
  std::vector<worker::v1::SequenceOutput> samples;  // what was said of each, as Merge leaves it
};

struct JournalOptions {
  std::string folder;  // made when it is not there; of one coordinator at a time
  // Each commit waits for the disk: requests outlive the loss of power too, not only of the process.
  bool syncs = false;
  absl::Duration interval = absl::Milliseconds(20);  // between commits of tokens
};

// What a coordinator has accepted and delivered, on disk (SQLite, write-ahead log). A request is there when Accept
// returns. Tokens follow within `interval`: those that a crash swallows are computed again, with the same bits, so
// nobody waits for them. One thread of its own writes; all methods may be called by any thread.
class Journal {
 public:
  // FailedPrecondition when another process has it open, or its format is another's; Unavailable when the folder cannot
  // be used.
  static absl::StatusOr<std::unique_ptr<Journal>> Open(const JournalOptions& options);
  // Writes what is queued.
  virtual ~Journal() = default;

  // What an earlier process left, oldest first. Once.
  virtual std::vector<JournaledRequest> TakeRecovered() = 0;

  // Waits for the commit, which it shares with all that came meanwhile. `samples` is not used.
  virtual absl::Status Accept(const JournaledRequest& request) = 0;
  // Queues. What comes before Accept or after Forget is dropped.
  virtual void Append(const std::string& id, uint32_t sample, const worker::v1::SequenceOutput& output) = 0;
  virtual void Forget(const std::string& id) = 0;
  // From now on nothing is written: what there is is for the next process.
  virtual void Close() = 0;
};

}  // namespace rankwise::journal
