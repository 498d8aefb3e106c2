#include "worker/weights/workspace.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <random>

#include "absl/strings/str_cat.h"
#include "base/mapped_file.h"
#include "worker/weights/quantize.h"
#include "worker/weights/random_model.h"
#include "worker/weights/safetensors.h"
#include "worker/weights/turbomind_config.h"
#include "worker/weights/turbomind_int4.h"
#include "worker/weights/workspace_layout.h"

namespace rankwise::weights {
namespace {

namespace fs = std::filesystem;
using kernels::DType;
using kernels::MatrixView;
using shard::PlanShard;
using shard::ShardPlan;

constexpr kernels::DType kDTypes[] = {DType::kF16, DType::kBF16};

// Every element, row by row; one of four bits as its value, zero point and scale.
std::vector<uint16_t> Words(const std::vector<MatrixView>& blocks) {
  std::vector<uint16_t> words;
  for (const MatrixView& block : blocks) {
    for (int64_t i = 0; block.grouped && i < block.rows * block.cols; ++i) {
      const kernels::GroupedMatrix& m = *block.grouped;
      const int64_t out = block.row_begin + i / block.cols, in = block.col_begin + i % block.cols;
      words.push_back(static_cast<uint16_t>(kernels::GroupedValue(m, m.qweight, in, out)));
      words.push_back(static_cast<uint16_t>(kernels::GroupedValue(m, m.qzeros, in / m.group_size, out)));
      words.push_back(kernels::GroupedScale(m, in / m.group_size, out));
    }
    for (int64_t row = 0; !block.grouped && row < block.rows; ++row) {
      const size_t begin = words.size();
      words.resize(begin + block.cols);
      std::memcpy(&words[begin], block.data + row * block.row_stride * 2, block.cols * 2);
    }
  }
  return words;
}

void ExpectSame(const LayerWeights& a, const LayerWeights& b) {
  EXPECT_EQ(a.attention_norm, b.attention_norm);
  EXPECT_EQ(a.mlp_norm, b.mlp_norm);
  EXPECT_EQ(Words(a.qkv), Words(b.qkv));
  EXPECT_EQ(a.qkv_bias, b.qkv_bias);
  EXPECT_EQ(Words({a.wo}), Words({b.wo}));
  EXPECT_EQ(a.wo_bias, b.wo_bias);
  EXPECT_EQ(Words(a.gate_up), Words(b.gate_up));
  EXPECT_EQ(Words({a.w2}), Words({b.w2}));
}

void ExpectSameModel(const Checkpoint& a, const Checkpoint& b, int world) {
  for (int rank = 0; rank < world; ++rank) {
    const ShardPlan plan = *PlanShard(a.config().dims(), {.rank = rank, .world_size = world});
    EXPECT_EQ(b.Verify(plan), absl::OkStatus());
    for (int layer = 0; layer < a.config().n_layers; ++layer) {
      SCOPED_TRACE(absl::StrCat("rank ", rank, " of ", world, ", layer ", layer));
      ExpectSame(a.Layer(layer, plan), b.Layer(layer, plan));
    }
    const OuterWeights of_a = a.Outer(plan), of_b = b.Outer(plan);
    EXPECT_EQ(Words({of_a.embedding}), Words({of_b.embedding}));
    EXPECT_EQ(of_a.final_norm, of_b.final_norm);
    EXPECT_EQ(Words({of_a.output}), Words({of_b.output}));
  }
}

class WorkspaceTest : public ::testing::Test {
 protected:
  WorkspaceTest() : folder_(::testing::TempDir() + "workspace_" + std::to_string(getpid())) {
    fs::remove_all(folder_);
    fs::create_directories(folder_);
  }
  ~WorkspaceTest() override { fs::remove_all(folder_); }

  std::unique_ptr<Checkpoint> Open(const std::string& name) const {
    auto checkpoint = Checkpoint::Open(folder_ + "/" + name);
    EXPECT_TRUE(checkpoint.ok()) << checkpoint.status();
    return checkpoint.ok() ? *std::move(checkpoint) : nullptr;
  }
  std::unique_ptr<Checkpoint> Random(const std::string& name, const RandomModelSpec& spec) const {
    EXPECT_EQ(WriteRandomModel(folder_ + "/" + name, spec), absl::OkStatus());
    return Open(name);
  }
  absl::Status Convert(const std::string& from, const std::string& to, int tp, bool replaces = false) const {
    const auto checkpoint = Open(from);
    if (checkpoint == nullptr) return absl::InternalError("no model");
    return WriteWorkspace(*checkpoint, folder_ + "/" + from, folder_ + "/" + to,
                          {.world_size = tp, .model_name = "tiny", .replaces = replaces}, {});
  }
  std::string Weights(const std::string& workspace, const std::string& file) const {
    return WorkspaceWeights(folder_ + "/" + workspace) + "/" + file;
  }
  static std::string Read(const std::string& path) { return *ReadTextFile(path); }
  static void Put(const std::string& path, const std::string& bytes) {
    std::ofstream(path, std::ios::binary | std::ios::trunc) << bytes;
  }
  void Edit(const std::string& path, const std::string& from, const std::string& to) const {
    std::string text = Read(path);
    const size_t at = text.find(from);
    ASSERT_NE(at, std::string::npos) << from;
    Put(path, text.replace(at, from.size(), to));
  }
  // What keeps rank `rank` of `world` from starting; empty: nothing does.
  std::string Refusal(const std::string& workspace, int rank = 0, int world = 1) const {
    const auto checkpoint = Checkpoint::Open(folder_ + "/" + workspace);
    if (!checkpoint.ok()) return std::string(checkpoint.status().message());
    const auto plan = PlanShard((*checkpoint)->config().dims(), {.rank = rank, .world_size = world});
    if (!plan.ok()) return std::string(plan.status().message());
    return std::string((*checkpoint)->Verify(*plan).message());
  }
  // Removes, shortens, lengthens and alters every tensor file of a workspace cut for two, one after the other, and
  // expects that this keeps a rank from starting in words that name the file. How many there are.
  int ExpectEveryFileIsGuarded(const std::string& workspace) const {
    int files = 0;
    for (const std::string& file : FilesIn(Weights(workspace, ""))) {
      if (file == "config.ini" || file == "manifest.json") continue;
      ++files;
      const std::string path = Weights(workspace, file), whole = Read(path);
      const auto refusals = [&](const std::string& bytes) {
        Put(path, bytes);
        return Refusal(workspace, 0, 2) + Refusal(workspace, 1, 2);  // either rank keeps the group from starting
      };
      const auto expect_named = [&](const std::string& message, const std::string& complaint) {
        EXPECT_NE(message.find(path), std::string::npos) << file << ": " << message;
        EXPECT_NE(message.find(complaint), std::string::npos) << file << ": " << message;
      };
      EXPECT_EQ(refusals(whole), "");
      expect_named(refusals(whole.substr(0, whole.size() - 1)), "bytes instead of");
      expect_named(refusals(""), "has 0 bytes instead of");
      expect_named(refusals(whole + "x"), "bytes instead of");
      std::string altered = whole;
      altered[whole.size() / 2] ^= 1;
      expect_named(refusals(altered), "was altered");
      fs::remove(path);
      expect_named(Refusal(workspace, 0, 2), "No such file");
      Put(path, whole);
    }
    EXPECT_EQ(Refusal(workspace), "");
    return files;
  }
  // Opens and reads workspaces in which a few bytes of a file, one of {workspace, file}, are others. How many open.
  int OpenedOfMutated(const std::vector<std::pair<const char*, const char*>>& targets, int rounds) const {
    std::mt19937_64 random(17);
    int opened = 0;
    for (int round = 0; round < rounds; ++round) {
      const auto& [name, file] = targets[round % targets.size()];
      const std::string path = Weights(name, file), whole = Read(path);
      std::string bytes = whole;
      for (int i = 0; i < 1 + static_cast<int>(random() % 2); ++i) {
        const size_t at = random() % bytes.size();
        bytes[at] = random() % 2 == 0 ? "0123456789{}[],:\"-e.\n ="[random() % 23] : static_cast<char>(random());
      }
      if (random() % 10 == 0) bytes.resize(random() % bytes.size());
      Put(path, bytes);
      const auto checkpoint = Checkpoint::Open(folder_ + "/" + name);
      if (checkpoint.ok()) {
        ++opened;
        for (const int world : {1, 2, 4}) {
          const auto plan = PlanShard((*checkpoint)->config().dims(), {.rank = world - 1, .world_size = world});
          if (!plan.ok()) continue;
          (*checkpoint)->Verify(*plan).IgnoreError();
          (*checkpoint)->Outer(*plan);
          (*checkpoint)->Layer(0, *plan);
        }
      }
      Put(path, whole);
    }
    return opened;
  }
  std::vector<std::string> FilesIn(const std::string& folder) const {
    std::vector<std::string> names;
    for (const auto& entry : fs::directory_iterator(folder)) names.push_back(entry.path().filename());
    return names;
  }

  const std::string folder_;
};

// ---- A workspace written by hand, following the layout's definition and none of our own code.

// 4 query heads and 2 KV heads of 4, hidden 16, intermediate 6, 5 tokens, one layer, biases. Values are small integers,
// which f16 holds exactly.
class HandWrittenTest : public WorkspaceTest {
 protected:
  using Matrix = std::vector<std::vector<int>>;  // [out][in]

  static constexpr int kHidden = 16, kDim = 4, kInner = 6, kVocab = 5;

  static Matrix Counting(int rows, int cols, int first) {
    Matrix matrix(rows, std::vector<int>(cols));
    for (auto& row : matrix) {
      for (int& value : row) value = first++;
    }
    return matrix;
  }
  static std::string Bytes(const std::vector<int>& values) {
    std::string bytes;
    for (const int value : values) {
      const auto bits = std::bit_cast<uint16_t>(static_cast<_Float16>(value));
      bytes += static_cast<char>(bits & 0xFF);
      bytes += static_cast<char>(bits >> 8);
    }
    return bytes;
  }
  static std::string Bytes(const Matrix& matrix) {
    std::string bytes;
    for (const auto& row : matrix) bytes += Bytes(row);
    return bytes;
  }

  const Matrix q_ = Counting(16, kHidden, 0), k_ = Counting(8, kHidden, 256), v_ = Counting(8, kHidden, 384);
  const Matrix q_bias_ = Counting(1, 16, 600), k_bias_ = Counting(1, 8, 620), v_bias_ = Counting(1, 8, 630);
  const Matrix o_ = Counting(kHidden, 16, 1000), o_bias_ = Counting(1, kHidden, 1300);
  const Matrix gate_ = Counting(kInner, kHidden, -100), up_ = Counting(kInner, kHidden, -300),
               down_ = Counting(kHidden, kInner, -500);
  const Matrix embedding_ = Counting(kVocab, kHidden, 1400), output_ = Counting(kVocab, kHidden, -700);
  const Matrix attention_norm_ = Counting(1, kHidden, 1500), ffn_norm_ = Counting(1, kHidden, 1520),
               norm_ = Counting(1, kHidden, 1540);

  void WriteHuggingFace(const std::string& name) const {
    fs::create_directories(folder_ + "/" + name);
    Put(folder_ + "/" + name + "/config.json",
        R"({"model_type":"internlm","bias":true,"hidden_size":16,"num_hidden_layers":1,"num_attention_heads":4,)"
        R"("num_key_value_heads":2,"intermediate_size":6,"vocab_size":5,"max_position_embeddings":64,)"
        R"("rms_norm_eps":1e-5,"bos_token_id":1,"eos_token_id":2})");
    Put(folder_ + "/" + name + "/tokenizer.json", "{}");
    const std::string layer = "model.layers.0.", attention = layer + "self_attn.";
    const std::pair<std::string, const Matrix*> tensors[] = {{"model.embed_tokens.weight", &embedding_},
                                                             {"model.norm.weight", &norm_},
                                                             {"lm_head.weight", &output_},
                                                             {layer + "input_layernorm.weight", &attention_norm_},
                                                             {layer + "post_attention_layernorm.weight", &ffn_norm_},
                                                             {attention + "q_proj.weight", &q_},
                                                             {attention + "q_proj.bias", &q_bias_},
                                                             {attention + "k_proj.weight", &k_},
                                                             {attention + "k_proj.bias", &k_bias_},
                                                             {attention + "v_proj.weight", &v_},
                                                             {attention + "v_proj.bias", &v_bias_},
                                                             {attention + "o_proj.weight", &o_},
                                                             {attention + "o_proj.bias", &o_bias_},
                                                             {layer + "mlp.gate_proj.weight", &gate_},
                                                             {layer + "mlp.up_proj.weight", &up_},
                                                             {layer + "mlp.down_proj.weight", &down_}};
    std::vector<TensorHeader> headers;
    std::string data;
    for (const auto& [tensor, matrix] : tensors) {
      const auto rows = static_cast<int64_t>(matrix->size()), cols = static_cast<int64_t>((*matrix)[0].size());
      headers.push_back({tensor, "F16", rows == 1 ? std::vector{cols} : std::vector{rows, cols}});
      data += Bytes(*matrix);
    }
    Put(folder_ + "/" + name + "/model.safetensors", SafetensorsHeader(headers, {}) + data);
  }

  // A head in halves (j, j + 2) to one in pairs: columns 0 2 1 3 of each four.
  static int FromPairs(int column) { return column / 4 * 4 + std::vector{0, 2, 1, 3}[column % 4]; }

  // w_qkv[in][column] of one rank, or its bias for matrices of one row.
  std::string FusedQkv(int rank, int tp) const {
    std::string bytes;
    for (int in = 0; in < kHidden; ++in) {
      std::vector<int> row;
      for (int c = 0; c < 16 / tp; ++c) row.push_back(q_[FromPairs(rank * 16 / tp + c)][in]);
      for (int c = 0; c < 8 / tp; ++c) row.push_back(k_[FromPairs(rank * 8 / tp + c)][in]);
      for (int c = 0; c < 8 / tp; ++c) row.push_back(v_[rank * 8 / tp + c][in]);
      bytes += Bytes(row);
    }
    return bytes;
  }
  std::string FusedBias(int rank, int tp) const {
    std::vector<int> row;
    for (int c = 0; c < 16 / tp; ++c) row.push_back(q_bias_[0][FromPairs(rank * 16 / tp + c)]);
    for (int c = 0; c < 8 / tp; ++c) row.push_back(k_bias_[0][FromPairs(rank * 8 / tp + c)]);
    for (int c = 0; c < 8 / tp; ++c) row.push_back(v_bias_[0][rank * 8 / tp + c]);
    return Bytes(row);
  }
  static std::string Transposed(const Matrix& matrix, int row_begin, int row_end, int col_begin, int col_end) {
    std::string bytes;
    for (int col = col_begin; col < col_end; ++col) {
      std::vector<int> line;
      for (int row = row_begin; row < row_end; ++row) line.push_back(matrix[row][col]);
      bytes += Bytes(line);
    }
    return bytes;
  }

  std::map<std::string, std::string> WorkspaceBytes(int tp) const {
    const std::string padding(static_cast<size_t>((kVocab + tp - 1) / tp * tp - kVocab) * kHidden * 2, '\0');
    const std::string layer = "layers.0.";
    std::map<std::string, std::string> files = {{"tok_embeddings.weight", Bytes(embedding_) + padding},
                                                {"norm.weight", Bytes(norm_)},
                                                {"output.weight", Bytes(output_) + padding},
                                                {layer + "attention_norm.weight", Bytes(attention_norm_)},
                                                {layer + "ffn_norm.weight", Bytes(ffn_norm_)}};
    for (int rank = 0; rank < tp; ++rank) {
      const auto name = [&](const char* of, const char* kind) { return absl::StrCat(layer, of, ".", rank, ".", kind); };
      const int heads = rank * 16 / tp, inner = rank * kInner / tp;
      files[name("attention.w_qkv", "weight")] = FusedQkv(rank, tp);
      files[name("attention.w_qkv", "bias")] = FusedBias(rank, tp);
      files[name("attention.wo", "weight")] = Transposed(o_, 0, kHidden, heads, heads + 16 / tp);
      files[name("attention.wo", "bias")] = Bytes(o_bias_);
      files[name("feed_forward.w1", "weight")] = Transposed(gate_, inner, inner + kInner / tp, 0, kHidden);
      files[name("feed_forward.w3", "weight")] = Transposed(up_, inner, inner + kInner / tp, 0, kHidden);
      files[name("feed_forward.w2", "weight")] = Transposed(down_, 0, kHidden, inner, inner + kInner / tp);
    }
    return files;
  }

  void WriteByHand(const std::string& name, int tp) const {
    fs::create_directories(Weights(name, ""));
    for (const auto& [file, bytes] : WorkspaceBytes(tp)) Put(Weights(name, file), bytes);
    Put(Weights(name, "config.ini"), absl::StrCat("[llama]\nmodel_name = tiny\ntensor_para_size = ", tp,
                                                  "\nhead_num = 4\nkv_head_num = 2\nvocab_size = 5\nnum_layer = 1\n"
                                                  "inter_size = 6\nnorm_eps = 1e-05\nattn_bias = 1\nstart_id = 1\n"
                                                  "end_id = 2\nweight_type = fp16\nrotary_embedding = 4\n"
                                                  "size_per_head = 4\nmax_position_embeddings = 64\n\n"));
  }
};

TEST_F(HandWrittenTest, Golden4QkvIsTransposedInterleavedFusedAndCut) {
  WriteHuggingFace("m");
  for (const int tp : {1, 2}) {
    const std::string name = absl::StrCat("w", tp), hand = absl::StrCat("hand", tp);
    ASSERT_EQ(Convert("m", name, tp), absl::OkStatus());
    for (const auto& [file, bytes] : WorkspaceBytes(tp)) {
      if (!file.ends_with("weight")) continue;
      EXPECT_TRUE(Read(Weights(name, file)) == bytes) << file << " of tp " << tp;
    }
    WriteByHand(hand, tp);
    for (const int world : {1, 2, 4}) ExpectSameModel(*Open("m"), *Open(hand), world);
  }
  // Rank 1 of 2 begins with head 2: its dimensions 0, 2, 1, 3 for input 0.
  EXPECT_EQ(WorkspaceBytes(2).at("layers.0.attention.w_qkv.1.weight").substr(0, 8),
            Bytes(std::vector<int>{q_[8][0], q_[10][0], q_[9][0], q_[11][0]}));
  EXPECT_EQ(WorkspaceBytes(2).at("norm.weight").substr(0, 4), "\x04\x66\x05\x66");  // 1540, 1541 as f16
}

TEST_F(HandWrittenTest, Golden5BiasesAreCutLikeColumnsAndThatOfWoIsWhole) {
  WriteHuggingFace("m");
  ASSERT_EQ(Convert("m", "w", 2), absl::OkStatus());
  WriteByHand("hand", 2);
  for (const char* name : {"w", "hand"}) {
    for (const int rank : {0, 1}) {
      EXPECT_EQ(Read(Weights(name, absl::StrCat("layers.0.attention.w_qkv.", rank, ".bias"))), FusedBias(rank, 2));
      EXPECT_EQ(Read(Weights(name, absl::StrCat("layers.0.attention.wo.", rank, ".bias"))), Bytes(o_bias_));
      const auto layer = Open(name)->Layer(0, *PlanShard(Open(name)->config().dims(), {.rank = rank, .world_size = 2}));
      const std::vector<float> q(q_bias_[0].begin() + rank * 8, q_bias_[0].begin() + rank * 8 + 8);
      EXPECT_EQ(std::vector<float>(layer.qkv_bias.begin(), layer.qkv_bias.begin() + 8), q);
      EXPECT_EQ(layer.qkv_bias.back(), static_cast<float>(v_bias_[0][rank * 4 + 3]));
      EXPECT_EQ(layer.wo_bias, std::vector<float>(o_bias_[0].begin(), o_bias_[0].end()));
    }
  }
}

TEST_F(HandWrittenTest, Golden6PaddedRowsOfTheVocabularyAreZeroAndLeftOut) {
  WriteHuggingFace("m");
  ASSERT_EQ(Convert("m", "w", 2), absl::OkStatus());
  for (const char* file : {"tok_embeddings.weight", "output.weight"}) {
    const std::string bytes = Read(Weights("w", file));
    ASSERT_EQ(bytes.size(), 6u * kHidden * 2);
    EXPECT_EQ(bytes.substr(5 * kHidden * 2), std::string(kHidden * 2, '\0'));
  }
  const auto checkpoint = Open("w");
  EXPECT_EQ(checkpoint->config().vocab_size, kVocab);
  const auto second = *PlanShard(checkpoint->config().dims(), {.rank = 1, .world_size = 2});
  const OuterWeights outer = checkpoint->Outer(second);
  EXPECT_EQ(outer.embedding.rows, kVocab);
  EXPECT_EQ(outer.output.rows, second.vocab.count());
  EXPECT_EQ(second.vocab.end, kVocab);
}

TEST(TurbomindConfigTest, Golden7MissingKeysGetTheDefaultsOfTheEra) {
  const auto parsed =
      ParseTurbomindConfig("[llama]\nhead_num = 32\nnum_layer = 32\ninter_size = 11008\nvocab_size = 32000\n");
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  EXPECT_EQ(parsed->kv_head_num, 32);
  EXPECT_EQ(parsed->size_per_head, 128);
  EXPECT_EQ(parsed->rotary_embedding, 128);
  EXPECT_EQ(parsed->max_position_embeddings, 2048);
  EXPECT_EQ(parsed->session_len, 2048);
  EXPECT_EQ(parsed->max_batch_size, 64);
  EXPECT_EQ(parsed->max_context_token_num, 2048);
  EXPECT_EQ(parsed->step_length, 1);
  EXPECT_EQ(parsed->cache_max_entry_count, 0.95);
  EXPECT_EQ(parsed->cache_block_seq_len, 128);
  EXPECT_EQ(parsed->cache_chunk_size, 0.95);
  EXPECT_EQ(parsed->num_tokens_per_iter, 2048);
  EXPECT_EQ(parsed->tensor_para_size, 1);
  EXPECT_EQ(parsed->weight_type, "fp16");
  EXPECT_EQ(parsed->quant_policy, 0);
  const ModelConfig model = parsed->ToModel();
  EXPECT_EQ(model.model_type, "llama");
  EXPECT_EQ(model.hidden_size, 4096);
  EXPECT_EQ(model.rms_norm_eps, 1e-6f);
  EXPECT_EQ(model.rope.theta, 10000);
  EXPECT_EQ(model.rope.scaling, RopeConfig::Scaling::kNone);
  EXPECT_EQ(model.eos_ids, std::vector<int32_t>{2});
  EXPECT_FALSE(model.has_qkv_bias);
}

// The whole of llama-2-7b's file, as LMDeploy's configparser writes it.
TEST(TurbomindConfigTest, Golden7AWholeFileOfTheEraIsRead) {
  const auto parsed = ParseTurbomindConfig(R"([llama]
model_name = llama2
tensor_para_size = 1
head_num = 32
kv_head_num = 32
vocab_size = 32000
num_layer = 32
inter_size = 11008
norm_eps = 1e-06
attn_bias = 0
start_id = 1
end_id = 2
session_len = 4104
weight_type = fp16
rotary_embedding = 128
rope_theta = 10000.0
size_per_head = 128
group_size = 0
max_batch_size = 64
max_context_token_num = 1
step_length = 1
cache_max_entry_count = 0.5
cache_block_seq_len = 128
cache_chunk_size = -1
num_tokens_per_iter = 0
max_prefill_iters = 1
extra_tokens_per_iter = 0
use_context_fmha = 1
quant_policy = 4
max_position_embeddings = 2048
rope_scaling_factor = 2.0
use_logn_attn = 0

)");
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  EXPECT_EQ(parsed->quant_policy, 4);
  EXPECT_EQ(parsed->max_context_token_num, 4104);
  EXPECT_EQ(parsed->cache_chunk_size, -1);
  EXPECT_EQ(parsed->ToModel().rope.scaling, RopeConfig::Scaling::kDynamicNtk);
  EXPECT_EQ(parsed->ToModel().rope.factor, 2);
  EXPECT_EQ(parsed->ToModel().max_position, 2048);
}

TEST(TurbomindConfigTest, SurvivesItsText) {
  TurbomindConfig config = FromModel({.n_layers = 3,
                                      .n_heads = 8,
                                      .n_kv_heads = 4,
                                      .head_dim = 8,
                                      .intermediate_size = 172,
                                      .vocab_size = 512,
                                      .max_position = 300,
                                      .rms_norm_eps = 1.2345678e-5f,
                                      .rope = {.theta = 12345.678901234567,
                                               .rotary_dim = 8,
                                               .scaling = RopeConfig::Scaling::kDynamicNtk,
                                               .factor = 1.0000000001},
                                      .has_qkv_bias = true,
                                      .eos_ids = {7, 9}});
  const auto parsed = ParseTurbomindConfig(FormatTurbomindConfig(config));
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  EXPECT_EQ(static_cast<float>(parsed->norm_eps), 1.2345678e-5f);
  EXPECT_EQ(parsed->rope_theta, 12345.678901234567);
  EXPECT_EQ(parsed->rope_scaling_factor, 1.0000000001);
  EXPECT_EQ(parsed->end_id, 7);
  EXPECT_EQ(parsed->start_id, -1);
  EXPECT_TRUE(parsed->attn_bias);
}

TEST_F(HandWrittenTest, HostileConfigurationsAreRefusedByName) {
  WriteByHand("w", 1);
  const std::string path = Weights("w", "config.ini"), whole = Read(path);
  const auto refusal = [&](const std::string& from, const std::string& to) {
    std::string text = whole;
    const size_t at = text.find(from);
    EXPECT_NE(at, std::string::npos) << from;
    Put(path, text.replace(at, from.size(), to));
    return Refusal("w");
  };
  EXPECT_EQ(refusal("", ""), "");
  EXPECT_EQ(refusal("attn_bias = 1", "# a comment\n; and one\nattn_bias = 1\nquant_policy = 4\nsession_len = 7"), "");
  struct Case {
    const char *from, *to, *word;
  };
  const Case cases[] = {{"head_num = 4", "head_num = 99999999999999999999", "head_num=99999999999999999999"},
                        {"head_num = 4", "head_num = four", "head_num=four is not a number"},
                        {"head_num = 4", "head_num = 4.0", "head_num=4.0 is not a number"},
                        {"head_num = 4", "head_num = ", "head_num= is not a number"},
                        {"head_num = 4", "head_num = 0", "head_num=0 is not in [1, 1024]"},
                        {"head_num = 4\n", "", "head_num is missing"},
                        {"kv_head_num = 2", "kv_head_num = 3", "kv_head_num=3 does not divide head_num=4"},
                        {"num_layer = 1", "num_layer = 1000000000", "num_layer=1000000000"},
                        {"num_layer = 1", "num_layer = 1024", "layers.1.attention_norm.weight"},
                        {"vocab_size = 5", "vocab_size = -5", "vocab_size=-5"},
                        {"vocab_size = 5", "vocab_size = 4194304", "tok_embeddings.weight has 160 bytes"},
                        {"inter_size = 6", "inter_size = 8", "layers.0.feed_forward.w1.0.weight has 192 bytes"},
                        {"size_per_head = 4", "size_per_head = 1024", "rotary_embedding=4 is not size_per_head=1024"},
                        {"size_per_head = 4", "size_per_head = 3", "size_per_head=3"},
                        {"norm_eps = 1e-05", "norm_eps = nan", "norm_eps=nan"},
                        {"norm_eps = 1e-05", "norm_eps = small", "norm_eps=small"},
                        {"weight_type = fp16", "weight_type = int8", "weight_type=int8"},
                        {"weight_type = fp16", "weight_type = int4", "group_size=0"},
                        {"tensor_para_size = 1", "tensor_para_size = 3", "tensor_para_size=3 does not divide"},
                        {"tensor_para_size = 1", "tensor_para_size = 2", "tok_embeddings.weight has 160 bytes"},
                        {"end_id = 2", "end_id = 5", "end_id=5"},
                        {"attn_bias = 1", "attn_bias = 2", "attn_bias=2"},
                        {"attn_bias = 1", "attn_bias = 1\nattn_bias = 1", "gives a key twice"},
                        {"attn_bias = 1", "attn_bias = 1\nexpert_num = 8", "key expert_num is not of layout 0.2"},
                        {"attn_bias = 1", "attn_bias = 1\nquant_policy = 8", "quant_policy=8 is not of layout 0.2"},
                        {"attn_bias = 1", "attn_bias = 1\nuse_logn_attn = 1", "use_logn_attn=1"},
                        {"attn_bias = 1", "attn_bias = 1\nrope_scaling_factor = 0.5", "rope_scaling_factor=0.5"},
                        {"attn_bias = 1", "attn_bias", "line 10 \"attn_bias\" is not key = value"},
                        {"[llama]\n", "", "stands before the section [llama]"},
                        {"[llama]\n", "[internlm]\n", "is not the one section [llama]"},
                        {"attn_bias", "[llama]\nattn_bias", "is not the one section [llama]"}};
  for (const Case& bad : cases) {
    const std::string message = refusal(bad.from, bad.to);
    EXPECT_NE(message.find(bad.word), std::string::npos) << bad.to << ": " << message;
    EXPECT_NE(message.find(WorkspaceWeights(folder_ + "/w")), std::string::npos) << message;
  }
  Put(path, "");
  EXPECT_NE(Refusal("w").find("there is no section [llama]"), std::string::npos) << Refusal("w");
  Put(path, whole + std::string(1 << 20, '\n'));
  EXPECT_NE(Refusal("w").find("config.ini has 1048"), std::string::npos) << Refusal("w");
  Put(path, std::string(1000, '\0') + whole);
  EXPECT_NE(Refusal("w").find("line 1"), std::string::npos) << Refusal("w");
}

TEST_F(HandWrittenTest, MutatedWorkspacesNeverCrash) {
  WriteHuggingFace("m");
  ASSERT_EQ(Convert("m", "w", 2), absl::OkStatus());
  WriteByHand("hand", 2);
  const int opened = OpenedOfMutated({{"w", "config.ini"}, {"w", "manifest.json"}, {"hand", "config.ini"}}, 600);
  EXPECT_GT(opened, 10);
  EXPECT_LT(opened, 550);
}

// ---- What convert writes is what the model folder says.

class EveryFamily : public WorkspaceTest, public ::testing::WithParamInterface<const char*> {};

TEST_P(EveryFamily, ServesTheSameWordsAtEveryDegreeWhateverItWasCutFor) {
  for (const DType dtype : kDTypes) {
    const std::string family = GetParam();
    RandomModelSpec spec{.model_type = family, .vocab_size = 511, .has_bias = true, .is_tied = family == "llama"};
    spec.dtype = dtype;
    spec.extra_json =
        family == "mistral" ? R"("sliding_window":null)" : R"("rope_scaling":{"type":"dynamic","factor":2.5})";
    const auto model = Random("m", spec);
    ASSERT_NE(model, nullptr);
    for (const int cut : {1, 2, 4}) {
      SCOPED_TRACE(absl::StrCat(spec.model_type, " cut for ", cut));
      const std::string name = absl::StrCat("w", cut);
      ASSERT_EQ(Convert("m", name, cut, /*replaces=*/true), absl::OkStatus());
      const auto workspace = Open(name);
      ASSERT_NE(workspace, nullptr);
      for (const int world : {1, 2, 4, 8}) ExpectSameModel(*model, *workspace, world);
      EXPECT_EQ(workspace->fingerprint(), model->fingerprint());
      const ModelConfig &a = model->config(), &b = workspace->config();
      EXPECT_EQ(a.max_position, b.max_position);
      EXPECT_EQ(a.rms_norm_eps, b.rms_norm_eps);
      EXPECT_EQ(a.rope.factor, b.rope.factor);
      EXPECT_EQ(a.rope.original_max_position, b.rope.original_max_position);
      EXPECT_EQ(a.rope.theta, b.rope.theta);
      EXPECT_EQ(a.eos_ids, b.eos_ids);
      EXPECT_EQ(a.bos_id, b.bos_id);
    }
    // Cut again, it is what a direct cut is, byte for byte.
    ASSERT_EQ(Convert("w2", "again", 4, /*replaces=*/true), absl::OkStatus());
    for (const std::string& file : FilesIn(Weights("w4", ""))) {
      EXPECT_TRUE(Read(Weights("again", file)) == Read(Weights("w4", file))) << file;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Families, EveryFamily,
                         ::testing::Values("llama", "internlm", "internlm2", "mistral", "qwen2"));

TEST_F(WorkspaceTest, SeveralEndTokensSurvive) {
  ASSERT_NE(Random("m", {.extra_json = R"("eos_token_id":[5,2,9])"}), nullptr);
  ASSERT_EQ(Convert("m", "w", 2), absl::OkStatus());
  EXPECT_EQ(Open("w")->config().eos_ids, (std::vector<int32_t>{5, 2, 9}));
}

TEST_F(WorkspaceTest, EveryMissingShortLongOrAlteredFileIsRefusedByName) {
  ASSERT_NE(Random("m", {.hidden_size = 16, .n_heads = 4, .head_dim = 4, .intermediate_size = 8, .has_bias = true}),
            nullptr);
  ASSERT_EQ(Convert("m", "w", 2), absl::OkStatus());
  EXPECT_EQ(ExpectEveryFileIsGuarded("w"), 3 + 2 * (2 + 2 * 7));
  // A rank reads its own files, and leaves the content of the others' to them.
  const std::string other = Weights("w", "layers.1.feed_forward.w2.1.weight"), whole = Read(other);
  std::string altered = whole;
  altered[0] ^= 1;
  Put(other, altered);
  EXPECT_EQ(Refusal("w", 0, 2), "");
  EXPECT_NE(Refusal("w", 1, 2).find(other), std::string::npos);
  EXPECT_NE(Refusal("w", 0, 1).find(other), std::string::npos);
}

TEST_F(WorkspaceTest, WithoutAManifestSizesAreCheckedAndTheFingerprintIsItsOwn) {
  const auto model = Random("m", {.has_bias = true});
  ASSERT_EQ(Convert("m", "w", 2), absl::OkStatus());
  EXPECT_EQ(Open("w")->fingerprint(), model->fingerprint());
  fs::remove(Weights("w", "manifest.json"));
  const std::string own = Open("w")->fingerprint();
  EXPECT_EQ(own.size(), 16u);
  EXPECT_NE(own, model->fingerprint());
  EXPECT_EQ(Open("w")->fingerprint(), own);
  ExpectSameModel(*model, *Open("w"), 2);
  const std::string path = Weights("w", "layers.1.attention.wo.1.weight"), whole = Read(path);
  std::string altered = whole;
  altered[0] ^= 1;
  Put(path, altered);
  EXPECT_EQ(Refusal("w"), "");  // nothing to tell it by
  EXPECT_NE(Open("w")->fingerprint(), own);
  Put(path, whole.substr(2));
  EXPECT_NE(Refusal("w").find(path), std::string::npos);
  fs::remove(path);
  EXPECT_NE(Refusal("w").find(path), std::string::npos);
}

TEST_F(WorkspaceTest, TheEnginesKeysMayBeEditedTheModelsMayNot) {
  ASSERT_NE(Random("m", {}), nullptr);
  ASSERT_EQ(Convert("m", "w", 2), absl::OkStatus());
  const std::string path = Weights("w", "config.ini"), whole = Read(path);
  EXPECT_EQ(Open("w")->kv_advice().format, "f16");
  Edit(path, "quant_policy = 0", "quant_policy = 4");
  Edit(path, "max_batch_size = 64", "max_batch_size = 8");
  Edit(path, "session_len = 520", "session_len = 100");
  EXPECT_EQ(Refusal("w"), "");
  EXPECT_EQ(Open("w")->kv_advice().format, "int8");
  EXPECT_EQ(Open("w")->kv_advice().scales_dir, WorkspaceWeights(folder_ + "/w"));
  for (const auto& [from, to] : {std::pair{"norm_eps = 1e-05", "norm_eps = 1e-06"},
                                 {"rope_theta = 10000", "rope_theta = 20000"},
                                 {"end_id = 2", "end_id = 3"},
                                 {"max_position_embeddings = 512", "max_position_embeddings = 1024"},
                                 {"weight_type = fp16", "weight_type = bf16"}}) {
    Put(path, whole);
    Edit(path, from, to);
    EXPECT_NE(Refusal("w").find(path + " was altered"), std::string::npos) << to << ": " << Refusal("w");
  }
  Put(path, whole);
  const std::string manifest = Weights("w", "manifest.json");
  for (const auto& [from, to, word] :
       {std::tuple{"\"format_version\": 1", "\"format_version\": 2", "format_version=2"},
        {"turbomind-0.2", "turbomind-0.4", "layout=turbomind-0.4"},
        {"\"model\": \"", "\"model\": \"x", "is not 16 hex digits"},
        {"\"xxh3\": \"", "\"xxh3\": \"x", "xxh3=x"},
        {"\"output.weight\"", "\"other.weight\"", "output.weight is not in manifest.json"},
        {"\"norm.weight\": {\n   \"bytes\": 128", "\"norm.weight\": {\n   \"bytes\": 127",
         "another shape, size or dtype"},
        {"\"files\"", "\"flies\"", "files is not an object"},
        {"\"tp\": 2", "\"tp\": 4", "config.ini was altered"}}) {
    const std::string text = Read(manifest);
    Edit(manifest, from, to);
    EXPECT_NE(Refusal("w").find(word), std::string::npos) << to << ": " << Refusal("w");
    Put(manifest, text);
  }
  Put(manifest, std::string(100000, '['));
  EXPECT_NE(Refusal("w").find("manifest.json"), std::string::npos);
}

TEST_F(WorkspaceTest, WhatTheLayoutCannotSayIsRefused) {
  const auto refusal = [&](const RandomModelSpec& spec, int tp) {
    EXPECT_NE(Random("m", spec), nullptr);
    const absl::Status status = Convert("m", "w", tp);
    EXPECT_FALSE(fs::exists(folder_ + "/w"));
    return std::string(status.message());
  };
  const std::pair<RandomModelSpec, const char*> cases[] = {
      {{.model_type = "qwen3"}, "q/k norms"},
      {{.has_mlp_bias = true}, "MLP biases"},
      {{.model_type = "mistral", .extra_json = R"("sliding_window":16)"}, "sliding_window=16"},
      {{.hidden_size = 48}, "hidden_size=48"},
      {{.extra_json = R"("partial_rotary_factor":0.5)"}, "partly rotated heads: 4 of head_dim=8"},
      {{.extra_json = R"("rope_scaling":{"type":"linear","factor":2})"}, "RoPE scaling but dynamic"},
  };
  for (const auto& [spec, word] : cases) EXPECT_NE(refusal(spec, 1).find(word), std::string::npos) << word;
  EXPECT_NE(refusal({}, 8).find("tp=8"), std::string::npos);
  EXPECT_NE(refusal({.intermediate_size = 171}, 2).find("intermediate_size=171"), std::string::npos);

  ASSERT_NE(Random("m", {.dtype = DType::kF32}), nullptr);
  const std::string path = folder_ + "/m/model.safetensors";
  std::string bytes = Read(path);
  const float large = 1e6f;
  std::memcpy(bytes.data() + bytes.size() - sizeof large, &large, sizeof large);
  Put(path, bytes);
  EXPECT_NE(std::string(Convert("m", "w", 1).message()).find("output.weight would hold values that f16 cannot"),
            std::string::npos);
  EXPECT_EQ(FilesIn(folder_), std::vector<std::string>{"m"});  // nothing is left behind
}

TEST_F(WorkspaceTest, AnExistingFolderIsKeptUnlessForcedAndAWorkspace) {
  ASSERT_NE(Random("m", {}), nullptr);
  Put(folder_ + "/m/tokenizer.json", "{}");
  Put(folder_ + "/m/model.safetensors.index.json", "{}");
  ASSERT_EQ(Convert("m", "w/", 1), absl::OkStatus());
  EXPECT_TRUE(fs::exists(WorkspaceTokenizer(folder_ + "/w") + "/tokenizer.json"));
  EXPECT_FALSE(fs::exists(WorkspaceTokenizer(folder_ + "/w") + "/model.safetensors.index.json"));
  Put(Weights("w", "mine"), "kept");
  EXPECT_TRUE(absl::IsAlreadyExists(Convert("m", "w", 2)));
  EXPECT_EQ(Read(Weights("w", "mine")), "kept");
  fs::create_directory(folder_ + "/other");
  Put(folder_ + "/other/mine", "kept");
  EXPECT_TRUE(absl::IsFailedPrecondition(Convert("m", "other", 2, /*replaces=*/true)));
  EXPECT_EQ(Read(folder_ + "/other/mine"), "kept");
  // A forced conversion that fails keeps the old one.
  EXPECT_FALSE(Convert("m", "w", 8, /*replaces=*/true).ok());
  EXPECT_EQ(Read(Weights("w", "mine")), "kept");
  ASSERT_EQ(Convert("m", "w", 2, /*replaces=*/true), absl::OkStatus());
  EXPECT_FALSE(fs::exists(Weights("w", "mine")));
  EXPECT_TRUE(fs::exists(Weights("w", "layers.0.attention.wo.1.weight")));
  EXPECT_EQ(FilesIn(folder_).size(), 3u);  // m, w, other
}

TEST_F(WorkspaceTest, ProgressCountsEveryByte) {
  const auto model = Random("m", {.has_bias = true});
  int64_t last = 0, whole = 0, bytes = 0;
  ASSERT_EQ(WriteWorkspace(*model, folder_ + "/m", folder_ + "/w", {.world_size = 2, .model_name = "tiny"},
                           [&](int64_t done, int64_t total) {
                             EXPECT_GT(done, last);
                             last = done;
                             whole = total;
                           }),
            absl::OkStatus());
  for (const std::string& file : FilesIn(Weights("w", ""))) {
    if (file != "config.ini" && file != "manifest.json")
      bytes += static_cast<int64_t>(fs::file_size(Weights("w", file)));
  }
  EXPECT_EQ(last, bytes);
  EXPECT_EQ(whole, bytes);
  EXPECT_TRUE(absl::IsInvalidArgument(WriteWorkspace(*model, folder_ + "/m", folder_ + "/x",
                                                     {.world_size = 2, .model_name = "tiny\nhead_num = 1"}, {})));
}

// ---- Weights of four bits.

class Int4Workspace : public WorkspaceTest {
 protected:
  static RandomModelSpec Spec(const std::string& family = "llama", int64_t intermediate_size = 256) {
    return {.model_type = family,
            .hidden_size = 128,
            .n_heads = 8,
            .n_kv_heads = 4,
            .head_dim = 16,
            .intermediate_size = intermediate_size,
            .vocab_size = 511,
            .has_bias = true};
  }
  // An AWQ folder `name`.
  void Quantized(const std::string& name, const RandomModelSpec& spec, int32_t group_size, int bits = 4) const {
    ASSERT_EQ(WriteRandomModel(folder_ + "/floats", spec), absl::OkStatus());
    const QuantizeOptions options{.bits = bits, .group_size = group_size, .replaces = true};
    ASSERT_EQ(WriteQuantized(folder_ + "/floats", folder_ + "/" + name, options, {}), absl::OkStatus());
    fs::remove_all(folder_ + "/floats");
  }
};

TEST_F(Int4Workspace, GoldenColumnsAreInTheRotarysOrderFusedAndCut) {
  Quantized("q", Spec(), 32);
  ASSERT_EQ(Convert("q", "w", 2), absl::OkStatus());
  const auto listing = ListTensors(folder_ + "/q");
  ASSERT_TRUE(listing.ok()) << listing.status();
  struct Column {
    const char* matrix;
    int64_t row;
  };
  const auto expect = [&](const std::string& stem, const std::vector<Column>& columns, int64_t first_in, int64_t n_in) {
    const std::string qweight = Read(Weights("w", "layers.1." + stem + ".qweight")),
                      pairs = Read(Weights("w", "layers.1." + stem + ".scales_zeros"));
    const auto n_out = static_cast<int64_t>(columns.size());
    ASSERT_EQ(static_cast<int64_t>(qweight.size()), n_in * n_out / 2) << stem;
    ASSERT_EQ(static_cast<int64_t>(pairs.size()), n_in / 32 * n_out * 4) << stem;
    for (int64_t out = 0; out < n_out; ++out) {
      const std::string name = absl::StrCat("model.layers.1.", columns[out].matrix, ".weight");
      const kernels::GroupedMatrix& m = *std::ranges::find(listing->tensors, name, &NamedTensor::name)->view.grouped;
      for (int64_t in = 0; in < n_in; ++in) {
        const int64_t nibble = InputNibble(in, n_out) + OutputNibble(out);
        ASSERT_EQ(static_cast<uint8_t>(qweight[nibble / 2]) >> nibble % 2 * 4 & 15,
                  kernels::GroupedValue(m, m.qweight, first_in + in, columns[out].row))
            << stem << " " << out << " " << in;
      }
      for (int64_t group = 0; group < n_in / 32; ++group) {
        uint16_t pair[2];
        std::memcpy(pair, &pairs[(group * n_out + out) * 4], 4);
        const int64_t source = first_in / 32 + group;
        EXPECT_EQ(pair[0], 0x5400 | kernels::GroupedValue(m, m.qzeros, source, columns[out].row) << 4) << stem;
        EXPECT_EQ(pair[1], kernels::GroupedScale(m, source, columns[out].row)) << stem;
      }
    }
  };
  // Rank 1 of 2: query heads 4 … 7, KV heads 2 and 3; dimensions 0, 8, 1, 9, … of a head of q and k.
  std::vector<Column> qkv, hidden, gate_up;
  for (int64_t c = 0; c < 4 * 16; ++c) qkv.push_back({"self_attn.q_proj", 64 + c / 16 * 16 + c % 16 / 2 + c % 2 * 8});
  for (int64_t c = 0; c < 2 * 16; ++c) qkv.push_back({"self_attn.k_proj", 32 + c / 16 * 16 + c % 16 / 2 + c % 2 * 8});
  for (int64_t c = 0; c < 2 * 16; ++c) qkv.push_back({"self_attn.v_proj", 32 + c});
  expect("attention.w_qkv.1", qkv, 0, 128);
  for (int64_t c = 0; c < 128; ++c) hidden.push_back({"self_attn.o_proj", c});
  expect("attention.wo.1", hidden, 64, 64);
  for (int64_t c = 0; c < 128; ++c)
    gate_up.insert(gate_up.end(), {{"mlp.gate_proj", 128 + c}, {"mlp.up_proj", 128 + c}});
  expect("feed_forward.w13.1", gate_up, 0, 128);
  for (Column& column : hidden) column.matrix = "mlp.down_proj";
  expect("feed_forward.w2.1", hidden, 128, 128);
  EXPECT_FALSE(fs::exists(Weights("w", "layers.1.feed_forward.w1.1.qweight")));

  const auto config = ParseTurbomindConfig(Read(Weights("w", "config.ini")));
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->weight_type, "int4");
  EXPECT_EQ(config->group_size, 32);
  const auto manifest = ParseManifest(Read(Weights("w", "manifest.json")));
  ASSERT_TRUE(manifest.ok()) << manifest.status();
  const WorkspaceManifest::File& w2 = manifest->files.at("layers.1.feed_forward.w2.1.qweight");
  EXPECT_EQ(w2.shape, (std::vector<int64_t>{128, 128}));
  EXPECT_EQ(w2.dtype, DType::kInt4);
  EXPECT_EQ(w2.bytes, 128 * 128 / 2);
  EXPECT_EQ(manifest->files.at("layers.1.feed_forward.w2.1.scales_zeros").shape, (std::vector<int64_t>{4, 256}));
  EXPECT_EQ(manifest->dtype, DType::kF16);
}

TEST_F(Int4Workspace, HoldsTheSameValuesAtEveryDegreeWhateverItWasCutFor) {
  for (const char* family : {"llama", "internlm2", "qwen2"}) {
    Quantized("q", Spec(family), 32);
    const auto model = Open("q");
    ASSERT_NE(model, nullptr);
    for (const int cut : {1, 2, 4}) {
      SCOPED_TRACE(absl::StrCat(family, " cut for ", cut));
      const std::string name = absl::StrCat("w", cut);
      ASSERT_EQ(Convert("q", name, cut, /*replaces=*/true), absl::OkStatus());
      const auto workspace = Open(name);
      ASSERT_NE(workspace, nullptr);
      EXPECT_EQ(workspace->fingerprint(), model->fingerprint());
      for (const int world : {1, 2, 4, 8}) ExpectSameModel(*model, *workspace, world);  // at 8 wo begins inside a group
    }
    ASSERT_EQ(Convert("w2", "again", 4, /*replaces=*/true), absl::OkStatus());
    for (const std::string& file : FilesIn(Weights("w4", ""))) {
      EXPECT_TRUE(Read(Weights("again", file)) == Read(Weights("w4", file))) << file;
    }
  }
  // What is not quantised becomes f16, and the model with it.
  RandomModelSpec spec = Spec();
  spec.dtype = DType::kBF16;
  Quantized("q", spec, 32);
  ASSERT_EQ(Convert("q", "w", 2), absl::OkStatus());
  EXPECT_EQ(Open("w")->fingerprint(), Open("q")->FingerprintAs(DType::kF16));
  EXPECT_NE(Open("w")->fingerprint(), Open("q")->fingerprint());
}

TEST_F(Int4Workspace, EveryFileIsGuardedAndWithoutAManifestSizesAndParametersAre) {
  Quantized("q", Spec(), 64);
  ASSERT_EQ(Convert("q", "w", 2), absl::OkStatus());
  EXPECT_EQ(ExpectEveryFileIsGuarded("w"), 3 + 2 * (2 + 2 * (4 * 2 + 2)));

  fs::remove(Weights("w", "manifest.json"));
  ExpectSameModel(*Open("q"), *Open("w"), 4);
  EXPECT_NE(Open("w")->fingerprint(), Open("q")->fingerprint());
  for (const char* file : {"layers.0.attention.wo.1.qweight", "layers.1.feed_forward.w13.1.scales_zeros"}) {
    const std::string path = Weights("w", file), whole = Read(path);
    Put(path, whole.substr(4));
    EXPECT_NE(Refusal("w").find(absl::StrCat(path, " has ")), std::string::npos) << Refusal("w");
    fs::remove(path);
    EXPECT_NE(Refusal("w").find(path), std::string::npos) << Refusal("w");
    Put(path, whole);
  }
  // A zero point without the 64, of another build or of no build at all; a scale beyond f16.
  const std::string path = Weights("w", "layers.1.attention.w_qkv.1.scales_zeros"), whole = Read(path);
  for (const auto& [at, bytes, word] :
       {std::tuple{size_t{8}, std::string("\x00\x45", 2), "group 0 of output 2 has zero point 5 "},
        {whole.size() - 2, std::string("\x00\x7C", 2), "and scale inf"}}) {
    std::string altered = whole;
    Put(path, altered.replace(at, 2, bytes));
    EXPECT_NE(Refusal("w", 1, 2).find(path + " is none of layout 0.2"), std::string::npos) << Refusal("w", 1, 2);
    EXPECT_NE(Refusal("w", 1, 2).find(word), std::string::npos) << Refusal("w", 1, 2);
    EXPECT_EQ(Refusal("w", 0, 2), "");  // rank 0 does not read it
  }
}

TEST_F(Int4Workspace, HostileConfigurationsAreRefusedByName) {
  Quantized("q", Spec(), 32);
  ASSERT_EQ(Convert("q", "w", 2), absl::OkStatus());
  const std::string path = Weights("w", "config.ini"), whole = Read(path);
  Edit(path, "group_size = 32", "group_size = 16");
  EXPECT_NE(Refusal("w").find(path + " was altered"), std::string::npos) << Refusal("w");
  Put(path, whole);
  const std::string manifest = Weights("w", "manifest.json"), listed = Read(manifest);
  Edit(manifest, "\"dtype\": \"int4\"", "\"dtype\": \"int8\"");
  EXPECT_NE(Refusal("w").find("dtype=int8 is neither f16 nor int4"), std::string::npos) << Refusal("w");
  Put(manifest, listed);
  Edit(manifest, "\"dtype\": \"int4\"", "\"dtype\": \"f16\"");
  EXPECT_NE(Refusal("w").find("another shape, size or dtype"), std::string::npos) << Refusal("w");
  fs::remove(manifest);
  for (const auto& [from, to, word] :
       {std::tuple{"weight_type = int4", "weight_type = int8", "weight_type=int8 is not supported"},
        {"weight_type = int4", "weight_type = fp16", "layers.0.attention.w_qkv.0.weight"},
        {"group_size = 32", "group_size = 0", "group_size=0"},
        {"group_size = 32", "group_size = -1", "group_size=-1 is not in"},
        {"group_size = 32", "group_size = 4294967328", "group_size=4294967328 is not in"},
        {"group_size = 32\n", "", "group_size=0"},
        {"group_size = 32", "group_size = 48", "128 inputs, which are not whole groups of 48"},
        {"group_size = 32", "group_size = 64", "w_qkv.0.scales_zeros has 2048 bytes instead of 1024"},
        {"inter_size = 256", "inter_size = 320", "w13.0.qweight has 16384 bytes instead of 20480"},
        {"inter_size = 256", "inter_size = 288",
         "w2.0.qweight would have 144 inputs, which are not whole groups of 32"},
        {"head_num = 8", "head_num = 6", "kv_head_num=4 does not divide head_num=6"}}) {
    Put(path, whole);
    Edit(path, from, to);
    EXPECT_NE(Refusal("w").find(word), std::string::npos) << to << ": " << Refusal("w");
  }
  Put(path, whole);
  Edit(path, "group_size = 32", "group_size = 8");
  Edit(path, "inter_size = 256", "inter_size = 272");
  EXPECT_NE(Refusal("w").find("w13.0.qweight would be [128, 272], which is not of whole tiles of 32"),
            std::string::npos)
      << Refusal("w");
  Put(path, whole);
  EXPECT_EQ(Refusal("w"), "");
}

TEST_F(Int4Workspace, MutatedOnesNeverCrash) {
  Quantized("q", Spec(), 32);
  ASSERT_EQ(Convert("q", "w", 2), absl::OkStatus());
  ASSERT_EQ(Convert("q", "bare", 2), absl::OkStatus());
  fs::remove(Weights("bare", "manifest.json"));
  const int opened = OpenedOfMutated(
      {{"w", "manifest.json"}, {"bare", "config.ini"}, {"bare", "layers.0.feed_forward.w2.1.scales_zeros"}}, 300);
  EXPECT_GT(opened, 90);  // whole tensor files always open; Verify is what reads them
  EXPECT_LT(opened, 290);
}

TEST_F(Int4Workspace, WhatRanksCannotShareIsRefusedAtConversion) {
  Quantized("q", Spec("llama", 192), 64);
  EXPECT_NE(
      std::string(Convert("q", "w", 2).message())
          .find("at tp=2 layers.0.feed_forward.w2.0.qweight would have 96 inputs, which are not whole groups of 64"),
      std::string::npos)
      << Convert("q", "w", 2);
  EXPECT_EQ(Convert("q", "one", 1), absl::OkStatus());
  ExpectSameModel(*Open("q"), *Open("one"), 2);  // which no file of its own could hold
  Quantized("q8", Spec(), 64, /*bits=*/8);
  EXPECT_NE(std::string(Convert("q8", "w", 1).message()).find("weights of 8 bits"), std::string::npos);
  EXPECT_FALSE(fs::exists(folder_ + "/w"));

  // LLaMA-7B has 86 groups of 128 in w2: enough for two ranks, not for four.
  const ModelConfig llama{.hidden_size = 4096,
                          .n_heads = 32,
                          .n_kv_heads = 32,
                          .head_dim = 128,
                          .intermediate_size = 11008,
                          .weight_bits = 4,
                          .weight_group_size = 128};
  EXPECT_EQ(CheckInt4Files(llama, 2), absl::OkStatus());
  EXPECT_NE(std::string(CheckInt4Files(llama, 4).message()).find("w2.0.qweight would have 2752 inputs"),
            std::string::npos)
      << CheckInt4Files(llama, 4);
}

}  // namespace
}  // namespace rankwise::weights
