#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "absl/status/status.h"
#include "worker/weights/checkpoint.h"

namespace rankwise::weights {

struct WorkspaceOptions {
  int world_size = 1;
  std::string model_name;  // of config.ini
  bool replaces = false;   // an existing workspace; otherwise AlreadyExists
};

// Writes a checkpoint in the layout of LMDeploy's TurboMind workspace, version 0.2:
//   <folder>/triton_models/weights/config.ini
//   <folder>/triton_models/weights/{tok_embeddings,norm,output}.weight, layers.{layer}.….{rank}.weight  (raw,
//   little-endian) <folder>/triton_models/tokenizer/  the model folder's tokenizer files and JSON files
// Matrices are [n_in, n_out], that is transposed; w_qkv of a rank is [Q | K | V] with every q and k head re-ordered
// from halves (j, j + d/2) to pairs (2j, 2j + 1); the vocabulary is padded with zeros to a multiple of world_size. f32
// becomes f16.
//
// Unimplemented for what the layout cannot say: q/k norms, MLP biases, RoPE scaling other than dynamic, KV heads that
// world_size does not divide. All is written beside `folder` and renamed at the end. Peak memory is two matrices.
// `progress` gets the bytes written so far and the whole.
absl::Status WriteWorkspace(const Checkpoint& checkpoint, const std::string& model_dir, const std::string& folder,
                            const WorkspaceOptions& options, const std::function<void(int64_t, int64_t)>& progress);

}  // namespace rankwise::weights
