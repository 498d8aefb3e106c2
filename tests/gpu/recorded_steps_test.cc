#include <gtest/gtest.h>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/test_support.h"

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
}

}  // namespace
}  // namespace rankwise::kernels
