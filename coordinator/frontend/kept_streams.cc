#include "coordinator/frontend/kept_streams.h"

#include <utility>

namespace rankwise::frontend {

std::shared_ptr<RequestStream> KeptStreams::Find(const std::string& id) const {
  absl::MutexLock lock(&mutex_);
  const auto found = streams_.find(id);
  return found == streams_.end() ? nullptr : found->second;
}

bool KeptStreams::Add(std::shared_ptr<RequestStream> stream) {
  absl::MutexLock lock(&mutex_);
  const std::string& id = stream->request_id();
  return streams_.emplace(id, std::move(stream)).second;
}

void KeptStreams::Remove(const std::string& id) {
  absl::MutexLock lock(&mutex_);
  streams_.erase(id);
}

std::vector<std::shared_ptr<RequestStream>> KeptStreams::TakeExpired(absl::Time now) {
  absl::MutexLock lock(&mutex_);
  std::vector<std::shared_ptr<RequestStream>> expired;
  size_t bytes = 0;
  const auto take = [&](auto found) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    expired.push_back(std::move(found->second));
    return streams_.erase(found);
  };
  for (auto next = streams_.begin(); next != streams_.end();) {
    const RequestStream::State state = next->second->state();
    const bool has_lingered = !state.is_read && now - state.unread_since > next->second->linger();
    if (has_lingered || (state.has_failed && !state.is_read)) {
      next = take(next);
      continue;
    }
    bytes += state.bytes;
    ++next;
  }
  if (bytes <= max_bytes_) return expired;
  std::multimap<absl::Time, decltype(streams_)::iterator> finished;
  for (auto stream = streams_.begin(); stream != streams_.end(); ++stream) {
    const RequestStream::State state = stream->second->state();
    if (state.is_over && !state.is_read) finished.emplace(state.unread_since, stream);
  }
  for (auto oldest = finished.begin(); bytes > max_bytes_ && oldest != finished.end(); ++oldest) {
    bytes -= oldest->second->second->state().bytes;
    take(oldest->second);
  }
  return expired;
}

KeptStreams::Size KeptStreams::size() const {
  absl::MutexLock lock(&mutex_);
  Size size{.streams = streams_.size()};
  for (const auto& [id, stream] : streams_) size.bytes += stream->state().bytes;
  return size;
}

}  // namespace rankwise::frontend
