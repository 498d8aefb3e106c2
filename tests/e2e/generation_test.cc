// Text and ids from real processes: every parallelism and KV format, the reference, cancelled and refused requests.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <limits>
#include <string>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "base/mapped_file.h"
#include "base/program_folder.h"
#include "launch/client.h"
#include "nlohmann/json.hpp"
#include "tests/e2e/serving.h"
#include "worker/kv/kv_scales.h"

namespace rankwise::e2e {
namespace {

using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;
using ::testing::SizeIs;

constexpr char kPrompt[] = "Once upon a time";

void ExpectWhole(const Reply& reply) {
  ASSERT_TRUE(reply.status.ok()) << reply.status;
  ASSERT_TRUE(reply.finish.has_value());
  EXPECT_FALSE(reply.has_gap);
  EXPECT_EQ(reply.finish->generated_tokens(), reply.ids.size());
}

struct Format {
  const char* kv;
  bool is_equal_for_all_tp;  // per-rank scales differ by nature
};
void PrintTo(const Format& format, std::ostream* out) { *out << format.kv; }

class Generation : public ::testing::TestWithParam<Format> {};
INSTANTIATE_TEST_SUITE_P(Formats, Generation,
                         ::testing::Values(Format{"f32", true}, Format{"f16", true}, Format{"int8-head", true},
                                           Format{"int8", false}),
                         [](const auto& info) {
                           std::string name = info.param.kv;
                           std::erase(name, '-');
                           return name;
                         });

TEST_P(Generation, IsRepeatableAndIndependentOfTheNumberOfRanks) {
  std::vector<std::vector<int32_t>> greedy, sampled;
  for (const int tp : {1, 2}) {
    const auto cluster = Serve({.tp = tp, .kv = GetParam().kv});
    ASSERT_TRUE(cluster.ok()) << cluster.status();
    auto& stub = (*cluster)->stub();
    const Reply a = Generate(stub, Greedy(kPrompt, 48)), b = Generate(stub, Greedy(kPrompt, 48));
    const Reply c = Generate(stub, Sampled(kPrompt, 48, 7)), d = Generate(stub, Sampled(kPrompt, 48, 7));
    for (const Reply& reply : {a, b, c, d}) {
      ExpectWhole(reply);
      EXPECT_THAT(reply.text, Not(IsEmpty()));
    }
    EXPECT_EQ(a.ids, b.ids);
    EXPECT_EQ(a.text, b.text);
    EXPECT_EQ(c.ids, d.ids);
    EXPECT_NE(a.ids, c.ids);
    EXPECT_NE(c.ids, Generate(stub, Sampled(kPrompt, 48, 8)).ids);
    greedy.push_back(a.ids);
    sampled.push_back(c.ids);
    EXPECT_TRUE(WaitIdle(stub).ok());
    EXPECT_TRUE((*cluster)->Drain().ok());
  }
  if (GetParam().is_equal_for_all_tp) {
    EXPECT_EQ(greedy[0], greedy[1]);
    EXPECT_EQ(sampled[0], sampled[1]);
  }
}

TEST(Reference, GreedyIdsEqualTheOracleAsFarAsItsMarginsReach) {
  const auto text = ReadTextFile(DemoModel() + "/reference.json");
  if (!text.ok()) GTEST_SKIP() << "no reference.json beside the demo model";
  const auto reference = nlohmann::json::parse(*text);
  // f32 logits are within 1e-4 of the float64 oracle's: only a smaller lead than twice that can be overturned.
  constexpr double kSmallestMargin = 2e-4;
  for (const int tp : {1, 2}) {
    const auto cluster = Serve({.tp = tp});
    ASSERT_TRUE(cluster.ok()) << cluster.status();
    for (const auto& entry : reference["greedy"]) {
      GenerateRequest request = Greedy("", 0);
      const auto prompt = entry["prompt_ids"].get<std::vector<int32_t>>();
      request.mutable_token_ids()->mutable_ids()->Assign(prompt.begin(), prompt.end());
      auto expected = entry["output_ids"].get<std::vector<int32_t>>();
      const auto margins = entry["margins"].get<std::vector<double>>();
      size_t length = 0;
      while (length < expected.size() && margins[length] >= kSmallestMargin) ++length;
      EXPECT_GE(length, 16u);
      expected.resize(length);
      request.mutable_sampling()->set_max_tokens(static_cast<uint32_t>(length));
      request.mutable_sampling()->set_ignore_eos(true);
      const Reply reply = Generate((*cluster)->stub(), request);
      ASSERT_TRUE(reply.status.ok()) << reply.status;
      EXPECT_EQ(reply.ids, expected) << "tp " << tp;
    }
  }
}

TEST(Workspace, ServesTheTextOfItsModel) {
  const std::string workspace = ScratchFolder() + "/workspace";
  const auto converted = RunProgram("rankwise", {"convert", DemoModel(), workspace, "--tp", "2"});
  ASSERT_TRUE(converted.ok()) << converted.status();
  ASSERT_TRUE(converted->state.is_success()) << converted->log;
  const auto again = RunProgram("rankwise", {"convert", DemoModel(), workspace, "--tp", "1"});
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_FALSE(again->state.is_success());
  EXPECT_THAT(again->log, HasSubstr("--force replaces it"));
  std::vector<std::string> texts;
  for (const std::string& model : {DemoModel(), workspace}) {
    const auto cluster = Serve({.model = model, .tp = 2, .kv = "f16"});
    ASSERT_TRUE(cluster.ok()) << cluster.status();
    const Reply reply = Generate((*cluster)->stub(), Greedy(kPrompt, 48));
    ExpectWhole(reply);
    texts.push_back(reply.text);
  }
  EXPECT_THAT(texts[0], Not(IsEmpty()));
  EXPECT_EQ(texts[0], texts[1]);
}

TEST(Workspace, OfFourBitsServesTheTextOfItsAwqFolder) {
  const std::string folder = ScratchFolder(), quantized = folder + "/awq", workspace = folder + "/workspace-int4";
  const auto made = RunProgram("rankwise", {"quantize", DemoModel(), quantized, "--bits", "4", "--group-size", "128"});
  ASSERT_TRUE(made.ok()) << made.status();
  ASSERT_TRUE(made->state.is_success()) << made->log;
  const auto convert = [&](const std::string& model, const std::string& format, const std::string& group_size) {
    const auto run = RunProgram(
        "rankwise", {"convert", model, workspace, "--tp", "2", "--model-format", format, "--group-size", group_size});
    EXPECT_TRUE(run.ok()) << run.status();
    return run.ok() && !run->state.is_success() ? run->log : std::string();
  };
  EXPECT_THAT(convert(quantized, "hf", "128"), HasSubstr("--model-format hf, but " + quantized + " is of format awq"));
  EXPECT_THAT(convert(quantized, "awq", "64"), HasSubstr("--group-size 64, but " + quantized + " has groups of 128"));
  EXPECT_THAT(convert(DemoModel(), "hf", "128"), HasSubstr("is not quantised"));
  EXPECT_EQ(convert(quantized, "awq", "128"), "");
  std::vector<std::string> texts;
  for (const std::string& model : {quantized, workspace}) {
    const auto cluster = Serve({.model = model, .tp = 2, .kv = "int8-online"});
    ASSERT_TRUE(cluster.ok()) << cluster.status();
    const Reply reply = Generate((*cluster)->stub(), Greedy(kPrompt, 48));
    ExpectWhole(reply);
    texts.push_back(reply.text);
  }
  EXPECT_THAT(texts[0], Not(IsEmpty()));
  EXPECT_EQ(texts[0], texts[1]);
}

// The demo model in groups of 128; empty, and the test fails, when that does not work.
std::string QuantizedDemoModel(const std::string& bits) {
  const std::string quantized = ScratchFolder() + "/w" + bits;
  const auto made = RunProgram("rankwise", {"quantize", DemoModel(), quantized, "--bits", bits, "--group-size", "128"});
  if (made.ok() && made->state.is_success()) return quantized;
  ADD_FAILURE() << (made.ok() ? made->log : made.status().ToString());
  return "";
}

// `flag` of --activations means `activations` here.
void ExpectTheSameTokensOnOneAndTwoRanks(const std::string& model, const std::string& flag,
                                         const std::string& activations) {
  std::vector<std::vector<int32_t>> sampled;
  for (const int tp : {1, 2}) {
    const auto cluster = Serve({.model = model, .tp = tp, .kv = "f16", .worker_flags = {"--activations", flag}});
    ASSERT_TRUE(cluster.ok()) << cluster.status();
    const Reply reply = Generate((*cluster)->stub(), Sampled(kPrompt, 64, 7));
    ExpectWhole(reply);
    sampled.push_back(reply.ids);
    const auto status = RunProgram("rankwise", {"status", "--endpoint", (*cluster)->endpoint()});
    ASSERT_TRUE(status.ok()) << status.status();
    EXPECT_THAT(status->log, HasSubstr(absl::StrCat("tp ", tp, ", kv f16, ", activations, " activations, up to")));
  }
  EXPECT_THAT(sampled[0], Not(IsEmpty()));
  EXPECT_EQ(sampled[0], sampled[1]);
}

TEST(Activations, OfEightBitsGiveTheSameTokensOnOneAndTwoRanksAndAreNamed) {
  const std::string quantized = QuantizedDemoModel("8");
  ASSERT_NE(quantized, "");
  ExpectTheSameTokensOnOneAndTwoRanks(quantized, "auto", "int8");
}

TEST(Activations, OfBFloat16GiveTheSameTokensOnOneAndTwoRanksAndRefuseQuantisedWeights) {
  ExpectTheSameTokensOnOneAndTwoRanks(DemoModel(), "bf16", "bf16");
  const std::string quantized = QuantizedDemoModel("4");
  ASSERT_NE(quantized, "");
  const auto refused = RunProgram("rankwise", {"serve", quantized, "--activations", "bf16"});
  ASSERT_TRUE(refused.ok()) << refused.status();
  EXPECT_EQ(refused->state.code, 2);
  EXPECT_THAT(refused->log, HasSubstr("cannot serve " + quantized));
  EXPECT_THAT(refused->log, HasSubstr("activations bf16 are of f16 and bf16 weights, but these are int4: choose float "
                                      "or int8"));
}

class Requests : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    auto cluster = Serve({.tp = 2, .kv = "int8"});
    ASSERT_TRUE(cluster.ok()) << cluster.status();
    cluster_ = *std::move(cluster);
  }
  static void TearDownTestSuite() {
    if (!cluster_) return;
    const absl::Status drained = cluster_->Drain();
    EXPECT_TRUE(drained.ok()) << drained;
    cluster_.reset();
  }
  void SetUp() override { ASSERT_NE(cluster_, nullptr); }
  // Whatever a test did: nothing is held, and the next request is served.
  void TearDown() override {
    if (!cluster_) return;
    const absl::Status idle = WaitIdle(stub());
    EXPECT_TRUE(idle.ok()) << idle;
    ExpectWhole(Generate(stub(), Greedy(kPrompt, 4)));
    EXPECT_EQ(cluster_->failures(), 0);
  }
  static rankwise::v1::Inference::Stub& stub() { return cluster_->stub(); }
  static GenerateRequest Endless() {
    GenerateRequest request = Greedy(kPrompt, 900);
    request.mutable_sampling()->set_ignore_eos(true);
    return request;
  }

  static inline std::unique_ptr<launch::LocalCluster> cluster_;
};

TEST_F(Requests, StopAtAStringAtATokenAndAtALength) {
  const Reply whole = Generate(stub(), Greedy(kPrompt, 32));
  ExpectWhole(whole);
  EXPECT_EQ(whole.finish->reason(), rankwise::v1::FINISH_REASON_LENGTH);
  ASSERT_THAT(whole.ids, SizeIs(32));

  GenerateRequest request = Greedy(kPrompt, 32);
  const std::string stop = whole.text.substr(whole.text.size() / 2, 5);
  request.add_stop(stop);
  const Reply stopped = Generate(stub(), request);
  ASSERT_TRUE(stopped.finish);
  EXPECT_EQ(stopped.finish->reason(), rankwise::v1::FINISH_REASON_STOP);
  EXPECT_EQ(stopped.finish->matched_stop(), stop);
  EXPECT_EQ(stopped.text, whole.text.substr(0, whole.text.find(stop)));

  GenerateRequest by_token = Greedy(kPrompt, 32);
  by_token.mutable_sampling()->add_stop_token_ids(whole.ids[9]);
  const Reply token = Generate(stub(), by_token);
  ASSERT_TRUE(token.finish);
  EXPECT_EQ(token.finish->reason(), rankwise::v1::FINISH_REASON_STOP);
  EXPECT_EQ(token.finish->stop_token_id(), whole.ids[9]);
}

TEST_F(Requests, ACancelFreesTheBlocks) {
  const Reply reply = Generate(stub(), Endless(), {.should_cancel = [](const Reply& r) { return r.ids.size() >= 3; }});
  EXPECT_TRUE(absl::IsCancelled(reply.status)) << reply.status;
  EXPECT_LT(reply.ids.size(), 900u);
}

TEST_F(Requests, ADeadlineFreesTheBlocks) {
  // Of the call: the client sees gRPC's own error.
  const Reply call = Generate(stub(), Endless(), {.deadline = absl::Milliseconds(150)});
  EXPECT_TRUE(absl::IsDeadlineExceeded(call.status) || call.finish.has_value()) << call.status;
  // Of the request: the stream ends in good order.
  GenerateRequest request = Endless();
  request.set_timeout_ms(100);
  const Reply reply = Generate(stub(), request);
  ASSERT_TRUE(reply.status.ok()) << reply.status;
  ASSERT_TRUE(reply.finish);
  EXPECT_EQ(reply.finish->reason(), rankwise::v1::FINISH_REASON_DEADLINE);
}

TEST_F(Requests, AbortEndsTheStream) {
  GenerateRequest request = Endless();
  request.set_request_id("to-be-aborted");
  rankwise::v1::AbortRequest abort;
  abort.set_request_id("to-be-aborted");
  bool was_found = false;
  const Reply reply = Generate(stub(), request, {.should_cancel = [&](const Reply& r) {
                                 if (!was_found && r.ids.size() >= 2) {
                                   grpc::ClientContext context;
                                   rankwise::v1::AbortResponse response;
                                   was_found = stub().Abort(&context, abort, &response).ok() && response.found();
                                 }
                                 return false;
                               }});
  EXPECT_TRUE(was_found);
  ASSERT_TRUE(reply.finish);
  EXPECT_EQ(reply.finish->reason(), rankwise::v1::FINISH_REASON_CANCELLED);
}

TEST_F(Requests, BadOnesAreRefusedInWords) {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  struct Case {
    const char* word;  // of the message
    std::function<void(GenerateRequest&)> change;
  };
  const Case cases[] = {
      {"temperature", [](auto& r) { r.mutable_sampling()->set_temperature(kNan); }},
      {"temperature", [](auto& r) { r.mutable_sampling()->set_temperature(-1); }},
      {"top_p", [](auto& r) { r.mutable_sampling()->set_top_p(0); }},
      {"top_p", [](auto& r) { r.mutable_sampling()->set_top_p(kNan); }},
      {"min_p", [](auto& r) { r.mutable_sampling()->set_min_p(1.5f); }},
      {"repetition_penalty", [](auto& r) { r.mutable_sampling()->set_repetition_penalty(0); }},
      {"frequency_penalty", [](auto& r) { r.mutable_sampling()->set_frequency_penalty(kNan); }},
      {"presence_penalty", [](auto& r) { r.mutable_sampling()->set_presence_penalty(3); }},
      {"logit_bias", [](auto& r) { (*r.mutable_sampling()->mutable_logit_bias())[5] = kNan; }},
      {"logit_bias", [](auto& r) { (*r.mutable_sampling()->mutable_logit_bias())[1 << 30] = 1; }},
      {"logprobs", [](auto& r) { r.mutable_sampling()->set_logprobs(21); }},
      {"max_tokens", [](auto& r) { r.mutable_sampling()->set_max_tokens(1u << 30); }},
      {"min_tokens", [](auto& r) { r.mutable_sampling()->set_min_tokens(100); }},
      {"n", [](auto& r) { r.set_n(65); }},
      {"stop",
       [](auto& r) {
         for (int i = 0; i < 17; ++i) r.add_stop("x");
       }},
      {"stop", [](auto& r) { r.add_stop(std::string(257, 'x')); }},
      {"priority", [](auto& r) { r.set_priority(101); }},
      {"tenant", [](auto& r) { r.set_tenant(std::string(129, 'x')); }},
      {"request_id", [](auto& r) { r.set_request_id(std::string(129, 'x')); }},
      {"prompt", [](auto& r) { r.clear_prompt(); }},
      {"token", [](auto& r) { r.mutable_token_ids()->add_ids(-1); }},
      {"token", [](auto& r) { r.mutable_token_ids()->add_ids(1 << 30); }},
      {"tokens", [](auto& r) { r.mutable_token_ids()->mutable_ids()->Resize(1'000'000, 5); }},
  };
  for (const Case& bad : cases) {
    GenerateRequest request = Greedy(kPrompt, 8);
    bad.change(request);
    const Reply reply = Generate(stub(), request);
    EXPECT_TRUE(absl::IsInvalidArgument(reply.status)) << bad.word << ": " << reply.status;
    EXPECT_THAT(std::string(reply.status.message()), HasSubstr(bad.word));
    EXPECT_THAT(reply.ids, IsEmpty());
  }
}

TEST_F(Requests, TextThatIsNotUtf8IsRefused) {
  GenerateRequest request = Greedy("", 8);
  request.set_text("Once \xff\xfe upon");
  const Reply reply = Generate(stub(), request);
  EXPECT_FALSE(reply.status.ok());
  EXPECT_FALSE(absl::IsUnavailable(reply.status)) << reply.status;
}

TEST_F(Requests, ModelAndLoadAreReported) {
  grpc::ClientContext context;
  rankwise::v1::GetModelInfoResponse model;
  ASSERT_TRUE(stub().GetModelInfo(&context, {}, &model).ok());
  EXPECT_EQ(model.family(), "llama");
  EXPECT_EQ(model.tp(), 2u);
  EXPECT_EQ(model.kv_format(), "int8");
  EXPECT_THAT(model.kv_scales_id(), SizeIs(16));
  const auto load = Load(stub());
  ASSERT_TRUE(load.ok());
  ASSERT_EQ(load->groups_size(), 1);
  EXPECT_EQ(load->groups(0).ranks_size(), 2);
  for (const auto& rank : load->groups(0).ranks()) {
    EXPECT_TRUE(IsRunning(static_cast<int64_t>(rank.pid())));
    EXPECT_GT(rank.kv_bytes(), 0u);
  }
}

TEST_F(Requests, TheCommandLineStreamsTheSameText) {
  const std::string endpoint = cluster_->endpoint();
  const Reply reply = Generate(stub(), Greedy(kPrompt, 24));
  const auto text =
      RunProgram("rankwise", {"generate", "--endpoint", endpoint, "--max-tokens", "24", "--temperature", "0", kPrompt});
  ASSERT_TRUE(text.ok()) << text.status();
  EXPECT_TRUE(text->state.is_success()) << text->log;
  EXPECT_THAT(text->log, HasSubstr("[24 tokens, "));
  const auto json = RunProgram(
      "rankwise", {"generate", "--endpoint", endpoint, "--max-tokens", "24", "--temperature", "0", "--json", kPrompt});
  ASSERT_TRUE(json.ok()) << json.status();
  std::string joined;
  for (const auto line : absl::StrSplit(json->log, '\n')) {
    const auto piece = nlohmann::json::parse(line, nullptr, false);
    if (piece.is_object()) joined += piece.value("text", "");
  }
  EXPECT_EQ(joined, reply.text);
  const auto status = RunProgram("rankwise", {"status", "--endpoint", endpoint});
  ASSERT_TRUE(status.ok()) << status.status();
  EXPECT_THAT(status->log, HasSubstr("tp 2, kv int8"));
  const auto refused = RunProgram("rankwise", {"generate", "--endpoint", endpoint, "--top-p", "7", kPrompt});
  ASSERT_TRUE(refused.ok());
  EXPECT_EQ(refused->state.code, 2);
  EXPECT_THAT(refused->log, HasSubstr("top_p=7"));
}

TEST_F(Requests, CtrlCCancelsTheCommandLine) {
  auto child =
      launch::ChildProcess::Start({.command = {ProgramFolder() + "/rankwise", "generate", "--endpoint",
                                               cluster_->endpoint(), "--max-tokens", "900", "--ignore-eos", kPrompt},
                                   .log_path = ScratchFolder() + "/ctrl-c.log"});
  ASSERT_TRUE(child.ok()) << child.status();
  while ((*child)->LogTail().empty()) ASSERT_FALSE((*child)->Wait(absl::Now() + absl::Milliseconds(1)));
  (*child)->Signal(SIGINT);
  const auto state = (*child)->Wait(absl::Now() + kPatience);
  ASSERT_TRUE(state);
  EXPECT_EQ(state->code, 130) << (*child)->LogTail();
}

TEST_F(Requests, OverloadIsRefusedAtOnce) {
  const auto small = Serve({.coordinator_flags = {"--max-live", "2"}});
  ASSERT_TRUE(small.ok()) << small.status();
  std::vector<std::thread> threads;
  std::atomic<int> refused = 0, cancelled = 0;
  for (int i = 0; i < 6; ++i)
    threads.emplace_back([&] {
      const Reply reply =
          Generate((*small)->stub(), Endless(), {.should_cancel = [&](const Reply&) { return refused == 4; }});
      if (absl::IsResourceExhausted(reply.status)) ++refused;
      if (absl::IsCancelled(reply.status)) ++cancelled;
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(refused, 4);
  EXPECT_TRUE(WaitIdle((*small)->stub()).ok());
}

// Layers 1 and 3 of rank 1 get scales half as wide as their values: those layers of that rank clamp, and the load and
// `rankwise status` say so.
TEST(Saturation, IsCountedPerLayerAndRankAndShownInWords) {
  const auto file = DemoStatistics();
  ASSERT_TRUE(file.ok()) << file.status();
  auto statistics = kv::ReadKvStatistics(*file);
  ASSERT_TRUE(statistics.ok()) << statistics.status();
  statistics->k_histogram.clear();
  statistics->v_histogram.clear();
  const int64_t channels = int64_t{statistics->n_kv_heads} * statistics->head_dim;
  for (int layer = 0; layer < statistics->n_layers; ++layer) {
    for (int64_t i = layer * channels; i < (layer + 1) * channels; ++i) {
      const bool is_narrow = layer % 2 == 1 && i - layer * channels >= channels / 2;
      for (auto* values : {&statistics->k_min, &statistics->k_max, &statistics->v_min, &statistics->v_max})
        (*values)[i] *= is_narrow ? 0.5f : 2.0f;
    }
  }
  const std::string scales = ScratchFolder() + "/narrow";
  std::filesystem::create_directories(scales);
  ASSERT_EQ(kv::WriteKvScales(scales, *statistics, 2, kv::Granularity::kHead), absl::OkStatus());
  const auto cluster = Serve({.tp = 2, .kv = "int8-head", .kv_scales = scales});
  ASSERT_TRUE(cluster.ok()) << cluster.status();
  const std::string endpoint = (*cluster)->endpoint();
  const auto before = RunProgram("rankwise", {"status", "--endpoint", endpoint});
  ASSERT_TRUE(before.ok()) << before.status();
  EXPECT_THAT(before->log, Not(HasSubstr("out of the cache format's range")));

  ExpectWhole(Generate((*cluster)->stub(), Greedy(kPrompt, 64)));
  rankwise::v1::GetLoadResponse load;
  const absl::Time give_up = absl::Now() + kPatience;  // ranks report every few seconds
  do {
    absl::SleepFor(absl::Milliseconds(50));
    auto polled = Load((*cluster)->stub());
    ASSERT_TRUE(polled.ok()) << polled.status();
    load = *std::move(polled);
  } while (load.groups(0).ranks(1).saturated_values() == 0 && absl::Now() < give_up);
  ASSERT_THAT(load.groups(0).ranks(), SizeIs(2));
  const auto &first = load.groups(0).ranks(0), &second = load.groups(0).ranks(1);
  EXPECT_THAT(first.saturated_by_layer(), ::testing::ElementsAre(0, 0, 0, 0));
  using ::testing::Gt;
  EXPECT_THAT(second.saturated_by_layer(), ::testing::ElementsAre(0, Gt(0u), 0, Gt(0u)));
  EXPECT_EQ(second.saturated_values(), second.saturated_by_layer(1) + second.saturated_by_layer(3));
  const auto status = RunProgram("rankwise", {"status", "--endpoint", endpoint});
  ASSERT_TRUE(status.ok()) << status.status();
  EXPECT_THAT(status->log, ::testing::ContainsRegex("group 1, rank 1: [0-9]+ K and V values were out of the cache "
                                                    "format's range and stored at its end: [0-9]+ in layer 1, "
                                                    "[0-9]+ in layer 3"));
  EXPECT_THAT(status->log, Not(HasSubstr("rank 0: ")));
}

}  // namespace
}  // namespace rankwise::e2e
