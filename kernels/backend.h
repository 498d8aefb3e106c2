#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/draw_weights.h"

// The math of one rank on one device. Activations are f32 [rows, width], row-major, in memory of the backend; a row is
// one token position of one request in a step.
//
// Invariance: every output row of every op is computed in an order that depends on that row alone, never on the number
// of rows, the other rows or the number of threads. On the CPU the instruction set does not matter either: AVX2 and
// AVX-512 paths do the same operations in the same order. Tests hold all of this to `==`.
//
// Threads: one thread calls a Backend; the backend spreads the work over its own team. No op allocates.
namespace rankwise::kernels {

// kInt4 and kInt8 are quantised in groups and appear only in matrices that are packed.
enum class DType : uint8_t { kF32, kF16, kBF16, kInt4, kInt8 };
inline constexpr int kDTypeCount = 5;
constexpr bool IsGrouped(DType dtype) { return dtype == DType::kInt4 || dtype == DType::kInt8; }
int64_t DTypeBytes(DType dtype);  // not of a grouped one
const char* DTypeName(DType dtype);

// A quantised matrix W [n_out, n_in] as AWQ checkpoints hold it, transposed and in words of 32 bits, little-endian:
//   qweight [n_in, n_out * bits / 32], qzeros [n_in / group_size, n_out * bits / 32], scales f16 [n_in / group_size,
//   n_out] W[o][i] = (q[i][o] - zero[i / group_size][o]) * scale[i / group_size][o]
// A word of four-bit values holds eight outputs in the order 0 2 4 6 1 3 5 7 from its lowest bits on; of eight-bit
// values four in their order. The product of the difference and an f16 is exact in f32, so that a quantised matrix
// multiplies to the same bits as its f32 equal.
struct GroupedMatrix {
  const std::byte *qweight = nullptr, *qzeros = nullptr, *scales = nullptr;
  int64_t n_out = 0, n_in = 0;
  int32_t bits = 4;
  int32_t group_size = 128;
};

// A borrowed matrix [rows, cols] in host memory, e.g. a slice of a mapped checkpoint: row r starts at data + r *
// row_stride elements. `data` need not be aligned to its dtype.
struct MatrixView {
  const std::byte* data = nullptr;
  DType dtype = DType::kF32;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t row_stride = 0;
  // Of kInt4 and kInt8, instead of data and row_stride: element [0][0] is W[row_begin][col_begin] of `grouped`.
  const GroupedMatrix* grouped = nullptr;
  int64_t row_begin = 0, col_begin = 0;
};

// Rows and columns [begin, end) of a view.
MatrixView RowsOf(const MatrixView& view, int64_t begin, int64_t end);
MatrixView ColumnsOf(const MatrixView& view, int64_t begin, int64_t end);

// How a product over the input dimension is added up. The input columns are cut into `boundaries.size() - 1` chunks,
// chunk c being [boundaries[c], boundaries[c + 1]); each output is one sequential fma chain per chunk, in f32 from 0,
// and the chunk sums are added pairwise in a balanced binary tree: ((c0 + c1) + (c2 + c3)) + ... The count is a power
// of two. Column-parallel products use one chunk. Row-parallel ones (wo, w2) use the same chunks whatever the TP
// degree, so that a rank sums whole subtrees and the all-reduce finishes the tree with the same bits. The CUDA backend
// adds in an order of its own (kernels/cuda/matmul.cu), within the same bound: on it TP degrees differ in their last
// bits.
struct SumTree {
  std::vector<int64_t> boundaries;
};

// What inputs of matrices are multiplied as. kFloat: f32, exact products. kInt8, of quantised weights: quantised
// themselves, row by row in groups of at most 128 columns that no chunk and no group of weights share
// (kernels/activation_groups.h). kBF16, of f16 and bf16 weights: rounded to bf16, half to even, as f16 weights are when
// they are packed; the chains are those of kFloat, on the CPU with denormals taken for zeros at each fma. Both are
// faster and less exact, and within their arithmetic as invariant as kFloat, which other matrices keep; but kBF16
// refuses quantised ones. The CUDA backend has no kInt8.
enum class Activations : uint8_t { kFloat, kInt8, kBF16 };
const char* ActivationsName(Activations activations);
// For flags; those of what a device multiplies with by itself, too (device::DeviceOptions), have "auto" for none.
std::map<std::string, Activations> ActivationsByName();
inline constexpr char kAutoActivations[] = "auto";
std::vector<std::string> ActivationsFlags();
std::optional<Activations> ActivationsOfFlag(const std::string& flag);  // one of ActivationsFlags
inline constexpr char kActivationsHelp[] =
    "What weights are multiplied with: float; or int8, of quantised weights and on the CPU alone, or bf16, of f16 and "
    "bf16 weights, which are faster in prefill and batches and less exact. bf16 makes bf16 of f16 weights, too: 8 bits "
    "of their 11. auto: int8 of quantised weights on the CPU, else float";

// Weights [n_out, n_in] packed once for a backend. Owned by the caller, destroyed before the backend.
class PackedMatrix {
 public:
  virtual ~PackedMatrix() = default;
  virtual int64_t n_out() const = 0;
  virtual int64_t n_in() const = 0;
  virtual int64_t bytes() const = 0;  // read once per matmul of few rows
  // What its inputs are multiplied as: kFloat, too, where the backend's activations are not of such weights.
  virtual Activations activations() const { return Activations::kFloat; }
};

// One row-major table [vocab, hidden] whose rows are looked up where they lie (borrowed for the backend's life).
using EmbeddingTable = MatrixView;

// kInt8 is static: its parameters are given once, per channel. The online formats choose a range for every token, KV
// head and tensor from the values themselves and keep it beside them as two f16, so that they need no calibration:
//   zero = round_down_f16(min), scale = round_up_f16((max - zero) / levels), levels = 255 or 15
//   q = round_half_even((x - zero) / scale) in [0, levels], x ≈ q * scale + zero
// Values beyond the largest f16 are clamped before the range is taken; NaN is stored as q = 0.
enum class KvFormat : uint8_t { kF32, kF16, kInt8, kInt8Online, kInt4Online };
inline constexpr int kKvFormatCount = 5;
inline constexpr int kLargestHeadDim = 1024;
constexpr bool IsOnline(KvFormat format) { return format == KvFormat::kInt8Online || format == KvFormat::kInt4Online; }
struct OnlineRange {
  uint16_t scale, zero;  // f16
};
constexpr float OnlineLevels(KvFormat format) { return format == KvFormat::kInt4Online ? 15.0f : 255.0f; }
// Bytes of one token of one KV head of K, or of V, before any padding of a backend.
int64_t KvVectorBytes(KvFormat format, int64_t head_dim);

// Tokens in one block of the paged cache: one AVX-512 register of f32, so that a block's scores need no horizontal sum.
inline constexpr int kKvBlockTokens = 16;

// What one rank keeps per token: n_layers × n_kv_heads_local × head_dim of K and of V.
struct KvShape {
  int n_layers = 0;
  int n_kv_heads_local = 0;
  int head_dim = 0;
  KvFormat format = KvFormat::kF16;
};

// Of one channel of a KV head: x ≈ q * scale + zero_point, q = round_half_even((x - zero_point) / scale) in [-128,
// 127], saturating, in f32. K's scale is multiplied into q before the scores and its zero point adds the same to all
// scores of a row, which softmax cancels; V's are applied to the finished sum. So channels of their own cost attention
// nothing.
struct KvChannelScales {
  float k_scale = 1, k_zero_point = 0, v_scale = 1, v_zero_point = 0;
};

// Running statistics of what is appended, owned by the caller. K is seen after bias, norm and RoPE.
struct KvObservation {
  std::vector<float> k_min, k_max, v_min, v_max;   // [n_kv_heads_local, head_dim]
  std::vector<uint64_t> k_histogram, v_histogram;  // [n_kv_heads_local, kHistogramBins] of kernels/kv_histogram.h
};

// The paged cache of one rank: `block_count` blocks, each of kKvBlockTokens tokens for all layers. The layout inside is
// the backend's own. Owned by the caller, destroyed before the backend.
class KvPool {
 public:
  virtual ~KvPool() = default;
  virtual const KvShape& shape() const = 0;
  virtual int32_t block_count() const = 0;
  virtual int64_t bytes() const = 0;
  // Values that fell outside a static int8 range (NaN among them, stored as q = 0) or, in the other formats below f32,
  // beyond the largest f16 (with NaN in the online ones), since the start, per layer: K and V together. They are stored
  // clamped.
  virtual std::vector<int64_t> SaturatedCounts() const = 0;
  // The bytes of one block and layer in a canonical order, for tests: K [heads, tokens, dim], then V likewise, one byte
  // per int4; online formats then have {scale, zero} as f16 [K and V, heads, tokens].
  virtual std::vector<std::byte> BlockBytes(int layer, int32_t block) const = 0;
};

// Tokens that a device draws and can look up in its next step before the host has them. Owned by the caller, destroyed
// before the backend.
class DrawnTokens {
 public:
  virtual ~DrawnTokens() = default;
  // Their bits, for a communicator to move: [capacity], in memory of the device.
  virtual std::span<float> bits() = 0;
  // Draws as Backend::Draw does into places [first, first + rules.size()), and returns when that is issued.
  virtual absl::Status Draw(int64_t first, const float* logits, std::span<const DrawRule> rules,
                            int32_t vocab_size) = 0;
  // Lets the first `count` come to the host, behind all that the backend was given so far.
  virtual absl::Status Send(int64_t count) = 0;
  // Whether all that was sent last is there, or nothing ever was.
  virtual absl::StatusOr<bool> HasCome() = 0;
  // Waits for what was sent last, once; valid until the next Send.
  virtual absl::StatusOr<std::span<const int32_t>> Take() = 0;
};

struct RopeTable;

// The rows of one step. Segment s covers rows [row_begin[s], row_begin[s + 1]) which are consecutive positions
// first_position[s], first_position[s] + 1, ... of one request, whose position p lives in block
// block_table[s][p / kKvBlockTokens] at slot p % kKvBlockTokens. Borrowed until the step's last op.
struct StepRows {
  std::span<const int32_t> tokens;                        // [rows]; with `drawn` their places in it
  std::span<const int32_t> row_begin;                     // [segments + 1]
  std::span<const int32_t> first_position;                // [segments]
  std::span<const std::span<const int32_t>> block_table;  // [segments]
  DrawnTokens* drawn = nullptr;  // whose tokens the step is of; then Embed needs a table that was kept
  // What the step's ops will ask for, so that a device gets it with the rest; each op sends its own where it is not
  // said.
  const RopeTable* rope = nullptr;
  int32_t query_group = 0;          // query heads of a KV head
  std::span<const int32_t> picked;  // PickRows is called with pieces of it
  std::span<const DrawRule> rules;  // and Draw with pieces of these
  int32_t row_count() const { return static_cast<int32_t>(tokens.size()); }
  int32_t segment_count() const { return static_cast<int32_t>(first_position.size()); }
};

// Rotation angles: cos and sin of position * frequency[i], i < rotary_dim / 2, computed once for all positions in
// double and rounded to f32. The rotate-half convention of Hugging Face: dimension i pairs with i + rotary_dim / 2.
struct RopeTable {
  int rotary_dim = 0;
  int64_t position_count = 0;
  std::vector<float> cos, sin;  // [position_count, rotary_dim / 2]
};

struct AttentionShape {
  int n_heads_local = 0;
  int n_kv_heads_local = 0;
  int head_dim = 0;
  float score_scale = 0;       // usually 1 / sqrt(head_dim)
  int32_t sliding_window = 0;  // a position attends itself and the sliding_window - 1 before it; 0: all before it
};

// Owned by the caller, destroyed before the backend.
class Repeated {
 public:
  virtual ~Repeated() = default;
  virtual absl::Status Run() = 0;
};

class Backend {
 public:
  virtual ~Backend() = default;

  // "cpu avx512, 2 threads", and how matrices packed so far are multiplied if not with floats.
  virtual std::string Description() const = 0;
  // Rows of one step beyond which a row becomes no cheaper: more would only delay everyone's next token.
  virtual int32_t step_rows() const { return 512; }

  // Device memory for `count` f32, aligned to 64 bytes, zeroed; freed by the deleter. Taken at start, never in a step.
  using Floats = std::unique_ptr<float[], void (*)(float*)>;
  virtual absl::StatusOr<Floats> Allocate(int64_t count) = 0;
  virtual absl::Status CopyToHost(const float* device, std::span<float> host) = 0;
  virtual absl::Status CopyToDevice(std::span<const float> host, float* device) = 0;

  // Stacks `blocks` (each [rows_i, n_in], any dtypes) into one packed [Σ rows_i, n_in]. The packed dtype is the blocks'
  // own where they all have the same one (and, quantised, the same groups), else f32.
  virtual absl::StatusOr<std::unique_ptr<PackedMatrix>> Pack(std::span<const MatrixView> blocks,
                                                             const SumTree& tree) = 0;

  // Memory of one block for all layers, K and V, as a pool of this backend lays it out: padding included.
  virtual int64_t KvBlockBytes(const KvShape& shape) const = 0;
  virtual absl::StatusOr<std::unique_ptr<KvPool>> CreateKvPool(const KvShape& shape, int32_t block_count) = 0;
  // scales [n_layers, n_kv_heads_local, head_dim]. Requires an int8 pool; call before the first append.
  virtual absl::Status SetKvScales(KvPool& pool, std::span<const KvChannelScales> scales) = 0;

  // Null where the host is needed to look tokens up, as on the CPU.
  virtual absl::StatusOr<std::unique_ptr<DrawnTokens>> CreateDrawnTokens(int64_t /*capacity*/) { return nullptr; }

  // Makes `rows` the current step. The ops below work on its rows; row counts are implied.
  virtual absl::Status BeginStep(const StepRows& rows) = 0;

  // For profilers: the ops that follow are of this layer; of none, and then of no step.
  virtual void EnterLayer(int /*layer*/) {}
  virtual void LeaveLayers() {}
  virtual void EndStep() {}

  // Ops that come again in every step. `issue` issues them for the current step; where Run did so for as many rows
  // before, it may do the same again without asking. So `issue` must issue the same ops with the same arguments for as
  // many rows, and nothing that waits.
  virtual std::unique_ptr<Repeated> Repeat(std::function<absl::Status()> issue);

  // `table` will be looked up in many steps: a device may keep a copy in its own memory.
  virtual absl::Status KeepTable(const EmbeddingTable& /*table*/) { return absl::OkStatus(); }
  // x [rows, hidden] = table[tokens]. InvalidArgument names a token outside the table.
  virtual absl::Status Embed(const EmbeddingTable& table, float* x) = 0;

  // out [rows, width] = x / sqrt(mean(x²) + eps) * weight. `out` may be `x`.
  virtual absl::Status RmsNorm(float* out, const float* x, const float* weight, int64_t width, float eps) = 0;
  // x += delta + bias (bias [width] may be null), then out = RmsNorm(x).
  virtual absl::Status AddRmsNorm(float* out, float* x, const float* delta, const float* bias, const float* weight,
                                  int64_t width, float eps) = 0;
  // x += delta + bias.
  virtual absl::Status Add(float* x, const float* delta, const float* bias, int64_t width) = 0;

  // y [row_count, n_out] = x [row_count, n_in] · Wᵀ + bias (bias [n_out] may be null).
  virtual absl::Status MatMul(float* y, const float* x, int64_t row_count, const PackedMatrix& weights,
                              const float* bias) = 0;

  // qkv [rows, (n_heads + 2 n_kv_heads) * head_dim] = [Q | K | V]. Normalises each q and k head (q_norm, k_norm
  // [head_dim] may be null), rotates q and k by the row's position, writes q back in place, and appends K and V to
  // `layer` of the pool in its format. `observation` may be null.
  virtual absl::Status RopeAppend(float* qkv, const AttentionShape& shape, const RopeTable& rope, const float* q_norm,
                                  const float* k_norm, float norm_eps, KvPool& pool, int layer,
                                  KvObservation* observation) = 0;

  // out [rows, n_heads * head_dim]: softmax(q · Kᵀ * score_scale) · V over the row's window, K and V read from the pool
  // in their stored form. q is the Q part of `qkv` after RopeAppend.
  virtual absl::Status Attention(float* out, const float* qkv, const AttentionShape& shape, const KvPool& pool,
                                 int layer) = 0;

  // out [rows, width] = silu(gate) * up, where gate_up [rows, 2 * width] = [gate | up].
  virtual absl::Status SiluMul(float* out, const float* gate_up, int64_t width) = 0;

  // out [picked.size(), width] = x[picked[i]]. Later ops on `out` pass its row count themselves (MatMul).
  virtual absl::Status PickRows(float* out, const float* x, std::span<const int32_t> picked, int64_t width) = 0;

  // ids[i] = the token that rules[i] draws from row i of logits [rules.size(), vocab_size]: TokenDraw's
  // (kernels/token_draw.h), on every backend. Waits for them.
  virtual absl::Status Draw(std::span<int32_t> ids, const float* logits, std::span<const DrawRule> rules,
                            int32_t vocab_size) = 0;
};

struct CpuOptions {
  int threads = 0;              // 0: the CPUs this process may run on
  bool pin_threads = true;      // thread i to the i-th allowed CPU
  std::string instruction_set;  // "" the best this CPU has; "avx2", "avx512"
  Activations activations = Activations::kFloat;
};
absl::StatusOr<std::unique_ptr<Backend>> CreateCpuBackend(const CpuOptions& options);
// Scalar, double inside, one obvious loop per op: what the others are tested against.
std::unique_ptr<Backend> CreateReferenceBackend(Activations activations = Activations::kFloat);

}  // namespace rankwise::kernels
