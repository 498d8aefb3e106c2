// Streams that outlive their reader, and with a journal their coordinator.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>

#include "absl/strings/str_cat.h"
#include "coordinator/frontend/coordinator.h"
#include "coordinator/frontend/test_support.h"
#include "coordinator/text/test_models.h"
#include "launch/resuming_stream.h"

namespace rankwise::frontend {
namespace {

using rankwise::v1::GenerateRequest;
using ::testing::HasSubstr;
using ::testing::SizeIs;

const text::Tokenizer* ByteTokenizer() {
  static const auto& tokenizer = *new std::unique_ptr<text::Tokenizer>([] {
    const text::ModelFolder folder;
    folder.Write("tokenizer.json", text::ByteLevelModel({}));
    return *folder.Load();
  }());
  return tokenizer.get();
}

GenerateRequest Lingering(const std::string& id, uint32_t max_tokens, uint32_t n = 1) {
  GenerateRequest request;
  request.set_text("hello");
  request.set_request_id(id);
  request.set_linger_ms(60'000);
  request.set_n(n);
  request.mutable_sampling()->set_max_tokens(max_tokens);
  request.mutable_sampling()->set_seed(0);
  return request;
}

GenerateRequest From(GenerateRequest request, std::initializer_list<uint32_t> offsets) {
  request.mutable_resume();
  for (const uint32_t offset : offsets) request.mutable_resume()->add_token_offsets(offset);
  return request;
}

// What a client gets: pieces must join without a gap, from wherever it begins.
struct Received {
  std::string text;
  std::vector<int32_t> ids;
  std::optional<uint32_t> first_offset;
  std::optional<rankwise::v1::Finish> finish;
};

class ResumeTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = ::testing::TempDir() + "/resume-XXXXXX";
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    folder_ = pattern;
  }
  void TearDown() override {
    coordinator_.reset();
    std::filesystem::remove_all(folder_);
  }
  void Start(CoordinatorOptions options = {}) {
    coordinator_.reset();  // its port and its journal are free then
    auto started = Coordinator::Start(options, ByteTokenizer());
    ASSERT_TRUE(started.ok()) << started.status();
    coordinator_ = *std::move(started);
    stub_ = rankwise::v1::Inference::NewStub(
        grpc::CreateChannel(coordinator_->endpoint(), grpc::InsecureChannelCredentials()));
  }
  std::unique_ptr<FakeWorker> AddWorker(size_t limit = SIZE_MAX) {
    return std::make_unique<FakeWorker>(coordinator_->worker_endpoint(), limit);
  }
  // Reads to the end, or until sample 0 has `tokens`, and then cancels the call.
  grpc::Status Read(const GenerateRequest& request, std::map<uint32_t, Received>& received, size_t tokens = SIZE_MAX) {
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + kPatience));
    const auto reader = stub_->Generate(&context, request);
    for (rankwise::v1::GenerateResponse piece; reader->Read(&piece);) {
      Received& sample = received[piece.index()];
      if (!sample.first_offset) sample.first_offset = piece.token_offset();
      EXPECT_EQ(piece.token_offset(), *sample.first_offset + sample.ids.size());
      sample.text += piece.text();
      sample.ids.insert(sample.ids.end(), piece.token_ids().begin(), piece.token_ids().end());
      if (piece.has_finish()) sample.finish = piece.finish();
      if (received[0].ids.size() >= tokens) context.TryCancel();
    }
    return reader->Finish();
  }
  void AwaitLive(uint32_t count) {
    const absl::Time deadline = absl::Now() + kPatience;
    while (coordinator_->cluster().live() != count && absl::Now() < deadline) absl::SleepFor(absl::Milliseconds(1));
    EXPECT_EQ(coordinator_->cluster().live(), count);
  }

  std::string folder_;
  std::unique_ptr<Coordinator> coordinator_;
  std::unique_ptr<rankwise::v1::Inference::Stub> stub_;
};

TEST_F(ResumeTest, AFinishedStreamCanBeHadFromEveryToken) {
  Start();
  const auto worker = AddWorker();
  GenerateRequest request = Lingering("r", 30);
  request.add_stop("tuv");  // "t" and "u" are held back when their tokens come
  std::map<uint32_t, Received> whole;
  ASSERT_TRUE(Read(request, whole).ok());
  EXPECT_EQ(whole[0].text, OracleText(0, 19));
  ASSERT_THAT(whole[0].ids, SizeIs(22));
  for (uint32_t offset = 0; offset <= 22; ++offset) {
    std::map<uint32_t, Received> rest;
    ASSERT_TRUE(Read(From(request, {offset}), rest).ok());
    EXPECT_EQ(rest[0].first_offset, offset);
    EXPECT_EQ(rest[0].ids, std::vector<int32_t>(whole[0].ids.begin() + offset, whole[0].ids.end()));
    const std::string before = OracleText(0, std::min(offset, 19u));
    EXPECT_EQ(before + rest[0].text, whole[0].text) << offset;
    EXPECT_EQ(rest[0].finish->matched_stop(), "tuv");
    EXPECT_EQ(rest[0].finish->generated_tokens(), 22u);
  }
  EXPECT_TRUE(worker->AwaitSubmits(1));
}

TEST_F(ResumeTest, ALiveStreamGoesOnWithoutItsReader) {
  Start();
  const auto worker = AddWorker(5);
  const GenerateRequest request = Lingering("r", 20, 2);
  std::map<uint32_t, Received> first, second;
  EXPECT_EQ(Read(request, first, 3).error_code(), grpc::StatusCode::CANCELLED);
  worker->SetLimit(SIZE_MAX);
  AwaitLive(0);  // nobody reads, and it ends nevertheless
  ASSERT_TRUE(Read(From(request, {3, 0}), second).ok());
  EXPECT_EQ(second[0].text, OracleText(0, 20).substr(3));
  EXPECT_EQ(second[1].text, OracleText(1, 20));
}

TEST_F(ResumeTest, ASecondReaderTakesTheStreamOver) {
  Start();
  const auto worker = AddWorker(5);
  const GenerateRequest request = Lingering("r", 20);
  Stream first(*stub_, request);
  ASSERT_TRUE(first.ReadTokens(5));
  std::map<uint32_t, Received> second;
  grpc::Status status;
  std::thread reading([&] { status = Read(From(request, {2}), second); });
  EXPECT_EQ(first.Finish().error_code(), grpc::StatusCode::ABORTED);
  worker->SetLimit(SIZE_MAX);
  reading.join();
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(second[0].text, OracleText(0, 20).substr(2));
}

TEST_F(ResumeTest, AnUnknownRequestBeginsAnewAndIsDeliveredFromThere) {
  Start();
  const auto worker = AddWorker();
  std::map<uint32_t, Received> rest;
  ASSERT_TRUE(Read(From(Lingering("never seen", 20), {7}), rest).ok());
  EXPECT_EQ(rest[0].text, OracleText(0, 20).substr(7));
  EXPECT_EQ(rest[0].finish->generated_tokens(), 20u);
  GenerateRequest seedless = Lingering("nor this", 20);
  seedless.mutable_sampling()->clear_seed();
  std::map<uint32_t, Received> none;
  EXPECT_EQ(Read(From(seedless, {7}), none).error_code(), grpc::StatusCode::NOT_FOUND);
  EXPECT_TRUE(Read(From(seedless, {0}), none).ok());
}

TEST_F(ResumeTest, TheIdIsTheRequests) {
  Start();
  const auto worker = AddWorker();
  std::map<uint32_t, Received> received;
  ASSERT_TRUE(Read(Lingering("r", 20), received).ok());
  EXPECT_EQ(Read(Lingering("r", 20), received).error_code(), grpc::StatusCode::ALREADY_EXISTS);
  GenerateRequest other = From(Lingering("r", 20), {0});
  other.set_text("another");
  EXPECT_EQ(Read(other, received).error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  GenerateRequest nameless = From(Lingering("", 20), {0});
  EXPECT_EQ(Read(nameless, received).error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  GenerateRequest many = From(Lingering("r", 20), {0, 0});
  EXPECT_EQ(Read(many, received).error_code(), grpc::StatusCode::INVALID_ARGUMENT);
}

TEST_F(ResumeTest, WhatNobodyReadsIsCancelledAfterItsTime) {
  Start();
  const auto worker = AddWorker(5);
  GenerateRequest request = Lingering("r", 20);
  request.set_linger_ms(50);
  std::map<uint32_t, Received> received;
  EXPECT_EQ(Read(request, received, 3).error_code(), grpc::StatusCode::CANCELLED);
  EXPECT_TRUE(worker->AwaitCancels(1));
  AwaitLive(0);
}

TEST_F(ResumeTest, FinishedStreamsAreLetGoWhenTheyTakeTooMuch) {
  CoordinatorOptions options;
  options.max_kept_bytes = 5000;
  Start(options);
  const auto worker = AddWorker();
  for (int i = 0; i < 20; ++i) {
    std::map<uint32_t, Received> received;
    ASSERT_TRUE(Read(Lingering(absl::StrCat(i), 100), received).ok());
  }
  rankwise::v1::GetLoadResponse load;
  const absl::Time deadline = absl::Now() + kPatience;
  do {
    grpc::ClientContext context;
    ASSERT_TRUE(stub_->GetLoad(&context, {}, &load).ok());
  } while (load.kept_bytes() > 5000 && absl::Now() < deadline);
  EXPECT_LE(load.kept_bytes(), 5000u);
  EXPECT_GT(load.kept_streams(), 0u);
}

TEST_F(ResumeTest, AJournalBringsRequestsIntoTheNextCoordinator) {
  CoordinatorOptions options;
  options.journal = {.folder = folder_, .interval = absl::Milliseconds(1)};
  Start(options);
  options.listen = coordinator_->endpoint();
  const GenerateRequest live = Lingering("live", 20, 2), done = Lingering("done", 4);
  std::map<uint32_t, Received> first;
  {
    const auto worker = AddWorker(5);
    ASSERT_TRUE(Read(done, first).ok());
    first.clear();
    EXPECT_EQ(Read(live, first, 3).error_code(), grpc::StatusCode::CANCELLED);
    absl::SleepFor(absl::Milliseconds(50));  // the tokens are on disk; without them the test would pass too
  }
  Start(options);
  // It comes before the group, and before what the journal has is submitted again.
  std::map<uint32_t, Received> rest;
  grpc::Status status;
  std::thread reading([&] { status = Read(From(live, {3, 1}), rest); });
  const auto worker = AddWorker();
  reading.join();
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(rest[0].text, OracleText(0, 20).substr(3));
  EXPECT_EQ(rest[1].text, OracleText(1, 20).substr(1));
  std::map<uint32_t, Received> again;
  ASSERT_TRUE(Read(From(done, {1}), again).ok());
  EXPECT_EQ(again[0].text, OracleText(0, 4).substr(1));
  EXPECT_TRUE(worker->AwaitSubmits(2));  // the two samples of "live" alone
  EXPECT_FALSE(worker->AwaitSubmits(3, absl::Milliseconds(100)));
}

TEST_F(ResumeTest, ADrainLeavesWhatIsUnfinishedToTheJournal) {
  CoordinatorOptions options;
  options.journal.folder = folder_;
  Start(options);
  options.listen = coordinator_->endpoint();
  const GenerateRequest request = Lingering("r", 20);
  {
    const auto worker = AddWorker(5);
    const auto stub = rankwise::v1::Inference::NewStub(
        grpc::CreateChannel(coordinator_->endpoint(), grpc::InsecureChannelCredentials()));
    launch::ResumingStream stream(*stub, request, {.deadline = absl::Now() + kPatience});
    rankwise::v1::GenerateResponse piece;
    std::string text;
    while (text.size() < 5 && stream.Read(&piece)) text += piece.text();
    coordinator_->Drain(absl::Milliseconds(50), [] { return false; });
    Start(options);
    const auto second = AddWorker();
    while (stream.Read(&piece)) text += piece.text();
    EXPECT_TRUE(stream.Finish().ok()) << stream.Finish();
    EXPECT_EQ(text, OracleText(0, 20));
    EXPECT_GE(stream.resumes(), 1);
  }
}

TEST_F(ResumeTest, ASampleEndsOnceAlsoWhenItsStreamIsResumed) {
  CoordinatorOptions options;
  options.journal.folder = folder_;
  Start(options);
  options.listen = coordinator_->endpoint();
  GenerateRequest request = Lingering("r", 20, 2);
  request.add_stop(OracleText(0, 2));  // ends sample 0 alone
  ASSERT_THAT(OracleText(1, 20), ::testing::Not(HasSubstr(request.stop(0))));
  std::map<uint32_t, int> ends;
  const auto worker = AddWorker(5);
  const auto stub = rankwise::v1::Inference::NewStub(
      grpc::CreateChannel(coordinator_->endpoint(), grpc::InsecureChannelCredentials()));
  launch::ResumingStream stream(*stub, request, {.deadline = absl::Now() + kPatience});
  rankwise::v1::GenerateResponse piece;
  while (ends[0] == 0 && stream.Read(&piece)) ends[piece.index()] += piece.has_finish();
  coordinator_->Drain(absl::Milliseconds(50), [] { return false; });
  Start(options);
  const auto second = AddWorker();
  while (stream.Read(&piece)) ends[piece.index()] += piece.has_finish();
  EXPECT_TRUE(stream.Finish().ok()) << stream.Finish();
  EXPECT_GE(stream.resumes(), 1);
  EXPECT_EQ(ends[0], 1);
  EXPECT_EQ(ends[1], 1);
}

TEST_F(ResumeTest, AnotherModelOrArithmeticDoesNotGoOnWithIt) {
  CoordinatorOptions options;
  options.journal.folder = folder_;
  for (const auto& change : std::vector<std::function<void(rankwise::v1::GetModelInfoResponse&)>>{
           [](auto& model) { model.set_fingerprint("another"); }, [](auto& model) { model.set_activations("int8"); }}) {
    Start(options);
    {
      const auto worker = AddWorker(5);
      std::map<uint32_t, Received> first;
      EXPECT_FALSE(Read(Lingering("r", 20), first, 3).ok());
    }
    Start(options);
    worker::v1::Join join = MakeJoin();
    change(*join.mutable_model());
    FakeWorker worker(coordinator_->worker_endpoint(), 5, join);  // would not finish it
    absl::SleepFor(absl::Milliseconds(60));
    EXPECT_EQ(coordinator_->cluster().live(), 0u);
  }
}

}  // namespace
}  // namespace rankwise::frontend
