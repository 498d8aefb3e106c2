// Real checkpoints against references computed elsewhere in double: greedy ids equal, logits within a bound.

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>

#include "base/mapped_file.h"
#include "tests/support/test_data.h"
#include "tests/support/thread_group.h"

namespace rankwise::testing {
namespace {

constexpr char kStories[] = "models/stories260K-hf";

// The f32 values of a version 1 .npy file.
std::vector<float> ReadNpy(const std::string& path) {
  const std::string bytes = *ReadTextFile(path);
  uint16_t header_bytes = 0;
  std::memcpy(&header_bytes, bytes.data() + 8, sizeof header_bytes);
  const size_t begin = 10 + header_bytes;
  std::vector<float> values((bytes.size() - begin) / sizeof(float));
  std::memcpy(values.data(), bytes.data() + begin, values.size() * sizeof(float));
  return values;
}

engine::RankOptions F32Options(const std::string& model_dir) {
  engine::RankOptions options;
  options.model_dir = model_dir;
  options.kv = "f32";
  options.max_tokens = 512;
  options.max_running = 8;
  options.max_step_rows = 128;
  return options;
}

class StoriesTest : public ::testing::TestWithParam<int> {
 protected:
  void SetUp() override {
    model_dir_ = TestData(kStories);
    if (model_dir_.empty()) GTEST_SKIP() << "no test data";
    reference_ = nlohmann::json::parse(*ReadTextFile(model_dir_ + "/reference/greedy64.json"));
  }

  std::string model_dir_;
  nlohmann::json reference_;
};

TEST_P(StoriesTest, GreedyIdsEqualTheReference) {
  auto group = ThreadGroup::Start(F32Options(model_dir_), GetParam());
  ASSERT_TRUE(group.ok()) << group.status();
  std::vector<engine::Request> requests;
  for (const auto& prompt : reference_["prompts"]) {
    engine::Request request{.id = engine::SequenceId{requests.size()}, .prompt = prompt["input_ids"]};
    request.sampling = {.max_tokens = static_cast<int32_t>(prompt["output_ids"].size()),
                        .temperature = 0,
                        .ignore_eos = true,
                        .logprobs = 0,
                        .prompt_logprobs = 0};
    requests.push_back(request);
  }
  const auto results = RunAll((*group)->engine(), requests);
  for (size_t i = 0; i < requests.size(); ++i) {
    const auto& expected = reference_["prompts"][i];
    const Result& result = results.at(engine::SequenceId{i});
    EXPECT_EQ(result.tokens, expected["output_ids"].get<std::vector<int32_t>>()) << "prompt " << i;
    // Of every token behind the first, prompt and generated.
    const auto logprobs = expected["token_logprobs"].get<std::vector<float>>();
    std::vector<float> all = result.prompt_logprobs;
    all.insert(all.end(), result.logprobs.begin(), result.logprobs.end());
    ASSERT_EQ(all.size(), logprobs.size());
    for (size_t t = 0; t < logprobs.size(); ++t) EXPECT_NEAR(all[t], logprobs[t], 1e-4);
  }
}

TEST_P(StoriesTest, LogitsAreWithin1e4OfTheReference) {
  const int tp = GetParam();
  const auto& prompts = reference_["prompts"];
  std::vector<double> worst(prompts.size(), 0);
  auto communicators = comm::CreateThreadCommunicators(tp);
  std::vector<std::jthread> ranks;
  std::vector<absl::Status> ended(tp);
  for (int r = 0; r < tp; ++r) {
    ranks.emplace_back([&, r] {
      auto backend = kernels::CreateCpuBackend({.threads = 1, .pin_threads = false});
      auto rank = engine::LoadRank(F32Options(model_dir_), **backend, *communicators[r]);
      ended[r].Update(rank.status());
      for (size_t p = 0; p < prompts.size() && ended[r].ok(); ++p) {
        const auto positions = prompts[p]["logits_positions"].get<std::vector<int32_t>>();
        const std::vector<float> expected =
            ReadNpy(model_dir_ + "/reference/" + prompts[p]["logits_file"].get<std::string>());
        std::vector<int32_t> tokens = prompts[p]["input_ids"];
        const auto generated = prompts[p]["output_ids"].get<std::vector<int32_t>>();
        tokens.insert(tokens.end(), generated.begin(), generated.end() - 1);
        StepPlan plan{
            .kind = StepKind::kRun, .cleared_slots = {0}, .segments = {{.logits = LogitsNeed::kAll, .tokens = tokens}}};
        for (int b = 0; b * kernels::kKvBlockTokens < static_cast<int>(tokens.size()); ++b) {
          plan.segments[0].new_blocks.push_back(b);
        }
        size_t compared = 0;
        ended[r].Update(rank->executor->Execute(plan, [&](int32_t, int32_t position, std::span<float> logits) {
          for (size_t i = 0; i < positions.size(); ++i) {
            if (positions[i] != position) continue;
            ++compared;
            for (size_t v = 0; v < logits.size(); ++v) {
              worst[p] = std::max(worst[p], std::abs(double{logits[v]} - expected[i * logits.size() + v]));
            }
          }
          return absl::OkStatus();
        }));
        if (r == 0) {
          EXPECT_EQ(compared, positions.size());
        }
      }
    });
  }
  ranks.clear();
  for (const absl::Status& status : ended) EXPECT_TRUE(status.ok()) << status;
  for (size_t p = 0; p < prompts.size(); ++p) EXPECT_LT(worst[p], 1e-4) << "prompt " << p;
  RecordProperty("worst_logit_error", std::to_string(*std::ranges::max_element(worst)));
}

INSTANTIATE_TEST_SUITE_P(TensorParallel, StoriesTest, ::testing::Values(1, 2, 4));

// The model of this repository against a double-precision forward of its shipped f16 weights.
TEST(ShippedModelTest, GreedyIdsAndHeldOutNllEqualTheReference) {
  const std::string model_dir = SourcePath("launch/demo_model");
  const auto reference = nlohmann::json::parse(*ReadTextFile(model_dir + "/reference.json"));
  for (const int tp : {1, 2, 4}) {
    auto group = ThreadGroup::Start(F32Options(model_dir), tp);
    ASSERT_TRUE(group.ok()) << group.status();
    uint64_t id = 0;
    for (const auto& prompt : reference["greedy"]) {
      const auto expected = prompt["output_ids"].get<std::vector<int32_t>>();
      engine::Request request{.id = engine::SequenceId{++id}, .prompt = prompt["prompt_ids"]};
      request.sampling = {.max_tokens = static_cast<int32_t>(expected.size()), .temperature = 0, .ignore_eos = true};
      EXPECT_EQ(RunAlone((*group)->engine(), request).tokens, expected) << "tp " << tp << ", prompt " << id;
    }
    for (const auto& window : reference["windows"]) {
      engine::Request request{.id = engine::SequenceId{++id}, .prompt = window["ids"]};
      request.sampling = {.max_tokens = 1, .temperature = 0, .prompt_logprobs = 0};
      const Result result = RunAlone((*group)->engine(), request);
      ASSERT_EQ(result.prompt_logprobs.size(), request.prompt.size() - 1);
      double nll = 0;
      for (const float logprob : result.prompt_logprobs) nll -= logprob;
      EXPECT_NEAR(nll / static_cast<double>(result.prompt_logprobs.size()), window["mean_nll"].get<double>(), 1e-5);
    }
  }
}

}  // namespace
}  // namespace rankwise::testing
