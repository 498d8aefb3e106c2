#include "worker/weights/model_config.h"

#include <gtest/gtest.h>

#include <filesystem>

#include "base/mapped_file.h"

namespace rankwise::weights {
namespace {

using Scaling = RopeConfig::Scaling;

std::string Text(const std::string& family, const std::string& more) {
  return R"({"model_type":")" + family + R"(","hidden_size":4096,"num_hidden_layers":4,"num_attention_heads":32,)" +
         R"("intermediate_size":64,"vocab_size":100)" + more + "}";
}

ModelConfig Parse(const std::string& family, const std::string& more) {
  const auto config = ParseModelConfig(Text(family, more));
  EXPECT_TRUE(config.ok()) << config.status();
  return config.value_or(ModelConfig{});
}

absl::Status Refusal(const std::string& more, const std::string& family = "llama") {
  return ParseModelConfig(Text(family, more)).status();
}

// What transformers' configuration classes assume of absent keys.
TEST(ModelConfig, SilentKeysTakeTheFamilysDefaults) {
  EXPECT_EQ(Parse("llama", "").n_kv_heads, 32);
  EXPECT_EQ(Parse("mistral", "").n_kv_heads, 8);
  EXPECT_EQ(Parse("mistral", R"(,"num_key_value_heads":null)").n_kv_heads, 32);
  EXPECT_EQ(Parse("mistral", "").sliding_window, (std::vector<int32_t>{4096, 4096, 4096, 4096}));
  EXPECT_EQ(Parse("qwen2", "").n_kv_heads, 32);
  EXPECT_EQ(Parse("qwen2", R"(,"hidden_size":2048)").head_dim, 64);
  EXPECT_EQ(Parse("qwen3", R"(,"hidden_size":2048)").head_dim, 128);
  EXPECT_EQ(Parse("qwen3", "").max_position, 32768);
  EXPECT_EQ(Parse("llama", "").max_position, 2048);
  EXPECT_EQ(Parse("mistral", "").max_position, 131072);
  EXPECT_EQ(Parse("llama", R"(,"head_dim":null)").head_dim, 128);
  EXPECT_FLOAT_EQ(Parse("llama", "").rms_norm_eps, 1e-6f);
  EXPECT_FALSE(Parse("qwen2", "").is_tied);
  EXPECT_EQ(Parse("qwen2", "").bos_id, -1);
  EXPECT_TRUE(Parse("qwen2", "").eos_ids.empty());
}

TEST(ModelConfig, QwenWindowsFollowLayerTypesOrElseMaxWindowLayers) {
  const std::string on = R"(,"use_sliding_window":true,"sliding_window":7)";
  EXPECT_EQ(Parse("qwen3", on + R"(,"max_window_layers":3)").sliding_window, (std::vector<int32_t>{0, 0, 0, 7}));
  EXPECT_EQ(Parse("qwen3", on).sliding_window, (std::vector<int32_t>{0, 0, 0, 0}));  // 28 by default
  EXPECT_EQ(Parse("qwen3", on + R"(,"max_window_layers":9,"layer_types":["sliding_attention","full_attention",)" +
                               R"("sliding_attention","full_attention"])")
                .sliding_window,
            (std::vector<int32_t>{7, 0, 7, 0}));
  EXPECT_TRUE(absl::IsInvalidArgument(Refusal(R"(,"layer_types":["full_attention"])", "qwen3")));
  EXPECT_TRUE(absl::IsUnimplemented(
      Refusal(R"(,"layer_types":["linear_attention","full_attention","full_attention","full_attention"])", "qwen3")));
  EXPECT_TRUE(absl::IsInvalidArgument(
      Refusal(R"(,"layer_types":["sliding_attention","full_attention","full_attention","full_attention"])", "qwen3")));
}

TEST(ModelConfig, RopeScalingInAllItsSpellings) {
  const RopeConfig linear = Parse("llama", R"(,"rope_scaling":{"type":"linear","factor":4.0})").rope;
  EXPECT_EQ(linear.scaling, Scaling::kLinear);
  EXPECT_EQ(linear.factor, 4);
  EXPECT_EQ(Parse("llama", R"(,"rope_theta":1e6,"rope_scaling":null)").rope.theta, 1e6);
  EXPECT_EQ(Parse("llama", R"(,"rope_scaling":{"rope_type":"default"})").rope.scaling, Scaling::kNone);
  const RopeConfig newer =
      Parse(
          "llama",
          R"(,"max_position_embeddings":131072,"rope_parameters":{"rope_type":"llama3","rope_theta":500000.0,"factor":8.0,)"
          R"("low_freq_factor":1.0,"high_freq_factor":4.0,"original_max_position_embeddings":8192})")
          .rope;
  EXPECT_EQ(newer.scaling, Scaling::kLlama3);
  EXPECT_EQ(newer.theta, 500000);
  EXPECT_EQ(newer.original_max_position, 8192);
  const RopeConfig partial =
      Parse("llama", R"(,"rope_parameters":{"rope_type":"default","partial_rotary_factor":0.5})").rope;
  EXPECT_EQ(partial.rotary_dim, 64);
  // Dynamic NTK counts from the configured length, whatever the original one.
  const RopeConfig dynamic =
      Parse("internlm2", R"(,"max_position_embeddings":32768,"rope_scaling":{"type":"dynamic","factor":2.0})").rope;
  EXPECT_EQ(dynamic.scaling, Scaling::kDynamicNtk);
  EXPECT_EQ(dynamic.original_max_position, 32768);
  const ModelConfig internlm = Parse("internlm", R"(,"rotary":{"base":20000,"type":"dynamic"})");
  EXPECT_EQ(internlm.rope.scaling, Scaling::kDynamicNtk);
  EXPECT_EQ(internlm.rope.theta, 20000);
  EXPECT_EQ(internlm.rope.factor, 1);
}

TEST(ModelConfig, YarnFactorIsTheRatioOfLengthsWhenNull) {
  const ModelConfig config = Parse("qwen2", R"(,"max_position_embeddings":8192,"rope_scaling":{"rope_type":"yarn",)"
                                            R"("factor":null,"original_max_position_embeddings":2048})");
  EXPECT_EQ(config.rope.factor, 4);
  EXPECT_EQ(config.max_position, 8192);
}

TEST(ModelConfig, ScalingStretchesTheContext) {
  EXPECT_EQ(Parse("llama", R"(,"rope_scaling":{"type":"linear","factor":4})").max_position, 8192);
  EXPECT_EQ(Parse("qwen2", R"(,"rope_scaling":{"type":"yarn","factor":4,"original_max_position_embeddings":32768})")
                .max_position,
            131072);
  EXPECT_EQ(Parse("llama", R"(,"rope_scaling":{"type":"dynamic","factor":4})").max_position, 2048);
  EXPECT_NE(Refusal(R"(,"max_position_embeddings":16000000,"rope_scaling":{"type":"linear","factor":400})")
                .message()
                .find("stretched"),
            absl::string_view::npos);
}

TEST(ModelConfig, RopeThatWouldComputeSomethingElseIsRefused) {
  EXPECT_TRUE(absl::IsUnimplemented(Refusal(R"(,"rope_scaling":{"rope_type":"longrope","factor":4})")));
  EXPECT_TRUE(absl::IsUnimplemented(Refusal(R"(,"rope_scaling":{"rope_type":"yarn","factor":4,"truncate":false})")));
  EXPECT_TRUE(absl::IsUnimplemented(
      Refusal(R"(,"rope_parameters":{"full_attention":{"rope_type":"yarn","factor":4},"sliding_attention":{}})")));
  EXPECT_TRUE(absl::IsInvalidArgument(Refusal(R"(,"rope_scaling":{"type":"linear"})")));
  EXPECT_TRUE(absl::IsInvalidArgument(Refusal(R"(,"rope_scaling":{"type":"linear","factor":0})")));
  EXPECT_TRUE(absl::IsInvalidArgument(Refusal(R"(,"rope_scaling":"linear")")));
  EXPECT_TRUE(absl::IsInvalidArgument(Refusal(R"(,"rope_theta":1)")));
  EXPECT_TRUE(absl::IsInvalidArgument(Refusal(R"(,"head_dim":2,"rope_scaling":{"type":"dynamic","factor":2})")));
  EXPECT_TRUE(absl::IsInvalidArgument(
      Refusal(R"(,"rope_scaling":{"rope_type":"llama3","factor":8,"low_freq_factor":4,"high_freq_factor":4})")));
}

TEST(ModelConfig, HostileTextIsRefused) {
  // Brackets inside a string do not count, so they cannot hide nesting either: copies of a deep value would overflow
  // the stack.
  constexpr int kDeep = 300000;
  EXPECT_EQ(Refusal(",\"note\":\"" + std::string(100, '[') + R"(\"[[")"), absl::OkStatus());
  const absl::Status deep = Refusal(",\"note\":\"" + std::string(kDeep, ']') +
                                    "\",\"eos_token_id\":" + std::string(kDeep, '[') + std::string(kDeep, ']'));
  EXPECT_NE(deep.message().find("nests deeper"), absl::string_view::npos) << deep;
  EXPECT_TRUE(absl::IsInvalidArgument(ParseModelConfig("").status()));
  EXPECT_TRUE(absl::IsInvalidArgument(ParseModelConfig("[]").status()));
  EXPECT_TRUE(absl::IsInvalidArgument(ParseModelConfig("{\"model_type\":\"\xff\"}").status()));
  EXPECT_TRUE(absl::IsInvalidArgument(Refusal(R"(,"vocab_size":1e999)")));
  EXPECT_TRUE(absl::IsInvalidArgument(Refusal(R"(,"vocab_size":18446744073709551615)")));
  EXPECT_TRUE(absl::IsInvalidArgument(Refusal(R"(,"vocab_size":4194305)")));
  EXPECT_TRUE(absl::IsInvalidArgument(Refusal(R"(,"hidden_size":65537)")));
  EXPECT_TRUE(absl::IsInvalidArgument(Refusal(R"(,"hidden_size":65536,"num_attention_heads":1)")));  // head_dim 65536
  EXPECT_TRUE(absl::IsInvalidArgument(Refusal(R"(,"hidden_size":4097)")));
  EXPECT_TRUE(absl::IsInvalidArgument(Refusal(R"(,"eos_token_id":[2,-1])")));
  EXPECT_TRUE(absl::IsInvalidArgument(Refusal(R"(,"eos_token_id":[[2]])")));
  EXPECT_TRUE(absl::IsInvalidArgument(Refusal(R"(,"tie_word_embeddings":1)")));
  EXPECT_TRUE(absl::IsUnimplemented(Refusal(R"(,"quantization_config":{"quant_method":"gptq"})")));
  EXPECT_FALSE(absl::IsUnimplemented(Refusal(R"(,"quantization_config":{"quant_method":"awq"})")));
}

TEST(ModelConfig, GenerationConfigOverridesTheEndOfSequence) {
  const std::string folder = ::testing::TempDir() + "model_config_" + std::to_string(getpid());
  std::filesystem::create_directories(folder);
  const auto write = [&](const std::string& name, const std::string& text) {
    ASSERT_EQ(WriteFileAtomically(folder + "/" + name, text), absl::OkStatus());
  };
  EXPECT_TRUE(absl::IsNotFound(ReadModelConfig(folder).status()));
  write("config.json", Text("llama", R"(,"eos_token_id":2)"));
  EXPECT_EQ(ReadModelConfig(folder)->eos_ids, (std::vector<int32_t>{2}));
  write("generation_config.json", R"({"eos_token_id":[5,7]})");
  EXPECT_EQ(ReadModelConfig(folder)->eos_ids, (std::vector<int32_t>{5, 7}));
  write("generation_config.json", R"({"temperature":0.6})");
  EXPECT_EQ(ReadModelConfig(folder)->eos_ids, (std::vector<int32_t>{2}));
  write("generation_config.json", R"({"eos_token_id":100})");
  EXPECT_TRUE(absl::IsInvalidArgument(ReadModelConfig(folder).status()));
  std::filesystem::remove_all(folder);
}

}  // namespace
}  // namespace rankwise::weights
