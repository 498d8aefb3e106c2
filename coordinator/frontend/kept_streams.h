#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "coordinator/frontend/request_stream.h"

namespace rankwise::frontend {

// The streams of requests that linger, by request id: of live requests, and of finished ones for as long as they
// linger. Thread-safe. Lock order: this, then a stream.
class KeptStreams {
 public:
  // Finished streams are let go, the longest unread first, when all kept ones hold more.
  explicit KeptStreams(size_t max_bytes) : max_bytes_(max_bytes) {}

  std::shared_ptr<RequestStream> Find(const std::string& id) const;
  // False when there is one with this id.
  bool Add(std::shared_ptr<RequestStream> stream);
  void Remove(const std::string& id);
  // Takes out what nobody has read for as long as it lingers, what has failed and was told so, and what is too much.
  std::vector<std::shared_ptr<RequestStream>> TakeExpired(absl::Time now);

  struct Size {
    size_t streams = 0, bytes = 0;
  };
  Size size() const;

 private:
  const size_t max_bytes_;
  mutable absl::Mutex mutex_;
  std::map<std::string, std::shared_ptr<RequestStream>> streams_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace rankwise::frontend
