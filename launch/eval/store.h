#pragma once

#include <map>
#include <memory>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "nlohmann/json.hpp"

namespace rankwise::eval {

// Answers on disk, one JSON object a line, so that a run goes on where it was killed. The first line is the header: all
// that an answer depends on. Each further line is {"id", "run", …} with the header's hash in "run".
//
// A crash may leave a torn last line, which is cut off when the file is opened again. Every other line that does not
// belong refuses the file: nothing is repaired by guess, and answers to other questions are never mixed in.
// One process has the file at a time. Find is for one thread, and not during Append; Append is for several.
class AnswerStore {
 public:
  // Creates the file and its folder, or reads what is there. FailedPrecondition when its header differs from `header`
  // (the message names what differs) or another process has it open; InvalidArgument names a line that is broken.
  static absl::StatusOr<std::unique_ptr<AnswerStore>> Open(const std::string& path, const nlohmann::json& header);
  ~AnswerStore();
  AnswerStore(const AnswerStore&) = delete;
  AnswerStore& operator=(const AnswerStore&) = delete;

  // Null when `id` has no answer yet. Lives as long as the store.
  const nlohmann::json* Find(const std::string& id) const;

  // Writes `answer`, an object without "id" and "run", and syncs the disk for every 64 answers or 2 seconds.
  // Requires: `id` has none yet.
  absl::Status Append(const std::string& id, nlohmann::json answer);
  absl::Status Sync();

 private:
  AnswerStore(std::string path, int fd, std::string run) : path_(std::move(path)), fd_(fd), run_(std::move(run)) {}
  absl::Status Load(const nlohmann::json& header);
  absl::Status Write(const std::string& line) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::Status SyncLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const std::string path_;
  const int fd_;
  const std::string run_;
  absl::Mutex mutex_;
  std::map<std::string, nlohmann::json> answers_;
  absl::Status failure_ ABSL_GUARDED_BY(mutex_);  // nothing may follow a line that is only half there
  int unsynced_ ABSL_GUARDED_BY(mutex_) = 0;
  absl::Time synced_ ABSL_GUARDED_BY(mutex_) = absl::Now();
};

}  // namespace rankwise::eval
