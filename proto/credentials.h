#pragma once

#include <grpcpp/grpcpp.h>

#include <map>
#include <memory>
#include <string>

#include "absl/status/statusor.h"

// What the two ends of a connection show each other: a bearer token for every call, certificates for the connection.
namespace rankwise::wire {

// Paths; an empty one is absent.
struct CredentialFiles {
  std::string token;     // readable by its owner alone
  std::string tls_ca;    // certificates that the other end's must be signed by
  std::string tls_cert;  // our own, with its key
  std::string tls_key;
};

// Contents; an empty one is absent. A client uses TLS when it has `ca`, a server when it has `cert`, and asks its
// clients for certificates (mutual TLS) when it has `ca` as well.
struct Credentials {
  std::string token;
  std::string ca, cert, key;  // PEM
  bool operator==(const Credentials&) const = default;
};

// NotFound; FailedPrecondition for a token file that others can read, a token of fewer than 16 bytes, or a certificate
// without its key.
absl::StatusOr<Credentials> ReadCredentials(const CredentialFiles& files);

// 256 random bits, in hexadecimal.
std::string FreshToken();
// Readable by its owner alone, also while it is written.
absl::Status WriteToken(const std::string& path, const std::string& token);

std::shared_ptr<grpc::ServerCredentials> ServerCredentials(const Credentials& credentials);
// Every call on it carries the token. Without TLS the token, as all else, travels readable.
std::shared_ptr<grpc::Channel> MakeChannel(const std::string& target, const Credentials& credentials,
                                           const grpc::ChannelArguments& arguments = {});

// Unauthenticated unless the call's metadata has `token`; OK when `token` is empty. Takes as long for every wrong one.
absl::Status CheckToken(const std::multimap<grpc::string_ref, grpc::string_ref>& metadata, const std::string& token);

}  // namespace rankwise::wire
