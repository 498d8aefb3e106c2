// `rankwise bench engine` of one rank, on a machine without MPI.

#include <CLI/CLI.hpp>

#include "base/log.h"
#include "launch/bench_engine.h"

namespace rankwise::launch {
namespace {

int Run(RankFlags& ranks, const EngineFlags& flags) {
  device::ShareOutCpus(1, ranks.device.cpu);
  const std::unique_ptr<comm::Communicator> host = comm::CreateSoloCommunicator();
  const absl::StatusOr<device::Device> device = device::OpenDevice(ranks.device, *host);
  absl::Status ended = device.status();
  if (ended.ok()) ended = BenchEngine(ranks, flags, *device, device->communicator(*host));
  if (ended.ok()) return 0;
  spdlog::error("{}", std::string(ended.message()));
  if (absl::IsOutOfRange(ended)) return 1;
  return device.ok() ? 3 : 2;
}

}  // namespace
}  // namespace rankwise::launch

int main(int argc, char** argv) {
  using namespace rankwise::launch;
  CLI::App app("rankwise-engine-bench: decode and prefill speed of one rank, with the fraction of the measured limits");
  RankFlags ranks;
  EngineFlags flags;
  AddEngineFlags(app, ranks, flags);
  CLI11_PARSE(app, argc, argv);
  rankwise::StartLog("engine-bench", "warn");
  return Run(ranks, flags);
}
