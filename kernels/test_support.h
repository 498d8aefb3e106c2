#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "kernels/backend.h"

// What the kernel suites share: backends by name, seeded numbers, guarded buffers and steps that own their memory.
namespace rankwise::kernels {

// What the suites are run on, by name. kernels/test_backends.cc offers the instruction sets of the CPU backend that
// this machine can run, tests/gpu/test_backends.cc the CUDA backend, on a GPU or on the emulator.
std::vector<std::string> InstructionSets();
std::vector<std::string> BackendNames();      // and "reference"
std::vector<std::string> BFloat16Products();  // names, too: a CPU may have several ways to multiply Activations::kBF16
std::vector<std::string> IntegerProducts();   // and Activations::kInt8
std::unique_ptr<Backend> MakeBackend(const std::string& name, int threads = 1,
                                     Activations activations = Activations::kFloat);
std::vector<int> TeamSizes();
// Longer contexts are left out where they would take minutes.
int32_t LongestTestContext();
int32_t LargestTestHeadDim();  // that all their pools take

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  float Uniform(float low, float high) { return std::uniform_real_distribution<float>(low, high)(engine_); }
  int Int(int low, int high) { return std::uniform_int_distribution<int>(low, high)(engine_); }  // both included
  std::vector<float> Floats(int64_t count, float low = -1, float high = 1);
  std::vector<float> Ints(int64_t count, int low, int high);
  template <typename T>
  void Shuffle(std::vector<T>& v) {
    std::shuffle(v.begin(), v.end(), engine_);
  }

 private:
  std::mt19937_64 engine_;
};

// RANKWISE_TEST_SEED, else a fixed one. Tests name it in SCOPED_TRACE.
uint64_t TestSeed();

// `count` floats, NaN at first, between two bands that must stay as they were.
class Guarded {
 public:
  explicit Guarded(int64_t count);
  explicit Guarded(const std::vector<float>& values);
  float* data() { return all_.data() + kBand; }
  std::vector<float> values() const { return {all_.begin() + kBand, all_.end() - kBand}; }
  bool BandsAreIntact() const;

 private:
  static constexpr int64_t kBand = 64;
  std::vector<float> all_;
};

// A matrix as it may lie in a mapped file: any dtype, rows further apart than they are long, an odd address.
class HostMatrix {
 public:
  // `values` [rows, cols] are rounded to `dtype`.
  HostMatrix(const std::vector<float>& values, int64_t rows, DType dtype);
  MatrixView view() const;
  float at(int64_t row, int64_t col) const;

 private:
  int64_t rows_, cols_, stride_;
  DType dtype_;
  std::vector<std::byte> bytes_;
};

// Random values in the words of GroupedMatrix, written value by value as its comment says, and the f32 matrix they
// mean.
struct Quantised {
  std::vector<uint32_t> qweight, qzeros;
  std::vector<uint16_t> scales;
  std::vector<float> dense;  // [n_out, n_in]
  GroupedMatrix matrix;

  Quantised(int64_t n_out, int64_t n_in, int32_t bits, int32_t group_size, Random& random);
  Quantised(const Quantised&) = delete;
  MatrixView view() const;
};

// A StepRows that owns what it names.
class Step {
 public:
  Step& Add(int32_t first_position, int32_t row_count, std::vector<int32_t> block_table);
  StepRows rows();
  int32_t row_count() const { return static_cast<int32_t>(tokens_.size()); }
  std::vector<int32_t>& tokens() { return tokens_; }

 private:
  std::vector<int32_t> tokens_, row_begin_{0}, first_position_;
  std::vector<std::vector<int32_t>> tables_;
  std::vector<std::span<const int32_t>> table_views_;
};
// `count` rows of which nothing but the number matters.
Step PlainStep(int32_t count);

RopeTable MakeRope(int rotary_dim, int64_t position_count);

inline bool SameBits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

}  // namespace rankwise::kernels
