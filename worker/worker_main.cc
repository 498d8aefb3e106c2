// One rank of a worker group. Start N of them with mpirun or srun; rank 0 dials the coordinator.

#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstdio>
#include <string>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "absl/time/clock.h"
#include "base/log.h"
#include "base/mapped_file.h"
#include "base/status_macros.h"
#include "worker/calibration.h"
#include "worker/comm/activity.h"
#include "worker/comm/exchange.h"
#include "worker/comm/mpi_communicator.h"
#include "worker/comm/mpi_heartbeat.h"
#include "worker/device/device.h"
#include "worker/engine/engine.h"
#include "worker/engine/rank.h"
#include "worker/guard.h"
#include "worker/link/group_session.h"

namespace rankwise {
namespace {

constexpr int kExitConfiguration = 2;  // bad flags or a model that cannot be served: starting again will not help
constexpr int kExitFailure = 3;        // a lost rank or coordinator: starting again may help

constexpr absl::Duration kLinkHeartbeat = absl::Milliseconds(500);
constexpr absl::Duration kStartPatience = absl::Minutes(1);  // until all ranks have met

struct Flags {
  engine::RankOptions rank;
  device::DeviceOptions device;
  std::string kv_memory;
  std::string activations = kernels::kAutoActivations;
  std::string coordinator;
  std::string coordinator_file;
  wire::CredentialFiles credentials;
  std::string observe_dir;
  SampleInfo samples;
  bool has_no_prefix_cache = false;
  CLI::Option* speculate = nullptr;
  double step_timeout_seconds = 60;
  double hang_timeout_seconds = 2.5;
  double reconnect_seconds = 300;
  std::string log_level = "info";
};

std::atomic<bool> g_should_stop{false};

void RequestStop(int) { g_should_stop = true; }

void AddFlags(CLI::App& app, Flags& flags) {
  app.add_option("--model", flags.rank.model_dir, "Folder with config.json and *.safetensors, or a workspace")
      ->required();
  app.add_option("--coordinator", flags.coordinator, "HOST:PORT to join");
  app.add_option("--coordinator-file", flags.coordinator_file,
                 "File that the coordinator's --endpoint-file writes; waits for it to appear");
  app.add_option("--token-file", flags.credentials.token, "File with the bearer token to bring to the coordinator");
  app.add_option("--tls-ca", flags.credentials.tls_ca,
                 "PEM certificates that the coordinator's must be signed by; TLS from then on");
  app.add_option("--tls-cert", flags.credentials.tls_cert, "PEM certificate chain to show the coordinator: mutual TLS");
  app.add_option("--tls-key", flags.credentials.tls_key, "Its PEM key");
  app.add_option("--device", flags.device.device,
                 "cpu, cuda, or auto: cuda where there is a GPU for every rank, else cpu")
      ->capture_default_str();
  app.add_flag("--allow-shared-gpu", flags.device.is_gpu_sharing_allowed,
               "Let ranks share a GPU; they then sum by way of the host");
  app.add_option(
         "--kv", flags.rank.kv,
         "KV cache format: f32, f16, int8 (scales per layer and rank), int8-head (and per KV head), "
         "int8-channel (and per channel), int8-online, int4-online (a range per token and head, no calibration)")
      ->default_str("int8 for a workspace with quant_policy = 4, else f16");
  app.add_option("--kv-scales", flags.rank.kv_scales_dir,
                 "Folder that kv-qparams wrote, for int8, int8-head and int8-channel")
      ->default_str("a workspace's own");
  app.add_option("--kv-memory", flags.kv_memory, "Bytes of KV cache per rank, e.g. 512M or 4G")
      ->default_str("what --max-running sequences need, at most 2G");
  app.add_option("--max-tokens", flags.rank.max_tokens, "Prompt + generated tokens of one sequence")
      ->default_str("the model's context, at most 16384");
  app.add_option("--max-running", flags.rank.max_running, "Sequences in one step")->capture_default_str();
  app.add_option("--max-step-rows", flags.rank.max_step_rows, "Token rows in one step")
      ->default_str("128 on the CPU, else 512, or --max-running");
  app.add_option("--max-chunk-rows", flags.rank.max_chunk_rows, "Prompt rows of one sequence in one step")
      ->capture_default_str();
  app.add_option("--max-waiting", flags.rank.max_waiting, "Sequences that may wait for room")->capture_default_str();
  app.add_flag("--no-prefix-cache", flags.has_no_prefix_cache, "Compute every prompt from its first token");
  flags.speculate =
      app.add_option("--speculate", flags.rank.max_drafts,
                     "Tokens guessed for one sequence in one step, where its text repeats itself, and checked in that "
                     "step: the same tokens, sooner; 0: none")
          ->check(CLI::Range(0, 64))
          ->capture_default_str();
  app.add_option("--threads", flags.device.cpu.threads, "CPU threads of this rank")
      ->default_str("this host's CPUs / ranks on this host");
  app.add_option("--instruction-set", flags.device.cpu.instruction_set, "avx2 or avx512; default the best there is");
  app.add_option("--activations", flags.activations, kernels::kActivationsHelp)
      ->check(CLI::IsMember(kernels::ActivationsFlags()))
      ->capture_default_str();
  app.add_option("--observe", flags.observe_dir,
                 "Calibration: keep statistics of K, V and inputs, and write them into this folder when stopped");
  app.add_option("--dataset", flags.samples.dataset, "With --observe: the data's name, kept in the statistics");
  app.add_option("--samples", flags.samples.sample_count, "With --observe: number of samples, kept in the statistics");
  app.add_option("--sample-tokens", flags.samples.sample_tokens,
                 "With --observe: tokens per sample, kept in the statistics");
  app.add_option("--sample-seed", flags.samples.seed, "With --observe: seed of their choice, kept in the statistics");
  app.add_option("--step-timeout", flags.step_timeout_seconds, "Seconds a rank waits for another one's part of a step")
      ->capture_default_str()
      ->check(CLI::Range(1.0, 86400.0));
  app.add_option("--hang-timeout", flags.hang_timeout_seconds,
                 "Seconds without a sign of life until a rank, or a collective that all wait in, is the group's end; "
                 "0: never, for debuggers")
      ->capture_default_str()
      ->check(CLI::Range(0.0, 86400.0));
  app.add_option("--reconnect", flags.reconnect_seconds, "Seconds to look for a lost coordinator")
      ->capture_default_str()
      ->check(CLI::Range(0.0, 1e9));
  app.add_option("--log-level", flags.log_level, "trace, debug, info, warn, error or off")->capture_default_str();
  app.footer(
      "Example, two ranks on this host:\n"
      "  mpirun -n 2 rankwise-worker --model MODEL --coordinator 127.0.0.1:50051 --kv f16\n"
      "Exit codes: 0 stopped, 2 cannot serve this model or these flags, 3 lost a rank or the coordinator.");
}

absl::StatusOr<std::string> CoordinatorAddress(const Flags& flags) {
  if (!flags.coordinator.empty()) return flags.coordinator;
  if (flags.coordinator_file.empty()) {
    return absl::InvalidArgumentError("give --coordinator HOST:PORT or --coordinator-file FILE");
  }
  const absl::Time give_up = absl::Now() + absl::Seconds(flags.reconnect_seconds);
  while (access(flags.coordinator_file.c_str(), R_OK) != 0) {
    if (absl::Now() > give_up || g_should_stop) {
      return absl::NotFoundError(absl::StrCat(flags.coordinator_file, " did not appear"));
    }
    absl::SleepFor(absl::Milliseconds(50));
  }
  RW_ASSIGN_OR_RETURN(std::string text, ReadTextFile(flags.coordinator_file, 4096));
  absl::StripTrailingAsciiWhitespace(&text);
  return text;
}

rankwise::v1::RankLoad OwnLoad(const engine::Rank& rank, const comm::StepTimes& times) {
  rankwise::v1::RankLoad load;
  load.set_rank(rank.decoder->plan().rank);
  char host[256] = {};
  gethostname(host, sizeof host - 1);
  load.set_host(host);
  load.set_pid(getpid());
  load.set_weight_bytes(rank.decoder->weight_bytes());
  load.set_kv_bytes(rank.decoder->kv_pool().bytes());
  uint64_t saturated = 0;
  for (const int64_t count : rank.decoder->kv_pool().SaturatedCounts()) {
    load.add_saturated_by_layer(count);
    saturated += count;
  }
  load.set_saturated_values(saturated);
  load.set_recent_steps(times.steps);
  if (times.steps > 0) {
    const std::chrono::duration<double> compute = times.compute, collective = times.collective;
    load.set_step_compute_seconds(compute.count() / static_cast<double>(times.steps));
    load.set_step_collective_seconds(collective.count() / static_cast<double>(times.steps));
  }
  return load;
}

worker::v1::Join MakeJoin(const engine::Rank& rank, const Flags& flags, const kernels::Backend& backend) {
  const weights::ModelConfig& config = rank.decoder->config();
  worker::v1::Join join;
  rankwise::v1::GetModelInfoResponse& model = *join.mutable_model();
  model.set_family(config.model_type);
  model.set_fingerprint(rank.checkpoint->fingerprint());
  model.set_n_layers(config.n_layers);
  model.set_n_heads(config.n_heads);
  model.set_n_kv_heads(config.n_kv_heads);
  model.set_head_dim(config.head_dim);
  model.set_hidden_size(config.hidden_size);
  model.set_intermediate_size(config.intermediate_size);
  model.set_vocab_size(config.vocab_size);
  model.set_max_tokens(rank.scheduler_options.max_positions);
  model.set_tp(rank.decoder->plan().world_size);
  model.set_kv_format(rank.kv);
  model.set_kv_scales_id(rank.kv_scales_id);
  model.set_backend(backend.Description());
  model.set_activations(kernels::ActivationsName(rank.decoder->activations()));
  join.set_blocks_total(rank.scheduler_options.block_count);
  join.set_block_tokens(rank.scheduler_options.block_tokens);
  join.set_max_running(rank.scheduler_options.slot_count);
  join.set_max_waiting(rank.scheduler_options.max_waiting);
  join.set_max_step_seconds(flags.step_timeout_seconds);
  return join;
}

absl::Status Lead(const Flags& flags, const wire::Credentials& credentials, const engine::Rank& rank,
                  const kernels::Backend& backend, comm::Communicator& communicator, const std::string& address,
                  const std::function<std::string()>& report) {
  engine::Engine engine(rank.scheduler_options, *rank.executor, communicator, rank.decoder->config().eos_ids,
                        flags.rank.collective_timeout);
  link::SessionOptions options{
      .link = {.address = address, .credentials = credentials, .heartbeat_interval = kLinkHeartbeat},
      .join = MakeJoin(rank, flags, backend)};
  options.reconnect_limit = absl::Seconds(flags.reconnect_seconds);
  RW_ASSIGN_OR_RETURN(const std::vector<std::string> reports, engine.CollectReports(report()));
  for (const std::string& bytes : reports) options.join.add_ranks()->ParseFromString(bytes);
  return link::ServeGroup(engine, options, g_should_stop, report);
}

// A start that failed on all ranks alike exits with kExitConfiguration, a failure while serving with kExitFailure.
absl::Status Load(const Flags& flags, comm::Communicator& host, device::Device& device, engine::Rank& rank,
                  std::string& address, wire::Credentials& credentials) {
  RW_ASSIGN_OR_RETURN(device, device::OpenDevice(flags.device, host));
  absl::Status ready;
  if (host.rank() == 0) {
    auto found = CoordinatorAddress(flags);
    ready = found.status();
    if (found.ok()) address = *found;
    auto read = wire::ReadCredentials(flags.credentials);
    ready.Update(read.status());
    if (read.ok()) credentials = *std::move(read);
  }
  RW_RETURN_IF_ERROR(comm::Agree(ready, host, flags.rank.collective_timeout + absl::Seconds(flags.reconnect_seconds)));
  RW_ASSIGN_OR_RETURN(rank, engine::LoadRank(flags.rank, *device.backend, device.communicator(host)));
  return absl::OkStatus();
}

// Beats until it is destroyed, and ends the job when the group has ceased to act as one.
absl::StatusOr<std::unique_ptr<comm::MpiHeartbeat>> StartHeartbeat(const comm::MpiSession& mpi,
                                                                   const comm::Activity& activity, const Guard& guard,
                                                                   absl::Duration patience) {
  comm::HeartbeatOptions options{.interval = patience / 10, .patience = patience};
  options.on_beat = [&guard, rank = mpi.rank()](const comm::Beat& beat) { guard.Take(rank, beat); };
  options.on_failure = [&mpi](const absl::Status& status) {
    spdlog::error("rank {}: {}", mpi.rank(), std::string(status.message()));
    mpi.Abort(kExitFailure);
  };
  return comm::MpiHeartbeat::Start(mpi, activity, std::move(options), kStartPatience);
}

int Run(Flags& flags) {
  const absl::Duration patience = absl::Seconds(flags.hang_timeout_seconds);
  std::unique_ptr<Guard> guard;  // before MPI has threads
  if (patience > absl::ZeroDuration()) {
    auto started = Guard::Start(patience, kStartPatience);
    if (!started.ok()) {
      spdlog::error("{}", std::string(started.status().message()));
      return kExitFailure;
    }
    guard = *std::move(started);
  }
  auto session = comm::MpiSession::Start();
  if (!session.ok()) {
    spdlog::error("{}", std::string(session.status().message()));
    return kExitFailure;
  }
  comm::MpiSession& mpi = **session;
  comm::Activity activity;
  auto unwatched = comm::CreateGroupCommunicator(mpi, kStartPatience);
  if (!unwatched.ok()) {
    spdlog::error("{}", std::string(unwatched.status().message()));
    mpi.Abort(kExitFailure);
  }
  comm::WatchedCommunicator host(*std::move(unwatched), &activity);
  std::unique_ptr<comm::MpiHeartbeat> heartbeat;
  if (guard) {
    auto started = StartHeartbeat(mpi, activity, *guard, patience);
    if (!started.ok()) {
      spdlog::error("{}", std::string(started.status().message()));
      mpi.Abort(kExitFailure);
    }
    heartbeat = *std::move(started);
  }
  device::ShareOutCpus(mpi.host_size(), flags.device.cpu);
  flags.device.mpi_host_rank = mpi.host_rank();
  flags.device.timeout = flags.rank.collective_timeout;
  device::Device device;
  engine::Rank rank;
  std::string address;
  wire::Credentials credentials;
  const absl::Time begin = absl::Now();
  const bool is_lead = host.rank() == 0;
  if (const absl::Status loaded = Load(flags, host, device, rank, address, credentials); !loaded.ok()) {
    if (is_lead) spdlog::error("cannot serve {}: {}", flags.rank.model_dir, std::string(loaded.message()));
    return kExitConfiguration;
  }
  comm::Communicator& communicator = device.communicator(host);
  if (is_lead) {
    spdlog::info("{} ready in {:.1f} s: {}, {}, kv {}, {} blocks of {} tokens", flags.rank.model_dir,
                 absl::ToDoubleSeconds(absl::Now() - begin), device.backend->Description(), communicator.Description(),
                 rank.kv, rank.scheduler_options.block_count, rank.scheduler_options.block_tokens);
    if (const auto wanted = flags.device.activations; wanted && rank.decoder->activations() != *wanted) {
      spdlog::warn("--activations {}: {} has no {} weights and is computed in floats", flags.activations,
                   flags.rank.model_dir, *wanted == kernels::Activations::kInt8 ? "quantised" : "f16 or bf16");
    }
  }
  const std::function<std::string()> report = [&] { return OwnLoad(rank, host.TakeStepTimes()).SerializeAsString(); };
  absl::Status ended = is_lead ? Lead(flags, credentials, rank, *device.backend, communicator, address, report)
                               : engine::Follow(*rank.executor, communicator, flags.rank.collective_timeout, report);
  if (ended.ok() && !flags.observe_dir.empty()) {
    ended = WriteObservations(rank, communicator, flags.observe_dir, flags.samples, flags.rank.collective_timeout);
  }
  if (!ended.ok()) {
    spdlog::error("rank {}: {}", communicator.rank(), std::string(ended.message()));
    mpi.Abort(kExitFailure);
  }
  if (heartbeat) {
    spdlog::debug("rank {}: the heartbeat took {:.2f} ms of CPU in {:.1f} s", mpi.rank(),
                  absl::ToDoubleMilliseconds(heartbeat->cpu_time()), absl::ToDoubleSeconds(absl::Now() - begin));
  }
  return 0;
}

}  // namespace
}  // namespace rankwise

int main(int argc, char** argv) {
  using namespace rankwise;
  CLI::App app("rankwise-worker: one rank of a worker group");
  Flags flags;
  AddFlags(app, flags);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    const int code = app.exit(error);
    return code == 0 ? 0 : kExitConfiguration;
  }
  StartLog("worker", flags.log_level);
  if (!flags.kv_memory.empty()) {
    uint64_t bytes = 0;
    std::string text = flags.kv_memory;
    // The validator rewrites the text as a number and returns what is wrong with it.
    if (!CLI::AsSizeValue(false)(text).empty() || !absl::SimpleAtoi(text, &bytes) || bytes == 0 ||
        bytes > (uint64_t{1} << 50)) {
      spdlog::error("--kv-memory {} is not a size such as 512M or 4G", flags.kv_memory);
      return kExitConfiguration;
    }
    flags.rank.kv_memory_bytes = static_cast<int64_t>(bytes);
  }
  flags.device.activations = kernels::ActivationsOfFlag(flags.activations);
  flags.rank.collective_timeout = absl::Seconds(flags.step_timeout_seconds);
  flags.rank.has_prefix_cache = !flags.has_no_prefix_cache && flags.observe_dir.empty();
  flags.rank.observes = !flags.observe_dir.empty();
  if (flags.rank.observes) {
    flags.rank.kv = "f32";
    if (flags.speculate->empty()) flags.rank.max_drafts = 0;
  }
  std::signal(SIGTERM, RequestStop);
  std::signal(SIGINT, RequestStop);
  std::signal(SIGPIPE, SIG_IGN);
  return Run(flags);
}
