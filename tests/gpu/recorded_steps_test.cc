#include <gtest/gtest.h>

#include <limits>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/test_support.h"
#include "kernels/token_draw.h"

namespace rankwise::kernels {
namespace {

constexpr AttentionShape kShape{.n_heads_local = 4, .n_kv_heads_local = 2, .head_dim = 16, .score_scale = 0.25f};
constexpr int64_t kQkvWidth = (4 + 2 * 2) * 16, kOutWidth = 4 * 16;
constexpr int32_t kMostRows = 280;

// Two sequences, each with blocks of its own, and all that an attention layer gives for their rows.
class Sequences {
 public:
  explicit Sequences(bool records_steps) {
    auto backend = CreateCudaBackend({.device = 0, .records_steps = records_steps});
    EXPECT_TRUE(backend.ok()) << backend.status();
    backend_ = *std::move(backend);
    pool_ = *backend_->CreateKvPool({.n_layers = 1, .n_kv_heads_local = 2, .head_dim = 16}, 2 * kBlocks);
    for (auto& floats : {&qkv_, &out_, &windowed_}) floats->emplace(*backend_->Allocate(kMostRows * kQkvWidth));
    repeated_ = backend_->Repeat([this] { return Issue(); });
  }

  // Rows of the segments {sequence, first position, rows}; their values depend on `seed`.
  struct Segment {
    int sequence, first, count;
  };
  std::vector<float> Run(const std::vector<Segment>& segments, uint64_t seed) {
    Step step;
    for (const Segment& s : segments) step.Add(s.first, s.count, BlocksOf(s.sequence));
    StepRows rows = step.rows();
    rows.rope = &rope_;
    rows.query_group = 2;
    const int64_t count = rows.row_count();
    EXPECT_TRUE(backend_->CopyToDevice(Random(seed).Floats(count * kQkvWidth), qkv_->get()).ok());
    EXPECT_TRUE(backend_->BeginStep(rows).ok());
    const absl::Status status = repeated_->Run();
    EXPECT_TRUE(status.ok()) << status;
    std::vector<float> results(2 * count * kOutWidth);
    const auto half = results.size() / 2;
    EXPECT_TRUE(backend_->CopyToHost(out_->get(), std::span(results).first(half)).ok());
    EXPECT_TRUE(backend_->CopyToHost(windowed_->get(), std::span(results).last(half)).ok());
    return results;
  }

 private:
  static constexpr int32_t kBlocks = 40;

  static std::vector<int32_t> BlocksOf(int sequence) {
    std::vector<int32_t> blocks(kBlocks);
    for (int32_t b = 0; b < kBlocks; ++b) blocks[b] = 2 * (kBlocks - 1 - b) + sequence;
    return blocks;
  }

  absl::Status Issue() {
    absl::Status status = backend_->RopeAppend(qkv_->get(), kShape, rope_, nullptr, nullptr, 0, *pool_, 0, nullptr);
    status.Update(backend_->Attention(out_->get(), qkv_->get(), kShape, *pool_, 0));
    AttentionShape windowed = kShape;
    windowed.sliding_window = 270;
    status.Update(backend_->Attention(windowed_->get(), qkv_->get(), windowed, *pool_, 0));
    return status;
  }

  const RopeTable rope_ = MakeRope(16, kBlocks* kKvBlockTokens);
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<KvPool> pool_;
  std::optional<Backend::Floats> qkv_, out_, windowed_;
  std::unique_ptr<Repeated> repeated_;
};

// Where contexts reach further splits, batches shrink and grow, drafts come, and memory moves.
TEST(RecordedStepsTest, GiveTheBitsOfIssuedOnes) {
  Sequences issued(false), recorded(true);
  const auto compare = [&](const std::vector<Sequences::Segment>& segments) {
    const uint64_t seed = TestSeed() + segments[0].first;
    ASSERT_TRUE(SameBits(issued.Run(segments, seed), recorded.Run(segments, seed)))
        << "position " << segments[0].first << ", " << segments.size() << " sequences";
  };
  compare({{1, 0, 260}});
  compare({{1, 260, 260}, {0, 0, 3}});
  compare({{0, 3, 247}});
  for (int i = 0; i < 12; ++i) compare({{0, 250 + i, 1}, {1, 520 + i, 1}});
  for (int i = 0; i < 4; ++i) compare({{0, 262 + i, 1}});
  compare({{0, 266, 250}});
  for (int i = 0; i < 4; ++i) {
    compare({{0, 516 + 5 * i, 1}});
    compare({{0, 517 + 5 * i, 4}, {1, 532 + 2 * i, 2}});
  }
  compare({{0, 536, 1}, {1, 540, 1}});  // as recorded before six rows moved the states of splits
}

// Tokens that a step draws are those of TokenDraw, also when they were sent, and the next step's rows are theirs, in
// any order. Where no logit is a number there is no token, and the first row stands in for it.
TEST(DrawnTokensTest, AreLookedUpWhereTheyAreDrawn) {
  constexpr int32_t kVocab = 300, kWidth = 33, kRows = 5;
  Random random(TestSeed());
  auto made = CreateCudaBackend({});
  ASSERT_TRUE(made.ok()) << made.status();
  Backend& backend = **made;
  std::vector<float> logits = random.Floats(kRows * kVocab, -4, 4);
  std::fill_n(logits.begin() + 3 * kVocab, kVocab, std::numeric_limits<float>::quiet_NaN());
  TokenDraw draw(kVocab);
  std::vector<DrawRule> rules;
  std::vector<int32_t> expected;
  for (int r = 0; r < kRows; ++r) {
    rules.push_back({.uniform = random.Uniform(0, 1), .temperature = r == 0 ? 0.0f : 1.0f});
    expected.push_back(draw.Draw(std::span(logits).subspan(r * kVocab, kVocab), rules.back()));
  }
  ASSERT_EQ(expected[3], -1);
  Backend::Floats on_device = *backend.Allocate(kRows * kVocab), x = *backend.Allocate(4 * kWidth);
  ASSERT_TRUE(backend.CopyToDevice(logits, on_device.get()).ok());
  const HostMatrix table(random.Floats(kVocab * kWidth), kVocab, DType::kF16);
  ASSERT_TRUE(backend.KeepTable(table.view()).ok());
  const std::unique_ptr<DrawnTokens> drawn = *backend.CreateDrawnTokens(8);
  EXPECT_TRUE(*drawn->HasCome());

  Step step;
  step.Add(0, 4, {0});
  StepRows rows = step.rows();
  rows.rules = rules;
  ASSERT_TRUE(backend.BeginStep(rows).ok());
  ASSERT_TRUE(drawn->Draw(0, on_device.get(), std::span(rules).first(2), kVocab).ok());
  ASSERT_TRUE(drawn->Draw(2, on_device.get() + 2 * kVocab, std::span(rules).subspan(2), kVocab).ok());
  ASSERT_TRUE(drawn->Send(kRows).ok());

  step.tokens() = {4, 0, 3, 2};
  rows = step.rows();
  rows.drawn = drawn.get();
  ASSERT_TRUE(backend.BeginStep(rows).ok());
  ASSERT_TRUE(backend.Embed(table.view(), x.get()).ok());
  const auto taken = drawn->Take();
  ASSERT_TRUE(taken.ok()) << taken.status();
  EXPECT_EQ(std::vector(taken->begin(), taken->end()), expected);
  std::vector<float> host(4 * kWidth);
  ASSERT_TRUE(backend.CopyToHost(x.get(), host).ok());
  for (int i = 0; i < 4 * kWidth; ++i) {
    const int32_t token = expected[step.tokens()[i / kWidth]];
    EXPECT_EQ(host[i], table.at(std::max(token, 0), i % kWidth)) << i;
  }
}

}  // namespace
}  // namespace rankwise::kernels
