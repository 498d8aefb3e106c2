#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "worker/comm/communicator.h"

// NCCL moves, we add. ncclAllReduce picks its algorithm by the size of the message and adds an element in an order that
// depends on where in the message it lies, so that the numbers of a row would change with the rows beside it. Here
// ranks exchange their parts and each adds them in the tree of AllReduceSum:
//   up to 256 KiB  one all-gather of everything, then the sum of all of it on every rank
//   beyond         an all-to-all after which a rank has everybody's values of its slice; their sum; an all-gather of
//   the
//                  sums. On the wire the 2 (n - 1) / n of a ring all-reduce.
// Both give the same bits. The scratch that the parts arrive in is registered as a symmetric window.
namespace rankwise::comm {

// Collective over `host`, one rank per GPU, at least two. Sums are made on `stream` (a cudaStream_t) of GPU `gpu` and
// can be captured into a CUDA graph, and so are the collectives of on_stream(); all else goes over `host`. Borrows
// both. `timeout` is for each of the waits of the start.
//
// AllReduceSum and what on_stream() offers return when they are issued; Wait when it is made. A deadline that passes,
// or an error of NCCL's own, aborts NCCL's communicator, which frees the stream from waiting for a lost peer; NCCL
// cannot tell which one it was. A rank that aborts leaves the others to their deadlines. The destructor aborts too: to
// destroy would be to wait for peers.
absl::StatusOr<std::unique_ptr<Communicator>> CreateNcclCommunicator(Communicator& host, int gpu, void* stream,
                                                                     absl::Duration timeout);

}  // namespace rankwise::comm
