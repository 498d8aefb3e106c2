#include "tests/e2e/serving.h"

#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <map>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/mapped_file.h"
#include "base/program_folder.h"
#include "base/status_macros.h"
#include "launch/client.h"
#include "launch/resuming_stream.h"

namespace rankwise::e2e {
namespace {

absl::Status RunOrFail(const std::string& name, const std::vector<std::string>& arguments) {
  RW_ASSIGN_OR_RETURN(const Ended ended, RunProgram(name, arguments));
  if (ended.state.is_success()) return absl::OkStatus();
  return absl::InternalError(absl::StrCat(name, " ", arguments[0], ": ", ended.state.ToString(), "\n", ended.log));
}

}  // namespace

std::string DemoModel() { return RANKWISE_SOURCE_DIR "/launch/demo_model"; }

const std::string& ScratchFolder() {
  static const launch::PrivateFolder folder = [] {
    auto made = launch::PrivateFolder::Create(launch::TemporaryParent());
    RW_CHECK(made.ok(), made.status().ToString());
    return *std::move(made);
  }();
  return folder.path();
}

absl::StatusOr<std::string> DemoStatistics() {
  const std::string work = absl::StrCat(ScratchFolder(), "/work"), file = work + "/kv_statistics.safetensors";
  if (!std::filesystem::exists(file)) {
    RW_RETURN_IF_ERROR(RunOrFail(
        "rankwise", {"calibrate", DemoModel(), "--calib-dataset", absl::StrCat(DemoModel(), "/calibration_sample.txt"),
                     "--calib-samples", "16", "--calib-seqlen", "256", "--work-dir", work}));
  }
  return file;
}

absl::StatusOr<std::string> DemoScales(int tp) {
  static auto& made = *new std::map<int, std::string>;
  if (const auto found = made.find(tp); found != made.end()) return found->second;
  RW_ASSIGN_OR_RETURN(const std::string statistics, DemoStatistics());
  const std::string work = absl::StrCat(ScratchFolder(), "/work"),
                    scales = absl::StrCat(ScratchFolder(), "/scales-", tp);
  RW_RETURN_IF_ERROR(RunOrFail("rankwise", {"kv-qparams", work, scales, "--num-tp", absl::StrCat(tp)}));
  return made[tp] = scales;
}

absl::StatusOr<std::unique_ptr<launch::LocalCluster>> Serve(const ServingOptions& options) {
  static int count = 0;
  launch::ClusterOptions cluster{.model = options.model, .tp = options.tp, .replicas = options.replicas};
  cluster.log_folder = absl::StrCat(ScratchFolder(), "/logs-", count++);
  std::filesystem::create_directories(cluster.log_folder);
  cluster.start_timeout = kPatience;
  cluster.has_tokens = options.has_tokens;
  cluster.coordinator_flags = options.coordinator_flags;
  cluster.worker_flags = {"--device", "cpu", "--threads", "1", "--kv", options.kv};
  if (absl::StartsWith(options.kv, "int8")) {
    std::string scales = options.kv_scales;
    if (scales.empty()) {
      RW_ASSIGN_OR_RETURN(scales, DemoScales(options.tp));
    }
    cluster.worker_flags.insert(cluster.worker_flags.end(), {"--kv-scales", scales});
  }
  cluster.worker_flags.insert(cluster.worker_flags.end(), options.worker_flags.begin(), options.worker_flags.end());
  RW_ASSIGN_OR_RETURN(auto started, launch::LocalCluster::Start(cluster));
  RW_RETURN_IF_ERROR(started->WaitServing(options.replicas, absl::Now() + kPatience));
  return started;
}

namespace {

void Add(const rankwise::v1::GenerateResponse& piece, Reply& reply) {
  reply.has_gap = reply.has_gap || (piece.token_ids_size() > 0 && piece.token_offset() != reply.ids.size());
  reply.ids.insert(reply.ids.end(), piece.token_ids().begin(), piece.token_ids().end());
  reply.text += piece.text();
  if (piece.has_finish()) reply.finish = piece.finish();
}

Reply GenerateResuming(rankwise::v1::Inference::Stub& stub, const GenerateRequest& request,
                       const CallOptions& options) {
  Reply reply;
  launch::ResumingStream stream(stub, request, {.deadline = absl::Now() + options.deadline});
  for (rankwise::v1::GenerateResponse piece; stream.Read(&piece);) {
    Add(piece, reply);
    if (options.should_cancel(reply)) stream.Cancel();
  }
  reply.status = stream.Finish();
  reply.resumes = stream.resumes();
  return reply;
}

}  // namespace

Reply Generate(rankwise::v1::Inference::Stub& stub, const GenerateRequest& request, const CallOptions& options) {
  if (options.is_resuming) return GenerateResuming(stub, request, options);
  Reply reply;
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(absl::Now() + options.deadline));
  const auto reader = stub.Generate(&context, request);
  for (rankwise::v1::GenerateResponse piece; reader->Read(&piece);) {
    Add(piece, reply);
    if (options.should_cancel(reply)) context.TryCancel();
  }
  reply.status = launch::FromGrpc(reader->Finish());
  return reply;
}

Stream::Stream(rankwise::v1::Inference::Stub& stub, GenerateRequest request, CallOptions options)
    : thread_([this, &stub, request = std::move(request), options = std::move(options)]() mutable {
        options.should_cancel = [this, asked = std::move(options.should_cancel)](const Reply& reply) {
          received_ = reply.ids.size();
          return asked(reply);
        };
        reply_ = Generate(stub, request, options);
        is_finished_ = true;
      }) {}

Stream::~Stream() {
  if (thread_.joinable()) thread_.join();
}

Reply Stream::Join() {
  thread_.join();
  return reply_;
}

GenerateRequest Greedy(const std::string& text, uint32_t max_tokens) {
  GenerateRequest request;
  request.set_text(text);
  request.mutable_sampling()->set_max_tokens(max_tokens);
  request.mutable_sampling()->set_temperature(0);
  return request;
}

GenerateRequest Sampled(const std::string& text, uint32_t max_tokens, uint64_t seed) {
  GenerateRequest request;
  request.set_text(text);
  request.mutable_sampling()->set_max_tokens(max_tokens);
  request.mutable_sampling()->set_seed(seed);
  return request;
}

absl::StatusOr<rankwise::v1::GetLoadResponse> Load(rankwise::v1::Inference::Stub& stub) {
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(10)));
  rankwise::v1::GetLoadResponse load;
  RW_RETURN_IF_ERROR(launch::FromGrpc(stub.GetLoad(&context, {}, &load)));
  return load;
}

absl::Status WaitIdle(rankwise::v1::Inference::Stub& stub, absl::Duration patience) {
  const absl::Time deadline = absl::Now() + patience;
  for (;;) {
    RW_ASSIGN_OR_RETURN(const auto load, Load(stub));
    bool is_idle = load.live() == 0 && load.groups_size() > 0;
    for (const auto& group : load.groups())
      is_idle = is_idle && group.running() == 0 && group.waiting() == 0 && group.blocks_free() == group.blocks_total();
    if (is_idle) return absl::OkStatus();
    if (absl::Now() > deadline) return absl::DeadlineExceededError(load.ShortDebugString());
    absl::SleepFor(absl::Milliseconds(20));
  }
}

bool SuperviseUntil(launch::LocalCluster& cluster, const std::function<bool()>& condition, absl::Duration patience) {
  for (const absl::Time deadline = absl::Now() + patience; !condition();) {
    if (absl::Now() > deadline) return false;
    const absl::Status status = cluster.Supervise(absl::Now() + absl::Milliseconds(5));
    EXPECT_TRUE(status.ok()) << status;
    if (!status.ok()) return false;
  }
  return true;
}

std::vector<int64_t> RankPids(rankwise::v1::Inference::Stub& stub) {
  std::vector<int64_t> pids;
  const auto load = Load(stub);
  EXPECT_TRUE(load.ok()) << load.status();
  if (load.ok())
    for (const auto& group : load->groups())
      for (const auto& rank : group.ranks()) pids.push_back(static_cast<int64_t>(rank.pid()));
  return pids;
}

Output Shell(const std::string& command) {
  FILE* pipe = popen(absl::StrCat("{ ", command, "; } 2>&1").c_str(), "r");
  std::string text;
  char buffer[4096];
  for (size_t n; (n = fread(buffer, 1, sizeof buffer, pipe)) > 0;) text.append(buffer, n);
  const int status = pclose(pipe);
  absl::StripTrailingAsciiWhitespace(&text);
  return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, text};
}

absl::StatusOr<Ended> RunProgram(const std::string& name, const std::vector<std::string>& arguments) {
  static int count = 0;
  launch::ChildOptions options;
  options.command = {absl::StrCat(ProgramFolder(), "/", name)};
  options.command.insert(options.command.end(), arguments.begin(), arguments.end());
  options.environment = {"OMPI_ALLOW_RUN_AS_ROOT=1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"};
  options.log_path = absl::StrCat(ScratchFolder(), "/", name, "-", count++, ".log");
  RW_ASSIGN_OR_RETURN(const auto child, launch::ChildProcess::Start(options));
  const auto state = child->Wait(absl::Now() + 2 * kPatience);
  if (!state) return absl::DeadlineExceededError(absl::StrCat(name, " does not end; ", child->LogTail()));
  return Ended{*state, child->LogTail(40)};
}

bool IsRunning(int64_t pid) {
  std::ifstream file(absl::StrCat("/proc/", pid, "/stat"));
  std::string stat;
  // A zombie has ended; whoever started it may be slow to notice.
  return std::getline(file, stat) && !absl::StrContains(stat, ") Z ");
}

}  // namespace rankwise::e2e
