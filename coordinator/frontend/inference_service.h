#pragma once

#include <atomic>
#include <deque>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "coordinator/cluster/cluster.h"
#include "coordinator/frontend/kept_streams.h"
#include "coordinator/journal/journal.h"
#include "coordinator/text/tokenizer.h"
#include "proto/inference.grpc.pb.h"

namespace rankwise::frontend {

class GenerateCall;
class DrainCall;

// The clients' side of the coordinator. There is no thread per request: gRPC's threads check, tokenise, push and write.
class InferenceService final : public rankwise::v1::Inference::CallbackService {
 public:
  struct Options {
    const text::Tokenizer* tokenizer = nullptr;  // null: requests bring token ids
    journal::Journal* journal = nullptr;         // null: what lingers ends with this process
    std::string model_name;
    std::string token;  // every call must bring it; empty: none
    size_t max_kept_bytes = size_t{256} << 20;
  };
  // Cluster, tokenizer and journal must outlive the server. What the journal has recovered goes on once a group has
  // joined; until then all calls wait.
  InferenceService(cluster::Cluster* cluster, Options options);

  grpc::ServerWriteReactor<rankwise::v1::GenerateResponse>* Generate(
      grpc::CallbackServerContext* context, const rankwise::v1::GenerateRequest* request) override;
  grpc::ServerUnaryReactor* Tokenize(grpc::CallbackServerContext* context, const rankwise::v1::TokenizeRequest* request,
                                     rankwise::v1::TokenizeResponse* response) override;
  grpc::ServerUnaryReactor* Detokenize(grpc::CallbackServerContext* context,
                                       const rankwise::v1::DetokenizeRequest* request,
                                       rankwise::v1::DetokenizeResponse* response) override;
  grpc::ServerUnaryReactor* GetModelInfo(grpc::CallbackServerContext* context,
                                         const rankwise::v1::GetModelInfoRequest* request,
                                         rankwise::v1::GetModelInfoResponse* response) override;
  grpc::ServerUnaryReactor* GetLoad(grpc::CallbackServerContext* context, const rankwise::v1::GetLoadRequest* request,
                                    rankwise::v1::GetLoadResponse* response) override;
  grpc::ServerUnaryReactor* Abort(grpc::CallbackServerContext* context, const rankwise::v1::AbortRequest* request,
                                  rankwise::v1::AbortResponse* response) override;
  grpc::ServerUnaryReactor* Drain(grpc::CallbackServerContext* context, const rankwise::v1::DrainRequest* request,
                                  rankwise::v1::DrainResponse* response) override;

  // Begins what the journal has and the calls that waited for the first group, as much as fits a tick, and ends what
  // has waited long enough. Called after Cluster::Tick.
  void Tick(absl::Time now);

 private:
  friend class GenerateCall;
  friend class DrainCall;

  std::string FreshRequestId();
  static uint64_t FreshSeed();
  absl::Status Authorize(const grpc::CallbackServerContext& context) const;
  // Keeps and journals the stream when it lingers, then submits `request`, whose listener it is.
  absl::Status SubmitStream(const std::shared_ptr<RequestStream>& stream, cluster::Request request,
                            const rankwise::v1::GetModelInfoResponse& model);
  void Restart(journal::JournaledRequest request, const rankwise::v1::GetModelInfoResponse& model, absl::Time now);
  void DropExpired(absl::Time now);
  // False when too many wait already.
  bool Wait(GenerateCall* call);
  void StopWaiting(GenerateCall* call);
  absl::Status WaitIsOver(const GenerateCall& call, absl::Time now) const;

  cluster::Cluster* const cluster_;
  const text::Tokenizer* const tokenizer_;
  journal::Journal* const journal_;
  const std::string model_name_;
  const std::string token_;
  const uint64_t id_base_;  // differs from one start of the coordinator to the next
  std::atomic<uint64_t> next_id_{1};

  KeptStreams kept_;
  absl::Time dropped_ = absl::InfinitePast();  // of Tick: when expired streams were looked for

  std::atomic<bool> has_restarted_ =
      false;  // nothing is recovered_: calls need not wait for the lock, which a tick holds
  absl::Mutex mutex_;
  std::deque<journal::JournaledRequest> recovered_ ABSL_GUARDED_BY(mutex_);  // not yet submitted again
  std::set<GenerateCall*> waiting_ ABSL_GUARDED_BY(mutex_);                  // for the first group
  std::set<DrainCall*> drains_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace rankwise::frontend
