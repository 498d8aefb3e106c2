#pragma once

#include <algorithm>
#include <cstdint>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "worker/comm/communicator.h"

namespace rankwise::comm {

// How a message starts its way: its size and as much of it as fits. The rest, when there is one, follows on its own.
// 4 KiB is what Open MPI's shared memory sends without asking the receiver first; 64 of them are for the headers of
// MPI.
struct Packet {
  int64_t message_bytes;
  char head[4096 - 64 - sizeof(int64_t)];

  int64_t head_bytes() const { return std::min<int64_t>(message_bytes, sizeof(head)); }
  int64_t bytes() const { return static_cast<int64_t>(sizeof(message_bytes)) + head_bytes(); }
};

// The size of the message that starts with `packet`, of which `received_bytes` arrived. Internal when the two
// contradict each other or the message is over the limit.
inline absl::StatusOr<int64_t> MessageBytes(const Packet& packet, int64_t received_bytes) {
  const int64_t message_bytes = received_bytes < static_cast<int64_t>(sizeof(int64_t)) ? -1 : packet.message_bytes;
  if (message_bytes < 0 || message_bytes > Communicator::kMaxMessageBytes || received_bytes != packet.bytes()) {
    return absl::InternalError(
        absl::StrCat("a message of ", message_bytes, " bytes cannot start with a packet of ", received_bytes));
  }
  return message_bytes;
}

}  // namespace rankwise::comm
