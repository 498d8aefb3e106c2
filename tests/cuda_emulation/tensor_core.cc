#include <bit>
#include <cstring>

#include "tests/cuda_emulation/emulator.h"

namespace rankwise::cuda_emulation {
namespace {

float Half16(uint32_t pair, int i) { return std::bit_cast<float>(i == 0 ? pair << 16 : pair & 0xffff0000); }

// To f32 towards zero.
float CutOff(double x) {
  return static_cast<float>(std::bit_cast<double>(std::bit_cast<uint64_t>(x) & ~0x1fffffffull));
}

struct Matrices {
  float a[3][16][16], b[3][16][8];
  bool a_is_zero[3], b_is_zero[3];
};

// Fragments as PTX ISA, "Matrix Fragments for mma.m16n8k16" has them.
void Gather(const MultiplyInput* const (&lanes)[kLanes], Matrices& m) {
  for (int term = 0; term < 3; ++term) {
    uint32_t any_a = 0, any_b = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      const MultiplyInput& in = *lanes[lane];
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 2 && term < in.a_terms; ++i) {
        for (int part = 0; part < 4; ++part) {
          m.a[term][g + part % 2 * 8][2 * t + i + part / 2 * 8] = Half16(in.a[term][part], i);
          any_a |= in.a[term][part] & 0x7fff7fff;
        }
      }
      for (int i = 0; i < 2 && term < in.b_terms; ++i) {
        for (int part = 0; part < 2; ++part) {
          m.b[term][2 * t + i + part * 8][g] = Half16(in.b[term][part], i);
          any_b |= in.b[term][part] & 0x7fff7fff;
        }
      }
    }
    m.a_is_zero[term] = any_a == 0;
    m.b_is_zero[term] = any_b == 0;
  }
}

void Step(const float (&a)[16][16], const float (&b)[16][8], float (&sums)[16][8]) {
  for (int row = 0; row < 16; ++row) {
    for (int half = 0; half < 2; ++half) {
      double exact[8];
      for (int n = 0; n < 8; ++n) exact[n] = sums[row][n];
      for (int k = half * 8; k < half * 8 + 8; ++k) {
        const double x = a[row][k];
        for (int n = 0; n < 8; ++n) exact[n] += x * b[k][n];
      }
      for (int n = 0; n < 8; ++n) sums[row][n] = CutOff(exact[n]);
    }
  }
}

}  // namespace

void MultiplyFragments(Meeting& meeting) {
  const MultiplyInput* lanes[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = reinterpret_cast<const MultiplyInput*>(meeting.in[lane]);
  static thread_local Matrices m;
  Gather(lanes, m);
  float high[16][8], low[16][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int i = 0; i < 4; ++i) {
      high[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2] = lanes[lane]->high[i];
      low[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2] = lanes[lane]->low[i];
    }
  }
  for (int i = 0; i < lanes[0]->a_terms; ++i) {
    for (int j = 0; j < lanes[0]->b_terms; ++j) {
      // Zeros add nothing but to a factor that is not finite, and that is seen in the first terms.
      if (i + j > 0 && (m.a_is_zero[i] || m.b_is_zero[j])) continue;
      Step(m.a[i], m.b[j], i + j == 0 ? high : low);
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    auto* out = reinterpret_cast<MultiplyOutput*>(meeting.out[lane]);
    for (int i = 0; i < 4; ++i) {
      out->high[i] = high[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
      out->low[i] = low[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
    }
  }
}

}  // namespace rankwise::cuda_emulation
