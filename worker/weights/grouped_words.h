#pragma once

#include <cstdint>
#include <vector>

#include "kernels/backend.h"
#include "kernels/number_formats.h"

namespace rankwise::weights {

// A kernels::GroupedMatrix in memory of its own, all zero until it is set. Outputs fill whole words, inputs whole
// groups. `matrix` borrows from the vectors: moving keeps it valid.
struct GroupedWords {
  GroupedWords(int64_t n_out, int64_t n_in, int bits, int32_t group_size)
      : qweight(n_in * n_out * bits / 32),
        qzeros(n_in / group_size * n_out * bits / 32),
        scales(n_in / group_size * n_out),
        matrix{.qweight = reinterpret_cast<const std::byte*>(qweight.data()),
               .qzeros = reinterpret_cast<const std::byte*>(qzeros.data()),
               .scales = reinterpret_cast<const std::byte*>(scales.data()),
               .n_out = n_out,
               .n_in = n_in,
               .bits = bits,
               .group_size = group_size} {}
  GroupedWords(const GroupedWords&) = delete;
  GroupedWords(GroupedWords&&) = default;

  // Each value once.
  void SetWeight(int64_t in, int64_t out, uint32_t q) { Set(qweight, in, out, q); }
  void SetGroup(int64_t group, int64_t out, uint32_t zero, uint16_t scale) {
    Set(qzeros, group, out, zero);
    scales[group * matrix.n_out + out] = scale;
  }

  std::vector<uint32_t> qweight, qzeros;
  std::vector<uint16_t> scales;  // f16
  kernels::GroupedMatrix matrix;

 private:
  void Set(std::vector<uint32_t>& words, int64_t row, int64_t out, uint32_t value) const {
    const int64_t per_word = 32 / matrix.bits;
    words[(row * matrix.n_out + out) / per_word] |= value << kernels::GroupedShift(matrix.bits, out);
  }
};

}  // namespace rankwise::weights
