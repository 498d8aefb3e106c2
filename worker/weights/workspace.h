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

// Writes a checkpoint in the layout of LMDeploy's TurboMind workspace, version 0.2 (workspace_layout.h):
//   <folder>/triton_models/weights/    config.ini, manifest.json and the tensors, each rank's in files of its own
//   <folder>/triton_models/tokenizer/  the model folder's tokenizer files and JSON files
// Matrices are [n_in, n_out], that is transposed; w_qkv of a rank is [Q | K | V] with every q and k head re-ordered
// from halves (j, j + d/2) to pairs (2j, 2j + 1); the vocabulary is padded with zeros to a multiple of world_size. f32
// becomes f16. The checkpoint may be a workspace: then it is cut again. An AWQ checkpoint of four bits becomes one of
// weight_type = int4 (turbomind_int4.h), its embeddings, norms and biases f16.
//
// Unimplemented for what the layout cannot say: q/k norms, MLP biases, sliding windows, partly rotated heads, RoPE
// scaling other than dynamic, a hidden size that is not heads × head_dim, KV heads that world_size does not divide,
// int8 weights. InvalidArgument where a rank's int4 weights would not be whole groups and tiles (CheckInt4Files).
// OutOfRange for values that f16 cannot hold. All is written to a temporary folder beside `folder`, which is renamed at
// the end and removed on an error; a workspace that is replaced goes only then. Peak memory is one matrix of one rank.
// `progress` gets the bytes written so far and the whole.
absl::Status WriteWorkspace(const Checkpoint& checkpoint, const std::string& model_dir, const std::string& folder,
                            const WorkspaceOptions& options, const std::function<void(int64_t, int64_t)>& progress);

}  // namespace rankwise::weights
