#include "kernels/preconditions.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "kernels/kv_histogram.h"

namespace rankwise::kernels {
namespace {

class IssuedAnew final : public Repeated {
 public:
  explicit IssuedAnew(std::function<absl::Status()> issue) : issue_(std::move(issue)) {}
  absl::Status Run() override { return issue_(); }

 private:
  const std::function<absl::Status()> issue_;
};

}  // namespace

std::unique_ptr<Repeated> Backend::Repeat(std::function<absl::Status()> issue) {
  return std::make_unique<IssuedAnew>(std::move(issue));
}

int64_t DTypeBytes(DType dtype) {
  RW_CHECK(!IsGrouped(dtype), DTypeName(dtype));
  return dtype == DType::kF32 ? 4 : 2;
}

MatrixView RowsOf(const MatrixView& view, int64_t begin, int64_t end) {
  MatrixView rows = view;
  if (!view.grouped) rows.data += begin * view.row_stride * DTypeBytes(view.dtype);
  rows.row_begin += begin;
  rows.rows = end - begin;
  return rows;
}

MatrixView ColumnsOf(const MatrixView& view, int64_t begin, int64_t end) {
  MatrixView columns = view;
  if (!view.grouped) columns.data += begin * DTypeBytes(view.dtype);
  columns.col_begin += begin;
  columns.cols = end - begin;
  return columns;
}

const char* DTypeName(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "f32";
    case DType::kF16:
      return "f16";
    case DType::kBF16:
      return "bf16";
    case DType::kInt4:
      return "int4";
    case DType::kInt8:
      return "int8";
  }
  return "unknown";
}

const char* ActivationsName(Activations activations) {
  switch (activations) {
    case Activations::kFloat:
      return "float";
    case Activations::kInt8:
      return "int8";
    case Activations::kBF16:
      return "bf16";
  }
  return "unknown";
}

std::map<std::string, Activations> ActivationsByName() {
  std::map<std::string, Activations> by_name;
  for (const Activations activations : {Activations::kFloat, Activations::kInt8, Activations::kBF16}) {
    by_name[ActivationsName(activations)] = activations;
  }
  return by_name;
}

namespace {

bool IsMatrix(const MatrixView& view) {
  if (view.rows < 0 || view.cols < 1) return false;
  if (!IsGrouped(view.dtype)) {
    return !view.grouped && view.row_stride >= view.cols && (view.rows == 0 || view.data != nullptr);
  }
  const GroupedMatrix* grouped = view.grouped;
  return grouped && grouped->bits == (view.dtype == DType::kInt4 ? 4 : 8) && grouped->group_size >= 1 &&
         view.row_begin >= 0 && view.row_begin + view.rows <= grouped->n_out && view.col_begin >= 0 &&
         view.col_begin + view.cols <= grouped->n_in;
}

bool HaveSameGroups(const MatrixView& a, const MatrixView& b) {
  return !a.grouped || (a.grouped->group_size == b.grouped->group_size &&
                        a.col_begin % a.grouped->group_size == b.col_begin % b.grouped->group_size);
}

}  // namespace

absl::StatusOr<PackedShape> CheckPack(std::span<const MatrixView> blocks, const SumTree& tree) {
  if (blocks.empty()) return absl::InvalidArgumentError("a packed matrix needs at least one block of rows");
  PackedShape shape{.n_out = 0, .n_in = blocks[0].cols, .dtype = blocks[0].dtype};
  for (const MatrixView& block : blocks) {
    if (!IsMatrix(block)) {
      return absl::InvalidArgumentError(
          absl::StrCat("not a matrix: rows=", block.rows, " cols=", block.cols, " row_stride=", block.row_stride));
    }
    if (block.cols != shape.n_in) {
      return absl::InvalidArgumentError(
          absl::StrCat("blocks of one packed matrix have n_in=", shape.n_in, " and n_in=", block.cols));
    }
    if (block.dtype != shape.dtype || !HaveSameGroups(block, blocks[0])) shape.dtype = DType::kF32;
    shape.n_out += block.rows;
  }
  if (shape.n_out == 0) return absl::InvalidArgumentError("a packed matrix needs at least one row");
  if (IsGrouped(shape.dtype)) {
    shape.group_size = blocks[0].grouped->group_size;
    shape.group_offset = static_cast<int32_t>(blocks[0].col_begin % shape.group_size);
  }
  const auto& bounds = tree.boundaries;
  const int64_t chunks = static_cast<int64_t>(bounds.size()) - 1;
  if (chunks < 1 || chunks > kMaxSumChunks || (chunks & (chunks - 1)) != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("a sum tree has 1, 2, 4, ... ", kMaxSumChunks, " chunks, not ", chunks));
  }
  if (bounds.front() != 0 || bounds.back() != shape.n_in || !std::is_sorted(bounds.begin(), bounds.end())) {
    return absl::InvalidArgumentError(
        absl::StrCat("the boundaries of a sum tree do not rise from 0 to n_in=", shape.n_in));
  }
  return shape;
}

std::vector<std::string> ActivationsFlags() {
  std::vector<std::string> flags = {kAutoActivations};
  for (const auto& [name, activations] : ActivationsByName()) flags.push_back(name);
  return flags;
}

std::optional<Activations> ActivationsOfFlag(const std::string& flag) {
  if (flag == kAutoActivations) return std::nullopt;
  return ActivationsByName().at(flag);
}

absl::StatusOr<Activations> ActivationsOf(const PackedShape& shape, Activations wanted) {
  switch (wanted) {
    case Activations::kFloat:
      break;
    case Activations::kInt8:
      if (IsGrouped(shape.dtype)) return wanted;
      break;
    case Activations::kBF16:
      if (IsGrouped(shape.dtype)) {
        return absl::InvalidArgumentError(absl::StrCat("activations bf16 are of f16 and bf16 weights, but these are ",
                                                       DTypeName(shape.dtype), ": choose float or int8"));
      }
      if (shape.dtype != DType::kF32) return wanted;
      break;
  }
  return Activations::kFloat;
}

absl::Status CheckKvShape(const KvShape& shape, int32_t block_count) {
  if (shape.n_layers < 1 || shape.n_kv_heads_local < 1 || shape.head_dim < 1 || shape.head_dim > kLargestHeadDim ||
      block_count < 1) {
    return absl::InvalidArgumentError(absl::StrCat("not a KV cache: n_layers=", shape.n_layers,
                                                   " n_kv_heads_local=", shape.n_kv_heads_local,
                                                   " head_dim=", shape.head_dim, " block_count=", block_count));
  }
  return absl::OkStatus();
}

int64_t KvVectorBytes(KvFormat format, int64_t head_dim) {
  constexpr int64_t kOnlineParameters = 4;
  switch (format) {
    case KvFormat::kF32:
      return head_dim * 4;
    case KvFormat::kF16:
      return head_dim * 2;
    case KvFormat::kInt8:
      return head_dim;
    case KvFormat::kInt8Online:
      return head_dim + kOnlineParameters;
    case KvFormat::kInt4Online:
      return (head_dim + 1) / 2 + kOnlineParameters;
  }
  return 0;
}

absl::Status CheckKvScales(const KvShape& shape, std::span<const KvChannelScales> scales) {
  if (shape.format != KvFormat::kInt8) return absl::FailedPreconditionError("KV scales belong to a static int8 cache");
  const int64_t expected = int64_t{shape.n_layers} * shape.n_kv_heads_local * shape.head_dim;
  if (static_cast<int64_t>(scales.size()) != expected) {
    return absl::InvalidArgumentError(
        absl::StrCat("got ", scales.size(), " KV scales, expected n_layers=", shape.n_layers,
                     " × n_kv_heads_local=", shape.n_kv_heads_local, " × head_dim=", shape.head_dim));
  }
  for (int64_t i = 0; i < expected; ++i) {
    const KvChannelScales& s = scales[i];
    const bool good = s.k_scale > 0 && s.v_scale > 0 && std::isfinite(s.k_scale) && std::isfinite(s.v_scale) &&
                      std::isfinite(s.k_zero_point) && std::isfinite(s.v_zero_point);
    if (!good) {
      const int64_t head = i / shape.head_dim;
      return absl::InvalidArgumentError(
          absl::StrCat("KV scales of layer ", head / shape.n_kv_heads_local, ", head ", head % shape.n_kv_heads_local,
                       ", channel ", i % shape.head_dim, " are unusable: k_scale=", s.k_scale,
                       " k_zero_point=", s.k_zero_point, " v_scale=", s.v_scale, " v_zero_point=", s.v_zero_point));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckTokens(std::span<const int32_t> tokens, const EmbeddingTable& table) {
  for (int32_t token : tokens) {
    if (token < 0 || token >= table.rows) {
      return absl::InvalidArgumentError(absl::StrCat("token ", token, " is outside the vocabulary of ", table.rows));
    }
  }
  return absl::OkStatus();
}

void CheckAttention(const AttentionShape& shape, const KvPool& pool, int layer) {
  const KvShape& kv = pool.shape();
  RW_CHECK(shape.n_kv_heads_local == kv.n_kv_heads_local && shape.head_dim == kv.head_dim,
           absl::StrCat(shape.n_kv_heads_local, " KV heads of ", shape.head_dim, " against a pool of ",
                        kv.n_kv_heads_local, " of ", kv.head_dim));
  RW_CHECK(shape.n_heads_local > 0 && shape.n_heads_local % shape.n_kv_heads_local == 0,
           absl::StrCat("n_heads_local=", shape.n_heads_local));
  RW_CHECK(layer >= 0 && layer < kv.n_layers, absl::StrCat("layer=", layer));
  RW_CHECK(shape.sliding_window >= 0, absl::StrCat("sliding_window=", shape.sliding_window));
}

void CheckRope(const AttentionShape& shape, const RopeTable& rope, const KvObservation* observation) {
  RW_CHECK(rope.rotary_dim >= 0 && rope.rotary_dim <= shape.head_dim && rope.rotary_dim % 2 == 0,
           absl::StrCat("rotary_dim=", rope.rotary_dim));
  const size_t angles = static_cast<size_t>(rope.position_count * (rope.rotary_dim / 2));
  RW_CHECK(rope.cos.size() == angles && rope.sin.size() == angles, "the rope table has another size than it says");
  if (observation == nullptr) return;
  const size_t values = static_cast<size_t>(shape.n_kv_heads_local) * shape.head_dim;
  for (const auto* v : {&observation->k_min, &observation->k_max, &observation->v_min, &observation->v_max}) {
    RW_CHECK(v->size() == values, absl::StrCat("an observation holds ", v->size(), " values, not ", values));
  }
  const size_t bins = static_cast<size_t>(shape.n_kv_heads_local) * kHistogramBins;
  for (const auto* h : {&observation->k_histogram, &observation->v_histogram}) {
    RW_CHECK(h->size() == bins, absl::StrCat("an observation holds ", h->size(), " bins, not ", bins));
  }
}

void StepIndex::Build(const StepRows& rows) {
  rows_ = rows;
  const int32_t segments = rows.segment_count();
  RW_CHECK(rows.row_begin.size() == rows.first_position.size() + 1 &&
           rows.block_table.size() == rows.first_position.size());
  RW_CHECK(rows.row_begin.front() == 0 && rows.row_begin.back() == rows.row_count());
  position_.resize(rows.tokens.size());
  segment_.resize(rows.tokens.size());
  position_end_ = block_end_ = 0;
  for (int32_t s = 0; s < segments; ++s) {
    const int32_t count = rows.row_begin[s + 1] - rows.row_begin[s];
    const int32_t end = rows.first_position[s] + count;
    RW_CHECK(count >= 0 && rows.first_position[s] >= 0 && end >= 0, absl::StrCat("segment ", s));
    if (count == 0) continue;
    const auto table = rows.block_table[s];
    const size_t blocks = static_cast<size_t>((end - 1) / kKvBlockTokens) + 1;
    RW_CHECK(table.size() >= blocks, absl::StrCat("segment ", s, " has ", table.size(), " blocks, needs ", blocks));
    for (int32_t block : table.first(blocks)) {
      RW_CHECK(block >= 0, absl::StrCat("block ", block, " of segment ", s));
      block_end_ = std::max(block_end_, block + 1);
    }
    for (int32_t i = 0; i < count; ++i) {
      position_[rows.row_begin[s] + i] = rows.first_position[s] + i;
      segment_[rows.row_begin[s] + i] = s;
    }
    position_end_ = std::max(position_end_, end);
  }
}

void StepIndex::CheckFits(const KvPool& pool) const {
  RW_CHECK(block_end_ <= pool.block_count(),
           absl::StrCat("block ", block_end_ - 1, " of a pool of ", pool.block_count()));
}

}  // namespace rankwise::kernels
