#pragma once

#include <grpcpp/support/status.h>

#include "absl/status/status.h"

namespace rankwise::frontend {

// The codes are the same numbers. A retry delay (cluster::WithRetryDelay) becomes a google.rpc.RetryInfo in the
// details.
grpc::Status ToGrpc(const absl::Status& status);

}  // namespace rankwise::frontend
