#include "worker/weights/workspace.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <span>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/digest.h"
#include "base/mapped_file.h"
#include "base/status_macros.h"
#include "worker/weights/matrix_parts.h"
#include "worker/weights/model_folder.h"
#include "worker/weights/turbomind_config.h"
#include "worker/weights/turbomind_int4.h"
#include "worker/weights/workspace_layout.h"

namespace rankwise::weights {
namespace {

using kernels::DType;
using kernels::MatrixView;

class Writer {
 public:
  Writer(const Checkpoint& checkpoint, std::string folder, const WorkspaceOptions& options,
         const std::function<void(int64_t, int64_t)>& progress)
      : checkpoint_(checkpoint),
        config_(checkpoint.config()),
        folder_(std::move(folder)),
        options_(options),
        progress_(progress) {}

  absl::Status WriteAll() {
    RW_ASSIGN_OR_RETURN(const shard::ShardPlan whole, shard::PlanShard(config_.dims(), {.rank = 0, .world_size = 1}));
    const OuterWeights outer = checkpoint_.Outer(whole);
    dtype_ = !IsInt4() && outer.embedding.dtype == DType::kBF16 ? DType::kBF16 : DType::kF16;
    Plan(OuterFiles(config_, options_.world_size, dtype_));
    for (int layer = 0; layer < config_.n_layers; ++layer) {
      Plan(LayerFiles(config_, options_.world_size, layer, dtype_));
    }
    RW_RETURN_IF_ERROR(WritePaddedVocabulary("tok_embeddings.weight", outer.embedding));
    RW_RETURN_IF_ERROR(WriteVector("norm.weight", outer.final_norm));
    RW_RETURN_IF_ERROR(WritePaddedVocabulary("output.weight", outer.output));
    for (int layer = 0; layer < config_.n_layers; ++layer) {
      for (int rank = 0; rank < options_.world_size; ++rank) RW_RETURN_IF_ERROR(WriteLayer(layer, rank));
    }
    RW_CHECK(written_bytes_ == total_bytes_);
    RW_RETURN_IF_ERROR(WriteConfig());
    return WriteManifest();
  }

 private:
  bool IsInt4() const { return config_.weight_bits == 4; }

  void Plan(const std::vector<WorkspaceFile>& files) {
    for (const WorkspaceFile& file : files) {
      manifest_.files[file.name] = {.shape = file.shape, .bytes = file.bytes(), .dtype = file.dtype};
      total_bytes_ += file.bytes();
    }
  }

  absl::Status WriteConfig() const {
    TurbomindConfig config = FromModel(config_);
    config.model_name = options_.model_name;
    config.tensor_para_size = options_.world_size;
    if (dtype_ == DType::kBF16) config.weight_type = "bf16";
    return WriteFileAtomically(absl::StrCat(folder_, "/config.ini"), FormatTurbomindConfig(config));
  }

  absl::Status WriteManifest() {
    manifest_.fingerprint = checkpoint_.FingerprintAs(dtype_);
    manifest_.config = ConfigDigest(config_);
    manifest_.tp = options_.world_size;
    manifest_.dtype = dtype_;
    manifest_.eos_ids = config_.eos_ids;
    return WriteFileAtomically(absl::StrCat(folder_, "/manifest.json"), FormatManifest(manifest_));
  }

  absl::Status WriteFloats(const std::string& name, const std::vector<uint16_t>& words) {
    const uint16_t exponent = dtype_ == DType::kBF16 ? 0x7F80 : 0x7C00;
    if (std::ranges::any_of(words, [exponent](uint16_t word) { return (word & exponent) == exponent; })) {
      return absl::OutOfRangeError(
          absl::StrCat(name, " would hold values that ", kernels::DTypeName(dtype_), " cannot"));
    }
    return Write(name, std::as_bytes(std::span(words)));
  }

  absl::Status Write(const std::string& name, std::span<const std::byte> content) {
    const auto* data = reinterpret_cast<const char*>(content.data());
    const auto bytes = static_cast<int64_t>(content.size());
    const auto listed = manifest_.files.find(name);
    RW_CHECK(listed != manifest_.files.end() && listed->second.bytes == bytes && listed->second.xxh3.empty(), name);
    listed->second.xxh3 = Digest({data, content.size()});
    const std::string path = absl::StrCat(folder_, "/", name);
    std::ofstream file(path, std::ios::binary | std::ios::trunc);
    file.write(data, bytes);
    file.close();
    if (!file) return absl::InternalError(absl::StrCat("cannot write ", path));
    written_bytes_ += bytes;
    if (progress_) progress_(written_bytes_, total_bytes_);
    return absl::OkStatus();
  }

  absl::Status WriteVector(const std::string& name, const std::vector<float>& values) {
    std::vector<uint16_t> words;
    words.reserve(values.size());
    for (const float value : values) words.push_back(RoundTo16(value, dtype_));
    return WriteFloats(name, words);
  }

  absl::Status WritePaddedVocabulary(const std::string& name, const MatrixView& view) {
    std::vector<uint16_t> words(manifest_.files.at(name).bytes / sizeof(uint16_t), 0);
    for (int64_t row = 0; row < view.rows; ++row) {
      for (int64_t col = 0; col < view.cols; ++col) words[row * view.cols + col] = WordAt(view, row, col, dtype_);
    }
    return WriteFloats(name, words);
  }

  // The rows of stacked blocks, row order(i) first to last.
  template <typename Order>
  static std::vector<MatrixView> Rows(std::span<const MatrixView> blocks, const Order& order) {
    std::vector<MatrixView> rows, ordered;
    for (const MatrixView& block : blocks) {
      for (int64_t row = 0; row < block.rows; ++row) rows.push_back(RowsOf(block, {row, row + 1}));
    }
    for (size_t i = 0; i < rows.size(); ++i) ordered.push_back(rows[order(static_cast<int64_t>(i))]);
    return ordered;
  }

  // Files `stem`.…, in which rows[i] is output column i.
  absl::Status WriteMatrix(const std::string& stem, const std::vector<MatrixView>& rows) {
    if (!IsInt4()) return WriteTransposed(stem + ".weight", rows);
    const Int4Words words = ToTurbomindInt4(rows);
    RW_RETURN_IF_ERROR(Write(stem + ".qweight", std::as_bytes(std::span(words.qweight))));
    return WriteFloats(stem + ".scales_zeros", words.scales_zeros);
  }

  // [n_out, n_in] to [n_in, n_out].
  absl::Status WriteTransposed(const std::string& name, const std::vector<MatrixView>& rows) {
    constexpr int64_t kTile = 32;  // words of one cache line
    const int64_t n_in = rows.front().cols, n_out = static_cast<int64_t>(rows.size());
    std::vector<uint16_t> words(n_in * n_out);
    for (int64_t tile = 0; tile < n_out; tile += kTile) {
      const int64_t end = std::min(tile + kTile, n_out);
      for (int64_t in = 0; in < n_in; ++in) {
        for (int64_t out = tile; out < end; ++out) words[in * n_out + out] = WordAt(rows[out], 0, in, dtype_);
      }
    }
    return WriteFloats(name, words);
  }

  absl::Status WriteLayer(int layer, int rank) {
    RW_ASSIGN_OR_RETURN(const shard::ShardPlan plan,
                        shard::PlanShard(config_.dims(), {.rank = rank, .world_size = options_.world_size}));
    const LayerWeights weights = checkpoint_.Layer(layer, plan);
    const int64_t dim = config_.head_dim;
    const int64_t rotated = (plan.heads.count() + plan.kv_heads.count()) * dim;
    const auto rope_order = [&](int64_t i) { return i < rotated ? i / dim * dim + RopeSource(i % dim, dim) : i; };
    const auto same_order = [](int64_t i) { return i; };
    const std::string prefix = absl::StrCat("layers.", layer, ".");
    const auto stem = [&](const char* name) { return absl::StrCat(prefix, name, ".", rank); };

    if (rank == 0) {
      RW_RETURN_IF_ERROR(WriteVector(prefix + "attention_norm.weight", weights.attention_norm));
      RW_RETURN_IF_ERROR(WriteVector(prefix + "ffn_norm.weight", weights.mlp_norm));
    }
    RW_RETURN_IF_ERROR(WriteMatrix(stem("attention.w_qkv"), Rows(weights.qkv, rope_order)));
    RW_RETURN_IF_ERROR(WriteMatrix(stem("attention.wo"), Rows(std::span(&weights.wo, 1), same_order)));
    if (config_.has_qkv_bias) {
      std::vector<float> bias(weights.qkv_bias.size());
      for (size_t i = 0; i < bias.size(); ++i) bias[i] = weights.qkv_bias[rope_order(static_cast<int64_t>(i))];
      RW_RETURN_IF_ERROR(WriteVector(stem("attention.w_qkv") + ".bias", bias));
      // attn_bias promises a bias of wo too.
      const std::vector<float> none(config_.hidden_size, 0);
      RW_RETURN_IF_ERROR(WriteVector(stem("attention.wo") + ".bias", weights.wo_bias.empty() ? none : weights.wo_bias));
    }
    const std::span<const MatrixView> gate_up = weights.gate_up;
    if (IsInt4()) {
      const auto alternating = [inner = plan.intermediate.count()](int64_t i) { return i % 2 * inner + i / 2; };
      RW_RETURN_IF_ERROR(WriteMatrix(stem("feed_forward.w13"), Rows(gate_up, alternating)));
    } else {
      RW_RETURN_IF_ERROR(WriteMatrix(stem("feed_forward.w1"), Rows(gate_up.subspan(0, 1), same_order)));
      RW_RETURN_IF_ERROR(WriteMatrix(stem("feed_forward.w3"), Rows(gate_up.subspan(1, 1), same_order)));
    }
    return WriteMatrix(stem("feed_forward.w2"), Rows(std::span(&weights.w2, 1), same_order));
  }

  const Checkpoint& checkpoint_;
  const ModelConfig& config_;
  const std::string folder_;
  const WorkspaceOptions& options_;
  const std::function<void(int64_t, int64_t)>& progress_;
  DType dtype_ = DType::kF16;
  WorkspaceManifest manifest_;  // planned files have no xxh3 until they are written
  int64_t total_bytes_ = 0, written_bytes_ = 0;
};

absl::Status CheckRepresentable(const ModelConfig& config, int world_size) {
  const auto refuse = [](const auto&... parts) {
    return absl::UnimplementedError(absl::StrCat("a TurboMind 0.2 workspace has no ", parts...));
  };
  if (config.weight_bits == 8) return refuse("weights of 8 bits; serve the model folder");
  if (config.has_qk_norm) return refuse("q/k norms");
  if (config.has_mlp_bias) return refuse("MLP biases");
  if (config.has_o_bias && !config.has_qkv_bias) return refuse("bias of wo without those of q, k and v");
  if (config.hidden_size != int64_t{config.n_heads} * config.head_dim) {
    return refuse("hidden_size=", config.hidden_size, " that is not n_heads=", config.n_heads,
                  " times head_dim=", config.head_dim);
  }
  for (const int32_t window : config.sliding_window) {
    if (window != 0) return refuse("sliding_window=", window);
  }
  if (config.rope.scaling != RopeConfig::Scaling::kNone && config.rope.scaling != RopeConfig::Scaling::kDynamicNtk) {
    return refuse("RoPE scaling but dynamic");
  }
  if (config.rope.rotary_dim != config.head_dim) {
    return refuse("partly rotated heads: ", config.rope.rotary_dim, " of head_dim=", config.head_dim);
  }
  if (world_size < 1 || config.n_kv_heads % world_size != 0 || config.intermediate_size % world_size != 0) {
    return refuse("tp=", world_size, " that does not divide n_kv_heads=", config.n_kv_heads,
                  " and intermediate_size=", config.intermediate_size);
  }
  return CheckInt4Files(config, world_size);
}

absl::Status Fill(const Checkpoint& checkpoint, const std::string& model_dir, const std::string& folder,
                  const WorkspaceOptions& options, const std::function<void(int64_t, int64_t)>& progress) {
  std::error_code error;
  for (const std::string& part : {WorkspaceWeights(folder), WorkspaceTokenizer(folder)}) {
    std::filesystem::create_directories(part, error);
    if (error) return absl::InternalError(absl::StrCat("cannot create ", part, ": ", error.message()));
  }
  RW_RETURN_IF_ERROR(Writer(checkpoint, WorkspaceWeights(folder), options, progress).WriteAll());
  return CopyTokenizerFiles(IsWorkspace(model_dir) ? WorkspaceTokenizer(model_dir) : model_dir,
                            WorkspaceTokenizer(folder));
}

}  // namespace

absl::Status WriteWorkspace(const Checkpoint& checkpoint, const std::string& model_dir, const std::string& destination,
                            const WorkspaceOptions& options, const std::function<void(int64_t, int64_t)>& progress) {
  RW_RETURN_IF_ERROR(CheckRepresentable(checkpoint.config(), options.world_size));
  if (options.model_name.find_first_of("\r\n") != std::string::npos) {
    return absl::InvalidArgumentError("model_name has more than one line");
  }
  return WriteFolder(destination, {.replaces = options.replaces, .marker = kWorkspaceConfig},
                     [&](const std::string& folder) { return Fill(checkpoint, model_dir, folder, options, progress); });
}

}  // namespace rankwise::weights
