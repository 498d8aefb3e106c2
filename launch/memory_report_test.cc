#include "launch/memory_report.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>

#include "base/mapped_file.h"
#include "launch/memory_plan.h"
#include "worker/weights/quantize.h"
#include "worker/weights/random_model.h"

namespace rankwise::launch {
namespace {

using ::testing::HasSubstr;

class FindModelTest : public ::testing::Test {
 protected:
  void SetUp() override {
    const weights::RandomModelSpec spec{.dtype = kernels::DType::kBF16};
    ASSERT_EQ(weights::WriteRandomModel(folder_, spec), absl::OkStatus());
  }
  ~FindModelTest() override { std::filesystem::remove_all(folder_); }

  // As if the weights were still to be fetched.
  void Forget() { std::filesystem::remove(folder_ + "/model.safetensors"); }
  void AddToConfig(const std::string& member) {
    std::string text = *ReadTextFile(folder_ + "/config.json");
    text.insert(text.find('{') + 1, member + ",");
    ASSERT_EQ(WriteFileAtomically(folder_ + "/config.json", text), absl::OkStatus());
  }

  const std::string folder_ = ::testing::TempDir() + "memory_report_model";
};

TEST_F(FindModelTest, AFolderSaysItsOwnDType) {
  AddToConfig("\"torch_dtype\": \"float32\"");  // the weights know better
  const auto model = FindModel(folder_);
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_EQ(model->weight_dtype, kernels::DType::kBF16);
  EXPECT_EQ(model->config.hidden_size, 64);
}

TEST_F(FindModelTest, WithoutWeightsTheConfigurationSaysIt) {
  Forget();
  EXPECT_EQ(FindModel(folder_)->weight_dtype, kernels::DType::kF16);
  AddToConfig("\"torch_dtype\": \"float32\"");
  for (const std::string& name : {folder_, folder_ + "/config.json"}) {
    const auto model = FindModel(name);
    ASSERT_TRUE(model.ok()) << model.status();
    EXPECT_EQ(model->weight_dtype, kernels::DType::kF32);
    EXPECT_EQ(model->config.n_kv_heads, 4);
  }
}

TEST_F(FindModelTest, QuantisedWeightsArePlannedAsTheyArePacked) {
  const std::string quantised = folder_ + "/w4";
  weights::RandomModelSpec spec{.intermediate_size = 192, .vocab_size = 32};
  ASSERT_EQ(weights::WriteRandomModel(folder_, spec), absl::OkStatus());
  ASSERT_EQ(weights::WriteQuantized(folder_, quantised, {.group_size = 64, .replaces = true}, {}), absl::OkStatus());
  const auto floats = FindModel(folder_), four = FindModel(quantised);
  ASSERT_TRUE(four.ok()) << four.status();
  EXPECT_EQ(four->weight_dtype, kernels::DType::kF16);
  // Two bytes of each weight of the two layers become half a byte, and four bytes for each 64 inputs.
  const int64_t weights = 2 * (128 * 64 + 64 * 64 + 384 * 64 + 64 * 192);
  const auto planned = [](const PlannedModel& model) {
    return PlanMemory(model.config, {.weight_dtype = model.weight_dtype}, 0, {})->weights;
  };
  EXPECT_EQ(planned(*floats) - planned(*four), weights * 2 - weights / 2 - weights / 64 * 4);
}

TEST_F(FindModelTest, DamagedWeightsAreRefused) {
  ASSERT_EQ(WriteFileAtomically(folder_ + "/model.safetensors", "no header"), absl::OkStatus());
  EXPECT_EQ(FindModel(folder_).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(FindShapeTest, KnowsTheShapesAndNamesWhatItDoesNot) {
  const auto model = FindModel("llama-7b");
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_EQ(model->config.rope.rotary_dim, 128);
  const absl::Status status = FindModel("llama-8b").status();
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(status.message()), HasSubstr("MODEL \"llama-8b\" is no folder, no config.json and no shape"));
}

TEST(PlanRanksTest, EqualRanksAreOneGroup) {
  PlannedModel model = *FindModel("llama-7b");
  const auto names = [&](int tp) {
    const auto groups = PlanRanks(model, {.tp = tp}, std::nullopt);
    std::vector<std::string> all;
    for (const RankGroup& group : groups.value()) all.push_back(group.name());
    return all;
  };
  EXPECT_THAT(names(1), ::testing::ElementsAre("0"));
  EXPECT_THAT(names(4), ::testing::ElementsAre("0", "1-3"));
  model.config.vocab_size = 32003;
  EXPECT_THAT(names(8), ::testing::ElementsAre("0", "1", "2", "3-4", "5", "6", "7"));
}

}  // namespace
}  // namespace rankwise::launch
