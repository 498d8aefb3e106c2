#include "worker/kv/kv_scales.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <limits>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>
#include <span>

#include "absl/strings/str_cat.h"
#include "base/mapped_file.h"
#include "kernels/kv_histogram.h"

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

TEST_F(KvScalesTest, Golden1AFileIsKScaleKZpVScaleVZpAndASymmetricOneIsRefused) {
  const std::string bytes("\x00\x00\x00\x3f\x00\x00\x80\x3f\x00\x00\x00\x40\x00\x00\x80\xbf", 16);  // 0.5, 1, 2, -1
  const std::string path = folder_ + "/layers.0.past_kv_scale.0.weight";
  ASSERT_EQ(WriteFileAtomically(path, bytes), absl::OkStatus());
  const auto read = ReadKvScales(folder_, "any", {1, 2, 2}, Plan(0, 1), Granularity::kRank);
  ASSERT_TRUE(read.ok()) << read.status();
  ASSERT_EQ(read->scales.size(), 4u);  // a channel each
  EXPECT_EQ(read->scales[1].k_scale, 0.5f);
  EXPECT_EQ(read->scales[1].k_zero_point, 1.0f);
  EXPECT_EQ(read->scales[1].v_scale, 2.0f);
  EXPECT_EQ(read->scales[1].v_zero_point, -1.0f);
  KvStatistics statistics{.n_layers = 1, .n_kv_heads = 1, .head_dim = 1};
  statistics.k_min = {-62.75f};
  statistics.k_max = {64.75f};
  statistics.v_min = {-256};
  statistics.v_max = {254};
  ASSERT_EQ(WriteKvScales(folder_, statistics, 1, Granularity::kRank), absl::OkStatus());
  EXPECT_EQ(*ReadTextFile(path), bytes);

  fs::remove(folder_ + "/kv_scales.json");
  ASSERT_EQ(WriteFileAtomically(path, bytes.substr(0, 8)), absl::OkStatus());
  const std::string refusal(ReadKvScales(folder_, "any", {1, 2, 2}, Plan(0, 1), Granularity::kRank).status().message());
  EXPECT_NE(refusal.find(path + " has 8 bytes: symmetric scales"), std::string::npos) << refusal;
}

// u = clamp(round_half_even((x - zp) / scale + 128), 0, 255) and (u - 128) * scale + zp, by what serves: V goes into a
// cache, and an attention of one position reads it back.
TEST_F(KvScalesTest, Golden2ValuesAreRoundedHalfToEvenSaturateAndComeBack) {
  KvStatistics statistics{.n_layers = 1, .n_kv_heads = 1, .head_dim = 8};
  statistics.k_min.assign(8, -1);
  statistics.k_max.assign(8, 1);
  statistics.v_min.assign(8, -62.75f);  // scale 0.5, zp 1
  statistics.v_max.assign(8, 64.75f);
  ASSERT_EQ(WriteKvScales(folder_, statistics, 1, Granularity::kRank), absl::OkStatus());
  const auto plan =
      *shard::PlanShard({.n_heads = 1, .n_kv_heads = 1, .head_dim = 8, .intermediate_size = 4, .vocab_size = 4},
                        {.rank = 0, .world_size = 1});
  const auto scales = ReadKvScales(folder_, "", {1, 1, 8}, plan, Granularity::kRank);
  ASSERT_TRUE(scales.ok()) << scales.status();
  // min, max, zp, both sides out of range, NaN, and ties: 0.5 to 0, 1.5 to 2 steps above zp.
  const float values[8] = {-62.75f, 64.75f, 1, -1e6f, 1e6f, std::numeric_limits<float>::quiet_NaN(), 1.25f, 1.75f};
  const int expected[8] = {0, 255, 128, 0, 255, 128, 128, 130};

  std::vector<std::unique_ptr<kernels::Backend>> backends;
  backends.push_back(kernels::CreateReferenceBackend());
  backends.push_back(*kernels::CreateCpuBackend({.threads = 1, .pin_threads = false}));
  for (const auto& backend : backends) {
    const auto pool = *backend->CreateKvPool(
        {.n_layers = 1, .n_kv_heads_local = 1, .head_dim = 8, .format = kernels::KvFormat::kInt8}, 1);
    ASSERT_EQ(backend->SetKvScales(*pool, scales->scales), absl::OkStatus());
    const int32_t token = 0, row_begin[2] = {0, 1}, first_position = 0, block = 0;
    const std::span<const int32_t> table(&block, 1);
    ASSERT_EQ(backend->BeginStep({.tokens = {&token, 1},
                                  .row_begin = row_begin,
                                  .first_position = {&first_position, 1},
                                  .block_table = {&table, 1}}),
              absl::OkStatus());
    std::vector<float> qkv(24, 0), out(8);
    std::copy_n(values, 8, qkv.begin() + 16);
    const kernels::AttentionShape shape{.n_heads_local = 1, .n_kv_heads_local = 1, .head_dim = 8, .score_scale = 1};
    ASSERT_EQ(
        backend->RopeAppend(qkv.data(), shape, {.position_count = 16}, nullptr, nullptr, 1e-6f, *pool, 0, nullptr),
        absl::OkStatus());
    ASSERT_EQ(backend->Attention(out.data(), qkv.data(), shape, *pool, 0), absl::OkStatus());
    const std::vector<std::byte> bytes = pool->BlockBytes(0, 0);  // K, then V: [1 head, 16 tokens, 8]
    for (int i = 0; i < 8; ++i) {
      EXPECT_EQ(static_cast<int8_t>(bytes[16 * 8 + i]) + 128, expected[i]) << backend->Description() << ", value " << i;
      EXPECT_EQ(out[i], static_cast<float>(expected[i] - 128) * 0.5f + 1) << backend->Description() << ", value " << i;
    }
    EXPECT_EQ(pool->SaturatedCounts()[0], 4);  // max is half a step out of range
  }
}

TEST_F(KvScalesTest, RanksHaveTheirOwnHeadsRanges) {
  ASSERT_EQ(WriteKvScales(folder_, Statistics(), 2, Granularity::kHead), absl::OkStatus());
  EXPECT_EQ(File("layers.0.past_kv_scale.0.weight"), (std::vector<float>{5.0f / 255, 0.5f, 1.0f / 255, 0.0f}));
  EXPECT_EQ(File("layers.0.past_kv_scale.1.weight"), (std::vector<float>{10.0f / 255, 1.0f, 3.0f / 255, 0.5f}));
  EXPECT_EQ(File("layers.0.past_kv_scale_head.0.weight"), File("layers.0.past_kv_scale.0.weight"));
  const auto scales = ReadKvScales(folder_, "0123456789abcdef", {2, 2, 2}, Plan(1, 2), Granularity::kRank);
  ASSERT_TRUE(scales.ok()) << scales.status();
  ASSERT_EQ(scales->scales.size(), 4u);
  EXPECT_EQ(scales->scales[0].k_zero_point, 1.0f);
  EXPECT_EQ(scales->scales[1].k_zero_point, 1.0f);
  EXPECT_EQ(scales->manifest_id.size(), 16u);
  EXPECT_GT(scales->scales[2].v_scale, 0) << "a constant has a scale all the same";
}

TEST_F(KvScalesTest, MissingShortAlteredOrForeignScalesAreRefusedByName) {
  ASSERT_EQ(WriteKvScales(folder_, Statistics(), 2, Granularity::kRank), absl::OkStatus());
  const auto refusal = [&](const std::string& fingerprint, int rank, int world, Granularity granularity) {
    const auto scales = ReadKvScales(folder_, fingerprint, {2, 2, 2}, Plan(rank, world), granularity);
    return scales.ok() ? "" : std::string(scales.status().message());
  };
  EXPECT_EQ(refusal("0123456789abcdef", 0, 2, Granularity::kRank), "");
  EXPECT_NE(refusal("another", 0, 2, Granularity::kRank).find("another model"), std::string::npos);
  EXPECT_NE(refusal("0123456789abcdef", 0, 1, Granularity::kRank).find("not of tp=1"), std::string::npos);
  EXPECT_NE(refusal("0123456789abcdef", 0, 2, Granularity::kHead).find("per head"), std::string::npos);
  const std::string path = folder_ + "/layers.1.past_kv_scale.0.weight";
  const std::string bytes = *ReadTextFile(path);
  ASSERT_EQ(WriteFileAtomically(path, bytes.substr(0, 8)), absl::OkStatus());
  EXPECT_NE(refusal("0123456789abcdef", 0, 2, Granularity::kRank).find(path + " has 8 bytes: symmetric scales"),
            std::string::npos);
  ASSERT_EQ(WriteFileAtomically(path, bytes.substr(0, 12)), absl::OkStatus());
  EXPECT_NE(refusal("0123456789abcdef", 0, 2, Granularity::kRank).find(path + " has 12 bytes instead of 16"),
            std::string::npos);
  const float bad[4] = {std::numeric_limits<float>::quiet_NaN(), 0, 1, 0}, negative[4] = {-1, 0, 1, 0};
  ASSERT_EQ(WriteFileAtomically(path, std::string(reinterpret_cast<const char*>(bad), 16)), absl::OkStatus());
  EXPECT_NE(refusal("0123456789abcdef", 0, 2, Granularity::kRank).find("not finite"), std::string::npos);
  ASSERT_EQ(WriteFileAtomically(path, std::string(reinterpret_cast<const char*>(negative), 16)), absl::OkStatus());
  EXPECT_NE(refusal("0123456789abcdef", 0, 2, Granularity::kRank).find("positive"), std::string::npos);
  fs::remove(path);
  EXPECT_NE(refusal("0123456789abcdef", 0, 2, Granularity::kRank).find(path), std::string::npos);
}

// q = round_half_even((x - zp) / scale) in f32, saturating; u = q + 128.
int Quantize(float x, float scale, float zero_point) {
  return static_cast<int>(std::clamp(std::nearbyint((x - zero_point) / scale), -128.0f, 127.0f));
}

TEST_F(KvScalesTest, ScalesSpanTheRangeOnAllSteps) {
  for (const auto& [low, high] : {std::pair{-4.0f, 6.0f}, {-1.0f, 1.0f}, {0.0f, 255.0f}, {100.0f, 100.5f}}) {
    KvStatistics statistics{.n_layers = 1, .n_kv_heads = 1, .head_dim = 1};
    statistics.k_min = statistics.v_min = {low};
    statistics.k_max = statistics.v_max = {high};
    ASSERT_EQ(WriteKvScales(folder_, statistics, 1, Granularity::kRank), absl::OkStatus());
    const std::vector<float> file = File("layers.0.past_kv_scale.0.weight");
    const float scale = file[0], zero_point = file[1];
    EXPECT_EQ(Quantize(zero_point, scale, zero_point), 0);
    EXPECT_LE(Quantize(low, scale, zero_point), -127);  // -127.5, give or take the rounding of zp
    EXPECT_EQ(Quantize(high, scale, zero_point), 127);
    EXPECT_EQ(Quantize(low - 10 * scale, scale, zero_point), -128);
    EXPECT_EQ(Quantize(high + 10 * scale, scale, zero_point), 127);
    for (int step = 0; step <= 1000; ++step) {
      const float x = low + (high - low) * static_cast<float>(step) / 1000;
      const float back = static_cast<float>(Quantize(x, scale, zero_point)) * scale + zero_point;
      // Half a step; the top half step saturates; the f32 rounding of x, zp and the sum.
      EXPECT_NEAR(back, x, 0.5f * scale + 4 * std::abs(high) * 0x1p-24f) << x;
    }
  }
}

TEST_F(KvScalesTest, Golden3AnExportForFewerRanksCoversThoseForMore) {
  KvStatistics statistics{.n_layers = 3, .n_kv_heads = 8, .head_dim = 4};
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  for (int i = 0; i < 3 * 8 * 4; ++i) {
    const float a = normal(random), b = normal(random), c = normal(random), d = normal(random);
    statistics.k_min.push_back(std::min(a, b));
    statistics.k_max.push_back(std::max(a, b));
    statistics.v_min.push_back(std::min(c, d));
    statistics.v_max.push_back(std::max(c, d));
  }
  std::vector<float> of_one_rank(3);
  for (const int world : {1, 2, 4, 8, 16}) {
    ASSERT_EQ(WriteKvScales(folder_, statistics, world, Granularity::kRank), absl::OkStatus());
    for (int layer = 0; layer < 3; ++layer) {
      float whole_low = INFINITY, whole_high = -INFINITY;
      for (int rank = 0; rank < world; ++rank) {
        const std::vector<float> file = File(absl::StrCat("layers.", layer, ".past_kv_scale.", rank, ".weight"));
        whole_low = std::min(whole_low, file[1] - 127.5f * file[0]);
        whole_high = std::max(whole_high, file[1] + 127.5f * file[0]);
        if (world == 1) of_one_rank[layer] = file[0];
        EXPECT_LE(file[0], of_one_rank[layer]);
      }
      const auto begin = layer * 32, end = begin + 32;
      EXPECT_NEAR(whole_low, *std::min_element(&statistics.k_min[begin], statistics.k_min.data() + end), 1e-5);
      EXPECT_NEAR(whole_high, *std::max_element(&statistics.k_max[begin], statistics.k_max.data() + end), 1e-5);
    }
  }
}

TEST_F(KvScalesTest, HeadScalesServeEveryDegreeAndAllRanksSeeOneId) {
  ASSERT_EQ(WriteKvScales(folder_, Statistics(), 2, Granularity::kHead), absl::OkStatus());
  const auto read = [&](int rank, int world, Granularity granularity) {
    const auto scales = ReadKvScales(folder_, "0123456789abcdef", {2, 2, 2}, Plan(rank, world), granularity);
    EXPECT_TRUE(scales.ok()) << scales.status();
    return scales.ok() ? *scales : RankScales{};
  };
  const RankScales whole = read(0, 1, Granularity::kHead), second = read(1, 2, Granularity::kHead);
  ASSERT_EQ(whole.scales.size(), 8u);
  ASSERT_EQ(second.scales.size(), 4u);
  for (int layer = 0; layer < 2; ++layer) {
    EXPECT_EQ(second.scales[2 * layer].k_scale, whole.scales[4 * layer + 2].k_scale);
    EXPECT_EQ(second.scales[2 * layer].v_zero_point, whole.scales[4 * layer + 2].v_zero_point);
  }
  EXPECT_EQ(whole.manifest_id, second.manifest_id);
  EXPECT_EQ(whole.manifest_id, read(0, 2, Granularity::kRank).manifest_id);
}

TEST_F(KvScalesTest, ChannelsHaveTheirOwnRangesBesideThoseOfHeadsAndRanks) {
  ASSERT_EQ(WriteKvScales(folder_, Statistics(), 2, Granularity::kChannel), absl::OkStatus());
  const std::string file = "layers.0.past_kv_scale_channel.1.weight";
  EXPECT_EQ(File(file), (std::vector<float>{10.0f / 255, 1.0f, 3.0f / 255, 0.5f, 5.0f / 255, -0.5f, 1.0f / 255, 0.5f}));
  const auto read = [&](int rank, int world, Granularity granularity) {
    return ReadKvScales(folder_, "0123456789abcdef", {2, 2, 2}, Plan(rank, world), granularity);
  };
  const auto whole = read(0, 1, Granularity::kChannel), second = read(1, 2, Granularity::kChannel);
  ASSERT_TRUE(whole.ok() && second.ok()) << whole.status() << second.status();
  ASSERT_EQ(whole->scales.size(), 8u);
  ASSERT_EQ(second->scales.size(), 4u);
  EXPECT_EQ(whole->scales[1].k_scale, 5.0f / 255);
  EXPECT_EQ(second->scales[1].k_scale, 5.0f / 255);
  EXPECT_EQ(second->scales[1].v_zero_point, 0.5f);
  EXPECT_EQ(second->scales[0].k_scale, whole->scales[2].k_scale);
  for (const Granularity coarser : {Granularity::kRank, Granularity::kHead}) {
    const auto scales = read(0, 2, coarser);
    ASSERT_TRUE(scales.ok()) << scales.status();
    EXPECT_EQ(scales->manifest_id, whole->manifest_id);
  }
  const std::string bytes = *ReadTextFile(folder_ + "/" + file);
  ASSERT_EQ(WriteFileAtomically(folder_ + "/" + file, bytes.substr(0, 16)), absl::OkStatus());
  EXPECT_NE(read(0, 2, Granularity::kHead).status().message().find(file + " has 16 bytes instead of 32"),
            absl::string_view::npos);
  ASSERT_EQ(WriteKvScales(folder_, Statistics(), 2, Granularity::kHead), absl::OkStatus());
  EXPECT_NE(read(0, 2, Granularity::kChannel).status().message().find("no scales per channel"),
            absl::string_view::npos);
}

TEST_F(KvScalesTest, FilesOfAnotherExportAreRefused) {
  ASSERT_EQ(WriteKvScales(folder_, Statistics(), 1, Granularity::kRank), absl::OkStatus());
  const std::string stale = *ReadTextFile(folder_ + "/layers.1.past_kv_scale.0.weight");
  KvStatistics wider = Statistics();
  wider.k_max.back() = 50;
  ASSERT_EQ(WriteKvScales(folder_, wider, 2, Granularity::kRank), absl::OkStatus());
  // Rank 0 does not read rank 1's file for itself, but a group must not start on a mixed set.
  ASSERT_EQ(WriteFileAtomically(folder_ + "/layers.1.past_kv_scale.1.weight", stale), absl::OkStatus());
  const auto mixed = ReadKvScales(folder_, "0123456789abcdef", {2, 2, 2}, Plan(0, 2), Granularity::kRank);
  EXPECT_EQ(mixed.status().code(), absl::StatusCode::kFailedPrecondition) << mixed.status();
}

TEST_F(KvScalesTest, FilesWithoutAManifestServePerRankWithOneIdForAllRanks) {
  ASSERT_EQ(WriteKvScales(folder_, Statistics(), 2, Granularity::kRank), absl::OkStatus());
  fs::remove(folder_ + "/kv_scales.json");
  const auto first = ReadKvScales(folder_, "any", {2, 2, 2}, Plan(0, 2), Granularity::kRank);
  const auto second = ReadKvScales(folder_, "any", {2, 2, 2}, Plan(1, 2), Granularity::kRank);
  // The first file alone would do for one rank, but covers the heads of one of two.
  const std::string narrow(ReadKvScales(folder_, "any", {2, 2, 2}, Plan(0, 1), Granularity::kRank).status().message());
  EXPECT_NE(narrow.find("layers.0.past_kv_scale.1.weight is for more ranks than tp=1"), std::string::npos) << narrow;
  ASSERT_TRUE(first.ok() && second.ok()) << first.status() << second.status();
  EXPECT_EQ(first->manifest_id, second->manifest_id);
  EXPECT_NE(first->scales[0].k_scale, second->scales[0].k_scale);
  EXPECT_TRUE(absl::IsNotFound(ReadKvScales(folder_, "any", {2, 2, 2}, Plan(0, 2), Granularity::kHead).status()));
}

TEST_F(KvScalesTest, MutatedManifestsNeverCrash) {
  ASSERT_EQ(WriteKvScales(folder_, Statistics(), 2, Granularity::kHead), absl::OkStatus());
  const std::string path = folder_ + "/kv_scales.json", manifest = *ReadTextFile(path);
  std::mt19937 random(11);
  int accepted = 0;
  for (int round = 0; round < 500; ++round) {
    std::string bytes = manifest;
    bytes[random() % bytes.size()] = static_cast<char>(random());
    ASSERT_EQ(WriteFileAtomically(path, bytes), absl::OkStatus());
    accepted += ReadKvScales(folder_, "0123456789abcdef", {2, 2, 2}, Plan(0, 2), Granularity::kHead).ok();
  }
  EXPECT_GT(accepted, 0);
  EXPECT_LT(accepted, 500);
}

TEST_F(KvScalesTest, StatisticsBeyondFloatArithmeticAreRefused) {
  KvStatistics huge = Statistics();
  huge.v_max[0] = 2e38f;
  EXPECT_FALSE(WriteKvScales(folder_, huge, 1, Granularity::kRank).ok());
  KvStatistics crossed = Statistics();
  crossed.v_min[0] = 1;
  EXPECT_FALSE(WriteKvScales(folder_, crossed, 1, Granularity::kRank).ok());
}

TEST_F(KvScalesTest, SymmetricScalesHaveZeroPointsOfZeroAndLoad) {
  ASSERT_EQ(WriteKvScales(folder_, Statistics(), 1, Granularity::kHead, {.is_symmetric = true}), absl::OkStatus());
  EXPECT_EQ(File("layers.0.past_kv_scale.0.weight"), (std::vector<float>{6.0f / 127, 0, 2.0f / 127, 0}));
  EXPECT_EQ(File("layers.0.past_kv_scale_head.0.weight"), (std::vector<float>{3.0f / 127, 0, 0.5f / 127, 0}));
  for (const Granularity granularity : {Granularity::kRank, Granularity::kHead}) {
    const auto scales = ReadKvScales(folder_, "0123456789abcdef", {2, 2, 2}, Plan(0, 1), granularity);
    ASSERT_TRUE(scales.ok()) << scales.status();
    EXPECT_EQ(scales->scales[0].k_zero_point, 0);
  }
}

KvStatistics WithHistograms(KvStatistics s) {
  const auto count = [&](const std::vector<float>& low, const std::vector<float>& high) {
    std::vector<uint64_t> histogram(low.size() / s.head_dim * kernels::kHistogramBins);
    for (size_t i = 0; i < low.size(); ++i) {
      uint64_t* counts = &histogram[i / s.head_dim * kernels::kHistogramBins];
      kernels::CountValues(counts, &low[i], 1);
      kernels::CountValues(counts, &high[i], 1);
      counts[kernels::HistogramBin(low[i] / 16)] += 1000000;
      counts[kernels::HistogramBin(high[i] / 16)] += 1000000;
    }
    return histogram;
  };
  s.k_histogram = count(s.k_min, s.k_max);
  s.v_histogram = count(s.v_min, s.v_max);
  return s;
}

TEST_F(KvScalesTest, ClippingNarrowsAndNeedsHistograms) {
  const auto scale_with = [&](ClipMethod method) {
    EXPECT_EQ(WriteKvScales(folder_, WithHistograms(Statistics()), 1, Granularity::kHead, {.method = method}),
              absl::OkStatus());
    return File("layers.0.past_kv_scale.0.weight")[0];
  };
  const float whole = scale_with(ClipMethod::kNone);
  EXPECT_LT(scale_with(ClipMethod::kPercentile), 0.2f * whole);
  const float least_error = scale_with(ClipMethod::kMse);
  EXPECT_LT(least_error, 0.9f * whole);
  EXPECT_TRUE(ReadKvScales(folder_, "0123456789abcdef", {2, 2, 2}, Plan(0, 1), Granularity::kHead).ok());
  for (const ClipMethod method : {ClipMethod::kPercentile, ClipMethod::kMse}) {
    EXPECT_EQ(WriteKvScales(folder_, WithHistograms(Statistics()), 1, Granularity::kChannel, {.method = method}).code(),
              absl::StatusCode::kFailedPrecondition);
    const absl::Status refused = WriteKvScales(folder_, Statistics(), 1, Granularity::kHead, {.method = method});
    EXPECT_EQ(refused.code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_NE(std::string(refused.message()).find("histograms"), std::string::npos) << refused;
  }
}

TEST_F(KvScalesTest, TheManifestSaysWhatTheScalesAre) {
  KvStatistics statistics = WithHistograms(Statistics());
  statistics.seed = 9;
  ASSERT_EQ(WriteKvScales(folder_, statistics, 2, Granularity::kRank,
                          {.method = ClipMethod::kPercentile, .percentile = 99.5, .is_symmetric = true}),
            absl::OkStatus());
  const auto manifest = nlohmann::json::parse(*ReadTextFile(folder_ + "/kv_scales.json"));
  EXPECT_EQ(manifest["model"], "0123456789abcdef");
  EXPECT_EQ(manifest["tp"], 2);
  EXPECT_EQ(manifest["ranks"], nlohmann::json::parse(R"([{"rank":0,"kv_heads":[0,1]},{"rank":1,"kv_heads":[1,2]}])"));
  EXPECT_EQ(manifest["granularity"], "tensor");
  EXPECT_EQ(manifest["n_layers"], 2);
  EXPECT_EQ(manifest["bits"], 8);
  EXPECT_EQ(manifest["symmetric"], true);
  EXPECT_EQ(manifest["clip"], "percentile");
  EXPECT_EQ(manifest["percentile"], 99.5);
  EXPECT_EQ(manifest["dataset"], "ptb");
  EXPECT_EQ(manifest["samples"], 128);
  EXPECT_EQ(manifest["seqlen"], 2048);
  EXPECT_EQ(manifest["seed"], 9);
  EXPECT_FALSE(manifest.contains("measured"));
}

TEST_F(KvScalesTest, MeasurementsJoinTheManifestAndTheIdStays) {
  ASSERT_EQ(WriteKvScales(folder_, Statistics(), 1, Granularity::kHead), absl::OkStatus());
  const auto id = [&] {
    const auto scales = ReadKvScales(folder_, "0123456789abcdef", {2, 2, 2}, Plan(0, 1), Granularity::kHead);
    return scales.ok() ? scales->manifest_id : std::string(scales.status().message());
  };
  const std::string before = id();
  MeasuredLoss loss{.kv = "int8-head", .text = "held out.txt", .token_count = 5, .nll_change = 0.25, .kl_mean = 0.5};
  ASSERT_EQ(RecordMeasurement(folder_, before, loss), absl::OkStatus());
  loss.kv = "int8";
  ASSERT_EQ(RecordMeasurement(folder_, before, loss), absl::OkStatus());
  loss.nll_change = 0.125;
  ASSERT_EQ(RecordMeasurement(folder_, before, loss), absl::OkStatus());
  EXPECT_EQ(id(), before);
  const auto manifest = nlohmann::json::parse(*ReadTextFile(folder_ + "/kv_scales.json"));
  EXPECT_EQ(manifest["id"], before);
  EXPECT_EQ(manifest["measured"].size(), 2u);
  EXPECT_EQ(manifest["measured"]["int8-head"]["nll_change"], 0.25);
  EXPECT_EQ(manifest["measured"]["int8"]["nll_change"], 0.125);
  EXPECT_EQ(manifest["measured"]["int8"]["text"], "held out.txt");
  EXPECT_EQ(RecordMeasurement(folder_, "another", loss).code(), absl::StatusCode::kFailedPrecondition);
  fs::remove(folder_ + "/kv_scales.json");
  EXPECT_EQ(RecordMeasurement(folder_, before, loss).code(), absl::StatusCode::kFailedPrecondition);
}

}  // namespace
}  // namespace rankwise::kv
