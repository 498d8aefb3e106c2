// Writes a model folder of a given shape with random weights, for benchmarks.

#include <CLI/CLI.hpp>
#include <cstdio>
#include <string>

#include "base/log.h"
#include "worker/weights/random_model.h"

int main(int argc, char** argv) {
  using namespace rankwise;
  CLI::App app("rankwise-random-model: a Hugging Face model folder with random weights, to measure a shape");
  std::string folder, shape = "tinyllama-1.1b", dtype = "f16";
  uint64_t seed = 1;
  int file_count = 1;
  app.add_option("folder", folder, "Folder to write")->required();
  app.add_option("--shape", shape, "tiny, tinyllama-1.1b or llama-7b")->capture_default_str();
  app.add_option("--dtype", dtype, "Weights: f16, bf16 or f32")
      ->check(CLI::IsMember({"f16", "bf16", "f32"}))
      ->capture_default_str();
  app.add_option("--seed", seed, "The same seed gives the same bytes")->capture_default_str();
  app.add_option("--files", file_count, "Files, with an index when more than one")
      ->check(CLI::Range(1, 64))
      ->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  StartLog("random-model");
  auto spec = weights::RandomModelShape(shape);
  absl::Status status = spec.status();
  if (status.ok()) {
    spec->dtype = dtype == "f32" ? kernels::DType::kF32 : dtype == "f16" ? kernels::DType::kF16 : kernels::DType::kBF16;
    spec->seed = seed;
    spec->file_count = file_count;
    int64_t last_tenth = 0;
    status = weights::WriteRandomModel(folder, *spec, [&](int64_t done, int64_t total) {
      if (const int64_t tenth = 10 * done / total; tenth > last_tenth) {
        std::fprintf(stderr, "%s: %3lld %% of %.2f GB\n", folder.c_str(), static_cast<long long>(10 * tenth),
                     total / 1e9);
        last_tenth = tenth;
      }
    });
  }
  if (status.ok()) return 0;
  spdlog::error("{}", std::string(status.message()));
  return 2;
}
