#include "worker/weights/workspace.h"

#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <span>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/mapped_file.h"
#include "base/status_macros.h"

namespace rankwise::weights {
namespace {

namespace fs = std::filesystem;
using kernels::DType;
using kernels::MatrixView;

float ToFloat(const std::byte* source) {
  float value = 0;
  std::memcpy(&value, source, sizeof value);
  return value;
}

uint16_t ToF16(float value) {
  const auto half = static_cast<_Float16>(value);
  uint16_t bits = 0;
  std::memcpy(&bits, &half, sizeof bits);
  return bits;
}

uint16_t ToBf16(float value) {
  uint32_t bits = 0;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

// Position in a head of TurboMind's order → dimension in Hugging Face's.
int64_t RopeSource(int64_t position, int64_t head_dim) { return position / 2 + (position % 2) * (head_dim / 2); }

class Writer {
 public:
  Writer(const Checkpoint& checkpoint, std::string folder, const WorkspaceOptions& options,
         const std::function<void(int64_t, int64_t)>& progress)
      : checkpoint_(checkpoint),
        config_(checkpoint.config()),
        folder_(std::move(folder)),
        options_(options),
        progress_(progress) {}

  absl::Status WriteWeights() {
    RW_ASSIGN_OR_RETURN(const shard::ShardPlan whole, shard::PlanShard(config_.dims(), {.rank = 0, .world_size = 1}));
    const OuterWeights outer = checkpoint_.Outer(whole);
    is_bf16_ = outer.embedding.dtype == DType::kBF16;
    vocab_padded_ = (config_.vocab_size + options_.world_size - 1) / options_.world_size * options_.world_size;
    total_bytes_ = ExpectedBytes();
    RW_RETURN_IF_ERROR(WritePaddedVocabulary("tok_embeddings.weight", outer.embedding));
    RW_RETURN_IF_ERROR(WriteVector("norm.weight", outer.final_norm));
    RW_RETURN_IF_ERROR(WritePaddedVocabulary("output.weight", outer.output));
    for (int layer = 0; layer < config_.n_layers; ++layer) {
      for (int rank = 0; rank < options_.world_size; ++rank) RW_RETURN_IF_ERROR(WriteLayer(layer, rank));
    }
    return absl::OkStatus();
  }

  absl::Status WriteConfig() const {
    std::string ini = "[llama]\n";
    const auto put = [&ini](const char* key, const auto& value) { absl::StrAppend(&ini, key, " = ", value, "\n"); };
    const bool is_dynamic = config_.rope.scaling == RopeConfig::Scaling::kDynamicNtk;
    put("model_name", options_.model_name);
    put("tensor_para_size", options_.world_size);
    put("head_num", config_.n_heads);
    put("kv_head_num", config_.n_kv_heads);
    put("vocab_size", config_.vocab_size);
    put("num_layer", config_.n_layers);
    put("inter_size", config_.intermediate_size);
    put("norm_eps", config_.rms_norm_eps);
    put("attn_bias", static_cast<int>(config_.has_qkv_bias || config_.has_o_bias));
    put("start_id", config_.bos_id);
    put("end_id", config_.eos_ids.empty() ? -1 : config_.eos_ids.front());
    put("session_len", config_.max_position + 8);
    put("weight_type", is_bf16_ ? "bf16" : "fp16");
    put("rotary_embedding", config_.rope.rotary_dim);
    put("rope_theta", config_.rope.theta);
    put("size_per_head", config_.head_dim);
    put("group_size", 0);
    put("max_batch_size", 64);
    put("max_context_token_num", 1);
    put("step_length", 1);
    put("cache_max_entry_count", 0.5);
    put("cache_block_seq_len", 128);
    put("cache_chunk_size", -1);
    put("num_tokens_per_iter", 0);
    put("max_prefill_iters", 1);
    put("extra_tokens_per_iter", 0);
    put("use_context_fmha", 1);
    put("quant_policy", 0);
    put("max_position_embeddings", config_.max_position);
    put("rope_scaling_factor", is_dynamic ? config_.rope.factor : 0.0);
    put("use_logn_attn", 0);
    return WriteFileAtomically(absl::StrCat(folder_, "/config.ini"), ini);
  }

 private:
  int64_t ExpectedBytes() const {
    const int64_t heads = config_.n_heads, kv_heads = config_.n_kv_heads, dim = config_.head_dim;
    const int64_t per_layer = config_.hidden_size * ((2 * heads + 2 * kv_heads) * dim + 3 * config_.intermediate_size);
    return 2 * (2 * vocab_padded_ * config_.hidden_size + config_.n_layers * per_layer);
  }

  uint16_t Word(const MatrixView& view, int64_t row, int64_t col) const {
    const std::byte* source = view.data + (row * view.row_stride + col) * kernels::DTypeBytes(view.dtype);
    if (view.dtype == DType::kF32) return is_bf16_ ? ToBf16(ToFloat(source)) : ToF16(ToFloat(source));
    uint16_t word = 0;
    std::memcpy(&word, source, sizeof word);
    if ((view.dtype == DType::kBF16) == is_bf16_) return word;
    if (view.dtype == DType::kF16) {
      _Float16 half{};
      std::memcpy(&half, &word, sizeof half);
      return ToBf16(static_cast<float>(half));
    }
    const uint32_t bits = uint32_t{word} << 16;
    float value = 0;
    std::memcpy(&value, &bits, sizeof value);
    return ToF16(value);
  }

  absl::Status Write(const std::string& name, const std::vector<uint16_t>& words) {
    const std::string path = absl::StrCat(folder_, "/", name);
    std::ofstream file(path, std::ios::binary | std::ios::trunc);
    const auto bytes = static_cast<int64_t>(words.size() * sizeof(uint16_t));
    file.write(reinterpret_cast<const char*>(words.data()), bytes);
    file.close();
    if (!file) return absl::InternalError(absl::StrCat("cannot write ", path));
    written_bytes_ += bytes;
    if (progress_) progress_(std::min(written_bytes_, total_bytes_), total_bytes_);
    return absl::OkStatus();
  }

  absl::Status WriteVector(const std::string& name, const std::vector<float>& values) {
    std::vector<uint16_t> words;
    words.reserve(values.size());
    for (const float value : values) words.push_back(is_bf16_ ? ToBf16(value) : ToF16(value));
    return Write(name, words);
  }

  absl::Status WritePaddedVocabulary(const std::string& name, const MatrixView& view) {
    std::vector<uint16_t> words(vocab_padded_ * config_.hidden_size, 0);
    for (int64_t row = 0; row < view.rows; ++row) {
      for (int64_t col = 0; col < view.cols; ++col) words[row * view.cols + col] = Word(view, row, col);
    }
    return Write(name, words);
  }

  // Stacked row blocks [Σ rows, n_in], transposed to [n_in, Σ rows]; output column i is source row order(i).
  template <typename Order>
  absl::Status WriteTransposed(const std::string& name, std::span<const MatrixView> blocks, const Order& order) {
    int64_t n_out = 0;
    for (const MatrixView& block : blocks) n_out += block.rows;
    const int64_t n_in = blocks.front().cols;
    std::vector<std::pair<const MatrixView*, int64_t>> rows;
    rows.reserve(n_out);
    for (const MatrixView& block : blocks) {
      for (int64_t row = 0; row < block.rows; ++row) rows.emplace_back(&block, row);
    }
    std::vector<uint16_t> words(n_in * n_out);
    for (int64_t out = 0; out < n_out; ++out) {
      const auto [view, row] = rows[order(out)];
      for (int64_t in = 0; in < n_in; ++in) words[in * n_out + out] = Word(*view, row, in);
    }
    return Write(name, words);
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
    const auto file = [&](const char* name, const char* kind) {
      return absl::StrCat(prefix, name, ".", rank, ".", kind);
    };

    if (rank == 0) {
      RW_RETURN_IF_ERROR(WriteVector(prefix + "attention_norm.weight", weights.attention_norm));
      RW_RETURN_IF_ERROR(WriteVector(prefix + "ffn_norm.weight", weights.mlp_norm));
    }
    RW_RETURN_IF_ERROR(WriteTransposed(file("attention.w_qkv", "weight"), weights.qkv, rope_order));
    if (config_.has_qkv_bias) {
      std::vector<float> bias(weights.qkv_bias.size());
      for (size_t i = 0; i < bias.size(); ++i) bias[i] = weights.qkv_bias[rope_order(static_cast<int64_t>(i))];
      RW_RETURN_IF_ERROR(WriteVector(file("attention.w_qkv", "bias"), bias));
    }
    RW_RETURN_IF_ERROR(WriteTransposed(file("attention.wo", "weight"), std::span(&weights.wo, 1), same_order));
    if (config_.has_o_bias) RW_RETURN_IF_ERROR(WriteVector(file("attention.wo", "bias"), weights.wo_bias));
    const std::span<const MatrixView> gate_up = weights.gate_up;
    RW_RETURN_IF_ERROR(WriteTransposed(file("feed_forward.w1", "weight"), gate_up.subspan(0, 1), same_order));
    RW_RETURN_IF_ERROR(WriteTransposed(file("feed_forward.w3", "weight"), gate_up.subspan(1, 1), same_order));
    return WriteTransposed(file("feed_forward.w2", "weight"), std::span(&weights.w2, 1), same_order);
  }

  const Checkpoint& checkpoint_;
  const ModelConfig& config_;
  const std::string folder_;
  const WorkspaceOptions& options_;
  const std::function<void(int64_t, int64_t)>& progress_;
  bool is_bf16_ = false;
  int64_t vocab_padded_ = 0, total_bytes_ = 0, written_bytes_ = 0;
};

absl::Status CheckRepresentable(const ModelConfig& config, int world_size) {
  if (config.has_qk_norm) return absl::UnimplementedError("this workspace layout has no q/k norms");
  if (config.has_mlp_bias) return absl::UnimplementedError("this workspace layout has no MLP biases");
  if (config.rope.scaling != RopeConfig::Scaling::kNone && config.rope.scaling != RopeConfig::Scaling::kDynamicNtk) {
    return absl::UnimplementedError("this workspace layout knows no RoPE scaling but dynamic");
  }
  if (world_size < 1 || config.n_kv_heads % world_size != 0 || config.intermediate_size % world_size != 0) {
    return absl::UnimplementedError(absl::StrCat("tp=", world_size, " does not divide n_kv_heads=", config.n_kv_heads,
                                                 " and intermediate_size=", config.intermediate_size,
                                                 ", as this workspace layout needs"));
  }
  return absl::OkStatus();
}

// Tokenizer models and the JSON files beside them, but neither weights nor their index.
absl::Status CopyTokenizer(const std::string& model_dir, const std::string& folder) {
  std::error_code error;
  for (const fs::directory_entry& entry : fs::directory_iterator(model_dir, error)) {
    const std::string name = entry.path().filename();
    const std::string extension = entry.path().extension();
    if (!entry.is_regular_file() || name.find("safetensors") != std::string::npos) continue;
    if (extension != ".json" && extension != ".model" && extension != ".tiktoken" && name != "merges.txt") continue;
    fs::copy_file(entry.path(), fs::path(folder) / name, error);
    if (error) return absl::InternalError(absl::StrCat("cannot copy ", name, ": ", error.message()));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status WriteWorkspace(const Checkpoint& checkpoint, const std::string& model_dir, const std::string& folder,
                            const WorkspaceOptions& options, const std::function<void(int64_t, int64_t)>& progress) {
  RW_RETURN_IF_ERROR(CheckRepresentable(checkpoint.config(), options.world_size));
  const bool exists = fs::exists(folder);
  if (exists && !options.replaces) {
    return absl::AlreadyExistsError(absl::StrCat(folder, " exists; --force replaces it"));
  }
  if (exists && !fs::exists(folder + "/triton_models/weights/config.ini")) {
    return absl::FailedPreconditionError(absl::StrCat(folder, " is not a workspace, so it is not replaced"));
  }
  const std::string temporary = absl::StrCat(folder, ".", getpid(), ".tmp");
  std::error_code error;
  fs::remove_all(temporary, error);
  fs::create_directories(temporary + "/triton_models/weights", error);
  if (!error) fs::create_directories(temporary + "/triton_models/tokenizer", error);
  if (error) return absl::InternalError(absl::StrCat("cannot create ", temporary, ": ", error.message()));

  Writer writer(checkpoint, temporary + "/triton_models/weights", options, progress);
  absl::Status written = writer.WriteWeights();
  if (written.ok()) written = writer.WriteConfig();
  if (written.ok()) written = CopyTokenizer(model_dir, temporary + "/triton_models/tokenizer");
  if (written.ok() && exists) fs::remove_all(folder, error);
  if (written.ok()) fs::rename(temporary, folder, error);
  if (written.ok() && error)
    written = absl::InternalError(absl::StrCat("cannot write ", folder, ": ", error.message()));
  if (!written.ok()) fs::remove_all(temporary, error);
  return written;
}

}  // namespace rankwise::weights
