#include "worker/kv/kv_scales.h"

#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <limits>

#include "base/mapped_file.h"

namespace rankwise::kv {
namespace {

namespace fs = std::filesystem;

class KvScalesTest : public ::testing::Test {
 protected:
  KvScalesTest() : folder_(::testing::TempDir() + "scales_" + std::to_string(getpid())) {
    fs::create_directories(folder_);
  }
  ~KvScalesTest() override { fs::remove_all(folder_); }

  // Two layers, two heads of two channels; head 1 is wider than head 0.
  static KvStatistics Statistics() {
    return {.model_fingerprint = "0123456789abcdef",
            .n_layers = 2,
            .n_kv_heads = 2,
            .head_dim = 2,
            .dataset = "ptb",
            .sample_count = 128,
            .sample_tokens = 2048,
            .k_min = {-1, -2, -4, -3, -1, -2, -4, -3},
            .k_max = {1, 3, 6, 2, 1, 3, 6, 2},
            .v_min = {-0.5f, 0, -1, 0, 0, 0, 0, 0},
            .v_max = {0.5f, 0.25f, 2, 1, 0, 0, 0, 0}};
  }
  static shard::ShardPlan Plan(int rank, int world) {
    return *shard::PlanShard({.n_heads = 2, .n_kv_heads = 2, .head_dim = 2, .intermediate_size = 4, .vocab_size = 4},
                             {.rank = rank, .world_size = world});
  }
  std::vector<float> File(const std::string& name) const {
    const std::string bytes = *ReadTextFile(folder_ + "/" + name);
    std::vector<float> values(bytes.size() / 4);
    std::memcpy(values.data(), bytes.data(), bytes.size());
    return values;
  }

  const std::string folder_;
};

TEST_F(KvScalesTest, AFileIsSixteenBytesOfTheRightFourFloats) {
  ASSERT_EQ(WriteKvScales(folder_, Statistics(), 1, Granularity::kRank), absl::OkStatus());
  EXPECT_EQ(fs::file_size(folder_ + "/layers.0.past_kv_scale.0.weight"), 16u);
  EXPECT_EQ(File("layers.0.past_kv_scale.0.weight"), (std::vector<float>{10.0f / 255, 1.0f, 3.0f / 255, 0.5f}));
}

TEST_F(KvScalesTest, RanksHaveTheirOwnHeadsRanges) {
  ASSERT_EQ(WriteKvScales(folder_, Statistics(), 2, Granularity::kHead), absl::OkStatus());
  EXPECT_EQ(File("layers.0.past_kv_scale.0.weight"), (std::vector<float>{5.0f / 255, 0.5f, 1.0f / 255, 0.0f}));
  EXPECT_EQ(File("layers.0.past_kv_scale.1.weight"), (std::vector<float>{10.0f / 255, 1.0f, 3.0f / 255, 0.5f}));
  EXPECT_EQ(File("layers.0.past_kv_scale_head.0.weight"), File("layers.0.past_kv_scale.0.weight"));
  const auto scales = ReadKvScales(folder_, "0123456789abcdef", 2, 2, Plan(1, 2), Granularity::kRank);
  ASSERT_TRUE(scales.ok()) << scales.status();
  ASSERT_EQ(scales->scales.size(), 2u);
  EXPECT_EQ(scales->scales[0].k_zero_point, 1.0f);
  EXPECT_EQ(scales->manifest_id.size(), 16u);
  EXPECT_GT(scales->scales[1].v_scale, 0) << "a constant has a scale all the same";
}

TEST_F(KvScalesTest, MissingShortAlteredOrForeignScalesAreRefusedByName) {
  ASSERT_EQ(WriteKvScales(folder_, Statistics(), 2, Granularity::kRank), absl::OkStatus());
  const auto refusal = [&](const std::string& fingerprint, int rank, int world, Granularity granularity) {
    const auto scales = ReadKvScales(folder_, fingerprint, 2, 2, Plan(rank, world), granularity);
    return scales.ok() ? "" : std::string(scales.status().message());
  };
  EXPECT_EQ(refusal("0123456789abcdef", 0, 2, Granularity::kRank), "");
  EXPECT_NE(refusal("another", 0, 2, Granularity::kRank).find("another model"), std::string::npos);
  EXPECT_NE(refusal("0123456789abcdef", 0, 1, Granularity::kRank).find("not of tp=1"), std::string::npos);
  EXPECT_NE(refusal("0123456789abcdef", 0, 2, Granularity::kHead).find("per head"), std::string::npos);
  const std::string path = folder_ + "/layers.1.past_kv_scale.0.weight";
  const std::string bytes = *ReadTextFile(path);
  ASSERT_EQ(WriteFileAtomically(path, bytes.substr(0, 8)), absl::OkStatus());
  EXPECT_NE(refusal("0123456789abcdef", 0, 2, Granularity::kRank).find(path + " has 8 bytes"), std::string::npos);
  const float bad[4] = {std::numeric_limits<float>::quiet_NaN(), 0, 1, 0}, negative[4] = {-1, 0, 1, 0};
  ASSERT_EQ(WriteFileAtomically(path, std::string(reinterpret_cast<const char*>(bad), 16)), absl::OkStatus());
  EXPECT_NE(refusal("0123456789abcdef", 0, 2, Granularity::kRank).find("not finite"), std::string::npos);
  ASSERT_EQ(WriteFileAtomically(path, std::string(reinterpret_cast<const char*>(negative), 16)), absl::OkStatus());
  EXPECT_NE(refusal("0123456789abcdef", 0, 2, Granularity::kRank).find("positive"), std::string::npos);
  fs::remove(path);
  EXPECT_NE(refusal("0123456789abcdef", 0, 2, Granularity::kRank).find(path), std::string::npos);
}

TEST_F(KvScalesTest, StatisticsSurviveTheirFile) {
  const std::string path = folder_ + "/kv_statistics.safetensors";
  const KvStatistics written = Statistics();
  ASSERT_EQ(WriteKvStatistics(path, written), absl::OkStatus());
  const auto read = ReadKvStatistics(path);
  ASSERT_TRUE(read.ok()) << read.status();
  EXPECT_EQ(read->k_min, written.k_min);
  EXPECT_EQ(read->v_max, written.v_max);
  EXPECT_EQ(read->dataset, "ptb");
  EXPECT_EQ(read->sample_count, 128);
  EXPECT_EQ(read->AbsMax(true)[2], 6);
  KvStatistics bad = written;
  bad.k_min[0] = std::numeric_limits<float>::infinity();
  EXPECT_FALSE(WriteKvStatistics(path, bad).ok());
  EXPECT_FALSE(WriteKvScales(folder_, bad, 1, Granularity::kRank).ok());
}

}  // namespace
}  // namespace rankwise::kv
