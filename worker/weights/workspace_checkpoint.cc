#include "worker/weights/workspace_checkpoint.h"

#include <algorithm>
#include <filesystem>
#include <map>
#include <optional>
#include <set>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "base/check.h"
#include "base/digest.h"
#include "base/mapped_file.h"
#include "base/status_macros.h"
#include "worker/weights/matrix_parts.h"
#include "worker/weights/turbomind_config.h"
#include "worker/weights/turbomind_int4.h"
#include "worker/weights/workspace_layout.h"

namespace rankwise::weights {
namespace {

using kernels::DType;
using kernels::MatrixView;
using shard::Range;
using shard::ShardPlan;

constexpr size_t kConfigBytesMost = 64 << 10;
constexpr size_t kManifestBytesMost = 64 << 20;
constexpr char kScalesZeros[] = "scales_zeros";

absl::Status InFile(const std::string& path, const absl::Status& status) {
  if (status.ok()) return status;
  return absl::Status(status.code(), absl::StrCat(path, ": ", std::string(status.message())));
}

// to[to_row(c) * to_stride + r] = source[r][c], in tiles that fit the first cache. Both are 16-bit words.
template <typename ToRow>
void Transpose(const MatrixView& source, uint16_t* to, int64_t to_stride, const ToRow& to_row) {
  constexpr int64_t kTile = 32;  // words of one cache line
  const auto* words = reinterpret_cast<const uint16_t*>(source.data);
  for (int64_t row = 0; row < source.rows; row += kTile) {
    const int64_t row_end = std::min(row + kTile, source.rows);
    for (int64_t col = 0; col < source.cols; col += kTile) {
      const int64_t col_end = std::min(col + kTile, source.cols);
      for (int64_t c = col; c < col_end; ++c) {
        uint16_t* line = to + to_row(c) * to_stride;
        for (int64_t r = row; r < row_end; ++r) line[r] = words[r * source.row_stride + c];
      }
    }
  }
}

class WorkspaceCheckpoint : public Checkpoint {
 public:
  absl::Status Load(const std::string& folder) {
    weights_dir_ = WorkspaceWeights(folder);
    RW_RETURN_IF_ERROR(ReadConfig());
    RW_RETURN_IF_ERROR(ReadManifest());
    RW_RETURN_IF_ERROR(Map(OuterFiles(config_, tp_, dtype_)));
    for (int layer = 0; layer < config_.n_layers; ++layer) {
      RW_RETURN_IF_ERROR(Map(LayerFiles(config_, tp_, layer, dtype_)));
    }
    if (manifest_ && manifest_->files.size() != files_.size()) {
      return Refuse("manifest.json", absl::StrCat("lists ", manifest_->files.size(),
                                                  " files, the model in config.ini has ", files_.size()));
    }
    fingerprint_ = manifest_ ? manifest_->fingerprint : OwnFingerprint();
    return absl::OkStatus();
  }

  const ModelConfig& config() const override { return config_; }
  const std::string& fingerprint() const override { return fingerprint_; }
  KvAdvice kv_advice() const override { return {.format = is_int8_kv_ ? "int8" : "f16", .scales_dir = weights_dir_}; }

  // A workspace cut again keeps its dtype.
  std::string FingerprintAs(DType dtype) const override {
    RW_CHECK(dtype == dtype_);
    return fingerprint_;
  }

  absl::Status Verify(const ShardPlan& plan) const override {
    for (const std::string& name : FilesOf(plan)) {
      if (manifest_) RW_RETURN_IF_ERROR(CheckDigest(name));
      if (!absl::EndsWith(name, kScalesZeros)) continue;
      const absl::Status sound = CheckScalesZeros(Int4(std::string(absl::StripSuffix(name, kScalesZeros))));
      if (!sound.ok()) return Refuse(name, absl::StrCat("is none of layout 0.2: ", std::string(sound.message())));
    }
    return absl::OkStatus();
  }

  LayerWeights Layer(int layer, const ShardPlan& plan) const override {
    const std::string prefix = absl::StrCat("layers.", layer, ".");
    LayerWeights weights;
    weights.attention_norm = Floats(Tensor(prefix + "attention_norm.weight"));
    weights.mlp_norm = Floats(Tensor(prefix + "ffn_norm.weight"));
    for (const QkvPart& part : QkvParts(plan)) {
      const std::string qkv = prefix + "attention.w_qkv";
      weights.qkv.push_back(ByColumns(qkv, part, weights));
      if (config_.has_qkv_bias) AppendBias(qkv, part, weights.qkv_bias);
    }
    weights.wo = ByRows(prefix + "attention.wo", {plan.heads, config_.n_heads, config_.head_dim}, weights);
    if (config_.has_o_bias) weights.wo_bias = OutputBias(prefix, plan);
    const Part inner{plan.intermediate, config_.intermediate_size, 1};
    if (IsInt4()) {
      for (const int64_t half : {0, 1}) {
        const QkvPart columns{inner, /*offset=*/half, /*is_rotated=*/false, /*stride=*/2};
        weights.gate_up.push_back(ByColumns(prefix + "feed_forward.w13", columns, weights));
      }
    } else {
      for (const char* half : {"w1", "w3"}) {
        weights.gate_up.push_back(ByColumns(absl::StrCat(prefix, "feed_forward.", half), {inner}, weights));
      }
    }
    weights.w2 = ByRows(prefix + "feed_forward.w2", inner, weights);
    return weights;
  }

  OuterWeights Outer(const ShardPlan& plan) const override {
    return {.embedding = RowsOf(Tensor("tok_embeddings.weight"), {0, config_.vocab_size}),
            .final_norm = Floats(Tensor("norm.weight")),
            .output = RowsOf(Tensor("output.weight"), plan.vocab)};
  }

 private:
  struct File {
    MappedFile mapping;
    MatrixView tensor;  // a vector is one row
  };
  // Units (heads, or single rows and columns) of `width` that a rank owns of the model's `count`.
  struct Part {
    Range units;
    int64_t count = 0, width = 1;
  };
  struct QkvPart : Part {
    int64_t offset = 0;  // of the first column in every file
    bool is_rotated = false;
    int64_t stride = 1;  // from column to column
  };
  // The units of a part that lie in one file.
  struct Piece {
    int64_t file = 0;
    Range units;         // of the file's own
    int64_t offset = 0;  // of the first one in the part
  };

  absl::Status Refuse(const std::string& name, const std::string& complaint) const {
    return absl::FailedPreconditionError(
        absl::StrCat(weights_dir_, "/", name, " ", complaint, "; `rankwise convert` writes a workspace"));
  }

  bool IsInt4() const { return config_.weight_bits == 4; }

  absl::Status ReadConfig() {
    const std::string path = weights_dir_ + "/config.ini";
    RW_ASSIGN_OR_RETURN(const std::string text, ReadTextFile(path, kConfigBytesMost));
    const absl::StatusOr<TurbomindConfig> parsed = ParseTurbomindConfig(text);
    RW_RETURN_IF_ERROR(InFile(path, parsed.status()));
    config_ = parsed->ToModel();
    tp_ = static_cast<int>(parsed->tensor_para_size);
    RW_RETURN_IF_ERROR(InFile(path, CheckInt4Files(config_, tp_)));
    dtype_ = parsed->weight_type == "bf16" ? DType::kBF16 : DType::kF16;
    is_int8_kv_ = parsed->quant_policy == 4;
    return absl::OkStatus();
  }

  absl::Status ReadManifest() {
    const std::string path = weights_dir_ + "/manifest.json";
    const absl::StatusOr<std::string> text = ReadTextFile(path, kManifestBytesMost);
    if (absl::IsNotFound(text.status())) return absl::OkStatus();
    RW_RETURN_IF_ERROR(text.status());
    absl::StatusOr<WorkspaceManifest> manifest = ParseManifest(*text);
    RW_RETURN_IF_ERROR(InFile(path, manifest.status()));
    manifest_ = *std::move(manifest);
    if (manifest_->config != ConfigDigest(config_) || manifest_->tp != tp_ || manifest_->dtype != dtype_) {
      return Refuse("config.ini", "was altered: it describes another model than manifest.json");
    }
    config_.eos_ids = manifest_->eos_ids;
    const auto is_id = [this](int32_t id) { return id < config_.vocab_size; };
    if (std::ranges::all_of(config_.eos_ids, is_id)) return absl::OkStatus();
    return Refuse("manifest.json", absl::StrCat("has eos_ids beyond vocab_size=", config_.vocab_size));
  }

  absl::Status Map(const std::vector<WorkspaceFile>& files) {
    for (const WorkspaceFile& file : files) {
      RW_ASSIGN_OR_RETURN(MappedFile mapping, MappedFile::Open(absl::StrCat(weights_dir_, "/", file.name)));
      const auto size = static_cast<int64_t>(mapping.bytes().size());
      if (size != file.bytes()) {
        return Refuse(file.name, absl::StrCat("has ", size, " bytes instead of ", file.bytes()));
      }
      if (manifest_) RW_RETURN_IF_ERROR(CheckListed(file));
      const int64_t cols = file.shape.back();
      const MatrixView tensor{.data = mapping.bytes().data(),
                              .dtype = file.dtype,
                              .rows = file.shape.size() == 2 ? file.shape[0] : 1,
                              .cols = cols,
                              .row_stride = cols};
      files_.emplace(file.name, File{std::move(mapping), tensor});
    }
    return absl::OkStatus();
  }

  absl::Status CheckListed(const WorkspaceFile& file) const {
    const auto listed = manifest_->files.find(file.name);
    if (listed == manifest_->files.end()) return Refuse(file.name, "is not in manifest.json");
    const WorkspaceManifest::File& entry = listed->second;
    if (entry.shape == file.shape && entry.bytes == file.bytes() && entry.dtype == file.dtype) return absl::OkStatus();
    return Refuse("manifest.json", absl::StrCat("gives ", file.name, " another shape, size or dtype than config.ini"));
  }

  absl::Status CheckDigest(const std::string& name) const {
    const std::span<const std::byte> bytes = files_.at(name).mapping.bytes();
    const std::string digest = Digest({reinterpret_cast<const char*>(bytes.data()), bytes.size()});
    const std::string& expected = manifest_->files.at(name).xxh3;
    if (digest == expected) return absl::OkStatus();
    return Refuse(name, absl::StrCat("was altered: its xxh3 is ", digest, ", manifest.json says ", expected));
  }

  // Of the files' own names and content samples: the orientation, and tp, are part of it.
  std::string OwnFingerprint() const {
    DigestStream digest;
    digest.Add(absl::StrCat(ConfigDigest(config_), " ", kernels::DTypeName(dtype_)));
    for (const auto& [name, file] : files_) {
      digest.Add(absl::StrCat("\n", name, " ", file.mapping.bytes().size(), " "));
      digest.AddEnds(file.mapping.bytes());
    }
    return digest.Finish();
  }

  std::set<std::string> FilesOf(const ShardPlan& plan) const {
    std::set<std::string> names;
    const auto add_matrix = [&](const std::string& name, int64_t file) {
      if (!IsInt4()) names.insert(FileName(name, file, "weight"));
      if (IsInt4()) names.insert({FileName(name, file, "qweight"), FileName(name, file, kScalesZeros)});
    };
    for (const WorkspaceFile& file : OuterFiles(config_, tp_, dtype_)) names.insert(file.name);
    for (int layer = 0; layer < config_.n_layers; ++layer) {
      const std::string prefix = absl::StrCat("layers.", layer, ".");
      names.insert({prefix + "attention_norm.weight", prefix + "ffn_norm.weight"});
      for (const Piece& piece : Pieces({plan.heads, config_.n_heads})) {
        for (const char* name : {"attention.w_qkv", "attention.wo"}) {
          add_matrix(prefix + name, piece.file);
          if (config_.has_qkv_bias) names.insert(FileName(prefix + name, piece.file, "bias"));
        }
      }
      for (const Piece& piece : Pieces({plan.intermediate, config_.intermediate_size})) {
        add_matrix(prefix + "feed_forward.w2", piece.file);
        for (const char* name : IsInt4() ? std::vector{"w13"} : std::vector{"w1", "w3"}) {
          add_matrix(absl::StrCat(prefix, "feed_forward.", name), piece.file);
        }
      }
    }
    return names;
  }

  static std::string FileName(const std::string& name, int64_t file, const char* kind) {
    return absl::StrCat(name, ".", file, ".", kind);
  }

  const MatrixView& Tensor(const std::string& name) const {
    const auto found = files_.find(name);
    RW_CHECK(found != files_.end(), name);
    return found->second.tensor;
  }

  std::vector<Piece> Pieces(const Part& part) const {
    const int64_t per_file = part.count / tp_;
    std::vector<Piece> pieces;
    for (int64_t file = part.units.begin / per_file; file * per_file < part.units.end; ++file) {
      const int64_t first = file * per_file;
      const Range units{std::max(part.units.begin, first), std::min(part.units.end, first + per_file)};
      pieces.push_back({file, {units.begin - first, units.end - first}, units.begin - part.units.begin});
    }
    return pieces;
  }

  std::vector<QkvPart> QkvParts(const ShardPlan& plan) const {
    const int64_t dim = config_.head_dim, q = config_.n_heads / tp_ * dim, kv = config_.n_kv_heads / tp_ * dim;
    return {{{plan.heads, config_.n_heads, dim}, 0, true},
            {{plan.kv_heads, config_.n_kv_heads, dim}, q, true},
            {{plan.kv_heads, config_.n_kv_heads, dim}, q + kv, false}};
  }

  // A column of a part, in a file's order, to the row of the matrix it becomes.
  static int64_t RowOfColumn(const QkvPart& part, int64_t column) {
    if (!part.is_rotated) return column;
    return column / part.width * part.width + RopeSource(column % part.width, part.width);
  }

  static Range Columns(const QkvPart& part, const Piece& piece) {
    return {part.offset + piece.units.begin * part.width, part.offset + piece.units.end * part.width};
  }

  MatrixView Buffer(int64_t rows, int64_t cols, LayerWeights& weights) const {
    weights.buffers.push_back(std::make_unique_for_overwrite<uint16_t[]>(rows * cols));
    return {.data = reinterpret_cast<const std::byte*>(weights.buffers.back().get()),
            .dtype = dtype_,
            .rows = rows,
            .cols = cols,
            .row_stride = cols};
  }

  // Files [hidden, columns of all parts] to [the part's rows, hidden].
  MatrixView ByColumns(const std::string& name, const QkvPart& part, LayerWeights& weights) const {
    if (IsInt4()) return Int4ByColumns(name, part, weights);
    const MatrixView matrix = Buffer(part.units.count() * part.width, config_.hidden_size, weights);
    uint16_t* words = weights.buffers.back().get();
    for (const Piece& piece : Pieces(part)) {
      Transpose(ColumnsOf(Tensor(FileName(name, piece.file, "weight")), Columns(part, piece)),
                words + piece.offset * part.width * matrix.row_stride, matrix.row_stride,
                [&part](int64_t column) { return RowOfColumn(part, column); });
    }
    return matrix;
  }

  // Files [the part's rows, hidden] to [hidden, the part's columns].
  MatrixView ByRows(const std::string& name, const Part& part, LayerWeights& weights) const {
    if (IsInt4()) return Int4ByRows(name, part, weights);
    const MatrixView matrix = Buffer(config_.hidden_size, part.units.count() * part.width, weights);
    uint16_t* words = weights.buffers.back().get();
    for (const Piece& piece : Pieces(part)) {
      const Range rows{piece.units.begin * part.width, piece.units.end * part.width};
      Transpose(RowsOf(Tensor(FileName(name, piece.file, "weight")), rows), words + piece.offset * part.width,
                matrix.row_stride, [](int64_t column) { return column; });
    }
    return matrix;
  }

  // The two files `stem`.….
  Int4Files Int4(const std::string& stem) const {
    const MatrixView& qweight = Tensor(stem + "qweight");
    return {.qweight = qweight.data,
            .scales_zeros = Tensor(stem + kScalesZeros).data,
            .n_in = qweight.rows,
            .n_out = qweight.cols,
            .group_size = config_.weight_group_size};
  }

  // Rows, and with them outputs, are padded to whole words.
  GroupedWords& Int4Buffer(int64_t rows, int64_t cols, LayerWeights& weights) const {
    weights.grouped_buffers.push_back(
        std::make_unique<GroupedWords>((rows + 7) / 8 * 8, cols, 4, config_.weight_group_size));
    return *weights.grouped_buffers.back();
  }

  MatrixView Int4ByColumns(const std::string& name, const QkvPart& part, LayerWeights& weights) const {
    const int64_t rows = part.units.count() * part.width;
    GroupedWords& matrix = Int4Buffer(rows, config_.hidden_size, weights);
    for (const Piece& piece : Pieces(part)) {
      std::vector<OutputMove> moves;
      for (int64_t i = 0; i < piece.units.count() * part.width; ++i) {
        moves.push_back({.from = part.offset + (piece.units.begin * part.width + i) * part.stride,
                         .to = piece.offset * part.width + RowOfColumn(part, i)});
      }
      CopyInt4(Int4(FileName(name, piece.file, "")), {0, config_.hidden_size}, moves, matrix, 0);
    }
    return {.dtype = DType::kInt4, .rows = rows, .cols = config_.hidden_size, .grouped = &matrix.matrix};
  }

  // From the beginning of the group in which the rank's slice begins to the end of that in which it ends.
  MatrixView Int4ByRows(const std::string& name, const Part& part, LayerWeights& weights) const {
    const int64_t group = config_.weight_group_size;
    const Range inputs{part.units.begin * part.width, part.units.end * part.width};
    const int64_t skipped = inputs.begin % group, cols = (skipped + inputs.count() + group - 1) / group * group;
    GroupedWords& matrix = Int4Buffer(config_.hidden_size, cols, weights);
    std::vector<OutputMove> moves;
    for (int64_t i = 0; i < config_.hidden_size; ++i) moves.push_back({i, i});
    for (const Piece& piece : Pieces(part)) {
      const Range rows{piece.units.begin * part.width, piece.units.end * part.width};
      CopyInt4(Int4(FileName(name, piece.file, "")), rows, moves, matrix, skipped + piece.offset * part.width);
    }
    return {.dtype = DType::kInt4,
            .rows = config_.hidden_size,
            .cols = inputs.count(),
            .grouped = &matrix.matrix,
            .col_begin = skipped};
  }

  void AppendBias(const std::string& name, const QkvPart& part, std::vector<float>& bias) const {
    for (const Piece& piece : Pieces(part)) {
      const std::vector<float> values =
          Floats(ColumnsOf(Tensor(FileName(name, piece.file, "bias")), Columns(part, piece)));
      const size_t begin = bias.size();
      bias.resize(begin + values.size());
      for (size_t i = 0; i < values.size(); ++i) {
        bias[begin + RowOfColumn(part, static_cast<int64_t>(i))] = values[i];
      }
    }
  }

  // Whole in every file. attn_bias promises one to models that have none (Qwen), which then is 0.
  std::vector<float> OutputBias(const std::string& prefix, const ShardPlan& plan) const {
    const int64_t file = Pieces({plan.heads, config_.n_heads}).front().file;
    std::vector<float> bias = Floats(Tensor(FileName(prefix + "attention.wo", file, "bias")));
    if (std::ranges::all_of(bias, [](float value) { return value == 0; })) bias.clear();
    return bias;
  }

  std::string weights_dir_;
  ModelConfig config_;
  int tp_ = 1;  // that the files are cut for
  DType dtype_ = DType::kF16;
  bool is_int8_kv_ = false;
  std::optional<WorkspaceManifest> manifest_;
  std::map<std::string, File> files_;
  std::string fingerprint_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Checkpoint>> OpenWorkspace(const std::string& folder) {
  auto checkpoint = std::make_unique<WorkspaceCheckpoint>();
  RW_RETURN_IF_ERROR(checkpoint->Load(folder));
  return checkpoint;
}

}  // namespace rankwise::weights
