#include "proto/credentials.h"

#include <grpcpp/support/client_interceptor.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <utility>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "base/check.h"
#include "base/mapped_file.h"
#include "base/status_macros.h"

namespace rankwise::wire {
namespace {

constexpr char kHeader[] = "authorization";
constexpr char kScheme[] = "Bearer ";
constexpr size_t kLeastTokenBytes = 16;
constexpr int64_t kMaxFileBytes = 1 << 20;

absl::StatusOr<std::string> ReadOptional(const std::string& path) {
  if (path.empty()) return std::string();
  return ReadTextFile(path, kMaxFileBytes);
}

absl::StatusOr<std::string> ReadToken(const std::string& path) {
  RW_ASSIGN_OR_RETURN(const std::string text, ReadOptional(path));
  const std::string token(absl::StripAsciiWhitespace(text));
  if (path.empty()) return token;
  struct stat info {};
  if (stat(path.c_str(), &info) == 0 && (info.st_mode & (S_IRWXG | S_IRWXO)) != 0) {
    return absl::FailedPreconditionError(
        absl::StrCat("the token file ", path, " can be read by others than its owner: chmod 600"));
  }
  if (token.size() < kLeastTokenBytes) {
    return absl::FailedPreconditionError(
        absl::StrCat("the token in ", path, " has ", token.size(), " bytes; it needs at least ", kLeastTokenBytes));
  }
  return token;
}

// Adds the token to the metadata that a call begins with.
class TokenInterceptor final : public grpc::experimental::Interceptor {
 public:
  explicit TokenInterceptor(const std::string& value) : value_(value) {}
  void Intercept(grpc::experimental::InterceptorBatchMethods* methods) override {
    if (methods->QueryInterceptionHookPoint(grpc::experimental::InterceptionHookPoints::PRE_SEND_INITIAL_METADATA)) {
      methods->GetSendInitialMetadata()->emplace(kHeader, value_);
    }
    methods->Proceed();
  }

 private:
  const std::string value_;
};

class TokenInterceptors final : public grpc::experimental::ClientInterceptorFactoryInterface {
 public:
  explicit TokenInterceptors(const std::string& token) : value_(kScheme + token) {}
  grpc::experimental::Interceptor* CreateClientInterceptor(grpc::experimental::ClientRpcInfo*) override {
    return new TokenInterceptor(value_);
  }

 private:
  const std::string value_;
};

}  // namespace

absl::StatusOr<Credentials> ReadCredentials(const CredentialFiles& files) {
  Credentials credentials;
  RW_ASSIGN_OR_RETURN(credentials.token, ReadToken(files.token));
  RW_ASSIGN_OR_RETURN(credentials.ca, ReadOptional(files.tls_ca));
  RW_ASSIGN_OR_RETURN(credentials.cert, ReadOptional(files.tls_cert));
  RW_ASSIGN_OR_RETURN(credentials.key, ReadOptional(files.tls_key));
  if (credentials.cert.empty() != credentials.key.empty()) {
    return absl::FailedPreconditionError("a TLS certificate needs its key, and a key its certificate");
  }
  return credentials;
}

std::string FreshToken() {
  std::string bytes(32, '\0');
  RW_CHECK(getrandom(bytes.data(), bytes.size(), 0) == static_cast<ssize_t>(bytes.size()));
  return absl::BytesToHexString(bytes);
}

absl::Status WriteToken(const std::string& path, const std::string& token) {
  return WriteFileAtomically(path, token + "\n", 0600);
}

std::shared_ptr<grpc::ServerCredentials> ServerCredentials(const Credentials& credentials) {
  if (credentials.cert.empty()) return grpc::InsecureServerCredentials();
  grpc::SslServerCredentialsOptions options(credentials.ca.empty()
                                                ? GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE
                                                : GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY);
  options.pem_key_cert_pairs.push_back({credentials.key, credentials.cert});
  options.pem_root_certs = credentials.ca;
  return grpc::SslServerCredentials(options);
}

std::shared_ptr<grpc::Channel> MakeChannel(const std::string& target, const Credentials& credentials,
                                           const grpc::ChannelArguments& arguments) {
  const auto transport = credentials.ca.empty() ? grpc::InsecureChannelCredentials()
                                                : grpc::SslCredentials({.pem_root_certs = credentials.ca,
                                                                        .pem_private_key = credentials.key,
                                                                        .pem_cert_chain = credentials.cert});
  std::vector<std::unique_ptr<grpc::experimental::ClientInterceptorFactoryInterface>> interceptors;
  if (!credentials.token.empty()) interceptors.push_back(std::make_unique<TokenInterceptors>(credentials.token));
  return grpc::experimental::CreateCustomChannelWithInterceptors(target, transport, arguments, std::move(interceptors));
}

absl::Status CheckToken(const std::multimap<grpc::string_ref, grpc::string_ref>& metadata, const std::string& token) {
  if (token.empty()) return absl::OkStatus();
  const std::string expected = kScheme + token;
  const auto [first, last] = metadata.equal_range(kHeader);
  if (first == last) return absl::UnauthenticatedError("this call needs the metadata \"authorization: Bearer TOKEN\"");
  // More than one is nobody's honest client.
  unsigned difference = std::next(first) != last || first->second.size() != expected.size();
  for (size_t i = 0; i < expected.size() && first->second.size() == expected.size(); ++i) {
    difference |= static_cast<unsigned char>(first->second.data()[i]) ^ static_cast<unsigned char>(expected[i]);
  }
  return difference == 0 ? absl::OkStatus() : absl::UnauthenticatedError("the bearer token is not the right one");
}

}  // namespace rankwise::wire
