#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "worker/comm/communicator.h"
#include "worker/engine/rank.h"

namespace rankwise {

// What the statistics file says about the text; the worker itself sees only token ids.
struct SampleInfo {
  std::string dataset;
  int64_t sample_count = 0;   // 0: unknown
  int64_t sample_tokens = 0;  // of one sample; 0: unknown
  uint64_t seed = 0;          // of their choice
};

// Collective, at the end of a group that observed: gathers every rank's statistics and lets rank 0 write the
// whole model's KvStatistics and InputStatistics into `folder`. FailedPrecondition when no token was seen.
absl::Status WriteObservations(const engine::Rank& rank, comm::Communicator& communicator, const std::string& folder,
                               const SampleInfo& samples, absl::Duration timeout);

}  // namespace rankwise
