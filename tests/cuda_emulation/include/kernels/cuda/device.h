#pragma once

#include <cuda_runtime.h>

#include <bit>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "tests/cuda_emulation/emulator.h"

// The twin of kernels/cuda/device.h: the same names on the emulator. That file says what they mean.
namespace rankwise::kernels::cuda {

template <typename... Parameters, typename... Arguments>
cudaError_t Launch(void (*kernel)(Parameters...), dim3 grid, int threads, int64_t shared_bytes, cudaStream_t stream,
                   Arguments... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> arguments;
  };
  const Call call{kernel, {static_cast<Parameters>(arguments)...}};
  return cuda_emulation::Issue(stream, [=] {
    return cuda_emulation::RunGrid(
        {grid.x, grid.y, grid.z}, threads, shared_bytes,
        [](const void* context) {
          const Call& made = *static_cast<const Call*>(context);
          std::apply(made.kernel, made.arguments);
        },
        &call);
  });
}

// A word of shared memory; reading and writing go through the emulator.
template <typename T>
class SharedWord {
 public:
  explicit SharedWord(int64_t word) : word_(word) {}
  SharedWord(const SharedWord&) = default;
  operator T() const { return std::bit_cast<T>(*cuda_emulation::SharedWords(word_, 1, cuda_emulation::Access::kRead)); }
  T operator=(T x) const {
    *cuda_emulation::SharedWords(word_, 1, cuda_emulation::Access::kWrite) = std::bit_cast<uint32_t>(x);
    return x;
  }

 private:
  const int64_t word_;
};

template <typename T>
class Shared {
  static_assert(sizeof(T) == 4);

 public:
  Shared(int64_t offset, int64_t count) : first_(offset / 4), count_(count) {
    if (offset % 16 != 0) cuda_emulation::Fault("takes shared memory at no multiple of 16 bytes");
  }
  SharedWord<T> operator[](int64_t i) const { return SharedWord<T>(At(i, 1)); }
  using Four = std::conditional_t<std::is_same_v<T, float>, float4, uint4>;
  Four Load4(int64_t i) const { return Load<Four>(i, 4); }
  uint2 Load2(int64_t i) const { return Load<uint2>(i, 2); }
  template <int kCount>
  void CopyAsync(int64_t i, const void* from, bool is_there) const {
    if (reinterpret_cast<uintptr_t>(from) % (kCount * 4) != 0) {
      cuda_emulation::Fault("copies words from between their places in global memory");
    }
    cuda_emulation::CopyLater(At(i, kCount), kCount, is_there ? from : nullptr);
  }

 private:
  int64_t At(int64_t i, int count) const {
    if (i < 0 || i + count > count_) cuda_emulation::Fault("touches an element outside of a shared array");
    if (i % count != 0) cuda_emulation::Fault("loads elements of a shared array from between their places");
    return first_ + i;
  }
  template <typename Words>
  Words Load(int64_t i, int count) const {
    Words words;
    std::memcpy(&words, cuda_emulation::SharedWords(At(i, count), count, cuda_emulation::Access::kRead), sizeof(words));
    return words;
  }

  const int64_t first_, count_;
};

inline void CommitCopies() { cuda_emulation::CommitCopies(); }
template <int kLeft>
void WaitForCopies() {
  cuda_emulation::WaitForCopies(kLeft);
}

inline uint4 Load16(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(uint4) != 0) {
    cuda_emulation::Fault("loads words from between their places in global memory");
  }
  uint4 words;
  std::memcpy(&words, p, sizeof(words));
  return words;
}

inline uint32_t RoundPair(float x, float y) {
  const auto rounded = [](float value) -> uint32_t {
    if (value != value) return 0x7fff;
    const auto bits = std::bit_cast<uint32_t>(value);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  };
  return rounded(y) << 16 | rounded(x);
}

template <int kTermsA, int kTermsB>
void MultiplyTerms(float (&high)[4], float (&low)[4], const uint32_t (&a)[kTermsA][4],
                   const uint32_t (&b)[kTermsB][2]) {
  cuda_emulation::MultiplyInput in{.a_terms = kTermsA, .b_terms = kTermsB};
  std::memcpy(in.high, high, sizeof(high));
  std::memcpy(in.low, low, sizeof(low));
  std::memcpy(in.a, a, sizeof(a));
  std::memcpy(in.b, b, sizeof(b));
  cuda_emulation::MultiplyOutput out;
  cuda_emulation::Meet("MultiplyTerms", &in, sizeof(in), &out, sizeof(out), cuda_emulation::MultiplyFragments);
  std::memcpy(high, out.high, sizeof(high));
  std::memcpy(low, out.low, sizeof(low));
}

}  // namespace rankwise::kernels::cuda
