#include "tests/gpu/device_copies.h"

#include <cstdio>
#include <string>

#include "base/check.h"
#include "base/status_macros.h"

namespace rankwise::kernels {
namespace {

void Check(const absl::Status& status) { RW_CHECK(status.ok(), status.ToString()); }

// The suites ask whether an op went well; what a kernel did wrong should be said.
absl::Status Told(const absl::Status& status) {
  if (absl::IsInternal(status)) std::fprintf(stderr, "%s\n", std::string(status.message()).c_str());
  return status;
}

// Host memory's twin on the device; null for null.
class Copy {
 public:
  Copy(Backend& backend, const float* host, int64_t count) : backend_(backend), memory_(nullptr, nullptr) {
    if (host == nullptr) return;
    count_ = count;
    auto memory = backend.Allocate(count);
    Check(memory.status());
    memory_ = *std::move(memory);
    if (count > 0) Check(backend.CopyToDevice({host, static_cast<size_t>(count)}, memory_.get()));
  }
  float* get() const { return memory_.get(); }
  void Fetch(float* host) const {
    if (count_ > 0) Check(backend_.CopyToHost(memory_.get(), {host, static_cast<size_t>(count_)}));
  }

 private:
  Backend& backend_;
  Backend::Floats memory_;
  int64_t count_ = 0;
};

class DeviceCopies : public Backend {
 public:
  explicit DeviceCopies(std::unique_ptr<Backend> device) : device_(std::move(device)) {}

  std::string Description() const override { return device_->Description(); }
  absl::StatusOr<Floats> Allocate(int64_t count) override { return device_->Allocate(count); }
  absl::Status CopyToHost(const float* device, std::span<float> host) override {
    return device_->CopyToHost(device, host);
  }
  absl::Status CopyToDevice(std::span<const float> host, float* device) override {
    return device_->CopyToDevice(host, device);
  }
  absl::StatusOr<std::unique_ptr<PackedMatrix>> Pack(std::span<const MatrixView> blocks, const SumTree& tree) override {
    return device_->Pack(blocks, tree);
  }
  int64_t KvBlockBytes(const KvShape& shape) const override { return device_->KvBlockBytes(shape); }
  absl::StatusOr<std::unique_ptr<KvPool>> CreateKvPool(const KvShape& shape, int32_t block_count) override {
    return device_->CreateKvPool(shape, block_count);
  }
  absl::Status SetKvScales(KvPool& pool, std::span<const KvChannelScales> scales) override {
    return device_->SetKvScales(pool, scales);
  }
  absl::StatusOr<std::unique_ptr<DrawnTokens>> CreateDrawnTokens(int64_t capacity) override {
    return device_->CreateDrawnTokens(capacity);
  }
  absl::Status BeginStep(const StepRows& rows) override {
    row_count_ = rows.row_count();
    return device_->BeginStep(rows);
  }

  absl::Status KeepTable(const EmbeddingTable& table) override { return device_->KeepTable(table); }
  absl::Status Embed(const EmbeddingTable& table, float* x) override {
    const Copy out = Of(x, row_count_ * table.cols);
    RW_RETURN_IF_ERROR(Told(device_->Embed(table, out.get())));
    out.Fetch(x);
    return absl::OkStatus();
  }
  absl::Status RmsNorm(float* out, const float* x, const float* weight, int64_t width, float eps) override {
    const Copy to = Of(out, row_count_ * width), from = Of(x, row_count_ * width), weights = Of(weight, width);
    RW_RETURN_IF_ERROR(Told(device_->RmsNorm(to.get(), out == x ? to.get() : from.get(), weights.get(), width, eps)));
    to.Fetch(out);
    return absl::OkStatus();
  }
  absl::Status AddRmsNorm(float* out, float* x, const float* delta, const float* bias, const float* weight,
                          int64_t width, float eps) override {
    const int64_t count = row_count_ * width;
    const Copy to = Of(out, count), both = Of(x, count), added = Of(delta, count), biases = Of(bias, width),
               weights = Of(weight, width);
    RW_RETURN_IF_ERROR(
        Told(device_->AddRmsNorm(to.get(), both.get(), added.get(), biases.get(), weights.get(), width, eps)));
    to.Fetch(out);
    both.Fetch(x);
    return absl::OkStatus();
  }
  absl::Status Add(float* x, const float* delta, const float* bias, int64_t width) override {
    const Copy both = Of(x, row_count_ * width), added = Of(delta, row_count_ * width), biases = Of(bias, width);
    RW_RETURN_IF_ERROR(Told(device_->Add(both.get(), added.get(), biases.get(), width)));
    both.Fetch(x);
    return absl::OkStatus();
  }
  absl::Status MatMul(float* y, const float* x, int64_t row_count, const PackedMatrix& weights,
                      const float* bias) override {
    const Copy to = Of(y, row_count * weights.n_out()), from = Of(x, row_count * weights.n_in()),
               biases = Of(bias, weights.n_out());
    RW_RETURN_IF_ERROR(Told(device_->MatMul(to.get(), from.get(), row_count, weights, biases.get())));
    to.Fetch(y);
    return absl::OkStatus();
  }
  absl::Status RopeAppend(float* qkv, const AttentionShape& shape, const RopeTable& rope, const float* q_norm,
                          const float* k_norm, float norm_eps, KvPool& pool, int layer,
                          KvObservation* observation) override {
    const Copy both = Of(qkv, row_count_ * QkvWidth(shape)), q_norms = Of(q_norm, shape.head_dim),
               k_norms = Of(k_norm, shape.head_dim);
    RW_RETURN_IF_ERROR(Told(device_->RopeAppend(both.get(), shape, rope, q_norms.get(), k_norms.get(), norm_eps, pool,
                                                layer, observation)));
    both.Fetch(qkv);
    return absl::OkStatus();
  }
  absl::Status Attention(float* out, const float* qkv, const AttentionShape& shape, const KvPool& pool,
                         int layer) override {
    const Copy to = Of(out, row_count_ * shape.n_heads_local * shape.head_dim),
               from = Of(qkv, row_count_ * QkvWidth(shape));
    RW_RETURN_IF_ERROR(Told(device_->Attention(to.get(), from.get(), shape, pool, layer)));
    to.Fetch(out);
    return absl::OkStatus();
  }
  absl::Status SiluMul(float* out, const float* gate_up, int64_t width) override {
    const Copy to = Of(out, row_count_ * width), from = Of(gate_up, row_count_ * 2 * width);
    RW_RETURN_IF_ERROR(Told(device_->SiluMul(to.get(), from.get(), width)));
    to.Fetch(out);
    return absl::OkStatus();
  }
  absl::Status PickRows(float* out, const float* x, std::span<const int32_t> picked, int64_t width) override {
    const Copy to = Of(out, static_cast<int64_t>(picked.size()) * width), from = Of(x, row_count_ * width);
    RW_RETURN_IF_ERROR(Told(device_->PickRows(to.get(), from.get(), picked, width)));
    to.Fetch(out);
    return absl::OkStatus();
  }
  absl::Status Draw(std::span<int32_t> ids, const float* logits, std::span<const DrawRule> rules,
                    int32_t vocab_size) override {
    const Copy from = Of(logits, std::ssize(rules) * vocab_size);
    return Told(device_->Draw(ids, from.get(), rules, vocab_size));
  }

 private:
  Copy Of(const float* host, int64_t count) { return Copy(*device_, host, count); }
  static int64_t QkvWidth(const AttentionShape& shape) {
    return int64_t{shape.n_heads_local + 2 * shape.n_kv_heads_local} * shape.head_dim;
  }

  std::unique_ptr<Backend> device_;
  int64_t row_count_ = 0;
};

}  // namespace

std::unique_ptr<Backend> MakeDeviceCopies(std::unique_ptr<Backend> device) {
  return std::make_unique<DeviceCopies>(std::move(device));
}

}  // namespace rankwise::kernels
