#pragma once

#include <cuda_runtime_api.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>

#include "tests/cuda_emulation/emulator.h"

// CUDA C++'s words, types and functions that kernels/cuda uses, on the emulator.
#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define threadIdx (::rankwise::cuda_emulation::ThreadIndex())
#define blockIdx (::rankwise::cuda_emulation::BlockIndex())
#define __syncthreads() ::rankwise::cuda_emulation::BlockBarrier(__FILE__, __LINE__)
#define __syncwarp() ::rankwise::cuda_emulation::WarpBarrier()

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace rankwise::cuda_emulation {

// Does `work` in order with the stream: now, or whenever the graph that the stream is captured into is launched. `work`
// returns "" or a fault, which is kept for cudaGetErrorString.
cudaError_t Issue(cudaStream_t stream, std::function<std::string()> work);

// Every lane's value to all lanes, then `choose(lane, values)`.
template <typename T, typename Choose>
T Exchange(const char* name, unsigned mask, T x, const Choose& choose) {
  if (mask != 0xffffffff) Fault(std::string(name) + " of less than a whole warp");
  T all[kLanes];
  static_assert(sizeof(all) <= kMeetingBytes);
  Meet(name, &x, sizeof(x), all, sizeof(all), [](Meeting& meeting) {
    for (int to = 0; to < kLanes; ++to) {
      for (int from = 0; from < kLanes; ++from) {
        std::memcpy(meeting.out[to] + from * sizeof(T), meeting.in[from], sizeof(T));
      }
    }
  });
  return choose(Lane(), all);
}

}  // namespace rankwise::cuda_emulation

template <typename T>
T __shfl_xor_sync(unsigned mask, T x, int distance) {
  return rankwise::cuda_emulation::Exchange("__shfl_xor_sync", mask, x,
                                            [&](int lane, const T* all) { return all[lane ^ distance]; });
}
inline int __any_sync(unsigned mask, int x) {
  return rankwise::cuda_emulation::Exchange("__any_sync", mask, x, [](int, const int* all) {
    for (int i = 0; i < rankwise::cuda_emulation::kLanes; ++i) {
      if (all[i] != 0) return 1;
    }
    return 0;
  });
}

inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
// Byte i of the result is byte (selector >> 4 i) & 7 of y:x.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t both = uint64_t{y} << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<unsigned>(both >> ((selector >> (4 * i) & 7) * 8) & 0xff) << (8 * i);
  }
  return result;
}
inline unsigned long long atomicAdd(unsigned long long* p, unsigned long long x) {
  const unsigned long long old = *p;
  *p += x;
  return old;
}
using std::isnan;
