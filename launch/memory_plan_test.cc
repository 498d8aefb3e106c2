#include "launch/memory_plan.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <malloc.h>

#include <cstdio>
#include <filesystem>

#include "worker/comm/communicator.h"
#include "worker/engine/rank.h"
#include "worker/kv/kv_choice.h"
#include "worker/scheduler/block_ledger.h"
#include "worker/weights/random_model.h"

namespace rankwise::launch {
namespace {

using ::testing::HasSubstr;

constexpr double kMib = 1 << 20;

weights::ModelConfig Llama7b() {
  return {.model_type = "llama",
          .hidden_size = 4096,
          .n_layers = 32,
          .n_heads = 32,
          .n_kv_heads = 32,
          .head_dim = 128,
          .intermediate_size = 11008,
          .vocab_size = 32000,
          .max_position = 2048,
          .rope = {.rotary_dim = 128}};
}

// "GPU memory" of LMDeploy's page on KV int8, session length 2048 + 8, in MiB.
TEST(MemoryPlanTest, ReproducesThePagesEightCells) {
  struct Cell {
    int batch;
    double f16, int8;
  };
  std::printf("%5s %4s %10s %10s %8s\n", "batch", "kv", "page, MiB", "ours, MiB", "apart");
  for (const Cell& cell :
       {Cell{8, 22337, 18241}, Cell{16, 30593, 22369}, Cell{32, 47073, 30625}, Cell{48, 63553, 38881}}) {
    for (const auto format : {kernels::KvFormat::kF16, kernels::KvFormat::kInt8}) {
      const bool is_f16 = format == kernels::KvFormat::kF16;
      const auto plan =
          PlanMemory(Llama7b(), {.kv_format = format, .batch = cell.batch, .sequence_tokens = 2056}, 0, kPageOverhead);
      ASSERT_TRUE(plan.ok()) << plan.status();
      EXPECT_EQ(plan->overhead, (int64_t{1260} + 2 * cell.batch) << 20);
      const double page = is_f16 ? cell.f16 : cell.int8;
      const double ours = static_cast<double>(plan->total()) / kMib;
      std::printf("%5d %4s %10.0f %10.0f %+7.2f%%\n", cell.batch, is_f16 ? "f16" : "int8", page, ours,
                  100 * (ours / page - 1));
      EXPECT_NEAR(ours / page, 1, 0.005) << "batch " << cell.batch;
    }
  }
}

TEST(MemoryPlanTest, WeightsAreTheParametersOnce) {
  const auto plan = PlanMemory(Llama7b(), {}, 0);
  ASSERT_TRUE(plan.ok()) << plan.status();
  // 6,738,415,616 parameters, of which the norms (65 of 4096) are kept as f32.
  EXPECT_EQ(plan->weights + plan->embedding, 6738415616 * 2 + 65 * 4096 * 2);
  EXPECT_EQ(plan->kv, int64_t{8} * 2048 * 524288);
}

TEST(MemoryPlanTest, RanksShareWeightsAndHeadsAndNothingElse) {
  const weights::ModelConfig config = Llama7b();
  const auto whole = PlanMemory(config, {}, 0);
  int64_t weights = 0, kv = 0;
  for (int rank = 0; rank < 4; ++rank) {
    const auto part = PlanMemory(config, {.tp = 4}, rank);
    ASSERT_TRUE(part.ok()) << part.status();
    weights += part->weights;
    kv += part->kv;
    EXPECT_EQ(part->embedding, whole->embedding);
    EXPECT_EQ(part->communication > whole->communication, rank == 0);  // the others' logits
  }
  EXPECT_EQ(weights - whole->weights, 3 * 65 * 4096 * 4);  // every rank has the norms
  EXPECT_EQ(kv, whole->kv);
}

TEST(MemoryPlanTest, UnevenVocabularyAndSharedKvHeads) {
  weights::ModelConfig config = Llama7b();
  config.n_kv_heads = 4;
  config.vocab_size = 32003;
  const auto first = PlanMemory(config, {.tp = 8}, 0);
  const auto last = PlanMemory(config, {.tp = 8}, 7);
  ASSERT_TRUE(first.ok() && last.ok());
  EXPECT_EQ(last->weights - first->weights, 32 * 4096 * 2);    // 4000 rows fill 125 panels, 4001 begin another
  EXPECT_EQ(first->kv, int64_t{8} * 2048 * 2 * 32 * 128 * 2);  // one KV head each, two ranks hold the same one
}

TEST(MemoryPlanTest, KvComesInWholeBlocks) {
  MemoryOptions options{.batch = 3, .sequence_tokens = 17};
  const int64_t two_blocks = PlanMemory(Llama7b(), options, 0)->kv;
  options.sequence_tokens = 32;
  EXPECT_EQ(PlanMemory(Llama7b(), options, 0)->kv, two_blocks);
  EXPECT_EQ(two_blocks, int64_t{3} * 32 * 524288);
}

TEST(MemoryPlanTest, TheLargestBatchFitsAndOneMoreDoesNot) {
  for (const int tp : {1, 4}) {
    for (const std::optional<Overhead>& overhead : {std::optional<Overhead>(), std::optional(kPageOverhead)}) {
      MemoryOptions options{.tp = tp};
      const int64_t memory = int64_t{80} << 30;
      const auto batch = LargestBatch(Llama7b(), options, memory, overhead);
      ASSERT_TRUE(batch.ok()) << batch.status();
      options.batch = *batch;
      EXPECT_LE(PlanMemory(Llama7b(), options, 0, overhead)->total(), memory);
      ++options.batch;
      EXPECT_GT(PlanMemory(Llama7b(), options, 0, overhead)->total(), memory);
    }
  }
  EXPECT_EQ(*LargestBatch(Llama7b(), {}, int64_t{13} << 30, kPageOverhead), 0);
  // The page's law: (81920 - 14113) / 1030 = 65.8.
  EXPECT_EQ(*LargestBatch(Llama7b(), {.sequence_tokens = 2056}, int64_t{80} << 30, kPageOverhead), 65);
}

TEST(MemoryPlanTest, RefusesWhatCannotBe) {
  const auto message = [](const MemoryOptions& options) {
    return std::string(PlanMemory(Llama7b(), options, 0).status().message());
  };
  EXPECT_THAT(message({.tp = 3}), HasSubstr("tp=3 does not divide n_heads=32"));
  EXPECT_THAT(message({.batch = 0}), HasSubstr("batch=0"));
  EXPECT_THAT(message({.sequence_tokens = 0}), HasSubstr("0 tokens"));
  EXPECT_THAT(message({.batch = 1 << 20, .sequence_tokens = 1 << 24}), HasSubstr("more than a cache can have"));
}

// From here on malloc maps nothing, so that HeapBytes counts all; a mapping would count its alignment too, which is
// never touched. False when malloc is a sanitizer's.
bool CanCountHeap() {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  return false;
#else
  return mallopt(M_MMAP_MAX, 0) == 1;
#endif
}

// Bytes that malloc has given out.
int64_t HeapBytes() { return static_cast<int64_t>(mallinfo2().uordblks); }

TEST(MemoryPlanTest, TheLedgerIsWhatTheSchedulerKeeps) {
  if (!CanCountHeap()) GTEST_SKIP() << "a sanitizer's allocator does not count";
  for (const int32_t blocks : {1000, 5000}) {
    const int64_t before = HeapBytes();
    const scheduler::BlockLedger ledger(blocks, kernels::kKvBlockTokens);
    EXPECT_NEAR(static_cast<double>(HeapBytes() - before), static_cast<double>(LedgerBytes(blocks)), 256);
  }
}

// One rank as the worker loads it, on this thread, so that all it takes comes from the main arena; then its largest
// step. The plan leaves out tensor names, block tables and the like: 0.05 MiB here.
TEST(MemoryPlanTest, IsWhatARankAllocates) {
  if (!CanCountHeap()) GTEST_SKIP() << "a sanitizer's allocator does not count";
  const std::string model_dir = ::testing::TempDir() + "memory_plan_model";
  for (const auto& [head_dim, kv] : {std::pair(64, "f16"), std::pair(48, "f32")}) {
    const weights::RandomModelSpec spec{.hidden_size = 768,
                                        .n_layers = 3,
                                        .n_heads = 12,
                                        .n_kv_heads = 4,
                                        .head_dim = head_dim,
                                        .intermediate_size = 2048,
                                        .vocab_size = 8003,
                                        .max_position = 1024};
    ASSERT_EQ(weights::WriteRandomModel(model_dir, spec), absl::OkStatus());
    engine::RankOptions options;
    options.model_dir = model_dir;
    options.kv = kv;
    options.max_tokens = 1000;
    options.max_running = 20;
    const int64_t before = HeapBytes();
    auto backend = kernels::CreateCpuBackend({.threads = 1, .pin_threads = false});
    const auto communicator = comm::CreateSoloCommunicator();
    auto rank = engine::LoadRank(options, **backend, *communicator);
    ASSERT_TRUE(rank.ok()) << rank.status();
    StepPlan step{
        .kind = StepKind::kRun,
        .cleared_slots = {0},
        .segments = {{.logits = LogitsNeed::kLast, .tokens = std::vector<int32_t>(kernels::kCpuStepRows, 7)}}};
    for (int b = 0; b < 32; ++b) step.segments[0].new_blocks.push_back(b);
    const engine::Executor::TokenSink draws{.rule_of = [](auto...) { return kernels::DrawRule(); },
                                            .take = [](auto...) { return absl::OkStatus(); }};
    ASSERT_EQ(rank->executor->Execute(
                  step, [](auto...) { return absl::OkStatus(); }, draws),
              absl::OkStatus());
    const int64_t taken = HeapBytes() - before;

    const MemoryOptions same = {
        .kv_format = kv::ParseKvChoice(kv)->format, .batch = 20, .sequence_tokens = options.max_tokens};
    const auto plan = PlanMemory(rank->checkpoint->config(), same, 0);
    ASSERT_TRUE(plan.ok()) << plan.status();
    EXPECT_EQ(rank->decoder->kv_pool().bytes(), plan->kv);
    const int64_t all_reduce_bytes = int64_t{kernels::kCpuStepRows} * 768 * 4;  // one rank alone has nothing to receive
    const int64_t planned = plan->weights + plan->kv + plan->activations + plan->communication - all_reduce_bytes;
    EXPECT_NEAR(static_cast<double>(taken) / kMib, static_cast<double>(planned) / kMib, 0.1)
        << "head_dim " << head_dim << ", kv " << kv;
  }
  std::filesystem::remove_all(model_dir);
}

}  // namespace
}  // namespace rankwise::launch
