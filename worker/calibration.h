#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "worker/comm/communicator.h"
#include "worker/engine/rank.h"

namespace rankwise {

// Collective, at the end of a group that observed K and V: gathers every rank's ranges and lets rank 0 write the whole
// model's statistics file. FailedPrecondition when no token was seen. `tokens_per_sample` of 0 is recorded as unknown.
absl::Status WriteObservations(const engine::Rank& rank, comm::Communicator& communicator, const std::string& path,
                               const std::string& dataset, int64_t tokens_per_sample, absl::Duration timeout);

}  // namespace rankwise
