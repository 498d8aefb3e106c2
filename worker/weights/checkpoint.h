#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "worker/shard/shard_plan.h"
#include "worker/weights/grouped_words.h"
#include "worker/weights/model_config.h"

namespace rankwise::weights {

// What one rank needs of one decoder layer. Matrices are [n_out, n_in], views into the checkpoint or into the buffers;
// stacked views are row blocks in order. Vectors are f32 copies; an empty one means the model has none.
struct LayerWeights {
  std::vector<float> attention_norm, mlp_norm;  // [hidden]
  std::vector<kernels::MatrixView> qkv;         // Q of the rank's heads, then K, then V of its KV heads; n_in = hidden
  std::vector<float> qkv_bias;                  // [(heads + 2 kv_heads) * head_dim] of this rank
  std::vector<float> q_norm, k_norm;            // [head_dim]
  kernels::MatrixView wo;                       // [hidden, heads_local * head_dim]
  std::vector<float> wo_bias;                   // [hidden], whole: added once, after the all-reduce
  std::vector<kernels::MatrixView> gate_up;     // gate rows, then up rows; n_in = hidden
  std::vector<float> gate_up_bias;              // [2 * intermediate_local]
  kernels::MatrixView w2;                       // [hidden, intermediate_local]
  std::vector<float> w2_bias;                   // [hidden], whole
  // This rank's slices of files that hold them in another order.
  std::vector<std::unique_ptr<uint16_t[]>> buffers;
  std::vector<std::unique_ptr<GroupedWords>> grouped_buffers;
};

struct OuterWeights {
  kernels::MatrixView embedding;  // [vocab, hidden], whole: rows are read where they lie
  std::vector<float> final_norm;  // [hidden]
  kernels::MatrixView output;     // [vocab_local, hidden]
};

// The KV cache that comes with a model.
struct KvAdvice {
  std::string format = "f16";
  std::string scales_dir;  // where kv-qparams has put the scales; empty: anywhere
};

// A model folder (config.json + model.safetensors, or model.safetensors.index.json with its files) or a TurboMind
// workspace, mapped and validated: every tensor that the configuration asks for is there, once, with the right shape
// and a dtype we know, inside its file. Owns the mappings; views borrow from it.
class Checkpoint {
 public:
  virtual ~Checkpoint() = default;
  static absl::StatusOr<std::unique_ptr<Checkpoint>> Open(const std::string& model_dir);

  virtual const ModelConfig& config() const = 0;
  // 16 hex digits: config, and name, dtype, shape and content sample of every tensor. The same model has the same one
  // on every host. A workspace that convert wrote has that of the model it came from, rounded to the workspace's dtype:
  // of the very model when that is f16 or bf16 throughout, so that scales calibrated on either serve both, and another
  // one when f32 was rounded. Without a manifest it is that of the workspace's own files, tp included.
  virtual const std::string& fingerprint() const = 0;
  // That of this model with every tensor rounded to f16 or bf16.
  virtual std::string FingerprintAs(kernels::DType dtype) const = 0;
  // Reads what `plan` needs and compares it with the checksums that came with it, and with what int4 files of a
  // workspace can hold: FailedPrecondition names the file. To be called before fingerprint and weights are relied upon.
  virtual absl::Status Verify(const shard::ShardPlan& plan) const = 0;
  virtual KvAdvice kv_advice() const { return {}; }
  virtual LayerWeights Layer(int layer, const shard::ShardPlan& plan) const = 0;
  virtual OuterWeights Outer(const shard::ShardPlan& plan) const = 0;
};

// A tensor of a Hugging Face folder as its configuration asks for it.
struct NamedTensor {
  std::string name;
  kernels::MatrixView view;  // a vector is a column
  bool is_vector = false;
  bool is_linear = false;  // a matrix of a decoder layer, which AWQ quantises
};
// What a decoder layer's tensors are called. Those that end in a dot have a weight and may have a bias.
struct LayerNames {
  std::string attention_norm, mlp_norm;   // end in a dot
  std::vector<std::string> qkv, gate_up;  // matrices that read the norms' outputs
  std::string o, down;                    // matrices
  std::string v, up;                      // what makes their inputs; end in a dot; v is empty where q, k, v are one
};
// The tensors of the folder `model_dir`, by name, valid while `checkpoint` lives.
struct TensorListing {
  std::unique_ptr<Checkpoint> checkpoint;
  std::vector<NamedTensor> tensors;
  std::vector<LayerNames> layers;
};
absl::StatusOr<TensorListing> ListTensors(const std::string& model_dir);

}  // namespace rankwise::weights
