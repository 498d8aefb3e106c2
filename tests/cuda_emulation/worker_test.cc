// The whole worker on the emulated GPU, ranks as threads: what it generates, against the CPU backend.

#include <gtest/gtest.h>

#include <array>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "kernels/cuda/cuda_backend.h"
#include "tests/cuda_emulation/emulator.h"
#include "tests/support/test_data.h"
#include "tests/support/thread_group.h"
#include "tests/support/wide_scales.h"

namespace rankwise::testing {
namespace {

using engine::Request;
using engine::SequenceId;

engine::RankOptions DemoOptions(const std::string& kv) {
  engine::RankOptions options;
  options.model_dir = SourcePath("launch/demo_model");
  options.kv = kv;
  options.max_tokens = 128;
  options.max_running = 4;
  options.max_step_rows = 32;
  return options;
}

std::unique_ptr<ThreadGroup> StartOnCuda(const engine::RankOptions& options, int tp,
                                         const kernels::CudaOptions& cuda = {}) {
  auto group = ThreadGroup::Start(options, tp, [&cuda](int) { return kernels::CreateCudaBackend(cuda); });
  RW_CHECK(group.ok(), group.status().ToString());
  return *std::move(group);
}

class CudaWorkerTest : public ::testing::TestWithParam<const char*> {
 protected:
  engine::RankOptions Options(int tp) const {
    engine::RankOptions options = DemoOptions(GetParam());
    options.kv_scales_dir = scales_.FolderOf(tp);
    options.max_chunk_rows = 24;
    return options;
  }

  // Greedy, of several chunks, a few tokens and one.
  static std::vector<Request> Requests() {
    std::vector<Request> requests;
    for (const int length : {37, 6, 1}) {
      Request request{.id = SequenceId{requests.size() + 1}};
      for (int t = 0; t < length; ++t) request.prompt.push_back(3 + (t * 97 + length * 31) % 2000);
      request.sampling = {.max_tokens = 6, .temperature = 0, .ignore_eos = true, .logprobs = 2};
      requests.push_back(std::move(request));
    }
    return requests;
  }

  std::map<SequenceId, Result> OnCpu(int tp, kernels::Activations activations) const {
    const auto make = [activations](int) {
      return kernels::CreateCpuBackend({.threads = 1, .pin_threads = false, .activations = activations});
    };
    auto group = ThreadGroup::Start(Options(tp), tp, make);
    EXPECT_TRUE(group.ok()) << group.status();
    return RunAll((*group)->engine(), Requests());
  }
  std::map<SequenceId, Result> OnCuda(int tp, kernels::Activations activations) const {
    return RunAll(StartOnCuda(Options(tp), tp, {.activations = activations})->engine(), Requests());
  }

  // Sums differ in their last bits; where K or V, or what is rounded to bf16, lie that near to a rounding they are
  // stored a step apart, so that such formats differ by more than f32 does. Where the two likeliest tokens are that
  // near to each other, texts may part. Returns the tokens at tp 1 and 2.
  std::array<std::vector<int32_t>, 2> ExpectWhatTheCpuGenerates(kernels::Activations activations, double bound) const {
    constexpr size_t kLogprobs = 3;  // of a token, and of the two likeliest
    double worst = 0;
    size_t alike = 0;
    std::array<std::vector<int32_t>, 2> tokens;
    for (const int tp : {1, 2}) {
      const auto expected = OnCpu(tp, activations), results = OnCuda(tp, activations);
      for (const auto& [id, result] : results) {
        const Result& other = expected.at(id);
        EXPECT_EQ(result.error, absl::OkStatus());
        EXPECT_EQ(result.tokens.size(), other.tokens.size());
        EXPECT_EQ(result.logprobs.size(), kLogprobs * result.tokens.size());
        EXPECT_EQ(other.logprobs.size(), result.logprobs.size());
        if (::testing::Test::HasFailure()) return tokens;
        auto& all = tokens[tp - 1];
        all.insert(all.end(), result.tokens.begin(), result.tokens.end());
        for (size_t i = 0; i < result.tokens.size(); ++i) {
          const float *logprobs = &result.logprobs[kLogprobs * i], *others = &other.logprobs[kLogprobs * i];
          for (size_t j = 0; j < kLogprobs; ++j) worst = std::max<double>(worst, std::fabs(logprobs[j] - others[j]));
          if (result.tokens[i] != other.tokens[i]) {
            EXPECT_LE(others[1] - others[2], 2 * bound) << "tp " << tp << ", token " << i;
            break;
          }
          ++alike;
        }
      }
    }
    EXPECT_GE(alike, 30u);  // of 36
    EXPECT_LE(worst, bound);
    RecordProperty("worst_logprob_difference", std::to_string(worst));
    return tokens;
  }

  const WideScales scales_{{1, 2}};
};

TEST_P(CudaWorkerTest, GeneratesWhatTheCpuDoesAtTp1And2) {
  ExpectWhatTheCpuGenerates(kernels::Activations::kFloat, std::string(GetParam()) == "f32" ? 1e-4 : 2e-2);
}

// Whatever shares a step, and however a prompt is cut into chunks.
class CudaWorkerBatchTest : public CudaWorkerTest {
 protected:
  void ExpectAloneIsAsInABatch(const kernels::CudaOptions& cuda) const {
    const auto batched = RunAll(StartOnCuda(Options(1), 1, cuda)->engine(), Requests());
    auto options = Options(1);
    options.max_chunk_rows = 7;
    const auto group = StartOnCuda(options, 1, cuda);
    EXPECT_EQ(group->rank().decoder->activations(), cuda.activations);
    for (const Request& request : Requests()) {
      EXPECT_EQ(RunAlone(group->engine(), request), batched.at(request.id));
    }
  }
};
TEST_P(CudaWorkerBatchTest, AloneOrInABatchIsTheSameToTheBit) { ExpectAloneIsAsInABatch({}); }

class CudaBFloat16Test : public CudaWorkerBatchTest {};
TEST_P(CudaBFloat16Test, AloneOrInABatchIsTheSameToTheBit) {
  ExpectAloneIsAsInABatch({.activations = kernels::Activations::kBF16});
}

TEST_P(CudaBFloat16Test, GeneratesWhatTheCpuDoesAndTheSameAtTp1And2) {
  const auto tokens = ExpectWhatTheCpuGenerates(kernels::Activations::kBF16, 1e-2);
  EXPECT_EQ(tokens[0], tokens[1]);
}

TEST(CudaBackendTest, HasNoInt8Activations) {
  EXPECT_EQ(kernels::CreateCudaBackend({.activations = kernels::Activations::kInt8}).status(),
            absl::InvalidArgumentError("activations int8 are of the CPU backend"));
}

// Without log-probabilities the GPU draws, and tokens alone come to the host: the same ones.
TEST(CudaDrawTest, TokensAreDrawnWhereTheLogitsAre) {
  engine::RankOptions options = DemoOptions("f16");
  options.max_drafts = 0;
  const std::vector<std::vector<int32_t>> prompts = {{3, 20, 7}, {104, 20, 8}, {205, 20, 9}, {306, 20, 10}};
  const auto sampled = RequestsOfAllDraws(prompts, /*logprobs=*/0), drawn = RequestsOfAllDraws(prompts, -1);
  const auto group = StartOnCuda(options, 1);
  const auto expected = RunAll(group->engine(), sampled);
  const int64_t before = cuda_emulation::BytesToHost();
  const auto results = RunAll(group->engine(), drawn);
  EXPECT_EQ(cuda_emulation::BytesToHost() - before, 4 * 5 * sizeof(int32_t));
  for (const auto& [id, result] : results) EXPECT_EQ(result.tokens, expected.at(id).tokens);
}

// Nobody is told that tokens have come which a late GPU has yet to draw and to send.
TEST(CudaDrawTest, TokensHaveComeWhenTheyAreThere) {
  constexpr int32_t kVocab = 50;
  const auto made = kernels::CreateCudaBackend({});
  ASSERT_TRUE(made.ok()) << made.status();
  kernels::Backend& backend = **made;
  std::vector<float> host(kVocab);
  host[7] = 1;
  const kernels::Backend::Floats logits = *backend.Allocate(kVocab);
  ASSERT_EQ(backend.CopyToDevice(host, logits.get()), absl::OkStatus());
  const std::unique_ptr<kernels::DrawnTokens> drawn = *backend.CreateDrawnTokens(1);
  const std::vector<kernels::DrawRule> greedy = {{.temperature = 0}};
  cuda_emulation::SetStreamsLate(true);
  for (int round = 0; round < 2; ++round) {
    ASSERT_EQ(drawn->Draw(0, logits.get(), greedy, kVocab), absl::OkStatus());
    ASSERT_EQ(drawn->Send(1), absl::OkStatus());
    EXPECT_FALSE(*drawn->HasCome());
    if (round == 0) {
      while (!*drawn->HasCome()) {
      }
    }
    const auto taken = drawn->Take();
    ASSERT_EQ(taken.status(), absl::OkStatus());
    EXPECT_EQ(std::vector(taken->begin(), taken->end()), std::vector{7});
    EXPECT_TRUE(*drawn->HasCome());
  }
  cuda_emulation::SetStreamsLate(false);
}

// Whatever a step needs beside weights and cache: rows of prompts, of decoding sequences and of drafts alike.
TEST(CudaPlanTest, AStepIsOneCopyToTheDevice) {
  engine::RankOptions options;
  options.model_dir = SourcePath("launch/demo_model");
  options.kv = "f16";
  options.max_tokens = 64;
  options.max_running = 2;
  options.max_chunk_rows = 16;
  auto group = ThreadGroup::Start(options, 1, [](int) { return kernels::CreateCudaBackend({}); });
  ASSERT_TRUE(group.ok()) << group.status();
  std::vector<Request> requests;
  for (const int length : {40, 5}) {
    Request request{.id = SequenceId{requests.size() + 1}};
    for (int t = 0; t < length; ++t) request.prompt.push_back(3 + t % 7);
    request.sampling = {.max_tokens = 8, .temperature = 0, .ignore_eos = true};
    if (length == 40) request.sampling.logit_bias = {{5, 100.0f}};  // repeats itself
    requests.push_back(std::move(request));
  }
  const int64_t before = cuda_emulation::CopiesToDevice();
  RunAll((*group)->engine(), requests);
  EXPECT_GT((*group)->engine().scheduler().load().drafted_tokens, 0);
  EXPECT_EQ(cuda_emulation::CopiesToDevice() - before, (*group)->engine().counters().steps);
}

// Recorded steps do what issued ones do, also when a batch shrinks.
TEST(CudaGraphTest, RecordedOrIssuedIsTheSameToTheBit) {
  std::vector<Request> requests;
  for (const int length : {30, 3, 9}) {
    Request request{.id = SequenceId{requests.size() + 1}};
    for (int t = 0; t < length; ++t) request.prompt.push_back(3 + (t * 89 + length) % 2000);
    request.sampling = {.max_tokens = length == 9 ? 5 : 10, .temperature = 0, .ignore_eos = true, .logprobs = 1};
    requests.push_back(std::move(request));
  }
  std::map<SequenceId, Result> results[2];
  int64_t launches[2];
  for (const bool records : {false, true}) {
    const auto group = StartOnCuda(DemoOptions("int8-online"), 1, {.records_steps = records});
    const int64_t before = cuda_emulation::GraphLaunches();
    results[records] = RunAll(group->engine(), requests);
    launches[records] = cuda_emulation::GraphLaunches() - before;
  }
  EXPECT_EQ(results[0], results[1]);
  EXPECT_EQ(launches[0], 0);
  EXPECT_GE(launches[1], 4);
}

// The first steps of a model of two layers, as a profiler shows them.
TEST(CudaProfilerTest, ShowsStepsLayersAndOps) {
  engine::RankOptions options = DemoOptions("f16");
  options.max_drafts = 0;
  const auto group = StartOnCuda(options, 1);
  const Request request{
      .id = SequenceId{1}, .prompt = {5, 6, 7}, .sampling = {.max_tokens = 4, .temperature = 0, .ignore_eos = true}};
  cuda_emulation::TakeRanges();
  RunAlone(group->engine(), request);
  const std::vector<std::string> ranges = cuda_emulation::TakeRanges();
  std::vector<std::string> of_prompt = {"", "/Embed", "/RmsNorm"};
  for (int layer = 0; layer < group->rank().decoder->config().n_layers; ++layer) {
    for (const char* op : {"", "/MatMul", "/RopeAppend", "/Attention", "/MatMul", "/RmsNorm", "/MatMul", "/SiluMul",
                           "/MatMul", "/RmsNorm"}) {
      of_prompt.push_back(absl::StrCat("/layer ", layer, op));
    }
  }
  for (const char* op : {"/PickRows", "/MatMul", "/Draw"}) of_prompt.push_back(op);
  for (std::string& name : of_prompt) name = absl::StrCat("step 1, 3 rows", name);
  ASSERT_GT(ranges.size(), of_prompt.size());
  EXPECT_EQ(std::vector(ranges.begin(), ranges.begin() + std::ssize(of_prompt)), of_prompt);
  EXPECT_EQ(std::vector(ranges.end() - 5, ranges.end()),
            (std::vector<std::string>{"step 4, 1 rows", "step 4, 1 rows/Embed", "step 4, 1 rows/PickRows",
                                      "step 4, 1 rows/MatMul", "step 4, 1 rows/Draw"}));
  EXPECT_EQ(cuda_emulation::LeaveRange(), -1) << "all are left";
}

std::string NameOf(const ::testing::TestParamInfo<const char*>& info) {
  std::string name = info.param;
  std::erase(name, '-');
  return name;
}
INSTANTIATE_TEST_SUITE_P(KvFormats, CudaWorkerTest,
                         ::testing::Values("f32", "f16", "int8", "int8-head", "int8-channel", "int8-online",
                                           "int4-online"),
                         NameOf);
INSTANTIATE_TEST_SUITE_P(KvFormats, CudaWorkerBatchTest, ::testing::Values("f16", "int8", "int4-online"), NameOf);
INSTANTIATE_TEST_SUITE_P(KvFormats, CudaBFloat16Test, ::testing::Values("f16"), NameOf);

}  // namespace
}  // namespace rankwise::testing
