#pragma once

#include <cstdint>
#include <numeric>
#include <span>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "worker/comm/communicator.h"

namespace rankwise::comm {

// What Communicator::Gather demands of its arguments. Broken only by a mistake of our own, hence a check.
inline void CheckGatherShape(int rank, int size, std::span<const float> part, std::span<const int64_t> part_counts,
                             std::span<const float> all) {
  RW_CHECK(std::ssize(part_counts) == size, absl::StrCat("part_counts=", part_counts.size(), " ranks=", size));
  RW_CHECK(std::ssize(part) == part_counts[rank],
           absl::StrCat("part=", part.size(), " part_counts[", rank, "]=", part_counts[rank]));
  const int64_t total = std::accumulate(part_counts.begin(), part_counts.end(), int64_t{0});
  RW_CHECK(std::ssize(all) == (rank == 0 ? total : 0), absl::StrCat("rank=", rank, " all=", all.size()));
}

inline absl::Status CheckMessageSize(int rank, const char* collective, const std::string& message) {
  if (std::ssize(message) <= Communicator::kMaxMessageBytes) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("rank ", rank, ": ", collective, ": message of ", message.size(),
                                                 " bytes, at most ", Communicator::kMaxMessageBytes));
}

}  // namespace rankwise::comm
