#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "kernels/backend.h"

// The math of one rank on one NVIDIA GPU of compute capability 8.0 or later. Host C++: no CUDA header is needed to
// include this. It lives in librankwise_cuda.so, which a process opens only when it is told to use a GPU.
//
// Threads: as any Backend, one thread at a time, but not always the same one. Ops are issued on the backend's stream
// and return before they are done; only CopyToHost and what reads results (Draw, DrawnTokens::Take, SaturatedCounts,
// BlockBytes, an observation) wait. Pointers in ops are device memory from Allocate.
//
// Repeat records steps of up to 64 rows in CUDA graphs, one for each shape of step (rows, tiles of attention, reach
// of the longest context in powers of two) that comes a second time, and launches them from then on. The order
// of sums is the same with and without.
//
// Numbers: products and sums are as exact as in f32 (kernels/cuda/matmul.cu and attention.cu derive their bounds), and
// a row's bits depend on that row alone, whatever shares its step. With Activations::kBF16 the factors are rounded to
// bf16 first, and the rest of this holds for their products. K of a product is summed in a fixed order of its
// own, not by SumTree, so degrees of tensor parallelism agree within the bound and not in every bit.
namespace rankwise::kernels {

struct CudaOptions {
  int device = 0;              // as cudaSetDevice counts
  bool records_steps = true;   // as CUDA graphs (Backend::Repeat)
  bool looks_up_drawn = true;  // tokens that it drew itself (Backend::CreateDrawnTokens)
  Activations activations = Activations::kFloat;
};

// Unavailable without a driver or GPU, InvalidArgument for a device that is not there or kInt8, FailedPrecondition for
// a GPU older than sm_80. The message names the call that failed.
absl::StatusOr<std::unique_ptr<Backend>> CreateCudaBackend(const CudaOptions& options);

// The cudaStream_t on which a backend of CreateCudaBackend issues everything, for a communicator to issue its own
// collectives in order with the ops. Lives as long as the backend.
void* CudaStreamOf(const Backend& backend);

}  // namespace rankwise::kernels
