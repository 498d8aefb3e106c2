// The tokens of a request are a pure function of weights, KV format, activations, prompt and sampling. Everything else
// is varied here and compared with `==`: tokens, and the bits of their log-probabilities.

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <random>

#include "absl/strings/str_cat.h"
#include "tests/support/test_data.h"
#include "tests/support/thread_group.h"
#include "tests/support/wide_scales.h"
#include "worker/weights/quantize.h"

namespace rankwise::testing {
namespace {

using engine::Request;
using engine::SequenceId;

struct Numbers {
  const char* kv;
  int bits = 0;  // of quantised weights; 0: the model's f16
  kernels::Activations activations = kernels::Activations::kFloat;
};

std::string NameOf(const Numbers& numbers) {
  std::string name = numbers.kv;
  std::erase(name, '-');
  if (numbers.bits > 0) absl::StrAppend(&name, "W", numbers.bits);
  switch (numbers.activations) {
    case kernels::Activations::kFloat:
      return name;
    case kernels::Activations::kInt8:
      return name + "A8";
    case kernels::Activations::kBF16:
      return name + "ABF16";
  }
  return name;
}
void PrintTo(const Numbers& numbers, std::ostream* out) { *out << NameOf(numbers); }

class InvarianceTest : public ::testing::TestWithParam<Numbers> {
 protected:
  static void TearDownTestSuite() { std::filesystem::remove_all(Folder()); }
  static std::string Folder() { return absl::StrCat(::testing::TempDir(), "invariance_", getpid()); }

  // Groups of 128: at tp 4 a rank's slice of wo begins within one.
  static std::string Model(int bits) {
    if (bits == 0) return SourcePath("launch/demo_model");
    const std::string folder = absl::StrCat(Folder(), "/", bits);
    if (!std::filesystem::exists(folder)) {
      std::filesystem::create_directories(Folder());
      EXPECT_EQ(weights::WriteQuantized(Model(0), folder, {.bits = bits}, {}), absl::OkStatus());
    }
    return folder;
  }

  engine::RankOptions Options(int tp = 1) const {
    engine::RankOptions options;
    options.model_dir = Model(GetParam().bits);
    options.kv = GetParam().kv;
    options.kv_scales_dir = scales_.FolderOf(tp);
    options.max_tokens = 256;
    options.max_running = 16;
    options.max_step_rows = 256;
    options.has_prefix_cache = false;
    return options;
  }

  static std::unique_ptr<ThreadGroup> Start(const engine::RankOptions& options, int tp = 1, int threads = 1) {
    auto group = ThreadGroup::Start(options, tp, [threads](int) {
      return kernels::CreateCpuBackend(
          {.threads = threads, .pin_threads = false, .activations = GetParam().activations});
    });
    EXPECT_TRUE(group.ok()) << group.status();
    if (!group.ok()) return nullptr;
    EXPECT_EQ((*group)->rank().decoder->activations(), GetParam().activations);
    return *std::move(group);
  }

  // Sixteen requests of mixed lengths, half greedy, half sampled with every knob turned.
  static std::vector<Request> Requests() {
    std::mt19937_64 random(7);
    std::vector<Request> requests;
    for (int i = 0; i < 16; ++i) {
      Request request{.id = SequenceId{static_cast<uint64_t>(i + 1)}};
      const int length = 1 + static_cast<int>(random() % 90);
      for (int t = 0; t < length; ++t) request.prompt.push_back(3 + static_cast<int32_t>(random() % 2000));
      request.sampling = {.max_tokens = 24, .temperature = 0, .ignore_eos = true, .logprobs = 3};
      if (i % 2 == 1) {
        request.sampling.temperature = 0.9f;
        request.sampling.top_p = 0.95f;
        request.sampling.top_k = 50;
        request.sampling.repetition_penalty = 1.1f;
        request.sampling.presence_penalty = 0.2f;
        request.sampling.seed = random();
      }
      if (i % 5 == 0) request.sampling.prompt_logprobs = 2;
      requests.push_back(std::move(request));
    }
    return requests;
  }

  // Each request alone in a group that guesses nothing.
  std::map<SequenceId, Result> Alone() const {
    std::map<SequenceId, Result> results;
    engine::RankOptions options = Options();
    options.max_drafts = 0;
    const auto group = Start(options);
    for (const Request& request : Requests()) results[request.id] = RunAlone(group->engine(), request);
    return results;
  }

  const WideScales scales_{{1, 2, 4}, Model(GetParam().bits)};
};

TEST_P(InvarianceTest, AloneOrInABatchWithRandomArrivals) {
  const auto expected = Alone();
  for (const uint64_t seed : {1, 2, 3}) {
    const auto group = Start(Options());
    engine::Engine& engine = group->engine();
    std::mt19937_64 random(seed);
    std::vector<Request> waiting = Requests();
    std::ranges::shuffle(waiting, random);
    std::map<SequenceId, Result> results;
    while (!waiting.empty() || engine.has_work()) {
      while (!waiting.empty() && random() % 3 != 0) {
        ASSERT_EQ(engine.Submit(waiting.back()), absl::OkStatus());
        waiting.pop_back();
      }
      auto outputs = engine.Step();
      ASSERT_TRUE(outputs.ok());
      Collect(*outputs, results);
    }
    EXPECT_EQ(results, expected) << "seed " << seed;
  }
}

TEST_P(InvarianceTest, AnyChunkSizeAndThreadCount) {
  const auto expected = Alone();
  for (const int chunk : {1, 7, 64, 256}) {
    engine::RankOptions options = Options();
    options.max_chunk_rows = chunk;
    const auto group = Start(options, 1, chunk == 7 ? 3 : 2);
    EXPECT_EQ(RunAll(group->engine(), Requests()), expected) << "chunks of " << chunk;
  }
}

TEST_P(InvarianceTest, PreemptedOrNot) {
  const auto expected = Alone();
  const auto group = Start(Options());
  engine::Engine& engine = group->engine();
  std::map<SequenceId, Result> results;
  for (const Request& request : Requests()) ASSERT_EQ(engine.Submit(request), absl::OkStatus());
  std::mt19937_64 random(11);
  for (int step = 0; engine.has_work(); ++step) {
    if (step < 60) engine.Preempt(SequenceId{1 + random() % 16});
    auto outputs = engine.Step();
    ASSERT_TRUE(outputs.ok());
    Collect(*outputs, results);
  }
  EXPECT_EQ(results, expected);
  EXPECT_GT(engine.scheduler().load().preemptions, 10);
}

TEST_P(InvarianceTest, PreemptedForWantOfMemory) {
  const auto expected = Alone();
  engine::RankOptions options = Options();
  const auto probe = Start(options);
  const int64_t block_bytes = probe->rank().decoder->kv_pool().bytes() / probe->rank().scheduler_options.block_count;
  options.kv_memory_bytes = 14 * block_bytes;
  const auto group = Start(options);
  EXPECT_EQ(RunAll(group->engine(), Requests()), expected);
  EXPECT_GT(group->engine().scheduler().load().preemptions, 0);
}

TEST_P(InvarianceTest, PrefixCachedOrNot) {
  std::vector<Request> requests = Requests();
  // All share the first prompt's beginning, then differ.
  Request longest = requests[0];
  while (longest.prompt.size() < 120) longest.prompt.push_back(5 + static_cast<int32_t>(longest.prompt.size()));
  for (Request& request : requests) {
    request.prompt.insert(request.prompt.begin(), longest.prompt.begin(), longest.prompt.end());
    request.sampling.prompt_logprobs = -1;
  }
  engine::RankOptions options = Options();
  std::map<SequenceId, Result> expected;
  {
    const auto group = Start(options);
    for (const Request& request : requests) expected[request.id] = RunAlone(group->engine(), request);
  }
  options.has_prefix_cache = true;
  const auto group = Start(options);
  std::map<SequenceId, Result> results;
  int64_t cached = 0;
  for (const Request& request : requests) {
    results[request.id] = RunAlone(group->engine(), request);
    cached += results[request.id].cached_prompt_tokens;
  }
  EXPECT_EQ(results, expected);
  EXPECT_GE(cached, 15 * 112);
}

TEST_P(InvarianceTest, ReplayedFromAnyToken) {
  const auto expected = Alone();
  const auto group = Start(Options());
  for (const Request& request : Requests()) {
    for (const int delivered : {1, 2, 13, 23}) {
      Request replay = request;
      const Result& whole = expected.at(request.id);
      replay.generated.assign(whole.tokens.begin(), whole.tokens.begin() + delivered);
      const Result result = RunAlone(group->engine(), replay);
      EXPECT_EQ(result.tokens, whole.tokens) << "replayed from token " << delivered;
      const std::vector<float> tail(whole.logprobs.begin() + delivered * 4, whole.logprobs.end());
      EXPECT_EQ(result.logprobs, tail);
    }
  }
}

// With log-probabilities the host samples from logits that were copied to it; without, the backend draws.
TEST_P(InvarianceTest, DrawnByTheBackendOrSampledOnTheHost) {
  std::vector<Request> sampled = Requests(), drawn;
  for (Request& request : sampled) {
    request.sampling.repetition_penalty = 1;
    request.sampling.presence_penalty = 0;
    drawn.push_back(request);
    drawn.back().sampling.logprobs = -1;
  }
  const auto expected = RunAll(Start(Options())->engine(), sampled);
  for (const int tp : {1, 2}) {
    if (tp > 1 && std::string(GetParam().kv) == "int8") continue;
    const auto group = Start(Options(tp), tp, 2);
    for (const auto& [id, result] : RunAll(group->engine(), drawn)) {
      EXPECT_EQ(result.tokens, expected.at(id).tokens);
      EXPECT_EQ(result.prompt_logprobs, expected.at(id).prompt_logprobs);
    }
  }
}

TEST_P(InvarianceTest, AnyTensorParallelDegree) {
  if (std::string(GetParam().kv) == "int8") GTEST_SKIP() << "scales per rank differ with the degree by their nature";
  const auto expected = Alone();
  for (const int tp : {1, 2, 4}) {
    const auto group = Start(Options(tp), tp);
    EXPECT_EQ(RunAll(group->engine(), Requests()), expected) << "tp " << tp;
  }
}

INSTANTIATE_TEST_SUITE_P(Numbers, InvarianceTest,
                         ::testing::Values(Numbers{"f32"}, Numbers{"f16"}, Numbers{"int8"}, Numbers{"int8-head"},
                                           Numbers{"int8-channel"}, Numbers{"int8-online"}, Numbers{"int4-online"},
                                           Numbers{"f16", 4, kernels::Activations::kInt8},
                                           Numbers{"int8-head", 8, kernels::Activations::kInt8},
                                           Numbers{"f16", 0, kernels::Activations::kBF16},
                                           Numbers{"int8-head", 0, kernels::Activations::kBF16}),
                         [](const auto& info) { return NameOf(info.param); });

}  // namespace
}  // namespace rankwise::testing
