#include "worker/kv/kv_statistics.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <limits>
#include <random>

#include "base/mapped_file.h"
#include "kernels/kv_histogram.h"

namespace rankwise::kv {
namespace {

using ::testing::HasSubstr;

constexpr int kBins = kernels::kHistogramBins;

class KvStatisticsTest : public ::testing::Test {
 protected:
  KvStatisticsTest() : path_(::testing::TempDir() + "kv_statistics_" + std::to_string(getpid()) + ".safetensors") {}
  ~KvStatisticsTest() override { std::filesystem::remove(path_); }

  // Two layers, two heads of two channels; a value of each channel's two extremes and 100 of 0.25.
  static KvStatistics Statistics() {
    KvStatistics s{.model_fingerprint = "0123456789abcdef",
                   .n_layers = 2,
                   .n_kv_heads = 2,
                   .head_dim = 2,
                   .dataset = "ptb",
                   .sample_count = 128,
                   .sample_tokens = 2048,
                   .seed = 7,
                   .k_min = {-1, -2, -4, -3, -1, -2, -4, -3},
                   .k_max = {1, 3, 6, 2, 1, 3, 6, 2},
                   .v_min = {-0.5f, 0, -1, 0, 0, 0, 0, 0},
                   .v_max = {0.5f, 0.25f, 2, 1, 0.5f, 1, 1, 1}};
    s.k_histogram = Histogram(s.k_min, s.k_max);
    s.v_histogram = Histogram(s.v_min, s.v_max);
    return s;
  }
  static std::vector<uint64_t> Histogram(const std::vector<float>& low, const std::vector<float>& high) {
    std::vector<uint64_t> histogram(low.size() / 2 * kBins);
    for (size_t i = 0; i < low.size(); ++i) {
      uint64_t* counts = &histogram[i / 2 * kBins];
      kernels::CountValues(counts, &low[i], 1);
      kernels::CountValues(counts, &high[i], 1);
      counts[kernels::HistogramBin(0.25f)] += 50;
    }
    return histogram;
  }
  std::string Refusal(const KvStatistics& statistics) const {
    const absl::Status status = WriteKvStatistics(path_, statistics);
    return status.ok() ? "" : std::string(status.message());
  }
  // What reading says to a file in which the first `from` became `to`, of the same length.
  std::string RefusalOfFile(const std::string& from, const std::string& to) const {
    std::string bytes = *ReadTextFile(path_);
    const size_t at = bytes.find(from);
    EXPECT_NE(at, std::string::npos) << from;
    EXPECT_EQ(from.size(), to.size());
    const std::string original = bytes;
    bytes.replace(at, from.size(), to);
    EXPECT_EQ(WriteFileAtomically(path_, bytes), absl::OkStatus());
    const auto read = ReadKvStatistics(path_);
    EXPECT_EQ(WriteFileAtomically(path_, original), absl::OkStatus());
    return read.ok() ? "" : std::string(read.status().message());
  }

  const std::string path_;
};

TEST_F(KvStatisticsTest, SurviveTheirFile) {
  const KvStatistics written = Statistics();
  ASSERT_EQ(WriteKvStatistics(path_, written), absl::OkStatus());
  const auto read = ReadKvStatistics(path_);
  ASSERT_TRUE(read.ok()) << read.status();
  EXPECT_EQ(read->k_min, written.k_min);
  EXPECT_EQ(read->v_max, written.v_max);
  EXPECT_EQ(read->k_histogram, written.k_histogram);
  EXPECT_EQ(read->v_histogram, written.v_histogram);
  EXPECT_EQ(read->dataset, "ptb");
  EXPECT_EQ(read->sample_count, 128);
  EXPECT_EQ(read->sample_tokens, 2048);
  EXPECT_EQ(read->seed, 7u);
  EXPECT_EQ(read->AbsMax(true)[2], 6);
}

TEST_F(KvStatisticsTest, ADatasetNameNeedNotBeUtf8) {
  KvStatistics statistics = Statistics();
  statistics.dataset = "caf\xe9.txt";
  ASSERT_EQ(WriteKvStatistics(path_, statistics), absl::OkStatus());
  EXPECT_THAT(ReadKvStatistics(path_)->dataset, HasSubstr("caf"));
}

TEST_F(KvStatisticsTest, SpreadsAreThoseOfTheHeads) {
  const KvStatistics s = Statistics();
  const ValueSpread one = s.Spread(true, 0, {0, 1}), both = s.Spread(true, 0, {0, 2});
  EXPECT_EQ(one.min, -2);
  EXPECT_EQ(one.max, 3);
  EXPECT_EQ(both.min, -4);
  EXPECT_EQ(both.max, 6);
  EXPECT_EQ(one.histogram[kernels::HistogramBin(0.25f)], 100u);
  EXPECT_EQ(both.histogram[kernels::HistogramBin(0.25f)], 200u);
  EXPECT_EQ(both.histogram[kernels::HistogramBin(6)], 1u);
  EXPECT_EQ(s.Spread(false, 0, {1, 2}).max, 2);
}

TEST_F(KvStatisticsTest, ContradictionsAreRefused) {
  EXPECT_EQ(Refusal(Statistics()), "");
  KvStatistics bad = Statistics();
  bad.k_min[0] = -std::numeric_limits<float>::infinity();
  EXPECT_THAT(Refusal(bad), HasSubstr("not finite"));
  bad = Statistics();
  bad.v_min[0] = 1;
  EXPECT_THAT(Refusal(bad), HasSubstr("minimum above"));
  bad = Statistics();
  bad.v_histogram.clear();
  EXPECT_THAT(Refusal(bad), HasSubstr("0 bins instead of"));
  bad = Statistics();
  bad.k_histogram[kernels::HistogramBin(3)] = 0;
  EXPECT_THAT(Refusal(bad), HasSubstr("other extremes than -2 and 3"));
  bad = Statistics();
  bad.k_histogram[kBins + kernels::HistogramBin(-4) - 1] = 1;
  EXPECT_THAT(Refusal(bad), HasSubstr("other extremes than -4 and 6"));
  bad = Statistics();
  std::fill_n(bad.v_histogram.begin(), kBins, 0);
  EXPECT_THAT(Refusal(bad), HasSubstr("counts nothing"));
  bad = Statistics();
  bad.v_histogram[kernels::HistogramBin(0.25f)] = std::numeric_limits<uint64_t>::max();
  EXPECT_THAT(Refusal(bad), HasSubstr("a count beyond"));
}

TEST_F(KvStatisticsTest, ForeignFilesAreRefused) {
  ASSERT_EQ(WriteKvStatistics(path_, Statistics()), absl::OkStatus());
  EXPECT_EQ(RefusalOfFile("ptb", "ptx"), "");
  EXPECT_THAT(RefusalOfFile("in 16 bins", "in 32 bins"), HasSubstr("this build reads"));
  EXPECT_THAT(RefusalOfFile("key.histogram", "key.histogrom"), HasSubstr("key.histogram is not a U64 tensor"));
  EXPECT_THAT(RefusalOfFile("\"dtype\":\"U64\"", "\"dtype\":\"I64\""), HasSubstr("is not a U64 tensor"));
  EXPECT_THAT(RefusalOfFile("kv-statistics-1", "kv-statistics-9"), HasSubstr("not a KV statistics file"));
  EXPECT_THAT(RefusalOfFile("value.min", "valve.min"), HasSubstr("value.min is not a F32 tensor"));
}

// Any damage is refused or harmless: whatever is accepted keeps the promises of CheckStatistics.
TEST_F(KvStatisticsTest, MutatedFilesNeverCrash) {
  ASSERT_EQ(WriteKvStatistics(path_, Statistics()), absl::OkStatus());
  const std::string file = *ReadTextFile(path_);
  std::mt19937 random(13);
  int accepted = 0;
  for (int round = 0; round < 300; ++round) {
    std::string bytes = file;
    // Half of the damage in the header and the ranges, where it matters most.
    bytes[random() % (round % 2 ? bytes.size() : 1600)] = static_cast<char>(random());
    if (round % 10 == 0) bytes.resize(random() % bytes.size());
    ASSERT_EQ(WriteFileAtomically(path_, bytes), absl::OkStatus());
    const auto read = ReadKvStatistics(path_);
    if (!read.ok()) continue;
    ++accepted;
    ASSERT_EQ(CheckStatistics(*read), absl::OkStatus());
    for (const bool of_keys : {true, false}) {
      const ValueSpread spread = read->Spread(of_keys, 0, {0, read->n_kv_heads});
      if (!spread.histogram.empty()) {
        EXPECT_GT(ChooseParameters(spread, {.method = ClipMethod::kPercentile}).scale, 0);
      }
    }
  }
  EXPECT_GT(accepted, 0);
  EXPECT_LT(accepted, 300);
}

}  // namespace
}  // namespace rankwise::kv
