// Guessing tokens changes when they come, and nothing else: with and without speculation the same tokens, the same bits
// of their log-probabilities, the same prefixes in the cache.

#include <gtest/gtest.h>

#include <random>

#include "tests/support/test_data.h"
#include "tests/support/thread_group.h"
#include "tests/support/wide_scales.h"

namespace rankwise::testing {
namespace {

using engine::FinishReason;
using engine::Request;
using engine::SequenceId;

constexpr int kContext = 160;

class SpeculationTest : public ::testing::TestWithParam<const char*> {
 protected:
  engine::RankOptions Options(int max_drafts, int tp = 1) const {
    engine::RankOptions options;
    options.model_dir = SourcePath("launch/demo_model");
    options.kv = GetParam();
    options.kv_scales_dir = scales_.FolderOf(tp);
    options.max_tokens = kContext;
    options.max_running = 8;
    options.max_step_rows = 64;
    options.max_drafts = max_drafts;
    return options;
  }

  static std::unique_ptr<ThreadGroup> Start(const engine::RankOptions& options, int tp = 1) {
    auto group = ThreadGroup::Start(options, tp);
    EXPECT_TRUE(group.ok()) << group.status();
    return group.ok() ? *std::move(group) : nullptr;
  }

  // Prompts that say a few things again and again, sampled in every way, two samples of each.
  static std::vector<Request> Requests(uint64_t seed, int prompt_count = 6) {
    std::mt19937_64 random(seed);
    const auto below = [&](int n) { return static_cast<int>(random() % n); };
    std::vector<Request> requests;
    for (int p = 0; p < prompt_count; ++p) {
      std::vector<std::vector<int32_t>> pieces(3);
      for (auto& piece : pieces) {
        for (int t = 1 + below(9); t > 0; --t) piece.push_back(3 + below(2000));
      }
      Request request;
      while (static_cast<int>(request.prompt.size()) < 12 + 12 * p) {
        const auto& piece = pieces[below(3)];
        request.prompt.insert(request.prompt.end(), piece.begin(), piece.end());
      }
      request.sampling = {.max_tokens = 20 + below(30), .temperature = 0, .ignore_eos = true, .logprobs = 2};
      if (p % 3 == 1) {
        request.sampling.temperature = 0.4f;
        request.sampling.top_p = 0.9f;
        request.sampling.seed = random();
      } else if (p % 3 == 2) {
        request.sampling.temperature = 0.6f;
        request.sampling.top_k = 20;
        request.sampling.repetition_penalty = 1.02f;
        request.sampling.frequency_penalty = 0.05f;
        request.sampling.min_tokens = 5;
        request.sampling.ignore_eos = false;
      }
      if (p % 4 == 3) request.sampling.prompt_logprobs = 1;
      if (p == 4) request.sampling.max_tokens = kContext;  // to the end of the context
      for (int sample = 0; sample < 2; ++sample) {
        request.id = SequenceId{requests.size() + 1};
        ++request.sampling.seed;
        requests.push_back(request);
      }
    }
    return requests;
  }

  std::map<SequenceId, Result> Without(const std::vector<Request>& requests) const {
    return RunAll(Start(Options(0))->engine(), requests);
  }

  const WideScales scales_{{1, 2, 4}};
};

TEST_P(SpeculationTest, SameTokensAndBits) {
  int64_t accepted = 0, rejected = 0;
  for (const uint64_t seed : {1, 2}) {
    const auto requests = Requests(seed);
    const auto expected = Without(requests);
    for (const int max_drafts : {1, 16}) {
      const auto group = Start(Options(max_drafts));
      engine::Engine& engine = group->engine();
      EXPECT_EQ(RunAll(engine, requests), expected) << "seed " << seed << ", " << max_drafts << " drafts";
      const scheduler::SchedulerLoad load = engine.scheduler().load();
      accepted += load.accepted_tokens;
      rejected += load.drafted_tokens - load.accepted_tokens;
      int64_t tokens = 0;
      for (const auto& [id, result] : expected) tokens += static_cast<int64_t>(result.tokens.size());
      EXPECT_EQ(engine.counters().generated_tokens, tokens);
    }
  }
  EXPECT_GT(accepted, 40);
  EXPECT_GT(rejected, 20);
}

TEST_P(SpeculationTest, WithArrivalsPreemptionsAndCancels) {
  for (const uint64_t seed : {4, 5}) {
    std::vector<Request> waiting = Requests(seed);
    const auto expected = Without(waiting);
    std::mt19937_64 random(seed);
    std::ranges::shuffle(waiting, random);
    const auto group = Start(Options(6));
    engine::Engine& engine = group->engine();
    std::map<SequenceId, Result> results;
    const SequenceId cancelled = waiting.back().id;
    for (int step = 0; !waiting.empty() || engine.has_work(); ++step) {
      while (!waiting.empty() && random() % 3 != 0) {
        ASSERT_EQ(engine.Submit(waiting.back()), absl::OkStatus());
        waiting.pop_back();
      }
      if (random() % 4 == 0) engine.Preempt(SequenceId{1 + random() % 12});
      if (step == 8) engine.Cancel(cancelled);
      auto outputs = engine.Step();
      ASSERT_TRUE(outputs.ok());
      Collect(*outputs, results);
      engine.scheduler().CheckInvariants();
    }
    for (const auto& [id, result] : expected) {
      if (id == cancelled) continue;
      EXPECT_EQ(results[id], result) << "seed " << seed << ", sequence " << static_cast<uint64_t>(id);
    }
    const Result& some = results[cancelled];
    EXPECT_TRUE(std::equal(some.tokens.begin(), some.tokens.end(), expected.at(cancelled).tokens.begin()));
    EXPECT_GT(engine.scheduler().load().accepted_tokens, 0);
  }
}

TEST_P(SpeculationTest, ForWantOfMemory) {
  const auto requests = Requests(6);
  const auto expected = Without(requests);
  engine::RankOptions options = Options(8);
  const auto probe = Start(options);
  const int64_t block_bytes = probe->rank().decoder->kv_pool().bytes() / probe->rank().scheduler_options.block_count;
  options.kv_memory_bytes = 12 * block_bytes;
  const auto group = Start(options);
  EXPECT_EQ(RunAll(group->engine(), requests), expected);
  EXPECT_GT(group->engine().scheduler().load().preemptions, 0);
  EXPECT_GT(group->engine().scheduler().load().accepted_tokens, 0);
}

// A stop token, or the last token of all, within the accepted drafts: nothing behind it is delivered.
TEST_P(SpeculationTest, EndsWhereItWouldHaveEnded) {
  std::mt19937_64 random(7);
  std::vector<Request> requests = Requests(7);
  const auto whole = Without(requests);
  for (Request& request : requests) {
    const auto& tokens = whole.at(request.id).tokens;
    ASSERT_FALSE(tokens.empty());
    const size_t at = tokens.size() / 2 + random() % (tokens.size() - tokens.size() / 2);
    request.sampling.min_tokens = std::min<int32_t>(request.sampling.min_tokens, static_cast<int32_t>(at));
    if (random() % 2 == 0) {
      request.sampling.stop_token_ids = {tokens[at]};
      request.sampling.min_tokens = static_cast<int32_t>(at);
    } else {
      request.sampling.max_tokens = static_cast<int32_t>(at) + 1;
    }
  }
  const auto expected = Without(requests);
  int stopped = 0;
  for (const auto& [id, result] : expected) stopped += result.reason == FinishReason::kStop;
  EXPECT_GT(stopped, 2);
  for (const int max_drafts : {2, 8}) EXPECT_EQ(RunAll(Start(Options(max_drafts))->engine(), requests), expected);
}

// What is generated with drafts is found in the cache like anything else, and rejected drafts are not.
TEST_P(SpeculationTest, LeavesTheSamePrefixesInTheCache) {
  const auto requests = Requests(8);
  const auto without = Start(Options(0)), with = Start(Options(7));
  const auto expected = RunAll(without->engine(), requests);
  EXPECT_EQ(RunAll(with->engine(), requests), expected);
  EXPECT_GT(with->engine().scheduler().load().accepted_tokens, 0);
  int32_t cached = 0;
  for (Request request : requests) {
    const auto& generated = expected.at(request.id).tokens;
    request.prompt.insert(request.prompt.end(), generated.begin(), generated.end());
    if (request.prompt.size() + 8 > kContext) continue;
    request.sampling.max_tokens = 8;
    request.sampling.min_tokens = 0;
    request.sampling.prompt_logprobs = -1;
    const Result plain = RunAlone(without->engine(), request), drafted = RunAlone(with->engine(), request);
    EXPECT_EQ(drafted, plain);
    EXPECT_EQ(drafted.cached_prompt_tokens, plain.cached_prompt_tokens);
    cached += plain.cached_prompt_tokens;
  }
  EXPECT_GT(cached, 300);
}

// From a group that speculates to one that does not, and back.
TEST_P(SpeculationTest, ReplayedFromAnyToken) {
  const auto requests = Requests(9, 3);
  const auto without = Start(Options(0)), with = Start(Options(8));
  const auto expected = RunAll(without->engine(), requests);
  for (const Request& request : requests) {
    const Result& whole = expected.at(request.id);
    for (const size_t delivered : {size_t{1}, whole.tokens.size() / 2, whole.tokens.size() - 1}) {
      Request replay = request;
      replay.generated.assign(whole.tokens.begin(), whole.tokens.begin() + static_cast<int64_t>(delivered));
      for (const auto* group : {&without, &with}) {
        const Result result = RunAlone((*group)->engine(), replay);
        EXPECT_EQ(result.tokens, whole.tokens) << "replayed from token " << delivered;
        EXPECT_EQ(result.logprobs, std::vector<float>(whole.logprobs.begin() + 3 * static_cast<int64_t>(delivered),
                                                      whole.logprobs.end()));
      }
    }
  }
}

TEST_P(SpeculationTest, AnyTensorParallelDegree) {
  const auto requests = Requests(10);
  const auto expected = Without(requests);
  for (const int tp : {2, 4}) {
    // Scales per rank differ with the degree by their nature.
    const bool has_own = std::string(GetParam()) == "int8";
    const auto group = Start(Options(8, tp), tp);
    EXPECT_EQ(RunAll(group->engine(), requests),
              has_own ? RunAll(Start(Options(0, tp), tp)->engine(), requests) : expected)
        << "tp " << tp;
    EXPECT_GT(group->engine().scheduler().load().accepted_tokens, 0);
  }
}

INSTANTIATE_TEST_SUITE_P(KvFormats, SpeculationTest,
                         ::testing::Values("f32", "f16", "int8", "int8-head", "int8-channel", "int8-online",
                                           "int4-online"),
                         [](const auto& info) {
                           std::string name = info.param;
                           std::erase(name, '-');
                           return name;
                         });

TEST(SpeculationOptions, CalibrationSeesNoDrafts) {
  engine::RankOptions options;
  options.model_dir = SourcePath("launch/demo_model");
  options.kv = "f32";
  options.has_prefix_cache = false;
  options.observes = true;
  options.max_tokens = 64;
  options.max_drafts = 1;
  const auto refused = ThreadGroup::Start(options, 1);
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kInvalidArgument);
  options.max_drafts = 0;
  EXPECT_TRUE(ThreadGroup::Start(options, 1).ok());
  options.max_drafts = -1;
  EXPECT_EQ(ThreadGroup::Start(options, 1).status().code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace rankwise::testing
