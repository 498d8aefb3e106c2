#pragma once

#include <grpcpp/grpcpp.h>

#include <CLI/CLI.hpp>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "proto/inference.grpc.pb.h"

namespace rankwise::launch {

struct EndpointFlags {
  std::string endpoint;
  std::string endpoint_file;
};

void AddEndpointFlags(CLI::App& command, EndpointFlags& flags);

// --endpoint, else the content of --endpoint-file, else $RANKWISE_ENDPOINT.
absl::StatusOr<std::string> ResolveEndpoint(const EndpointFlags& flags);

std::unique_ptr<rankwise::v1::Inference::Stub> ConnectTo(const std::string& endpoint);

absl::Status FromGrpc(const grpc::Status& status);

}  // namespace rankwise::launch
