#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <limits>

#include "kernels/number_formats.h"
#include "kernels/test_support.h"

namespace rankwise::kernels {
namespace {

constexpr double kUnit = 0x1p-24;
constexpr int64_t kWidths[] = {1, 2, 15, 16, 17, 31, 63, 64, 65, 127, 130, 2048};

class RowsTest : public testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(Backends, RowsTest, testing::ValuesIn(BackendNames()), [](const auto& i) { return i.param; });

TEST_P(RowsTest, RmsNorm) {
  SCOPED_TRACE(testing::Message() << "seed " << TestSeed());
  Random random(TestSeed());
  const auto backend = MakeBackend(GetParam(), 2);
  for (int64_t width : kWidths) {
    for (int32_t rows : {0, 1, 3, 40}) {
      Step step = PlainStep(rows);
      ASSERT_TRUE(backend->BeginStep(step.rows()).ok());
      const auto x = random.Floats(rows * width, -3, 3), weight = random.Floats(width);
      Guarded out(rows * width), in_place(x);
      ASSERT_TRUE(backend->RmsNorm(out.data(), x.data(), weight.data(), width, 1e-5f).ok());
      ASSERT_TRUE(backend->RmsNorm(in_place.data(), in_place.data(), weight.data(), width, 1e-5f).ok());
      EXPECT_TRUE(out.BandsAreIntact() && SameBits(out.values(), in_place.values()));
      for (int64_t i = 0; i < rows * width; ++i) {
        double squares = 0;
        for (int64_t k = 0; k < width; ++k) squares += std::pow(double{x[i / width * width + k]}, 2);
        const double exact = x[i] / std::sqrt(squares / static_cast<double>(width) + 1e-5f) * weight[i % width];
        const double bound = 1.01 * (static_cast<double>(width) / 128 + 9) * kUnit * std::fabs(exact) + 0x1p-149;
        ASSERT_LE(std::fabs(out.data()[i] - exact), bound) << "width " << width << " element " << i;
      }
    }
  }
}

TEST_P(RowsTest, AddAndAddRmsNorm) {
  Random random(TestSeed());
  const auto backend = MakeBackend(GetParam(), 2);
  for (int64_t width : kWidths) {
    const int32_t rows = 19;
    Step step = PlainStep(rows);
    ASSERT_TRUE(backend->BeginStep(step.rows()).ok());
    const auto start = random.Floats(rows * width), delta = random.Floats(rows * width), bias = random.Floats(width),
               weight = random.Floats(width);
    for (bool has_bias : {false, true}) {
      const float* b = has_bias ? bias.data() : nullptr;
      Guarded x(start), both(start), out(rows * width), norm(rows * width);
      ASSERT_TRUE(backend->Add(x.data(), delta.data(), b, width).ok());
      for (int64_t i = 0; i < rows * width; ++i) {
        const double added = double{delta[i]} + (has_bias ? bias[i % width] : 0);
        ASSERT_LE(std::fabs(x.data()[i] - (start[i] + added)),
                  1.01 * kUnit * (std::fabs(start[i] + added) + std::fabs(added)));
      }
      ASSERT_TRUE(backend->AddRmsNorm(out.data(), both.data(), delta.data(), b, weight.data(), width, 1e-6f).ok());
      ASSERT_TRUE(backend->RmsNorm(norm.data(), x.data(), weight.data(), width, 1e-6f).ok());
      EXPECT_TRUE(SameBits(both.values(), x.values()) && SameBits(out.values(), norm.values()));
      EXPECT_TRUE(x.BandsAreIntact() && both.BandsAreIntact() && out.BandsAreIntact());
    }
  }
}

TEST_P(RowsTest, AddIsExactOnIntegers) {
  Random random(TestSeed());
  const auto backend = MakeBackend(GetParam());
  Step step = PlainStep(2);
  ASSERT_TRUE(backend->BeginStep(step.rows()).ok());
  const auto start = random.Ints(2 * 35, -99, 99), delta = random.Ints(2 * 35, -99, 99), bias = random.Ints(35, -9, 9);
  Guarded x(start);
  ASSERT_TRUE(backend->Add(x.data(), delta.data(), bias.data(), 35).ok());
  for (int i = 0; i < 70; ++i) EXPECT_EQ(x.data()[i], start[i] + delta[i] + bias[i % 35]);
}

TEST_P(RowsTest, SiluMul) {
  Random random(TestSeed());
  const auto backend = MakeBackend(GetParam(), 2);
  for (int64_t width : kWidths) {
    const int32_t rows = 5;
    Step step = PlainStep(rows);
    ASSERT_TRUE(backend->BeginStep(step.rows()).ok());
    auto gate_up = random.Floats(rows * 2 * width, -8, 8);
    const float corners[] = {0.0f, -0.0f, 87.0f, -87.0f, 89.0f, -89.0f, 1000.0f, -1000.0f, 1e-30f, -1e-40f, 3e38f};
    for (size_t i = 0; i < std::size(corners) && static_cast<int64_t>(i) < width; ++i) gate_up[i] = corners[i];
    Guarded out(rows * width);
    ASSERT_TRUE(backend->SiluMul(out.data(), gate_up.data(), width).ok());
    EXPECT_TRUE(out.BandsAreIntact());
    for (int64_t i = 0; i < rows * width; ++i) {
      const double gate = gate_up[i / width * 2 * width + i % width],
                   up = gate_up[(i / width * 2 + 1) * width + i % width];
      const double exact = gate / (1 + std::exp(-gate)) * up;
      if (std::fabs(exact) > std::numeric_limits<float>::max()) continue;
      const double bound = 8 * kUnit * std::fabs(exact) + 0x1p-126 * std::fabs(gate * up) + 0x1p-126;
      ASSERT_LE(std::fabs(out.data()[i] - exact), bound) << "gate " << gate << " up " << up;
    }
  }
}

TEST_P(RowsTest, EmbedReadsEveryDtypeAndRefusesForeignTokens) {
  Random random(TestSeed());
  const auto backend = MakeBackend(GetParam(), 2);
  for (const int i : {0, 1, 2, 3, 4, 5}) {
    const DType dtype = std::array{DType::kF32, DType::kF16, DType::kBF16}[i % 3];
    const bool is_kept = i >= 3;
    for (int64_t width : kWidths) {
      const HostMatrix table(random.Floats(7 * width), 7, dtype), other(random.Floats(7 * width), 7, dtype);
      Step step = PlainStep(20);
      for (int32_t& token : step.tokens()) token = random.Int(0, 6);
      if (is_kept) {
        ASSERT_TRUE(backend->KeepTable(table.view()).ok());
      }
      ASSERT_TRUE(backend->BeginStep(step.rows()).ok());
      Guarded x(20 * width);
      ASSERT_TRUE(backend->Embed(table.view(), x.data()).ok());
      EXPECT_TRUE(x.BandsAreIntact());
      for (int64_t j = 0; j < 20 * width; ++j) ASSERT_EQ(x.data()[j], table.at(step.tokens()[j / width], j % width));
      ASSERT_TRUE(backend->Embed(other.view(), x.data()).ok());
      for (int64_t j = 0; j < 20 * width; ++j) ASSERT_EQ(x.data()[j], other.at(step.tokens()[j / width], j % width));
      for (int32_t token : {-1, 7}) {
        step.tokens()[3] = token;
        const absl::Status status = backend->Embed(table.view(), x.data());
        EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
        EXPECT_THAT(std::string(status.message()), testing::HasSubstr(std::to_string(token)));
      }
    }
  }
}

TEST_P(RowsTest, PickRowsCopies) {
  Random random(TestSeed());
  const auto backend = MakeBackend(GetParam());
  Step step = PlainStep(9);
  ASSERT_TRUE(backend->BeginStep(step.rows()).ok());
  const auto x = random.Floats(9 * 33);
  const std::vector<int32_t> picked = {8, 0, 3, 3};
  Guarded out(4 * 33);
  ASSERT_TRUE(backend->PickRows(out.data(), x.data(), picked, 33).ok());
  EXPECT_TRUE(out.BandsAreIntact());
  for (int i = 0; i < 4 * 33; ++i) EXPECT_EQ(out.data()[i], x[picked[i / 33] * 33 + i % 33]);
}

TEST_P(RowsTest, AllocatesZerosAndCopies) {
  const auto backend = MakeBackend(GetParam());
  auto floats = backend->Allocate(1000);
  ASSERT_TRUE(floats.ok());
  EXPECT_EQ(reinterpret_cast<uintptr_t>(floats->get()) % 64, 0u);
  std::vector<float> host(1000, 1.0f);
  ASSERT_TRUE(backend->CopyToHost(floats->get(), host).ok());
  EXPECT_THAT(host, testing::Each(0.0f));
  host[7] = 5;
  std::vector<float> back(1000);
  ASSERT_TRUE(backend->CopyToDevice(host, floats->get()).ok() && backend->CopyToHost(floats->get(), back).ok());
  EXPECT_EQ(back, host);
}

// Norm and silu of the same rows on every instruction set and team, against one thread of the first.
TEST(CpuRowsTest, InstructionSetsAndTeamsGiveTheSameBits) {
  Random random(TestSeed());
  for (int64_t width : kWidths) {
    const int32_t rows = 37;
    const auto x = random.Floats(rows * 2 * width, -90, 90), weight = random.Floats(width);
    std::vector<float> expected;
    for (const std::string& name : InstructionSets()) {
      for (int threads : TeamSizes()) {
        const auto backend = MakeBackend(name, threads);
        Step step = PlainStep(rows);
        ASSERT_TRUE(backend->BeginStep(step.rows()).ok());
        std::vector<float> out(2 * rows * width);
        ASSERT_TRUE(backend->RmsNorm(out.data(), x.data(), weight.data(), width, 1e-5f).ok());
        ASSERT_TRUE(backend->SiluMul(out.data() + rows * width, x.data(), width).ok());
        if (expected.empty()) expected = out;
        ASSERT_TRUE(SameBits(out, expected)) << name << ", " << threads << " threads, width " << width;
      }
    }
  }
}

TEST(CpuBackendTest, NamesItselfAndRefusesUnknownInstructionSets) {
  EXPECT_EQ(CreateCpuBackend({.instruction_set = "sse9"}).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(CreateCpuBackend({.threads = -1}).status().code(), absl::StatusCode::kInvalidArgument);
  for (const std::string& name : InstructionSets()) {
    EXPECT_EQ(MakeBackend(name, 3)->Description(), "cpu " + name + ", 3 threads");
  }
}

TEST(NumberFormatsTest, QuantizeInt8RoundsHalfToEvenAndSaturates) {
  const float nan = std::numeric_limits<float>::quiet_NaN(), inf = std::numeric_limits<float>::infinity();
  struct Case {
    float x;
    int q;
    bool saturated;
  };
  for (const Case& c : {Case{0.5f, 0, false},
                        {1.5f, 2, false},
                        {-0.5f, 0, false},
                        {-2.5f, -2, false},
                        {127.4f, 127, false},
                        {127.5f, 127, true},
                        {-128.5f, -128, false},
                        {-128.6f, -128, true},
                        {inf, 127, true},
                        {-inf, -128, true},
                        {nan, 0, true}}) {
    const auto stored = QuantizeInt8(c.x, 1, 0);
    EXPECT_EQ(stored.value, c.q) << c.x;
    EXPECT_EQ(stored.saturated, c.saturated) << c.x;
  }
  EXPECT_EQ(QuantizeInt8(3.0f, 0.25f, 1.0f).value, 8);
}

}  // namespace
}  // namespace rankwise::kernels
