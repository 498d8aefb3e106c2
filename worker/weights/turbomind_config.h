#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "worker/weights/model_config.h"

namespace rankwise::weights {

// config.ini of a TurboMind workspace, layout 0.2: section [llama]. A member's initial value is what an absent key
// means. Keys of the engine (session_len to extra_tokens_per_iter) are LMDeploy's: they are checked, kept and written,
// and serving here goes by its own flags.
struct TurbomindConfig {
  // The model. Those that start at 0 must be there.
  std::string model_name;
  int64_t tensor_para_size = 1;  // what the weights are cut for
  int64_t head_num = 0;
  int64_t kv_head_num = 0;  // absent or 0: head_num
  int64_t size_per_head = 128;
  int64_t num_layer = 0;
  int64_t inter_size = 0;
  int64_t vocab_size = 0;  // without padding
  double norm_eps = 1e-6;
  bool attn_bias = false;
  int64_t start_id = 1;
  int64_t end_id = 2;                // -1: none
  std::string weight_type = "fp16";  // fp16, bf16 or int4
  int64_t group_size = 0;            // of int4 weights: the inputs that share a scale
  int64_t rotary_embedding = 0;      // absent or 0: size_per_head
  double rope_theta = 10000;
  double rope_scaling_factor = 0;          // from 1 on: dynamic NTK
  bool use_dynamic_ntk = false;            // before 0.1: dynamic NTK of factor 1
  int64_t max_position_embeddings = 2048;  // absent or 0
  bool use_logn_attn = false;
  // 0, or 4: an int8 KV cache with static scales. Other versions give other meanings to other numbers (4 is int4 from
  // 0.4 on), so those are refused, and so are keys that 0.2 does not know.
  int64_t quant_policy = 0;

  // The engine.
  int64_t session_len = 0;  // absent or 0: max_position_embeddings
  int64_t max_batch_size = 64;
  int64_t max_context_token_num = 0;  // absent or 0: session_len; up to max_batch_size: in units of session_len
  int64_t step_length = 1;
  double cache_max_entry_count = 0.95;
  int64_t cache_block_seq_len = 128;
  double cache_chunk_size = 0;  // absent or 0: cache_max_entry_count
  bool use_context_fmha = true;
  int64_t num_tokens_per_iter = 0;  // absent or 0: max_context_token_num
  int64_t max_prefill_iters = 1;
  int64_t extra_tokens_per_iter = 0;

  // What the weights compute: `llama`, or `internlm` when attn_bias says that q, k, v and o have biases.
  ModelConfig ToModel() const;
};

// The inverse for a model that the layout can say; engine keys as LMDeploy writes them.
TurbomindConfig FromModel(const ModelConfig& model);

// Untrusted text, filled up with the defaults above and checked. InvalidArgument naming key and value, or the line,
// for what is no such file, absurd or contradictory; Unimplemented for int8 and fp32 weights, log-n attention,
// partly rotated heads and keys of other versions.
absl::StatusOr<TurbomindConfig> ParseTurbomindConfig(const std::string& text);
std::string FormatTurbomindConfig(const TurbomindConfig& config);

}  // namespace rankwise::weights
