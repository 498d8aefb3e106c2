#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/shard/shard_plan.h"

namespace rankwise::weights {

struct RopeConfig {
  enum class Scaling : uint8_t { kNone, kLinear, kDynamicNtk, kLlama3, kYarn };
  double theta = 10000;
  int rotary_dim = 0;  // ≤ head_dim
  Scaling scaling = Scaling::kNone;
  double factor = 1;
  int64_t original_max_position = 0;
  double low_freq_factor = 1, high_freq_factor = 4;                      // llama3
  double beta_fast = 32, beta_slow = 1, mscale = 0, mscale_all_dim = 0;  // yarn
  double attention_factor = 0;                                           // yarn; 0: derived from factor
};

// One decoder, described by data: everything in which Llama 1/2/3, InternLM, InternLM2, Mistral, Qwen2/2.5 and Qwen3
// differ.
struct ModelConfig {
  std::string model_type;  // as in config.json: "llama", "internlm", "internlm2", "mistral", "qwen2", "qwen3"
  int64_t hidden_size = 0;
  int n_layers = 0;
  int n_heads = 0;
  int n_kv_heads = 0;
  int head_dim = 0;
  int64_t intermediate_size = 0;
  int64_t vocab_size = 0;
  int64_t max_position = 0;
  float rms_norm_eps = 1e-6f;
  RopeConfig rope;
  std::vector<int32_t> sliding_window;  // per layer; 0: full attention
  bool has_qkv_bias = false;
  bool has_o_bias = false;
  bool has_mlp_bias = false;
  bool has_qk_norm = false;
  bool has_fused_qkv = false;  // InternLM2: wqkv rows are, per KV head, its query heads, then k, then v
  bool is_tied = false;        // the output matrix is the embedding table
  // AWQ: the linear layers of the decoder have weights of so many bits, 4 or 8, in groups of input columns. 0: floats.
  int weight_bits = 0;
  int32_t weight_group_size = 0;
  int32_t bos_id = -1;
  std::vector<int32_t> eos_ids;

  shard::Dims dims() const;
};

// Reads and validates config.json (and generation_config.json for the end-of-sequence ids). Unknown architectures,
// absurd or contradictory sizes and unsupported settings (activation, RoPE type, quantisation but AWQ) are
// InvalidArgument or Unimplemented naming key and value; missing files NotFound.
absl::StatusOr<ModelConfig> ReadModelConfig(const std::string& model_dir);
absl::StatusOr<ModelConfig> ParseModelConfig(const std::string& config_json);

}  // namespace rankwise::weights
