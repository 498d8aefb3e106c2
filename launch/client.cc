#include "launch/client.h"

#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "base/mapped_file.h"
#include "base/status_macros.h"

namespace rankwise::launch {

void AddEndpointFlags(CLI::App& command, EndpointFlags& flags) {
  auto* endpoint =
      command.add_option("--endpoint", flags.endpoint, "HOST:PORT of the coordinator; else $RANKWISE_ENDPOINT");
  command.add_option("--endpoint-file", flags.endpoint_file, "File that holds HOST:PORT")->excludes(endpoint);
  command.add_option("--token-file", flags.credentials.token,
                     "File with the bearer token; else the one that `serve` left, else $RANKWISE_TOKEN_FILE");
  command.add_option(
      "--tls-ca", flags.credentials.tls_ca,
      "PEM certificates that the coordinator's must be signed by; TLS from then on; else $RANKWISE_TLS_CA");
  command.add_option("--tls-cert", flags.credentials.tls_cert, "PEM certificate to show it; else $RANKWISE_TLS_CERT");
  command.add_option("--tls-key", flags.credentials.tls_key, "Its PEM key; else $RANKWISE_TLS_KEY");
}

std::string TokenFileOf(const std::string& endpoint_file) { return endpoint_file + ".token"; }

std::string HomeTokenFileOf(const std::string& endpoint) {
  const char* home = std::getenv("HOME");
  if (home == nullptr || *home == '\0') return "";
  std::string name = endpoint;
  std::replace(name.begin(), name.end(), '/', '_');  // of a socket's path
  return absl::StrCat(home, "/.rankwise/tokens/", name);
}

absl::StatusOr<wire::Credentials> ResolveCredentials(const EndpointFlags& flags, const std::string& endpoint) {
  wire::CredentialFiles files = flags.credentials;
  if (files.token.empty() && !flags.endpoint_file.empty() &&
      access(TokenFileOf(flags.endpoint_file).c_str(), F_OK) == 0)
    files.token = TokenFileOf(flags.endpoint_file);
  for (auto [file, name] :
       {std::pair(&files.token, "RANKWISE_TOKEN_FILE"), std::pair(&files.tls_ca, "RANKWISE_TLS_CA"),
        std::pair(&files.tls_cert, "RANKWISE_TLS_CERT"), std::pair(&files.tls_key, "RANKWISE_TLS_KEY")}) {
    if (const char* value = std::getenv(name); file->empty() && value != nullptr) *file = value;
  }
  if (files.token.empty()) {
    if (const std::string path = HomeTokenFileOf(endpoint); access(path.c_str(), F_OK) == 0) files.token = path;
  }
  return wire::ReadCredentials(files);
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

std::unique_ptr<rankwise::v1::Inference::Stub> ConnectTo(const std::string& endpoint,
                                                         const wire::Credentials& credentials,
                                                         grpc::ChannelArguments arguments) {
  // A coordinator that is started again is back within a second.
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100);
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 100);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 1000);
  return rankwise::v1::Inference::NewStub(wire::MakeChannel(endpoint, credentials, arguments));
}

absl::StatusOr<std::unique_ptr<rankwise::v1::Inference::Stub>> Connect(const EndpointFlags& flags) {
  RW_ASSIGN_OR_RETURN(const std::string endpoint, ResolveEndpoint(flags));
  RW_ASSIGN_OR_RETURN(const wire::Credentials credentials, ResolveCredentials(flags, endpoint));
  return ConnectTo(endpoint, credentials);
}

absl::Status FromGrpc(const grpc::Status& status) {
  // The codes are the same by definition.
  return absl::Status(static_cast<absl::StatusCode>(status.error_code()), status.error_message());
}

}  // namespace rankwise::launch
