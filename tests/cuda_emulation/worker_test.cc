// The whole worker on the emulated GPU, ranks as threads: what it generates, against the CPU backend.

#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <filesystem>

#include "kernels/cuda/cuda_backend.h"
#include "tests/support/test_data.h"
#include "tests/support/thread_group.h"
#include "worker/kv/kv_scales.h"

namespace rankwise::testing {
namespace {

using engine::Request;
using engine::SequenceId;

// The shipped model, with scales wide enough for its K and V.
class CudaWorkerTest : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    scales_dir_ = ::testing::TempDir() + "cuda_worker_scales_" + std::to_string(getpid());
    auto checkpoint = weights::Checkpoint::Open(SourcePath("launch/demo_model"));
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
    const weights::ModelConfig& config = (*checkpoint)->config();
    kv::KvStatistics statistics{.model_fingerprint = (*checkpoint)->fingerprint(),
                                .n_layers = config.n_layers,
                                .n_kv_heads = config.n_kv_heads,
                                .head_dim = config.head_dim};
    const size_t count = static_cast<size_t>(config.n_layers) * config.n_kv_heads * config.head_dim;
    for (size_t i = 0; i < count; ++i) {
      const float head = static_cast<float>(i / config.head_dim % config.n_kv_heads);
      statistics.k_min.push_back(-9 - head);
      statistics.k_max.push_back(8 + head);
      statistics.v_min.push_back(-4 - head);
      statistics.v_max.push_back(5 + head);
    }
    for (const int tp : {1, 2}) {
      std::filesystem::create_directories(ScalesOf(tp));
      ASSERT_EQ(kv::WriteKvScales(ScalesOf(tp), statistics, tp, kv::Granularity::kChannel), absl::OkStatus());
    }
  }
  void TearDown() override { std::filesystem::remove_all(scales_dir_); }

  std::string ScalesOf(int tp) const { return scales_dir_ + "/tp" + std::to_string(tp); }

  engine::RankOptions Options(int tp) const {
    engine::RankOptions options;
    options.model_dir = SourcePath("launch/demo_model");
    options.kv = GetParam();
    options.kv_scales_dir = ScalesOf(tp);
    options.max_tokens = 128;
    options.max_running = 4;
    options.max_step_rows = 32;
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

  std::map<SequenceId, Result> OnCpu(int tp) const {
    auto group = ThreadGroup::Start(Options(tp), tp);
    EXPECT_TRUE(group.ok()) << group.status();
    return RunAll((*group)->engine(), Requests());
  }
  std::map<SequenceId, Result> OnCuda(int tp) const {
    auto group = ThreadGroup::Start(Options(tp), tp, [](int) { return kernels::CreateCudaBackend({}); });
    EXPECT_TRUE(group.ok()) << group.status();
    return RunAll((*group)->engine(), Requests());
  }

  std::string scales_dir_;
};

// Sums differ in their last bits; where K or V lie that near to a rounding they are stored a step apart, so that
// quantised formats differ by more than f32 does.
TEST_P(CudaWorkerTest, GeneratesWhatTheCpuDoesAtTp1And2) {
  const double bound = std::string(GetParam()) == "f32" ? 1e-4 : 2e-2;
  double worst = 0;
  for (const int tp : {1, 2}) {
    const auto expected = OnCpu(tp), results = OnCuda(tp);
    for (const auto& [id, result] : results) {
      EXPECT_EQ(result.error, absl::OkStatus());
      EXPECT_EQ(result.tokens, expected.at(id).tokens) << "tp " << tp;
      ASSERT_EQ(result.logprobs.size(), expected.at(id).logprobs.size());
      for (size_t i = 0; i < result.logprobs.size(); ++i) {
        worst = std::max<double>(worst, std::fabs(result.logprobs[i] - expected.at(id).logprobs[i]));
      }
    }
  }
  EXPECT_LE(worst, bound);
  RecordProperty("worst_logprob_difference", std::to_string(worst));
}

// Whatever shares a step, and however a prompt is cut into chunks.
class CudaWorkerBatchTest : public CudaWorkerTest {};
TEST_P(CudaWorkerBatchTest, AloneOrInABatchIsTheSameToTheBit) {
  const auto batched = OnCuda(1);
  auto options = Options(1);
  options.max_chunk_rows = 7;
  auto group = ThreadGroup::Start(options, 1, [](int) { return kernels::CreateCudaBackend({}); });
  ASSERT_TRUE(group.ok()) << group.status();
  for (const Request& request : Requests()) {
    EXPECT_EQ(RunAlone((*group)->engine(), request), batched.at(request.id));
  }
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

}  // namespace
}  // namespace rankwise::testing
