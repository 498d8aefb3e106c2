#include "worker/weights/checkpoint.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <map>
#include <set>

#include "absl/strings/str_cat.h"
#include "base/mapped_file.h"
#include "worker/weights/random_model.h"
#include "worker/weights/safetensors.h"

namespace rankwise::weights {
namespace {

namespace fs = std::filesystem;
using kernels::DType;
using kernels::MatrixView;
using shard::PlanShard;
using Matrix = std::vector<std::vector<float>>;  // rows

float Decode(const std::byte* source, DType dtype) {
  if (dtype == DType::kF32) {
    float value = 0;
    std::memcpy(&value, source, sizeof value);
    return value;
  }
  uint16_t word = 0;
  std::memcpy(&word, source, sizeof word);
  const int sign = word >> 15 != 0 ? -1 : 1;
  const int bits = dtype == DType::kF16 ? 10 : 7, bias = dtype == DType::kF16 ? 15 : 127;
  const int exponent = (word & 0x7FFF) >> bits, mantissa = word & ((1 << bits) - 1);
  if (exponent == 0) return static_cast<float>(sign * std::ldexp(mantissa, 1 - bias - bits));
  return static_cast<float>(sign * std::ldexp(mantissa + (1 << bits), exponent - bias - bits));
}

Matrix Rows(const MatrixView& view) {
  Matrix rows(view.rows, std::vector<float>(view.cols));
  for (int64_t r = 0; r < view.rows; ++r) {
    for (int64_t c = 0; c < view.cols; ++c) {
      rows[r][c] = Decode(view.data + (r * view.row_stride + c) * kernels::DTypeBytes(view.dtype), view.dtype);
    }
  }
  return rows;
}

Matrix Stack(const std::vector<MatrixView>& blocks) {
  Matrix stack;
  for (const MatrixView& block : blocks) {
    for (auto& row : Rows(block)) stack.push_back(std::move(row));
  }
  return stack;
}

class CheckpointTest : public ::testing::Test {
 protected:
  CheckpointTest() : folder_(::testing::TempDir() + "checkpoint_" + std::to_string(getpid())) {
    fs::remove_all(folder_);
  }
  ~CheckpointTest() override { fs::remove_all(folder_); }

  std::unique_ptr<Checkpoint> OpenRandom(const RandomModelSpec& spec) {
    EXPECT_EQ(WriteRandomModel(folder_, spec), absl::OkStatus());
    auto checkpoint = Checkpoint::Open(folder_);
    EXPECT_TRUE(checkpoint.ok()) << checkpoint.status();
    return checkpoint.ok() ? std::move(checkpoint).value() : nullptr;
  }

  // A tensor as it lies in the folder's files; a vector is one row.
  Matrix Raw(const std::string& name) const {
    for (const fs::directory_entry& entry : fs::directory_iterator(folder_)) {
      if (entry.path().extension() != ".safetensors") continue;
      const auto file = SafetensorsFile::Open(entry.path());
      if (!file.ok() || !file->tensors().contains(name)) continue;
      const StoredTensor& tensor = file->tensors().at(name);
      const DType dtype = tensor.dtype == "F32" ? DType::kF32 : tensor.dtype == "F16" ? DType::kF16 : DType::kBF16;
      const bool is_vector = tensor.shape.size() == 1;
      return Rows({.data = tensor.data,
                   .dtype = dtype,
                   .rows = is_vector ? 1 : tensor.shape[0],
                   .cols = tensor.shape.back(),
                   .row_stride = tensor.shape.back()});
    }
    ADD_FAILURE() << name << " is in no file";
    return {};
  }

  std::string Refusal() const {
    const auto checkpoint = Checkpoint::Open(folder_);
    return checkpoint.ok() ? "" : std::string(checkpoint.status().message());
  }

  const std::string folder_;
};

class FamilySlices : public CheckpointTest, public ::testing::WithParamInterface<const char*> {
 protected:
  // Row `index` of head `head` of q, k or v, whatever the family's order.
  int64_t FusedRow(int64_t head, char which, int64_t index) const {
    const int64_t per_kv = spec_.n_heads / spec_.n_kv_heads;
    const int64_t kv_head = which == 'q' ? head / per_kv : head;
    const int64_t slot = which == 'q' ? head % per_kv : which == 'k' ? per_kv : per_kv + 1;
    return (kv_head * (per_kv + 2) + slot) * spec_.head_dim + index;
  }
  std::vector<float> HeadRow(int layer, int64_t head, char which, int64_t index) {
    const std::string prefix = absl::StrCat("model.layers.", layer, ".");
    if (is_fused_) return Cached(prefix + "attention.wqkv.weight").at(FusedRow(head, which, index));
    return Cached(absl::StrCat(prefix, "self_attn.", std::string(1, which), "_proj.weight"))
        .at(head * spec_.head_dim + index);
  }
  float HeadBias(int layer, int64_t head, char which, int64_t index) {
    const std::string prefix = absl::StrCat("model.layers.", layer, ".");
    if (is_fused_) return Cached(prefix + "attention.wqkv.bias").at(0).at(FusedRow(head, which, index));
    return Cached(absl::StrCat(prefix, "self_attn.", std::string(1, which), "_proj.bias"))
        .at(0)
        .at(head * spec_.head_dim + index);
  }
  const Matrix& Cached(const std::string& name) {
    const auto [found, is_new] = raw_.try_emplace(name);
    if (is_new) found->second = Raw(name);
    return found->second;
  }

  const RandomModelSpec spec_ = {.model_type = GetParam(),
                                 .hidden_size = 24,
                                 .n_layers = 2,
                                 .n_heads = 8,
                                 .n_kv_heads = 4,
                                 .head_dim = 6,
                                 .intermediate_size = 43,
                                 .vocab_size = 51,
                                 .has_bias = true,
                                 .has_mlp_bias = true,
                                 .dtype = DType::kF16,
                                 .file_count = 2};
  const bool is_fused_ = spec_.model_type == "internlm2";
  std::map<std::string, Matrix> raw_;
};

TEST_P(FamilySlices, AreTheRightPartsOfTheFile) {
  const auto checkpoint = OpenRandom(spec_);
  ASSERT_NE(checkpoint, nullptr);
  const ModelConfig& config = checkpoint->config();
  EXPECT_EQ(config.has_mlp_bias, spec_.model_type == "llama");
  EXPECT_EQ(config.has_qkv_bias, spec_.model_type != "mistral");
  const std::string prefix = "model.layers.1.";
  const auto name = [&](const char* usual, const char* internlm2, const char* kind) {
    return absl::StrCat(prefix, is_fused_ ? internlm2 : usual, ".", kind);
  };
  for (const int world : {1, 2, 4, 8}) {
    for (int rank = 0; rank < world; ++rank) {
      const auto plan = *PlanShard(config.dims(), {.rank = rank, .world_size = world});
      const LayerWeights layer = checkpoint->Layer(1, plan);
      Matrix qkv;
      std::vector<float> bias;
      for (const auto& [which, heads] : {std::pair{'q', plan.heads}, {'k', plan.kv_heads}, {'v', plan.kv_heads}}) {
        for (int64_t head = heads.begin; head < heads.end; ++head) {
          for (int i = 0; i < spec_.head_dim; ++i) {
            qkv.push_back(HeadRow(1, head, which, i));
            if (config.has_qkv_bias) bias.push_back(HeadBias(1, head, which, i));
          }
        }
      }
      EXPECT_EQ(Stack(layer.qkv), qkv);
      EXPECT_EQ(layer.qkv_bias, bias);

      const auto part = [](std::vector<float> whole, int64_t begin, int64_t end) {
        return std::vector<float>(whole.begin() + begin, whole.begin() + end);
      };
      const auto columns = [&](const Matrix& whole, int64_t begin, int64_t end) {
        Matrix cut;
        for (const auto& row : whole) cut.push_back(part(row, begin, end));
        return cut;
      };
      const shard::Range inner = plan.intermediate;
      EXPECT_EQ(Rows(layer.wo), columns(Cached(name("self_attn.o_proj", "attention.wo", "weight")),
                                        plan.heads.begin * spec_.head_dim, plan.heads.end * spec_.head_dim));
      EXPECT_EQ(Rows(layer.w2),
                columns(Cached(name("mlp.down_proj", "feed_forward.w2", "weight")), inner.begin, inner.end));
      const Matrix &gate = Cached(name("mlp.gate_proj", "feed_forward.w1", "weight")),
                   &up = Cached(name("mlp.up_proj", "feed_forward.w3", "weight"));
      Matrix gate_up(gate.begin() + inner.begin, gate.begin() + inner.end);
      gate_up.insert(gate_up.end(), up.begin() + inner.begin, up.begin() + inner.end);
      EXPECT_EQ(Stack(layer.gate_up), gate_up);

      EXPECT_EQ(layer.attention_norm, Cached(name("input_layernorm", "attention_norm", "weight"))[0]);
      EXPECT_EQ(layer.mlp_norm, Cached(name("post_attention_layernorm", "ffn_norm", "weight"))[0]);
      if (config.has_qk_norm) {
        EXPECT_EQ(layer.q_norm, Cached(prefix + "self_attn.q_norm.weight")[0]);
        EXPECT_EQ(layer.k_norm, Cached(prefix + "self_attn.k_norm.weight")[0]);
      }
      EXPECT_EQ(layer.wo_bias.empty(), !config.has_o_bias);
      if (config.has_o_bias) {
        EXPECT_EQ(layer.wo_bias, Cached(name("self_attn.o_proj", "attention.wo", "bias"))[0]);
      }
      if (config.has_mlp_bias) {
        std::vector<float> both = part(Cached(prefix + "mlp.gate_proj.bias")[0], inner.begin, inner.end);
        for (const float value : part(Cached(prefix + "mlp.up_proj.bias")[0], inner.begin, inner.end))
          both.push_back(value);
        EXPECT_EQ(layer.gate_up_bias, both);
        EXPECT_EQ(layer.w2_bias, Cached(prefix + "mlp.down_proj.bias")[0]);
      }

      const OuterWeights outer = checkpoint->Outer(plan);
      const Matrix& output = Cached(is_fused_ ? "output.weight" : "lm_head.weight");
      EXPECT_EQ(Rows(outer.output), Matrix(output.begin() + plan.vocab.begin, output.begin() + plan.vocab.end));
      EXPECT_EQ(Rows(outer.embedding), Cached(is_fused_ ? "model.tok_embeddings.weight" : "model.embed_tokens.weight"));
      EXPECT_EQ(outer.final_norm, Cached("model.norm.weight")[0]);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Families, FamilySlices,
                         ::testing::Values("llama", "internlm", "internlm2", "mistral", "qwen2", "qwen3"));

TEST_F(CheckpointTest, TiedModelsReadTheEmbeddingAsOutput) {
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    const auto checkpoint = OpenRandom({.is_tied = true, .dtype = dtype});
    ASSERT_NE(checkpoint, nullptr);
    const auto plan = *PlanShard(checkpoint->config().dims(), {.rank = 1, .world_size = 2});
    const Matrix table = Raw("model.embed_tokens.weight");
    EXPECT_EQ(Rows(checkpoint->Outer(plan).output), Matrix(table.begin() + 256, table.end()));
    EXPECT_EQ(checkpoint->Outer(plan).final_norm, Raw("model.norm.weight")[0]);
  }
}

TEST_F(CheckpointTest, FingerprintIsOfConfigurationAndContentNotOfFiles) {
  const RandomModelSpec spec;
  const std::string one = OpenRandom(spec)->fingerprint();
  EXPECT_EQ(one.size(), 16u);
  RandomModelSpec split = spec;
  split.file_count = 3;
  EXPECT_EQ(OpenRandom(split)->fingerprint(), one);
  std::set<std::string> others = {one};
  RandomModelSpec other = spec;
  other.seed = 2;
  others.insert(OpenRandom(other)->fingerprint());
  other = spec;
  other.dtype = DType::kBF16;
  others.insert(OpenRandom(other)->fingerprint());
  for (const char* extra :
       {R"("rope_theta":20000)", R"("rope_scaling":{"type":"linear","factor":2})",
        R"("rope_scaling":{"type":"linear","factor":2.0000001})", R"("rope_scaling":{"rope_type":"yarn","factor":2})",
        R"("rope_scaling":{"rope_type":"yarn","factor":2,"beta_fast":16})", R"("rms_norm_eps":1e-6)"}) {
    other = spec;
    other.extra_json = extra;
    EXPECT_TRUE(others.insert(OpenRandom(other)->fingerprint()).second) << extra;
  }
  EXPECT_EQ(others.size(), 9u);
  other = spec;
  other.model_type = "mistral";
  other.extra_json = R"("sliding_window":8)";
  const std::string narrow = OpenRandom(other)->fingerprint();
  other.extra_json = R"("sliding_window":16)";
  EXPECT_NE(OpenRandom(other)->fingerprint(), narrow);
  const std::string wide = OpenRandom(other)->fingerprint();
  other.extra_json = R"("sliding_window":16,"eos_token_id":3)";
  EXPECT_EQ(OpenRandom(other)->fingerprint(), wide);
}

TEST_F(CheckpointTest, ATensorInTwoFilesIsRefused) {
  ASSERT_NE(OpenRandom({.file_count = 2}), nullptr);
  const std::string second = folder_ + "/model-00002-of-00002.safetensors";
  std::string bytes = *ReadTextFile(second);
  const std::string copy = R"("model.embed_tokens.weight":{"dtype":"F16","shape":[0],"data_offsets":[0,0]},)";
  bytes.insert(9, copy);
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, bytes.data(), sizeof header_bytes);
  header_bytes += copy.size();
  std::memcpy(bytes.data(), &header_bytes, sizeof header_bytes);
  ASSERT_EQ(WriteFileAtomically(second, bytes), absl::OkStatus());
  EXPECT_NE(Refusal().find("tensor model.embed_tokens.weight is in"), std::string::npos) << Refusal();
}

TEST_F(CheckpointTest, IndexesThatLeaveTheFolderOrLieAreRefused) {
  ASSERT_NE(OpenRandom({.file_count = 2}), nullptr);
  const std::string path = folder_ + "/model.safetensors.index.json", index = *ReadTextFile(path);
  const auto refusal = [&](const std::string& file) {
    std::string text = index;
    const std::string name = "\"model-00001-of-00002.safetensors\"";
    text.replace(text.find(name), name.size(), file);
    EXPECT_EQ(WriteFileAtomically(path, text), absl::OkStatus());
    return Refusal();
  };
  for (const char* file :
       {R"("../model-00001-of-00002.safetensors")", R"("/etc/passwd")", R"("a/b")", R"("")", R"("..")"}) {
    EXPECT_NE(refusal(file).find("is not a plain file name"), std::string::npos) << file;
  }
  EXPECT_NE(refusal("7").find("names no file"), std::string::npos);
  EXPECT_NE(refusal(R"("absent.safetensors")").find("absent.safetensors"), std::string::npos);
  EXPECT_NE(refusal(R"("model-00002-of-00002.safetensors")").find("as the index says"), std::string::npos);
  ASSERT_EQ(WriteFileAtomically(path, R"({"weight_map":[]})"), absl::OkStatus());
  EXPECT_NE(Refusal().find("no weight_map"), std::string::npos);
  ASSERT_EQ(WriteFileAtomically(path, std::string(100000, '[')), absl::OkStatus());
  EXPECT_NE(Refusal().find("nests deeper"), std::string::npos);
}

TEST_F(CheckpointTest, WrongShapesTypesAndMissingTensorsAreNamed) {
  ASSERT_NE(OpenRandom({}), nullptr);
  const std::string path = folder_ + "/config.json", config = *ReadTextFile(path);
  const auto refusal = [&](const std::string& from, const std::string& to) {
    std::string text = config;
    text.replace(text.find(from), from.size(), to);
    EXPECT_EQ(WriteFileAtomically(path, text), absl::OkStatus());
    return Refusal();
  };
  EXPECT_NE(refusal("\"vocab_size\": 512", "\"vocab_size\": 513").find("model.embed_tokens.weight is [512,64]"),
            std::string::npos);
  EXPECT_NE(refusal("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3").find("tensor model.layers.2."),
            std::string::npos);
  EXPECT_NE(refusal("\"llama\"", "\"internlm2\"").find("tok_embeddings"), std::string::npos);
  EXPECT_NE(refusal("\"llama\"", "\"qwen2\"").find("bias is missing"), std::string::npos);
  ASSERT_EQ(WriteFileAtomically(path, config), absl::OkStatus());
  const std::string weights_path = folder_ + "/model.safetensors";
  std::string bytes = *ReadTextFile(weights_path);
  bytes.replace(bytes.find("\"F16\""), 5, "\"I16\"");
  ASSERT_EQ(WriteFileAtomically(weights_path, bytes), absl::OkStatus());
  EXPECT_NE(Refusal().find("is I16"), std::string::npos);
}

TEST_F(CheckpointTest, DataNeedNotBeAligned) {
  ASSERT_NE(OpenRandom({.dtype = DType::kF32}), nullptr);
  const Matrix before = Raw("model.layers.0.mlp.up_proj.weight");
  const std::string path = folder_ + "/model.safetensors";
  std::string bytes = *ReadTextFile(path);
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, bytes.data(), sizeof header_bytes);
  bytes.insert(8 + header_bytes, " ");
  ++header_bytes;
  std::memcpy(bytes.data(), &header_bytes, sizeof header_bytes);
  ASSERT_EQ(WriteFileAtomically(path, bytes), absl::OkStatus());
  const auto checkpoint = Checkpoint::Open(folder_);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  const auto plan = *PlanShard((*checkpoint)->config().dims(), {.rank = 0, .world_size = 1});
  const LayerWeights layer = (*checkpoint)->Layer(0, plan);
  EXPECT_NE(reinterpret_cast<uintptr_t>(layer.gate_up[1].data) % sizeof(float), 0u);
  EXPECT_EQ(Rows(layer.gate_up[1]), before);
  EXPECT_EQ(layer.mlp_norm, Raw("model.layers.0.post_attention_layernorm.weight")[0]);
}

TEST_F(CheckpointTest, OpensAPublishedModel) {
  const char* variable = std::getenv("RANKWISE_TEST_DATA");
  const std::string data = variable != nullptr ? variable : RANKWISE_SOURCE_DIR "/../shared/data";
  const std::string model = data + "/models/stories260K-hf";
  if (!fs::exists(model)) GTEST_SKIP() << model << " is absent";
  const auto checkpoint = Checkpoint::Open(model);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  const ModelConfig& config = (*checkpoint)->config();
  EXPECT_EQ(config.dims().n_kv_heads, 4);
  EXPECT_EQ(config.eos_ids, (std::vector<int32_t>{2}));
  EXPECT_TRUE(config.is_tied);
  const auto plan = *PlanShard(config.dims(), {.rank = 3, .world_size = 4});
  EXPECT_EQ((*checkpoint)->Layer(4, plan).w2.cols, 43);
}

}  // namespace
}  // namespace rankwise::weights
