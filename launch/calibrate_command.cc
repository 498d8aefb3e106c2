#include <sys/eventfd.h>
#include <unistd.h>

#include <atomic>
#include <filesystem>
#include <memory>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "coordinator/text/tokenizer.h"
#include "launch/calibration_text.h"
#include "launch/client.h"
#include "launch/cluster_flags.h"
#include "launch/commands.h"
#include "launch/interrupt.h"
#include "launch/local_cluster.h"
#include "launch/progress_bar.h"
#include "worker/kv/kv_scales.h"
#include "worker/weights/checkpoint.h"
#include "worker/weights/input_statistics.h"

namespace rankwise::launch {
namespace {

constexpr char kDescription[] = R"(Record the range of keys and values, for an int8 KV cache

Runs windows of text through the model on `--tp` ranks of this host and writes min, max and absmax of every layer, KV head
and channel, and histograms, to WORK_DIR/kv_statistics.safetensors, and what the inputs of linear layers carry, for
`quantize --statistics`, to WORK_DIR/input_statistics.safetensors. Nothing is downloaded: ptb, c4, wikitext2 and pileval
are looked for in --data-dir; anything else is a text file or a JSONL file with "text" in each record, or several, separated
by commas.)";

constexpr char kExamples[] = R"(Examples:
  rankwise calibrate ./Llama-2-7b --tp 4 --calib-dataset ptb --data-dir ./texts --work-dir ./work
  rankwise calibrate ./model --calib-dataset tales.txt,news.jsonl --calib-samples 64 --calib-seqlen 1024 --work-dir ./work
  rankwise kv-qparams ./work ./scales --num-tp 4)";

constexpr int kInFlight = 4;  // requests, so that a group never waits for us

struct CalibrateFlags {
  ClusterFlags cluster;
  std::string dataset = "ptb";
  std::string data_folder = ".";
  std::string work_folder = "./work_dir";
  WindowOptions windows;
  bool has_vocabulary = false;
};

// Sends windows to the coordinator from kInFlight threads. The end of the coordinator ends them.
class Feeder {
 public:
  Feeder(rankwise::v1::Inference::Stub& stub, const std::vector<std::vector<int32_t>>& windows)
      : stub_(stub), windows_(windows), progress_fd_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
    for (int i = 0; i < kInFlight; ++i) threads_.emplace_back([this] { Run(); });
  }
  ~Feeder() {
    next_ = windows_.size();
    for (std::thread& thread : threads_) thread.join();
    close(progress_fd_);
  }

  int progress_fd() const { return progress_fd_; }  // readable when done() or status() may have changed
  void Acknowledge() {
    eventfd_t count;
    eventfd_read(progress_fd_, &count);
  }
  size_t done() const { return done_; }
  absl::Status status() {
    absl::MutexLock lock(&mutex_);
    return status_;
  }

 private:
  void Run() {
    for (size_t i = next_++; i < windows_.size(); i = next_++) {
      absl::Status status = Send(windows_[i]);
      if (status.ok()) {
        ++done_;
      } else {
        absl::MutexLock lock(&mutex_);
        status_.Update(absl::Status(status.code(), absl::StrCat("window ", i, ": ", status.message())));
        next_ = windows_.size();
      }
      eventfd_write(progress_fd_, 1);
    }
  }

  absl::Status Send(const std::vector<int32_t>& window) {
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Hours(1)));
    rankwise::v1::GenerateRequest request;
    request.mutable_token_ids()->mutable_ids()->Assign(window.begin(), window.end());
    request.mutable_sampling()->set_max_tokens(1);
    request.mutable_sampling()->set_temperature(0);
    const auto reader = stub_.Generate(&context, request);
    rankwise::v1::GenerateResponse response;
    bool is_finished = false;
    while (reader->Read(&response)) is_finished = is_finished || response.has_finish();
    RW_RETURN_IF_ERROR(FromGrpc(reader->Finish()));
    return is_finished ? absl::OkStatus() : absl::InternalError("the stream ended without a final message");
  }

  rankwise::v1::Inference::Stub& stub_;
  const std::vector<std::vector<int32_t>>& windows_;
  const int progress_fd_;
  std::atomic<size_t> next_ = 0, done_ = 0;
  absl::Mutex mutex_;
  absl::Status status_ ABSL_GUARDED_BY(mutex_);
  std::vector<std::thread> threads_;
};

absl::StatusOr<Windows> MakeWindows(const CalibrateFlags& flags) {
  RW_ASSIGN_OR_RETURN(const CalibrationSource source, ReadCalibrationSource(flags.dataset, flags.data_folder));
  RW_ASSIGN_OR_RETURN(const auto checkpoint, weights::Checkpoint::Open(flags.cluster.model));
  const weights::ModelConfig& config = checkpoint->config();
  WindowOptions options = flags.windows;
  const int64_t longest = config.max_position - 1;  // the request generates one
  if (options.window_tokens > longest) {
    absl::FPrintF(stderr,
                  "rankwise: --calib-seqlen %d is cut to %d: the model's context of %d, less the token that a request "
                  "generates\n",
                  options.window_tokens, longest, config.max_position);
    options.window_tokens = longest;
  }
  RW_ASSIGN_OR_RETURN(const auto tokenizer, text::Tokenizer::Load(flags.cluster.model));
  RW_ASSIGN_OR_RETURN(Windows windows,
                      CutWindows(
                          source, [&](const std::string& t) { return tokenizer->Encode(t); }, options));
  if (!windows.notice.empty()) absl::FPrintF(stderr, "rankwise: %s\n", windows.notice);
  if (flags.has_vocabulary) {
    RW_ASSIGN_OR_RETURN(const std::vector<int32_t> prefix, tokenizer->Encode(""));
    if (options.window_tokens <= static_cast<int64_t>(prefix.size())) {
      return absl::InvalidArgumentError(absl::StrCat("--calib-seqlen ", options.window_tokens,
                                                     " has no room beside the ", prefix.size(),
                                                     " tokens every text begins with"));
    }
    for (auto& window : VocabularyWindows(config.vocab_size, prefix, options)) {
      windows.tokens.push_back(std::move(window));
    }
  }
  return windows;
}

absl::StatusOr<ClusterOptions> ObservingCluster(const CalibrateFlags& flags, const Windows& windows) {
  RW_ASSIGN_OR_RETURN(ClusterOptions options, ToClusterOptions(flags.cluster));
  const size_t window_tokens = windows.tokens[0].size();
  options.worker_flags.insert(
      options.worker_flags.end(),
      {"--observe", flags.work_folder, "--dataset", flags.dataset, "--samples", absl::StrCat(windows.tokens.size()),
       "--sample-tokens", absl::StrCat(window_tokens), "--sample-seed", absl::StrCat(flags.windows.seed),
       "--max-tokens", absl::StrCat(window_tokens + 1), "--max-running", absl::StrCat(kInFlight)});
  return options;
}

// Kills the cluster, and with it every pending request, on an error.
absl::Status Feed(LocalCluster& cluster, const Windows& windows, const Interrupt& interrupt) {
  Feeder feeder(cluster.stub(), windows.tokens);
  ProgressBar bar("calibrate", static_cast<int64_t>(windows.tokens.size()));
  while (feeder.done() < windows.tokens.size()) {
    absl::Status status = cluster.Supervise(absl::Now() + absl::Milliseconds(500), feeder.progress_fd());
    feeder.Acknowledge();
    status.Update(feeder.status());
    if (interrupt.has_come()) status.Update(absl::CancelledError("interrupted"));
    // A restarted group would have forgotten what it saw.
    if (cluster.failures() > 0) status.Update(absl::AbortedError("a rank died; its statistics are lost"));
    if (!status.ok()) {
      cluster.Kill();
      return status;
    }
    bar.Update(static_cast<int64_t>(feeder.done()));
  }
  return absl::OkStatus();
}

absl::Status Calibrate(const CalibrateFlags& flags) {
  const Interrupt interrupt;
  StartLog("rankwise", flags.cluster.log_level);
  RW_ASSIGN_OR_RETURN(const Windows windows, MakeWindows(flags));
  std::error_code error;
  std::filesystem::create_directories(flags.work_folder, error);
  if (error) return absl::InvalidArgumentError(absl::StrCat("--work-dir ", flags.work_folder, ": ", error.message()));
  const std::string path = absl::StrCat(flags.work_folder, "/", kv::KvStatistics::kFileName);
  // So that what is there at the end is this run's.
  std::filesystem::remove(path, error);
  std::filesystem::remove(absl::StrCat(flags.work_folder, "/", weights::InputStatistics::kFileName), error);

  RW_ASSIGN_OR_RETURN(const ClusterOptions options, ObservingCluster(flags, windows));
  RW_ASSIGN_OR_RETURN(const auto cluster, LocalCluster::Start(options));
  RW_RETURN_IF_ERROR(cluster->WaitServing(1, absl::Now() + options.start_timeout, interrupt.fd()));
  RW_RETURN_IF_ERROR(Feed(*cluster, windows, interrupt));
  RW_RETURN_IF_ERROR(cluster->Drain(interrupt.fd()));

  RW_ASSIGN_OR_RETURN(const kv::KvStatistics statistics, kv::ReadKvStatistics(path));
  absl::PrintF("%s: %d layers, %d KV heads of %d channels; %d windows of %d tokens of %s\n", path, statistics.n_layers,
               statistics.n_kv_heads, statistics.head_dim, statistics.sample_count, statistics.sample_tokens,
               statistics.dataset);
  return absl::OkStatus();
}

}  // namespace

void AddCalibrate(CLI::App& app, Action& action) {
  CLI::App* command = app.add_subcommand("calibrate", kDescription);
  command->footer(kExamples);
  const auto flags = std::make_shared<CalibrateFlags>();
  AddClusterFlags(*command, flags->cluster);
  command->add_option("--calib-dataset", flags->dataset, "ptb, c4, wikitext2, pileval or FILE[,FILE…]")
      ->capture_default_str();
  command->add_option("--data-dir", flags->data_folder, "Where the named data sets lie")->capture_default_str();
  command->add_option("--calib-samples", flags->windows.samples, "Windows")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  command->add_option("--calib-seqlen", flags->windows.window_tokens, "Tokens of one window")
      ->check(CLI::Range(1, 1 << 24))
      ->capture_default_str();
  command->add_flag("--vocabulary", flags->has_vocabulary,
                    "Also run every token of the vocabulary once: scales per channel are narrow, and what a rare token "
                    "puts outside them is clamped");
  command->add_option("--work-dir", flags->work_folder, "Where the statistics go")->capture_default_str();
  command->add_option("--seed", flags->windows.seed, "Of the choice of windows")->capture_default_str();
  command->callback([flags, &action] { action = [flags] { return Calibrate(*flags); }; });
}

}  // namespace rankwise::launch
