// Models whose weights have four or eight bits: what quantize writes, what of an AWQ checkpoint is refused, and that
// one serves to the bits of the model of floats that it stands for.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <random>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "base/mapped_file.h"
#include "kernels/number_formats.h"
#include "tests/support/thread_group.h"
#include "worker/weights/activation_scaling.h"
#include "worker/weights/checkpoint.h"
#include "worker/weights/quantize.h"
#include "worker/weights/random_model.h"
#include "worker/weights/safetensors.h"

namespace rankwise::testing {
namespace {

namespace fs = std::filesystem;
using ::testing::HasSubstr;
using weights::Checkpoint;

TEST(QuantizeGroup, IsBetterThanTheWholeRangeAndNeverWorse) {
  std::mt19937_64 random(7);
  std::normal_distribution<float> normal;
  int better = 0;
  for (int i = 0; i < 200; ++i) {
    std::vector<float> w(128);
    for (float& x : w) x = normal(random) * 0.05f;
    const auto error_of = [&](const weights::QuantizedGroup& group) {
      double error = 0;
      for (size_t k = 0; k < w.size(); ++k) {
        const double d = (group.q[k] - group.zero) * static_cast<double>(kernels::HalfToFloat(group.scale)) - w[k];
        error += d * d;
      }
      return error;
    };
    const weights::QuantizedGroup group = weights::QuantizeGroup(w, 15);
    const auto [low, high] = std::minmax_element(w.begin(), w.end());
    weights::QuantizedGroup whole{.scale = kernels::FloatToHalf((*high - *low) / 15)};
    const float scale = kernels::HalfToFloat(whole.scale);
    whole.zero = static_cast<int>(std::nearbyint(-*low / scale));
    for (const float x : w) {
      whole.q.push_back(std::clamp(static_cast<int>(std::nearbyint(x / scale)) + whole.zero, 0, 15));
    }
    EXPECT_LE(error_of(group), error_of(whole));
    better += error_of(group) < error_of(whole);
    EXPECT_THAT(group.q, ::testing::Each(::testing::AllOf(::testing::Ge(0), ::testing::Le(15))));
  }
  EXPECT_GT(better, 100);
}

TEST(QuantizeGroup, TakesWhatHasNoRangeAndRefusesWhatIsNotFinite) {
  EXPECT_THAT(weights::QuantizeGroup(std::vector<float>{0, 0}, 15).q, ::testing::ElementsAre(0, 0));
  const auto positive = weights::QuantizeGroup(std::vector<float>{3, 3}, 255);
  EXPECT_NEAR((positive.q[0] - positive.zero) * kernels::HalfToFloat(positive.scale), 3, 0.01);
  EXPECT_TRUE(weights::QuantizeGroup(std::vector<float>{0, NAN}, 15).q.empty());
  EXPECT_TRUE(weights::QuantizeGroup(std::vector<float>{-3e38f, 3e38f}, 15).q.empty());
}

class QuantizedModel : public ::testing::Test {
 protected:
  QuantizedModel() : folder_(::testing::TempDir() + "quantized_" + std::to_string(getpid())) {
    fs::remove_all(folder_);
    fs::create_directories(folder_);
  }
  ~QuantizedModel() override { fs::remove_all(folder_); }

  std::string Random(const std::string& family, kernels::DType dtype = kernels::DType::kF16) const {
    weights::RandomModelSpec spec{
        .model_type = family, .intermediate_size = 192, .vocab_size = 511, .has_bias = true, .dtype = dtype};
    const std::string model = folder_ + "/model";
    EXPECT_EQ(weights::WriteRandomModel(model, spec), absl::OkStatus());
    return model;
  }
  std::string Quantize(const std::string& model, int bits, int32_t group_size) const {
    const std::string folder = folder_ + "/quantized";
    EXPECT_EQ(weights::WriteQuantized(model, folder, {.bits = bits, .group_size = group_size, .replaces = true}, {}),
              absl::OkStatus());
    return folder;
  }

  // The same model with every quantised matrix written as the f32 it means.
  std::string Dense(const std::string& quantized) const {
    const std::string folder = folder_ + "/dense";
    fs::create_directories(folder);
    const auto config = ReadTextFile(quantized + "/config.json", 1 << 20);
    EXPECT_EQ(WriteFileAtomically(folder + "/config.json",
                                  absl::StrReplaceAll(*config, {{"\"quantization_config\"", "\"was\""}})),
              absl::OkStatus());
    const auto listing = weights::ListTensors(quantized);
    EXPECT_TRUE(listing.ok()) << listing.status();
    std::vector<weights::TensorHeader> headers;
    std::string data;
    for (const auto& [name, view, is_vector, is_linear] : listing->tensors) {
      headers.push_back({name, "F32", is_vector ? std::vector{view.rows} : std::vector{view.rows, view.cols}});
      for (int64_t r = 0; r < view.rows; ++r) {
        for (int64_t c = 0; c < view.cols; ++c) {
          const float x = kernels::ElementAt(view, r, c);
          data.append(reinterpret_cast<const char*>(&x), sizeof x);
        }
      }
    }
    EXPECT_EQ(WriteFileAtomically(folder + "/model.safetensors", weights::SafetensorsHeader(headers, {}) + data),
              absl::OkStatus());
    return folder;
  }

  static std::map<engine::SequenceId, Result> Run(const std::string& model, int tp, const std::string& kv) {
    engine::RankOptions options;
    options.model_dir = model;
    options.kv = kv;
    options.max_tokens = 64;
    options.max_running = 4;
    options.max_step_rows = 64;
    const auto group = ThreadGroup::Start(options, tp);
    EXPECT_TRUE(group.ok()) << group.status();
    if (!group.ok()) return {};
    std::vector<engine::Request> requests;
    for (uint64_t i = 1; i <= 3; ++i) {
      engine::Request request{.id = engine::SequenceId{i}, .prompt = {1}};
      for (uint64_t t = 0; t < 9 * i; ++t) request.prompt.push_back(static_cast<int32_t>(3 + (37 * i + 101 * t) % 500));
      request.sampling = {.max_tokens = 8, .temperature = 0, .ignore_eos = true, .logprobs = 5, .prompt_logprobs = 2};
      requests.push_back(std::move(request));
    }
    return RunAll((*group)->engine(), requests);
  }

  absl::Status Open(const std::string& model) const { return Checkpoint::Open(model).status(); }

  const std::string folder_;
};

// Groups of 64 at tp 2 and 4 begin in the middle of a rank's slice of wo.
TEST_F(QuantizedModel, ServesTheBitsOfItsFloats) {
  for (const char* family : {"llama", "internlm2", "qwen2"}) {
    for (const int bits : {4, 8}) {
      SCOPED_TRACE(absl::StrCat(family, " ", bits));
      const std::string quantized = Quantize(Random(family), bits, 64), dense = Dense(quantized);
      for (const char* kv : {"f32", "int8-online"}) {
        const auto expected = Run(dense, 1, kv);
        ASSERT_EQ(expected.size(), 3u);
        for (const int tp : {1, 2, 4}) EXPECT_EQ(Run(quantized, tp, kv), expected) << "tp " << tp << ", kv " << kv;
      }
    }
  }
}

TEST_F(QuantizedModel, RanksOfOneGroupMultiplyAlike) {
  const std::string model = Random("llama");
  engine::RankOptions options;
  options.kv = "f16";
  options.max_tokens = options.max_step_rows = 64;
  const auto start = [&](const std::string& folder) {
    options.model_dir = folder;
    return ThreadGroup::Start(options, 2, [](int rank) {
      return kernels::CreateCpuBackend(
          {.threads = 1, .activations = rank == 0 ? kernels::Activations::kFloat : kernels::Activations::kInt8});
    });
  };
  const absl::Status refused = start(Quantize(model, 4, 64)).status();
  EXPECT_TRUE(absl::IsInvalidArgument(refused)) << refused;
  EXPECT_THAT(std::string(refused.message()), HasSubstr("rank 0 has model "));
  EXPECT_THAT(std::string(refused.message()), HasSubstr("kv f16, activations float; rank 1 has model "));
  // Weights of floats are the same in both.
  EXPECT_EQ(start(model).status(), absl::OkStatus());
}

TEST_F(QuantizedModel, IsCloseToItsSource) {
  const std::string model = Random("llama");
  const auto source = weights::ListTensors(model);
  ASSERT_TRUE(source.ok()) << source.status();
  double last = 1;
  for (const int bits : {4, 8}) {
    const auto quantized = weights::ListTensors(Quantize(model, bits, 32));
    ASSERT_TRUE(quantized.ok()) << quantized.status();
    ASSERT_EQ(quantized->tensors.size(), source->tensors.size());
    double error = 0, size = 0;
    for (size_t i = 0; i < source->tensors.size(); ++i) {
      const auto &a = source->tensors[i], &b = quantized->tensors[i];
      ASSERT_EQ(a.name, b.name);
      for (int64_t k = 0; k < a.view.rows * a.view.cols; ++k) {
        const int64_t row = k / a.view.cols, col = k % a.view.cols;
        const double x = kernels::ElementAt(a.view, row, col), y = kernels::ElementAt(b.view, row, col);
        if (!a.is_linear) {
          ASSERT_EQ(x, y) << a.name;
        }
        error += (x - y) * (x - y) * a.is_linear;
        size += x * x * a.is_linear;
      }
    }
    // A normal distribution over 2^bits levels of about ±2.5 deviations in a group of 32.
    EXPECT_LT(error / size, bits == 4 ? 0.01 : 0.0001);
    EXPECT_GT(error / size, 0);
    EXPECT_LT(error / size, last);
    last = error / size;
  }
}

// Statistics in which one input channel of 37 carries a thousand times the others' square.
weights::InputStatistics OutlierStatistics(const weights::Checkpoint& checkpoint) {
  weights::InputStatistics statistics = weights::EmptyInputStatistics(checkpoint.config(), checkpoint.fingerprint());
  for (weights::InputMeanSquares& layer : statistics.layers) {
    for (auto* mean_square : {&layer.qkv, &layer.o, &layer.gate_up, &layer.down}) {
      for (size_t i = 0; i < mean_square->size(); ++i) (*mean_square)[i] = i % 37 == 5 ? 1000.0f : 1.0f;
    }
  }
  return statistics;
}

TEST_F(QuantizedModel, StatisticsMakeWhatInputsCarryCheaper) {
  for (const char* family : {"llama", "internlm2"}) {
    const std::string model = Random(family, kernels::DType::kBF16), folder = folder_ + "/quantized";
    const auto source = weights::ListTensors(model);
    ASSERT_TRUE(source.ok()) << source.status();
    const weights::InputStatistics statistics = OutlierStatistics(*source->checkpoint);
    ASSERT_EQ(weights::WriteInputStatistics(folder_ + "/input_statistics.safetensors", statistics), absl::OkStatus());
    weights::QuantizeOptions options{.bits = 4, .group_size = 32, .replaces = true};
    const weights::Scalings scalings = weights::ScaleByActivations(*source, statistics, options, {});
    // Errors of one matrix, weighted by what its inputs carry, with what was folded into it taken out again.
    const auto cost = [&](const std::string& name, const std::vector<float>& mean_square, bool is_scaled) {
      const auto listing = weights::ListTensors(folder);
      EXPECT_TRUE(listing.ok()) << listing.status();
      const auto find = [&](const weights::TensorListing& all) {
        return std::ranges::find(all.tensors, name, &weights::NamedTensor::name)->view;
      };
      const kernels::MatrixView before = find(*source), after = find(*listing);
      double sum = 0;
      for (int64_t k = 0; k < before.rows * before.cols; ++k) {
        const int64_t row = k / before.cols, col = k % before.cols;
        const auto scaling = is_scaled ? scalings.at(name) : weights::TensorScaling();
        const double in = scaling.cols.empty() ? 1 : scaling.cols[col],
                     out = scaling.rows.empty() ? 1 : scaling.rows[row];
        const double error = kernels::ElementAt(after, row, col) / in / out - kernels::ElementAt(before, row, col);
        sum += mean_square[col] * error * error;
      }
      return sum;
    };
    const weights::LayerNames& names = source->layers[1];
    std::vector<double> plain;
    for (const bool is_scaled : {false, true}) {
      options.statistics_dir = is_scaled ? folder_ : "";
      ASSERT_EQ(weights::WriteQuantized(model, folder, options, {}), absl::OkStatus());
      const std::vector<double> costs = {cost(names.qkv[0], statistics.layers[1].qkv, is_scaled),
                                         cost(names.gate_up[1], statistics.layers[1].gate_up, is_scaled),
                                         cost(names.down, statistics.layers[1].down, is_scaled)};
      if (!is_scaled) plain = costs;
      for (size_t i = 0; is_scaled && i < costs.size(); ++i) EXPECT_LT(costs[i], 0.5 * plain[i]) << family << " " << i;
    }
  }
}

TEST_F(QuantizedModel, ScalingLeavesTheFloatsAsTheyAre) {
  const std::string model = Random("llama", kernels::DType::kF32);
  const auto listing = weights::ListTensors(model);
  ASSERT_TRUE(listing.ok()) << listing.status();
  const weights::ModelConfig& config = listing->checkpoint->config();
  const weights::Scalings scalings =
      weights::ScaleByActivations(*listing, OutlierStatistics(*listing->checkpoint), {.group_size = 32}, {});
  int64_t widened = 0;
  const auto cancel = [&](float in, float out) {
    EXPECT_EQ(in * out, 1.0f);
    EXPECT_EQ(std::exp2(std::round(std::log2(in))), in) << "a power of two";
    widened += in != 1;
  };
  for (const weights::LayerNames& names : listing->layers) {
    for (int64_t i = 0; i < config.hidden_size; ++i) {
      for (const std::string& reader : names.qkv) {
        cancel(scalings.at(reader).cols[i], scalings.at(names.attention_norm + "weight").rows[i]);
      }
      for (const std::string& reader : names.gate_up) {
        cancel(scalings.at(reader).cols[i], scalings.at(names.mlp_norm + "weight").rows[i]);
      }
    }
    for (int64_t i = 0; i < config.intermediate_size; ++i) {
      cancel(scalings.at(names.down).cols[i], scalings.at(names.up + "weight").rows[i]);
      if (config.has_mlp_bias) cancel(scalings.at(names.down).cols[i], scalings.at(names.up + "bias").rows[i]);
    }
    const int64_t dim = config.head_dim, group = config.n_heads / config.n_kv_heads;
    for (int64_t i = 0; i < config.n_heads * dim; ++i) {
      cancel(scalings.at(names.o).cols[i], scalings.at(names.v + "weight").rows[i / dim / group * dim + i % dim]);
    }
  }
  EXPECT_GT(widened, 100);
}

TEST_F(QuantizedModel, StatisticsOfAnotherModelAreRefused) {
  const std::string model = Random("llama");
  const auto listing = weights::ListTensors(model);
  ASSERT_TRUE(listing.ok()) << listing.status();
  const std::string path = folder_ + "/input_statistics.safetensors";
  const weights::QuantizeOptions options{.group_size = 32, .statistics_dir = folder_};
  const auto refusal = [&](const weights::InputStatistics& statistics) {
    EXPECT_EQ(weights::WriteInputStatistics(path, statistics), absl::OkStatus());
    return std::string(weights::WriteQuantized(model, folder_ + "/out", options, {}).message());
  };
  weights::InputStatistics statistics = OutlierStatistics(*listing->checkpoint);
  statistics.model_fingerprint = "another";
  EXPECT_THAT(refusal(statistics), HasSubstr("is of model another"));
  statistics.layers[1].down.pop_back();
  EXPECT_THAT(refusal(statistics), HasSubstr("layers.1.down.mean_square is not a F32 tensor"));
  statistics = OutlierStatistics(*listing->checkpoint);
  statistics.layers[0].o[3] = -1;
  EXPECT_THAT(refusal(statistics), HasSubstr("layers.0.o.mean_square holds -1"));
  fs::remove(path);
  EXPECT_FALSE(weights::WriteQuantized(model, folder_ + "/out", options, {}).ok());
  EXPECT_FALSE(fs::exists(folder_ + "/out"));
}

TEST_F(QuantizedModel, ReplacesOnlyItsOwn) {
  const std::string model = Random("llama"), out = Quantize(model, 4, 32);
  EXPECT_TRUE(absl::IsAlreadyExists(weights::WriteQuantized(model, out, {.group_size = 32}, {})));
  EXPECT_TRUE(
      absl::IsFailedPrecondition(weights::WriteQuantized(model, model, {.group_size = 32, .replaces = true}, {})));
  EXPECT_EQ(Open(model), absl::OkStatus());
  EXPECT_TRUE(absl::IsFailedPrecondition(weights::WriteQuantized(out, folder_ + "/again", {.group_size = 32}, {})));
  const absl::Status odd = weights::WriteQuantized(model, folder_ + "/odd", {.group_size = 48}, {});
  EXPECT_THAT(std::string(odd.message()), HasSubstr("group_size=48"));
  EXPECT_FALSE(fs::exists(folder_ + "/odd"));
}

TEST_F(QuantizedModel, HostileOnesAreRefusedInWords) {
  const std::string model = Quantize(Random("llama"), 4, 32), config_path = model + "/config.json";
  const std::string config = *ReadTextFile(config_path, 1 << 20);
  for (const auto& [from, to, word] : std::vector<std::array<std::string, 3>>{
           {"\"bits\": 4", "\"bits\": 3", "bits=3"},
           {"\"bits\": 4", "\"bits\": \"4\"", "bits"},
           {"\"bits\": 4", "\"bits\": 8", "qweight is"},
           {"\"group_size\": 32", "\"group_size\": 0", "group_size=0"},
           {"\"group_size\": 32", "\"group_size\": -1", "group_size=-1"},
           {"\"group_size\": 32", "\"group_size\": 64", "qzeros is"},
           {"\"group_size\": 32", "\"group_size\": 48", "groups of 48"},
           {"\"gemm\"", "\"gemv\"", "version=gemv"},
           {"\"awq\"", "\"gptq\"", "quant_method=gptq"},
           {"\"zero_point\": true", "\"zero_point\": false", "zero_point=0"},
           {"\"modules_to_not_convert\": null", "\"modules_to_not_convert\": [\"q_proj\"]",
            "modules_to_not_convert"}}) {
    const std::string changed = absl::StrReplaceAll(config, {{from, to}});
    ASSERT_NE(changed, config) << from;
    ASSERT_EQ(WriteFileAtomically(config_path, changed), absl::OkStatus());
    EXPECT_THAT(std::string(Open(model).message()), HasSubstr(word)) << to;
  }
  ASSERT_EQ(WriteFileAtomically(config_path, config), absl::OkStatus());
  ASSERT_EQ(Open(model), absl::OkStatus());
  const std::string path = model + "/model.safetensors";
  const std::string whole = *ReadTextFile(path, 1 << 30);
  const auto file = weights::SafetensorsFile::Open(path);
  ASSERT_TRUE(file.ok());
  const auto& scales = file->tensors().at("model.layers.1.mlp.down_proj.scales");
  const auto& first = file->tensors().begin()->second;
  uint64_t header = 0;
  std::memcpy(&header, whole.data(), sizeof header);
  int64_t least = INT64_MAX;
  for (const auto& [name, tensor] : file->tensors()) least = std::min(least, tensor.data - first.data);
  std::string poisoned = whole;
  const size_t at = 8 + header + static_cast<size_t>((scales.data - first.data) - least);
  poisoned[at] = '\0';
  poisoned[at + 1] = '\x7c';  // infinity
  ASSERT_EQ(WriteFileAtomically(path, poisoned), absl::OkStatus());
  EXPECT_THAT(std::string(Open(model).message()), HasSubstr("down_proj.scales holds a value that is not finite"));
  std::string renamed = absl::StrReplaceAll(whole, {{"layers.0.mlp.up_proj.qzeros", "layers.0.mlp.up_proj.qzeroz"}});
  ASSERT_EQ(WriteFileAtomically(path, renamed), absl::OkStatus());
  EXPECT_THAT(std::string(Open(model).message()), HasSubstr("up_proj.qzeros is missing"));
}

}  // namespace
}  // namespace rankwise::testing
