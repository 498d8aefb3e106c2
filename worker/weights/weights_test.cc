#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <limits>
#include <random>

#include "base/mapped_file.h"
#include "worker/weights/checkpoint.h"
#include "worker/weights/random_model.h"
#include "worker/weights/safetensors.h"

namespace rankwise::weights {
namespace {

namespace fs = std::filesystem;

class WeightsTest : public ::testing::Test {
 protected:
  WeightsTest() : folder_(::testing::TempDir() + "weights_" + std::to_string(getpid())) {
    fs::create_directories(folder_);
  }
  ~WeightsTest() override { fs::remove_all(folder_); }

  std::string Write(const std::string& name, const std::string& bytes) const {
    EXPECT_EQ(WriteFileAtomically(folder_ + "/" + name, bytes), absl::OkStatus());
    return folder_ + "/" + name;
  }
  static std::string WithHeader(const std::string& header, size_t data_bytes) {
    const uint64_t length = header.size();
    std::string bytes(sizeof length, '\0');
    std::memcpy(bytes.data(), &length, sizeof length);
    return bytes + header + std::string(data_bytes, '\0');
  }
  std::string Refusal(const std::string& header, size_t data_bytes) const {
    const auto file = SafetensorsFile::Open(Write("x.safetensors", WithHeader(header, data_bytes)));
    return file.ok() ? "" : std::string(file.status().message());
  }

  const std::string folder_;
};

std::vector<float> Values(const kernels::MatrixView& view) {
  std::vector<float> values;
  for (int64_t r = 0; r < view.rows; ++r) {
    for (int64_t c = 0; c < view.cols; ++c) {
      const std::byte* source = view.data + (r * view.row_stride + c) * kernels::DTypeBytes(view.dtype);
      float value = 0;
      EXPECT_EQ(view.dtype, kernels::DType::kF32);
      std::memcpy(&value, source, sizeof value);
      values.push_back(value);
    }
  }
  return values;
}

std::vector<float> Values(const std::vector<kernels::MatrixView>& blocks) {
  std::vector<float> values;
  for (const auto& block : blocks) {
    const std::vector<float> more = Values(block);
    values.insert(values.end(), more.begin(), more.end());
  }
  return values;
}

TEST_F(WeightsTest, LyingHeadersAreRefusedInWords) {
  EXPECT_EQ(Refusal(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})", 8), "");
  const std::pair<const char*, const char*> cases[] = {
      {R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,9]}})", "lie outside"},
      {R"({"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}})", "is not 8 bytes"},
      {R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}})", "lie outside"},
      {R"({"a":{"dtype":"F99","shape":[2],"data_offsets":[0,8]}})", "unknown dtype F99"},
      {R"({"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}})", "bad dimension"},
      {R"({"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}})", "bad dimension"},
      {R"({"a":{"dtype":"F32","shape":[1099511627776,1099511627776],"data_offsets":[0,0]}})", "is not 0 bytes"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}})",
       "overlap"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})",
       "twice"},
      {R"({"a":7})", "needs dtype"},
      {R"([1,2])", "not the JSON"},
      {R"({"a":)", "not the JSON"},
  };
  for (const auto& [header, expected] : cases) {
    EXPECT_NE(Refusal(header, 8).find(expected), std::string::npos) << header << ": " << Refusal(header, 8);
  }
  EXPECT_NE(Refusal(std::string(100000, '['), 0).find("nested"), std::string::npos);
}

TEST_F(WeightsTest, TruncatedAndOversizedFilesAreRefused) {
  const std::string whole = WithHeader(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})", 8);
  for (size_t size = 0; size < whole.size(); ++size) {
    EXPECT_FALSE(SafetensorsFile::Open(Write("t.safetensors", whole.substr(0, size))).ok()) << size;
  }
  std::string lying = whole;
  const uint64_t huge = std::numeric_limits<uint64_t>::max();
  std::memcpy(lying.data(), &huge, sizeof huge);
  EXPECT_FALSE(SafetensorsFile::Open(Write("t.safetensors", lying)).ok());
  EXPECT_TRUE(absl::IsNotFound(SafetensorsFile::Open(folder_ + "/absent").status()));
}

TEST_F(WeightsTest, MutatedModelsNeverCrash) {
  ASSERT_EQ(
      WriteRandomModel(
          folder_ + "/m",
          {.hidden_size = 16, .n_layers = 1, .n_heads = 2, .n_kv_heads = 1, .intermediate_size = 8, .vocab_size = 16}),
      absl::OkStatus());
  const std::string config = *ReadTextFile(folder_ + "/m/config.json");
  const std::string tensors = *ReadTextFile(folder_ + "/m/model.safetensors");
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, tensors.data(), sizeof header_bytes);
  std::mt19937_64 random(5);
  int opened = 0;
  for (int round = 0; round < 2000; ++round) {
    const bool hits_config = round % 2 == 0;
    std::string bytes = hits_config ? config : tensors;
    for (int i = 0; i < 1 + static_cast<int>(random() % 3); ++i) {
      const size_t at = random() % (hits_config ? bytes.size() : 8 + header_bytes);
      bytes[at] = random() % 3 == 0 ? "0123456789{}[],:\"-e"[random() % 19] : static_cast<char>(random());
    }
    if (random() % 10 == 0) bytes.resize(random() % bytes.size());
    Write(hits_config ? "m/config.json" : "m/model.safetensors", bytes);
    const auto checkpoint = Checkpoint::Open(folder_ + "/m");
    if (checkpoint.ok()) {
      ++opened;
      const auto plan = shard::PlanShard((*checkpoint)->config().dims(), {.rank = 0, .world_size = 1});
      if (plan.ok()) (*checkpoint)->Layer(0, *plan);
    }
    Write("m/config.json", config);
    Write("m/model.safetensors", tensors);
  }
  EXPECT_GT(opened, 0);
  EXPECT_LT(opened, 2000);
}

TEST_F(WeightsTest, AbsurdConfigurationsAreRefusedByName) {
  const auto refusal = [](const std::string& change) {
    std::string text = R"({"model_type":"llama","hidden_size":64,"num_hidden_layers":2,"num_attention_heads":8,)"
                       R"("num_key_value_heads":4,"intermediate_size":64,"vocab_size":100,"eos_token_id":2)";
    const auto config = ParseModelConfig(text + change + "}");
    return config.ok() ? "" : std::string(config.status().message());
  };
  EXPECT_EQ(refusal(""), "");
  EXPECT_NE(refusal(R"(,"num_hidden_layers":1e9)").find("num_hidden_layers"), std::string::npos);
  EXPECT_NE(refusal(R"(,"vocab_size":99999999999)").find("vocab_size"), std::string::npos);
  EXPECT_NE(refusal(R"(,"hidden_size":-1)").find("hidden_size=-1"), std::string::npos);
  EXPECT_NE(refusal(R"(,"num_key_value_heads":3)").find("does not divide"), std::string::npos);
  EXPECT_NE(refusal(R"(,"head_dim":7)").find("odd"), std::string::npos);
  EXPECT_NE(refusal(R"(,"hidden_act":"gelu")").find("gelu"), std::string::npos);
  EXPECT_NE(refusal(R"(,"model_type":"gpt9")").find("gpt9"), std::string::npos);
  EXPECT_NE(refusal(R"(,"eos_token_id":100)").find("eos_token_id=100"), std::string::npos);
  EXPECT_NE(refusal(R"(,"rope_scaling":{"type":"magic"})").find("magic"), std::string::npos);
  EXPECT_NE(refusal(R"(,"rms_norm_eps":"small")").find("rms_norm_eps"), std::string::npos);
}

TEST_F(WeightsTest, FamiliesFollowTheirRules) {
  const auto parse = [](const std::string& family, const std::string& more) {
    const auto config = ParseModelConfig(
        R"({"num_key_value_heads":4,"model_type":")" + family +
        R"(","hidden_size":64,"num_hidden_layers":4,"num_attention_heads":8,"intermediate_size":64,"vocab_size":100)" +
        more + "}");
    EXPECT_TRUE(config.ok()) << config.status();
    return config.value_or(ModelConfig{.sliding_window = std::vector<int32_t>(4)});
  };
  EXPECT_FALSE(parse("llama", "").has_qkv_bias);
  EXPECT_TRUE(parse("internlm2", "").has_o_bias);
  EXPECT_FALSE(parse("internlm2", R"(,"bias":false)").has_qkv_bias);
  EXPECT_TRUE(parse("llama", R"(,"attention_bias":true)").has_o_bias);
  EXPECT_TRUE(parse("internlm", "").has_qkv_bias);
  EXPECT_TRUE(parse("internlm", "").has_o_bias);
  EXPECT_FALSE(parse("internlm", R"(,"bias":false)").has_o_bias);
  EXPECT_TRUE(parse("qwen2", "").has_qkv_bias);
  EXPECT_FALSE(parse("qwen2", "").has_o_bias);
  EXPECT_TRUE(parse("qwen3", "").has_qk_norm);
  EXPECT_TRUE(parse("internlm2", "").has_fused_qkv);
  EXPECT_EQ(parse("mistral", R"(,"sliding_window":7)").sliding_window, (std::vector<int32_t>{7, 7, 7, 7}));
  EXPECT_EQ(parse("mistral", R"(,"sliding_window":null)").sliding_window, (std::vector<int32_t>{0, 0, 0, 0}));
  EXPECT_EQ(parse("qwen2", R"(,"sliding_window":7,"use_sliding_window":true,"max_window_layers":3)").sliding_window,
            (std::vector<int32_t>{0, 0, 0, 7}));
  EXPECT_EQ(parse("qwen2", R"(,"sliding_window":7,"use_sliding_window":false)").sliding_window,
            (std::vector<int32_t>{0, 0, 0, 0}));
}

class FamilyTest : public WeightsTest, public ::testing::WithParamInterface<const char*> {};

TEST_P(FamilyTest, SlicesOfAllRanksAreTheWhole) {
  RandomModelSpec spec{.model_type = GetParam(), .has_bias = true, .dtype = kernels::DType::kF32, .file_count = 2};
  ASSERT_EQ(WriteRandomModel(folder_ + "/m", spec), absl::OkStatus());
  const auto opened = Checkpoint::Open(folder_ + "/m");
  ASSERT_TRUE(opened.ok()) << opened.status();
  const Checkpoint& checkpoint = **opened;
  const auto dims = checkpoint.config().dims();
  const auto whole = checkpoint.Layer(1, *shard::PlanShard(dims, {.rank = 0, .world_size = 1}));
  const std::vector<float> qkv = Values(whole.qkv), gate_up = Values(whole.gate_up), wo = Values(whole.wo);
  const int64_t hidden = spec.hidden_size, dim = spec.head_dim;
  for (const int world : {2, 4, 8}) {
    std::vector<float> q, gate, columns(wo.size());
    for (int rank = 0; rank < world; ++rank) {
      const auto plan = *shard::PlanShard(dims, {.rank = rank, .world_size = world});
      const auto layer = checkpoint.Layer(1, plan);
      const std::vector<float> mine = Values(layer.qkv);
      ASSERT_EQ(mine.size(), static_cast<size_t>((plan.heads.count() + 2 * plan.kv_heads.count()) * dim * hidden));
      q.insert(q.end(), mine.begin(), mine.begin() + plan.heads.count() * dim * hidden);
      const int64_t k_at = plan.heads.count() * dim * hidden;
      const int64_t k_whole = (spec.n_heads + plan.kv_heads.begin) * dim * hidden;
      EXPECT_TRUE(std::equal(mine.begin() + k_at, mine.begin() + k_at + plan.kv_heads.count() * dim * hidden,
                             qkv.begin() + k_whole));
      const std::vector<float> halves = Values(layer.gate_up);
      gate.insert(gate.end(), halves.begin(), halves.begin() + plan.intermediate.count() * hidden);
      const std::vector<float> part = Values(layer.wo);
      for (int64_t r = 0; r < hidden; ++r) {
        std::copy_n(part.begin() + r * plan.heads.count() * dim, plan.heads.count() * dim,
                    columns.begin() + r * spec.n_heads * dim + plan.heads.begin * dim);
      }
      if (checkpoint.config().has_o_bias) {
        EXPECT_EQ(layer.wo_bias, whole.wo_bias);
      }
    }
    EXPECT_TRUE(std::equal(q.begin(), q.end(), qkv.begin()));
    EXPECT_TRUE(std::equal(gate.begin(), gate.end(), gate_up.begin()));
    EXPECT_EQ(columns, wo);
  }
  EXPECT_EQ((*Checkpoint::Open(folder_ + "/m"))->fingerprint(), checkpoint.fingerprint());
}

INSTANTIATE_TEST_SUITE_P(Families, FamilyTest,
                         ::testing::Values("llama", "internlm", "internlm2", "mistral", "qwen2", "qwen3"));

}  // namespace
}  // namespace rankwise::weights
