#pragma once

#include <string>
#include <utility>

#include "coordinator/cluster/cluster.h"
#include "proto/worker.grpc.pb.h"

namespace rankwise::frontend {

// The worker groups' side of the coordinator: each Attach is one epoch of one group.
class GroupsService final : public worker::v1::Groups::CallbackService {
 public:
  // Every call must bring `token`; empty: none.
  GroupsService(cluster::Cluster* cluster, std::string token) : cluster_(cluster), token_(std::move(token)) {}

  grpc::ServerBidiReactor<worker::v1::FromGroup, worker::v1::ToGroup>* Attach(
      grpc::CallbackServerContext* context) override;

 private:
  cluster::Cluster* const cluster_;
  const std::string token_;
};

}  // namespace rankwise::frontend
