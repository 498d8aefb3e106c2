#include <filesystem>
#include <memory>
#include <string>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "launch/commands.h"
#include "launch/progress_bar.h"
#include "worker/weights/workspace.h"
#include "worker/weights/workspace_layout.h"

namespace rankwise::launch {
namespace {

struct Flags {
  std::string model_dir, folder, model_format;
  int32_t group_size = 0;  // 0: that of MODEL
  weights::WorkspaceOptions workspace;
};

constexpr char kExamples[] = R"(Examples:
  rankwise convert ./internlm-chat-7b ./workspace --tp 2
  rankwise convert ./internlm-chat-7b-4bit ./workspace --tp 2 --model-format awq --group-size 128
  rankwise kv-qparams ./work ./workspace/triton_models/weights --num-tp 2
  rankwise serve ./workspace --tp 2 --kv int8)";

// What the flags say about MODEL must be so.
absl::Status CheckFormat(const Flags& flags, const weights::ModelConfig& config) {
  const std::string format = weights::IsWorkspace(flags.model_dir) ? "workspace"
                             : config.weight_bits > 0              ? "awq"
                                                                   : "hf";
  if (!flags.model_format.empty() && flags.model_format != format) {
    return absl::InvalidArgumentError(
        absl::StrCat("--model-format ", flags.model_format, ", but ", flags.model_dir, " is of format ", format));
  }
  if (flags.group_size != 0 && flags.group_size != config.weight_group_size) {
    return absl::InvalidArgumentError(
        config.weight_bits > 0
            ? absl::StrCat("--group-size ", flags.group_size, ", but ", flags.model_dir, " has groups of ",
                           config.weight_group_size)
            : absl::StrCat("--group-size ", flags.group_size, ", but ", flags.model_dir, " is not quantised"));
  }
  return absl::OkStatus();
}

absl::Status Convert(Flags& flags) {
  if (flags.workspace.model_name.empty()) {
    flags.workspace.model_name = std::filesystem::weakly_canonical(flags.model_dir).filename();
  }
  RW_ASSIGN_OR_RETURN(const auto checkpoint, weights::Checkpoint::Open(flags.model_dir));
  RW_RETURN_IF_ERROR(CheckFormat(flags, checkpoint->config()));
  RW_ASSIGN_OR_RETURN(const shard::ShardPlan whole,
                      shard::PlanShard(checkpoint->config().dims(), {.rank = 0, .world_size = 1}));
  RW_RETURN_IF_ERROR(checkpoint->Verify(whole));
  std::unique_ptr<ProgressBar> bar;
  RW_RETURN_IF_ERROR(weights::WriteWorkspace(*checkpoint, flags.model_dir, flags.folder, flags.workspace,
                                             [&](int64_t done, int64_t total) {
                                               if (bar == nullptr)
                                                 bar = std::make_unique<ProgressBar>("convert", total);
                                               bar->Update(done);
                                             }));
  bar.reset();
  std::printf("%s: weights for tp %d in triton_models/weights, model %s\n", flags.folder.c_str(),
              flags.workspace.world_size, checkpoint->fingerprint().c_str());
  return absl::OkStatus();
}

}  // namespace

void AddConvert(CLI::App& app, Action& action) {
  CLI::App* command =
      app.add_subcommand("convert", "Write a TurboMind v0.2 workspace from a Hugging Face or AWQ model folder")
          ->footer(kExamples);
  auto flags = std::make_shared<Flags>();
  command
      ->add_option("model", flags->model_dir, "Folder with config.json and *.safetensors, or a workspace to cut again")
      ->required();
  command->add_option("workspace", flags->folder, "Folder to write; must not exist")->required();
  command->add_option("--tp", flags->workspace.world_size, "Tensor parallel degree the weights are cut for")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  command->add_option("--model-name", flags->workspace.model_name, "model_name of config.ini")
      ->default_str("the model folder's name");
  command->add_option("--model-format", flags->model_format, "hf, awq or workspace: refuse MODEL if it is of another")
      ->check(CLI::IsMember({"hf", "awq", "workspace"}))
      ->default_str("what MODEL is");
  command
      ->add_option("--group-size", flags->group_size,
                   "Inputs that share a scale: refuse MODEL if it has another number")
      ->check(CLI::Range(0, 1 << 24))
      ->default_str("that of MODEL");
  command->add_flag("--force", flags->workspace.replaces, "Replace an existing workspace");
  command->callback([flags, &action] { action = [flags] { return Convert(*flags); }; });
}

}  // namespace rankwise::launch
