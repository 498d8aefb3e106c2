#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <system_error>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "launch/commands.h"
#include "worker/kv/kv_scales.h"

namespace rankwise::launch {
namespace {

constexpr char kDescription[] = R"(Turn the statistics of `calibrate` into int8 scales

Writes WEIGHTS_DIR/layers.{layer}.past_kv_scale.{rank}.weight, four little-endian f32 each (k_scale, k_zp, v_scale, v_zp):
the files of LMDeploy's TurboMind, so WEIGHTS_DIR may be its `triton_models/weights`, where `serve
WORKSPACE` looks for them. One calibration serves every
--num-tp. Asymmetric scales have zp = (min + max) / 2 and scale = (max - min) / 255; symmetric ones (--kv-sym) zp = 0 and
scale = absmax / 127.)";

constexpr char kExamples[] = R"(Examples:
  rankwise kv-qparams ./work ./scales --num-tp 2
  rankwise kv-qparams ./work ./scales --num-tp 4 --granularity head      for serve --kv int8-head
  rankwise kv-qparams ./work ./scales --num-tp 4 --granularity channel   for serve --kv int8-channel too
  rankwise kv-qparams ./work ./scales --num-tp 1 --clip mse              the range of least squared error)";

struct KvQparamsFlags {
  std::string work_folder;
  std::string out_folder;
  int num_tp = 1;
  int bits = 8;
  kv::Granularity granularity = kv::Granularity::kHead;
  std::string clip = "none";
  kv::ClipOptions options;
};

absl::Status KvQparams(KvQparamsFlags flags) {
  if (flags.bits != 8)
    return absl::InvalidArgumentError(absl::StrCat("--kv-bits ", flags.bits,
                                                   ": static scales are of 8 bits; fewer steps need a scale for each "
                                                   "token and head, which no calibration can give"));
  RW_ASSIGN_OR_RETURN(flags.options.method, kv::ParseClipMethod(flags.clip));
  RW_ASSIGN_OR_RETURN(const kv::KvStatistics statistics,
                      kv::ReadKvStatistics(absl::StrCat(flags.work_folder, "/", kv::KvStatistics::kFileName)));
  std::error_code error;
  std::filesystem::create_directories(flags.out_folder, error);
  if (error) return absl::InvalidArgumentError(absl::StrCat("WEIGHTS_DIR ", flags.out_folder, ": ", error.message()));
  RW_RETURN_IF_ERROR(kv::WriteKvScales(flags.out_folder, statistics, flags.num_tp, flags.granularity, flags.options));
  constexpr const char* kAlso[] = {"", ", one per KV head", ", one per KV head, one per channel"};
  absl::PrintF("%s: scales of %d layers for %d ranks%s, and kv_scales.json (model %s, %s)\n", flags.out_folder,
               statistics.n_layers, flags.num_tp, kAlso[static_cast<int>(flags.granularity)],
               statistics.model_fingerprint, statistics.dataset);
  return absl::OkStatus();
}

}  // namespace

void AddKvQparams(CLI::App& app, Action& action) {
  CLI::App* command = app.add_subcommand("kv-qparams", kDescription);
  command->footer(kExamples);
  const auto flags = std::make_shared<KvQparamsFlags>();
  command->add_option("WORK_DIR", flags->work_folder, "Folder that calibrate wrote")
      ->required()
      ->check(CLI::ExistingDirectory);
  command->add_option("WEIGHTS_DIR", flags->out_folder, "Folder for the scales")->required();
  command->add_option("--num-tp", flags->num_tp, "Ranks that will serve")->required()->check(CLI::Range(1, 1024));
  command
      ->add_option(
          "--granularity", flags->granularity,
          "tensor: one scale for a rank's K and one for its V of a layer, for --kv int8; head: one for each KV "
          "head too, for --kv int8 and --kv int8-head; channel: one for each channel of a head too, for --kv "
          "int8-channel, where K's channels differ much (calibrate --vocabulary then sees every token)")
      ->transform(
          CLI::CheckedTransformer(std::map<std::string, kv::Granularity>{{"tensor", kv::Granularity::kRank},
                                                                         {"head", kv::Granularity::kHead},
                                                                         {"channel", kv::Granularity::kChannel}}))
      ->default_str("head");
  command->add_option("--kv-bits", flags->bits, "Bits of a value; static scales know 8 only")->capture_default_str();
  command->add_flag("--kv-sym", flags->options.is_symmetric, "Zero points of 0");
  command
      ->add_option(
          "--clip", flags->clip,
          "none: the whole range; percentile: --percentile of the values; mse: the range of least squared error")
      ->check(CLI::IsMember({"none", "percentile", "mse"}))
      ->capture_default_str();
  command
      ->add_option("--percentile", flags->options.percentile,
                   "With --clip percentile: percent of the values kept, the rest cut in equal parts on both sides")
      ->check(CLI::Range(50.0, 100.0))
      ->capture_default_str();
  command->callback([flags, &action] { action = [flags] { return KvQparams(*flags); }; });
}

}  // namespace rankwise::launch
