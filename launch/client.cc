#include "launch/client.h"

#include <cstdlib>

#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "base/mapped_file.h"
#include "base/status_macros.h"

namespace rankwise::launch {

void AddEndpointFlags(CLI::App& command, EndpointFlags& flags) {
  auto* endpoint =
      command.add_option("--endpoint", flags.endpoint, "HOST:PORT of the coordinator; else $RANKWISE_ENDPOINT");
  command.add_option("--endpoint-file", flags.endpoint_file, "File that holds HOST:PORT")->excludes(endpoint);
}

absl::StatusOr<std::string> ResolveEndpoint(const EndpointFlags& flags) {
  if (!flags.endpoint.empty()) return flags.endpoint;
  if (!flags.endpoint_file.empty()) {
    RW_ASSIGN_OR_RETURN(const std::string text, ReadTextFile(flags.endpoint_file, 4096));
    return std::string(absl::StripAsciiWhitespace(text));
  }
  if (const char* endpoint = std::getenv("RANKWISE_ENDPOINT"); endpoint != nullptr && *endpoint != '\0')
    return endpoint;
  return absl::InvalidArgumentError(
      "which coordinator? Give --endpoint HOST:PORT, --endpoint-file FILE or $RANKWISE_ENDPOINT");
}

std::unique_ptr<rankwise::v1::Inference::Stub> ConnectTo(const std::string& endpoint) {
  return rankwise::v1::Inference::NewStub(grpc::CreateChannel(endpoint, grpc::InsecureChannelCredentials()));
}

absl::Status FromGrpc(const grpc::Status& status) {
  // The codes are the same by definition.
  return absl::Status(static_cast<absl::StatusCode>(status.error_code()), status.error_message());
}

}  // namespace rankwise::launch
