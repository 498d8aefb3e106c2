// Calibration across a whole group: what is written does not depend on how the work was cut, and what is served by the
// scales is counted where they are too narrow.

#include "worker/calibration.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <numeric>

#include "base/mapped_file.h"
#include "kernels/kv_histogram.h"
#include "tests/support/test_data.h"
#include "tests/support/thread_group.h"
#include "worker/kv/kv_scales.h"
#include "worker/weights/checkpoint.h"
#include "worker/weights/input_statistics.h"

namespace rankwise::testing {
namespace {

using engine::Request;
using engine::SequenceId;

constexpr int kLayers = 4, kKvHeads = 4, kHeadDim = 32;  // of the shipped model

struct Cut {
  int tp = 1, threads = 1, max_running = 4, chunk_rows = 128;
};

class CalibrationTest : public ::testing::Test {
 protected:
  CalibrationTest() : folder_(::testing::TempDir() + "calibration_" + std::to_string(getpid())) {
    std::filesystem::create_directories(folder_);
  }
  ~CalibrationTest() override { std::filesystem::remove_all(folder_); }

  static engine::RankOptions Options(const std::string& kv) {
    engine::RankOptions options;
    options.model_dir = SourcePath("launch/demo_model");
    options.kv = kv;
    options.max_tokens = 128;
    options.max_step_rows = 128;
    options.has_prefix_cache = false;
    return options;
  }

  // Six windows of 60 tokens, and the token that each request generates but does not append.
  static std::vector<Request> Windows() {
    std::vector<Request> requests;
    for (int i = 0; i < 6; ++i) {
      Request request{.id = SequenceId{static_cast<uint64_t>(i + 1)}};
      for (int t = 0; t < 60; ++t) request.prompt.push_back(3 + (i * 331 + t * 47) % 2000);
      request.sampling = {.max_tokens = 1, .temperature = 0, .ignore_eos = true};
      requests.push_back(std::move(request));
    }
    return requests;
  }

  absl::StatusOr<std::string> Calibrate(const Cut& cut) const {
    engine::RankOptions options = Options("f32");
    options.observes = true;
    options.max_drafts = 0;
    options.max_running = cut.max_running;
    options.max_chunk_rows = cut.chunk_rows;
    auto group = ThreadGroup::Start(options, cut.tp, cut.threads);
    if (!group.ok()) return group.status();
    RunAll((*group)->engine(), Windows());
    const std::string path = absl::StrCat(folder_, "/", kv::KvStatistics::kFileName);
    const absl::Status written = (*group)->Finish([&](const engine::Rank& rank, comm::Communicator& communicator) {
      return WriteObservations(rank, communicator, folder_,
                               {.dataset = "made up", .sample_count = 6, .sample_tokens = 60, .seed = 5},
                               absl::Seconds(60));
    });
    if (!written.ok()) return written;
    return ReadTextFile(path);
  }

  const std::string folder_;
};

TEST_F(CalibrationTest, TheFileIsTheSameHoweverTheWorkIsCut) {
  const auto expected = Calibrate({});
  ASSERT_TRUE(expected.ok()) << expected.status();
  const auto statistics = kv::ReadKvStatistics(absl::StrCat(folder_, "/", kv::KvStatistics::kFileName));
  ASSERT_TRUE(statistics.ok()) << statistics.status();
  EXPECT_EQ(statistics->seed, 5u);
  ASSERT_EQ(statistics->k_histogram.size(), size_t{kLayers} * kKvHeads * kernels::kHistogramBins);
  for (const auto* histogram : {&statistics->k_histogram, &statistics->v_histogram}) {
    for (int head = 0; head < kLayers * kKvHeads; ++head) {
      const auto begin = histogram->begin() + head * kernels::kHistogramBins;
      EXPECT_EQ(std::accumulate(begin, begin + kernels::kHistogramBins, uint64_t{0}), 6u * 60 * kHeadDim)
          << "every value of a head is counted once";
    }
  }
  const auto checkpoint = weights::Checkpoint::Open(SourcePath("launch/demo_model"));
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  const auto read_inputs = [&] {
    return weights::ReadInputStatistics(absl::StrCat(folder_, "/", weights::InputStatistics::kFileName),
                                        (*checkpoint)->config());
  };
  const auto inputs = read_inputs();
  ASSERT_TRUE(inputs.ok()) << inputs.status();
  EXPECT_EQ(inputs->model_fingerprint, (*checkpoint)->fingerprint());
  // With eight ranks two share each KV head: it must not be counted twice.
  for (const Cut& cut : {Cut{.tp = 2}, Cut{.tp = 4, .max_running = 6}, Cut{.tp = 8}, Cut{.threads = 3},
                         Cut{.chunk_rows = 7}, Cut{.max_running = 1}}) {
    const auto other = Calibrate(cut);
    ASSERT_TRUE(other.ok()) << other.status();
    EXPECT_TRUE(*other == *expected) << "tp " << cut.tp << ", threads " << cut.threads << ", " << cut.max_running
                                     << " running, chunks of " << cut.chunk_rows;
    const auto same_inputs = read_inputs();
    ASSERT_TRUE(same_inputs.ok()) << same_inputs.status();
    for (int layer = 0; layer < kLayers; ++layer) {
      const weights::InputMeanSquares &a = inputs->layers[layer], &b = same_inputs->layers[layer];
      for (const auto& [one, other_one] :
           {std::pair(&a.qkv, &b.qkv), {&a.o, &b.o}, {&a.gate_up, &b.gate_up}, {&a.down, &b.down}}) {
        // Sums of 360 squares in double, in another order.
        for (size_t i = 0; i < one->size(); ++i) EXPECT_FLOAT_EQ((*one)[i], (*other_one)[i]) << "tp " << cut.tp;
        EXPECT_GT(*std::ranges::min_element(*one), 0);
      }
    }
  }
}

TEST_F(CalibrationTest, NarrowScalesAreCountedInTheirLayers) {
  ASSERT_TRUE(Calibrate({}).ok());
  auto statistics = kv::ReadKvStatistics(absl::StrCat(folder_, "/", kv::KvStatistics::kFileName));
  ASSERT_TRUE(statistics.ok()) << statistics.status();
  statistics->k_histogram.clear();
  statistics->v_histogram.clear();
  for (auto [low, high] :
       {std::pair(&statistics->k_min, &statistics->k_max), {&statistics->v_min, &statistics->v_max}}) {
    for (size_t i = 0; i < low->size(); ++i) {
      const float middle = ((*low)[i] + (*high)[i]) / 2, half = ((*high)[i] - (*low)[i]) / 2;
      const bool is_narrow = i / (kKvHeads * kHeadDim) == 2;
      (*low)[i] = middle - half * (is_narrow ? 0.5f : 1.5f);
      (*high)[i] = middle + half * (is_narrow ? 0.5f : 1.5f);
    }
  }
  engine::RankOptions options = Options("int8-channel");
  options.kv_scales_dir = folder_;
  ASSERT_EQ(kv::WriteKvScales(folder_, *statistics, 2, kv::Granularity::kChannel), absl::OkStatus());
  auto group = ThreadGroup::Start(options, 2);
  ASSERT_TRUE(group.ok()) << group.status();
  RunAll((*group)->engine(), Windows());
  using ::testing::ElementsAre;
  using ::testing::Gt;
  for (const int rank : {0, 1}) {
    EXPECT_THAT((*group)->rank(rank).decoder->kv_pool().SaturatedCounts(), ElementsAre(0, 0, Gt(0), 0)) << rank;
  }
}

}  // namespace
}  // namespace rankwise::testing
