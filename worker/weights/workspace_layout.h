#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "worker/weights/model_config.h"

// What a TurboMind workspace of layout 0.2 consists of, for its writer and its reader.
namespace rankwise::weights {

// <folder>/triton_models/weights: config.ini, manifest.json, the tensors, and the KV scales that kv-qparams writes.
std::string WorkspaceWeights(const std::string& folder);
// <folder>/triton_models/tokenizer: the tokenizer's files and the JSON files beside them.
std::string WorkspaceTokenizer(const std::string& folder);
inline constexpr char kWorkspaceConfig[] = "triton_models/weights/config.ini";
bool IsWorkspace(const std::string& folder);  // there is a kWorkspaceConfig

// A tensor file: no header, little-endian, row-major but for int4 (turbomind_int4.h). {file} below is 0 … tp - 1.
struct WorkspaceFile {
  std::string name;
  std::vector<int64_t> shape;  // in elements
  kernels::DType dtype = kernels::DType::kF16;
  int64_t bytes() const;
};

// tok_embeddings.weight and output.weight [vocab rounded up to a multiple of tp, hidden], norm.weight [hidden].
// `dtype`, f16 or bf16, is that of every file but qweight.
std::vector<WorkspaceFile> OuterFiles(const ModelConfig& model, int tp, kernels::DType dtype);
// layers.{layer}.…
//   attention_norm.weight, ffn_norm.weight               [hidden]
//   attention.w_qkv.{file}.weight                        [hidden, (n_heads + 2 n_kv_heads) * head_dim / tp]
//   attention.wo.{file}.weight                           [n_heads * head_dim / tp, hidden]
//   attention.w_qkv.{file}.bias, attention.wo.{file}.bias   where q, k and v have biases; that of wo is whole
//   feed_forward.w1.{file}.weight (gate), w3 (up)        [hidden, intermediate / tp]
//   feed_forward.w2.{file}.weight                        [intermediate / tp, hidden]
// of a model of weight_bits = 4 instead of w1 and w3
//   feed_forward.w13.{file}                              [hidden, 2 intermediate / tp], column 2j gate's j, 2j + 1 up's
// and instead of each .weight [n_in, n_out]
//   ….{file}.qweight                                     int4 [n_in, n_out]
//   ….{file}.scales_zeros                                [n_in / group, 2 n_out]
// Columns of w_qkv are [Q | K | V] of the file's heads, inside each head of Q and K in the order of RopeSource.
std::vector<WorkspaceFile> LayerFiles(const ModelConfig& model, int tp, int layer, kernels::DType dtype);
// InvalidArgument naming file and sizes when a file of int4 weights would not be of whole groups and tiles. OK for
// models of floats. tp divides n_kv_heads and intermediate_size.
absl::Status CheckInt4Files(const ModelConfig& model, int tp);

// Column of a query or key head in TurboMind's order, pairs (2j, 2j + 1), to the dimension in Hugging Face's, halves
// (j, j + head_dim / 2).
constexpr int64_t RopeSource(int64_t column, int64_t head_dim) { return column / 2 + column % 2 * (head_dim / 2); }

// manifest.json beside config.ini: what convert wrote. A workspace of LMDeploy has none.
struct WorkspaceManifest {
  struct File {
    std::vector<int64_t> shape;
    int64_t bytes = 0;
    std::string xxh3;                             // XXH3-64 of the content, 16 hex digits
    kernels::DType dtype = kernels::DType::kF16;  // the manifest's, or int4
  };
  std::string fingerprint;  // of the model; see Checkpoint::FingerprintAs
  std::string config;       // ConfigDigest
  int tp = 1;
  kernels::DType dtype = kernels::DType::kF16;
  std::vector<int32_t> eos_ids;  // config.ini has room for one
  std::map<std::string, File> files;
};

// Of all that config.ini says about the model, and nothing of what it says about the engine, which may be edited.
std::string ConfigDigest(const ModelConfig& model);

std::string FormatManifest(const WorkspaceManifest& manifest);
// Untrusted text. InvalidArgument naming the member; Unimplemented for another version or layout.
absl::StatusOr<WorkspaceManifest> ParseManifest(const std::string& text);

}  // namespace rankwise::weights
