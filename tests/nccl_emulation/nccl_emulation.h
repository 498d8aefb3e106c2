#pragma once

#include <nccl.h>

// What tests ask of the emulated NCCL.
namespace rankwise::nccl_emulation {

// The `call`-th call from now on that works in the background (joining a communicator, registering a window, a
// collective; the first is 1), of any rank, fails with `error` and is not made.
void FailCall(int call, ncclResult_t error);

// Communicators that were made and not aborted.
int LiveCommunicators();

}  // namespace rankwise::nccl_emulation
