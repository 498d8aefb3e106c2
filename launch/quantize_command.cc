#include <cstdio>
#include <memory>
#include <string>

#include "base/status_macros.h"
#include "launch/commands.h"
#include "launch/progress_bar.h"
#include "worker/weights/quantize.h"

namespace rankwise::launch {
namespace {

struct Flags {
  std::string model_dir, folder;
  weights::QuantizeOptions quantize;
};

constexpr char kDescription[] = R"(Write a model with weights of 4 or 8 bits

OUT is a model folder in the layout of AWQ checkpoints ("gemm"), which `serve OUT` takes, with any --kv. Weights are rounded
to nearest in groups of inputs, each with the clipped range of least squared error. With --statistics, what `calibrate` saw
of a model decides which inputs matter: they are widened before rounding, and what makes them narrowed by as much (AWQ).)";

constexpr char kExamples[] = R"(Examples:
  rankwise quantize ./model ./model-w4
  rankwise quantize ./model ./model-w8 --bits 8
  rankwise calibrate ./model --calib-dataset text.txt --work-dir ./work
  rankwise quantize ./model ./model-w4 --statistics ./work
  rankwise serve ./model-w4 --tp 2 --kv int8-online)";

absl::Status Quantize(const Flags& flags) {
  std::unique_ptr<ProgressBar> bar;
  std::string current;
  const auto progress = [&](const char* work, int64_t done, int64_t total) {
    if (current != work) {
      bar.reset();
      bar = std::make_unique<ProgressBar>(work, total);
      current = work;
    }
    bar->Update(done);
  };
  RW_RETURN_IF_ERROR(weights::WriteQuantized(flags.model_dir, flags.folder, flags.quantize, progress));
  bar.reset();
  std::printf("%s: weights of %d bits in groups of %d\n", flags.folder.c_str(), flags.quantize.bits,
              flags.quantize.group_size);
  return absl::OkStatus();
}

}  // namespace

void AddQuantize(CLI::App& app, Action& action) {
  CLI::App* command = app.add_subcommand("quantize", kDescription)->footer(kExamples);
  auto flags = std::make_shared<Flags>();
  command->add_option("MODEL", flags->model_dir, "Folder with config.json and *.safetensors")->required();
  command->add_option("OUT", flags->folder, "Folder to write; must not exist")->required();
  command->add_option("--bits", flags->quantize.bits, "Bits of a weight")
      ->check(CLI::IsMember({4, 8}))
      ->capture_default_str();
  command->add_option("--group-size", flags->quantize.group_size, "Inputs that share a scale and a zero point")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  command->add_option("--statistics", flags->quantize.statistics_dir, "WORK_DIR of `calibrate` on this model")
      ->check(CLI::ExistingDirectory);
  command->add_flag("--force", flags->quantize.replaces, "Replace a folder that quantize has written");
  command->callback([flags, &action] { action = [flags] { return Quantize(*flags); }; });
}

}  // namespace rankwise::launch
