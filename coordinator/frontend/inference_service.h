#pragma once

#include <atomic>
#include <memory>
#include <set>
#include <string>

#include "absl/container/flat_hash_map.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "coordinator/cluster/cluster.h"
#include "coordinator/text/tokenizer.h"
#include "proto/inference.grpc.pb.h"

namespace rankwise::frontend {

class GenerateCall;
class DrainCall;

// The clients' side of the coordinator. Reactions of gRPC's threads only push and write; there is no thread per request.
class InferenceService final : public rankwise::v1::Inference::CallbackService {
 public:
  // `tokenizer` may be null: then requests bring token ids.
  InferenceService(cluster::Cluster* cluster, const text::Tokenizer* tokenizer, std::string model_name);
  ~InferenceService() override;

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

  // Completes the Drain calls whose wait is over. Called by the coordinator's ticker.
  void Tick();

 private:
  friend class GenerateCall;
  friend class DrainCall;

  std::string FreshRequestId();

  cluster::Cluster* const cluster_;
  const text::Tokenizer* const tokenizer_;
  const std::string model_name_;
  const uint64_t id_base_;  // differs from one start of the coordinator to the next
  std::atomic<uint64_t> next_id_{1};

  absl::Mutex mutex_;
  // By request id, while the call lives; sequence numbers of its samples.
  absl::flat_hash_map<std::string, std::vector<uint64_t>> live_ ABSL_GUARDED_BY(mutex_);
  std::set<DrainCall*> drains_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace rankwise::frontend
