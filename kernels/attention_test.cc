#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "kernels/number_formats.h"
#include "kernels/test_support.h"

namespace rankwise::kernels {
namespace {

constexpr KvFormat kFormats[] = {KvFormat::kF32, KvFormat::kF16, KvFormat::kInt8, KvFormat::kInt8Online,
                                 KvFormat::kInt4Online};

// One request of `context` positions with its Q, K and V, in shuffled blocks of a pool that others have used before.
struct Request {
  AttentionShape shape;
  KvFormat format;
  int32_t context;
  std::vector<float> qkv;  // [context, width]
  std::vector<int32_t> blocks;
  std::vector<KvChannelScales> scales;  // [n_kv_heads_local, head_dim]

  Request(const AttentionShape& shape, KvFormat format, int32_t context, Random& random)
      : shape(shape), format(format), context(context), qkv(random.Floats(context * width(), -2, 2)) {
    blocks.resize((context + kKvBlockTokens - 1) / kKvBlockTokens + 1);
    std::iota(blocks.begin(), blocks.end(), 0);
    random.Shuffle(blocks);
    for (int i = 0; i < shape.n_kv_heads_local * shape.head_dim; ++i) {
      scales.push_back({random.Uniform(0.014f, 0.02f), random.Uniform(-0.2f, 0.2f), random.Uniform(0.014f, 0.02f),
                        random.Uniform(-0.2f, 0.2f)});
    }
  }

  int64_t q_width() const { return int64_t{shape.n_heads_local} * shape.head_dim; }
  int64_t width() const { return q_width() + 2 * int64_t{shape.n_kv_heads_local} * shape.head_dim; }
  // The parts that a stored value is computed from, in size: |q scale| + |zero|, of element `dim` of a head's K or V.
  double SizeOf(const float* x, int64_t dim, float scale, float zero_point) const {
    if (format == KvFormat::kF32) return std::fabs(x[dim]);
    if (format == KvFormat::kF16) return std::fabs(HalfToFloat(QuantizeF16(x[dim]).value));
    if (format == KvFormat::kInt8) {
      return std::fabs(QuantizeInt8(x[dim], scale, zero_point).value * scale) + std::fabs(zero_point);
    }
    const auto [min, max] = std::minmax_element(x, x + shape.head_dim);
    const float levels = OnlineLevels(format);
    const OnlineRange range = OnlineRangeOf(*min, *max, levels);
    return QuantizeOnline(x[dim], range, levels).value * HalfToFloat(range.scale) + std::fabs(HalfToFloat(range.zero));
  }
};

// A backend with a pool in which every value of every block is NaN, or an extreme where NaN cannot be stored.
class Session {
 public:
  Session(const std::string& name, int threads, const Request& request) : backend_(MakeBackend(name, threads)) {
    const int32_t blocks = static_cast<int32_t>(request.blocks.size());
    auto pool = backend_->CreateKvPool({.n_layers = 1,
                                        .n_kv_heads_local = request.shape.n_kv_heads_local,
                                        .head_dim = request.shape.head_dim,
                                        .format = request.format},
                                       blocks);
    EXPECT_TRUE(pool.ok());
    pool_ = *std::move(pool);
    if (request.format == KvFormat::kInt8) {
      EXPECT_TRUE(backend_->SetKvScales(*pool_, request.scales).ok());
    }
    const bool has_nan = request.format == KvFormat::kF32 || request.format == KvFormat::kF16;
    const float dirt = has_nan ? std::numeric_limits<float>::quiet_NaN() : 1e6f;
    Step step;
    step.Add(0, blocks * kKvBlockTokens, request.blocks);
    std::vector<float> qkv(step.row_count() * request.width(), dirt);
    Append(request, step, qkv.data());
  }

  // Appends and attends positions [begin, end) of the request as one segment, alone or beside another that repeats the
  // position before in its own step.
  std::vector<float> Run(const Request& request, int32_t begin, int32_t end, bool has_company = false) {
    Step step;
    std::vector<float> qkv(request.qkv.begin() + begin * request.width(), request.qkv.begin() + end * request.width());
    if (has_company && begin > 0) {
      step.Add(begin - 1, 1, request.blocks);
      qkv.insert(qkv.begin(), request.qkv.begin() + (begin - 1) * request.width(),
                 request.qkv.begin() + begin * request.width());
    }
    const int64_t skipped = step.row_count() * request.q_width();
    step.Add(begin, end - begin, request.blocks);
    Append(request, step, qkv.data());
    Guarded out(step.row_count() * request.q_width());
    EXPECT_TRUE(backend_->Attention(out.data(), qkv.data(), request.shape, *pool_, 0).ok());
    EXPECT_TRUE(out.BandsAreIntact());
    const auto values = out.values();
    return {values.begin() + skipped, values.end()};
  }

 private:
  void Append(const Request& request, Step& step, float* qkv) {
    EXPECT_TRUE(backend_->BeginStep(step.rows()).ok());
    EXPECT_TRUE(backend_->RopeAppend(qkv, request.shape, RopeTable{}, nullptr, nullptr, 0, *pool_, 0, nullptr).ok());
  }

  std::unique_ptr<Backend> backend_;
  std::unique_ptr<KvPool> pool_;
};

// The Rounding line of the kernel, for one (position, head).
double Bound(const Request& r, int32_t position, int head) {
  const int64_t dims = r.shape.head_dim;
  const int kv_head = head / (r.shape.n_heads_local / r.shape.n_kv_heads_local);
  const float* q = r.qkv.data() + position * r.width() + head * dims;
  const int32_t first = r.shape.sliding_window > 0 ? std::max(0, position - r.shape.sliding_window + 1) : 0;
  const bool is_integer = r.format != KvFormat::kF32 && r.format != KvFormat::kF16;
  // q is a multiple of a part of its largest element, as the weights of 64 positions are.
  double largest_query = 0;
  for (int64_t d = 0; d < dims; ++d) {
    const float k_scale = r.format == KvFormat::kInt8 ? r.scales[kv_head * dims + d].k_scale : 1;
    largest_query = std::max<double>(largest_query, std::fabs(q[d] * k_scale));
  }
  double largest_score = 0, largest_of_rounding = 0, largest_value = 0;
  for (int32_t t = first; t <= position; ++t) {
    const float* k = r.qkv.data() + t * r.width() + r.q_width() + kv_head * dims;
    const float* v = k + r.shape.n_kv_heads_local * dims;
    double score = 0, rounding = 0;
    for (int64_t d = 0; d < dims; ++d) {
      const KvChannelScales& s = r.scales[kv_head * dims + d];
      // K's static zero point moves all scores alike, so it is never added.
      const double absent = r.format == KvFormat::kInt8 ? std::fabs(s.k_zero_point) : 0;
      const double size = r.SizeOf(k, d, s.k_scale, s.k_zero_point) - absent;
      score += std::fabs(q[d]) * size;
      rounding += largest_query * (r.format == KvFormat::kInt8 ? size / s.k_scale : size);
      largest_value = std::max(largest_value, r.SizeOf(v, d, s.v_scale, s.v_zero_point));
    }
    largest_score = std::max(largest_score, score * r.shape.score_scale);
    largest_of_rounding = std::max(largest_of_rounding, rounding * r.shape.score_scale);
  }
  const double weight_error = 2 * (static_cast<double>(dims) + 8) * 0x1p-24 * largest_score + 0x1p-22 +
                              (is_integer ? (dims > 512 ? 0x1p-14 : 0x1p-15) * largest_of_rounding : 0);
  const int32_t count = position - first + 1, splits = position / 512 - first / 512 + 1;
  const double rounded_weights = is_integer ? std::min(count, 64) * 0x1p-15 : 0;
  return (2 * weight_error + (2 * std::min(count, 512) + 8 * splits + 8) * 0x1p-24 + rounded_weights) * largest_value;
}

AttentionShape Shape(int group, int kv_heads, int head_dim, int32_t window = 0) {
  return {.n_heads_local = group * kv_heads,
          .n_kv_heads_local = kv_heads,
          .head_dim = head_dim,
          .score_scale = 1 / std::sqrt(static_cast<float>(head_dim)),
          .sliding_window = window};
}

std::vector<float> Tail(const std::vector<float>& v, int64_t count) { return {v.end() - count, v.end()}; }

class AttentionTest : public testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(InstructionSets, AttentionTest, testing::ValuesIn(InstructionSets()),
                         [](const auto& i) { return i.param; });

TEST_P(AttentionTest, StaysWithinTheBoundOfItsFormula) {
  SCOPED_TRACE(testing::Message() << "seed " << TestSeed());
  Random random(TestSeed());
  double worst = 0;
  for (KvFormat format : kFormats) {
    for (const auto& [shape, context] : std::vector<std::pair<AttentionShape, int32_t>>{{Shape(1, 1, 8), 1},
                                                                                        {Shape(2, 1, 32), 15},
                                                                                        {Shape(8, 1, 64), 16},
                                                                                        {Shape(4, 2, 64), 17},
                                                                                        {Shape(1, 3, 80), 33},
                                                                                        {Shape(5, 1, 96), 50},
                                                                                        {Shape(7, 1, 128), 31},
                                                                                        {Shape(1, 2, 256), 20},
                                                                                        {Shape(1, 1, 1024), 9},
                                                                                        {Shape(40, 1, 20), 19},
                                                                                        {Shape(3, 1, 64, 7), 60},
                                                                                        {Shape(1, 1, 3), 49},
                                                                                        {Shape(1, 1, 16), 530},
                                                                                        {Shape(2, 1, 16, 513), 520},
                                                                                        {Shape(1, 1, 16, 100), 1100}}) {
      if (context > LongestTestContext() || shape.head_dim > LargestTestHeadDim()) continue;
      const Request request(shape, format, context, random);
      Session reference("reference", 1, request), cpu(GetParam(), 2, request);
      const auto expected = reference.Run(request, 0, context), out = cpu.Run(request, 0, context);
      for (int64_t i = 0; i < static_cast<int64_t>(out.size()); i += shape.head_dim) {
        const auto position = static_cast<int32_t>(i / request.q_width());
        const double bound = Bound(request, position, static_cast<int>(i % request.q_width() / shape.head_dim));
        for (int64_t d = i; d < i + shape.head_dim; ++d) {
          ASSERT_LE(std::fabs(out[d] - expected[d]), bound)
              << "format " << static_cast<int>(format) << " head_dim " << shape.head_dim << " position " << position;
          worst = std::max(worst, std::fabs(out[d] - expected[d]) / bound);
        }
      }
    }
  }
  RecordProperty("worst_error_over_bound", std::to_string(worst));
}

// With q = 0 every position weighs 1: the mean of small integers, which has one right answer in f32.
TEST_P(AttentionTest, IsExactWhenAllWeightsAreOne) {
  Random random(TestSeed());
  for (KvFormat format : kFormats) {
    Request request(Shape(2, 1, 24), format, 700, random);
    request.scales.assign(24, {.k_scale = 1, .k_zero_point = 0, .v_scale = 1, .v_zero_point = 0});
    const bool is_online = IsOnline(format);
    request.qkv = is_online ? random.Ints(request.context * request.width(), 0, static_cast<int>(OnlineLevels(format)))
                            : random.Ints(request.context * request.width(), -100, 100);
    for (int64_t i = 0; i < static_cast<int64_t>(request.qkv.size()); ++i) {
      const int64_t dim = i % request.width();
      if (dim < request.q_width()) request.qkv[i] = 0;
      // A whole range, so that the scale is 1.
      if (is_online && dim % 24 == 0) request.qkv[i] = 0;
      if (is_online && dim >= request.q_width() && dim % 24 == 1) request.qkv[i] = OnlineLevels(format);
    }
    Session reference("reference", 1, request), cpu(GetParam(), 3, request);
    EXPECT_EQ(cpu.Run(request, 0, 700), reference.Run(request, 0, 700));
  }
}

TEST_P(AttentionTest, ChunksTeamsAndCompanyChangeNoBit) {
  SCOPED_TRACE(testing::Message() << "seed " << TestSeed());
  Random random(TestSeed());
  for (KvFormat format : kFormats) {
    for (const auto& [shape, context] : std::vector<std::pair<AttentionShape, int32_t>>{{Shape(8, 2, 64), 90},
                                                                                        {Shape(1, 2, 32), 1100},
                                                                                        {Shape(3, 1, 48), 530},
                                                                                        {Shape(2, 1, 32, 37), 600},
                                                                                        {Shape(1, 1, 16, 600), 1300}}) {
      if (context > LongestTestContext()) continue;
      const Request request(shape, format, context, random);
      Session whole_session(InstructionSets()[0], 1, request);
      const auto whole = whole_session.Run(request, 0, context);
      for (int threads : TeamSizes()) {
        Session session(GetParam(), threads, request);
        std::vector<float> out;
        for (int32_t begin = 0; begin < context;) {
          // Some long chunks, and from 100 before the end on some single rows, as in decode.
          const int32_t rows = begin > context - 30 ? 1 : random.Int(1, 200);
          const int32_t end = std::min(context, begin + rows);
          const auto part = session.Run(request, begin, end, /*has_company=*/random.Int(0, 1) == 1);
          out.insert(out.end(), part.begin(), part.end());
          begin = end;
        }
        ASSERT_TRUE(SameBits(out, whole)) << threads << " threads, format " << static_cast<int>(format) << ", head_dim "
                                          << shape.head_dim << ", context " << context;
      }
    }
  }
}

// The company of a row in its tile: a NaN in a later row must not reach an earlier one.
TEST_P(AttentionTest, ANanInALaterRowStaysThere) {
  Random random(TestSeed());
  Request request(Shape(2, 1, 32), KvFormat::kF32, 40, random);
  Session clean(GetParam(), 1, request);
  const auto expected = clean.Run(request, 0, 40);
  for (int64_t i = 21 * request.width(); i < 22 * request.width(); ++i) {
    request.qkv[i] = std::numeric_limits<float>::quiet_NaN();
  }
  Session poisoned(GetParam(), 1, request);
  const auto out = poisoned.Run(request, 0, 40);
  const int64_t before = 21 * request.q_width();
  EXPECT_TRUE(SameBits({out.begin(), out.begin() + before}, {expected.begin(), expected.begin() + before}));
  EXPECT_THAT(Tail(out, request.q_width()), testing::Each(testing::IsNan()));
}

TEST_P(AttentionTest, TheWindowForgetsWhatIsBeforeIt) {
  Random random(TestSeed());
  Request request(Shape(2, 1, 32, 40), KvFormat::kF16, 700, random);
  Session session(GetParam(), 2, request);
  const auto expected = Tail(session.Run(request, 0, 700), request.q_width());
  for (int64_t i = 0; i < 660 * request.width(); ++i) request.qkv[i] = std::numeric_limits<float>::quiet_NaN();
  Session forgetful(GetParam(), 2, request);
  forgetful.Run(request, 0, 699);
  EXPECT_TRUE(SameBits(forgetful.Run(request, 699, 700), expected));
}

}  // namespace
}  // namespace rankwise::kernels
