// How near the CPU kernels come to this machine's limits, which are measured just before.
//   rankwise-kernel-bench [threads] [avx2|avx512]
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <vector>

#include "base/check.h"
#include "kernels/backend.h"
#include "kernels/machine_limits.h"

namespace rankwise::kernels {
namespace {

constexpr int kRepeats = 9;

// Deterministic, in [-0.5, 0.5], as f16 bits or f32.
uint32_t NextHash(uint32_t& state) { return state = state * 1664525u + 1013904223u; }
float NextFloat(uint32_t& state) { return static_cast<float>(NextHash(state) >> 8) * 0x1p-24f - 0.5f; }

template <typename Body>
double MedianSeconds(Body&& body) {
  std::vector<double> seconds;
  body(0);
  for (int i = 1; i <= kRepeats; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    body(i);
    seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
  }
  std::nth_element(seconds.begin(), seconds.begin() + kRepeats / 2, seconds.end());
  return seconds[kRepeats / 2];
}

struct Bench {
  int threads;
  Backend& backend;

  void Print(const char* what, double seconds, double bytes, double flops) const {
    const MachineLimits limits = MeasureMachineLimits(threads);
    std::printf("%-40s %9.3f ms %7.2f GB/s (%3.0f %% of %6.2f) %8.1f GFLOP/s (%3.0f %% of %6.1f)\n", what,
                seconds * 1e3, bytes / seconds / 1e9, 100 * bytes / seconds / limits.read_bytes_per_second,
                limits.read_bytes_per_second / 1e9, flops / seconds / 1e9,
                100 * flops / seconds / limits.fma_flops_per_second, limits.fma_flops_per_second / 1e9);
  }

  // f16 weights [5632, 2048] as in a 1.1B model's FFN, twelve of them (277 MB) in turn so that no cache holds them.
  void MatMuls() const {
    constexpr int64_t kOut = 5632, kIn = 2048, kMatrices = 12, kMaxRows = 512;
    uint32_t state = 1;
    std::vector<uint16_t> values(kOut * kIn);
    // Sign and mantissa at random, exponents of 2^-4 and 2^-3.
    for (uint16_t& v : values) v = static_cast<uint16_t>(((NextHash(state) >> 16) & 0x87ff) | 0x2c00);
    const MatrixView view{reinterpret_cast<const std::byte*>(values.data()), DType::kF16, kOut, kIn, kIn};
    SumTree tree;
    for (int c = 0; c <= 8; ++c) tree.boundaries.push_back(kIn * c / 8);
    std::vector<std::unique_ptr<PackedMatrix>> matrices;
    for (int64_t i = 0; i < kMatrices; ++i) {
      const SumTree one{{0, kIn}};
      matrices.push_back(std::move(backend.Pack({&view, 1}, i % 2 ? tree : one)).value());
    }
    std::vector<float> x(kMaxRows * kIn), y(kMaxRows * kOut);
    for (float& v : x) v = NextFloat(state);
    for (int64_t rows : {1, 2, 4, 8, 16, 32, 512}) {
      const int64_t passes = rows > 64 ? 1 : kMatrices;
      const double seconds =
          MedianSeconds([&](int repeat) {
            for (int64_t i = 0; i < passes; ++i) {
              RW_CHECK(backend.MatMul(y.data(), x.data(), rows, *matrices[(repeat + i) % kMatrices], nullptr).ok());
            }
          }) /
          static_cast<double>(passes);
      char what[64];
      std::snprintf(what, sizeof(what), "matmul f16 5632x2048, %d rows", static_cast<int>(rows));
      Print(what, seconds, static_cast<double>(matrices[0]->bytes()), 2.0 * kOut * kIn * static_cast<double>(rows));
    }
  }

  // One new token of each of `requests`, 32 heads over 4 KV heads of 64, 16 layers in turn.
  void DecodeAttention(KvFormat format, int32_t context, int32_t requests) const {
    constexpr int kLayers = 16;
    const AttentionShape shape{.n_heads_local = 32, .n_kv_heads_local = 4, .head_dim = 64, .score_scale = 0.125f};
    const int32_t blocks_each = context / kKvBlockTokens;
    auto pool =
        std::move(backend.CreateKvPool({.n_layers = kLayers, .n_kv_heads_local = 4, .head_dim = 64, .format = format},
                                       blocks_each * requests))
            .value();
    if (format == KvFormat::kInt8) {
      RW_CHECK(backend.SetKvScales(*pool, std::vector<KvChannelScales>(kLayers * 4 * 64, {0.004f, 0, 0.004f, 0})).ok());
    }
    std::vector<int32_t> blocks(blocks_each * requests);
    std::iota(blocks.begin(), blocks.end(), 0);
    std::vector<std::span<const int32_t>> tables;
    std::vector<int32_t> tokens(requests), row_begin(requests + 1), first(requests, context - 1);
    std::iota(row_begin.begin(), row_begin.end(), 0);
    for (int32_t r = 0; r < requests; ++r) tables.push_back(std::span(blocks).subspan(r * blocks_each, blocks_each));
    constexpr int64_t kWidth = (32 + 8) * 64;
    std::vector<float> qkv(context * kWidth), out(requests * 32 * 64);
    uint32_t state = 2;
    for (float& v : qkv) v = NextFloat(state);
    const std::vector<int32_t> fill_tokens(context), fill_begin = {0, context}, zero = {0};
    for (int32_t r = 0; r < requests; ++r) {
      RW_CHECK(backend.BeginStep({fill_tokens, fill_begin, zero, std::span(tables).subspan(r, 1)}).ok());
      for (int layer = 0; layer < kLayers; ++layer) {
        RW_CHECK(backend.RopeAppend(qkv.data(), shape, RopeTable{}, nullptr, nullptr, 0, *pool, layer, nullptr).ok());
      }
    }
    RW_CHECK(backend.BeginStep({tokens, row_begin, first, tables}).ok());
    const double seconds = MedianSeconds([&](int) {
                             for (int layer = 0; layer < kLayers; ++layer) {
                               RW_CHECK(backend.Attention(out.data(), qkv.data(), shape, *pool, layer).ok());
                             }
                           }) /
                           kLayers;
    const double tokens_read = static_cast<double>(context) * requests;
    constexpr const char* kNames[kKvFormatCount] = {"f32", "f16", "int8", "int8-online", "int4-online"};
    char what[64];
    std::snprintf(what, sizeof(what), "attention %s, context %d x %d", kNames[static_cast<int>(format)], context,
                  requests);
    Print(what, seconds, tokens_read * 2 * 4 * static_cast<double>(KvVectorBytes(format, 64)),
          tokens_read * 2 * 2 * 32 * 64);
  }
};

int Main(int argc, char** argv) {
  CpuOptions options;
  if (argc > 1) options.threads = std::atoi(argv[1]);
  if (argc > 2) options.instruction_set = argv[2];
  auto backend = CreateCpuBackend(options);
  if (!backend.ok()) {
    std::fprintf(stderr, "rankwise-kernel-bench: %s\n", std::string(backend.status().message()).c_str());
    return 1;
  }
  std::printf("%s; medians of %d\n", (*backend)->Description().c_str(), kRepeats);
  const Bench bench{options.threads, **backend};
  bench.MatMuls();
  for (KvFormat format : {KvFormat::kF16, KvFormat::kInt8, KvFormat::kInt8Online, KvFormat::kInt4Online}) {
    for (int32_t context : {2048, 8192}) bench.DecodeAttention(format, context, 1);
    bench.DecodeAttention(format, 2048, 8);
  }
  return 0;
}

}  // namespace
}  // namespace rankwise::kernels

int main(int argc, char** argv) { return rankwise::kernels::Main(argc, argv); }
