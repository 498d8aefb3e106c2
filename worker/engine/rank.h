#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "kernels/backend.h"
#include "worker/comm/communicator.h"
#include "worker/engine/executor.h"
#include "worker/model/decoder.h"
#include "worker/scheduler/scheduler.h"
#include "worker/weights/checkpoint.h"

namespace rankwise::engine {

struct RankOptions {
  std::string model_dir;
  // A name of kv::KvNames; empty: int8 for a workspace whose config.ini says quant_policy = 4, else f16.
  std::string kv;
  std::string kv_scales_dir;    // what kv::NeedsScales; empty: a workspace's own
  int64_t kv_memory_bytes = 0;  // per rank; 0: what max_running sequences of max_tokens need, at most 2 GiB
  // Prompt + generated of one sequence; 0: the model's context, at most 16384. Dynamic NTK serves up to factor × that
  // context, but only when it is asked for here.
  int32_t max_tokens = 0;
  int32_t max_running = 64;
  int32_t max_step_rows = 0;  // 0: Backend::step_rows, or max_running
  int32_t max_chunk_rows = 512;
  int32_t max_waiting = 1024;
  bool has_prefix_cache = true;
  int32_t max_drafts = 8;  // tokens guessed by prompt lookup for one sequence in one step; 0: none
  // Calibration: statistics of K, V and the inputs of linear layers are kept; needs kv f32, no prefix cache and no
  // drafts, whose rows may be no part of any text.
  bool observes = false;
  absl::Duration collective_timeout = absl::Seconds(60);
};

// Everything one rank owns between its files and its engine: checkpoint, slice, cache, executor.
struct Rank {
  std::unique_ptr<weights::Checkpoint> checkpoint;
  std::unique_ptr<model::Decoder> decoder;
  std::unique_ptr<Executor> executor;
  scheduler::SchedulerOptions scheduler_options;
  std::string kv;  // the chosen format
  std::string kv_scales_id;
};

// Collective: loads this rank's slice. If any rank fails, all return an error: the failing ranks' own, joined. All
// ranks agree on the smallest block count; InvalidArgument when their model, KV format, scales or activations differ.
// Borrows backend and communicator.
absl::StatusOr<Rank> LoadRank(const RankOptions& options, kernels::Backend& backend, comm::Communicator& communicator);

// Collective: OK when every rank is; otherwise the first failing rank's error, its message naming all that failed.
absl::Status AgreeOnStatus(const absl::Status& own, comm::Communicator& communicator, absl::Duration timeout);

}  // namespace rankwise::engine
