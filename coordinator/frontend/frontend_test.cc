// The coordinator in one process: real streams on loopback, real links, and groups that make up their tokens.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>

#include "absl/strings/str_cat.h"
#include "coordinator/frontend/coordinator.h"
#include "coordinator/frontend/test_support.h"
#include "coordinator/text/test_models.h"
#include "launch/resuming_stream.h"
#include "proto/health.grpc.pb.h"

namespace rankwise::frontend {
namespace {

using rankwise::v1::GenerateRequest;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;

const text::Tokenizer* ByteTokenizer() {
  static const auto& tokenizer = *new std::unique_ptr<text::Tokenizer>([] {
    const text::ModelFolder folder;
    folder.Write("tokenizer.json", text::ByteLevelModel({}));
    return *folder.Load();
  }());
  return tokenizer.get();
}

GenerateRequest TextRequest(uint32_t max_tokens = 8) {
  GenerateRequest request;
  request.set_text("hello");
  request.mutable_sampling()->set_max_tokens(max_tokens);
  request.mutable_sampling()->set_seed(0);
  return request;
}

class FrontendTest : public ::testing::Test {
 protected:
  void Start(CoordinatorOptions options = {}, const text::Tokenizer* tokenizer = ByteTokenizer()) {
    options.model_name = "test model";
    auto started = Coordinator::Start(options, tokenizer);
    ASSERT_TRUE(started.ok()) << started.status();
    coordinator_ = *std::move(started);
    channel_ = grpc::CreateChannel(coordinator_->endpoint(), grpc::InsecureChannelCredentials());
    stub_ = rankwise::v1::Inference::NewStub(channel_);
  }
  std::unique_ptr<FakeWorker> AddWorker(size_t limit = SIZE_MAX) {
    return std::make_unique<FakeWorker>(coordinator_->worker_endpoint(), limit);
  }
  // Every request is gone, and the books are right.
  void TearDown() override {
    if (!coordinator_) return;
    const absl::Time deadline = absl::Now() + kPatience;
    while (coordinator_->cluster().live() > 0 && absl::Now() < deadline) std::this_thread::yield();
    EXPECT_EQ(coordinator_->cluster().live(), 0u);
    coordinator_->cluster().CheckInvariants();
  }

  template <typename Request, typename Response>
  grpc::Status Call(grpc::Status (rankwise::v1::Inference::Stub::*method)(grpc::ClientContext*, const Request&,
                                                                          Response*),
                    const Request& request, Response& response, absl::Duration timeout = kPatience) {
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + timeout));
    return (stub_.get()->*method)(&context, request, &response);
  }
  grpc::Status Generate(const GenerateRequest& request) { return Stream(*stub_, request).Finish(); }
  bool Abort(const std::string& id) {
    rankwise::v1::AbortRequest request;
    rankwise::v1::AbortResponse response;
    request.set_request_id(id);
    EXPECT_TRUE(Call(&rankwise::v1::Inference::Stub::Abort, request, response).ok());
    return response.found();
  }

  std::unique_ptr<Coordinator> coordinator_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<rankwise::v1::Inference::Stub> stub_;
};

using Stub = rankwise::v1::Inference::Stub;

TEST_F(FrontendTest, TextInTextOut) {
  Start();
  const auto worker = AddWorker();
  Stream stream(*stub_, TextRequest(30));
  ASSERT_TRUE(stream.Finish().ok());
  ASSERT_THAT(stream.samples, SizeIs(1));
  const Stream::Sample& sample = stream.samples[0];
  EXPECT_EQ(sample.text, OracleText(0, 30));
  EXPECT_THAT(sample.ids, SizeIs(30));
  EXPECT_EQ(sample.finish->reason(), rankwise::v1::FINISH_REASON_LENGTH);
  EXPECT_EQ(sample.finish->prompt_tokens(), 5u);
  EXPECT_EQ(sample.finish->generated_tokens(), 30u);
  EXPECT_EQ(sample.finish->seed(), 0u);
  EXPECT_EQ(sample.finish->replays(), 0u);
}

TEST_F(FrontendTest, IdsInAndSeveralSamplesWithLogprobs) {
  Start();
  const auto worker = AddWorker();
  GenerateRequest request;
  request.mutable_token_ids()->add_ids(7);
  request.mutable_sampling()->set_seed(5);
  request.mutable_sampling()->set_max_tokens(9);
  request.mutable_sampling()->set_logprobs(2);
  request.set_n(3);
  request.set_request_id("mine");
  Stream stream(*stub_, request);
  ASSERT_TRUE(stream.Finish().ok());
  ASSERT_THAT(stream.samples, SizeIs(3));
  for (const auto& [index, sample] : stream.samples) {
    EXPECT_EQ(sample.text, OracleText(5 + index, 9));
    EXPECT_EQ(sample.finish->seed(), 5u + index);
    EXPECT_EQ(sample.request_id, "mine");
    ASSERT_THAT(sample.logprobs, SizeIs(9));
    EXPECT_EQ(sample.logprobs[0].chosen().token(), OracleText(5 + index, 1));
    EXPECT_THAT(sample.logprobs[0].top(), SizeIs(2));
  }
}

TEST_F(FrontendTest, AStopStringAcrossTokensEndsTextAndGroupsWork) {
  Start();
  const auto worker = AddWorker(6);
  GenerateRequest request = TextRequest(1000);
  request.add_stop("xyzz");
  request.add_stop("fgh");
  Stream stream(*stub_, request);
  // The token of "f" is delivered though its text is held back.
  ASSERT_TRUE(stream.ReadTokens(6));
  EXPECT_EQ(stream.samples[0].text, "abcde");
  worker->SetLimit(SIZE_MAX);
  ASSERT_TRUE(stream.Finish().ok());
  EXPECT_EQ(stream.samples[0].text, "abcde");
  EXPECT_THAT(stream.samples[0].ids, SizeIs(8));
  EXPECT_EQ(stream.samples[0].finish->reason(), rankwise::v1::FINISH_REASON_STOP);
  EXPECT_EQ(stream.samples[0].finish->matched_stop(), "fgh");
  EXPECT_TRUE(worker->AwaitCancels(1));

  request.set_include_stop(true);
  Stream included(*stub_, request);
  ASSERT_TRUE(included.Finish().ok());
  EXPECT_EQ(included.samples[0].text, "abcdefgh");

  request.mutable_sampling()->set_min_tokens(20);
  Stream later(*stub_, request);
  ASSERT_TRUE(later.Finish().ok());
  EXPECT_EQ(later.samples[0].text, OracleText(0, 34));

  worker->SetLimit(10);
  request = TextRequest(1000);
  request.add_stop("ab");
  request.set_n(2);
  Stream two(*stub_, request);
  EXPECT_TRUE(worker->AwaitCancels(4));  // sample 0 alone has ended
  worker->SetLimit(SIZE_MAX);
  ASSERT_TRUE(two.Finish().ok());
  EXPECT_EQ(two.samples[0].text, "");
  EXPECT_EQ(two.samples[1].text, OracleText(1, 25));

  request = TextRequest();
  request.mutable_sampling()->add_stop_token_ids('d');
  Stream token(*stub_, request);
  ASSERT_TRUE(token.Finish().ok());
  EXPECT_EQ(token.samples[0].text, "abc");
  EXPECT_EQ(token.samples[0].finish->stop_token_id(), 'd');
}

TEST_F(FrontendTest, ClientsThatGoAwayFreeTheGroup) {
  Start();
  const auto worker = AddWorker(3);
  Stream cancelled(*stub_, TextRequest(1000));
  ASSERT_TRUE(cancelled.ReadTokens(3));
  cancelled.Cancel();
  EXPECT_EQ(cancelled.Finish().error_code(), grpc::StatusCode::CANCELLED);
  EXPECT_TRUE(worker->AwaitCancels(1));
  Stream late(*stub_, TextRequest(1000), absl::Milliseconds(100));
  EXPECT_EQ(late.Finish().error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  EXPECT_TRUE(worker->AwaitCancels(2));
}

TEST_F(FrontendTest, TimeoutAndAbortEndInTheStream) {
  Start();
  const auto worker = AddWorker(3);
  GenerateRequest request = TextRequest(1000);
  request.set_timeout_ms(100);
  Stream late(*stub_, request);
  ASSERT_TRUE(late.Finish().ok());
  EXPECT_EQ(late.samples[0].finish->reason(), rankwise::v1::FINISH_REASON_DEADLINE);
  EXPECT_THAT(late.samples[0].ids, SizeIs(3));
  EXPECT_TRUE(worker->AwaitCancels(1));

  request = TextRequest(1000);
  request.set_request_id("mine");
  Stream aborted(*stub_, request);
  ASSERT_TRUE(aborted.ReadTokens(3));
  const grpc::Status duplicate = Generate(request);
  EXPECT_EQ(duplicate.error_code(), grpc::StatusCode::ALREADY_EXISTS) << duplicate.error_message();
  EXPECT_TRUE(Abort("mine"));
  EXPECT_FALSE(Abort("mine"));
  ASSERT_TRUE(aborted.Finish().ok());
  EXPECT_EQ(aborted.samples[0].finish->reason(), rankwise::v1::FINISH_REASON_CANCELLED);
  EXPECT_TRUE(worker->AwaitCancels(2));
}

TEST_F(FrontendTest, OverloadIsRefusedAtOnce) {
  Start({.cluster = {.max_live = 2}});
  const auto worker = AddWorker(1);
  GenerateRequest request = TextRequest(20);
  request.set_n(2);
  Stream held(*stub_, request);
  ASSERT_TRUE(worker->AwaitSubmits(2));
  const grpc::Status refused = Generate(TextRequest());
  EXPECT_EQ(refused.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_GE(launch::RetryDelayOf(refused), absl::Milliseconds(100));
  EXPECT_LE(launch::RetryDelayOf(refused), absl::Minutes(1));
  worker->SetLimit(SIZE_MAX);
  EXPECT_TRUE(held.Finish().ok());
  EXPECT_TRUE(Generate(TextRequest()).ok());
}

TEST_F(FrontendTest, TokensAreALimitToo) {
  Start({.cluster = {.max_live_tokens = 100}});
  const auto worker = AddWorker(1);
  Stream held(*stub_, TextRequest(80));  // 5 of the prompt
  ASSERT_TRUE(worker->AwaitSubmits(1));
  const grpc::Status refused = Generate(TextRequest(11));
  EXPECT_EQ(refused.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_THAT(refused.error_message(), HasSubstr("limit of 100"));
  EXPECT_GT(launch::RetryDelayOf(refused), absl::ZeroDuration());
  worker->SetLimit(SIZE_MAX);
  EXPECT_TRUE(Generate(TextRequest(10)).ok());
  EXPECT_TRUE(held.Finish().ok());
}

TEST_F(FrontendTest, BadRequestsNameTheValue) {
  Start();
  const auto worker = AddWorker();
  const float nan = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();
  const std::vector<std::pair<const char*, std::function<void(GenerateRequest&)>>> cases = {
      {"prompt is missing", [](auto& r) { r.clear_prompt(); }},
      {"prompt is empty", [](auto& r) { r.set_text(""); }},
      {"prompt is empty", [](auto& r) { r.mutable_token_ids(); }},
      {"token 300 is outside [0, 300)", [](auto& r) { r.mutable_token_ids()->add_ids(300); }},
      {"token -1 is outside", [](auto& r) { r.mutable_token_ids()->add_ids(-1); }},
      {"tokens of the prompt=4096", [](auto& r) { r.set_text(std::string(4096, 'x')); }},
      {"bytes of the prompt=1000000", [](auto& r) { r.set_text(std::string(1000000, 'x')); }},
      {"max_tokens=4092", [](auto& r) { r.mutable_sampling()->set_max_tokens(4092); }},
      {"min_tokens=9", [](auto& r) { r.mutable_sampling()->set_min_tokens(9); }},
      {"temperature=nan", [=](auto& r) { r.mutable_sampling()->set_temperature(nan); }},
      {"temperature=-1", [](auto& r) { r.mutable_sampling()->set_temperature(-1); }},
      {"temperature=inf", [=](auto& r) { r.mutable_sampling()->set_temperature(infinity); }},
      {"top_p=0", [](auto& r) { r.mutable_sampling()->set_top_p(0); }},
      {"top_p=1.5", [](auto& r) { r.mutable_sampling()->set_top_p(1.5); }},
      {"min_p=2", [](auto& r) { r.mutable_sampling()->set_min_p(2); }},
      {"repetition_penalty=0", [](auto& r) { r.mutable_sampling()->set_repetition_penalty(0); }},
      {"frequency_penalty=3", [](auto& r) { r.mutable_sampling()->set_frequency_penalty(3); }},
      {"presence_penalty=nan", [=](auto& r) { r.mutable_sampling()->set_presence_penalty(nan); }},
      {"logprobs=21", [](auto& r) { r.mutable_sampling()->set_logprobs(21); }},
      {"prompt_logprobs=21", [](auto& r) { r.mutable_sampling()->set_prompt_logprobs(21); }},
      {"logit_bias of token 1=101", [](auto& r) { (*r.mutable_sampling()->mutable_logit_bias())[1] = 101; }},
      {"logit_bias of token 1=-inf", [=](auto& r) { (*r.mutable_sampling()->mutable_logit_bias())[1] = -infinity; }},
      {"logit_bias: token 999", [](auto& r) { (*r.mutable_sampling()->mutable_logit_bias())[999] = 1; }},
      {"stop_token_ids: token 300", [](auto& r) { r.mutable_sampling()->add_stop_token_ids(300); }},
      {"n=65", [](auto& r) { r.set_n(65); }},
      {"count of stop=17",
       [](auto& r) {
         for (int i = 0; i < 17; ++i) r.add_stop("x");
       }},
      {"a string is empty", [](auto& r) { r.add_stop(""); }},
      {"bytes of a stop string=257", [](auto& r) { r.add_stop(std::string(257, 'x')); }},
      {"priority=101", [](auto& r) { r.set_priority(101); }},
      {"bytes of tenant=129", [](auto& r) { r.set_tenant(std::string(129, 'x')); }},
      {"bytes of request_id=129", [](auto& r) { r.set_request_id(std::string(129, 'x')); }},
  };
  for (const auto& [message, spoil] : cases) {
    GenerateRequest request = TextRequest();
    spoil(request);
    const grpc::Status status = Generate(request);
    EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT) << message;
    EXPECT_THAT(status.error_message(), HasSubstr(message));
  }
  // No client library sends this: gRPC cannot parse it, and calls the method unimplemented.
  GenerateRequest request = TextRequest();
  request.set_text("\xff");
  EXPECT_FALSE(Generate(request).ok());
  EXPECT_TRUE(Generate(TextRequest()).ok());
}

TEST_F(FrontendTest, AStreamGoesOnWhereALostGroupLeftIt) {
  Start();
  auto first = AddWorker(5);
  Stream stream(*stub_, TextRequest(20));
  ASSERT_TRUE(stream.ReadTokens(5));
  const uint64_t epoch = first->epoch();
  first.reset();
  const auto second = AddWorker();
  EXPECT_GT(second->epoch(), epoch);
  EXPECT_EQ(second->group(), 1u);
  ASSERT_TRUE(stream.Finish().ok());
  EXPECT_EQ(stream.samples[0].text, OracleText(0, 20));
  EXPECT_EQ(stream.samples[0].finish->replays(), 1u);
}

TEST_F(FrontendTest, ASilentGroupIsLost) {
  Start({.cluster = {.group_timeout = absl::Milliseconds(200)}});
  const auto silent = AddWorker(5);
  Stream stream(*stub_, TextRequest(20));
  ASSERT_TRUE(stream.ReadTokens(5));
  silent->Hang();
  EXPECT_TRUE(silent->AwaitEnd());
  const auto second = AddWorker();
  ASSERT_TRUE(stream.Finish().ok());
  EXPECT_EQ(stream.samples[0].text, OracleText(0, 20));
}

TEST_F(FrontendTest, ManyStreamsSurviveManyLosses) {
  Start({.cluster = {.max_fruitless_replays = 1000}});
  std::vector<std::unique_ptr<FakeWorker>> workers;
  // No stream ends before the last loss.
  for (int i = 0; i < 2; ++i) workers.push_back(AddWorker(200));
  std::vector<std::thread> clients;
  std::atomic<int> whole = 0;
  for (uint64_t seed = 0; seed < 24; ++seed) {
    clients.emplace_back([&, seed] {
      GenerateRequest request = TextRequest(400);
      request.mutable_sampling()->set_seed(seed);
      Stream stream(*stub_, request);
      const grpc::Status status = stream.Finish();
      EXPECT_TRUE(status.ok()) << status.error_message();
      if (stream.samples[0].text == OracleText(seed, 400)) ++whole;
    });
  }
  for (int loss = 0; loss < 12; ++loss) {
    EXPECT_TRUE(workers[loss % 2]->AwaitSubmits(1));
    workers[loss % 2] = AddWorker(200);
  }
  for (const auto& worker : workers) worker->SetLimit(SIZE_MAX);
  for (std::thread& client : clients) client.join();
  EXPECT_EQ(whole, 24);
}

TEST_F(FrontendTest, RequestsWaitForTheFirstGroup) {
  Start();
  GenerateRequest request = TextRequest();
  Stream stream(*stub_, request);
  request.set_request_id("impatient");
  Stream aborted(*stub_, request);
  while (!Abort("impatient")) std::this_thread::yield();
  EXPECT_EQ(aborted.Finish().error_code(), grpc::StatusCode::CANCELLED);
  Stream gone(*stub_, TextRequest());
  gone.Cancel();
  const auto worker = AddWorker();
  ASSERT_TRUE(stream.Finish().ok());
  EXPECT_EQ(stream.samples[0].text, OracleText(0, 8));
}

TEST_F(FrontendTest, ButNotForEver) {
  Start({.cluster = {.group_wait = absl::Milliseconds(100)}});
  EXPECT_EQ(Generate(TextRequest()).error_code(), grpc::StatusCode::UNAVAILABLE);
  auto worker = AddWorker(2);
  Stream stream(*stub_, TextRequest());
  ASSERT_TRUE(stream.ReadTokens(2));
  worker.reset();
  EXPECT_EQ(stream.Finish().error_code(), grpc::StatusCode::UNAVAILABLE);
}

TEST_F(FrontendTest, HealthIsHonest) {
  Start();
  const auto health = grpc::health::v1::Health::NewStub(channel_);
  for (const char* service : {"", "rankwise.v1.Inference"}) {
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + kPatience));
    grpc::health::v1::HealthCheckRequest request;
    request.set_service(service);
    const auto watch = health->Watch(&context, request);
    grpc::health::v1::HealthCheckResponse response;
    const auto expect = [&](auto status) {
      ASSERT_TRUE(watch->Read(&response));
      EXPECT_EQ(response.status(), status) << service;
    };
    expect(grpc::health::v1::HealthCheckResponse::NOT_SERVING);
    auto worker = AddWorker();
    expect(grpc::health::v1::HealthCheckResponse::SERVING);
    worker.reset();
    expect(grpc::health::v1::HealthCheckResponse::NOT_SERVING);
    context.TryCancel();
  }
}

TEST_F(FrontendTest, DrainAdmitsNothingAndWaits) {
  Start();
  auto worker = AddWorker(2);
  Stream stream(*stub_, TextRequest(20));
  ASSERT_TRUE(stream.ReadTokens(2));
  rankwise::v1::DrainResponse response;
  ASSERT_TRUE(Call(&Stub::Drain, rankwise::v1::DrainRequest(), response, absl::Milliseconds(400)).ok());
  EXPECT_FALSE(response.finished());
  EXPECT_EQ(response.live(), 1u);
  EXPECT_EQ(Generate(TextRequest()).error_code(), grpc::StatusCode::UNAVAILABLE);
  worker->SetLimit(SIZE_MAX);
  ASSERT_TRUE(Call(&Stub::Drain, rankwise::v1::DrainRequest(), response).ok());
  EXPECT_TRUE(response.finished());
  ASSERT_TRUE(stream.Finish().ok());
  EXPECT_EQ(stream.samples[0].text, OracleText(0, 20));
  coordinator_->Drain(kPatience, [] { return false; });
  EXPECT_TRUE(worker->AwaitEnd());
  EXPECT_TRUE(worker->was_stopped());
}

TEST_F(FrontendTest, AHurriedEndFailsWhatIsLive) {
  Start();
  const auto worker = AddWorker(2);
  Stream stream(*stub_, TextRequest(20));
  ASSERT_TRUE(stream.ReadTokens(2));
  coordinator_->Drain(kPatience, [] { return true; });
  EXPECT_EQ(stream.Finish().error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_TRUE(worker->AwaitEnd());
  EXPECT_TRUE(worker->was_stopped());
}

TEST_F(FrontendTest, TokenizeDetokenizeModelAndLoad) {
  Start({.worker_listen = "127.0.0.1:0"});
  rankwise::v1::GetModelInfoResponse model;
  EXPECT_EQ(Call(&Stub::GetModelInfo, rankwise::v1::GetModelInfoRequest(), model).error_code(),
            grpc::StatusCode::UNAVAILABLE);
  rankwise::v1::TokenizeRequest text;
  text.set_text("hi<|end|>");
  rankwise::v1::TokenizeResponse ids;
  ASSERT_TRUE(Call(&Stub::Tokenize, text, ids).ok());
  EXPECT_THAT(ids.token_ids(), ::testing::ElementsAre('h', 'i', 256));
  rankwise::v1::DetokenizeRequest back;
  *back.mutable_token_ids() = ids.token_ids();
  rankwise::v1::DetokenizeResponse joined;
  ASSERT_TRUE(Call(&Stub::Detokenize, back, joined).ok());
  EXPECT_EQ(joined.text(), "hi");
  back.set_keep_special(true);
  ASSERT_TRUE(Call(&Stub::Detokenize, back, joined).ok());
  EXPECT_EQ(joined.text(), "hi<|end|>");
  back.add_token_ids(-1);
  EXPECT_EQ(Call(&Stub::Detokenize, back, joined).error_code(), grpc::StatusCode::INVALID_ARGUMENT);

  const auto worker = AddWorker(2);
  ASSERT_TRUE(Call(&Stub::GetModelInfo, rankwise::v1::GetModelInfoRequest(), model).ok());
  EXPECT_EQ(model.model_name(), "test model");
  EXPECT_EQ(model.vocab_size(), kVocabulary);
  Stream stream(*stub_, TextRequest());
  ASSERT_TRUE(stream.ReadTokens(2));
  rankwise::v1::GetLoadResponse load;
  ASSERT_TRUE(Call(&Stub::GetLoad, rankwise::v1::GetLoadRequest(), load).ok());
  EXPECT_EQ(load.live(), 1u);
  EXPECT_EQ(load.queued(), 0u);
  ASSERT_THAT(load.groups(), SizeIs(1));
  EXPECT_EQ(load.groups(0).epoch(), worker->epoch());
  worker->SetLimit(SIZE_MAX);
  EXPECT_TRUE(stream.Finish().ok());

  // Groups have an address of their own here.
  const auto lost = link::CoordinatorLink::Connect({.address = coordinator_->endpoint()}, MakeJoin());
  EXPECT_TRUE(absl::IsUnimplemented(lost.status())) << lost.status();
}

TEST_F(FrontendTest, WithoutATokenizerIdsStillWork) {
  Start({}, nullptr);
  const auto worker = AddWorker();
  GenerateRequest request = TextRequest();
  EXPECT_EQ(Generate(request).error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  request.mutable_token_ids()->add_ids(1);
  request.add_stop("x");
  EXPECT_EQ(Generate(request).error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  request.clear_stop();
  Stream stream(*stub_, request);
  ASSERT_TRUE(stream.Finish().ok());
  EXPECT_THAT(stream.samples[0].ids, SizeIs(8));
  EXPECT_THAT(stream.samples[0].text, IsEmpty());
  rankwise::v1::TokenizeResponse ids;
  EXPECT_EQ(Call(&Stub::Tokenize, rankwise::v1::TokenizeRequest(), ids).error_code(),
            grpc::StatusCode::FAILED_PRECONDITION);
}

TEST_F(FrontendTest, LinksTellWhyTheyFail) {
  Start();
  const auto worker = AddWorker();
  worker::v1::Join other = MakeJoin();
  other.mutable_model()->set_kv_format("int8");
  const auto refused = link::CoordinatorLink::Connect({.address = coordinator_->endpoint()}, other);
  EXPECT_TRUE(absl::IsFailedPrecondition(refused.status()));
  EXPECT_THAT(std::string(refused.status().message()), HasSubstr("kv_format"));

  auto link = link::CoordinatorLink::Connect({.address = coordinator_->endpoint()}, MakeJoin());
  ASSERT_TRUE(link.ok());
  const std::string address = coordinator_->endpoint();
  coordinator_.reset();
  const absl::Time deadline = absl::Now() + kPatience;
  absl::Status ended;
  while (ended.ok() && absl::Now() < deadline) ended = (*link)->Poll(kPatience).status();
  EXPECT_TRUE(absl::IsUnavailable(ended)) << ended;
  (*link)->SendLoad({});
  const auto nobody =
      link::CoordinatorLink::Connect({.address = address, .connect_timeout = absl::Milliseconds(200)}, MakeJoin());
  EXPECT_TRUE(absl::IsUnavailable(nobody.status())) << nobody.status();
}

}  // namespace
}  // namespace rankwise::frontend
