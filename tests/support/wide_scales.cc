#include "tests/support/wide_scales.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>

#include "absl/strings/str_cat.h"
#include "tests/support/test_data.h"
#include "worker/kv/kv_scales.h"
#include "worker/weights/checkpoint.h"

namespace rankwise::testing {

WideScales::WideScales(const std::vector<int>& degrees, const std::string& model)
    : parent_(absl::StrCat(::testing::TempDir(), "wide_scales_", getpid())) {
  const auto checkpoint = weights::Checkpoint::Open(model.empty() ? SourcePath("launch/demo_model") : model);
  if (!checkpoint.ok()) {
    ADD_FAILURE() << checkpoint.status();
    return;
  }
  const weights::ModelConfig& config = (*checkpoint)->config();
  kv::KvStatistics statistics{.model_fingerprint = (*checkpoint)->fingerprint(),
                              .n_layers = config.n_layers,
                              .n_kv_heads = config.n_kv_heads,
                              .head_dim = config.head_dim};
  const size_t count = static_cast<size_t>(config.n_layers) * config.n_kv_heads * config.head_dim;
  for (size_t i = 0; i < count; ++i) {
    const float head = static_cast<float>(i / config.head_dim % config.n_kv_heads);
    const float channel = static_cast<float>(i % config.head_dim) / 16;
    statistics.k_min.push_back(-9 - head - channel);
    statistics.k_max.push_back(8 + head);
    statistics.v_min.push_back(-4 - head);
    statistics.v_max.push_back(5 + head + channel);
  }
  for (const int tp : degrees) {
    std::filesystem::create_directories(FolderOf(tp));
    EXPECT_EQ(kv::WriteKvScales(FolderOf(tp), statistics, tp, kv::Granularity::kChannel), absl::OkStatus());
  }
}

WideScales::~WideScales() { std::filesystem::remove_all(parent_); }

std::string WideScales::FolderOf(int tp) const { return absl::StrCat(parent_, "/tp", tp); }

}  // namespace rankwise::testing
