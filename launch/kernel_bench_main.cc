// How near the kernels come to the device's limits, which are measured in the same run.

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>
#include <map>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/str_format.h"
#include "base/check.h"
#include "base/program_folder.h"
#include "base/status_macros.h"
#include "kernels/backend.h"
#include "kernels/cuda_plugin.h"
#include "kernels/machine_limits.h"
#include "launch/bench_record.h"

namespace rankwise::launch {
namespace {

using namespace kernels;

constexpr char kBench[] = "kernels";
constexpr int kRepeats = 9;
constexpr const char* kFormatNames[kKvFormatCount] = {"f32", "f16", "int8", "int8-online", "int4-online"};

void Must(const absl::Status& status) { RW_CHECK(status.ok(), status.ToString()); }
template <typename T>
T Must(absl::StatusOr<T> result) {
  Must(result.status());
  return *std::move(result);
}

// Deterministic, in [-0.5, 0.5].
uint32_t NextHash(uint32_t& state) { return state = state * 1664525u + 1013904223u; }
std::vector<float> RandomFloats(int64_t count) {
  uint32_t state = 2;
  std::vector<float> values(count);
  for (float& value : values) value = static_cast<float>(NextHash(state) >> 8) * 0x1p-24f - 0.5f;
  return values;
}

struct ModelShape {
  int n_heads, n_kv_heads, head_dim;
};

struct Bench {
  Backend& backend;
  std::function<MachineLimits()> limits;
  std::vector<Figure>& figures;
  bool is_quiet = false;
  Activations activations = Activations::kFloat;  // the backend's

  Backend::Floats Upload(std::span<const float> host) const {
    Backend::Floats device = Must(backend.Allocate(std::ssize(host)));
    Must(backend.CopyToDevice(host, device.get()));
    return device;
  }

  // Median seconds of one of the `count` ops that `issue` gives the backend, which may return before they are done:
  // a copy of one float from `result` waits for all.
  double SecondsOfOne(int count, const float* result, const std::function<void()>& issue) const {
    std::vector<double> seconds;
    for (int i = 0; i <= kRepeats; ++i) {
      float waited = 0;
      Must(backend.CopyToHost(result, {&waited, 1}));
      const auto begin = std::chrono::steady_clock::now();
      issue();
      Must(backend.CopyToHost(result, {&waited, 1}));
      if (i > 0) seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
    }
    std::ranges::nth_element(seconds, seconds.begin() + kRepeats / 2);
    return seconds[kRepeats / 2] / count;
  }

  void Add(const std::string& what, double seconds, double bytes, double flops) const {
    const MachineLimits limit = limits();
    const double most = limit.ops_per_second(activations);
    const double read_percent = 100 * bytes / seconds / limit.read_bytes_per_second;
    const double arithmetic_percent = 100 * flops / seconds / most;
    figures.push_back({what, "ms", 1e3 * seconds, Better::kLower});
    figures.push_back({what, "% of reads", read_percent, Better::kHigher});
    figures.push_back({what, "% of arithmetic", arithmetic_percent, Better::kHigher});
    if (is_quiet) return;
    std::printf("%-46s %9.3f ms %8.2f GB/s (%3.0f %% of %7.2f) %9.1f %s/s (%3.0f %% of %8.1f)\n", what.c_str(),
                seconds * 1e3, bytes / seconds / 1e9, read_percent, limit.read_bytes_per_second / 1e9,
                flops / seconds / 1e9, activations == Activations::kInt8 ? "GOP" : "GFLOP", arithmetic_percent,
                most / 1e9);
    std::fflush(stdout);
  }

  // Copies enough of one matrix that no cache holds them are read in turn.
  void MatMuls(std::string dtype, const MatrixView& view, const SumTree& tree, int64_t total_bytes,
               const std::vector<int64_t>& row_counts) const {
    if (activations != Activations::kFloat) dtype += absl::StrFormat(" x %s", ActivationsName(activations));
    const int64_t n_out = view.rows, n_in = view.cols;
    std::vector<std::unique_ptr<PackedMatrix>> matrices;
    do {
      const SumTree one{{0, n_in}};
      matrices.push_back(Must(backend.Pack({&view, 1}, matrices.size() % 2 ? tree : one)));
    } while (static_cast<int64_t>(matrices.size()) * matrices[0]->bytes() < total_bytes);
    const int64_t largest = *std::ranges::max_element(row_counts);
    const Backend::Floats x = Upload(RandomFloats(largest * n_in));
    const Backend::Floats y = Must(backend.Allocate(largest * n_out));
    size_t next = 0;
    for (const int64_t rows : row_counts) {
      const int count = rows > 64 ? 2 : static_cast<int>(matrices.size());
      const double seconds = SecondsOfOne(count, y.get(), [&] {
        for (int i = 0; i < count; ++i) {
          Must(backend.MatMul(y.get(), x.get(), rows, *matrices[next++ % matrices.size()], nullptr));
        }
      });
      const double row_bytes = static_cast<double>(rows * (n_in + n_out)) * sizeof(float);
      Add(absl::StrFormat("matmul %s %dx%d, %d rows", dtype, n_out, n_in, rows), seconds,
          static_cast<double>(matrices[0]->bytes()) + (rows > 64 ? row_bytes : 0),
          2.0 * static_cast<double>(n_out * n_in * rows));
    }
  }

  void MatMulsF16(int64_t n_out, int64_t n_in, int64_t total_bytes, const std::vector<int64_t>& row_counts) const {
    uint32_t state = 1;
    std::vector<uint16_t> values(n_out * n_in);
    // Sign and mantissa at random, exponents of 2^-4 and 2^-3.
    for (uint16_t& v : values) v = static_cast<uint16_t>(((NextHash(state) >> 16) & 0x87ff) | 0x2c00);
    SumTree tree;
    for (int c = 0; c <= 8; ++c) tree.boundaries.push_back(n_in * c / 8);
    MatMuls("f16", {reinterpret_cast<const std::byte*>(values.data()), DType::kF16, n_out, n_in, n_in}, tree,
            total_bytes, row_counts);
  }

  void MatMulsGrouped(int bits, int64_t n_out, int64_t n_in, int64_t total_bytes,
                      const std::vector<int64_t>& row_counts) const {
    constexpr int64_t kGroup = 128;
    uint32_t state = 3;
    std::vector<uint32_t> weights(n_in * n_out * bits / 32), zeros(n_in / kGroup * n_out * bits / 32);
    std::vector<uint16_t> scales(n_in / kGroup * n_out, 0x1c00);  // 2^-8
    for (uint32_t& word : weights) word = NextHash(state);
    for (uint32_t& word : zeros) word = NextHash(state);
    const GroupedMatrix grouped{.qweight = reinterpret_cast<const std::byte*>(weights.data()),
                                .qzeros = reinterpret_cast<const std::byte*>(zeros.data()),
                                .scales = reinterpret_cast<const std::byte*>(scales.data()),
                                .n_out = n_out,
                                .n_in = n_in,
                                .bits = bits,
                                .group_size = kGroup};
    const MatrixView view{
        .dtype = bits == 4 ? DType::kInt4 : DType::kInt8, .rows = n_out, .cols = n_in, .grouped = &grouped};
    MatMuls(absl::StrFormat("int%d", bits), view, {{0, n_in}}, total_bytes, row_counts);
  }

  // A pool of `layers` layers whose cache holds `context` tokens of each of `requests` requests.
  struct Filled {
    AttentionShape shape;
    std::unique_ptr<KvPool> pool;
    std::vector<int32_t> blocks;
    std::vector<std::span<const int32_t>> tables;  // [requests]
    Backend::Floats qkv;                           // of at least as many rows as there are requests
  };
  static constexpr int32_t kFillRows = 2048;

  Filled Fill(const ModelShape& model, KvFormat format, int layers, int32_t context, int32_t requests) const {
    Filled filled{.shape = {.n_heads_local = model.n_heads,
                            .n_kv_heads_local = model.n_kv_heads,
                            .head_dim = model.head_dim,
                            .score_scale = 0.125f},
                  .qkv = {nullptr, nullptr}};
    const int32_t blocks_each = context / kKvBlockTokens;
    filled.pool = Must(backend.CreateKvPool(
        {.n_layers = layers, .n_kv_heads_local = model.n_kv_heads, .head_dim = model.head_dim, .format = format},
        blocks_each * requests));
    if (format == KvFormat::kInt8) {
      Must(backend.SetKvScales(*filled.pool, std::vector<KvChannelScales>(layers * model.n_kv_heads * model.head_dim,
                                                                          {0.004f, 0, 0.004f, 0})));
    }
    filled.blocks.resize(blocks_each * requests);
    std::iota(filled.blocks.begin(), filled.blocks.end(), 0);
    for (int32_t r = 0; r < requests; ++r) {
      filled.tables.push_back(std::span(filled.blocks).subspan(r * blocks_each, blocks_each));
    }
    const int64_t width = (model.n_heads + 2 * model.n_kv_heads) * int64_t{model.head_dim};
    const int32_t rows = std::min(context, kFillRows);
    filled.qkv = Upload(RandomFloats(std::max(rows, requests) * width));
    const std::vector<int32_t> tokens(rows), row_begin = {0, rows};
    for (int32_t r = 0; r < requests; ++r) {
      for (int32_t position = 0; position + rows <= context; position += rows) {
        Must(backend.BeginStep({tokens, row_begin, std::span(&position, 1), std::span(filled.tables).subspan(r, 1)}));
        for (int layer = 0; layer < layers; ++layer) {
          Must(backend.RopeAppend(filled.qkv.get(), filled.shape, RopeTable{}, nullptr, nullptr, 0, *filled.pool, layer,
                                  nullptr));
        }
      }
    }
    return filled;
  }

  // One new token of each of `requests`; as many layers in turn as no cache holds, 16 at most.
  void DecodeAttention(const ModelShape& model, KvFormat format, int32_t context, int32_t requests,
                       int64_t total_bytes) const {
    const double bytes = static_cast<double>(context) * requests * 2 * model.n_kv_heads *
                         static_cast<double>(KvVectorBytes(format, model.head_dim));
    const int layers = std::clamp(static_cast<int>(static_cast<double>(total_bytes) / bytes), 1, 16);
    const Filled filled = Fill(model, format, layers, context, requests);
    const std::vector<int32_t> tokens(requests), first(requests, context - 1);
    std::vector<int32_t> row_begin(requests + 1);
    std::iota(row_begin.begin(), row_begin.end(), 0);
    Must(backend.BeginStep({tokens, row_begin, first, filled.tables}));
    const int64_t width = int64_t{model.n_heads} * model.head_dim;
    const Backend::Floats out = Must(backend.Allocate(requests * width));
    const int rounds = 16 / layers;
    const double seconds = SecondsOfOne(rounds * layers, out.get(), [&] {
      for (int i = 0; i < rounds * layers; ++i) {
        Must(backend.Attention(out.get(), filled.qkv.get(), filled.shape, *filled.pool, i % layers));
      }
    });
    Add(absl::StrFormat("attention %s, %d:%d heads of %d, %d x %d", kFormatNames[static_cast<int>(format)],
                        model.n_heads, model.n_kv_heads, model.head_dim, requests, context),
        seconds, bytes, 4.0 * context * requests * static_cast<double>(width));
  }

  // The last `rows` tokens of a context, which attend all before them.
  void PrefillAttention(const ModelShape& model, KvFormat format, int32_t context, int32_t rows) const {
    const Filled filled = Fill(model, format, 1, context, 1);
    const std::vector<int32_t> tokens(rows), row_begin = {0, rows}, first = {context - rows};
    Must(backend.BeginStep({tokens, row_begin, first, filled.tables}));
    const int64_t width = int64_t{model.n_heads} * model.head_dim;
    const Backend::Floats out = Must(backend.Allocate(rows * width));
    constexpr int kRounds = 4;
    const double seconds = SecondsOfOne(kRounds, out.get(), [&] {
      for (int i = 0; i < kRounds; ++i) {
        Must(backend.Attention(out.get(), filled.qkv.get(), filled.shape, *filled.pool, 0));
      }
    });
    const double pairs = static_cast<double>(rows) * (context - 0.5 * (rows - 1));
    Add(absl::StrFormat("attention %s, %d:%d heads of %d, rows %d of %d", kFormatNames[static_cast<int>(format)],
                        model.n_heads, model.n_kv_heads, model.head_dim, rows, context),
        seconds,
        static_cast<double>(context) * 2 * model.n_kv_heads *
            static_cast<double>(KvVectorBytes(format, model.head_dim)),
        4.0 * pairs * static_cast<double>(width));
  }
};

struct Flags {
  std::string device = "cpu";
  CpuOptions cpu;
  int gpu = 0;
  RecordFlags record;
};

// A model of 1.1 billion parameters, and matrices of together 277 MB.
void RunCpu(const Bench& bench, const Bench& int8, const Bench& bf16) {
  for (const auto& [n_out, n_in] : {std::pair{2048, 2048}, {5632, 2048}, {2048, 5632}}) {
    for (const int bits : {4, 8}) {
      for (const int64_t rows : {1, 8, 32, 512}) {
        for (const Bench* one : {&bench, &int8}) {
          one->MatMulsGrouped(bits, n_out, n_in, bits * (int64_t{34} << 20), {rows});
        }
      }
    }
  }
  for (const int64_t rows : {1, 2, 4, 8, 16, 32, 512}) {
    for (const Bench* one : {&bench, &bf16}) one->MatMulsF16(5632, 2048, int64_t{270} << 20, {rows});
  }
  constexpr ModelShape kModel{.n_heads = 32, .n_kv_heads = 4, .head_dim = 64};
  for (const KvFormat format : {KvFormat::kF16, KvFormat::kInt8, KvFormat::kInt8Online, KvFormat::kInt4Online}) {
    for (const auto& [context, requests] : {std::pair{2048, 1}, {8192, 1}, {2048, 8}}) {
      bench.DecodeAttention(kModel, format, context, requests, int64_t{1} << 40);
    }
  }
}

// LLaMA-7B, and its like with 8 KV heads; what is read in turn is many times a GPU's second-level cache.
void RunCuda(const Bench& bench, const Gpu& gpu) {
  constexpr int64_t kUncached = int64_t{1} << 30;
  const std::vector<int64_t> rows = {1, 8, 64, 2048};
  for (const auto& [n_out, n_in] : {std::pair{12288, 4096}, {4096, 4096}, {22016, 4096}, {4096, 11008}}) {
    bench.MatMulsF16(n_out, n_in, kUncached, rows);
    bench.MatMulsGrouped(4, n_out, n_in, kUncached / 4, rows);
  }
  bench.MatMulsGrouped(8, 22016, 4096, kUncached, rows);
  for (const int n_kv_heads : {32, 8}) {
    const ModelShape model{.n_heads = 32, .n_kv_heads = n_kv_heads, .head_dim = 128};
    for (const KvFormat format : {KvFormat::kF16, KvFormat::kInt8, KvFormat::kInt8Online, KvFormat::kInt4Online}) {
      for (const int32_t context : {2048, 32768}) {
        for (const int32_t requests : {1, 8, 64}) {
          const double bytes = static_cast<double>(context) * requests * 2 * n_kv_heads *
                               static_cast<double>(KvVectorBytes(format, 128));
          if (bytes > 0.8 * static_cast<double>(gpu.memory_bytes)) continue;
          bench.DecodeAttention(model, format, context, requests, kUncached);
        }
      }
    }
    for (const KvFormat format : {KvFormat::kF16, KvFormat::kInt8}) bench.PrefillAttention(model, format, 2048, 2048);
  }
}

// Fills the record and prints what it measures, as it goes along.
absl::Status Measure(const Flags& flags, BenchRecord& record) {
  const bool is_quiet = flags.record.is_json;
  const auto begin = [&](const std::string& subject) {
    record.subject = subject;
    if (!is_quiet) std::printf("%s; medians of %d\n", subject.c_str(), kRepeats);
  };
  if (flags.device == "cpu") {
    std::map<Activations, std::unique_ptr<Backend>> backends;
    for (const auto& [name, activations] : ActivationsByName()) {
      CpuOptions options = flags.cpu;
      options.activations = activations;
      RW_ASSIGN_OR_RETURN(backends[activations], CreateCpuBackend(options));
    }
    begin(backends[Activations::kFloat]->Description());
    const auto bench = [&](Activations activations) {
      // Measured for every line: other work of the machine hits both.
      return Bench{*backends[activations], [&] { return MeasureMachineLimits(flags.cpu.threads); }, record.figures,
                   is_quiet, activations};
    };
    RunCpu(bench(Activations::kFloat), bench(Activations::kInt8), bench(Activations::kBF16));
    return absl::OkStatus();
  }
  RW_ASSIGN_OR_RETURN(const CudaPlugin* plugin, OpenCudaPlugin(ProgramFolder()));
  RW_ASSIGN_OR_RETURN(const std::vector<Gpu> gpus, plugin->list_gpus());
  if (flags.gpu < 0 || flags.gpu >= static_cast<int>(gpus.size())) {
    return absl::InvalidArgumentError(absl::StrFormat("--gpu %d, but there are %d", flags.gpu, gpus.size()));
  }
  RW_ASSIGN_OR_RETURN(const MachineLimits limits, MeasureCudaLimits(ProgramFolder(), flags.gpu));
  RW_ASSIGN_OR_RETURN(const std::unique_ptr<Backend> backend, plugin->create_backend(flags.gpu, Activations::kFloat));
  begin(absl::StrFormat("%s; %s; limits: a copy of 2 GiB, a bf16 matmul of 8192 cubed", Describe(gpus[flags.gpu]),
                        backend->Description()));
  RunCuda({*backend, [&] { return limits; }, record.figures, is_quiet}, gpus[flags.gpu]);
  return absl::OkStatus();
}

absl::Status Run(const Flags& flags) {
  RW_ASSIGN_OR_RETURN(const auto baseline, ReadBaseline(flags.record, kBench));
  BenchRecord record = StartRecord(kBench);
  RW_RETURN_IF_ERROR(Measure(flags, record));
  return Report(record, "", flags.record, baseline);
}

}  // namespace
}  // namespace rankwise::launch

int main(int argc, char** argv) {
  rankwise::launch::Flags flags;
  CLI::App app("rankwise-kernel-bench: the kernels against the limits of their device");
  app.add_option("--device", flags.device, "cpu or cuda")->check(CLI::IsMember({"cpu", "cuda"}))->capture_default_str();
  app.add_option("--threads", flags.cpu.threads, "Of the CPU; 0: as many as this process may use")
      ->capture_default_str();
  app.add_option("--instruction-set", flags.cpu.instruction_set, "Of the CPU: avx2 or avx512");
  app.add_option("--gpu", flags.gpu, "Which one, among those this process may use")->capture_default_str();
  rankwise::launch::AddRecordFlags(app, flags.record);
  CLI11_PARSE(app, argc, argv);
  const absl::Status status = rankwise::launch::Run(flags);
  if (status.ok()) return 0;
  std::fprintf(stderr, "rankwise-kernel-bench: --device %s: %s\n", flags.device.c_str(),
               std::string(status.message()).c_str());
  return absl::IsOutOfRange(status) ? 1 : 2;
}
