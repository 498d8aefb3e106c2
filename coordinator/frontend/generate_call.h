#pragma once

#include <cstdint>
#include <deque>
#include <string>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "coordinator/cluster/cluster.h"
#include "coordinator/frontend/admission.h"
#include "coordinator/frontend/sample_stream.h"
#include "coordinator/text/tokenizer.h"
#include "proto/inference.grpc.pb.h"

namespace rankwise::frontend {

class InferenceService;

// One Generate stream, from the call to gRPC's last word; deletes itself then. One write is in flight; what comes
// meanwhile waits in the samples. Lock order: service, cluster, call: so nothing here calls the others with its own
// lock held.
class GenerateCall final : public grpc::ServerWriteReactor<rankwise::v1::GenerateResponse>,
                           public cluster::SampleListener {
 public:
  // `request` lives until OnDone.
  GenerateCall(InferenceService* service, const rankwise::v1::GenerateRequest* request);

  const std::string& request_id() const { return request_id_; }
  absl::Time arrived() const { return arrived_; }

  // Exactly one of them. Begin: a group has joined, so the request can be checked and submitted.
  void Begin(const rankwise::v1::GetModelInfoResponse& model);
  void Refuse(const absl::Status& status);

  bool OnOutput(uint32_t sample, const worker::v1::SequenceOutput& output, uint32_t replays) override;
  void OnEnd(uint32_t sample, cluster::Ending ending, uint32_t replays) override;
  void OnFailed(const absl::Status& status) override;

  void OnWriteDone(bool ok) override;
  void OnCancel() override;
  void OnDone() override;

 private:
  absl::Status Submit(const rankwise::v1::GetModelInfoResponse& model);
  absl::Status MakeStreams(const Admission& admission);
  void Ready(uint32_t sample) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void WriteNext() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void FinishOnce(const absl::Status& status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void ForgetRequest();

  InferenceService* const service_;
  const rankwise::v1::GenerateRequest* const request_;
  const std::string request_id_;
  const absl::Time arrived_;

  absl::Mutex mutex_;
  cluster::RequestKey key_ ABSL_GUARDED_BY(mutex_){};  // 0 before it is submitted
  std::vector<SampleStream> samples_ ABSL_GUARDED_BY(mutex_);
  std::deque<uint32_t> ready_ ABSL_GUARDED_BY(mutex_);  // samples with a piece, each once, in turn
  std::vector<bool> is_ready_ ABSL_GUARDED_BY(mutex_);
  size_t unfinished_ ABSL_GUARDED_BY(mutex_) = 0;
  absl::Status ending_ ABSL_GUARDED_BY(mutex_);  // once nothing is unfinished and all is written
  rankwise::v1::GenerateResponse writing_ ABSL_GUARDED_BY(mutex_);
  bool is_writing_ ABSL_GUARDED_BY(mutex_) = false;
  bool is_finished_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace rankwise::frontend
