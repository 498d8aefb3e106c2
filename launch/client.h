#pragma once

#include <grpcpp/grpcpp.h>

#include <CLI/CLI.hpp>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "proto/credentials.h"
#include "proto/inference.grpc.pb.h"

namespace rankwise::launch {

struct EndpointFlags {
  std::string endpoint;
  std::string endpoint_file;
  wire::CredentialFiles credentials;
};

void AddEndpointFlags(CLI::App& command, EndpointFlags& flags);

// --endpoint, else the content of --endpoint-file, else $RANKWISE_ENDPOINT.
absl::StatusOr<std::string> ResolveEndpoint(const EndpointFlags& flags);

// For a coordinator at `endpoint`: --token-file, else the file that `serve` wrote beside --endpoint-file, else
// $RANKWISE_TOKEN_FILE, else the one that `serve` wrote into our home, else none; the TLS files of the flags, else
// $RANKWISE_TLS_CA, $RANKWISE_TLS_CERT, $RANKWISE_TLS_KEY. Errors of wire::ReadCredentials.
absl::StatusOr<wire::Credentials> ResolveCredentials(const EndpointFlags& flags, const std::string& endpoint);
// Where `serve` leaves the clients' token: beside FILE of --endpoint-file; and in $HOME, which the hosts of a cluster
// share, so that the same user's --endpoint finds it (empty without $HOME).
std::string TokenFileOf(const std::string& endpoint_file);
std::string HomeTokenFileOf(const std::string& endpoint);

std::unique_ptr<rankwise::v1::Inference::Stub> ConnectTo(const std::string& endpoint,
                                                         const wire::Credentials& credentials = {},
                                                         grpc::ChannelArguments arguments = {});
// Endpoint and credentials of the flags.
absl::StatusOr<std::unique_ptr<rankwise::v1::Inference::Stub>> Connect(const EndpointFlags& flags);

absl::Status FromGrpc(const grpc::Status& status);

}  // namespace rankwise::launch
