#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numeric>

#include "kernels/kv_histogram.h"
#include "kernels/number_formats.h"
#include "kernels/test_support.h"

namespace rankwise::kernels {
namespace {

constexpr KvFormat kFormats[] = {KvFormat::kF32, KvFormat::kF16, KvFormat::kInt8, KvFormat::kInt8Online,
                                 KvFormat::kInt4Online};

// Two segments in shuffled blocks, two layers of which the second is written.
struct Append {
  AttentionShape shape;
  KvFormat format;
  RopeTable rope;
  std::vector<float> qkv, q_norm, k_norm;
  std::vector<KvChannelScales> scales;  // [2, 2, head_dim]
  Step step;

  Append(int head_dim, int group, int rotary_dim, KvFormat format, Random& random)
      : shape{.n_heads_local = 2 * group, .n_kv_heads_local = 2, .head_dim = head_dim, .score_scale = 1},
        format(format),
        rope(MakeRope(rotary_dim, 100)) {
    step.Add(13, 20, {5, 2, 7}).Add(0, 3, {1}).Add(40, 1, {0, 3, 6});
    qkv = random.Floats(step.row_count() * (2 * group + 4) * head_dim, -2, 2);
    q_norm = random.Floats(head_dim, 0.5f, 1.5f);
    k_norm = random.Floats(head_dim, 0.5f, 1.5f);
    for (int i = 0; i < 4 * head_dim; ++i) {
      scales.push_back({random.Uniform(0.005f, 0.02f), random.Uniform(-0.5f, 0.5f), random.Uniform(0.005f, 0.02f),
                        random.Uniform(-0.5f, 0.5f)});
    }
  }

  KvObservation EmptyObservation() const {
    const std::vector<float> low(2 * shape.head_dim, std::numeric_limits<float>::infinity());
    const std::vector<float> high(2 * shape.head_dim, -std::numeric_limits<float>::infinity());
    const std::vector<uint64_t> counts(2 * kHistogramBins);
    return {.k_min = low, .k_max = high, .v_min = low, .v_max = high, .k_histogram = counts, .v_histogram = counts};
  }
};

struct Result {
  std::vector<float> qkv;
  std::vector<std::byte> blocks;
  std::vector<int64_t> saturated;
  KvObservation observation;
};

Result RunOn(const std::string& name, int threads, Append& a, bool has_norm) {
  const auto backend = MakeBackend(name, threads);
  auto pool = backend->CreateKvPool(
      {.n_layers = 2, .n_kv_heads_local = 2, .head_dim = a.shape.head_dim, .format = a.format}, 8);
  EXPECT_TRUE(pool.ok());
  if (a.format == KvFormat::kInt8) {
    EXPECT_TRUE(backend->SetKvScales(**pool, a.scales).ok());
  }
  EXPECT_TRUE(backend->BeginStep(a.step.rows()).ok());
  Guarded qkv(a.qkv);
  Result result{.observation = a.EmptyObservation()};
  EXPECT_TRUE(backend
                  ->RopeAppend(qkv.data(), a.shape, a.rope, has_norm ? a.q_norm.data() : nullptr,
                               has_norm ? a.k_norm.data() : nullptr, 1e-6f, **pool, 1, &result.observation)
                  .ok());
  EXPECT_TRUE(qkv.BandsAreIntact());
  // K and V of qkv are scratch after the append; Q is the result.
  const int64_t width = (a.shape.n_heads_local + 4) * a.shape.head_dim,
                q_width = a.shape.n_heads_local * a.shape.head_dim;
  for (int64_t row = 0; row < a.step.row_count(); ++row) {
    result.qkv.insert(result.qkv.end(), qkv.data() + row * width, qkv.data() + row * width + q_width);
  }
  for (int layer : {0, 1}) {
    for (int32_t block = 0; block < 8; ++block) {
      const auto bytes = (*pool)->BlockBytes(layer, block);
      result.blocks.insert(result.blocks.end(), bytes.begin(), bytes.end());
    }
  }
  result.saturated = (*pool)->SaturatedCounts();
  return result;
}

void ExpectSame(const Result& a, const Result& b) {
  EXPECT_TRUE(SameBits(a.qkv, b.qkv));
  EXPECT_TRUE(a.blocks == b.blocks);
  EXPECT_EQ(a.saturated, b.saturated);
  EXPECT_EQ(a.observation.k_min, b.observation.k_min);
  EXPECT_EQ(a.observation.k_max, b.observation.k_max);
  EXPECT_EQ(a.observation.v_min, b.observation.v_min);
  EXPECT_EQ(a.observation.v_max, b.observation.v_max);
  EXPECT_EQ(a.observation.k_histogram, b.observation.k_histogram);
  EXPECT_EQ(a.observation.v_histogram, b.observation.v_histogram);
}

TEST(KvAppendTest, EveryBackendStoresTheSameBytes) {
  SCOPED_TRACE(testing::Message() << "seed " << TestSeed());
  Random random(TestSeed());
  for (KvFormat format : kFormats) {
    for (int head_dim : {2, 8, 32, 64, 80, 96, 128, 256}) {
      for (int rotary_dim : {0, head_dim / 4 * 2, head_dim}) {
        Append a(head_dim, head_dim == 64 ? 3 : 1, rotary_dim, format, random);
        const Result expected = RunOn("reference", 1, a, /*has_norm=*/false);
        for (const std::string& name : InstructionSets()) {
          for (int threads : {1, 3}) {
            SCOPED_TRACE(testing::Message()
                         << name << ", " << threads << " threads, format " << static_cast<int>(format) << ", head_dim "
                         << head_dim << ", rotary_dim " << rotary_dim);
            ExpectSame(RunOn(name, threads, a, /*has_norm=*/false), expected);
          }
        }
      }
    }
  }
}

// A norm sums in another order than the reference: instruction sets agree in every bit, the reference within the bound
// of RmsNorm on each of the two values a rotation mixes, and its own two roundings.
TEST(KvAppendTest, NormsEachHeadBeforeTheRotation) {
  Random random(TestSeed());
  for (int head_dim : {16, 80, 128}) {
    Append a(head_dim, 2, head_dim, KvFormat::kF32, random);
    const Result expected = RunOn("reference", 1, a, /*has_norm=*/true);
    const Result first = RunOn(InstructionSets()[0], 1, a, /*has_norm=*/true);
    for (const std::string& name : InstructionSets()) ExpectSame(RunOn(name, 2, a, /*has_norm=*/true), first);
    const double largest = 1.5 * std::sqrt(head_dim);  // |x / rms * weight|
    const double bound = 2 * (head_dim / 128.0 + 9 + 2) * 0x1p-24 * largest;
    std::vector<float> k(first.blocks.size() / 4), k_expected(k.size());
    std::memcpy(k.data(), first.blocks.data(), first.blocks.size());
    std::memcpy(k_expected.data(), expected.blocks.data(), expected.blocks.size());
    EXPECT_THAT(first.qkv, testing::Pointwise(testing::FloatNear(static_cast<float>(bound)), expected.qkv));
    EXPECT_THAT(k, testing::Pointwise(testing::FloatNear(static_cast<float>(bound)), k_expected));
    EXPECT_NE(first.qkv, RunOn(InstructionSets()[0], 1, a, /*has_norm=*/false).qkv);
  }
}

TEST(KvAppendTest, CountsWhatSaturates) {
  Random random(TestSeed());
  const float nan = std::numeric_limits<float>::quiet_NaN(), inf = std::numeric_limits<float>::infinity();
  for (const std::string& name : BackendNames()) {
    for (KvFormat format : kFormats) {
      Append a(20, 1, 0, format, random);
      a.scales.assign(4 * 20, {.k_scale = 1, .k_zero_point = 0, .v_scale = 1, .v_zero_point = 0});
      // K starts at 2 heads of 20, V at 4; row 0 is position 13, block 5 being its table's first.
      a.qkv[40] = nan;
      a.qkv[41] = 1e9f;
      a.qkv[59] = -inf;
      a.qkv[80 + 3] = -128.5f;  // rounds to -128
      a.qkv[80 + 4] = 127.5f;   // rounds to 128
      a.qkv[80 + 39] = -70000.0f;
      const Result result = RunOn(name, 2, a, /*has_norm=*/false);
      const int64_t expected = format == KvFormat::kF32    ? 0
                               : format == KvFormat::kF16  ? 3
                               : format == KvFormat::kInt8 ? 5
                                                           : 4;  // NaN too
      EXPECT_THAT(result.saturated, testing::ElementsAre(0, expected)) << name;
      if (format != KvFormat::kInt8) continue;
      // [2 layers][8 blocks][K, V][2 heads][16 tokens][20]
      const auto at = [&](int v, int head, int dim) {
        return static_cast<int8_t>(result.blocks[((((8 + 5) * 2 + v) * 2 + head) * 16 + 13) * 20 + dim]);
      };
      EXPECT_EQ(at(0, 0, 0), 0);
      EXPECT_EQ(at(0, 0, 1), 127);
      EXPECT_EQ(at(0, 0, 19), -128);
      EXPECT_EQ(at(1, 0, 3), -128);
      EXPECT_EQ(at(1, 0, 4), 127);
      EXPECT_EQ(at(1, 1, 19), -128);
    }
  }
}

// The formula of KvFormat, on vectors chosen by hand and at random, without a look at how it is computed.
TEST(OnlineRangeTest, HoldsEveryValueWithinHalfAStep) {
  Random random(TestSeed());
  std::vector<std::vector<float>> vectors{{0, 0, 0},      {-0.0f, 0},       {3, 3},
                                          {0.1f, 0.1f},   {-1e-7f, 1e-7f},  {-65504, 65504},
                                          {65504, 65504}, {1000, 1000.25f}, {-5, -4.999f}};
  for (int i = 0; i < 200; ++i) {
    const float size = std::exp2(random.Uniform(-20, 14)), offset = random.Uniform(-2, 2) * size;
    vectors.push_back(random.Floats(16, offset - size, offset + size));
  }
  for (const auto& values : vectors) {
    const float min = *std::min_element(values.begin(), values.end());
    const float max = *std::max_element(values.begin(), values.end());
    for (const float levels : {15.0f, 255.0f}) {
      const OnlineRange range = OnlineRangeOf(min, max, levels);
      const double scale = HalfToFloat(range.scale), zero = HalfToFloat(range.zero);
      // Both are the nearest f16 on their side.
      EXPECT_LE(zero, min);
      EXPECT_GE(zero + scale * levels, max);
      EXPECT_GT(HalfToFloat(NextHalf(range.zero, true)), min);
      if (scale > 0) {
        EXPECT_LT(HalfToFloat(NextHalf(range.scale, false)) * levels, static_cast<float>(max - zero));
      }
      for (const float x : values) {
        const auto stored = QuantizeOnline(x, range, levels);
        EXPECT_FALSE(stored.saturated);
        // Half a step, and what rounding (x - zero) / scale in f32 can move at a tie.
        EXPECT_LE(std::fabs(stored.value * scale + zero - x), 0.5 * scale * (1 + levels * 0x1p-22))
            << x << " " << levels;
      }
    }
  }
}

TEST(OnlineRangeTest, NegativeZeroIsZero) { EXPECT_EQ(OnlineRangeOf(-0.0f, 1.0f, 255).zero, 0); }

TEST(KvPoolTest, OnlineFormatsCostFourBytesPerVector) {
  EXPECT_EQ(KvVectorBytes(KvFormat::kInt8Online, 128), 132);
  EXPECT_EQ(KvVectorBytes(KvFormat::kInt4Online, 128), 68);
  for (KvFormat format : kFormats) {
    for (const std::string& name : BackendNames()) {
      const auto backend = MakeBackend(name);
      const KvShape shape{.n_layers = 3, .n_kv_heads_local = 2, .head_dim = 128, .format = format};
      const auto pool = *backend->CreateKvPool(shape, 5);
      EXPECT_EQ(pool->bytes(), 3 * 2 * 5 * kKvBlockTokens * 2 * KvVectorBytes(format, 128));
    }
  }
}

TEST(KvPoolTest, BlocksAreAsLargeAsTheBackendSays) {
  for (KvFormat format : kFormats) {
    for (const std::string& name : BackendNames()) {
      const auto backend = MakeBackend(name);
      for (const int head_dim : {2, 8, 10, 16, 40, 48, 80, 128}) {
        const KvShape shape{.n_layers = 3, .n_kv_heads_local = 2, .head_dim = head_dim, .format = format};
        EXPECT_EQ((*backend->CreateKvPool(shape, 5))->bytes(), 5 * backend->KvBlockBytes(shape))
            << name << ", head_dim " << head_dim;
      }
    }
  }
}

TEST(KvHistogramTest, BinsCoverAllFloatsInOrder) {
  EXPECT_EQ(HistogramBin(0.0f), kHistogramHalf);
  EXPECT_EQ(HistogramBin(-0.0f), kHistogramHalf);
  EXPECT_EQ(HistogramBin(1e30f), kHistogramBins - 1);
  EXPECT_EQ(HistogramBin(-std::numeric_limits<float>::infinity()), 0);
  EXPECT_EQ(HistogramBin(1.0f), HistogramBin(17 / 16.0f) - 1) << "16 bins in an octave";
  EXPECT_EQ(HistogramBin(2.0f), HistogramBin(1.0f) + 16);
  for (int bin = 0; bin < kHistogramBins; ++bin) {
    const float low = HistogramEdge(bin), high = HistogramEdge(bin + 1);
    EXPECT_LT(low, high);
    EXPECT_EQ(HistogramBin(std::midpoint(low, high)), bin);
    // Of its two edges a bin holds the one nearer to zero; the middle bin neither.
    EXPECT_EQ(HistogramBin(std::nextafter(low, high)), bin);
    EXPECT_EQ(HistogramBin(std::nextafter(high, low)), bin);
    if (bin < kHistogramHalf) {
      EXPECT_EQ(HistogramBin(high), bin);
    }
    if (bin > kHistogramHalf) {
      EXPECT_EQ(HistogramBin(low), bin);
    }
  }
  EXPECT_EQ(HistogramEdge(0), -0x1p20f);
  EXPECT_EQ(HistogramEdge(kHistogramBins), 0x1p20f);
}

TEST(KvHistogramTest, EveryAppendedValueIsCountedOnceUnderItsHead) {
  Random random(TestSeed());
  for (const std::string& name : BackendNames()) {
    Append a(20, 2, 0, KvFormat::kF32, random);
    // K starts at 4 heads of 20, V at 6; no rotation, so that values are counted as they are given.
    a.qkv[4 * 20] = std::numeric_limits<float>::quiet_NaN();
    a.qkv[7 * 20] = 5.5f;
    KvObservation expected = a.EmptyObservation();
    for (int row = 0; row < a.step.row_count(); ++row) {
      for (int head = 0; head < 2; ++head) {
        for (int d = 0; d < 20; ++d) {
          const float k = a.qkv[(row * 8 + 4 + head) * 20 + d], v = a.qkv[(row * 8 + 6 + head) * 20 + d];
          if (!std::isnan(k)) ++expected.k_histogram[head * kHistogramBins + HistogramBin(k)];
          ++expected.v_histogram[head * kHistogramBins + HistogramBin(v)];
        }
      }
    }
    const KvObservation seen = RunOn(name, 3, a, /*has_norm=*/false).observation;
    EXPECT_EQ(seen.k_histogram, expected.k_histogram) << name;
    EXPECT_EQ(seen.v_histogram, expected.v_histogram) << name;
    EXPECT_EQ(seen.v_histogram[kHistogramBins + HistogramBin(5.5f)], 1u) << "one value is beyond 2";
    const auto counted = [](const std::vector<uint64_t>& h) { return std::accumulate(h.begin(), h.end(), 0ll); };
    EXPECT_EQ(counted(seen.k_histogram), a.step.row_count() * 40 - 1) << "NaN is not counted";
    EXPECT_EQ(counted(seen.v_histogram), a.step.row_count() * 40);
  }
}

TEST(KvPoolTest, RefusesBadShapesAndScales) {
  for (const std::string& name : BackendNames()) {
    const auto backend = MakeBackend(name);
    EXPECT_FALSE(backend->CreateKvPool({.n_layers = 0, .n_kv_heads_local = 1, .head_dim = 8}, 4).ok());
    EXPECT_FALSE(backend->CreateKvPool({.n_layers = 1, .n_kv_heads_local = 1, .head_dim = 8}, 0).ok());
    auto f16 = *backend->CreateKvPool({.n_layers = 1, .n_kv_heads_local = 2, .head_dim = 8}, 4);
    EXPECT_FALSE(backend->SetKvScales(*f16, std::vector<KvChannelScales>(16)).ok());
    auto int8 =
        *backend->CreateKvPool({.n_layers = 1, .n_kv_heads_local = 2, .head_dim = 8, .format = KvFormat::kInt8}, 4);
    EXPECT_TRUE(backend->SetKvScales(*int8, std::vector<KvChannelScales>(16)).ok());
    EXPECT_FALSE(backend->SetKvScales(*int8, std::vector<KvChannelScales>(2)).ok());
    for (float bad : {0.0f, -1.0f, std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
      std::vector<KvChannelScales> scales(16);
      scales[11].v_scale = bad;
      const absl::Status status = backend->SetKvScales(*int8, scales);
      EXPECT_THAT(std::string(status.message()), testing::HasSubstr("head 1, channel 3"));
    }
  }
}

}  // namespace
}  // namespace rankwise::kernels
