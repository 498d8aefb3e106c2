// Tiny models of every family and RoPE scaling against the logits of Hugging Face transformers (make_goldens.py beside
// this file says how those were made).

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "base/mapped_file.h"
#include "tests/support/test_data.h"
#include "tests/support/thread_group.h"
#include "worker/weights/random_model.h"
#include "worker/weights/safetensors.h"

namespace rankwise::testing {
namespace {

using nlohmann::json;

// Both sides sum the same exact values in f32, in different orders. transformers' error is stored beside its logits;
// ours may be as large, and twice their sum leaves room for the orders. Measured: at most 1.3 of these errors, about
// 5e-7 of the largest logit. An angle that is wrong by 1e-3 of a position fails in every case.
constexpr double kErrorsAllowed = 4;

const json& Plan() {
  static const json plan = json::parse(*ReadTextFile(SourcePath("tests/families/cases.json")));
  return plan;
}

std::vector<std::string> CaseNames() {
  std::vector<std::string> names;
  for (const json& one : Plan()["cases"]) names.push_back(one["name"]);
  return names;
}

std::vector<float> Values(const weights::SafetensorsFile& file, const std::string& name) {
  const auto found = file.tensors().find(name);
  if (found == file.tensors().end() || found->second.dtype != "F32") return {};
  std::vector<float> values(found->second.bytes / sizeof(float));
  std::memcpy(values.data(), found->second.data, found->second.bytes);
  return values;
}

weights::RandomModelSpec SpecOf(const json& one, uint64_t seed) {
  json sizes = Plan()["sizes"];
  if (one.contains("sizes")) sizes.update(one["sizes"]);
  weights::RandomModelSpec spec{.model_type = one["family"],
                                .hidden_size = sizes["hidden"],
                                .n_layers = sizes["layers"],
                                .n_heads = sizes["heads"],
                                .n_kv_heads = sizes["kv-heads"],
                                .head_dim = sizes["head-dim"],
                                .intermediate_size = sizes["intermediate"],
                                .vocab_size = sizes["vocab"],
                                .max_position = sizes["max-position"],
                                .has_bias = one.value("bias", false),
                                .has_mlp_bias = one.value("mlp-bias", false),
                                .is_tied = one.value("tied", false),
                                .dtype = kernels::DType::kF32,
                                .seed = seed};
  const std::string members = one.contains("config") ? one["config"].dump() : "{}";
  spec.extra_json = members.substr(1, members.size() - 2);
  return spec;
}

// As in make_goldens.py.
std::vector<int32_t> Tokens(int32_t count, int32_t vocab) {
  std::vector<int32_t> tokens;
  for (int32_t i = 0; i < count; ++i) tokens.push_back((7 * i * i + 31 * i + 3) % vocab);
  return tokens;
}

engine::RankOptions OptionsFor(const std::string& model_dir, int32_t max_tokens) {
  engine::RankOptions options;
  options.model_dir = model_dir;
  options.kv = "f32";
  options.max_tokens = max_tokens;
  options.max_running = 1;
  return options;
}

// Logits [tokens, vocab] of all rows at once, on `tp` thread ranks.
absl::StatusOr<std::vector<float>> Logits(const std::string& model_dir, const std::vector<int32_t>& tokens, int tp) {
  const engine::RankOptions options = OptionsFor(model_dir, static_cast<int32_t>(tokens.size()));
  StepPlan plan{
      .kind = StepKind::kRun, .cleared_slots = {0}, .segments = {{.logits = LogitsNeed::kAll, .tokens = tokens}}};
  for (int b = 0; b * kernels::kKvBlockTokens < static_cast<int>(tokens.size()); ++b) {
    plan.segments[0].new_blocks.push_back(b);
  }
  std::vector<float> all;
  const auto append = [&](int32_t, int32_t, std::span<float> logits) {
    all.insert(all.end(), logits.begin(), logits.end());
    return absl::OkStatus();
  };
  auto communicators = comm::CreateThreadCommunicators(tp);
  std::vector<absl::Status> ended(tp);
  {
    std::vector<std::jthread> ranks;
    for (int r = 0; r < tp; ++r) {
      ranks.emplace_back([&, r] {
        auto backend = kernels::CreateCpuBackend({.threads = 1, .pin_threads = false});
        auto rank = engine::LoadRank(options, **backend, *communicators[r]);
        ended[r] = rank.ok() ? rank->executor->Execute(plan, append) : rank.status();
      });
    }
  }
  for (const absl::Status& status : ended) {
    if (!status.ok()) return status;
  }
  return all;
}

class FamilyTest : public ::testing::TestWithParam<std::string> {};

TEST_P(FamilyTest, LogitsAreThoseOfTransformers) {
  const auto goldens = weights::SafetensorsFile::Open(SourcePath("tests/families/goldens.safetensors"));
  ASSERT_TRUE(goldens.ok()) << goldens.status();
  const auto& cases = Plan()["cases"];
  size_t index = 0;
  while (cases[index]["name"] != GetParam()) ++index;
  const weights::RandomModelSpec spec = SpecOf(cases[index], index + 1);
  const std::string model_dir = ::testing::TempDir() + "family_" + GetParam();
  ASSERT_EQ(weights::WriteRandomModel(model_dir, spec), absl::OkStatus());

  const std::vector<float> expected = Values(*goldens, GetParam());
  const std::vector<float> error = Values(*goldens, GetParam() + ".f32_error");
  const std::vector<int32_t> positions = Plan()["positions"];
  ASSERT_EQ(expected.size(), positions.size() * spec.vocab_size);
  ASSERT_EQ(error.size(), 1u);
  for (const int tp : {1, 2, 4}) {
    const auto logits = Logits(model_dir, Tokens(Plan()["token_count"], spec.vocab_size), tp);
    ASSERT_TRUE(logits.ok()) << logits.status();
    ASSERT_EQ(logits->size(), size_t{Plan()["token_count"]} * spec.vocab_size);
    double worst = 0;
    int32_t worst_position = 0;
    for (size_t i = 0; i < expected.size(); ++i) {
      const int32_t position = positions[i / spec.vocab_size];
      const double got = (*logits)[position * spec.vocab_size + i % spec.vocab_size];
      const double distance = std::abs(got - expected[i]);
      if (!(distance <= worst)) worst = distance, worst_position = position;  // a NaN is kept
    }
    EXPECT_LE(worst, kErrorsAllowed * error[0]) << "tp " << tp << ", position " << worst_position;
    RecordProperty("worst_in_errors_tp" + std::to_string(tp), std::to_string(worst / error[0]));
  }
  std::filesystem::remove_all(model_dir);
}

INSTANTIATE_TEST_SUITE_P(All, FamilyTest, ::testing::ValuesIn(CaseNames()),
                         [](const ::testing::TestParamInfo<std::string>& info) { return info.param; });

TEST(DynamicNtkTest, ServesFactorTimesItsContextWhenAsked) {
  const std::string model_dir = ::testing::TempDir() + "family_dynamic";
  const weights::RandomModelSpec spec{.max_position = 32,
                                      .extra_json = R"("rope_scaling": {"rope_type": "dynamic", "factor": 2.5})"};
  ASSERT_EQ(weights::WriteRandomModel(model_dir, spec), absl::OkStatus());
  for (const auto& [asked, served] : {std::pair(0, 32), std::pair(80, 80), std::pair(81, 0)}) {
    const auto group = ThreadGroup::Start(OptionsFor(model_dir, asked), 1);
    EXPECT_EQ(group.ok() ? (*group)->rank().scheduler_options.max_positions : 0, served) << group.status();
  }
  std::filesystem::remove_all(model_dir);
}

}  // namespace
}  // namespace rankwise::testing
