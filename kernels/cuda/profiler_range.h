#pragma once

#include <nvtx3/nvToolsExt.h>

namespace rankwise::kernels {

// A name on a profiler's time line (NVTX), for what is issued while it lives: the step, in it the layer, in that the
// op. What a graph does again is no longer issued, so that such a step is one range. Without a profiler it costs a look
// at a pointer.
class ProfilerRange {
 public:
  explicit ProfilerRange(const char* name) { nvtxRangePushA(name); }
  ~ProfilerRange() { nvtxRangePop(); }
  ProfilerRange(const ProfilerRange&) = delete;
  ProfilerRange& operator=(const ProfilerRange&) = delete;
};

}  // namespace rankwise::kernels
