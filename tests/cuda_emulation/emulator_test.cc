// What the emulator must find in a kernel, each in a kernel that has it; and that it finds nothing in their sound
// twins.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <bit>
#include <numeric>
#include <string>
#include <vector>

#include "tests/cuda_emulation/include/kernels/cuda/device.h"

namespace rankwise::cuda_emulation {
namespace {

using kernels::cuda::CommitCopies;
using kernels::cuda::Launch;
using kernels::cuda::Load16;
using kernels::cuda::MultiplyTerms;
using kernels::cuda::Shared;
using kernels::cuda::WaitForCopies;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr unsigned kAll = 0xffffffff;

class EmulatorTest : public ::testing::Test {
 protected:
  void SetUp() override { ASSERT_EQ(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), cudaSuccess); }
  void TearDown() override { cudaStreamDestroy(stream_); }

  // "" or the fault, of two blocks with 16 bytes of shared memory for each thread.
  template <typename... Parameters, typename... Arguments>
  std::string Run(void (*kernel)(Parameters...), int threads, Arguments... arguments) {
    const cudaError_t error = Launch(kernel, dim3(2), threads, threads * 16, stream_, arguments...);
    return error == cudaSuccess ? "" : cudaGetErrorString(error);
  }

  cudaStream_t stream_ = nullptr;
};

// Every thread's number to its neighbour, half the block away.
__global__ void Swap(int* out, int count, bool has_barrier) {
  const Shared<int> words(0, count);
  const int i = threadIdx.x;
  words[i] = i;
  if (has_barrier) __syncthreads();
  out[blockIdx.x * count + i] = words[(i + count / 2) % count];
}

TEST_F(EmulatorTest, FindsAMissingBarrier) {
  std::vector<int> out(128);
  EXPECT_EQ(Run(Swap, 64, out.data(), 64, true), "");
  EXPECT_EQ(out[64 + 3], 35);
  EXPECT_THAT(Run(Swap, 64, out.data(), 64, false),
              AnyOf(HasSubstr("no barrier between"), HasSubstr("which nobody wrote")));
}

// The second write comes while another thread may still read the first.
__global__ void Reuse(int* out, bool has_barrier) {
  const Shared<int> words(0, 64);
  const int i = threadIdx.x;
  words[i] = i;
  __syncthreads();
  out[i] = words[63 - i];
  if (has_barrier) __syncthreads();
  words[i] = -i;
}

TEST_F(EmulatorTest, FindsAWriteToWhatIsStillRead) {
  std::vector<int> out(64);
  EXPECT_EQ(Run(Reuse, 64, out.data(), true), "");
  EXPECT_THAT(Run(Reuse, 64, out.data(), false), HasSubstr("no barrier between"));
}

__global__ void SwapInWarp(int* out, bool has_barrier) {
  const Shared<int> words(0, 64);
  const int i = threadIdx.x;
  words[i] = i;
  if (has_barrier) __syncwarp();
  out[i] = words[i ^ 1];
}

TEST_F(EmulatorTest, KnowsTheBarrierOfAWarp) {
  std::vector<int> out(64);
  EXPECT_EQ(Run(SwapInWarp, 64, out.data(), true), "");
  EXPECT_EQ(out[5], 4);
  EXPECT_NE(Run(SwapInWarp, 64, out.data(), false), "");
}

__global__ void ReadWord(int* out, int word) {
  const Shared<int> words(0, 32);
  words[threadIdx.x] = 1;
  if (threadIdx.x == 0) out[0] = words[word];
}
__global__ void ReadUnwritten(int* out) {
  const Shared<int> words(0, 32);
  if (threadIdx.x == 1) words[1] = 1;
  if (threadIdx.x == 0) out[0] = words[0];
}
__global__ void AskTooMuch(int* out) {
  const Shared<int> words(0, 4096);
  words[4000] = 1;
  out[0] = words[4000];
}

TEST_F(EmulatorTest, FindsReadsOutsideOfSharedMemoryAndOfWhatNobodyWrote) {
  int out = 0;
  EXPECT_EQ(Run(ReadWord, 32, &out, 0), "");
  EXPECT_THAT(Run(ReadWord, 32, &out, 32), HasSubstr("outside of a shared array"));
  EXPECT_THAT(Run(ReadWord, 32, &out, -1), HasSubstr("outside of a shared array"));
  EXPECT_THAT(Run(ReadUnwritten, 32, &out), HasSubstr("nobody wrote"));
  EXPECT_THAT(Run(AskTooMuch, 32, &out), HasSubstr("of shared memory"));
}

__global__ void DivergentBarrier() {
  if (threadIdx.x < 7) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
__global__ void SomeLeave() {
  if (threadIdx.x == 9) return;
  __syncthreads();
}
__global__ void HalfAWarp(float* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(kAll, 1.0f, 1);
}
__global__ void TwoFunctions(float* out) {
  if (threadIdx.x < 16) {
    out[threadIdx.x] = __shfl_xor_sync(kAll, 1.0f, 1);
  } else {
    __syncwarp();
  }
}

TEST_F(EmulatorTest, FindsThreadsThatDoNotMeet) {
  std::vector<float> out(32);
  EXPECT_THAT(Run(DivergentBarrier, 32), HasSubstr("barrier of line"));
  EXPECT_THAT(Run(SomeLeave, 64), HasSubstr("1 threads that are gone"));
  EXPECT_THAT(Run(HalfAWarp, 32, out.data()), HasSubstr("not all lanes come"));
  EXPECT_THAT(Run(TwoFunctions, 32, out.data()), HasSubstr("while other lanes are in"));
}

__global__ void WriteAt(int* out, int i) {
  if (threadIdx.x == 0) out[i] = 7;
}
__global__ void LoadAt(const unsigned char* from, unsigned* out) { *out = Load16(from).x; }

TEST_F(EmulatorTest, FindsWritesBesideAnAllocationAndMisplacedLoads) {
  void* memory = nullptr;
  ASSERT_EQ(cudaMalloc(&memory, 40), cudaSuccess);
  EXPECT_EQ(Run(WriteAt, 32, static_cast<int*>(memory), 9), "");
  unsigned out = 0;
  EXPECT_EQ(Run(LoadAt, 32, static_cast<unsigned char*>(memory), &out), "");
  EXPECT_THAT(Run(LoadAt, 32, static_cast<unsigned char*>(memory) + 8, &out), HasSubstr("from between their places"));
#if !defined(__SANITIZE_ADDRESS__)  // which ends the process
  EXPECT_THAT(Run(WriteAt, 32, static_cast<int*>(memory), 10), HasSubstr("beside an allocation of 40 bytes"));
  static_cast<int*>(memory)[10] = static_cast<int>(0xa5a5a5a5);
#endif
  EXPECT_EQ(cudaFree(memory), cudaSuccess);
}

#if !defined(__SANITIZE_ADDRESS__)  // which ends the process
TEST_F(EmulatorTest, FindsWritesToWhatWasFreed) {
  void* memory = nullptr;
  ASSERT_EQ(cudaMalloc(&memory, 40), cudaSuccess);
  ASSERT_EQ(cudaFree(memory), cudaSuccess);
  EXPECT_THAT(Run(WriteAt, 32, static_cast<int*>(memory), 9), HasSubstr("memory that was freed"));
  static_cast<int*>(memory)[9] = static_cast<int>(0xa5a5a5a5);
}
#endif

TEST_F(EmulatorTest, RefusesTheDefaultStreamAndWhatNoGpuLaunches) {
  EXPECT_EQ(Launch(DivergentBarrier, dim3(1), 32, 0, nullptr), cudaErrorInvalidValue);
  EXPECT_NE(Launch(SomeLeave, dim3(1), 33, 0, stream_), cudaSuccess);
  EXPECT_NE(Launch(SomeLeave, dim3(1), 2048, 0, stream_), cudaSuccess);
  EXPECT_NE(Launch(SomeLeave, dim3(1), 32, 200 << 10, stream_), cudaSuccess);
}

// Two groups of copies of this warp's numbers, each thread's four; the second group is zeros. A thread then reads what
// its neighbour copied.
__global__ void CopyTwice(const int* from, int* out, int groups_left, bool has_barrier) {
  const Shared<int> words(0, 64);
  const int i = threadIdx.x % 8 * 4;
  if (threadIdx.x < 8) words.CopyAsync<4>(i, from + i, true);
  CommitCopies();
  if (threadIdx.x < 8) words.CopyAsync<4>(32 + i, nullptr, false);
  CommitCopies();
  groups_left == 1 ? WaitForCopies<1>() : WaitForCopies<0>();
  if (has_barrier) __syncwarp();
  out[threadIdx.x] = words[threadIdx.x ^ 4];
  WaitForCopies<0>();
  if (has_barrier) __syncwarp();
  out[32 + threadIdx.x] = words[32 + (threadIdx.x ^ 4)];
}
__global__ void NeverWait(const int* from) { Shared<int>(0, 128).CopyAsync<4>(threadIdx.x * 4, from, true); }
__global__ void CopyAndTouch(const int* from, int* out, bool reads) {
  const Shared<int> words(0, 128);
  const int i = threadIdx.x * 4;
  words.CopyAsync<4>(i, from, true);
  CommitCopies();
  WaitForCopies<1>();  // all but this very group
  if (reads) {
    out[threadIdx.x] = words[i];
  } else {
    words[i] = 1;
  }
  WaitForCopies<0>();
}

TEST_F(EmulatorTest, CopiesArriveWhereTheyAreWaitedFor) {
  alignas(16) int from[36];
  std::iota(from, from + 36, 100);
  std::vector<int> out(64);
  for (const int left : {0, 1}) {
    EXPECT_EQ(Run(CopyTwice, 32, from, out.data(), left, true), "");
    for (int i = 0; i < 32; ++i) EXPECT_EQ(out[i], 100 + (i ^ 4)) << i;
    EXPECT_EQ(out[40], 0);
  }
  EXPECT_NE(Run(CopyTwice, 32, from, out.data(), 0, false), "");
  EXPECT_THAT(Run(CopyTwice, 32, from + 1, out.data(), 0, true), HasSubstr("copies words from between"));
  EXPECT_THAT(Run(NeverWait, 32, from), HasSubstr("ends with copies on their way"));
  EXPECT_THAT(Run(CopyAndTouch, 32, from, out.data(), true), HasSubstr("reads word"));
  EXPECT_THAT(Run(CopyAndTouch, 32, from, out.data(), false), HasSubstr("which is on its way"));
}

// a [16, 16] times b [16, 8], both of small integers, which bf16 holds: one term, and a second that is an eighth.
__global__ void Multiply(const float* a, const float* b, float* out) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const auto pair = [](float x, float y) { return __byte_perm(__float_as_uint(x), __float_as_uint(y), 0x7632); };
  uint32_t as[2][4], bs[1][2];
  for (int part = 0; part < 4; ++part) {
    const float* from = a + (g + part % 2 * 8) * 16 + 2 * t + part / 2 * 8;
    as[0][part] = pair(from[0], from[1]);
    as[1][part] = pair(from[0] / 8, from[1] / 8);
  }
  for (int part = 0; part < 2; ++part) {
    const float* from = b + (2 * t + part * 8) * 8 + g;
    bs[0][part] = pair(from[0], from[8]);
  }
  float high[4] = {}, low[4] = {1, 1, 1, 1};
  MultiplyTerms(high, low, as, bs);
  for (int i = 0; i < 4; ++i) {
    out[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = high[i];
    out[128 + (g + i / 2 * 8) * 8 + 2 * t + i % 2] = low[i];
  }
}

TEST_F(EmulatorTest, MultipliesAsFragmentsSay) {
  std::vector<float> a(256), b(128), out(256);
  for (int i = 0; i < 256; ++i) a[i] = static_cast<float>(i * 7 % 31 - 15);
  for (int i = 0; i < 128; ++i) b[i] = static_cast<float>(i * 5 % 29 - 14);
  EXPECT_EQ(Run(Multiply, 32, a.data(), b.data(), out.data()), "");
  for (int i = 0; i < 128; ++i) {
    float sum = 0;
    for (int k = 0; k < 16; ++k) sum += a[i / 8 * 16 + k] * b[k * 8 + i % 8];
    EXPECT_EQ(out[i], sum) << i;
    EXPECT_EQ(out[128 + i], sum / 8 + 1) << i;
  }
}

__global__ void Double(const int* in, int* out) { out[threadIdx.x] = 2 * in[threadIdx.x]; }

TEST_F(EmulatorTest, ReplaysWhatWasCaptured) {
  std::vector<int> in(32, 5), out(32, 0), copy(32, 0);
  ASSERT_EQ(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), cudaSuccess);
  EXPECT_EQ(Run(Double, 32, in.data(), out.data()), "");
  EXPECT_EQ(cudaMemcpyAsync(copy.data(), out.data(), 32 * sizeof(int), cudaMemcpyDeviceToDevice, stream_), cudaSuccess);
  cudaGraph_t graph = nullptr;
  ASSERT_EQ(cudaStreamEndCapture(stream_, &graph), cudaSuccess);
  cudaGraphExec_t executable = nullptr;
  ASSERT_EQ(cudaGraphInstantiate(&executable, graph, 0), cudaSuccess);
  EXPECT_EQ(cudaGraphDestroy(graph), cudaSuccess);
  EXPECT_EQ(copy[0], 0) << "capturing does nothing";
  for (const int value : {5, 8}) {
    in.assign(32, value);
    EXPECT_EQ(cudaGraphLaunch(executable, stream_), cudaSuccess);
    EXPECT_EQ(copy, std::vector<int>(32, 2 * value));
  }
  EXPECT_EQ(cudaGraphExecDestroy(executable), cudaSuccess);
  EXPECT_EQ(Run(Double, 32, copy.data(), out.data()), "") << "the stream does things at once again";
  EXPECT_EQ(out[31], 32);
}

TEST_F(EmulatorTest, LateStreamsDoWhatIsWaitedFor) {
  int number = 1, copies[3] = {};
  cudaEvent_t event = nullptr;
  void* memory = nullptr;
  ASSERT_EQ(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), cudaSuccess);
  EXPECT_EQ(cudaEventQuery(event), cudaSuccess) << "never recorded";
  ASSERT_EQ(cudaMalloc(&memory, 64), cudaSuccess);
  SetStreamsLate(true);
  // Three copies of `value`, and the event behind the second.
  const auto give = [&](int value) {
    number = value;
    for (int i = 0; i < 3; ++i) {
      if (i == 2) {
        ASSERT_EQ(cudaEventRecord(event, stream_), cudaSuccess);
      }
      ASSERT_EQ(cudaMemcpyAsync(&copies[i], &number, sizeof number, cudaMemcpyHostToDevice, stream_), cudaSuccess);
    }
  };
  give(1);
  EXPECT_THAT(copies, ElementsAre(0, 0, 0));
  number = 2;
  EXPECT_EQ(cudaEventSynchronize(event), cudaSuccess);
  EXPECT_THAT(copies, ElementsAre(2, 2, 0)) << "was overwritten before it was sent";
  EXPECT_EQ(cudaEventQuery(event), cudaSuccess);
  EXPECT_EQ(cudaStreamSynchronize(stream_), cudaSuccess);
  EXPECT_THAT(copies, ElementsAre(2, 2, 2));

  give(3);
  EXPECT_EQ(cudaEventQuery(event), cudaErrorNotReady);
  EXPECT_THAT(copies, ElementsAre(3, 2, 2)) << "asking does a little";
  EXPECT_EQ(cudaEventQuery(event), cudaErrorNotReady);
  EXPECT_EQ(cudaEventQuery(event), cudaSuccess);
  EXPECT_THAT(copies, ElementsAre(3, 3, 2));
  EXPECT_EQ(cudaFree(memory), cudaSuccess);
  EXPECT_THAT(copies, ElementsAre(3, 3, 3));

  give(4);
  SetStreamsLate(false);
  EXPECT_THAT(copies, ElementsAre(4, 4, 4));
  EXPECT_EQ(cudaEventDestroy(event), cudaSuccess);
}

TEST_F(EmulatorTest, RefusesToWaitOrAllocateInACapture) {
  ASSERT_EQ(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), cudaSuccess);
  EXPECT_EQ(cudaStreamSynchronize(stream_), cudaErrorStreamCaptureUnsupported);
  cudaGraph_t graph = nullptr;
  EXPECT_EQ(cudaStreamEndCapture(stream_, &graph), cudaErrorStreamCaptureInvalidated);
  void* memory = nullptr;
  ASSERT_EQ(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), cudaSuccess);
  EXPECT_EQ(cudaMalloc(&memory, 64), cudaErrorStreamCaptureUnsupported);
  EXPECT_EQ(cudaStreamEndCapture(stream_, &graph), cudaErrorStreamCaptureInvalidated);
  EXPECT_EQ(graph, nullptr);
}

}  // namespace
}  // namespace rankwise::cuda_emulation
