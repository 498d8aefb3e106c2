#include <poll.h>
#include <sys/epoll.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/cord.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "base/check.h"
#include "base/digest.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "launch/batch/input.h"
#include "launch/batch/join.h"
#include "launch/batch/question.h"
#include "launch/batch/result_file.h"
#include "launch/batch/runner.h"
#include "launch/batch/walltime.h"
#include "launch/client.h"
#include "launch/cluster_flags.h"
#include "launch/commands.h"
#include "launch/interrupt.h"
#include "launch/local_cluster.h"
#include "launch/progress_bar.h"
#include "proto/numerics.h"
#include "worker/kv/kv_choice.h"

namespace rankwise::launch {
namespace {

using rankwise::v1::GetModelInfoResponse;
using rankwise::v1::Inference;

constexpr char kDescription[] = R"(Answer every line of a file exactly once, also through kills and requeues

Lines in and out are OpenAI's batch lines:
  {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "Once", "max_tokens": 64, "seed": 1}}
Bodies of /v1/completions and, with --chat-format, /v1/chat/completions: prompt or messages, max_tokens,
max_completion_tokens, temperature, top_p, top_k, min_p, n, seed, stop, stop_token_ids, logprobs, top_logprobs, logit_bias,
frequency_penalty, presence_penalty, repetition_penalty, min_tokens, ignore_eos, include_stop_str_in_output. "model", "user"
and "metadata" may be there and change nothing; any other field, and any value out of range, makes that line's result an
error that names it. A line without a seed gets one that follows from its custom_id. A result is a function of its line, the
model, the KV format and the activations: a line that is asked again after a failure gives the same bytes; "created" is
always 0.

With MODEL, starts a cluster for the run; without, asks the server of --endpoint or --endpoint-file. Results are appended
to --output as they come, in any order, each on disk before it counts. The same command again goes on where the last one was
stopped or killed. SIGINT, SIGTERM or SIGUSR1 begins no more lines, gives those that run --grace to finish, and ends with
exit code 75: not finished, run it again. So does a Slurm job whose end ($SLURM_JOB_END_TIME) is near.

Exit codes: 0 every line has a result, 75 not finished, 2 something to be changed first, 1 failed.)";

constexpr char kExamples[] = R"(Examples:
  rankwise batch ./model --tp 2 --input questions.jsonl --output answers.jsonl
  rankwise batch --endpoint 10.0.0.1:8600 --input questions.jsonl --output answers.jsonl --window 256
  rankwise batch --endpoint-file ./endpoint --input q.jsonl --output a.jsonl --shard 3/8    writes a.3-of-8.jsonl
  rankwise batch --input q.jsonl --output a.jsonl --join 8                                  makes a.jsonl of the eight)";

constexpr int kNotFinished = 75;  // EX_TEMPFAIL

struct BatchFlags {
  ClusterFlags cluster;
  EndpointFlags endpoint;
  std::string kv, kv_scales;
  std::string input, output;
  std::string shard;
  int join = 0;
  std::string chat_format = "none";
  batch::QuestionOptions question;
  int window = 64;
  double grace_seconds = 30, margin_seconds = 20, lock_seconds = 0, patience_seconds = 600, line_seconds = 3600;
  int max_running = 0, max_tokens = 0;
};

absl::Status NotFinished(const std::string& message) {
  absl::Status status = absl::UnavailableError(message);
  status.SetPayload(kExitCode, absl::Cord(absl::StrCat(kNotFinished)));
  return status;
}

// Readable when one of its descriptors is.
class AnyReadable {
 public:
  AnyReadable() : fd_(epoll_create1(EPOLL_CLOEXEC)) { RW_CHECK(fd_ >= 0); }
  ~AnyReadable() { close(fd_); }
  AnyReadable(const AnyReadable&) = delete;
  AnyReadable& operator=(const AnyReadable&) = delete;

  int fd() const { return fd_; }
  void Add(int fd) {
    epoll_event event{.events = EPOLLIN, .data = {.fd = fd}};
    RW_CHECK(epoll_ctl(fd_, EPOLL_CTL_ADD, fd, &event) == 0);
  }

 private:
  const int fd_;
};

// A cluster that lives as long as this, or a server that runs somewhere.
class Server {
 public:
  static absl::StatusOr<std::unique_ptr<Server>> Start(const BatchFlags& flags, int wake_fd);

  // Restarts what dies, until `deadline` or `wake_fd` becomes readable. Unavailable when the cluster was stopped.
  absl::Status Wait(absl::Time deadline, int wake_fd);
  absl::StatusOr<std::shared_ptr<Inference::Stub>> Find();  // for any thread
  // As soon as a group serves. Cancelled when `wake_fd` becomes readable.
  absl::StatusOr<GetModelInfoResponse> WaitModelInfo(absl::Time deadline, int wake_fd);
  absl::Status End(int wake_fd);

 private:
  explicit Server(EndpointFlags endpoint) : endpoint_flags_(std::move(endpoint)) {}

  const EndpointFlags endpoint_flags_;
  std::unique_ptr<LocalCluster> cluster_;
  absl::Mutex mutex_;
  std::string endpoint_ ABSL_GUARDED_BY(mutex_);  // of stub_, and so are the credentials
  wire::Credentials credentials_ ABSL_GUARDED_BY(mutex_);
  std::shared_ptr<Inference::Stub> stub_ ABSL_GUARDED_BY(mutex_);
};

absl::StatusOr<ClusterOptions> ToOptions(const BatchFlags& flags) {
  RW_ASSIGN_OR_RETURN(ClusterOptions options, ToClusterOptions(flags.cluster));
  std::vector<std::string>& worker = options.worker_flags;
  if (!flags.kv.empty()) worker.insert(worker.end(), {"--kv", flags.kv});
  if (!flags.kv_scales.empty()) worker.insert(worker.end(), {"--kv-scales", flags.kv_scales});
  if (flags.max_running > 0) worker.insert(worker.end(), {"--max-running", absl::StrCat(flags.max_running)});
  if (flags.max_tokens > 0) worker.insert(worker.end(), {"--max-tokens", absl::StrCat(flags.max_tokens)});
  return options;
}

absl::StatusOr<std::unique_ptr<Server>> Server::Start(const BatchFlags& flags, int wake_fd) {
  std::unique_ptr<Server> server(new Server(flags.endpoint));
  if (flags.cluster.model.empty()) {
    // A file that is not there yet is waited for.
    const auto endpoint = ResolveEndpoint(flags.endpoint);
    if (!endpoint.ok() && !absl::IsNotFound(endpoint.status())) return endpoint.status();
    return server;
  }
  if (!flags.endpoint.endpoint.empty() || !flags.endpoint.endpoint_file.empty())
    return absl::InvalidArgumentError("give either MODEL, for a cluster of this run, or the endpoint of a server");
  RW_ASSIGN_OR_RETURN(const ClusterOptions options, ToOptions(flags));
  RW_ASSIGN_OR_RETURN(server->cluster_, LocalCluster::Start(options));
  RW_RETURN_IF_ERROR(server->cluster_->WaitServing(1, absl::Now() + options.start_timeout, wake_fd));
  return server;
}

absl::Status Server::Wait(absl::Time deadline, int wake_fd) {
  if (cluster_ != nullptr) {
    RW_RETURN_IF_ERROR(cluster_->Supervise(deadline, wake_fd));
    return cluster_->is_finished() ? absl::UnavailableError("the coordinator was stopped") : absl::OkStatus();
  }
  pollfd event{.fd = wake_fd, .events = POLLIN};
  poll(&event, 1, static_cast<int>(std::max<int64_t>(absl::ToInt64Milliseconds(deadline - absl::Now()), 0)));
  return absl::OkStatus();
}

absl::StatusOr<std::shared_ptr<Inference::Stub>> Server::Find() {
  absl::MutexLock lock(&mutex_);
  std::string endpoint;
  wire::Credentials credentials;
  if (cluster_ != nullptr) {
    endpoint = cluster_->endpoint();
    credentials = cluster_->credentials();
  } else if (auto found = ResolveEndpoint(endpoint_flags_); found.ok()) {
    endpoint = *std::move(found);
    RW_ASSIGN_OR_RETURN(credentials, ResolveCredentials(endpoint_flags_, endpoint));
  } else {
    return absl::UnavailableError(found.status().message());
  }
  // A server that comes back may have a new token at the old address.
  if (stub_ == nullptr || endpoint != endpoint_ || credentials != credentials_) {
    stub_ = ConnectTo(endpoint, credentials);
    endpoint_ = endpoint;
    credentials_ = std::move(credentials);
  }
  return stub_;
}

absl::StatusOr<GetModelInfoResponse> Server::WaitModelInfo(absl::Time deadline, int wake_fd) {
  for (;;) {
    absl::StatusOr<std::shared_ptr<Inference::Stub>> stub = Find();
    absl::Status status = stub.status();
    if (stub.ok()) {
      grpc::ClientContext context;
      context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(5)));
      GetModelInfoResponse model;
      status = FromGrpc((*stub)->GetModelInfo(&context, {}, &model));
      if (status.ok()) return model;
    }
    if ((!absl::IsUnavailable(status) && !absl::IsDeadlineExceeded(status)) || absl::Now() > deadline) return status;
    RW_RETURN_IF_ERROR(Wait(absl::Now() + absl::Milliseconds(100), wake_fd));
    pollfd event{.fd = wake_fd, .events = POLLIN};
    if (poll(&event, 1, 0) == 1) return absl::CancelledError("interrupted");
  }
}

absl::Status Server::End(int wake_fd) {
  {
    absl::MutexLock lock(&mutex_);
    stub_.reset();  // an idle connection would keep the coordinator waiting
    endpoint_.clear();
  }
  return cluster_ != nullptr ? cluster_->Drain(wake_fd) : absl::OkStatus();
}

batch::Served WhatServes(const GetModelInfoResponse& model) {
  return {.model = model.model_name(), .fingerprint = Digest(wire::NumericsLine(model))};
}

std::optional<absl::Time> EndOfJob() {
  const char* text = std::getenv("SLURM_JOB_END_TIME");
  int64_t seconds = 0;
  if (text == nullptr || !absl::SimpleAtoi(text, &seconds) || seconds <= 0) return std::nullopt;
  return absl::FromUnixSeconds(seconds);
}

class Batch {
 public:
  explicit Batch(const BatchFlags& flags) : flags_(flags) {}
  absl::Status Run();

 private:
  absl::Status Prepare();
  absl::Status Ask();
  // Until every line has its result, or what stops a run has stopped it.
  absl::Status Watch(Server& server, batch::Runner& runner, AnyReadable& events, absl::Time give_up);
  absl::Status Verdict(const batch::Runner& runner, absl::Status ended) const;

  const BatchFlags& flags_;
  Interrupt stop_{SIGUSR1};  // which Slurm is told to send before a job's end
  std::string output_;
  std::unique_ptr<batch::FileLock> lock_;
  std::optional<batch::Input> input_;
  batch::Results found_;
  std::unique_ptr<batch::ResultFile> results_;
  std::vector<size_t> todo_;
};

absl::Status Batch::Prepare() {
  batch::Shard shard;
  if (!flags_.shard.empty()) {
    RW_ASSIGN_OR_RETURN(shard, batch::ParseShard(flags_.shard));
  } else {
    RW_ASSIGN_OR_RETURN(const auto of_job,
                        batch::ShardFromSlurm([](const char* name) -> const char* { return getenv(name); }));
    if (of_job) shard = *of_job;
  }
  output_ = batch::ShardOutput(flags_.output, shard);
  RW_ASSIGN_OR_RETURN(lock_, batch::FileLock::Take(output_, absl::Seconds(flags_.lock_seconds)));
  RW_ASSIGN_OR_RETURN(input_, batch::Input::Open(flags_.input));
  found_.lines.resize(input_->lines().size());
  RW_ASSIGN_OR_RETURN(results_, batch::ResultFile::Open(output_, [&](std::string_view line) {
                        return batch::AddResult(*input_, line, found_);
                      }));
  for (size_t i = 0; i < found_.lines.size(); ++i) {
    if (shard.Holds(i) && found_.lines[i].empty()) todo_.push_back(i);
    if (!shard.Holds(i) && !found_.lines[i].empty())
      return absl::FailedPreconditionError(absl::StrCat(output_, " holds the result of line ",
                                                        input_->lines()[i].number, ", which is of another shard"));
  }
  found_.lines.clear();  // only that they are there was of interest
  return absl::OkStatus();
}

absl::Status Batch::Watch(Server& server, batch::Runner& runner, AnyReadable& events, absl::Time give_up) {
  ProgressBar bar("batch", static_cast<int64_t>(todo_.size()));
  absl::Status ended;
  bool is_stopping = false;
  while (!runner.is_idle()) {
    // Also when all is given up, threads need a moment to end.
    const absl::Time now = absl::Now();
    const absl::Status status =
        server.Wait(std::clamp(give_up, now + absl::Milliseconds(20), now + absl::Milliseconds(500)), events.fd());
    runner.Acknowledge();
    bar.Update(static_cast<int64_t>(runner.done()));
    if (stop_.has_come()) {
      stop_.Acknowledge();
      if (is_stopping) give_up = absl::InfinitePast();  // the second one does not wait
      runner.StopAdmitting();
      is_stopping = true;
      give_up = std::min(give_up, absl::Now() + absl::Seconds(flags_.grace_seconds));
    }
    // Without its servers, whatever still runs has no answer to wait for.
    if (!status.ok()) {
      ended.Update(is_stopping ? absl::OkStatus() : status);
      give_up = absl::InfinitePast();
    }
    if (absl::Now() >= give_up) runner.Abandon();
  }
  bar.Update(static_cast<int64_t>(runner.done()));
  return ended;
}

absl::Status Batch::Verdict(const batch::Runner& runner, absl::Status ended) const {
  const size_t before = found_.errors;
  const size_t left = todo_.size() - runner.done();
  if (runner.errors() + before > 0)
    absl::FPrintF(stderr, "rankwise: %d results in %s are errors\n", runner.errors() + before, output_);
  if (runner.retries() > 0) absl::FPrintF(stderr, "rankwise: %d attempts had to be repeated\n", runner.retries());
  ended.Update(runner.status());
  if (left == 0) return absl::OkStatus();
  const std::string state = absl::StrCat(left, " lines have no result yet: run the same command again to go on");
  if (!ended.ok() && !absl::IsUnavailable(ended))
    return absl::Status(ended.code(), absl::StrCat(ended.message(), "; ", state));
  return NotFinished(absl::StrCat(!ended.ok()               ? absl::StrCat(std::string(ended.message()), "; ")
                                  : runner.is_out_of_time() ? "out of time; "
                                                            : "",
                                  state));
}

absl::Status Batch::Ask() {
  auto server = Server::Start(flags_, stop_.fd());
  if (absl::IsCancelled(server.status())) return NotFinished("stopped before the first line was asked");
  RW_RETURN_IF_ERROR(server.status());
  const auto model = (*server)->WaitModelInfo(absl::Now() + absl::Seconds(flags_.cluster.start_seconds), stop_.fd());
  if (absl::IsCancelled(model.status())) return NotFinished("stopped before the first line was asked");
  RW_RETURN_IF_ERROR(model.status());
  const batch::Served served = WhatServes(*model);
  if (!found_.fingerprint.empty() && found_.fingerprint != served.fingerprint)
    return absl::FailedPreconditionError(
        absl::StrCat(output_, " holds answers of ", found_.fingerprint, ", and ", served.fingerprint,
                     " serves now: not one model, KV format and scales; give another --output"));
  absl::Status verdict;
  {
    batch::Walltime walltime(EndOfJob(), absl::Seconds(flags_.margin_seconds));
    const absl::Time last_moment = walltime.last_moment();  // from now on it is the runner's
    batch::RunnerOptions options{.question = flags_.question, .served = served, .window = flags_.window};
    options.line_timeout = absl::Seconds(flags_.line_seconds);
    options.patience = absl::Seconds(flags_.patience_seconds);
    batch::Runner runner(
        *input_, todo_, *results_, walltime, [&] { return (*server)->Find(); }, options);
    AnyReadable events;
    events.Add(stop_.fd());
    events.Add(runner.progress_fd());
    const absl::Status ended = Watch(**server, runner, events, last_moment);
    verdict = Verdict(runner, ended);
  }
  const absl::Status end = (*server)->End(stop_.fd());
  return verdict.ok() ? end : verdict;
}

absl::Status Batch::Run() {
  if (flags_.join > 0) {
    RW_ASSIGN_OR_RETURN(const batch::Input input, batch::Input::Open(flags_.input));
    const auto joined = batch::JoinShards(input, flags_.output, flags_.join);
    if (absl::IsUnavailable(joined.status())) return NotFinished(std::string(joined.status().message()));
    RW_RETURN_IF_ERROR(joined.status());
    absl::FPrintF(stderr, "rankwise: %s has %d results, %d of them errors\n", flags_.output, joined->lines.size(),
                  joined->errors);
    return absl::OkStatus();
  }
  RW_RETURN_IF_ERROR(Prepare());
  if (todo_.empty()) {
    absl::FPrintF(stderr, "rankwise: every line has its result in %s\n", output_);
    return absl::OkStatus();
  }
  absl::FPrintF(stderr, "rankwise: %d lines to answer into %s\n", todo_.size(), output_);
  return Ask();
}

absl::Status RunBatch(BatchFlags flags) {
  StartLog("rankwise", flags.cluster.log_level == "off" ? "warn" : flags.cluster.log_level);
  using batch::ChatFormat;
  for (const auto& [name, format] :
       {std::pair{"chatml", ChatFormat::kChatml}, {"llama3", ChatFormat::kLlama3}, {"plain", ChatFormat::kPlain}})
    if (flags.chat_format == name) flags.question.chat_format = format;
  return Batch(flags).Run();
}

}  // namespace

void AddBatch(CLI::App& app, Action& action) {
  CLI::App* command = app.add_subcommand("batch", kDescription);
  command->footer(kExamples);
  const auto flags = std::make_shared<BatchFlags>();
  AddClusterFlags(*command, flags->cluster);
  command->get_option("MODEL")->required(false);
  AddEndpointFlags(*command, flags->endpoint);
  command->add_option("--replicas", flags->cluster.replicas, "With MODEL: groups")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  command->add_option("--kv", flags->kv, "With MODEL: how keys and values are stored")
      ->check(CLI::IsMember(kv::KvNames()));
  command->add_option("--kv-scales", flags->kv_scales, "With MODEL: folder with the int8 scales")
      ->check(CLI::ExistingDirectory);
  command->add_option("--max-running", flags->max_running, "With MODEL: sequences in one step")
      ->check(CLI::Range(1, 1 << 20));
  command->add_option("--max-tokens", flags->max_tokens, "With MODEL: prompt and generated tokens of one sequence")
      ->check(CLI::Range(1, 1 << 30));
  command->add_option("--input", flags->input, "Questions, one a line")->required()->check(CLI::ExistingFile);
  command->add_option("--output", flags->output, "Results, one a line; goes on where it ends")->required();
  command->add_option("--shard", flags->shard,
                      "INDEX/COUNT: answer each COUNTth line, into NAME.INDEX-of-COUNT.EXT; by default the place in a "
                      "Slurm job array");
  command->add_option("--join", flags->join, "Ask nothing: make --output of the results of so many shards, in order")
      ->check(CLI::Range(1, 1 << 20));
  command->add_option("--chat-format", flags->chat_format, "How messages become text: none refuses them")
      ->check(CLI::IsMember({"none", "chatml", "llama3", "plain"}))
      ->capture_default_str();
  command->add_option("--window", flags->window, "Lines asked at once")
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
  command->add_option("--tenant", flags->question.tenant, "Whom to account the requests to");
  command->add_option("--priority", flags->question.priority, "Of the requests; higher runs first")
      ->check(CLI::Range(-100, 100))
      ->capture_default_str();
  const auto add_seconds = [&](const std::string& name, double& value, const std::string& what) {
    command->add_option(name, value, what)->check(CLI::Range(0.0, 1e7))->capture_default_str();
  };
  add_seconds("--grace", flags->grace_seconds, "Seconds that running lines get to finish after a signal");
  add_seconds("--end-margin", flags->margin_seconds, "Seconds before a Slurm job's end by which all is given up");
  add_seconds("--lock-wait", flags->lock_seconds, "Seconds to wait for another run that writes --output");
  add_seconds("--patience", flags->patience_seconds, "Seconds without any answer from the server until giving up");
  add_seconds("--line-timeout", flags->line_seconds, "Seconds for one attempt at a line");
  command->callback([flags, &action] { action = [flags] { return RunBatch(*flags); }; });
}

}  // namespace rankwise::launch
