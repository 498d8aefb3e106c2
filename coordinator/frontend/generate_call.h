#pragma once

#include <memory>
#include <string>

#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "coordinator/frontend/request_stream.h"
#include "proto/inference.grpc.pb.h"

namespace rankwise::frontend {

class InferenceService;

// One Generate call, from its arrival to gRPC's last word; deletes itself then. It reads a request's stream, a new one
// or one that it resumes. One write is in flight. Lock order: service, cluster, stream, call: so nothing here calls the
// others with its own lock held.
class GenerateCall final : public grpc::ServerWriteReactor<rankwise::v1::GenerateResponse>, public StreamReader {
 public:
  // `request` lives until OnDone.
  GenerateCall(InferenceService* service, const rankwise::v1::GenerateRequest* request);

  const std::string& request_id() const { return request_id_; }
  absl::Time arrived() const { return arrived_; }

  // Exactly one of them. Begin: a group has joined, so the request can be checked and submitted.
  void Begin(const rankwise::v1::GetModelInfoResponse& model);
  void Refuse(const absl::Status& status);

  void StartWriting(rankwise::v1::GenerateResponse piece) override;
  void EndStream(const absl::Status& status) override;

  void OnWriteDone(bool ok) override;
  void OnCancel() override;
  void OnDone() override;

 private:
  absl::Status Open(const rankwise::v1::GetModelInfoResponse& model);
  absl::Status Resume(const std::shared_ptr<RequestStream>& kept);
  absl::Status Submit(const rankwise::v1::GetModelInfoResponse& model);
  void FinishOnce(const absl::Status& status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  std::shared_ptr<RequestStream> stream();
  void SetStream(std::shared_ptr<RequestStream> stream);
  // The client is gone: so is its request, unless it lingers.
  void Leave();

  InferenceService* const service_;
  const rankwise::v1::GenerateRequest* const request_;
  const std::string request_id_;
  const absl::Time arrived_;

  absl::Mutex mutex_;
  std::shared_ptr<RequestStream> stream_ ABSL_GUARDED_BY(mutex_);  // shared with those that linger
  rankwise::v1::GenerateResponse writing_ ABSL_GUARDED_BY(mutex_);
  bool is_finished_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace rankwise::frontend
