#pragma once

#include "coordinator/cluster/cluster.h"
#include "proto/worker.grpc.pb.h"

namespace rankwise::frontend {

// The worker groups' side of the coordinator: each Attach is one epoch of one group.
class GroupsService final : public worker::v1::Groups::CallbackService {
 public:
  explicit GroupsService(cluster::Cluster* cluster) : cluster_(cluster) {}

  grpc::ServerBidiReactor<worker::v1::FromGroup, worker::v1::ToGroup>* Attach(
      grpc::CallbackServerContext* context) override;

 private:
  cluster::Cluster* const cluster_;
};

}  // namespace rankwise::frontend
