#pragma once

#include <atomic>
#include <set>
#include <string>

#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "coordinator/cluster/cluster.h"
#include "coordinator/text/tokenizer.h"
#include "proto/inference.grpc.pb.h"

namespace rankwise::frontend {

class GenerateCall;
class DrainCall;

// The clients' side of the coordinator. There is no thread per request: gRPC's threads check, tokenise, push and write.
class InferenceService final : public rankwise::v1::Inference::CallbackService {
 public:
  // `tokenizer` may be null: then requests bring token ids. Both must outlive the server.
  InferenceService(cluster::Cluster* cluster, const text::Tokenizer* tokenizer, std::string model_name);

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

  // Begins the calls that waited for the first group, and ends what has waited long enough. Called after Cluster::Tick.
  void Tick(absl::Time now);

 private:
  friend class GenerateCall;
  friend class DrainCall;

  std::string FreshRequestId();
  static uint64_t FreshSeed();
  // False when too many wait already.
  bool Wait(GenerateCall* call);
  void StopWaiting(GenerateCall* call);
  absl::Status WaitIsOver(const GenerateCall& call, absl::Time now) const;

  cluster::Cluster* const cluster_;
  const text::Tokenizer* const tokenizer_;
  const std::string model_name_;
  const uint64_t id_base_;  // differs from one start of the coordinator to the next
  std::atomic<uint64_t> next_id_{1};

  absl::Mutex mutex_;
  std::set<GenerateCall*> waiting_ ABSL_GUARDED_BY(mutex_);  // for the first group
  std::set<DrainCall*> drains_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace rankwise::frontend
