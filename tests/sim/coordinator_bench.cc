// What one coordinator can carry: the real program, simulated worker groups and clients, real gRPC on loopback.

#include <grpcpp/grpcpp.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <atomic>
#include <csignal>
#include <fstream>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "base/mapped_file.h"
#include "base/program_folder.h"
#include "launch/child_process.h"
#include "proto/inference.grpc.pb.h"
#include "tests/sim/simulation.h"
#include "worker/link/coordinator_link.h"

namespace rankwise::sim {
namespace {

constexpr uint32_t kVocabulary = 4096;

struct Flags {
  std::string model = RANKWISE_SOURCE_DIR "/launch/demo_model";
  int groups = 4;
  std::vector<int> streams = {100, 1000, 5000};
  double step_ms = 50;
  double seconds = 10;
  int max_tokens = 200;
  int prompt_tokens = 64;
  bool is_text_off = false;
  std::string journal;
};

// CPU seconds of a process.
double CpuSeconds(pid_t pid) {
  std::ifstream file(absl::StrCat("/proc/", pid, "/stat"));
  std::string stat;
  std::getline(file, stat);
  const std::vector<std::string> fields = absl::StrSplit(stat.substr(stat.rfind(')') + 2), ' ');
  return (std::stod(fields.at(11)) + std::stod(fields.at(12))) / static_cast<double>(sysconf(_SC_CLK_TCK));
}

// One group: a token for each of its sequences every step.
class Group {
 public:
  Group(std::unique_ptr<link::CoordinatorLink> link, absl::Duration step) : link_(std::move(link)), step_(step) {
    thread_ = std::thread([this] { Run(); });
  }
  ~Group() {
    should_end_ = true;
    thread_.join();
  }

 private:
  struct Running {
    uint32_t generated = 0, max_tokens = 0;
  };

  void Run() {
    std::map<uint64_t, Running> running;
    absl::Time next = absl::Now() + step_;
    while (!should_end_) {
      const auto inbox = link_->Poll(std::max(next - absl::Now(), absl::ZeroDuration()));
      if (!inbox.ok()) return;
      for (const auto& submit : inbox->submits) {
        running[submit.sequence()] = {static_cast<uint32_t>(submit.generated_size()), submit.sampling().max_tokens()};
      }
      for (const uint64_t sequence : inbox->cancels) running.erase(sequence);
      if (absl::Now() < next) continue;
      next += step_;
      worker::v1::Outputs outputs;
      outputs.set_epoch(link_->epoch());
      for (auto at = running.begin(); at != running.end();) {
        worker::v1::SequenceOutput& output = *outputs.add_sequences();
        output.set_sequence(at->first);
        output.set_token_offset(at->second.generated);
        output.add_tokens()->set_id(static_cast<int32_t>(300 + (at->first + at->second.generated) % 3000));
        if (++at->second.generated < at->second.max_tokens) {
          ++at;
          continue;
        }
        output.set_finished(true);
        output.set_reason(rankwise::v1::FINISH_REASON_LENGTH);
        at = running.erase(at);
      }
      if (outputs.sequences_size() > 0) link_->SendOutputs(std::move(outputs));
      link_->SendLoad({});
    }
  }

  const std::unique_ptr<link::CoordinatorLink> link_;
  const absl::Duration step_;
  std::atomic<bool> should_end_ = false;
  std::thread thread_;
};

struct Count {
  std::atomic<int64_t> tokens = 0, messages = 0, finished = 0, failed = 0, open = 0;
  absl::Mutex mutex;
  std::vector<double> first_token_seconds ABSL_GUARDED_BY(mutex);
};

// A client that asks again and again, one stream at a time; deletes itself when it may stop.
class Client final : public grpc::ClientReadReactor<rankwise::v1::GenerateResponse> {
 public:
  Client(rankwise::v1::Inference::Stub& stub, const Flags& flags, Count& count, const std::atomic<bool>& should_stop)
      : stub_(stub), flags_(flags), count_(count), should_stop_(should_stop) {
    for (int i = 0; i < flags.prompt_tokens; ++i) request_.mutable_token_ids()->add_ids(300 + i);
    request_.mutable_sampling()->set_max_tokens(static_cast<uint32_t>(flags.max_tokens));
    request_.mutable_sampling()->set_temperature(0);
    if (!flags.journal.empty()) {
      request_.set_linger_ms(1000);
      request_.set_request_id(
          absl::StrCat("c", reinterpret_cast<uintptr_t>(this), "-", absl::ToUnixNanos(absl::Now())));
    }
    ++count_.open;
    stub_.async()->Generate(&context_, &request_, this);
    began_ = absl::Now();
    StartRead(&piece_);
    StartCall();
  }

  void OnReadDone(bool ok) override {
    if (!ok) return;
    if (tokens_ == 0 && piece_.token_ids_size() > 0) {
      absl::MutexLock lock(&count_.mutex);
      count_.first_token_seconds.push_back(absl::ToDoubleSeconds(absl::Now() - began_));
    }
    tokens_ += piece_.token_ids_size();
    count_.tokens += piece_.token_ids_size();
    ++count_.messages;
    StartRead(&piece_);
  }
  void OnDone(const grpc::Status& status) override {
    ++(status.ok() ? count_.finished : count_.failed);
    if (!should_stop_) new Client(stub_, flags_, count_, should_stop_);
    --count_.open;
    delete this;
  }

 private:
  rankwise::v1::Inference::Stub& stub_;
  const Flags& flags_;
  Count& count_;
  const std::atomic<bool>& should_stop_;
  grpc::ClientContext context_;
  rankwise::v1::GenerateRequest request_;
  rankwise::v1::GenerateResponse piece_;
  absl::Time began_;
  int64_t tokens_ = 0;
};

void Measure(const Flags& flags, int streams, const std::string& endpoint, pid_t coordinator) {
  std::vector<std::unique_ptr<rankwise::v1::Inference::Stub>> stubs;
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  for (int i = 0; i < 16; ++i) {
    stubs.push_back(rankwise::v1::Inference::NewStub(
        grpc::CreateCustomChannel(endpoint, grpc::InsecureChannelCredentials(), arguments)));
  }
  Count count;
  std::atomic<bool> should_stop = false;
  for (int i = 0; i < streams; ++i)
    new Client(*stubs[static_cast<size_t>(i) % stubs.size()], flags, count, should_stop);
  absl::SleepFor(absl::Seconds(2));  // all are under way
  const int64_t tokens_before = count.tokens, messages_before = count.messages;
  const double cpu_before = CpuSeconds(coordinator);
  const absl::Time begin = absl::Now();
  absl::SleepFor(absl::Seconds(flags.seconds));
  const double cpu = CpuSeconds(coordinator) - cpu_before, seconds = absl::ToDoubleSeconds(absl::Now() - begin);
  const auto tokens = static_cast<double>(count.tokens - tokens_before);
  const auto messages = static_cast<double>(count.messages - messages_before);
  should_stop = true;
  while (count.open > 0) absl::SleepFor(absl::Milliseconds(10));
  absl::MutexLock lock(&count.mutex);
  absl::PrintF("%7d  %9.0f  %9.0f  %6.2f  %12.0f  %8.1f  %9.1f  %9.1f  %6d\n", streams, tokens / seconds,
               messages / seconds, cpu / seconds, tokens / cpu, 1e6 * cpu / tokens,
               1e3 * Quantile(count.first_token_seconds, 0.5), 1e3 * Quantile(count.first_token_seconds, 0.99),
               count.failed.load());
  std::fflush(stdout);
}

absl::Status Main(const Flags& flags) {
  auto folder = launch::PrivateFolder::Create(launch::TemporaryParent());
  if (!folder.ok()) return folder.status();
  const std::string endpoint_file = folder->path() + "/endpoint",
                    model = flags.is_text_off ? folder->path() : flags.model;
  launch::ChildOptions options{.command = {ProgramFolder() + "/rankwise-coordinator", "--model", model,
                                           "--endpoint-file", endpoint_file, "--max-live", "1000000",
                                           "--max-live-tokens", "1000000000", "--log-level", "warn"}};
  if (!flags.journal.empty()) options.command.insert(options.command.end(), {"--journal", flags.journal});
  auto coordinator = launch::ChildProcess::Start(options);
  if (!coordinator.ok()) return coordinator.status();
  while (access(endpoint_file.c_str(), R_OK) != 0) {
    if ((*coordinator)->Wait(absl::Now() + absl::Milliseconds(20))) return absl::InternalError("no coordinator");
  }
  auto endpoint = ReadTextFile(endpoint_file);
  if (!endpoint.ok()) return endpoint.status();
  absl::StripAsciiWhitespace(&*endpoint);
  worker::v1::Join join;
  join.mutable_model()->set_fingerprint("bench");
  join.mutable_model()->set_vocab_size(kVocabulary);
  join.mutable_model()->set_max_tokens(1 << 16);
  join.set_max_running(1 << 16);
  join.set_max_waiting(1 << 16);
  join.set_max_step_seconds(60);
  std::vector<std::unique_ptr<Group>> groups;
  for (int i = 0; i < flags.groups; ++i) {
    auto link =
        link::CoordinatorLink::Connect({.address = *endpoint, .heartbeat_interval = absl::Milliseconds(500)}, join);
    if (!link.ok()) return link.status();
    groups.push_back(std::make_unique<Group>(*std::move(link), absl::Milliseconds(flags.step_ms)));
  }
  absl::PrintF("%d groups, a step each %.0f ms, %d tokens a request%s%s\n", flags.groups, flags.step_ms,
               flags.max_tokens, flags.is_text_off ? ", no text" : "", flags.journal.empty() ? "" : ", journal");
  std::printf("streams   tokens/s  messages/s   cores  tokens/core-s  us/token  TTFT p50 ms   p99 ms  failed\n");
  for (const int streams : flags.streams) Measure(flags, streams, *endpoint, (*coordinator)->pid());
  groups.clear();
  (*coordinator)->Signal(SIGTERM);
  (*coordinator)->Wait(absl::Now() + absl::Seconds(40));
  return absl::OkStatus();
}

}  // namespace
}  // namespace rankwise::sim

int main(int argc, char** argv) {
  CLI::App app("rankwise-coordinator-bench: tokens and streams that one coordinator carries");
  rankwise::sim::Flags flags;
  app.add_option("--model", flags.model, "Whose tokenizer makes the text")->capture_default_str();
  app.add_option("--groups", flags.groups)->capture_default_str()->check(CLI::Range(1, 1024));
  app.add_option("--streams", flags.streams, "Concurrent streams; one line of output for each")->capture_default_str();
  app.add_option("--step-ms", flags.step_ms, "Between the tokens of a stream")->capture_default_str();
  app.add_option("--seconds", flags.seconds, "Of measurement")->capture_default_str();
  app.add_option("--max-tokens", flags.max_tokens)->capture_default_str();
  app.add_option("--prompt-tokens", flags.prompt_tokens)->capture_default_str();
  app.add_flag("--no-text", flags.is_text_off, "Token ids alone: no tokenizer");
  app.add_option("--journal", flags.journal, "With a journal in this folder, which every request is written to");
  CLI11_PARSE(app, argc, argv);
  const absl::Status status = rankwise::sim::Main(flags);
  if (!status.ok()) std::fprintf(stderr, "%s\n", status.ToString().c_str());
  return status.ok() ? 0 : 1;
}
