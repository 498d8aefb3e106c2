// Ranks with a GPU each that meet over NCCL, all of it emulated: what they generate, and how far their host is ahead.

#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <thread>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "kernels/cuda/cuda_backend.h"
#include "launch/bench_engine.h"
#include "tests/cuda_emulation/emulator.h"
#include "tests/support/thread_group.h"
#include "tests/support/wide_scales.h"
#include "worker/comm/nccl_communicator.h"
#include "worker/weights/random_model.h"

namespace rankwise::testing {
namespace {

using engine::Request;
using engine::SequenceId;

constexpr int kVocabSize = 259;

class CudaGroupTest : public ::testing::TestWithParam<const char*> {
 protected:
  static void SetUpTestSuite() {
    const weights::RandomModelSpec spec{.n_heads = 4,
                                        .n_kv_heads = 2,
                                        .head_dim = 16,
                                        .intermediate_size = 96,
                                        .vocab_size = kVocabSize,
                                        .max_position = 256};
    ASSERT_EQ(weights::WriteRandomModel(Model(), spec), absl::OkStatus());
    scales_ = std::make_unique<WideScales>(std::vector<int>{1, 2}, Model());
  }
  static void TearDownTestSuite() {
    scales_ = nullptr;
    std::filesystem::remove_all(Model());
  }

  static engine::RankOptions Options(int tp) {
    engine::RankOptions options;
    options.model_dir = Model();
    options.kv = GetParam();
    options.kv_scales_dir = scales_->FolderOf(tp);
    options.max_tokens = 96;
    options.max_running = 4;
    options.max_step_rows = 24;
    options.max_chunk_rows = 16;
    options.max_drafts = 0;
    return options;
  }

  static std::unique_ptr<ThreadGroup> Start(const engine::RankOptions& options, int tp, bool looks_up_drawn = true) {
    const auto make = [&](int) { return kernels::CreateCudaBackend({.device = 0, .looks_up_drawn = looks_up_drawn}); };
    const ThreadGroup::Join join = [](comm::Communicator& host, kernels::Backend& backend) {
      return comm::CreateNcclCommunicator(host, 0, kernels::CudaStreamOf(backend), absl::Seconds(60));
    };
    auto group = ThreadGroup::Start(options, tp, make, tp == 1 ? nullptr : join);
    EXPECT_TRUE(group.ok()) << group.status();
    return group.ok() ? *std::move(group) : nullptr;
  }

  static std::vector<int32_t> Prompt(int length, int seed) {
    std::vector<int32_t> tokens(length);
    for (int t = 0; t < length; ++t) tokens[t] = 3 + (t * 37 + seed * 101) % (kVocabSize - 3);
    return tokens;
  }

 private:
  static std::string Model() { return ::testing::TempDir() + "cuda_group_model"; }
  static inline std::unique_ptr<WideScales> scales_;
};

// From logits that are put together on the device as if they were on the host; what is drawn there is all that comes to
// it.
TEST_P(CudaGroupTest, Rank0DrawsFromTheLogitsOfAllRanks) {
  const std::vector<std::vector<int32_t>> prompts = {Prompt(3, 0), Prompt(3, 1), Prompt(3, 2), Prompt(3, 3)};
  const auto taken = RequestsOfAllDraws(prompts, /*logprobs=*/0), drawn = RequestsOfAllDraws(prompts, -1);
  std::map<SequenceId, Result> expected;
  {
    const auto on_hosts = ThreadGroup::Start(Options(2), 2, [](int) { return kernels::CreateCudaBackend({}); });
    ASSERT_TRUE(on_hosts.ok()) << on_hosts.status();
    expected = RunAll((*on_hosts)->engine(), taken);
  }
  const auto group = Start(Options(2), 2);
  EXPECT_EQ(RunAll(group->engine(), taken), expected);
  const int64_t before = cuda_emulation::BytesToHost();
  const auto results = RunAll(group->engine(), drawn);
  EXPECT_EQ(cuda_emulation::BytesToHost() - before, 4 * 5 * sizeof(int32_t));
  for (const auto& [id, result] : results) EXPECT_EQ(result.tokens, expected.at(id).tokens);
}

// Requests that end by a token or by their length, whose logits are wanted for a while or always, that come later, are
// cancelled after some tokens, come again under the same id, or are made to yield.
class CudaAheadTest : public CudaGroupTest {
 protected:
  static std::vector<Request> Requests() {
    std::vector<Request> requests;
    for (int i = 0; i < 9; ++i) {
      Request request{.id = SequenceId{static_cast<uint64_t>(i + 1)}, .prompt = Prompt(1 + 5 * i % 17, i)};
      request.sampling = {.max_tokens = 4 + 5 * i % 11,
                          .temperature = i % 3 == 0 ? 0.0f : 1.0f,
                          .top_p = i % 2 == 0 ? 1.0f : 0.95f,
                          .seed = 5 + static_cast<uint64_t>(i),
                          .ignore_eos = true};
      if (i % 2 == 1 && i != 3) {
        for (int id = i; id < kVocabSize; id += 6) request.sampling.stop_token_ids.push_back(id);
      }
      if (i == 4) request.sampling.min_tokens = 3;
      if (i == 8) request.sampling.logprobs = 1;
      requests.push_back(std::move(request));
    }
    return requests;
  }

  static std::map<SequenceId, Result> Run(engine::Engine& engine) {
    constexpr SequenceId kCancelled{4}, kYielding{2};
    std::map<SequenceId, Result> results;
    std::vector<Request> late = Requests();
    std::optional<Request> again;
    const auto submit_one = [&] {
      if (late.empty()) return;
      EXPECT_EQ(engine.Submit(late.front()), absl::OkStatus());
      if (late.front().id == kCancelled) again = late.front();
      late.erase(late.begin());
    };
    for (int i = 0; i < 4; ++i) submit_one();
    for (int step = 1; engine.has_work(); ++step) {
      const auto outputs = engine.Step();
      EXPECT_EQ(outputs.status(), absl::OkStatus());
      if (!outputs.ok()) break;
      Collect(*outputs, results);
      engine.scheduler().CheckInvariants();
      if (step % 5 == 0) submit_one();
      if (step == 7) engine.Preempt(kYielding);
      if (again.has_value() && results[kCancelled].tokens.size() == 3) {
        engine.Cancel(kCancelled);
        // Under its own name, while its row may be under way.
        results.erase(kCancelled);
        again->prompt = Prompt(40, 99);
        EXPECT_EQ(engine.Submit(*std::exchange(again, std::nullopt)), absl::OkStatus());
      }
    }
    EXPECT_FALSE(again.has_value()) << "never cancelled";
    return results;
  }
};

TEST_P(CudaAheadTest, GivesTheTokensOfOneStepAtATime) {
  for (const int tp : {1, 2}) {
    SCOPED_TRACE(absl::StrCat("tp ", tp));
    std::map<SequenceId, Result> expected;
    {
      const auto group = Start(Options(tp), tp, /*looks_up_drawn=*/false);
      expected = Run(group->engine());
      EXPECT_EQ(group->engine().counters().steps_ahead, 0);
    }
    ASSERT_EQ(expected.size(), Requests().size());
    EXPECT_TRUE(std::ranges::any_of(
        expected, [](const auto& result) { return result.second.reason == engine::FinishReason::kStop; }));
    const auto group = Start(Options(tp), tp);
    EXPECT_EQ(Run(group->engine()), expected);
    EXPECT_GT(group->engine().counters().steps_ahead, group->engine().counters().steps / 3);
  }
}

// The benchmark of decoding takes the way of serving: a step is issued before the tokens of the one before have come.
class CudaBenchTest : public CudaGroupTest {
 protected:
  // The record that rank 0 keeps.
  static launch::BenchRecord Bench(int tp, bool looks_up_drawn) {
    const std::string file = ::testing::TempDir() + "cuda_bench.json";
    const auto hosts = comm::CreateThreadCommunicators(tp);
    {
      std::vector<std::jthread> ranks;
      for (int r = 0; r < tp; ++r) {
        ranks.emplace_back([&, r] {
          device::Device own;
          own.backend = *kernels::CreateCudaBackend({.device = r, .looks_up_drawn = looks_up_drawn});
          if (tp > 1) {
            own.device_communicator =
                *comm::CreateNcclCommunicator(*hosts[r], r, kernels::CudaStreamOf(*own.backend), absl::Seconds(60));
          }
          launch::EngineFlags flags{.batches = {1, 3}, .depth = 15, .prompt = 40, .steps = 4, .repeats = 1};
          flags.record.save = r == 0 ? file : "";
          launch::RankFlags rank{.rank = Options(tp)};
          rank.device.cpu.threads = 1;  // whose limits the emulated GPU is held against
          EXPECT_EQ(launch::BenchEngine(rank, flags, own, own.communicator(*hosts[r])), absl::OkStatus());
        });
      }
    }
    std::ifstream saved(file);
    const auto record = launch::ParseRecord({std::istreambuf_iterator<char>(saved), {}});
    EXPECT_EQ(record.status(), absl::OkStatus());
    return record.value_or(launch::BenchRecord());
  }
};

TEST_P(CudaBenchTest, DecodesAStepAhead) {
  for (const int tp : {1, 2}) {
    for (const bool looks_up_drawn : {false, true}) {
      SCOPED_TRACE(absl::StrCat("tp ", tp, looks_up_drawn ? ", ahead" : ""));
      const launch::BenchRecord record = Bench(tp, looks_up_drawn);
      EXPECT_EQ(absl::EndsWith(record.subject, ", decode issued a step ahead"), looks_up_drawn) << record.subject;
      for (const std::string work : {"prefill 40", "decode batch 1 depth 15", "decode batch 3 depth 15"}) {
        const auto figure = std::ranges::find_if(
            record.figures, [&](const launch::Figure& f) { return f.name == work && f.unit == "tokens/s"; });
        ASSERT_NE(figure, record.figures.end()) << work;
        EXPECT_GT(figure->value, 0) << work;
      }
    }
  }
}

class CudaLateTest : public CudaAheadTest {};

// Where the device is late, what is read before it came or sent before it was read shows.
TEST_P(CudaLateTest, WaitsForWhatItReads) {
  const auto expected = Run(Start(Options(1), 1, /*looks_up_drawn=*/false)->engine());
  const auto group = Start(Options(1), 1);
  cuda_emulation::SetStreamsLate(true);
  EXPECT_EQ(Run(group->engine()), expected);
  cuda_emulation::SetStreamsLate(false);
}

// Three sequences start in a pool that holds two of them at their ends.
TEST_P(CudaLateTest, GivesWayWhereMemoryIsShort) {
  std::vector<Request> requests;
  for (int i = 0; i < 4; ++i) {
    Request request{.id = SequenceId{static_cast<uint64_t>(i + 1)}, .prompt = Prompt(5, i)};
    request.sampling = {.max_tokens = 36, .temperature = static_cast<float>(i % 2), .ignore_eos = true};
    requests.push_back(std::move(request));
  }
  for (const int tp : {1, 2}) {
    SCOPED_TRACE(absl::StrCat("tp ", tp));
    const auto plenty = Start(Options(tp), tp, /*looks_up_drawn=*/false);
    const auto expected = RunAll(plenty->engine(), requests);
    auto options = Options(tp);
    const kernels::KvPool& pool = plenty->rank().decoder->kv_pool();
    options.kv_memory_bytes = pool.bytes() / pool.block_count() * 6;
    const auto group = Start(options, tp);
    EXPECT_EQ(RunAll(group->engine(), requests), expected);
    EXPECT_GT(group->engine().scheduler().load().preemptions, 0);
    EXPECT_GT(group->engine().counters().steps_ahead, group->engine().counters().steps / 2);
  }
}

std::string NameOf(const ::testing::TestParamInfo<const char*>& info) {
  std::string name = info.param;
  std::erase(name, '-');
  return name;
}
INSTANTIATE_TEST_SUITE_P(KvFormats, CudaGroupTest, ::testing::Values("f16"), NameOf);
INSTANTIATE_TEST_SUITE_P(KvFormats, CudaBenchTest, ::testing::Values("f16"), NameOf);
INSTANTIATE_TEST_SUITE_P(KvFormats, CudaLateTest, ::testing::Values("f16"), NameOf);
INSTANTIATE_TEST_SUITE_P(KvFormats, CudaAheadTest,
                         ::testing::Values("f32", "f16", "int8", "int8-head", "int8-channel", "int8-online",
                                           "int4-online"),
                         NameOf);

}  // namespace
}  // namespace rankwise::testing
