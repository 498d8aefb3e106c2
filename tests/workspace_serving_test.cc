// A model folder and the workspaces converted from it serve the same tokens and the same bits of log-probabilities,
// whatever degree the workspace was cut for and whatever degree serves it.

#include <gtest/gtest.h>

#include <bit>
#include <cstring>
#include <filesystem>

#include "absl/strings/str_cat.h"
#include "base/mapped_file.h"
#include "tests/support/test_data.h"
#include "tests/support/thread_group.h"
#include "worker/kv/kv_scales.h"
#include "worker/weights/quantize.h"
#include "worker/weights/random_model.h"
#include "worker/weights/safetensors.h"
#include "worker/weights/workspace.h"
#include "worker/weights/workspace_layout.h"

namespace rankwise::testing {
namespace {

namespace fs = std::filesystem;
using weights::Checkpoint;

class WorkspaceServing : public ::testing::Test {
 protected:
  WorkspaceServing() : folder_(::testing::TempDir() + "serving_" + std::to_string(getpid())) {
    fs::remove_all(folder_);
    fs::create_directories(folder_);
  }
  ~WorkspaceServing() override { fs::remove_all(folder_); }

  // The workspace of a model, cut for `tp`.
  std::string Convert(const std::string& model, int tp) const {
    const std::string folder = absl::StrCat(folder_, "/workspace-", tp);
    const auto checkpoint = Checkpoint::Open(model);
    EXPECT_TRUE(checkpoint.ok()) << checkpoint.status();
    EXPECT_EQ(weights::WriteWorkspace(**checkpoint, model, folder,
                                      {.world_size = tp, .model_name = "m", .replaces = true}, {}),
              absl::OkStatus());
    return folder;
  }

  static engine::RankOptions Options(const std::string& model) {
    engine::RankOptions options;
    options.model_dir = model;
    options.kv = "f32";
    options.max_tokens = 64;
    options.max_running = 4;
    options.max_step_rows = 64;
    return options;
  }

  static std::map<engine::SequenceId, Result> Run(const std::string& model, int tp) {
    const auto group = ThreadGroup::Start(Options(model), tp);
    EXPECT_TRUE(group.ok()) << group.status();
    if (!group.ok()) return {};
    std::vector<engine::Request> requests;
    for (uint64_t i = 1; i <= 3; ++i) {
      engine::Request request{.id = engine::SequenceId{i}, .prompt = {1}};
      for (uint64_t t = 0; t < 9 * i; ++t) request.prompt.push_back(static_cast<int32_t>(3 + (37 * i + 101 * t) % 500));
      request.sampling = {.max_tokens = 8, .temperature = 0, .ignore_eos = true, .logprobs = 5, .prompt_logprobs = 2};
      requests.push_back(std::move(request));
    }
    const auto results = RunAll((*group)->engine(), requests);
    for (const auto& [id, result] : results) EXPECT_EQ(result.tokens.size(), 8u) << result.error;
    return results;
  }

  void ExpectSameBits(const std::string& model) const {
    const auto expected = Run(model, 1);
    ASSERT_EQ(expected.size(), 3u);
    for (const int tp : {2, 4}) EXPECT_EQ(Run(model, tp), expected) << model << ", tp " << tp;
    for (const int cut : {1, 2, 4}) {
      const std::string workspace = Convert(model, cut);
      for (const int tp : {1, 2, 4}) EXPECT_EQ(Run(workspace, tp), expected) << "cut for " << cut << ", tp " << tp;
    }
  }

  // The model with weights of four bits.
  std::string Quantized(const std::string& model, int32_t group_size) const {
    const std::string folder = folder_ + "/quantized";
    EXPECT_EQ(weights::WriteQuantized(model, folder, {.bits = 4, .group_size = group_size, .replaces = true}, {}),
              absl::OkStatus());
    return folder;
  }

  // A copy of an f32 model with every tensor rounded to f16.
  std::string Rounded(const std::string& model) const {
    const std::string folder = folder_ + "/rounded";
    fs::create_directories(folder);
    fs::copy_file(model + "/config.json", folder + "/config.json", fs::copy_options::overwrite_existing);
    const auto file = weights::SafetensorsFile::Open(model + "/model.safetensors");
    EXPECT_TRUE(file.ok()) << file.status();
    std::vector<weights::TensorHeader> headers;
    std::string data;
    for (const auto& [name, tensor] : file->tensors()) {
      EXPECT_EQ(tensor.dtype, "F32") << name;
      headers.push_back({name, "F16", tensor.shape});
      for (int64_t i = 0; i < tensor.bytes; i += 4) {
        float value = 0;
        std::memcpy(&value, tensor.data + i, sizeof value);
        const auto half = static_cast<_Float16>(value);
        data.append(reinterpret_cast<const char*>(&half), sizeof half);
      }
    }
    EXPECT_EQ(WriteFileAtomically(folder + "/model.safetensors", weights::SafetensorsHeader(headers, {}) + data),
              absl::OkStatus());
    return folder;
  }

  static std::string Fingerprint(const std::string& model) {
    const auto checkpoint = Checkpoint::Open(model);
    return checkpoint.ok() ? (*checkpoint)->fingerprint() : checkpoint.status().ToString();
  }

  // An f32 model serves from a workspace as its rounded self, which is another model.
  void ExpectServedRounded(const std::string& model) const {
    const std::string rounded = Rounded(model);
    const auto expected = Run(rounded, 1);
    ASSERT_EQ(expected.size(), 3u);
    EXPECT_NE(Run(model, 1), expected);
    for (const int cut : {1, 2, 4}) {
      const std::string workspace = Convert(model, cut);
      for (const int tp : {1, 2, 4}) EXPECT_EQ(Run(workspace, tp), expected) << "cut for " << cut << ", tp " << tp;
      EXPECT_EQ(Fingerprint(workspace), Fingerprint(rounded));
      EXPECT_NE(Fingerprint(workspace), Fingerprint(model));
    }
  }

  const std::string folder_;
};

TEST_F(WorkspaceServing, EveryFamilyServesTheSameBits) {
  for (const char* family : {"llama", "internlm", "internlm2", "mistral", "qwen2"}) {
    weights::RandomModelSpec spec{.model_type = family, .vocab_size = 511, .has_bias = true};
    if (spec.model_type == "mistral") spec.extra_json = R"("sliding_window":null)";
    if (spec.model_type == "internlm2") spec.extra_json = R"("rope_scaling":{"type":"dynamic","factor":2})";
    ASSERT_EQ(weights::WriteRandomModel(folder_ + "/m", spec), absl::OkStatus());
    SCOPED_TRACE(family);
    ExpectSameBits(folder_ + "/m");
  }
  weights::RandomModelSpec spec{.dtype = kernels::DType::kBF16};
  ASSERT_EQ(weights::WriteRandomModel(folder_ + "/m", spec), absl::OkStatus());
  ExpectSameBits(folder_ + "/m");
  spec.dtype = kernels::DType::kF32;
  ASSERT_EQ(weights::WriteRandomModel(folder_ + "/m", spec), absl::OkStatus());
  ExpectServedRounded(folder_ + "/m");
}

// Groups of 64 begin inside a rank's slice at tp 4, for which such a workspace cannot be cut.
TEST_F(WorkspaceServing, WeightsOfFourBitsServeTheSameBits) {
  for (const char* family : {"llama", "internlm2", "qwen2"}) {
    const weights::RandomModelSpec spec{.model_type = family,
                                        .hidden_size = 128,
                                        .n_heads = 8,
                                        .n_kv_heads = 4,
                                        .head_dim = 16,
                                        .intermediate_size = 256,
                                        .vocab_size = 511,
                                        .has_bias = true};
    ASSERT_EQ(weights::WriteRandomModel(folder_ + "/m", spec), absl::OkStatus());
    for (const int32_t group_size : {32, 64}) {
      const std::string quantized = Quantized(folder_ + "/m", group_size);
      const auto expected = Run(quantized, 1);
      ASSERT_EQ(expected.size(), 3u);
      EXPECT_NE(expected, Run(folder_ + "/m", 1));
      for (const int tp : {2, 4}) EXPECT_EQ(Run(quantized, tp), expected) << "tp " << tp;
      for (const int cut : {1, 2, 4}) {
        if (group_size == 64 && cut == 4) continue;
        SCOPED_TRACE(absl::StrCat(family, ", groups of ", group_size, ", cut for ", cut));
        const std::string workspace = Convert(quantized, cut);
        for (const int tp : {1, 2, 4}) EXPECT_EQ(Run(workspace, tp), expected) << "tp " << tp;
        fs::remove(weights::WorkspaceWeights(workspace) + "/manifest.json");
        EXPECT_EQ(Run(workspace, 2), expected) << "without a manifest";
      }
    }
  }
}

TEST_F(WorkspaceServing, TheDemoModelServesTheSameBits) { ExpectSameBits(SourcePath("launch/demo_model")); }

TEST_F(WorkspaceServing, Stories260KServesAsItsRoundedSelf) {
  const std::string model = TestData("models/stories260K-hf");
  if (model.empty()) GTEST_SKIP() << "no test data";
  ExpectServedRounded(model);
}

// Golden vector 8: weights may be sliced to another degree, scales may not.
class ScalesOfAWorkspace : public WorkspaceServing {
 protected:
  ScalesOfAWorkspace() {
    EXPECT_EQ(weights::WriteRandomModel(folder_ + "/m", {}), absl::OkStatus());
    workspace_ = Convert(folder_ + "/m", 1);
    statistics_ = {.model_fingerprint = Fingerprint(folder_ + "/m"), .n_layers = 2, .n_kv_heads = 4, .head_dim = 8};
    for (int i = 0; i < 2 * 4 * 8; ++i) {
      const float head = static_cast<float>(i / 8 % 4);
      statistics_.k_min.push_back(-4 - head);
      statistics_.k_max.push_back(4 + head);
      statistics_.v_min.push_back(-3 - head);
      statistics_.v_max.push_back(3 + head);
    }
  }
  void WriteScales(int tp, kv::Granularity granularity = kv::Granularity::kRank) const {
    ASSERT_EQ(kv::WriteKvScales(Dir(), statistics_, tp, granularity), absl::OkStatus());
  }
  std::string Dir() const { return weights::WorkspaceWeights(workspace_); }
  // Why a group of `tp` does not start with int8 KV and the workspace's own scales; empty: it does.
  std::string Refusal(int tp, const std::string& kv = "int8") const {
    engine::RankOptions options = Options(workspace_);
    options.kv = kv;
    options.collective_timeout = absl::Seconds(10);
    return std::string(ThreadGroup::Start(options, tp).status().message());
  }

  std::string workspace_;
  kv::KvStatistics statistics_;
};

TEST_F(ScalesOfAWorkspace, Golden8AreMadeForTheServedDegreeNeverAssumed) {
  const std::string first = Dir() + "/layers.0.past_kv_scale.0.weight";
  EXPECT_NE(Refusal(1).find(first), std::string::npos) << Refusal(1);  // none at all
  WriteScales(1);
  EXPECT_EQ(Refusal(1), "");  // calibrated on the model folder, valid for its workspace
  EXPECT_NE(Refusal(2).find("is not of tp=2"), std::string::npos) << Refusal(2);
  WriteScales(2);
  EXPECT_EQ(Refusal(2), "");
  EXPECT_NE(Refusal(1).find("is not of tp=1"), std::string::npos) << Refusal(1);
  WriteScales(2, kv::Granularity::kHead);
  for (const int tp : {1, 2, 4}) EXPECT_EQ(Refusal(tp, "int8-head"), "") << tp;
  const std::string missing = Dir() + "/layers.1.past_kv_scale.1.weight";
  fs::remove(missing);
  EXPECT_NE(Refusal(2).find(missing), std::string::npos) << Refusal(2);
}

TEST_F(ScalesOfAWorkspace, Golden8FilesOfLmdeployServeTheDegreeTheyWereWrittenForAlone) {
  WriteScales(2);
  fs::remove(Dir() + "/kv_scales.json");
  EXPECT_EQ(Refusal(2), "");
  EXPECT_NE(Refusal(1).find("layers.0.past_kv_scale.1.weight is for more ranks than tp=1"), std::string::npos);
  EXPECT_NE(Refusal(4).find("layers.0.past_kv_scale.2.weight"), std::string::npos) << Refusal(4);
}

TEST_F(ScalesOfAWorkspace, QuantPolicy4OfConfigIniMeansInt8) {
  WriteScales(1);
  const std::string path = Dir() + "/config.ini";
  std::string text = *ReadTextFile(path);
  text.replace(text.find("quant_policy = 0"), 16, "quant_policy = 4");
  ASSERT_EQ(WriteFileAtomically(path, text), absl::OkStatus());
  engine::RankOptions options = Options(workspace_);
  options.kv = "";
  const auto group = ThreadGroup::Start(options, 1);
  ASSERT_TRUE(group.ok()) << group.status();
  EXPECT_EQ((*group)->rank().kv, "int8");
  EXPECT_EQ((*group)->rank().decoder->kv_pool().shape().format, kernels::KvFormat::kInt8);
  EXPECT_EQ((*group)->rank().kv_scales_id.size(), 16u);
}

// A manifest vouches for the model whose scales a workspace may use: not when the content is another.
TEST_F(ScalesOfAWorkspace, AnAlteredFileIsRefusedBeforeAnythingIsServed) {
  WriteScales(2);
  const std::string path = Dir() + "/layers.1.attention.w_qkv.0.weight";
  std::string bytes = *ReadTextFile(path);
  bytes[bytes.size() / 3] ^= 1;
  ASSERT_EQ(WriteFileAtomically(path, bytes), absl::OkStatus());
  EXPECT_NE(Refusal(2).find(path + " was altered"), std::string::npos) << Refusal(2);
}

}  // namespace
}  // namespace rankwise::testing
