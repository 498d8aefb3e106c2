// Included after dot_*.h.
#pragma once

#include <iterator>
#include <type_traits>

#include "kernels/cpu/isa_kernels.h"
#include "kernels/cpu/sum_tree.h"

namespace rankwise::kernels::RW_ISA {

// y = x Wᵀ + bias for one panel of 32 output columns, x and W quantised.
//   From 0, each chunk adds for each of its groups fma(Σ_k (w_q - zero) q, w_scale * scale, sum); chunk sums add up in
//   a balanced binary tree; then the bias.
// Shapes   quantised x tiles (QuantizedRows); weights [n_in / 8, 2, 32] words of four; y [row_count, n_out] f32
// Rounding |y - exact| <= (most groups of a chunk + log2(chunks) + 2) 2^-24 (Σ_groups |term| + |bias|), up to second
//          order, where exact takes x as quantised: integers and their conversion are exact
// Order    integers add up alike in any order, and the floats of a row and column do in one

// --- Activations.

// Lanes [begin, end) of eight, 0 elsewhere.
inline __m256i LanesOfEight(int64_t begin, int64_t end) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_and_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(end)), lane),
                          _mm256_cmpgt_epi32(lane, _mm256_set1_epi32(static_cast<int>(begin - 1))));
}
// The eight columns of a pair of one row; zeros for those outside the group.
inline __m256 LoadEight(const float* x, const DotGroup& group, int64_t pair) {
  const int64_t k = group.pair_column + pair * 8;
  if (k >= group.begin && k + 8 <= group.end) return _mm256_loadu_ps(x + k);
  return _mm256_maskload_ps(x + k,
                            LanesOfEight(Larger<int64_t>(group.begin - k, 0), Smaller<int64_t>(group.end - k, 8)));
}
inline int32_t LargestLane(__m256i x) {
  __m128i four = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}
inline int32_t SumOfLanes(__m256i x) {
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}

// One group of one row, its words `stride` apart: QuantizeActivations to the bit, for finite x.
inline void QuantizeGroup(const float* x, const DotGroup& group, int64_t stride, uint32_t* words, float* scale,
                          uint32_t* sum) {
  // Sizes compare like their bits, and a NaN is above all of them.
  __m256i largest = _mm256_setzero_si256();
  for (int32_t p = 0; p < group.pair_count; ++p) {
    const __m256i bits = _mm256_castps_si256(LoadEight(x, group, p));
    largest = _mm256_max_epi32(largest, _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)));
  }
  const int32_t bits = LargestLane(largest);
  float size;
  std::memcpy(&size, &bits, sizeof(size));
  *scale = size / 127.0f;
  const __m256 divisor = _mm256_set1_ps(*scale > 0 ? *scale : 1.0f);
  const __m256 highest = _mm256_set1_ps(127.0f), lowest = _mm256_set1_ps(-127.0f);
  const __m128i evens_first = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 0, 2, 4, 6, 1, 3, 5, 7);
  __m256i total = _mm256_setzero_si256();
  for (int32_t p = 0; p < group.pair_count; ++p) {
    const __m256 level = _mm256_div_ps(LoadEight(x, group, p), divisor);
    const __m256i q = _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(level, lowest), highest));
    total = _mm256_add_epi32(total, q);
    const __m128i sixteen = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
    const __m128i bytes = _mm_shuffle_epi8(_mm_packs_epi16(sixteen, sixteen), evens_first);
    words[2 * p * stride] = static_cast<uint32_t>(_mm_cvtsi128_si32(bytes));
    words[(2 * p + 1) * stride] = static_cast<uint32_t>(_mm_extract_epi32(bytes, 1));
  }
  *sum = static_cast<uint16_t>(SumOfLanes(total));
}

// Tiles of more rows than vectors take are multiplied in matrix registers.
inline bool IsForMatrixRegisters(int32_t tile_rows) { return tile_rows > kDotTileRows; }

// What one tile has of a QuantizedRows.
struct QuantizedTile {
  int32_t rows;
  uint32_t* words;
  float* scales;
  uint32_t* sums;
};
inline QuantizedTile TileOfQuantized(const MatMulTask& task, int32_t tile) {
  const QuantizedRows& all = task.quantized;
  const int64_t row = TileBegin(task, tile);
  return {.rows = TileBegin(task, tile + 1) - static_cast<int32_t>(row),
          .words = all.words + row * all.pair_count * 2,
          .scales = all.scales + row * all.group_count,
          .sums = all.sums + row * all.group_count};
}

inline void QuantizeRows(const MatMulTask& task, const float* x, int64_t begin, int64_t end) {
  for (int32_t t = 0; t < task.tile_count; ++t) {
    const QuantizedTile tile = TileOfQuantized(task, t);
    for (int32_t r = 0; r < tile.rows; ++r, x += task.n_in) {
      for (int64_t g = begin; g < end; ++g) {
        const DotGroup& group = task.groups[g];
        const bool is_row_major = IsForMatrixRegisters(tile.rows);
        uint32_t* words = tile.words + int64_t{2} * group.x_pair * tile.rows;
        QuantizeGroup(x, group, is_row_major ? 1 : tile.rows, words + r * (is_row_major ? 2 * group.pair_count : 1),
                      tile.scales + g * tile.rows + r, tile.sums + g * tile.rows + r);
      }
    }
  }
}

// --- Products.

// Few rows wait for memory, more compute.
inline constexpr int kWaitingRows = 3;

// What is fetched ahead of a tile that alone reads the weights. Those that wait ask the second cache for what is read a
// page later, where the hardware's own prefetch ends, every other line (a neighbour comes along), because a request of
// the first cache holds one of its few miss buffers all the way. For the others what they read next shall be in the
// first. Fractions of what reads alone reach, weights of eight and of four bits from memory, Zen 4:
//   one row     92 and 85 % this way, 86 and 78 % without, 84 and 70 % as the others
//   eight rows  59 and 36 % this way, 59 and 33 % without, 54 and 29 % as the others
template <typename Q>
inline Ahead AheadOf(const Q* q, int32_t rows) {
  return {reinterpret_cast<const char*>(q) + (rows <= kWaitingRows ? 4096 : 2048), sizeof(Q)};
}
template <int R, typename Q>
[[gnu::always_inline]] inline void Prefetch(const char* pair) {
  if constexpr (R <= kWaitingRows) {
#pragma GCC unroll 2
    for (size_t line = 0; line < sizeof(Q); line += 128) _mm_prefetch(pair + line, _MM_HINT_T1);
  } else {
#pragma GCC unroll 4
    for (size_t line = 0; line < sizeof(Q); line += 64) _mm_prefetch(pair + line, _MM_HINT_T0);
  }
}

// Of one group of weights: scales, and what the sums of q are multiplied with.
struct DotParameters {
  Vec scale[2];
  Ints shift[2];
};

inline void AddScaled(Ints dot, Vec weight_scale, float x_scale, bool continues, float* sum) {
  const Vec scale = Mul(weight_scale, Set(x_scale));
  Store(sum, Fma(ToFloats(dot), scale, continues ? Load(sum) : Zero()));
}

template <typename Q, int R, int V>
[[gnu::always_inline]] inline void DotTile(const Q* q, const DotParameters& parameters, int v0, const uint32_t* x,
                                           const float* x_scales, const uint32_t* x_sums, int32_t pair_count,
                                           bool continues, Ahead ahead, float* sums) {
  constexpr int kChains = R <= 2 ? 2 : 1;  // a row alone is too few to hide the latency of a product
  Ints dots[kChains][R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      dots[kChains - 1][r][v] = ZeroInts();
      dots[0][r][v] = TimesSixteenBits(parameters.shift[v0 + v], x_sums[r]);
    }
  }
  for (int32_t p = 0; p < pair_count; ++p) {
    Prefetch<R, Q>(ahead.begin);
    ahead.begin += ahead.bytes_per_step;
    DotPair(q + p, v0, x + int64_t{2} * p * R, dots);
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      const Ints dot = kChains == 2 ? Add(dots[0][r][v], dots[1][r][v]) : dots[0][r][v];
      AddScaled(dot, parameters.scale[v0 + v], x_scales[r], continues, sums + r * kPanelColumns + (v0 + v) * 16);
    }
  }
}

template <typename Q, int R>
void DotTileOfRows(const Q* q, const DotParameters& parameters, const uint32_t* x, const float* x_scales,
                   const uint32_t* x_sums, int32_t pair_count, bool continues, Ahead ahead, float* sums) {
  for (int v = 0; v < 2; v += kDotTileVectors) {
    DotTile<Q, R, kDotTileVectors>(q, parameters, v, x, x_scales, x_sums, pair_count, continues, ahead, sums);
  }
}

template <typename Q>
using DotFunction = void (*)(const Q*, const DotParameters&, const uint32_t*, const float*, const uint32_t*, int32_t,
                             bool, Ahead, float*);
template <typename Q>
inline DotFunction<Q> DotTileFor(int32_t rows) {
  static constexpr DotFunction<Q> kTiles[] = {DotTileOfRows<Q, 1>,
                                              DotTileOfRows<Q, 2>,
                                              DotTileOfRows<Q, 3>,
                                              DotTileOfRows<Q, 4>
#ifdef __AVX512F__
                                              ,
                                              DotTileOfRows<Q, 5>,
                                              DotTileOfRows<Q, 6>,
                                              DotTileOfRows<Q, 7>,
                                              DotTileOfRows<Q, 8>
#endif
  };
  static_assert(std::size(kTiles) == kDotTileRows);
  return kTiles[rows - 1];
}

// One panel of weights in pairs of Q.
template <typename Q>
class DotPanel {
 public:
  DotPanel(const MatMulTask& task, int64_t panel) : task_(task), groups_(task.weights + panel * task.panel_bytes) {}

  // sums [row_count, 32] of groups [begin, end), from 0.
  void SumChunk(int32_t begin, int32_t end, float* sums, float* scratch) const {
    if (begin == end) std::memset(sums, 0, sizeof(float) * task_.row_count * kPanelColumns);
    if (task_.tile_count == 1 && !IsForMatrixRegisters(task_.row_count)) {
      for (int32_t g = begin; g < end; ++g) {
        AddGroup(TileOfQuantized(task_, 0), g, Pairs(g), Parameters(g), g > begin, AheadOf(Pairs(g), task_.row_count),
                 sums);
      }
      return;
    }
    for (int32_t g = begin; g < end;) g = AddBlock(begin, g, end, sums, scratch);
  }

 private:
  using Tile = QuantizedTile;
#ifdef __AMX_INT8__
  using BlockQ = Bytes;
#else
  using BlockQ = Q;
#endif
  static constexpr bool kIsWidened = !std::is_same_v<BlockQ, Q>;
  static constexpr int32_t kBlockBytes = 8 << 10, kBlockGroups = 16;
  static_assert(kBlockBytes <= sizeof(float) * kMatMulDepth * kPanelColumns);

  const std::byte* WeightGroup(int32_t g) const { return groups_ + task_.groups[g].weight_group * task_.group_bytes; }
  const Q* Pairs(int32_t g) const {
    return reinterpret_cast<const Q*>(WeightGroup(g) + kGroupHeaderBytes) + task_.groups[g].pair_begin;
  }
  DotParameters Parameters(int32_t g) const {
    const auto* scales = reinterpret_cast<const uint16_t*>(WeightGroup(g));
    const auto* zeros = reinterpret_cast<const U8*>(scales + kPanelColumns);
    DotParameters parameters;
    for (int v = 0; v < 2; ++v) {
      parameters.scale[v] = LoadF16(scales + v * 16);
      parameters.shift[v] = OffsetMinus(kWeightOffset<Q>, zeros + v * 16);
    }
    return parameters;
  }

  void AddGroup(const Tile& tile, int32_t g, const Q* q, const DotParameters& parameters, bool continues, Ahead ahead,
                float* sums) const {
    const DotGroup& group = task_.groups[g];
    DotTileFor<Q>(tile.rows)(q, parameters, tile.words + int64_t{2} * group.x_pair * tile.rows,
                             tile.scales + int64_t{g} * tile.rows, tile.sums + int64_t{g} * tile.rows, group.pair_count,
                             continues, ahead, sums);
  }

#ifdef __AMX_INT8__
  void AddGroupOfBlock(const Tile& tile, int32_t g, const Bytes* q, const DotParameters& parameters, bool continues,
                       Ahead ahead, float* sums) const {
    const DotGroup& group = task_.groups[g];
    const uint32_t* x = tile.words + int64_t{2} * group.x_pair * tile.rows;
    const int32_t pairs = PairsAtOnce(group.pair_count);
    registers_.Begin(tile.rows, pairs);
    for (int32_t p = 0; p < group.pair_count; p += pairs) {
      for (int32_t i = 0; i < pairs; ++i, ahead.begin += ahead.bytes_per_step) {
        Prefetch<kDotTileRows, Q>(ahead.begin);
      }
      registers_.AddProducts(x + 2 * p, 2 * group.pair_count, q[p].words);
    }
    alignas(64) int32_t dots[kMatrixRows][kPanelColumns];
    registers_.Store(dots);
    for (int32_t r = 0; r < tile.rows; ++r) {
      const int64_t at = int64_t{g} * tile.rows + r;
      for (int v = 0; v < 2; ++v) {
        const Ints shift = TimesSixteenBits(parameters.shift[v], tile.sums[at]);
        AddScaled(Add({_mm512_load_si512(dots[r] + v * 16)}, shift), parameters.scale[v], tile.scales[at], continues,
                  sums + r * kPanelColumns + v * 16);
      }
    }
  }
#else
  void AddGroupOfBlock(const Tile& tile, int32_t g, const Q* q, const DotParameters& parameters, bool continues,
                       Ahead ahead, float* sums) const {
    AddGroup(tile, g, q, parameters, continues, ahead, sums);
  }
#endif

  // As many groups from `g` on as stay in the first cache while all tiles pass over them; returns the next. Matrix
  // registers take whole bytes, which are then made in `scratch`; vectors are as fast with four bits.
  int32_t AddBlock(int32_t chunk_begin, int32_t g, int32_t chunk_end, float* sums,
                   [[maybe_unused]] float* scratch) const {
    DotParameters parameters[kBlockGroups];
    const BlockQ* q[kBlockGroups];
    int32_t count = 0, pairs = 0;
    for (; count < kBlockGroups && g + count < chunk_end; ++count) {
      const DotGroup& group = task_.groups[g + count];
      if ((pairs + group.pair_count) * static_cast<int32_t>(sizeof(BlockQ)) > kBlockBytes) break;
      parameters[count] = Parameters(g + count);
      if constexpr (kIsWidened) {
        Bytes* widened = reinterpret_cast<Bytes*>(scratch) + pairs;
        q[count] = widened;
        WidenPairs(Pairs(g + count), group.pair_count, widened);
      } else {
        q[count] = Pairs(g + count);
      }
      pairs += group.pair_count;
    }
    const int32_t last = g + count - 1;
    const auto* next = reinterpret_cast<const char*>(Pairs(last) + task_.groups[last].pair_count);
    const int64_t next_bytes = pairs * static_cast<int64_t>(sizeof(Q)) + count * kGroupHeaderBytes;
    for (int32_t t = 0; t < task_.tile_count; ++t) {
      const Tile tile = TileOfQuantized(task_, t);
      float* tile_sums = sums + int64_t{TileBegin(task_, t)} * kPanelColumns;
      // Each tile fetches its share of the next block.
      Ahead ahead = {next + next_bytes * t / task_.tile_count, next_bytes / task_.tile_count / pairs};
      for (int32_t i = 0; i < count; ++i) {
        AddGroupOfBlock(tile, g + i, q[i], parameters[i], g + i > chunk_begin, ahead, tile_sums);
        ahead.begin += ahead.bytes_per_step * task_.groups[g + i].pair_count;
      }
    }
    return g + count;
  }

  const MatMulTask& task_;
  const std::byte* groups_;
#ifdef __AMX_INT8__
  mutable MatrixRegisters registers_;
#endif
};

template <typename Q>
void IntegerMatMulPanel(const MatMulTask& task, int64_t panel, float* scratch) {
  const DotPanel<Q> weights(task, panel);
  SumTreeOfPanel(task, panel, scratch + kMatMulDepth * kPanelColumns, [&](int32_t chunk, float* sums) {
    weights.SumChunk(task.chunk_groups[chunk], task.chunk_groups[chunk + 1], sums, scratch);
  });
}

inline constexpr IntegerKernels kIntegerTable = {
    .name = kDotName,
    .tile_rows = kDotTileRows,
    .quantize_rows = QuantizeRows,
    .matmul_panel = {IntegerMatMulPanel<Nibbles>, IntegerMatMulPanel<Bytes>},
    .dot_burst = DotBurst,
};

}  // namespace rankwise::kernels::RW_ISA
