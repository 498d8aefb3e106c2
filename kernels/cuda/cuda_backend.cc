#include "kernels/cuda/cuda_backend.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <bit>
#include <compare>
#include <cstring>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "kernels/cuda/cuda_kv_pool.h"
#include "kernels/cuda/cuda_matrix.h"
#include "kernels/cuda/cuda_memory.h"
#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/kv_layout.h"
#include "kernels/cuda/profiler_range.h"
#include "kernels/kv_histogram.h"
#include "kernels/preconditions.h"

namespace rankwise::kernels {
namespace {

// Attention gives each split of the context a block of its own where tiles alone are fewer than this for each
// multiprocessor, and where the states fit into this many floats.
constexpr int64_t kTilesPerMultiprocessor = 2;
constexpr int64_t kMostPartials = int64_t{16} << 20;

// Steps beyond so many rows compute longer than they take to issue, and come in too many shapes.
constexpr int32_t kMostRecordedRows = 64;
constexpr size_t kMostRecordings = 128;

int64_t RoundUpTo8(int64_t bytes) { return (bytes + 7) / 8 * 8; }

// All that the launches of a step depend on beside the numbers in device memory.
struct StepShape {
  int64_t row_count, tile_count, split_bound;
  auto operator<=>(const StepShape&) const = default;
};

class CudaBackend : public Backend {
 public:
  CudaBackend(const CudaOptions& options, const cudaDeviceProp& properties, Stream stream)
      : device_(options.device),
        records_steps_(options.records_steps),
        looks_up_drawn_(options.looks_up_drawn),
        activations_(options.activations),
        multiprocessors_(properties.multiProcessorCount),
        description_(absl::StrCat("cuda ", options.device, ": ", properties.name, ", sm_", properties.major,
                                  properties.minor, ", ", properties.multiProcessorCount, " multiprocessors",
                                  activations_ == Activations::kBF16 ? ", bf16 by tensor cores" : "")),
        stream_(std::move(stream)),
        team_(ThreadTeam::AllowedCpuCount(), /*pin_threads=*/false) {}
  ~CudaBackend() override { cudaSetDevice(device_); }

  std::string Description() const override { return description_; }
  cudaStream_t stream() const { return stream_.get(); }

  absl::StatusOr<Floats> Allocate(int64_t count) override {
    RW_RETURN_IF_ERROR(Use());
    RW_ASSIGN_OR_RETURN(DeviceMemory memory, AllocateZeroed(count * static_cast<int64_t>(sizeof(float)), stream()));
    return Floats(reinterpret_cast<float*>(memory.release()),
                  [](float* p) { DeviceFree()(reinterpret_cast<std::byte*>(p)); });
  }
  absl::Status CopyToHost(const float* device, std::span<float> host) override {
    RW_RETURN_IF_ERROR(Use());
    RW_CUDA(cudaMemcpyAsync(host.data(), device, host.size_bytes(), cudaMemcpyDeviceToHost, stream()));
    RW_CUDA(cudaStreamSynchronize(stream()));
    return absl::OkStatus();
  }
  absl::Status CopyToDevice(std::span<const float> host, float* device) override {
    RW_RETURN_IF_ERROR(Use());
    RW_CUDA(cudaMemcpyAsync(device, host.data(), host.size_bytes(), cudaMemcpyHostToDevice, stream()));
    RW_CUDA(cudaStreamSynchronize(stream()));
    return absl::OkStatus();
  }

  absl::StatusOr<std::unique_ptr<PackedMatrix>> Pack(std::span<const MatrixView> blocks, const SumTree& tree) override {
    RW_RETURN_IF_ERROR(Use());
    return CudaMatrix::Create(blocks, tree, activations_, team_, stream());
  }
  int64_t KvBlockBytes(const KvShape& shape) const override {
    return int64_t{shape.n_layers} * shape.n_kv_heads_local *
           cuda::KvBlockBytes(static_cast<cuda::KvElement>(shape.format), shape.head_dim);
  }
  absl::StatusOr<std::unique_ptr<KvPool>> CreateKvPool(const KvShape& shape, int32_t block_count) override {
    RW_RETURN_IF_ERROR(Use());
    return CudaKvPool::Create(shape, block_count, stream());
  }
  absl::Status SetKvScales(KvPool& pool, std::span<const KvChannelScales> scales) override {
    RW_RETURN_IF_ERROR(Use());
    RW_RETURN_IF_ERROR(CheckKvScales(pool.shape(), scales));
    return static_cast<CudaKvPool&>(pool).SetScales(scales);
  }

  absl::StatusOr<std::unique_ptr<DrawnTokens>> CreateDrawnTokens(int64_t capacity) override;
  absl::Status BeginStep(const StepRows& rows) override;
  void EnterLayer(int layer) override {
    layer_range_.reset();
    layer_range_.emplace(absl::StrCat("layer ", layer).c_str());
  }
  void LeaveLayers() override { layer_range_.reset(); }
  void EndStep() override {
    layer_range_.reset();
    step_range_.reset();
  }
  std::unique_ptr<Repeated> Repeat(std::function<absl::Status()> issue) override;

  absl::Status KeepTable(const EmbeddingTable& table) override;
  absl::Status Embed(const EmbeddingTable& table, float* x) override;
  absl::Status RmsNorm(float* out, const float* x, const float* weight, int64_t width, float eps) override {
    // Without delta x is only read.
    return Norm({.out = out, .x = const_cast<float*>(x), .weight = weight, .width = width, .eps = eps});
  }
  absl::Status AddRmsNorm(float* out, float* x, const float* delta, const float* bias, const float* weight,
                          int64_t width, float eps) override {
    return Norm({.out = out, .x = x, .delta = delta, .bias = bias, .weight = weight, .width = width, .eps = eps});
  }
  absl::Status Add(float* x, const float* delta, const float* bias, int64_t width) override {
    return Norm({.x = x, .delta = delta, .bias = bias, .width = width});
  }
  absl::Status MatMul(float* y, const float* x, int64_t row_count, const PackedMatrix& weights,
                      const float* bias) override;
  absl::Status RopeAppend(float* qkv, const AttentionShape& shape, const RopeTable& rope, const float* q_norm,
                          const float* k_norm, float norm_eps, KvPool& pool, int layer,
                          KvObservation* observation) override;
  absl::Status Attention(float* out, const float* qkv, const AttentionShape& shape, const KvPool& pool,
                         int layer) override;
  absl::Status SiluMul(float* out, const float* gate_up, int64_t width) override {
    const ProfilerRange range("SiluMul");
    RW_RETURN_IF_ERROR(Use());
    return CudaStatus(cuda::SiluMul(out, gate_up, step_.row_count(), width, stream()), "SiluMul");
  }
  absl::Status PickRows(float* out, const float* x, std::span<const int32_t> picked, int64_t width) override;
  absl::Status Draw(std::span<int32_t> ids, const float* logits, std::span<const DrawRule> rules,
                    int32_t vocab_size) override;

 private:
  class Recorded;
  class Drawn;

  // Of the current step; null where it is not to be recorded.
  std::optional<StepShape> RecordableShape() const;
  // Ops may come from any thread, and CUDA's current device is each thread's own.
  absl::Status Use() const { return CudaStatus(cudaSetDevice(device_), "cudaSetDevice"); }
  absl::Status Norm(cuda::NormTask task) {
    const char* name = task.weight ? "RmsNorm" : "Add";
    const ProfilerRange range(name);
    RW_RETURN_IF_ERROR(Use());
    task.row_count = step_.row_count();
    return CudaStatus(cuda::AddAndNorm(task, stream()), name);
  }
  // Of the step's rows: cos [rows, half], then sin.
  void WriteAngles(const RopeTable& rope, float* to) const;
  void CheckAngles(const RopeTable& rope) const;
  void BuildTiles(int group);
  void CheckPicked(std::span<const int32_t> picked) const;
  // Where `values` lie on the device: in the plan, if they are a piece of what came with it, else sent alone.
  template <typename T>
  absl::StatusOr<const T*> OnDevice(std::span<const T> values, std::span<const T> of_plan, const T* plan_on_device,
                                    Staging& alone) {
    if (values.data() >= of_plan.data() && values.data() + values.size() <= of_plan.data() + of_plan.size()) {
      return plan_on_device + (values.data() - of_plan.data());
    }
    const auto bytes = static_cast<int64_t>(values.size_bytes());
    RW_ASSIGN_OR_RETURN(std::byte * memory, alone.Reserve(bytes));
    std::memcpy(memory, values.data(), bytes);
    RW_RETURN_IF_ERROR(alone.Send(bytes, stream()));
    return reinterpret_cast<const T*>(alone.device());
  }
  absl::Status SendAngles(const RopeTable& rope);
  absl::Status SendTiles(int group);
  // At least as many splits as any tile's windows reach into, and the same number for steps of one shape.
  int64_t SplitBound(int32_t sliding_window) const;
  absl::Status IssueDraw(int32_t* ids, const float* logits, std::span<const DrawRule> rules, int32_t vocab_size);
  absl::Status Observe(const float* qkv, const AttentionShape& shape, KvObservation& observation);

  const int device_;
  const bool records_steps_, looks_up_drawn_;
  const Activations activations_;
  const int64_t multiprocessors_;
  const std::string description_;
  const Stream stream_;
  ThreadTeam team_;  // packs
  StepIndex step_;

  // Of the step, in one copy: tiles, angles, position [rows], block [rows], block tables, rules, tokens [rows], picked
  // rows. Where an op asks for others than the step said, these come alone.
  Staging plan_, other_tiles_, other_angles_, other_rows_, other_picked_, other_rules_;
  const cuda::AttentionTile* tiles_on_device_ = nullptr;
  const float* angles_on_device_ = nullptr;
  const int32_t *position_on_device_ = nullptr, *block_on_device_ = nullptr, *tables_on_device_ = nullptr;
  const DrawRule* rules_on_device_ = nullptr;
  const int32_t *tokens_on_device_ = nullptr, *picked_on_device_ = nullptr;
  const RopeTable* angles_of_ = nullptr;  // whose angles are there
  int tiles_of_ = 0;                      // the group whose tiles are there
  std::vector<cuda::AttentionTile> tiles_;
  std::vector<int32_t> table_begin_;  // [segments], in the plan's tables
  int64_t split_bound_ = 0;

  int64_t moves_ = 0;  // of memory that launches name

  int64_t step_count_ = 0;
  std::optional<ProfilerRange> step_range_, layer_range_;

  const std::byte* kept_table_ = nullptr;  // where it lies on the host
  DeviceMemory kept_rows_;
  ReadBack drawn_;
  DeviceMemory weights_;  // of Draw
  int64_t weights_capacity_ = 0;
  DeviceMemory partials_;
  int64_t partials_capacity_ = 0;
  std::vector<float> observed_;  // host: qkv
};

void CudaBackend::WriteAngles(const RopeTable& rope, float* to) const {
  const int64_t half = rope.rotary_dim / 2;
  for (const auto* table : {&rope.cos, &rope.sin}) {
    for (int64_t row = 0; row < step_.row_count(); ++row) {
      to = std::copy_n(table->data() + step_.position(row) * half, half, to);
    }
  }
}

void CudaBackend::CheckPicked(std::span<const int32_t> picked) const {
  for (const int32_t row : picked) RW_CHECK(row >= 0 && row < step_.row_count(), absl::StrCat("picked row ", row));
}

void CudaBackend::BuildTiles(int group) {
  tiles_.clear();
  const StepRows& rows = step_.rows();
  int32_t last = 0;
  for (int32_t s = 0; s < rows.segment_count(); ++s) {
    const int32_t count = rows.row_begin[s + 1] - rows.row_begin[s], vectors = count * group;
    last = std::max(last, rows.first_position[s] + count - 1);
    for (int32_t v = 0; v < vectors; v += cuda::kTileVectors) {
      tiles_.push_back({.row_begin = rows.row_begin[s],
                        .first_position = rows.first_position[s],
                        .table_begin = table_begin_[s],
                        .vector_begin = v,
                        .vector_count = std::min(cuda::kTileVectors, vectors - v)});
    }
  }
  split_bound_ = static_cast<int64_t>(std::bit_ceil(static_cast<uint32_t>(last / cuda::kSplitTokens + 1)));
}

// What recorded ops read comes first and tables behind that, so that it lies in one place in steps of one shape.
absl::Status CudaBackend::BeginStep(const StepRows& rows) {
  RW_RETURN_IF_ERROR(Use());
  step_.Build(rows);
  EndStep();
  step_range_.emplace(absl::StrCat("step ", ++step_count_, ", ", rows.row_count(), " rows").c_str());
  angles_of_ = rows.rope;
  tiles_of_ = rows.query_group;
  const int64_t count = step_.row_count();
  int64_t table_blocks = 0;
  table_begin_.clear();
  for (const auto& table : rows.block_table) {
    table_begin_.push_back(static_cast<int32_t>(table_blocks));
    table_blocks += static_cast<int64_t>(table.size());
  }
  tiles_.clear();
  if (tiles_of_ > 0) BuildTiles(tiles_of_);
  const int64_t angles_at = static_cast<int64_t>(tiles_.size() * sizeof(cuda::AttentionTile));
  const int64_t angle_count = angles_of_ == nullptr ? 0 : count * (angles_of_->rotary_dim / 2 * 2);
  const int64_t rows_at = angles_at + angle_count * static_cast<int64_t>(sizeof(float));
  const int64_t rules_at = RoundUpTo8(rows_at + (2 * count + table_blocks) * static_cast<int64_t>(sizeof(int32_t)));
  const int64_t tokens_at = rules_at + static_cast<int64_t>(rows.rules.size_bytes());
  const int64_t picked_at = tokens_at + static_cast<int64_t>(rows.tokens.size_bytes());
  const int64_t bytes = picked_at + static_cast<int64_t>(rows.picked.size_bytes());

  const std::byte* before = plan_.device();
  RW_ASSIGN_OR_RETURN(std::byte * memory, plan_.Reserve(bytes));
  if (plan_.device() != before) ++moves_;
  std::ranges::copy(tiles_, reinterpret_cast<cuda::AttentionTile*>(memory));
  if (angles_of_ != nullptr) {
    CheckAngles(*angles_of_);
    WriteAngles(*angles_of_, reinterpret_cast<float*>(memory + angles_at));
  }
  auto* to = reinterpret_cast<int32_t*>(memory + rows_at);
  for (int64_t row = 0; row < count; ++row) {
    to[row] = step_.position(row);
    to[count + row] = step_.block(row);
  }
  to += 2 * count;
  for (const auto& table : rows.block_table) to = std::copy(table.begin(), table.end(), to);
  std::ranges::copy(rows.rules, reinterpret_cast<DrawRule*>(memory + rules_at));
  std::ranges::copy(rows.tokens, reinterpret_cast<int32_t*>(memory + tokens_at));
  CheckPicked(rows.picked);
  std::ranges::copy(rows.picked, reinterpret_cast<int32_t*>(memory + picked_at));
  tiles_on_device_ = reinterpret_cast<const cuda::AttentionTile*>(plan_.device());
  angles_on_device_ = reinterpret_cast<const float*>(plan_.device() + angles_at);
  position_on_device_ = reinterpret_cast<const int32_t*>(plan_.device() + rows_at);
  block_on_device_ = position_on_device_ + count;
  tables_on_device_ = block_on_device_ + count;
  rules_on_device_ = reinterpret_cast<const DrawRule*>(plan_.device() + rules_at);
  tokens_on_device_ = reinterpret_cast<const int32_t*>(plan_.device() + tokens_at);
  picked_on_device_ = reinterpret_cast<const int32_t*>(plan_.device() + picked_at);
  return plan_.Send(bytes, stream());
}

class CudaBackend::Recorded final : public Repeated {
 public:
  Recorded(CudaBackend& backend, std::function<absl::Status()> issue) : backend_(backend), issue_(std::move(issue)) {}

  absl::Status Run() override {
    const std::optional<StepShape> shape = backend_.RecordableShape();
    if (!shape.has_value()) return issue_();
    if (graphs_.size() == kMostRecordings || moves_ != backend_.moves_) graphs_.clear();
    moves_ = backend_.moves_;
    const auto [place, is_new] = graphs_.try_emplace(*shape);
    // The first time, memory grows and kernels are loaded, neither of which can be recorded.
    if (is_new) return issue_();
    RW_RETURN_IF_ERROR(backend_.Use());
    if (place->second == nullptr) {
      RW_ASSIGN_OR_RETURN(place->second, Record());
    }
    RW_CUDA(cudaGraphLaunch(place->second.get(), backend_.stream()));
    return absl::OkStatus();
  }

 private:
  absl::StatusOr<GraphExecutable> Record() const {
    RW_CUDA(cudaStreamBeginCapture(backend_.stream(), cudaStreamCaptureModeThreadLocal));
    const absl::Status issued = issue_();
    cudaGraph_t captured = nullptr;
    const cudaError_t ended = cudaStreamEndCapture(backend_.stream(), &captured);
    const Graph graph(captured);
    RW_RETURN_IF_ERROR(issued);
    RW_RETURN_IF_ERROR(CudaStatus(ended, "cudaStreamEndCapture"));
    cudaGraphExec_t executable = nullptr;
    RW_CUDA(cudaGraphInstantiate(&executable, graph.get(), 0));
    return GraphExecutable(executable);
  }

  CudaBackend& backend_;
  const std::function<absl::Status()> issue_;
  std::map<StepShape, GraphExecutable> graphs_;  // null of a shape that came once
  int64_t moves_ = 0;
};

class CudaBackend::Drawn final : public DrawnTokens {
 public:
  Drawn(CudaBackend& backend, int64_t capacity, DeviceMemory ids, PinnedMemory host, Event sent)
      : backend_(backend), capacity_(capacity), ids_(std::move(ids)), host_(std::move(host)), sent_(std::move(sent)) {}

  std::span<float> bits() override { return {reinterpret_cast<float*>(ids_.get()), static_cast<size_t>(capacity_)}; }
  int64_t capacity() const { return capacity_; }
  const int32_t* ids() const { return reinterpret_cast<const int32_t*>(ids_.get()); }

  absl::Status Draw(int64_t first, const float* logits, std::span<const DrawRule> rules, int32_t vocab_size) override {
    RW_CHECK(first >= 0 && first + std::ssize(rules) <= capacity_);
    return backend_.IssueDraw(reinterpret_cast<int32_t*>(ids_.get()) + first, logits, rules, vocab_size);
  }
  absl::Status Send(int64_t count) override {
    RW_CHECK(count >= 0 && count <= capacity_);
    RW_RETURN_IF_ERROR(backend_.Use());
    if (count > 0) {
      RW_CUDA(
          cudaMemcpyAsync(host_.get(), ids_.get(), count * sizeof(int32_t), cudaMemcpyDeviceToHost, backend_.stream()));
    }
    RW_CUDA(cudaEventRecord(sent_.get(), backend_.stream()));
    sent_count_ = count;
    return absl::OkStatus();
  }
  absl::StatusOr<bool> HasCome() override {
    RW_RETURN_IF_ERROR(backend_.Use());
    const cudaError_t state = cudaEventQuery(sent_.get());  // of an event never recorded: it has come
    if (state == cudaErrorNotReady) return false;
    RW_CUDA(state);
    return true;
  }
  absl::StatusOr<std::span<const int32_t>> Take() override {
    RW_RETURN_IF_ERROR(backend_.Use());
    RW_CUDA(cudaEventSynchronize(sent_.get()));
    return std::span(reinterpret_cast<const int32_t*>(host_.get()), std::exchange(sent_count_, 0));
  }

 private:
  CudaBackend& backend_;
  const int64_t capacity_;
  const DeviceMemory ids_;
  const PinnedMemory host_;
  const Event sent_;
  size_t sent_count_ = 0;
};

absl::StatusOr<std::unique_ptr<DrawnTokens>> CudaBackend::CreateDrawnTokens(int64_t capacity) {
  if (!looks_up_drawn_) return nullptr;
  RW_RETURN_IF_ERROR(Use());
  const int64_t bytes = capacity * static_cast<int64_t>(sizeof(int32_t));
  RW_ASSIGN_OR_RETURN(DeviceMemory ids, AllocateZeroed(bytes, stream()));
  RW_ASSIGN_OR_RETURN(PinnedMemory host, AllocatePinned(bytes));
  RW_ASSIGN_OR_RETURN(Event sent, CreateEvent());
  return std::make_unique<Drawn>(*this, capacity, std::move(ids), std::move(host), std::move(sent));
}

std::unique_ptr<Repeated> CudaBackend::Repeat(std::function<absl::Status()> issue) {
  return std::make_unique<Recorded>(*this, std::move(issue));
}

std::optional<StepShape> CudaBackend::RecordableShape() const {
  const bool is_sent = tiles_of_ > 0 && angles_of_ != nullptr;  // ops will send nothing
  if (!records_steps_ || !is_sent || step_.row_count() > kMostRecordedRows) return std::nullopt;
  return StepShape{.row_count = step_.row_count(), .tile_count = std::ssize(tiles_), .split_bound = split_bound_};
}

absl::Status CudaBackend::KeepTable(const EmbeddingTable& table) {
  RW_RETURN_IF_ERROR(Use());
  const int64_t row_bytes = table.cols * DTypeBytes(table.dtype);
  RW_ASSIGN_OR_RETURN(kept_rows_, AllocateDevice(table.rows * row_bytes));
  RW_CUDA(cudaMemcpy2DAsync(kept_rows_.get(), row_bytes, table.data, table.row_stride * DTypeBytes(table.dtype),
                            row_bytes, table.rows, cudaMemcpyHostToDevice, stream()));
  RW_CUDA(cudaStreamSynchronize(stream()));
  kept_table_ = table.data;
  return absl::OkStatus();
}

absl::Status CudaBackend::Embed(const EmbeddingTable& table, float* x) {
  const ProfilerRange range("Embed");
  RW_RETURN_IF_ERROR(Use());
  const auto* drawn = static_cast<const Drawn*>(step_.rows().drawn);
  if (drawn == nullptr) {
    RW_RETURN_IF_ERROR(CheckTokens(step_.rows().tokens, table));
  } else {
    RW_CHECK(table.data == kept_table_);
    for (const int32_t place : step_.rows().tokens) RW_CHECK(place >= 0 && place < drawn->capacity());
  }
  cuda::WidenTask task{
      .out = x, .row_bytes = table.cols * DTypeBytes(table.dtype), .row_count = step_.row_count(), .width = table.cols};
  if (table.data == kept_table_) {
    task.rows = reinterpret_cast<const unsigned char*>(kept_rows_.get());
    task.tokens = tokens_on_device_;
    if (drawn != nullptr) task.drawn = drawn->ids();
  } else {
    const int64_t bytes = task.row_count * task.row_bytes;
    RW_ASSIGN_OR_RETURN(std::byte * memory, other_rows_.Reserve(bytes));
    for (const int32_t token : step_.rows().tokens) {
      std::memcpy(memory, table.data + token * table.row_stride * DTypeBytes(table.dtype), task.row_bytes);
      memory += task.row_bytes;
    }
    RW_RETURN_IF_ERROR(other_rows_.Send(bytes, stream()));
    task.rows = reinterpret_cast<const unsigned char*>(other_rows_.device());
  }
  return CudaStatus(cuda::WidenRows(task, static_cast<cuda::Element>(table.dtype), stream()), "Embed");
}

absl::Status CudaBackend::MatMul(float* y, const float* x, int64_t row_count, const PackedMatrix& weights,
                                 const float* bias) {
  const ProfilerRange range("MatMul");
  RW_RETURN_IF_ERROR(Use());
  const auto& matrix = static_cast<const CudaMatrix&>(weights);
  cuda::MatMulTask task = matrix.Task();
  task.y = y;
  task.x = x;
  task.bias = bias;
  task.row_count = row_count;
  task.is_aligned = matrix.n_in() % 4 == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
  return CudaStatus(cuda::MatMul(task, matrix.format(), stream()), "MatMul");
}

void CudaBackend::CheckAngles(const RopeTable& rope) const {
  RW_CHECK(rope.rotary_dim == 0 || step_.position_end() <= rope.position_count,
           absl::StrCat("position ", step_.position_end() - 1, " of ", rope.position_count));
}

absl::Status CudaBackend::SendAngles(const RopeTable& rope) {
  if (angles_of_ == &rope) return absl::OkStatus();
  CheckAngles(rope);
  const int64_t bytes = step_.row_count() * (rope.rotary_dim / 2 * 2) * static_cast<int64_t>(sizeof(float));
  RW_ASSIGN_OR_RETURN(std::byte * memory, other_angles_.Reserve(bytes));
  WriteAngles(rope, reinterpret_cast<float*>(memory));
  RW_RETURN_IF_ERROR(other_angles_.Send(bytes, stream()));
  angles_of_ = &rope;
  angles_on_device_ = reinterpret_cast<const float*>(other_angles_.device());
  return absl::OkStatus();
}

absl::Status CudaBackend::RopeAppend(float* qkv, const AttentionShape& shape, const RopeTable& rope,
                                     const float* q_norm, const float* k_norm, float norm_eps, KvPool& pool, int layer,
                                     KvObservation* observation) {
  const ProfilerRange range("RopeAppend");
  RW_RETURN_IF_ERROR(Use());
  CheckAttention(shape, pool, layer);
  CheckRope(shape, rope, observation);
  step_.CheckFits(pool);
  RW_RETURN_IF_ERROR(SendAngles(rope));
  auto& kv = static_cast<CudaKvPool&>(pool);
  const int64_t count = step_.row_count();
  const cuda::RopeAppendTask task{.qkv = qkv,
                                  .cos = angles_on_device_,
                                  .sin = angles_on_device_ + count * (rope.rotary_dim / 2),
                                  .q_norm = q_norm,
                                  .k_norm = k_norm,
                                  .position = position_on_device_,
                                  .block = block_on_device_,
                                  .kv = kv.Layer(layer),
                                  .row_count = count,
                                  .n_heads = shape.n_heads_local,
                                  .n_kv_heads = shape.n_kv_heads_local,
                                  .head_dim = shape.head_dim,
                                  .rotary_dim = rope.rotary_dim,
                                  .norm_eps = norm_eps};
  RW_RETURN_IF_ERROR(CudaStatus(cuda::RopeAppend(task, kv.format(), stream()), "RopeAppend"));
  return observation ? Observe(qkv, shape, *observation) : absl::OkStatus();
}

// Calibration is no hurry: K and V are looked at on the host.
absl::Status CudaBackend::Observe(const float* qkv, const AttentionShape& shape, KvObservation& observation) {
  const int64_t dims = shape.head_dim, width = (shape.n_heads_local + 2 * shape.n_kv_heads_local) * dims;
  observed_.resize(step_.row_count() * width);
  RW_RETURN_IF_ERROR(CopyToHost(qkv, observed_));
  const auto look = [dims](const float* x, int head, std::vector<float>& min, std::vector<float>& max,
                           std::vector<uint64_t>& histogram) {
    for (int64_t d = 0; d < dims; ++d) {
      float &low = min[head * dims + d], &high = max[head * dims + d];
      if (x[d] < low) low = x[d];
      if (x[d] > high) high = x[d];
    }
    CountValues(&histogram[static_cast<size_t>(head) * kHistogramBins], x, dims);
  };
  for (int64_t row = 0; row < step_.row_count(); ++row) {
    const float* k = observed_.data() + row * width + shape.n_heads_local * dims;
    const float* v = k + shape.n_kv_heads_local * dims;
    for (int head = 0; head < shape.n_kv_heads_local; ++head) {
      look(k + head * dims, head, observation.k_min, observation.k_max, observation.k_histogram);
      look(v + head * dims, head, observation.v_min, observation.v_max, observation.v_histogram);
    }
  }
  return absl::OkStatus();
}

absl::Status CudaBackend::SendTiles(int group) {
  if (tiles_of_ == group) return absl::OkStatus();
  BuildTiles(group);
  const auto bytes = static_cast<int64_t>(tiles_.size() * sizeof(cuda::AttentionTile));
  RW_ASSIGN_OR_RETURN(std::byte * memory, other_tiles_.Reserve(bytes));
  std::ranges::copy(tiles_, reinterpret_cast<cuda::AttentionTile*>(memory));
  RW_RETURN_IF_ERROR(other_tiles_.Send(bytes, stream()));
  tiles_of_ = group;
  tiles_on_device_ = reinterpret_cast<const cuda::AttentionTile*>(other_tiles_.device());
  return absl::OkStatus();
}

int64_t CudaBackend::SplitBound(int32_t sliding_window) const {
  if (sliding_window <= 0) return split_bound_;
  // A tile's rows are consecutive positions; the first sees furthest back.
  return std::min<int64_t>(split_bound_, (sliding_window + cuda::kTileVectors) / cuda::kSplitTokens + 2);
}

absl::Status CudaBackend::Attention(float* out, const float* qkv, const AttentionShape& shape, const KvPool& pool,
                                    int layer) {
  const ProfilerRange range("Attention");
  RW_RETURN_IF_ERROR(Use());
  CheckAttention(shape, pool, layer);
  step_.CheckFits(pool);
  const auto& kv = static_cast<const CudaKvPool&>(pool);
  const int group = shape.n_heads_local / shape.n_kv_heads_local;
  RW_RETURN_IF_ERROR(SendTiles(group));
  const auto tile_count = static_cast<int64_t>(tiles_.size());
  const int64_t splits = SplitBound(shape.sliding_window);
  const int64_t partials = step_.row_count() * shape.n_heads_local * splits * (4 + shape.head_dim);
  const bool is_by_split = splits > 1 && partials <= kMostPartials &&
                           tile_count * shape.n_kv_heads_local < kTilesPerMultiprocessor * multiprocessors_;
  if (is_by_split && partials > partials_capacity_) {
    RW_ASSIGN_OR_RETURN(partials_, AllocateDevice(partials * static_cast<int64_t>(sizeof(float))));
    partials_capacity_ = partials;
    ++moves_;
  }
  const cuda::AttentionTask task{.out = out,
                                 .qkv = qkv,
                                 .tables = tables_on_device_,
                                 .tiles = tiles_on_device_,
                                 .kv = kv.Layer(layer),
                                 .tile_count = static_cast<int32_t>(tile_count),
                                 .group = group,
                                 .n_kv_heads = shape.n_kv_heads_local,
                                 .head_dim = shape.head_dim,
                                 .sliding_window = shape.sliding_window,
                                 .score_scale = shape.score_scale,
                                 .split_count = is_by_split ? static_cast<int32_t>(splits) : 0,
                                 .partials = reinterpret_cast<float*>(partials_.get())};
  return CudaStatus(cuda::Attention(task, kv.format(), stream()), "Attention");
}

absl::Status CudaBackend::PickRows(float* out, const float* x, std::span<const int32_t> picked, int64_t width) {
  const ProfilerRange range("PickRows");
  RW_RETURN_IF_ERROR(Use());
  CheckPicked(picked);
  RW_ASSIGN_OR_RETURN(const int32_t* on_device,
                      OnDevice(picked, step_.rows().picked, picked_on_device_, other_picked_));
  return CudaStatus(cuda::PickRows(out, x, on_device, std::ssize(picked), width, stream()), "PickRows");
}

absl::Status CudaBackend::Draw(std::span<int32_t> ids, const float* logits, std::span<const DrawRule> rules,
                               int32_t vocab_size) {
  RW_CHECK(ids.size() == rules.size());
  if (rules.empty()) return absl::OkStatus();
  RW_ASSIGN_OR_RETURN(std::byte * drawn, drawn_.Reserve(static_cast<int64_t>(ids.size_bytes())));
  RW_RETURN_IF_ERROR(IssueDraw(reinterpret_cast<int32_t*>(drawn), logits, rules, vocab_size));
  RW_ASSIGN_OR_RETURN(const std::byte* host, drawn_.Fetch(static_cast<int64_t>(ids.size_bytes()), stream()));
  std::memcpy(ids.data(), host, ids.size_bytes());
  return absl::OkStatus();
}

absl::Status CudaBackend::IssueDraw(int32_t* ids, const float* logits, std::span<const DrawRule> rules,
                                    int32_t vocab_size) {
  const ProfilerRange range("Draw");
  RW_CHECK(vocab_size > 0 && vocab_size <= 1 << kMostVocabularyBits);
  if (rules.empty()) return absl::OkStatus();
  RW_RETURN_IF_ERROR(Use());
  RW_ASSIGN_OR_RETURN(const DrawRule* on_device, OnDevice(rules, step_.rows().rules, rules_on_device_, other_rules_));
  const auto count = std::ssize(rules);
  const int64_t scratch = count * vocab_size * static_cast<int64_t>(sizeof(uint64_t));
  if (scratch > weights_capacity_) {
    RW_ASSIGN_OR_RETURN(weights_, AllocateDevice(scratch));
    weights_capacity_ = scratch;
  }
  const cuda::DrawTask task{.ids = ids,
                            .logits = logits,
                            .rules = on_device,
                            .weights = reinterpret_cast<uint64_t*>(weights_.get()),
                            .row_count = count,
                            .vocab_size = vocab_size};
  return CudaStatus(cuda::Draw(task, stream()), "Draw");
}

}  // namespace

absl::StatusOr<std::unique_ptr<Backend>> CreateCudaBackend(const CudaOptions& options) {
  if (options.activations == Activations::kInt8) {
    return absl::InvalidArgumentError("activations int8 are of the CPU backend");
  }
  int count = 0;
  RW_CUDA(cudaGetDeviceCount(&count));
  if (options.device < 0 || options.device >= count) {
    return absl::InvalidArgumentError(absl::StrCat("device=", options.device, " is not one of the ", count, " GPUs"));
  }
  RW_CUDA(cudaSetDevice(options.device));
  cudaDeviceProp properties;
  RW_CUDA(cudaGetDeviceProperties(&properties, options.device));
  if (properties.major < 8) {
    return absl::FailedPreconditionError(absl::StrCat("GPU ", options.device, ", ", properties.name, ", is sm_",
                                                      properties.major, properties.minor, ", older than sm_80"));
  }
  cudaStream_t stream = nullptr;
  RW_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  return std::make_unique<CudaBackend>(options, properties, Stream(stream));
}

void* CudaStreamOf(const Backend& backend) { return static_cast<const CudaBackend&>(backend).stream(); }

}  // namespace rankwise::kernels
