// Ranks with a GPU each that meet over NCCL, all of it emulated: what they generate.

#include <gtest/gtest.h>

#include <array>

#include "kernels/cuda/cuda_backend.h"
#include "tests/cuda_emulation/emulator.h"
#include "tests/support/test_data.h"
#include "tests/support/thread_group.h"
#include "worker/comm/nccl_communicator.h"

namespace rankwise::testing {
namespace {

using engine::Request;
using engine::SequenceId;

absl::StatusOr<std::unique_ptr<ThreadGroup>> StartOnCuda(const engine::RankOptions& options, int tp) {
  const auto make = [](int) { return kernels::CreateCudaBackend({}); };
  if (tp == 1) return ThreadGroup::Start(options, 1, make);
  return ThreadGroup::Start(options, tp, make, [](comm::Communicator& host, kernels::Backend& backend) {
    return comm::CreateNcclCommunicator(host, 0, kernels::CudaStreamOf(backend), absl::Seconds(60));
  });
}

engine::RankOptions Options() {
  engine::RankOptions options;
  options.model_dir = SourcePath("launch/demo_model");
  options.kv = "f16";
  options.max_tokens = 128;
  options.max_running = 4;
  options.max_step_rows = 32;
  options.max_drafts = 0;
  return options;
}

// From logits that are put together on the device as if they were on the host; what is drawn there is all that comes to
// it.
TEST(CudaGroupTest, Rank0DrawsFromTheLogitsOfAllRanks) {
  std::vector<Request> taken;
  for (int i = 0; i < 4; ++i) {
    Request request{.id = SequenceId{static_cast<uint64_t>(i + 1)}, .prompt = {3 + 101 * i, 20, 7 + i}};
    request.sampling = {.max_tokens = 5,
                        .temperature = 0.5f * static_cast<float>(i),
                        .top_k = i == 2 ? 40 : 0,
                        .top_p = i >= 2 ? 0.9f : 1.0f,
                        .min_p = i == 3 ? 0.02f : 0.0f,
                        .seed = 11 + static_cast<uint64_t>(i),
                        .ignore_eos = true,
                        .logprobs = 0};
    taken.push_back(request);
  }
  std::vector<Request> drawn = taken;
  for (Request& request : drawn) request.sampling.logprobs = -1;
  std::map<SequenceId, Result> expected;
  {
    auto on_hosts = ThreadGroup::Start(Options(), 2, [](int) { return kernels::CreateCudaBackend({}); });
    ASSERT_TRUE(on_hosts.ok()) << on_hosts.status();
    expected = RunAll((*on_hosts)->engine(), taken);
  }
  auto group = StartOnCuda(Options(), 2);
  ASSERT_TRUE(group.ok()) << group.status();
  EXPECT_EQ(RunAll((*group)->engine(), taken), expected);
  const int64_t before = cuda_emulation::BytesToHost();
  const auto results = RunAll((*group)->engine(), drawn);
  EXPECT_EQ(cuda_emulation::BytesToHost() - before, 4 * 5 * sizeof(int32_t));
  for (const auto& [id, result] : results) EXPECT_EQ(result.tokens, expected.at(id).tokens);
}

}  // namespace
}  // namespace rankwise::testing
