#include "kernels/cpu/cpu_backend.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "kernels/cpu/cpu_matrix.h"

namespace rankwise::kernels {
namespace {

// Below this many elements or multiplications the caller alone is done before the team has woken.
constexpr int64_t kWorthATeam = 32 << 10;

// Of one row of a matmul's input as the kernels read it: a float or a word for each step, or QuantizedRows.
int64_t TiledFloatsPerRow(const CpuMatrix& w) {
  return w.activations() == Activations::kInt8 ? 2 * w.pairs_per_row() + 2 * std::ssize(w.dot_groups())
                                               : w.steps().back();
}

// Whether this CPU has AMX-INT8 and the kernel lets this process use its registers, which it asks for when it first
// needs to know: a context switch then saves eight KiB of a thread that has them in use.
bool MayUseMatrixRegisters() {
  static const bool may = [] {
    constexpr unsigned kTile = 1u << 24, kInt8 = 1u << 25;  // of leaf 7's edx
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0 || (edx & (kTile | kInt8)) != (kTile | kInt8))
      return false;
    constexpr int kRequestPermission = 0x1023, kTileData = 18;  // of Linux' asm/prctl.h, from 5.16 on
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return may;
}

const IntegerKernels& BestAvx512Integers() {
  if (!__builtin_cpu_supports("avx512vnni")) return kAvx2Integers;
  return MayUseMatrixRegisters() ? kAvx512AmxIntegers : kAvx512VnniIntegers;
}

}  // namespace

absl::StatusOr<CpuKernels> FindCpuKernels(const std::string& instruction_set) {
  __builtin_cpu_init();
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (instruction_set != "" && instruction_set != "avx2" && instruction_set != "avx512") {
    return absl::InvalidArgumentError(
        absl::StrCat("instruction_set=\"", instruction_set, "\" is neither avx2 nor avx512"));
  }
  if (!has_avx2) return absl::FailedPreconditionError("this CPU lacks AVX2, FMA or F16C");
  if (instruction_set == "avx512" && !has_avx512) {
    return absl::FailedPreconditionError("this CPU lacks AVX-512 F, BW, VL or DQ");
  }
  if (!has_avx512 || instruction_set == "avx2") {
    return CpuKernels{kAvx2Kernels, kAvx2Integers, kAvx2IntegerAttention, kAvx2BFloat16s};
  }
  return CpuKernels{kAvx512Kernels, BestAvx512Integers(),
                    __builtin_cpu_supports("avx512vnni") ? kAvx512VnniIntegerAttention : kAvx2IntegerAttention,
                    __builtin_cpu_supports("avx512bf16") ? kAvx512Bf16BFloat16s : kAvx512BFloat16s};
}

absl::StatusOr<std::unique_ptr<Backend>> CreateCpuBackend(const CpuOptions& options) {
  constexpr int kMaxThreads = 1024;
  if (options.threads < 0 || options.threads > kMaxThreads) {
    return absl::InvalidArgumentError(absl::StrCat("threads=", options.threads, " is not in [0, ", kMaxThreads, "]"));
  }
  RW_ASSIGN_OR_RETURN(const CpuKernels kernels, FindCpuKernels(options.instruction_set));
  const int threads = options.threads > 0 ? options.threads : ThreadTeam::AllowedCpuCount();
  return std::make_unique<CpuBackend>(kernels, options, threads);
}

CpuBackend::CpuBackend(const CpuKernels& kernels, const CpuOptions& options, int threads)
    : isa_(kernels.floats),
      integers_(kernels.integers),
      integer_attention_(kernels.integer_attention),
      bfloat16s_(kernels.bfloat16s),
      activations_(options.activations),
      team_(threads, options.pin_threads) {}

std::string CpuBackend::Description() const {
  return absl::StrCat("cpu ", isa_.name, ", ", team_.size(), team_.size() == 1 ? " thread" : " threads",
                      !has_own_activations_                ? ""
                      : activations_ == Activations::kInt8 ? absl::StrCat(", integers by ", integers_.name)
                                                           : absl::StrCat(", bf16 by ", bfloat16s_.name));
}

absl::StatusOr<Backend::Floats> CpuBackend::Allocate(int64_t count) {
  RW_ASSIGN_OR_RETURN(Memory memory, AllocateMemory(count * static_cast<int64_t>(sizeof(float))));
  auto* floats = reinterpret_cast<float*>(memory.release());
  std::fill_n(floats, count, 0.0f);
  return Floats(floats, [](float* p) { MemoryDeleter()(reinterpret_cast<std::byte*>(p)); });
}

absl::Status CpuBackend::CopyToHost(const float* device, std::span<float> host) {
  std::copy_n(device, host.size(), host.data());
  return absl::OkStatus();
}

absl::Status CpuBackend::CopyToDevice(std::span<const float> host, float* device) {
  std::copy_n(host.data(), host.size(), device);
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<PackedMatrix>> CpuBackend::Pack(std::span<const MatrixView> blocks,
                                                               const SumTree& tree) {
  RW_ASSIGN_OR_RETURN(std::unique_ptr<CpuMatrix> matrix,
                      CpuMatrix::Create(blocks, tree, activations_, bfloat16s_, team_));
  has_own_activations_ |= matrix->activations() != Activations::kFloat;
  matmul_scratch_.Reserve(team_.size() * kMatMulScratch);
  tiled_rows_.Reserve(kMatMulRowBlock * TiledFloatsPerRow(*matrix));
  return matrix;
}

absl::StatusOr<std::unique_ptr<KvPool>> CpuBackend::CreateKvPool(const KvShape& shape, int32_t block_count) {
  RW_ASSIGN_OR_RETURN(std::unique_ptr<CpuKvPool> pool, CpuKvPool::Create(shape, block_count, team_));
  return pool;
}

absl::Status CpuBackend::SetKvScales(KvPool& pool, std::span<const KvChannelScales> scales) {
  RW_RETURN_IF_ERROR(CheckKvScales(pool.shape(), scales));
  static_cast<CpuKvPool&>(pool).set_scales(scales);
  return absl::OkStatus();
}

absl::Status CpuBackend::BeginStep(const StepRows& rows) {
  step_.Build(rows);
  return absl::OkStatus();
}

template <typename Body>
void CpuBackend::ForRows(int64_t width, Body&& body) {
  const int64_t rows = step_.row_count();
  if (rows * width < kWorthATeam) {
    for (int64_t row = 0; row < rows; ++row) body(row);
  } else {
    team_.For(rows, [&](int64_t row, int) { body(row); });
  }
}

absl::Status CpuBackend::Embed(const EmbeddingTable& table, float* x) {
  RW_RETURN_IF_ERROR(CheckTokens(step_.rows().tokens, table));
  const auto widen = isa_.widen[static_cast<int>(table.dtype)];
  ForRows(table.cols, [&](int64_t row) {
    const int64_t offset = step_.rows().tokens[row] * table.row_stride * DTypeBytes(table.dtype);
    widen(x + row * table.cols, table.data + offset, table.cols);
  });
  return absl::OkStatus();
}

absl::Status CpuBackend::RmsNorm(float* out, const float* x, const float* weight, int64_t width, float eps) {
  ForRows(width, [&](int64_t row) { isa_.rms_norm(out + row * width, x + row * width, weight, width, eps); });
  return absl::OkStatus();
}

absl::Status CpuBackend::AddRmsNorm(float* out, float* x, const float* delta, const float* bias, const float* weight,
                                    int64_t width, float eps) {
  ForRows(width, [&](int64_t row) {
    isa_.add(x + row * width, delta + row * width, bias, width);
    isa_.rms_norm(out + row * width, x + row * width, weight, width, eps);
  });
  return absl::OkStatus();
}

absl::Status CpuBackend::Add(float* x, const float* delta, const float* bias, int64_t width) {
  ForRows(width, [&](int64_t row) { isa_.add(x + row * width, delta + row * width, bias, width); });
  return absl::OkStatus();
}

absl::Status CpuBackend::SiluMul(float* out, const float* gate_up, int64_t width) {
  // An exponential and a division cost about as much as eight additions.
  ForRows(width * 8, [&](int64_t row) {
    const float* gate = gate_up + row * 2 * width;
    isa_.silu_mul(out + row * width, gate, gate + width, width);
  });
  return absl::OkStatus();
}

absl::Status CpuBackend::PickRows(float* out, const float* x, std::span<const int32_t> picked, int64_t width) {
  for (int32_t row : picked) {
    RW_CHECK(row >= 0 && row < step_.row_count(), absl::StrCat("picked row ", row));
    out = std::copy_n(x + row * width, width, out);
  }
  return absl::OkStatus();
}

absl::Status CpuBackend::Draw(std::span<int32_t> ids, const float* logits, std::span<const DrawRule> rules,
                              int32_t vocab_size) {
  if (draws_.empty() || draws_[0].vocab_size() != vocab_size) draws_.assign(team_.size(), TokenDraw(vocab_size));
  team_.For(std::ssize(rules), [&](int64_t i, int thread) {
    ids[i] = draws_[thread].Draw({logits + i * vocab_size, static_cast<size_t>(vocab_size)}, rules[i]);
  });
  return absl::OkStatus();
}

absl::Status CpuBackend::MatMul(float* y, const float* x, int64_t row_count, const PackedMatrix& weights,
                                const float* bias) {
  const auto& w = static_cast<const CpuMatrix&>(weights);
  for (int64_t begin = 0; begin < row_count; begin += kMatMulRowBlock) {
    const auto rows = static_cast<int32_t>(std::min<int64_t>(kMatMulRowBlock, row_count - begin));
    const int tile_rows = w.activations() == Activations::kInt8   ? integers_.tile_rows
                          : w.activations() == Activations::kBF16 ? bfloat16s_.tile_rows
                                                                  : isa_.matmul_tile_rows;
    MatMulTask task{.y = y + begin * w.n_out(),
                    .x = x + begin * w.n_in(),
                    .row_count = rows,
                    .tile_count = (rows + tile_rows - 1) / tile_rows,
                    .weights = w.data(),
                    .panel_bytes = w.panel_bytes(),
                    .n_out = w.n_out(),
                    .n_in = w.n_in(),
                    .boundaries = w.boundaries().data(),
                    .steps = w.steps().data(),
                    .chunk_count = static_cast<int32_t>(w.boundaries().size()) - 1,
                    .bias = bias,
                    .group_size = w.shape().group_size,
                    .group_offset = w.shape().group_offset,
                    .group_bytes = w.group_bytes(),
                    .groups = w.dot_groups().data(),
                    .chunk_groups = w.chunk_groups().data(),
                    .quantized = {}};
    const bool is_small = w.n_out() * w.n_in() * rows < kWorthATeam;
    if (w.activations() == Activations::kInt8) {
      TileIntegers(task, w, is_small);
    } else if (rows > 1 || w.activations() == Activations::kBF16) {
      TileColumns(task, w, is_small);
    }
    MultiplyPanels(task, w, is_small);
  }
  return absl::OkStatus();
}

void CpuBackend::TileColumns(MatMulTask& task, const CpuMatrix& w, bool is_small) {
  const auto tile_rows = w.activations() == Activations::kBF16 ? bfloat16s_.tile_rows_of : isa_.tile_rows;
  float* tiles = tiled_rows_.Reserve(kMatMulRowBlock * TiledFloatsPerRow(w));
  constexpr int64_t kPiece = 256;
  const int64_t steps = w.steps().back();
  // A row alone is done before the team has woken.
  const int64_t piece = is_small || task.row_count == 1 ? steps : kPiece;
  team_.For((steps + piece - 1) / piece,
            [&](int64_t i, int) { tile_rows(tiles, task.x, task, i * piece, std::min((i + 1) * piece, steps)); });
  task.x = tiles;
}

void CpuBackend::TileIntegers(MatMulTask& task, const CpuMatrix& w, bool is_small) {
  const int64_t groups = std::ssize(w.dot_groups()), words = 2 * w.pairs_per_row();
  float* tiles = tiled_rows_.Reserve(kMatMulRowBlock * TiledFloatsPerRow(w));
  task.quantized = {.words = reinterpret_cast<uint32_t*>(tiles),
                    .scales = tiles + task.row_count * words,
                    .sums = reinterpret_cast<uint32_t*>(tiles + task.row_count * (words + groups)),
                    .pair_count = static_cast<int32_t>(w.pairs_per_row()),
                    .group_count = static_cast<int32_t>(groups)};
  constexpr int64_t kPiece = 2;  // as many columns as TileColumns takes
  // A row alone is done before the team has woken.
  const int64_t piece = is_small || task.row_count == 1 ? groups : kPiece;
  team_.For((groups + piece - 1) / piece, [&](int64_t i, int) {
    integers_.quantize_rows(task, task.x, i * piece, std::min((i + 1) * piece, groups));
  });
}

void CpuBackend::MultiplyPanels(const MatMulTask& task, const CpuMatrix& w, bool is_small) {
  const auto multiply = w.activations() == Activations::kInt8   ? integers_.matmul_panel[w.dtype() == DType::kInt8]
                        : w.activations() == Activations::kBF16 ? bfloat16s_.matmul_panel
                                                                : isa_.matmul_panel[static_cast<int>(w.dtype())];
  float* scratch = matmul_scratch_.Reserve(team_.size() * kMatMulScratch);
  if (is_small) {
    for (int64_t panel = 0; panel < w.panel_count(); ++panel) multiply(task, panel, scratch);
  } else {
    team_.For(w.panel_count(),
              [&](int64_t panel, int thread) { multiply(task, panel, scratch + thread * kMatMulScratch); });
  }
}

}  // namespace rankwise::kernels
