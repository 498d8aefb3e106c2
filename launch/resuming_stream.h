#pragma once

#include <grpcpp/grpcpp.h>

#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "proto/inference.grpc.pb.h"

namespace rankwise::launch {

struct ResumeOptions {
  absl::Time deadline = absl::InfiniteFuture();
  // How long the coordinator goes on while this client is cut off from it.
  absl::Duration linger = absl::Seconds(60);
  // Between attempts, unless the coordinator names a delay; doubles up to kLongestPause.
  absl::Duration first_pause = absl::Milliseconds(100);
  // Also wait for a coordinator that is full. Else its refusal is final.
  bool waits_for_room = false;
  // Called before each pause with the reason; false gives up.
  std::function<bool(const absl::Status&)> may_retry = [](const absl::Status&) { return true; };
};

// A Generate call that goes on where it was when its connection, or the coordinator, is lost: each token comes once and
// in order. The request gets an id and a seed when it has none. One thread.
class ResumingStream {
 public:
  static constexpr absl::Duration kLongestPause = absl::Seconds(2);

  // Borrows the stub.
  ResumingStream(rankwise::v1::Inference::Stub& stub, rankwise::v1::GenerateRequest request, ResumeOptions options);

  // False at the end: Finish() tells which.
  bool Read(rankwise::v1::GenerateResponse* piece);
  // OK when all samples have ended. Else the last attempt's error.
  absl::Status Finish();

  // Ends the stream and, since a lost client is no cancel here, the request. Any thread.
  void Cancel();

  const std::string& request_id() const { return request_.request_id(); }
  int resumes() const { return resumes_; }

 private:
  void Dial();
  bool IsOver() const;
  // The attempt has failed: true when there is to be another one.
  bool Retry(const grpc::Status& status);
  void Note(const rankwise::v1::GenerateResponse& piece);

  rankwise::v1::Inference::Stub& stub_;
  rankwise::v1::GenerateRequest request_;
  const ResumeOptions options_;
  std::vector<bool> has_finished_;  // [n]
  absl::Duration pause_;
  int resumes_ = 0;
  absl::Status ended_;
  bool has_ended_ = false;

  std::mutex mutex_;
  std::unique_ptr<grpc::ClientContext> context_;  // guarded by mutex_, for Cancel
  bool is_cancelled_ = false;                     // guarded by mutex_
  std::unique_ptr<grpc::ClientReader<rankwise::v1::GenerateResponse>> reader_;
};

// The delay that a status' google.rpc.RetryInfo names; zero when it has none.
absl::Duration RetryDelayOf(const grpc::Status& status);

}  // namespace rankwise::launch
