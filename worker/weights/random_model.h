#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "absl/status/statusor.h"
#include "kernels/backend.h"

namespace rankwise::weights {

// A Hugging Face model folder with Gaussian weights: for benchmarks of a shape, and for tests of every family.
struct RandomModelSpec {
  std::string model_type = "llama";
  int64_t hidden_size = 64;
  int n_layers = 2;
  int n_heads = 8;
  int n_kv_heads = 4;
  int head_dim = 8;
  int64_t intermediate_size = 172;
  int64_t vocab_size = 512;
  int64_t max_position = 512;
  bool has_bias = false;      // attention_bias or bias, where the family has the choice
  bool has_mlp_bias = false;  // llama alone
  bool is_tied = false;
  std::string extra_json;  // further keys of config.json: `"rope_scaling": {…}, "sliding_window": 16`
  kernels::DType dtype = kernels::DType::kF16;
  int file_count = 1;  // more than one: with an index
  uint64_t seed = 1;
};

// Named shapes: "tiny", "tinyllama-1.1b", "llama-7b". NotFound otherwise.
absl::StatusOr<RandomModelSpec> RandomModelShape(const std::string& name);

// Writes config.json and model*.safetensors into `folder`, which is made; weights and an index that were there before
// go. InvalidArgument when the specification is no configuration that ParseModelConfig takes. Matrices are N(0, 1 /
// n_in), norms are 1 with a little noise, biases are small. The same spec gives the same bytes. `progress` gets bytes
// done and the whole.
absl::Status WriteRandomModel(const std::string& folder, const RandomModelSpec& spec,
                              const std::function<void(int64_t, int64_t)>& progress = {});

}  // namespace rankwise::weights
