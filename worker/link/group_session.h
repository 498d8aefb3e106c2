#pragma once

#include <atomic>
#include <functional>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "worker/engine/engine.h"
#include "worker/link/coordinator_link.h"

// Rank 0 between coordinator and engine: work in, steps, tokens out.
namespace rankwise::link {

struct SessionOptions {
  LinkOptions link;
  worker::v1::Join join;                              // what this group is; sent at every (re)connection
  absl::Duration reconnect_limit = absl::Minutes(5);  // give up when the coordinator stays away this long
  absl::Duration load_interval = absl::Milliseconds(500);
  absl::Duration report_interval = absl::Seconds(5);  // between collections of the ranks' own counters
};

// Serves until the coordinator says stop or `should_stop` becomes true (both finish what runs first), then ends the
// followers' loops. A lost stream loses its epoch: all sequences are dropped, and the group joins again. `report` is
// rank 0's own rank load, serialised rankwise.v1.RankLoad as the followers send. An error is the end of the group.
absl::Status ServeGroup(engine::Engine& engine, const SessionOptions& options, const std::atomic<bool>& should_stop,
                        const std::function<std::string()>& report);

}  // namespace rankwise::link
