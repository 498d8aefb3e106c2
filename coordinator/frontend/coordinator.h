#pragma once

#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "coordinator/cluster/cluster.h"
#include "coordinator/journal/journal.h"
#include "coordinator/text/tokenizer.h"
#include "proto/credentials.h"

namespace rankwise::frontend {

struct CoordinatorOptions {
  std::string model_name;
  std::string listen = "127.0.0.1:0";  // HOST:PORT for clients; port 0 takes a free one
  std::string worker_listen;           // HOST:PORT for worker groups; empty: they dial `listen` too
  cluster::ClusterOptions cluster;
  // What clients and groups must show, and the coordinator shows them. Reflection is served only without a token:
  // gRPC's own service for it asks for none.
  wire::Credentials client_credentials, worker_credentials;
  journal::JournalOptions journal;  // of requests that linger; no folder, no journal
  size_t max_kept_bytes = size_t{256} << 20;
};

// The whole coordinator in one process: the cluster, its two services with health and reflection, and the clock that
// drives them. States: serving, then draining (no request is admitted), then stopped.
class Coordinator {
 public:
  // `tokenizer` may be null: then requests bring token ids. It must outlive the coordinator. Unavailable when an
  // address cannot be listened on, and what Journal::Open returns.
  static absl::StatusOr<std::unique_ptr<Coordinator>> Start(const CoordinatorOptions& options,
                                                            const text::Tokenizer* tokenizer);
  // Stops at once: live requests fail.
  virtual ~Coordinator() = default;

  // "host:port" with the port that was taken.
  virtual const std::string& endpoint() const = 0;
  virtual const std::string& worker_endpoint() const = 0;
  virtual cluster::Cluster& cluster() = 0;

  // Admits nothing more, waits until no request is live, `timeout` has passed or `should_hurry` says so, fails what is
  // left, and tells the groups to end. What lingers and has a journal is left there for the next coordinator.
  virtual void Drain(absl::Duration timeout, const std::function<bool()>& should_hurry) = 0;
};

}  // namespace rankwise::frontend
