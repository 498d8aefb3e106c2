#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "base/check.h"
#include "base/status_macros.h"
#include "kernels/activation_groups.h"
#include "kernels/kv_histogram.h"
#include "kernels/number_formats.h"
#include "kernels/preconditions.h"
#include "kernels/token_draw.h"

namespace rankwise::kernels {
namespace {

class ReferenceMatrix : public PackedMatrix {
 public:
  // `groups`: of kInt8, else none.
  ReferenceMatrix(const PackedShape& shape, std::span<const MatrixView> blocks, Activations activations,
                  std::vector<ActivationGroup> groups)
      : shape_(shape), activations_(activations), groups_(std::move(groups)) {
    for (const MatrixView& block : blocks) {
      for (int64_t r = 0; r < block.rows; ++r) {
        for (int64_t c = 0; c < block.cols; ++c) {
          const float value = ElementAt(block, r, c);
          values_.push_back(activations == Activations::kBF16 ? BFloat16ToFloat(FloatToBFloat16(value)) : value);
        }
      }
    }
  }

  int64_t n_out() const override { return shape_.n_out; }
  int64_t n_in() const override { return shape_.n_in; }
  int64_t bytes() const override { return static_cast<int64_t>(values_.size() * sizeof(float)); }
  Activations activations() const override { return activations_; }
  float at(int64_t out, int64_t in) const { return values_[out * shape_.n_in + in]; }
  // A row of inputs as it is multiplied.
  std::vector<double> Input(const float* x) const {
    std::vector<double> input(x, x + shape_.n_in);
    if (activations_ == Activations::kBF16) {
      for (int64_t k = 0; k < shape_.n_in; ++k) input[k] = BFloat16ToFloat(FloatToBFloat16(x[k]));
    }
    for (const ActivationGroup& group : groups_) {
      std::vector<int8_t> q(group.end - group.begin);
      const double scale = QuantizeActivations({x + group.begin, q.size()}, q);
      for (size_t i = 0; i < q.size(); ++i) input[group.begin + i] = q[i] * scale;
    }
    return input;
  }

 private:
  PackedShape shape_;
  Activations activations_;
  std::vector<ActivationGroup> groups_;
  std::vector<float> values_;  // [n_out, n_in]
};

// Every value in its own cell: K [layer, block, head, token, dim], V likewise, then the ranges of online formats.
class ReferenceKvPool : public KvPool {
 public:
  ReferenceKvPool(const KvShape& shape, int32_t block_count)
      : shape_(shape),
        block_count_(block_count),
        element_bytes_(shape.format == KvFormat::kF32   ? 4
                       : shape.format == KvFormat::kF16 ? 2
                                                        : 1),
        scales_(shape.n_layers * shape.n_kv_heads_local),
        ranges_(int64_t{shape.n_layers} * block_count * 2 * shape.n_kv_heads_local * kKvBlockTokens),
        saturated_(shape.n_layers),
        bytes_(static_cast<int64_t>(ranges_.size()) * shape.head_dim * element_bytes_) {}

  const KvShape& shape() const override { return shape_; }
  int32_t block_count() const override { return block_count_; }
  int64_t bytes() const override {
    return static_cast<int64_t>(ranges_.size()) * KvVectorBytes(shape_.format, shape_.head_dim);
  }
  std::vector<int64_t> SaturatedCounts() const override { return saturated_; }
  std::vector<std::byte> BlockBytes(int layer, int32_t block) const override {
    const int64_t vectors = int64_t{2} * shape_.n_kv_heads_local * kKvBlockTokens;
    const int64_t first = (int64_t{layer} * block_count_ + block) * vectors, size = shape_.head_dim * element_bytes_;
    std::vector<std::byte> bytes(bytes_.begin() + first * size, bytes_.begin() + (first + vectors) * size);
    const auto* ranges = reinterpret_cast<const std::byte*>(ranges_.data() + first);
    if (IsOnline(shape_.format)) bytes.insert(bytes.end(), ranges, ranges + vectors * sizeof(OnlineRange));
    return bytes;
  }

  // The K or V of one token and head.
  struct Place {
    int layer, head;
    int32_t block, slot;
    bool is_v;
  };

  void Write(const Place& place, std::span<const float> x) {
    std::byte* to = bytes_.data() + Index(place) * shape_.head_dim * element_bytes_;
    OnlineRange& range = ranges_[Index(place)];
    if (IsOnline(shape_.format)) range = RangeOf(x);
    for (size_t i = 0; i < x.size(); ++i, to += element_bytes_) {
      if (shape_.format == KvFormat::kF32) {
        std::memcpy(to, &x[i], sizeof(float));
      } else if (shape_.format == KvFormat::kF16) {
        Save(to, QuantizeF16(x[i]), place.layer);
      } else if (shape_.format == KvFormat::kInt8) {
        const auto [scale, zero_point] = ScaleOf(place, static_cast<int>(i));
        Save(to, QuantizeInt8(x[i], scale, zero_point), place.layer);
      } else {
        Save(to, QuantizeOnline(x[i], range, OnlineLevels(shape_.format)), place.layer);
      }
    }
  }

  double Read(const Place& place, int dim) const {
    const std::byte* from = bytes_.data() + (Index(place) * shape_.head_dim + dim) * element_bytes_;
    if (shape_.format == KvFormat::kF32) return LoadAsFloat(from, DType::kF32);
    if (shape_.format == KvFormat::kF16) return LoadAsFloat(from, DType::kF16);
    if (IsOnline(shape_.format)) {
      const OnlineRange& range = ranges_[Index(place)];
      return static_cast<double>(*from) * HalfToFloat(range.scale) + HalfToFloat(range.zero);
    }
    const auto [scale, zero_point] = ScaleOf(place, dim);
    return static_cast<double>(static_cast<int8_t>(*from)) * scale + zero_point;
  }

  void set_scales(std::span<const KvChannelScales> scales) { scales_.assign(scales.begin(), scales.end()); }

 private:
  int64_t Index(const Place& p) const {
    const int64_t tensor = (int64_t{p.layer} * block_count_ + p.block) * 2 + p.is_v;
    return (tensor * shape_.n_kv_heads_local + p.head) * kKvBlockTokens + p.slot;
  }
  std::pair<float, float> ScaleOf(const Place& p, int dim) const {
    const KvChannelScales& s = scales_[(p.layer * shape_.n_kv_heads_local + p.head) * shape_.head_dim + dim];
    return p.is_v ? std::pair(s.v_scale, s.v_zero_point) : std::pair(s.k_scale, s.k_zero_point);
  }
  OnlineRange RangeOf(std::span<const float> x) const {
    float min = 65504.0f, max = -65504.0f;
    for (const float value : x) {
      if (std::isnan(value)) continue;
      min = std::min(min, std::clamp(value, -65504.0f, 65504.0f));
      max = std::max(max, std::clamp(value, -65504.0f, 65504.0f));
    }
    const float levels = OnlineLevels(shape_.format);
    return min <= max ? OnlineRangeOf(min, max, levels) : OnlineRangeOf(0, 0, levels);
  }
  template <typename T>
  void Save(std::byte* to, Stored<T> stored, int layer) {
    std::memcpy(to, &stored.value, sizeof(T));
    saturated_[layer] += stored.saturated;
  }

  const KvShape shape_;
  const int32_t block_count_;
  const int64_t element_bytes_;          // int4 too has a byte each
  std::vector<KvChannelScales> scales_;  // [n_layers, n_kv_heads_local, head_dim]
  std::vector<OnlineRange> ranges_;      // [n_layers, blocks, K and V, n_kv_heads_local, tokens]
  std::vector<int64_t> saturated_;       // [n_layers]
  std::vector<std::byte> bytes_;         // [as ranges_, head_dim]
};

void NormRow(float* out, const float* x, const float* weight, int64_t width, float eps) {
  double sum = 0;
  for (int64_t i = 0; i < width; ++i) sum += static_cast<double>(x[i]) * x[i];
  const double factor = 1 / std::sqrt(sum / static_cast<double>(width) + eps);
  for (int64_t i = 0; i < width; ++i) out[i] = static_cast<float>(x[i] * factor * weight[i]);
}

// In f32 and in this order by contract, so that every backend stores the same K.
void RotateHead(float* x, const RopeTable& rope, int64_t position) {
  const int half = rope.rotary_dim / 2;
  const float* cos = rope.cos.data() + position * half;
  const float* sin = rope.sin.data() + position * half;
  for (int i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    x[i] = std::fma(a, cos[i], -(b * sin[i]));
    x[i + half] = std::fma(b, cos[i], a * sin[i]);
  }
}

void Observe(std::vector<float>& min, std::vector<float>& max, int64_t index, float x) {
  if (x < min[index]) min[index] = x;
  if (x > max[index]) max[index] = x;
}

class ReferenceBackend : public Backend {
 public:
  explicit ReferenceBackend(Activations activations) : activations_(activations) {}

  std::string Description() const override { return "reference"; }

  absl::StatusOr<Floats> Allocate(int64_t count) override {
    return Floats(new (std::align_val_t{64}) float[count](),
                  [](float* p) { operator delete[](p, std::align_val_t{64}); });
  }
  absl::Status CopyToHost(const float* device, std::span<float> host) override {
    std::copy_n(device, host.size(), host.data());
    return absl::OkStatus();
  }
  absl::Status CopyToDevice(std::span<const float> host, float* device) override {
    std::copy_n(host.data(), host.size(), device);
    return absl::OkStatus();
  }

  absl::StatusOr<std::unique_ptr<PackedMatrix>> Pack(std::span<const MatrixView> blocks, const SumTree& tree) override {
    RW_ASSIGN_OR_RETURN(const PackedShape shape, CheckPack(blocks, tree));
    RW_ASSIGN_OR_RETURN(const Activations own, ActivationsOf(shape, activations_));
    std::vector<int32_t> chunk_begin;
    std::vector<ActivationGroup> groups;
    if (own == Activations::kInt8) groups = CutActivations(shape, tree, chunk_begin);
    return std::make_unique<ReferenceMatrix>(shape, blocks, own, std::move(groups));
  }
  int64_t KvBlockBytes(const KvShape& shape) const override {
    return int64_t{shape.n_layers} * shape.n_kv_heads_local * kKvBlockTokens * 2 *
           KvVectorBytes(shape.format, shape.head_dim);
  }
  absl::StatusOr<std::unique_ptr<KvPool>> CreateKvPool(const KvShape& shape, int32_t block_count) override {
    RW_RETURN_IF_ERROR(CheckKvShape(shape, block_count));
    return std::make_unique<ReferenceKvPool>(shape, block_count);
  }
  absl::Status SetKvScales(KvPool& pool, std::span<const KvChannelScales> scales) override {
    RW_RETURN_IF_ERROR(CheckKvScales(pool.shape(), scales));
    static_cast<ReferenceKvPool&>(pool).set_scales(scales);
    return absl::OkStatus();
  }
  absl::Status BeginStep(const StepRows& rows) override {
    step_.Build(rows);
    return absl::OkStatus();
  }

  absl::Status Embed(const EmbeddingTable& table, float* x) override {
    RW_RETURN_IF_ERROR(CheckTokens(step_.rows().tokens, table));
    for (int32_t token : step_.rows().tokens) {
      for (int64_t i = 0; i < table.cols; ++i) {
        *x++ = LoadAsFloat(table.data + (token * table.row_stride + i) * DTypeBytes(table.dtype), table.dtype);
      }
    }
    return absl::OkStatus();
  }
  absl::Status RmsNorm(float* out, const float* x, const float* weight, int64_t width, float eps) override {
    for (int64_t r = 0; r < step_.row_count(); ++r) NormRow(out + r * width, x + r * width, weight, width, eps);
    return absl::OkStatus();
  }
  absl::Status AddRmsNorm(float* out, float* x, const float* delta, const float* bias, const float* weight,
                          int64_t width, float eps) override {
    RW_RETURN_IF_ERROR(Add(x, delta, bias, width));
    return RmsNorm(out, x, weight, width, eps);
  }
  absl::Status Add(float* x, const float* delta, const float* bias, int64_t width) override {
    for (int64_t i = 0; i < step_.row_count() * width; ++i) {
      x[i] = static_cast<float>(double{x[i]} + delta[i] + (bias ? bias[i % width] : 0.0));
    }
    return absl::OkStatus();
  }

  absl::Status MatMul(float* y, const float* x, int64_t row_count, const PackedMatrix& weights,
                      const float* bias) override {
    const auto& w = static_cast<const ReferenceMatrix&>(weights);
    for (int64_t r = 0; r < row_count; ++r) {
      const std::vector<double> input = w.Input(x + r * w.n_in());
      for (int64_t o = 0; o < w.n_out(); ++o) {
        double sum = bias ? bias[o] : 0.0;
        for (int64_t i = 0; i < w.n_in(); ++i) sum += input[i] * w.at(o, i);
        y[r * w.n_out() + o] = static_cast<float>(sum);
      }
    }
    return absl::OkStatus();
  }

  absl::Status RopeAppend(float* qkv, const AttentionShape& shape, const RopeTable& rope, const float* q_norm,
                          const float* k_norm, float norm_eps, KvPool& pool, int layer,
                          KvObservation* observation) override {
    CheckAttention(shape, pool, layer);
    CheckRope(shape, rope, observation);
    step_.CheckFits(pool);
    RW_CHECK(rope.rotary_dim == 0 || step_.position_end() <= rope.position_count);
    auto& kv = static_cast<ReferenceKvPool&>(pool);
    const int dims = shape.head_dim, heads = shape.n_heads_local, kv_heads = shape.n_kv_heads_local;
    for (int64_t row = 0; row < step_.row_count(); ++row) {
      float* q = qkv + row * (heads + 2 * kv_heads) * dims;
      for (int h = 0; h < heads + kv_heads; ++h) {
        const float* norm = h < heads ? q_norm : k_norm;
        if (norm) NormRow(q + h * dims, q + h * dims, norm, dims, norm_eps);
        RotateHead(q + h * dims, rope, step_.position(row));
      }
      const float* k = q + heads * dims;
      const float* v = k + kv_heads * dims;
      for (int h = 0; h < kv_heads; ++h) {
        ReferenceKvPool::Place place{layer, h, step_.block(row), step_.slot(row), false};
        kv.Write(place, {k + h * dims, static_cast<size_t>(dims)});
        place.is_v = true;
        kv.Write(place, {v + h * dims, static_cast<size_t>(dims)});
      }
      for (int64_t i = 0; observation && i < int64_t{kv_heads} * dims; ++i) {
        Observe(observation->k_min, observation->k_max, i, k[i]);
        Observe(observation->v_min, observation->v_max, i, v[i]);
        CountValues(&observation->k_histogram[i / dims * kHistogramBins], &k[i], 1);
        CountValues(&observation->v_histogram[i / dims * kHistogramBins], &v[i], 1);
      }
    }
    return absl::OkStatus();
  }

  absl::Status Attention(float* out, const float* qkv, const AttentionShape& shape, const KvPool& pool,
                         int layer) override {
    CheckAttention(shape, pool, layer);
    step_.CheckFits(pool);
    const int64_t width = int64_t{shape.n_heads_local} * shape.head_dim;
    const int64_t qkv_width = width + 2 * int64_t{shape.n_kv_heads_local} * shape.head_dim;
    for (int64_t row = 0; row < step_.row_count(); ++row) {
      for (int h = 0; h < shape.n_heads_local; ++h) {
        AttendHead(out + row * width + h * shape.head_dim, qkv + row * qkv_width + h * shape.head_dim, shape,
                   static_cast<const ReferenceKvPool&>(pool),
                   {layer, h / (shape.n_heads_local / shape.n_kv_heads_local)}, row);
      }
    }
    return absl::OkStatus();
  }

  absl::Status SiluMul(float* out, const float* gate_up, int64_t width) override {
    for (int64_t r = 0; r < step_.row_count(); ++r) {
      for (int64_t i = 0; i < width; ++i) {
        const double gate = gate_up[2 * r * width + i], up = gate_up[(2 * r + 1) * width + i];
        out[r * width + i] = static_cast<float>(gate / (1 + std::exp(-gate)) * up);
      }
    }
    return absl::OkStatus();
  }

  absl::Status PickRows(float* out, const float* x, std::span<const int32_t> picked, int64_t width) override {
    for (int32_t row : picked) {
      RW_CHECK(row >= 0 && row < step_.row_count());
      out = std::copy_n(x + row * width, width, out);
    }
    return absl::OkStatus();
  }

  absl::Status Draw(std::span<int32_t> ids, const float* logits, std::span<const DrawRule> rules,
                    int32_t vocab_size) override {
    TokenDraw draw(vocab_size);
    for (size_t i = 0; i < rules.size(); ++i)
      ids[i] = draw.Draw({logits + i * vocab_size, size_t(vocab_size)}, rules[i]);
    return absl::OkStatus();
  }

 private:
  struct KvHead {
    int layer, head;
  };

  void AttendHead(float* out, const float* q, const AttentionShape& shape, const ReferenceKvPool& kv, KvHead of,
                  int64_t row) {
    const int32_t last = step_.position(row);
    const int32_t first = shape.sliding_window > 0 ? std::max(0, last - shape.sliding_window + 1) : 0;
    const auto table = step_.rows().block_table[step_.segment(row)];
    const auto read = [&](int32_t position, int dim, bool is_v) {
      return kv.Read({of.layer, of.head, table[position / kKvBlockTokens], position % kKvBlockTokens, is_v}, dim);
    };
    std::vector<double> p(last - first + 1), sum(shape.head_dim);
    for (int32_t t = first; t <= last; ++t) {
      for (int d = 0; d < shape.head_dim; ++d) p[t - first] += q[d] * read(t, d, false);
      p[t - first] *= shape.score_scale;
    }
    const double max = *std::max_element(p.begin(), p.end());
    double total = 0;
    for (double& s : p) total += s = std::exp(s - max);
    for (int32_t t = first; t <= last; ++t) {
      for (int d = 0; d < shape.head_dim; ++d) sum[d] += p[t - first] * read(t, d, true);
    }
    for (int d = 0; d < shape.head_dim; ++d) out[d] = static_cast<float>(sum[d] / total);
  }

  const Activations activations_;
  StepIndex step_;
};

}  // namespace

std::unique_ptr<Backend> CreateReferenceBackend(Activations activations) {
  return std::make_unique<ReferenceBackend>(activations);
}

}  // namespace rankwise::kernels
