// Writes a model folder of a given shape with random weights, for benchmarks.

#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <filesystem>
#include <string>

#include "absl/strings/str_cat.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "worker/weights/random_model.h"

namespace rankwise {
namespace {

struct Flags {
  std::string folder, shape = "tinyllama-1.1b", dtype = "f16", family = "llama", rope_scaling, tokenizer;
  weights::RandomModelSpec sizes;  // of these, the options given override the shape's
  bool has_bias = false, has_mlp_bias = false, is_tied = false;
  uint64_t seed = 1;
  int file_count = 1;
};

// One line that is redrawn on a terminal; a line for every tenth elsewhere.
class ProgressLine {
 public:
  explicit ProgressLine(std::string name) : name_(std::move(name)) {}

  void Show(int64_t done, int64_t total) {
    const auto percent = static_cast<int>(100 * done / total);
    if (percent < shown_ + (is_terminal_ ? 1 : 10)) return;
    shown_ = percent;
    const std::string bar = std::string(percent / 4, '#') + std::string(25 - percent / 4, '.');
    std::fprintf(stderr, "%s%s: [%s] %3d %% of %.2f GB%s", is_terminal_ ? "\r" : "", name_.c_str(), bar.c_str(),
                 percent, static_cast<double>(total) / 1e9, is_terminal_ && percent < 100 ? "" : "\n");
  }

 private:
  const std::string name_;
  const bool is_terminal_ = isatty(STDERR_FILENO) != 0;
  int shown_ = 0;
};

void AddOptions(CLI::App& app, Flags& flags) {
  app.add_option("folder", flags.folder, "Folder to write")->required();
  app.add_option("--shape", flags.shape, "tiny, tinyllama-1.1b or llama-7b")->capture_default_str();
  app.add_option("--family", flags.family, "Names and biases of this model type")
      ->check(CLI::IsMember({"llama", "internlm", "internlm2", "mistral", "qwen2", "qwen3"}))
      ->capture_default_str();
  app.add_option("--hidden", flags.sizes.hidden_size, "Instead of the shape's");
  app.add_option("--layers", flags.sizes.n_layers, "Instead of the shape's");
  app.add_option("--heads", flags.sizes.n_heads, "Instead of the shape's");
  app.add_option("--kv-heads", flags.sizes.n_kv_heads, "Instead of the shape's");
  app.add_option("--head-dim", flags.sizes.head_dim, "Instead of the shape's");
  app.add_option("--intermediate", flags.sizes.intermediate_size, "Instead of the shape's");
  app.add_option("--vocab", flags.sizes.vocab_size, "Instead of the shape's");
  app.add_option("--max-position", flags.sizes.max_position, "Instead of the shape's");
  app.add_option("--rope-scaling", flags.rope_scaling, R"(JSON for config.json: {"rope_type": "linear", "factor": 2})");
  app.add_flag("--bias", flags.has_bias, "Attention biases, where the family has the choice");
  app.add_flag("--mlp-bias", flags.has_mlp_bias, "MLP biases (llama)");
  app.add_flag("--tied", flags.is_tied, "The output matrix is the embedding table");
  app.add_option("--dtype", flags.dtype, "Weights: f16, bf16 or f32")
      ->check(CLI::IsMember({"f16", "bf16", "f32"}))
      ->capture_default_str();
  app.add_option("--seed", flags.seed, "The same seed gives the same bytes")->capture_default_str();
  app.add_option("--files", flags.file_count, "Files, with an index when more than one")
      ->check(CLI::Range(1, 64))
      ->capture_default_str();
  app.add_option("--tokenizer", flags.tokenizer, "A tokenizer file to copy into the folder; none is made")
      ->check(CLI::ExistingFile);
}

absl::StatusOr<weights::RandomModelSpec> MakeSpec(const CLI::App& app, const Flags& flags) {
  RW_ASSIGN_OR_RETURN(weights::RandomModelSpec spec, weights::RandomModelShape(flags.shape));
  const auto override_with = [&](const char* option, auto& size, auto value) {
    if (app.count(option) > 0) size = value;
  };
  override_with("--hidden", spec.hidden_size, flags.sizes.hidden_size);
  override_with("--layers", spec.n_layers, flags.sizes.n_layers);
  override_with("--heads", spec.n_heads, flags.sizes.n_heads);
  override_with("--kv-heads", spec.n_kv_heads, flags.sizes.n_kv_heads);
  override_with("--head-dim", spec.head_dim, flags.sizes.head_dim);
  override_with("--intermediate", spec.intermediate_size, flags.sizes.intermediate_size);
  override_with("--vocab", spec.vocab_size, flags.sizes.vocab_size);
  override_with("--max-position", spec.max_position, flags.sizes.max_position);
  spec.model_type = flags.family;
  spec.has_bias = flags.has_bias;
  spec.has_mlp_bias = flags.has_mlp_bias;
  spec.is_tied = flags.is_tied;
  if (!flags.rope_scaling.empty()) spec.extra_json = absl::StrCat("\"rope_scaling\": ", flags.rope_scaling);
  spec.dtype = flags.dtype == "f32"   ? kernels::DType::kF32
               : flags.dtype == "f16" ? kernels::DType::kF16
                                      : kernels::DType::kBF16;
  spec.seed = flags.seed;
  spec.file_count = flags.file_count;
  return spec;
}

absl::Status Run(const CLI::App& app, const Flags& flags) {
  RW_ASSIGN_OR_RETURN(const weights::RandomModelSpec spec, MakeSpec(app, flags));
  ProgressLine progress(flags.folder);
  RW_RETURN_IF_ERROR(
      weights::WriteRandomModel(flags.folder, spec, [&](int64_t done, int64_t total) { progress.Show(done, total); }));
  if (flags.tokenizer.empty()) return absl::OkStatus();
  const std::filesystem::path source = flags.tokenizer;
  std::error_code error;
  std::filesystem::copy_file(source, std::filesystem::path(flags.folder) / source.filename(),
                             std::filesystem::copy_options::overwrite_existing, error);
  if (!error) return absl::OkStatus();
  return absl::InternalError(absl::StrCat("cannot copy ", flags.tokenizer, ": ", error.message()));
}

}  // namespace
}  // namespace rankwise

int main(int argc, char** argv) {
  CLI::App app("rankwise-random-model: a Hugging Face model folder with random weights, to measure a shape");
  rankwise::Flags flags;
  rankwise::AddOptions(app, flags);
  CLI11_PARSE(app, argc, argv);
  rankwise::StartLog("random-model");
  const absl::Status status = rankwise::Run(app, flags);
  if (status.ok()) return 0;
  spdlog::error("{}", std::string(status.message()));
  return 2;
}
