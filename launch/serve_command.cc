#include <cstdio>
#include <filesystem>
#include <memory>
#include <string>
#include <system_error>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/log.h"
#include "base/mapped_file.h"
#include "base/status_macros.h"
#include "launch/client.h"
#include "launch/cluster_flags.h"
#include "launch/commands.h"
#include "launch/interrupt.h"
#include "launch/load_table.h"
#include "launch/local_cluster.h"
#include "worker/kv/kv_choice.h"
#include "worker/weights/workspace_layout.h"

namespace rankwise::launch {
namespace {

constexpr char kDescription[] = R"(Serve a model on this host: a coordinator and its worker groups

Starts a coordinator and `--replicas` groups of `--tp` MPI ranks, restarts what dies, and prints one line when
the first group serves. SIGTERM or Ctrl-C finishes the live requests and ends everything; a second one does not wait.)";

constexpr char kExamples[] = R"(Examples:
  rankwise serve ./TinyLlama-1.1B --tp 2
  rankwise serve ./Llama-2-7b --tp 4 --kv int8 --kv-scales ./scales --endpoint-file /tmp/me/endpoint
  rankwise serve ./workspace --tp 2 --kv int8
  rankwise serve ./Qwen2.5-0.5B --replicas 2 --threads 8 --listen 0.0.0.0:8600)";

struct ServeFlags {
  ClusterFlags cluster;
  std::string kv;
  std::string kv_scales;
  std::string listen = "127.0.0.1:0";
  std::string endpoint_file;
  std::string token_file, journal;
  bool has_no_token = false, is_tls_mutual = false;
  wire::CredentialFiles tls;
  double drain_seconds = 30;
  int max_live = 0, max_running = 0, max_step_rows = 0, max_chunk_rows = 0, max_tokens = 0;
  bool is_prefix_cache_off = false;
  int speculate = -1;  // as the worker does
};

void AddFlag(std::vector<std::string>& flags, const std::string& name, int value) {
  if (value > 0) flags.insert(flags.end(), {name, absl::StrCat(value)});
}

absl::StatusOr<ClusterOptions> ToOptions(const ServeFlags& flags) {
  if (kv::NeedsScales(flags.kv) && flags.kv_scales.empty() && !weights::IsWorkspace(flags.cluster.model))
    return absl::InvalidArgumentError(absl::StrCat(
        "--kv ", flags.kv, " needs --kv-scales DIR; `rankwise calibrate` and `rankwise kv-qparams --num-tp ",
        flags.cluster.tp, "` write such a folder"));
  RW_ASSIGN_OR_RETURN(ClusterOptions options, ToClusterOptions(flags.cluster));
  options.listen = flags.listen;
  options.drain_timeout = absl::Seconds(flags.drain_seconds);
  options.has_tokens = !flags.has_no_token;
  options.tls = flags.tls;
  options.is_tls_mutual = flags.is_tls_mutual;
  if (!flags.token_file.empty()) {
    RW_ASSIGN_OR_RETURN(const wire::Credentials given, wire::ReadCredentials({.token = flags.token_file}));
    options.client_token = given.token;
  }
  if (!flags.journal.empty())
    options.coordinator_flags.insert(options.coordinator_flags.end(), {"--journal", flags.journal});
  AddFlag(options.coordinator_flags, "--max-live", flags.max_live);
  std::vector<std::string>& worker = options.worker_flags;
  if (!flags.kv.empty()) worker.insert(worker.end(), {"--kv", flags.kv});
  if (!flags.kv_scales.empty()) worker.insert(worker.end(), {"--kv-scales", flags.kv_scales});
  AddFlag(worker, "--max-running", flags.max_running);
  AddFlag(worker, "--max-step-rows", flags.max_step_rows);
  AddFlag(worker, "--max-chunk-rows", flags.max_chunk_rows);
  AddFlag(worker, "--max-tokens", flags.max_tokens);
  if (flags.speculate >= 0) worker.insert(worker.end(), {"--speculate", absl::StrCat(flags.speculate)});
  if (flags.is_prefix_cache_off) worker.push_back("--no-prefix-cache");
  return options;
}

// The clients' token where `rankwise` looks for it, until the end.
class TokenFiles {
 public:
  ~TokenFiles() {
    std::error_code error;
    for (const std::string& path : paths_) std::filesystem::remove(path, error);
  }

  absl::Status Write(const LocalCluster& cluster, const std::string& endpoint_file) {
    const std::string& token = cluster.credentials().token;
    if (!endpoint_file.empty()) {
      RW_RETURN_IF_ERROR(wire::WriteToken(TokenFileOf(endpoint_file), token));
      paths_.push_back(TokenFileOf(endpoint_file));
    }
    const std::filesystem::path in_home = HomeTokenFileOf(cluster.endpoint());
    std::error_code error;
    if (in_home.empty()) return absl::OkStatus();
    std::filesystem::create_directories(in_home.parent_path(), error);
    std::filesystem::permissions(in_home.parent_path(), std::filesystem::perms::owner_all, error);
    // A home that cannot be written to is no reason not to serve.
    if (const absl::Status written = wire::WriteToken(in_home, token); written.ok()) {
      paths_.push_back(in_home);
    } else {
      spdlog::warn("{}", std::string(written.message()));
    }
    return absl::OkStatus();
  }

 private:
  std::vector<std::string> paths_;
};

void PrintReady(LocalCluster& cluster, const ClusterOptions& options) {
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(5)));
  rankwise::v1::GetModelInfoResponse model;
  const grpc::Status status = cluster.stub().GetModelInfo(&context, {}, &model);
  absl::PrintF("rankwise: serving %s at %s (tp %d, %d group%s, kv %s%s, %s)\n",
               status.ok() ? model.model_name() : options.model, cluster.endpoint(), options.tp, options.replicas,
               options.replicas == 1 ? "" : "s", status.ok() ? model.kv_format() : "?", ActivationsWords(model),
               status.ok() ? model.backend() : "?");
  if (options.has_tokens) {
    const std::string in_home = HomeTokenFileOf(cluster.endpoint());
    const bool is_there = access(in_home.c_str(), R_OK) == 0;
    absl::PrintF("rankwise: other users need its token: %s\n", is_there ? in_home : cluster.token_file());
  }
  std::fflush(stdout);
}

// Loopback: nobody outside this host can listen in.
bool IsLoopback(const std::string& listen) {
  return absl::StartsWith(listen, "127.") || absl::StartsWith(listen, "localhost:") ||
         absl::StartsWith(listen, "[::1]");
}

absl::Status Serve(const ServeFlags& flags) {
  Interrupt interrupt;
  StartLog("rankwise", flags.cluster.log_level == "off" ? "warn" : flags.cluster.log_level);
  RW_ASSIGN_OR_RETURN(const ClusterOptions options, ToOptions(flags));
  if (!IsLoopback(options.listen) && options.tls.tls_cert.empty())
    spdlog::warn("{} can be reached from other hosts, and without --tls-cert all travels readable{}", options.listen,
                 options.has_tokens ? "" : "; without a token anybody may use it");
  RW_ASSIGN_OR_RETURN(const auto cluster, LocalCluster::Start(options));
  const absl::Time start_deadline = absl::Now() + options.start_timeout;
  if (const absl::Status status = cluster->WaitServing(1, start_deadline, interrupt.fd()); !status.ok())
    return absl::IsCancelled(status) ? absl::OkStatus() : status;
  // The tokens first: whoever finds the endpoint finds them too.
  TokenFiles token_files;
  if (options.has_tokens) RW_RETURN_IF_ERROR(token_files.Write(*cluster, flags.endpoint_file));
  // Only now: whoever waits for the file may send its first request.
  if (!flags.endpoint_file.empty())
    RW_RETURN_IF_ERROR(WriteFileAtomically(flags.endpoint_file, absl::StrCat(cluster->endpoint(), "\n")));
  PrintReady(*cluster, options);
  while (!interrupt.has_come() && !cluster->is_finished())
    RW_RETURN_IF_ERROR(cluster->Supervise(absl::InfiniteFuture(), interrupt.fd()));
  interrupt.Acknowledge();
  const absl::Status status = cluster->Drain(interrupt.fd());
  std::error_code error;
  if (!flags.endpoint_file.empty()) std::filesystem::remove(flags.endpoint_file, error);
  return status;
}

}  // namespace

void AddServe(CLI::App& app, Action& action) {
  CLI::App* command = app.add_subcommand("serve", kDescription);
  command->footer(kExamples);
  const auto flags = std::make_shared<ServeFlags>();  // lives as long as the parser's callbacks
  AddClusterFlags(*command, flags->cluster);
  command->add_option("--replicas", flags->cluster.replicas, "Groups, each with the whole model")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  command->add_option("--kv", flags->kv, "How keys and values are stored")
      ->check(CLI::IsMember(kv::KvNames()))
      ->default_str("int8 for a workspace with quant_policy = 4, else f16");
  command->add_option("--kv-scales", flags->kv_scales, "Folder with the int8 scales")
      ->check(CLI::ExistingDirectory)
      ->default_str("a workspace's own");
  command->add_option("--listen", flags->listen, "HOST:PORT; port 0 takes a free one")->capture_default_str();
  command->add_option("--endpoint-file", flags->endpoint_file, "Write HOST:PORT there once the first group serves");
  command
      ->add_option("--token-file", flags->token_file,
                   "File with the bearer token that clients must bring, readable by its owner alone")
      ->default_str("a token made for this run: ENDPOINT_FILE.token");
  command->add_flag("--no-token", flags->has_no_token, "Anybody who can reach it may use it")->excludes("--token-file");
  command->add_option("--tls-cert", flags->tls.tls_cert, "PEM certificate, which names the address of --listen");
  command->add_option("--tls-key", flags->tls.tls_key, "Its PEM key");
  command->add_option("--tls-ca", flags->tls.tls_ca, "PEM certificate of who has signed it");
  command->add_flag("--mutual-tls", flags->is_tls_mutual, "Clients must show a certificate of --tls-ca too");
  command->add_option("--journal", flags->journal,
                      "Folder that lets requests which linger outlive the coordinator, and a restart of all");
  command->add_option("--drain-timeout", flags->drain_seconds, "Seconds that live requests get to finish at the end")
      ->check(CLI::Range(0.1, 86400.0))
      ->capture_default_str();
  const CLI::Range positive(1, 1 << 30);
  command->add_option("--max-live", flags->max_live, "Requests held at once; more are refused")->check(positive);
  command->add_option("--max-running", flags->max_running, "Sequences in one step")->check(positive);
  command
      ->add_option("--max-step-rows", flags->max_step_rows,
                   "Tokens in one step, 128 on the CPU, else 512, or --max-running: fewer keep everyone's next token "
                   "near while prompts are read")
      ->check(positive);
  command->add_option("--max-chunk-rows", flags->max_chunk_rows, "Prompt tokens of one request in one step")
      ->check(positive);
  command->add_option("--max-tokens", flags->max_tokens, "Prompt and generated tokens of one request")->check(positive);
  command
      ->add_option(
          "--speculate", flags->speculate,
          "Tokens guessed for one request in one step, where its text repeats itself: the same tokens, sooner; "
          "0: none")
      ->check(CLI::Range(0, 64))
      ->default_str("8");
  command->add_flag("--no-prefix-cache", flags->is_prefix_cache_off,
                    "Compute shared prompt beginnings again each time");
  command->callback([flags, &action] { action = [flags] { return Serve(*flags); }; });
}

}  // namespace rankwise::launch
