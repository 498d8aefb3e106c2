#include "kernels/amx_emulation/amx_emulator.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <csignal>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

// The instructions themselves. On a CPU that has them these tests hold for it, and the emulator is asked nothing.
namespace rankwise::amx_emulation {
namespace {

struct alignas(64) Shapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void Set(int i, int row_count, int bytes) {
    rows[i] = static_cast<uint8_t>(row_count);
    row_bytes[i] = static_cast<uint16_t>(bytes);
  }
};

void SetShapes(const Shapes& shapes) { asm volatile("ldtilecfg %0" ::"m"(shapes) : "memory"); }
void Release() { asm volatile("tilerelease" ::: "memory"); }
template <int T>
void Load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
void Store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
}

class AmxEmulatorTest : public testing::Test {
 protected:
  AmxEmulatorTest() { Install(); }
  ~AmxEmulatorTest() override { Release(); }

  std::vector<uint8_t> Bytes(size_t count) {
    std::vector<uint8_t> bytes(count);
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(engine_());
    return bytes;
  }

  std::mt19937 engine_{7};
};

// Register 1 = register 1 + register 2 times register 3, rows of A and B of each sign.
constexpr int kM = 5, kK = 7, kN = 11;
struct Operands {
  std::vector<uint8_t> a, b;
  std::vector<uint32_t> sum;
};
template <typename A, typename B>
std::vector<uint32_t> Product(const Operands& o) {
  std::vector<uint32_t> sum = o.sum;
  for (int m = 0; m < kM; ++m) {
    for (int n = 0; n < kN; ++n) {
      for (int k = 0; k < 4 * kK; ++k) {
        const int a = static_cast<A>(o.a[m * 4 * kK + k]), b = static_cast<B>(o.b[(k / 4 * kN + n) * 4 + k % 4]);
        sum[m * kN + n] += static_cast<uint32_t>(a * b);
      }
    }
  }
  return sum;
}

TEST_F(AmxEmulatorTest, MultipliesBytesOfAnySigns) {
  Shapes shapes;
  shapes.Set(1, kM, 4 * kN);
  shapes.Set(2, kM, 4 * kK);
  shapes.Set(3, kK, 4 * kN);
  SetShapes(shapes);
  Operands o{Bytes(kM * 4 * kK), Bytes(kK * 4 * kN), std::vector<uint32_t>(kM * kN)};
  for (uint32_t& x : o.sum) x = engine_();
  const auto run = [&](auto multiply) {
    std::vector<uint32_t> out(kM * kN);
    Load<1>(o.sum.data(), 4 * kN);
    Load<2>(o.a.data(), 4 * kK);
    Load<3>(o.b.data(), 4 * kN);
    multiply();
    Store<1>(out.data(), 4 * kN);
    return out;
  };
  EXPECT_EQ(run([] { asm volatile("tdpbssd %tmm3, %tmm2, %tmm1"); }), (Product<int8_t, int8_t>(o)));
  EXPECT_EQ(run([] { asm volatile("tdpbsud %tmm3, %tmm2, %tmm1"); }), (Product<int8_t, uint8_t>(o)));
  EXPECT_EQ(run([] { asm volatile("tdpbusd %tmm3, %tmm2, %tmm1"); }), (Product<uint8_t, int8_t>(o)));
  EXPECT_EQ(run([] { asm volatile("tdpbuud %tmm3, %tmm2, %tmm1"); }), (Product<uint8_t, uint8_t>(o)));
}

TEST_F(AmxEmulatorTest, MovesRowsOfTheShapeAlone) {
  Shapes shapes;
  shapes.Set(6, 3, 8);
  SetShapes(shapes);
  const std::vector<uint8_t> from = Bytes(64);
  std::vector<uint8_t> to(64, 0xee);
  Load<6>(from.data(), 20);
  Store<6>(to.data(), 16);
  for (int i = 0; i < 64; ++i) {
    EXPECT_EQ(to[i], i < 48 && i % 16 < 8 ? from[i / 16 * 20 + i % 16] : 0xee) << i;
  }
  asm volatile("tilezero %tmm6");
  Store<6>(to.data(), 16);
  EXPECT_THAT(std::vector(to.begin(), to.begin() + 8), testing::Each(0));
}

// One of each way to say where memory is.
TEST_F(AmxEmulatorTest, FindsMemoryByAnyOperand) {
  static Shapes shapes;
  shapes.Set(0, 2, 4);
  asm volatile("ldtilecfg %0" ::"m"(shapes) : "memory");  // relative to the instruction, or near a register
  uint32_t words[64];
  for (uint32_t i = 0; i < 64; ++i) words[i] = i;
  const auto loaded = [&] {
    uint32_t out[2];
    Store<0>(out, 4);
    return std::vector(out, out + 2);
  };
  const char* base = reinterpret_cast<const char*>(words);
  asm volatile("tileloadd 16(%0,%1,4), %%tmm0" ::"r"(base), "r"(int64_t{3}) : "memory");
  EXPECT_THAT(loaded(), testing::ElementsAre(4, 7));
  asm volatile("tileloadd -200(%0,%1,2), %%tmm0" ::"r"(base + 200), "r"(int64_t{4}) : "memory");
  EXPECT_THAT(loaded(), testing::ElementsAre(0, 2));
  register const char* r13 asm("r13") = base;
  register int64_t r12 asm("r12") = 8;
  asm volatile("tileloadd (%0,%1,1), %%tmm0" ::"r"(r13), "r"(r12) : "memory");
  EXPECT_THAT(loaded(), testing::ElementsAre(0, 2));
  asm volatile("tileloadd (%0), %%tmm0" ::"r"(base) : "memory");
  EXPECT_THAT(loaded(), testing::ElementsAre(0, 0));
}

TEST_F(AmxEmulatorTest, ThreadsHaveRegistersOfTheirOwn) {
  Shapes shapes;
  shapes.Set(0, 1, 4);
  SetShapes(shapes);
  uint32_t mine = 1, other = 2, out = 0;
  Load<0>(&mine, 4);
  std::thread([&] {
    SetShapes(shapes);
    Load<0>(&other, 4);
    Release();
  }).join();
  Store<0>(&out, 4);
  EXPECT_EQ(out, 1u);
}

// What a CPU refuses.
using AmxEmulatorDeathTest = AmxEmulatorTest;
TEST_F(AmxEmulatorDeathTest, WhatWouldFaultEndsTheProcess) {
  if (__builtin_cpu_supports("amx-tile")) GTEST_SKIP() << "this CPU has matrix registers, and faults without words";
  uint32_t words[256] = {};
  const auto with = [&](const Shapes& shapes, auto body) {
    SetShapes(shapes);
    Load<0>(words, 4);
    body();
  };
  Shapes shapes;
  shapes.Set(0, 2, 8);
  shapes.Set(1, 2, 8);
  shapes.Set(2, 3, 8);
  EXPECT_DEATH(with({}, [] {}), "without a shape");
  EXPECT_DEATH(with(shapes, [] { asm volatile("tdpbssd %tmm2, %tmm1, %tmm0"); }), "shapes that do not match");
  EXPECT_DEATH(with(shapes, [] { asm volatile(".byte 0xc4, 0xe2, 0x73, 0x5e, 0xc0"); }), "one register twice");
  EXPECT_DEATH(with(shapes, [] { asm volatile("tilezero %tmm7"); }), "without a shape");
  Shapes wide = shapes;
  wide.Set(3, 17, 8);
  EXPECT_DEATH(SetShapes(wide), "more than 16 rows");
  Shapes half = shapes;
  half.Set(3, 2, 0);
  EXPECT_DEATH(SetShapes(half), "empty in one direction");
  Shapes ninth = shapes;
  ninth.Set(8, 2, 8);
  EXPECT_DEATH(SetShapes(ninth), "does not exist");
  EXPECT_EXIT(asm volatile("ud2"), testing::KilledBySignal(SIGILL), "");
}

}  // namespace
}  // namespace rankwise::amx_emulation
