#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/time/time.h"
#include "launch/arrivals.h"
#include "launch/interrupt.h"
#include "launch/latency_report.h"
#include "launch/progress_bar.h"
#include "proto/inference.grpc.pb.h"

namespace rankwise::launch {

struct LoadOptions {
  std::vector<Arrival> arrivals;
  // So many requests at a time, each sent when another has ended; 0: each at its time, whatever is unfinished.
  int concurrency = 0;
  // Of the prompts, see DrawPrompt. The first request has number `first_index`.
  uint64_t seed = 0;
  int64_t first_index = 0;
  int32_t shared_prefix = 0;
  int32_t vocab_size = 1;
  absl::Duration deadline = absl::Minutes(10);  // of each request
};

struct LoadOutcome {
  std::vector<RequestRecord> records;  // in the order in which the requests ended
  double seconds = 0;                  // from the start until the last one's end
  bool is_interrupted = false;         // no more were sent, and those under way are cut off
};

// Sends the requests over the stubs in turn and waits until all have ended. A stream has no thread: gRPC's own call
// back, so that thousands are possible. Latencies are counted from the time at which a request was due, so that a
// client that lags does not flatter the server.
LoadOutcome RunLoad(const std::vector<std::unique_ptr<rankwise::v1::Inference::Stub>>& stubs,
                    const LoadOptions& options, const Interrupt& interrupt, ProgressBar& progress);

}  // namespace rankwise::launch
