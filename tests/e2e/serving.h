#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/time/time.h"
#include "launch/local_cluster.h"

// Real programs on loopback, and a client of theirs.
namespace rankwise::e2e {

using rankwise::v1::GenerateRequest;

constexpr absl::Duration kPatience =
    absl::Seconds(60);  // a deadline for what takes a second or two, also under a sanitizer

std::string DemoModel();
// A folder of this test program, removed at its end.
const std::string& ScratchFolder();
// The scales of the demo model for `tp` ranks, made by `rankwise calibrate` and `rankwise kv-qparams` on first use.
absl::StatusOr<std::string> DemoScales(int tp);
// What the scales are made of.
absl::StatusOr<std::string> DemoStatistics();

struct ServingOptions {
  std::string model = DemoModel();
  int tp = 1;
  int replicas = 1;
  std::string kv = "f32";
  std::string kv_scales;  // of an int8 format; empty: DemoScales
  std::vector<std::string> worker_flags;
  std::vector<std::string> coordinator_flags;
  bool has_tokens = false;  // the programs that a test starts find the endpoint alone
};
// All groups serve when it returns.
absl::StatusOr<std::unique_ptr<launch::LocalCluster>> Serve(const ServingOptions& options);

struct Reply {
  absl::Status status;
  std::vector<int32_t> ids;  // of all messages, in order
  std::string text;
  std::optional<rankwise::v1::Finish> finish;
  bool has_gap = false;  // token_offset did not go on where the last message ended
  int resumes = 0;       // of a call that is_resuming: attempts after the first
};

struct CallOptions {
  absl::Duration deadline = kPatience;
  // Called after each message; true cancels the call.
  std::function<bool(const Reply&)> should_cancel = [](const Reply&) { return false; };
  bool is_resuming = false;  // goes on where it was when its connection, or the coordinator, is lost
};
// For one sample (n = 1).
Reply Generate(rankwise::v1::Inference::Stub& stub, const GenerateRequest& request, const CallOptions& options = {});

// Generate on a thread of its own, because only the thread that started a cluster may supervise it. Borrows the stub.
// Waits for the call's end before it goes.
class Stream {
 public:
  // `options.should_cancel` is called on that thread.
  Stream(rankwise::v1::Inference::Stub& stub, GenerateRequest request, CallOptions options = {});
  ~Stream();
  size_t received() const { return received_; }  // tokens so far
  bool is_finished() const { return is_finished_; }
  Reply Join();  // once

 private:
  Reply reply_;
  std::atomic<size_t> received_ = 0;
  std::atomic<bool> is_finished_ = false;
  std::thread thread_;
};

GenerateRequest Greedy(const std::string& text, uint32_t max_tokens);
GenerateRequest Sampled(const std::string& text, uint32_t max_tokens, uint64_t seed);

absl::StatusOr<rankwise::v1::GetLoadResponse> Load(rankwise::v1::Inference::Stub& stub);
// Waits until no group holds a request or a block; DeadlineExceeded with the load when that never comes.
absl::Status WaitIdle(rankwise::v1::Inference::Stub& stub, absl::Duration patience = kPatience);

// Supervises until `condition`; false when that takes too long, or supervision fails.
bool SuperviseUntil(launch::LocalCluster& cluster, const std::function<bool()>& condition,
                    absl::Duration patience = kPatience);
// Of all groups, in order.
std::vector<int64_t> RankPids(rankwise::v1::Inference::Stub& stub);

// Runs a command line to its end.
struct Output {
  int code;          // -1: it was killed
  std::string text;  // of stdout and stderr, without white space at its end
};
Output Shell(const std::string& command);

// Runs a sibling program to its end.
struct Ended {
  launch::ExitState state;
  std::string log;
};
absl::StatusOr<Ended> RunProgram(const std::string& name, const std::vector<std::string>& arguments);

bool IsRunning(int64_t pid);

}  // namespace rankwise::e2e
