#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace rankwise::batch {

// Keeps every other run from `path` while it lives, also one on another host when the file system has flock. The lock
// is a file of its own, "PATH.lock", which names its owner and goes with it; after a kill it holds nobody up.
class FileLock {
 public:
  // Waits for `patience` at most; FailedPrecondition names the owner.
  static absl::StatusOr<std::unique_ptr<FileLock>> Take(const std::string& path, absl::Duration patience);
  ~FileLock();

 private:
  FileLock(std::string path, int fd) : path_(std::move(path)), fd_(fd) {}

  const std::string path_;
  const int fd_;
};

// Result lines on disk. A killed run leaves whole lines and at most one torn last line, which the next one cuts off.
// Append may be called by several threads, and is one write and one sync for all that wait (group commit).
class ResultFile {
 public:
  // Makes the file when it is not there. `on_line` is called with every whole line; its error, with the line's number
  // before it, ends the call.
  static absl::StatusOr<std::unique_ptr<ResultFile>> Open(
      const std::string& path, const std::function<absl::Status(std::string_view line)>& on_line);
  ~ResultFile();

  // Returns once `line`, given without its newline, is on the disk. After an error the file ends with the last whole
  // line it is known to hold, and every later call gets the same error.
  absl::Status Append(const std::string& line);
  int64_t syncs() const;  // so far: fewer than lines when threads share them

 private:
  ResultFile(std::string path, int fd, int64_t bytes) : path_(std::move(path)), fd_(fd), bytes_(bytes) {}
  absl::Status Commit(const std::string& lines);  // by one thread at a time

  const std::string path_;
  const int fd_;
  int64_t bytes_;  // durable; of the committing thread
  mutable absl::Mutex mutex_;
  std::string pending_ ABSL_GUARDED_BY(mutex_);
  int64_t appended_ ABSL_GUARDED_BY(mutex_) = 0, committed_ ABSL_GUARDED_BY(mutex_) = 0;  // lines
  int64_t syncs_ ABSL_GUARDED_BY(mutex_) = 0;
  bool is_committing_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Status failure_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace rankwise::batch
