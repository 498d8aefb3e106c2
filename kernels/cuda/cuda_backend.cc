#include "kernels/cuda/cuda_backend.h"

#include <cuda_runtime_api.h>

#include <cstring>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status_macros.h"
#include "kernels/cuda/cuda_kv_pool.h"
#include "kernels/cuda/cuda_matrix.h"
#include "kernels/cuda/cuda_memory.h"
#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/device_step.h"
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
        team_(ThreadTeam::AllowedCpuCount(), /*pin_threads=*/false),
        step_(stream_.get()) {}
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
  absl::Status IssueDraw(int32_t* ids, const float* logits, std::span<const DrawRule> rules, int32_t vocab_size);
  absl::Status Observe(const float* qkv, const AttentionShape& shape, KvObservation& observation);

  const int device_;
  const bool records_steps_, looks_up_drawn_;
  const Activations activations_;
  const int64_t multiprocessors_;
  const std::string description_;
  const Stream stream_;
  ThreadTeam team_;  // packs
  DeviceStep step_;

  int64_t step_count_ = 0;
  std::optional<ProfilerRange> step_range_, layer_range_;

  const std::byte* kept_table_ = nullptr;  // where it lies on the host
  DeviceMemory kept_rows_;
  Staging other_rows_;  // of a table that was not kept
  ReadBack drawn_;
  DeviceMemory weights_;  // of Draw
  int64_t weights_capacity_ = 0;
  DeviceMemory partials_;
  int64_t partials_capacity_ = 0;
  int64_t moves_ = 0;            // of partials_
  std::vector<float> observed_;  // host: qkv
};

absl::Status CudaBackend::BeginStep(const StepRows& rows) {
  RW_RETURN_IF_ERROR(Use());
  EndStep();
  step_range_.emplace(absl::StrCat("step ", ++step_count_, ", ", rows.row_count(), " rows").c_str());
  return step_.Begin(rows);
}

class CudaBackend::Recorded final : public Repeated {
 public:
  Recorded(CudaBackend& backend, std::function<absl::Status()> issue) : backend_(backend), issue_(std::move(issue)) {}

  absl::Status Run() override {
    const std::optional<StepShape> shape = backend_.RecordableShape();
    if (!shape.has_value()) return issue_();
    const int64_t moves = backend_.step_.moves() + backend_.moves_;
    if (graphs_.size() == kMostRecordings || moves_ != moves) graphs_.clear();
    moves_ = moves;
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
  if (!records_steps_ || step_.row_count() > kMostRecordedRows) return std::nullopt;
  return step_.shape();
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
  const auto* drawn = static_cast<const Drawn*>(step_.index().rows().drawn);
  if (drawn == nullptr) {
    RW_RETURN_IF_ERROR(CheckTokens(step_.index().rows().tokens, table));
  } else {
    RW_CHECK(table.data == kept_table_);
    for (const int32_t place : step_.index().rows().tokens) RW_CHECK(place >= 0 && place < drawn->capacity());
  }
  cuda::WidenTask task{
      .out = x, .row_bytes = table.cols * DTypeBytes(table.dtype), .row_count = step_.row_count(), .width = table.cols};
  if (table.data == kept_table_) {
    task.rows = reinterpret_cast<const unsigned char*>(kept_rows_.get());
    task.tokens = step_.tokens();
    if (drawn != nullptr) task.drawn = drawn->ids();
  } else {
    const int64_t bytes = task.row_count * task.row_bytes;
    RW_ASSIGN_OR_RETURN(std::byte * memory, other_rows_.Reserve(bytes));
    for (const int32_t token : step_.index().rows().tokens) {
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

absl::Status CudaBackend::RopeAppend(float* qkv, const AttentionShape& shape, const RopeTable& rope,
                                     const float* q_norm, const float* k_norm, float norm_eps, KvPool& pool, int layer,
                                     KvObservation* observation) {
  const ProfilerRange range("RopeAppend");
  RW_RETURN_IF_ERROR(Use());
  CheckAttention(shape, pool, layer);
  CheckRope(shape, rope, observation);
  step_.index().CheckFits(pool);
  RW_ASSIGN_OR_RETURN(const float* angles, step_.Angles(rope));
  auto& kv = static_cast<CudaKvPool&>(pool);
  const int64_t count = step_.row_count();
  const cuda::RopeAppendTask task{.qkv = qkv,
                                  .cos = angles,
                                  .sin = angles + count * (rope.rotary_dim / 2),
                                  .q_norm = q_norm,
                                  .k_norm = k_norm,
                                  .position = step_.position(),
                                  .block = step_.block(),
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

absl::Status CudaBackend::Attention(float* out, const float* qkv, const AttentionShape& shape, const KvPool& pool,
                                    int layer) {
  const ProfilerRange range("Attention");
  RW_RETURN_IF_ERROR(Use());
  CheckAttention(shape, pool, layer);
  step_.index().CheckFits(pool);
  const auto& kv = static_cast<const CudaKvPool&>(pool);
  const int group = shape.n_heads_local / shape.n_kv_heads_local;
  RW_ASSIGN_OR_RETURN(const std::span<const cuda::AttentionTile> tiles, step_.Tiles(group));
  const int64_t tile_count = std::ssize(tiles), splits = step_.SplitBound(shape.sliding_window);
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
                                 .tables = step_.tables(),
                                 .tiles = tiles.data(),
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
  RW_ASSIGN_OR_RETURN(const int32_t* on_device, step_.Picked(picked));
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
  RW_ASSIGN_OR_RETURN(const DrawRule* on_device, step_.Rules(rules));
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
