#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

// Runs a kernel's thread blocks on the CPU, one after the other, each CUDA thread as a fiber of the calling thread. The
// headers in include/ turn CUDA's words into calls of this one.
//
// A kernel faults, and its launch returns an error whose text names the block, the thread and the cause, when it
//   - reads or writes shared memory outside of what was asked for, or reads a word that no thread of the block wrote;
//   - reads or writes a word of shared memory that another thread wrote, or writes one that another read, with no
//     barrier between the two (__syncwarp among threads of one warp, __syncthreads among all);
//   - reads or writes what a copy is still on its way to, or ends with a copy on its way;
//   - reaches __syncthreads at different places, or with some threads gone; calls a warp's function with some lanes
//     elsewhere; or waits for what never comes;
//   - loads 16 bytes or copies 8 or 16 from an address that is not a multiple of them;
//   - writes beside an allocation (cudaMalloc) or to one freed lately. AddressSanitizer also sees reads, where it is
//   on.
// Threads run in an order drawn for each block from RANKWISE_EMULATION_SEED and the number of the launch, a warp as far
// as it gets before the next. Blocks run one at a time: what kernels of several blocks do to each other is not tested.
namespace rankwise::cuda_emulation {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

// Returns "" or the fault. `body(context)` is the kernel with its arguments.
std::string RunGrid(const Index& grid, int threads, int64_t shared_bytes, void (*body)(const void*),
                    const void* context);

// Of the fiber that runs.
const Index& ThreadIndex();
const Index& BlockIndex();
int Lane();

[[noreturn]] void Fault(const std::string& cause);

void BlockBarrier(const char* file, int line);
void WarpBarrier();

// All lanes of a warp call with inputs and outputs of the same sizes. The last one computes all outputs from all
// inputs.
constexpr int kLanes = 32;
constexpr int kMeetingBytes = 256;
struct Meeting {
  alignas(16) unsigned char in[kLanes][kMeetingBytes];
  alignas(16) unsigned char out[kLanes][kMeetingBytes];
};
void Meet(const char* name, const void* in, size_t in_bytes, void* out, size_t out_bytes, void (*compute)(Meeting&));

// The address of words [word, word + count) of the block's shared memory, if this thread may read or write them now.
enum class Access { kRead, kWrite };
uint32_t* SharedWords(int64_t word, int count, Access access);

// The thread's copies of `count` words from global memory, or of zeros from null: they arrive in WaitForCopies(n), all
// groups but the last n; until then nobody may touch where they go, nor may the thread end.
void CopyLater(int64_t word, int count, const void* from);
void CommitCopies();
void WaitForCopies(int groups_left);

// high += a[0] b[0], low += the other products of terms: one step of the tensor core, which adds eight products and the
// sum exactly and cuts the result off to f32.
struct MultiplyInput {
  float high[4], low[4];
  uint32_t a[3][4], b[3][2];
  int a_terms, b_terms;
};
struct MultiplyOutput {
  float high[4], low[4];
};
void MultiplyFragments(Meeting& meeting);

// Bytes that cudaMemcpyAsync has brought to the host so far, on any thread.
int64_t BytesToHost();
// Calls of cudaMemcpyAsync to the device so far, on any thread.
int64_t CopiesToDevice();

// A profiler's: how many ranges this thread was in before the call, -1 for one too many left. And all that it entered
// since the last TakeRanges, each with those around it: "step 1, 3 rows/layer 0/MatMul".
int EnterRange(const char* name);
int LeaveRange();
std::vector<std::string> TakeRanges();

// Launches of graphs so far, on any thread.
int64_t GraphLaunches();

// From now on streams do what they are given only when somebody waits for it: a wait for an event or a stream, or
// cudaFree; asking for an event does a little of it. So what the host reads too early or overwrites too soon shows. Of
// streams of one thread.
void SetStreamsLate(bool are_late);

// Every allocation's guard bands, and what was freed lately, are as they were, or which is not.
std::string CheckAllocations();

}  // namespace rankwise::cuda_emulation
