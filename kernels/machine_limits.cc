#include "kernels/machine_limits.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <vector>

#include "kernels/cpu/cpu_backend.h"

namespace rankwise::kernels {
namespace {

constexpr int kRepeats = 15;

template <typename Body>
double MedianSeconds(Body&& body) {
  std::vector<double> seconds;
  for (int i = 0; i < kRepeats; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    body();
    seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
  }
  std::nth_element(seconds.begin(), seconds.begin() + kRepeats / 2, seconds.end());
  return seconds[kRepeats / 2];
}

}  // namespace

MachineLimits MeasureMachineLimits(int threads) {
  const auto kernels = FindCpuKernels("");
  if (!kernels.ok()) return {};
  ThreadTeam team(threads > 0 ? threads : ThreadTeam::AllowedCpuCount(), /*pin_threads=*/true);
  MachineLimits limits;
  // Results are stored where the compiler cannot see that nobody reads them.
  std::atomic<uint64_t> sink = 0;

  constexpr int64_t kPiece = int64_t{4} << 20, kPieces = 64;
  if (const auto memory = AllocateMemory(kPiece * kPieces); memory.ok()) {
    team.For(kPieces, [&](int64_t i, int) { std::memset(memory->get() + i * kPiece, 1, kPiece); });
    const double seconds = MedianSeconds([&] {
      team.For(kPieces,
               [&](int64_t i, int) { sink += kernels->floats.read_burst(memory->get() + i * kPiece, kPiece); });
    });
    limits.read_bytes_per_second = static_cast<double>(kPiece * kPieces) / seconds;
  }

  constexpr int64_t kIterations = 100'000;
  const int64_t bursts = 8 * team.size();
  const double iterations = static_cast<double>(bursts) * kIterations;
  const auto seconds_of = [&](auto burst) {
    return MedianSeconds(
        [&] { team.For(bursts, [&](int64_t, int) { sink += static_cast<uint64_t>(burst(kIterations)); }); });
  };
  limits.fma_flops_per_second = iterations * 2 * 16 * kFmaChains / seconds_of(kernels->floats.fma_burst);
  limits.int8_ops_per_second = iterations * 2 * 64 * kDotChains / seconds_of(kernels->integers.dot_burst);
  limits.bf16_flops_per_second = iterations * 4 * 16 * kPairChains / seconds_of(kernels->bfloat16s.dot_burst);
  return limits;
}

}  // namespace rankwise::kernels
