// Who may call what: every RPC of both services, with the right token, a wrong one and none; TLS and mutual TLS.

#include "proto/credentials.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "absl/strings/str_cat.h"
#include "base/mapped_file.h"
#include "coordinator/frontend/coordinator.h"
#include "coordinator/frontend/test_support.h"
#include "proto/health.grpc.pb.h"
#include "proto/worker.grpc.pb.h"

namespace rankwise::frontend {
namespace {

using ::testing::HasSubstr;

// The codes of one call to each RPC, by name.
std::map<std::string, grpc::StatusCode> CallAll(const std::shared_ptr<grpc::Channel>& channel) {
  namespace api = rankwise::v1;
  const auto stub = api::Inference::NewStub(channel);
  std::map<std::string, grpc::StatusCode> codes;
  const auto unary = [&](const char* name, auto method, auto request, auto response) {
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(5)));
    codes[name] = (stub.get()->*method)(&context, request, &response).error_code();
  };
  using Stub = api::Inference::Stub;
  unary("Tokenize", &Stub::Tokenize, api::TokenizeRequest(), api::TokenizeResponse());
  unary("Detokenize", &Stub::Detokenize, api::DetokenizeRequest(), api::DetokenizeResponse());
  unary("GetModelInfo", &Stub::GetModelInfo, api::GetModelInfoRequest(), api::GetModelInfoResponse());
  unary("GetLoad", &Stub::GetLoad, api::GetLoadRequest(), api::GetLoadResponse());
  unary("Abort", &Stub::Abort, api::AbortRequest(), api::AbortResponse());
  {
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Milliseconds(500)));
    api::GenerateRequest request;
    request.mutable_token_ids()->add_ids(1);
    request.mutable_sampling()->set_max_tokens(1);
    const auto reader = stub->Generate(&context, request);
    api::GenerateResponse piece;
    while (reader->Read(&piece)) continue;
    codes["Generate"] = reader->Finish().error_code();
  }
  {
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(5)));
    const auto stream = worker::v1::Groups::NewStub(channel)->Attach(&context);
    stream->WritesDone();
    worker::v1::ToGroup message;
    while (stream->Read(&message)) continue;
    codes["Attach"] = stream->Finish().error_code();
  }
  // Last, for it drains. Every method of the service is in the list.
  unary("Drain", &Stub::Drain, api::DrainRequest(), api::DrainResponse());
  EXPECT_EQ(codes.size(), static_cast<size_t>(api::GenerateRequest::descriptor()->file()->service(0)->method_count() +
                                              worker::v1::Join::descriptor()->file()->service(0)->method_count()));
  return codes;
}

grpc::StatusCode CheckHealth(const std::shared_ptr<grpc::Channel>& channel) {
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(5)));
  grpc::health::v1::HealthCheckResponse response;
  return grpc::health::v1::Health::NewStub(channel)->Check(&context, {}, &response).error_code();
}

class CredentialsTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    std::string pattern = ::testing::TempDir() + "/credentials-XXXXXX";
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    folder_ = new std::string(pattern);
  }
  static void TearDownTestSuite() {
    std::filesystem::remove_all(*folder_);
    delete folder_;
  }
  static std::string Path(const std::string& name) { return absl::StrCat(*folder_, "/", name); }
  static std::string Pem(const std::string& name) { return ReadTextFile(Path(name)).value(); }

  // Two authorities, and of each a certificate for 127.0.0.1. False where there is no openssl.
  static bool MakeCertificates() {
    if (std::filesystem::exists(Path("other.pem"))) return true;
    for (const std::string name : {"ours", "other"}) {
      const std::string command = absl::StrCat(
          "cd ", *folder_, " && openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 ",
          "-subj /CN=", name, "-ca -keyout ", name, "-ca.key -out ", name, "-ca.pem 2>/dev/null && ",
          "openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=", name, " -keyout ", name,
          ".key -out ", name, ".csr 2>/dev/null && printf 'subjectAltName=IP:127.0.0.1' > ext && ",
          "openssl x509 -req -days 1 -in ", name, ".csr -CA ", name, "-ca.pem -CAkey ", name,
          "-ca.key -CAcreateserial -extfile ext -out ", name, ".pem 2>/dev/null");
      if (std::system(command.c_str()) != 0) return false;
    }
    return true;
  }

  void Start(CoordinatorOptions options) {
    auto started = Coordinator::Start(options, nullptr);
    ASSERT_TRUE(started.ok()) << started.status();
    coordinator_ = *std::move(started);
  }
  std::shared_ptr<grpc::Channel> Channel(const wire::Credentials& credentials) {
    grpc::ChannelArguments arguments;
    arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
    return wire::MakeChannel(coordinator_->endpoint(), credentials, arguments);
  }

  static std::string* folder_;
  std::unique_ptr<Coordinator> coordinator_;
};
std::string* CredentialsTest::folder_ = nullptr;

TEST_F(CredentialsTest, EveryCallButHealthNeedsItsToken) {
  const std::string ours = wire::FreshToken(), groups = wire::FreshToken();
  Start({.cluster = {.group_timeout = kPatience},
         .client_credentials = {.token = ours},
         .worker_credentials = {.token = groups}});
  const auto link = link::CoordinatorLink::Connect(
      {.address = coordinator_->endpoint(), .credentials = {.token = groups}}, MakeJoin());
  ASSERT_TRUE(link.ok()) << link.status();
  std::string nearly = ours;
  nearly.back() = nearly.back() == '0' ? '1' : '0';
  for (const std::string& token : {std::string(), wire::FreshToken(), nearly, ours.substr(1), ours + "0"}) {
    const auto channel = Channel({.token = token});
    for (const auto& [name, code] : CallAll(channel)) EXPECT_EQ(code, grpc::StatusCode::UNAUTHENTICATED) << name;
    EXPECT_EQ(CheckHealth(channel), grpc::StatusCode::OK);
  }
  // The tokens of the two services are not each other's.
  for (const auto& [name, code] : CallAll(Channel({.token = groups}))) {
    EXPECT_EQ(code == grpc::StatusCode::UNAUTHENTICATED, name != "Attach") << name;
  }
  const auto stranger =
      link::CoordinatorLink::Connect({.address = coordinator_->endpoint(), .credentials = {.token = ours}}, MakeJoin());
  EXPECT_TRUE(absl::IsUnauthenticated(stranger.status())) << stranger.status();
  // Nobody without a token has drained it.
  EXPECT_TRUE(coordinator_->cluster().is_serving());
  for (const auto& [name, code] : CallAll(Channel({.token = ours}))) {
    EXPECT_EQ(code == grpc::StatusCode::UNAUTHENTICATED, name == "Attach") << name;
  }
}

TEST_F(CredentialsTest, WithoutATokenNoneIsAskedFor) {
  Start({});
  for (const auto& [name, code] : CallAll(Channel({}))) EXPECT_NE(code, grpc::StatusCode::UNAUTHENTICATED) << name;
}

TEST_F(CredentialsTest, TlsShowsWhoTheCoordinatorIs) {
  if (!MakeCertificates()) GTEST_SKIP() << "needs the openssl program";
  Start({.client_credentials = {.cert = Pem("ours.pem"), .key = Pem("ours.key")}});
  EXPECT_EQ(CheckHealth(Channel({.ca = Pem("ours-ca.pem")})), grpc::StatusCode::OK);
  EXPECT_EQ(CheckHealth(Channel({.ca = Pem("other-ca.pem")})), grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(CheckHealth(Channel({})), grpc::StatusCode::UNAVAILABLE);
  const auto link = link::CoordinatorLink::Connect(
      {.address = coordinator_->endpoint(), .credentials = {.ca = Pem("ours-ca.pem")}}, MakeJoin());
  EXPECT_TRUE(link.ok()) << link.status();
}

TEST_F(CredentialsTest, MutualTlsShowsWhoClientsAndGroupsAre) {
  if (!MakeCertificates()) GTEST_SKIP() << "needs the openssl program";
  const wire::Credentials own{.ca = Pem("ours-ca.pem"), .cert = Pem("ours.pem"), .key = Pem("ours.key")};
  Start({.worker_listen = "127.0.0.1:0", .client_credentials = own, .worker_credentials = own});
  EXPECT_EQ(CheckHealth(Channel(own)), grpc::StatusCode::OK);
  EXPECT_EQ(CheckHealth(Channel({.ca = own.ca})), grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(CheckHealth(Channel({.ca = own.ca, .cert = Pem("other.pem"), .key = Pem("other.key")})),
            grpc::StatusCode::UNAVAILABLE);
  const auto attach = [&](const wire::Credentials& credentials) {
    return link::CoordinatorLink::Connect({.address = coordinator_->worker_endpoint(),
                                           .connect_timeout = absl::Seconds(2),
                                           .credentials = credentials},
                                          MakeJoin())
        .status();
  };
  EXPECT_TRUE(attach(own).ok());
  EXPECT_TRUE(absl::IsUnavailable(attach({.ca = own.ca})));
  EXPECT_TRUE(absl::IsUnavailable(attach({})));
}

TEST_F(CredentialsTest, TokenFilesArePrivateOrRefused) {
  const std::string path = Path("token");
  ASSERT_TRUE(wire::WriteToken(path, wire::FreshToken()).ok());
  const auto read = wire::ReadCredentials({.token = path});
  ASSERT_TRUE(read.ok()) << read.status();
  EXPECT_EQ(read->token.size(), 64u);
  EXPECT_NE(wire::FreshToken(), wire::FreshToken());
  std::filesystem::permissions(path, std::filesystem::perms::group_read, std::filesystem::perm_options::add);
  EXPECT_THAT(std::string(wire::ReadCredentials({.token = path}).status().message()), HasSubstr("chmod 600"));
  ASSERT_TRUE(wire::WriteToken(path, "short").ok());
  EXPECT_THAT(std::string(wire::ReadCredentials({.token = path}).status().message()), HasSubstr("5 bytes"));
  EXPECT_TRUE(absl::IsNotFound(wire::ReadCredentials({.token = Path("none")}).status()));
  EXPECT_TRUE(absl::IsFailedPrecondition(wire::ReadCredentials({.tls_cert = path}).status()));
}

}  // namespace
}  // namespace rankwise::frontend
