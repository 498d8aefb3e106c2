#include <algorithm>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/kv_histogram.h"
#include "kernels/number_formats.h"

// RopeAppend and Attention of the CPU backend: how their work is cut for the team.
namespace rankwise::kernels {
namespace {

// Rows of one KV head rotated and appended by one thread at a time.
constexpr int64_t kAppendRows = 16;

// Tiles per thread below which a step is also cut along the context.
constexpr int64_t kTilesPerThread = 4;

}  // namespace

absl::Status CpuBackend::RopeAppend(float* qkv, const AttentionShape& shape, const RopeTable& rope, const float* q_norm,
                                    const float* k_norm, float norm_eps, KvPool& pool, int layer,
                                    KvObservation* observation) {
  CheckAttention(shape, pool, layer);
  CheckRope(shape, rope, observation);
  step_.CheckFits(pool);
  RW_CHECK(rope.rotary_dim == 0 || step_.position_end() <= rope.position_count,
           absl::StrCat("position ", step_.position_end() - 1, " of ", rope.position_count));
  auto& kv = static_cast<CpuKvPool&>(pool);
  RopeAppendTask task{.qkv = qkv,
                      .qkv_stride = int64_t{shape.n_heads_local + 2 * shape.n_kv_heads_local} * shape.head_dim,
                      .n_heads = shape.n_heads_local,
                      .n_kv_heads = shape.n_kv_heads_local,
                      .head_dim = shape.head_dim,
                      .padded_dim = kv.block().padded_dim,
                      .rotary_dim = rope.rotary_dim,
                      .cos = rope.cos.data(),
                      .sin = rope.sin.data(),
                      .q_norm = q_norm,
                      .k_norm = k_norm,
                      .norm_eps = norm_eps,
                      .online_range = OnlineRangeOf};
  if (observation) {
    task.k_min = observation->k_min.data();
    task.k_max = observation->k_max.data();
    task.v_min = observation->v_min.data();
    task.v_max = observation->v_max.data();
  }
  const auto append = isa_.rope_append[static_cast<int>(kv.shape().format)];
  const int64_t rows = step_.row_count(), heads = shape.n_kv_heads_local;
  // One head's statistics belong to one thread.
  const int64_t piece = observation ? rows : kAppendRows;
  // Nor may two threads write to one block: two tokens of an int4 block share a byte.
  const auto block_begin = [&](int64_t row) {
    while (row < rows && step_.slot(row) != 0 && step_.segment(row) == step_.segment(row - 1)) ++row;
    return row;
  };
  const auto body = [&](int64_t item, int) {
    const int head = static_cast<int>(item % heads);
    const int64_t begin = item / heads * piece, end = std::min(begin + piece, rows);
    int64_t saturated = 0;
    for (int64_t row = begin == 0 ? 0 : block_begin(begin); row < block_begin(end); ++row) {
      std::byte* block = kv.Head(layer, head) + step_.block(row) * kv.block().bytes;
      const KvSlot slot{block, block + kv.block().v_offset, step_.slot(row), kv.scales(layer, head),
                        &kv.Online(layer, head, step_.block(row))};
      saturated += append(task, row, step_.position(row), head, slot);
      if (observation) {
        const float* k = qkv + row * task.qkv_stride + int64_t{task.n_heads + head} * task.head_dim;
        CountValues(&observation->k_histogram[head * kHistogramBins], k, task.head_dim);
        CountValues(&observation->v_histogram[head * kHistogramBins], k + heads * task.head_dim, task.head_dim);
      }
    }
    if (saturated > 0) kv.AddSaturated(layer, saturated);
  };
  const int64_t items = rows == 0 ? 0 : (rows + piece - 1) / piece * heads;
  if (rows <= 4) {
    for (int64_t item = 0; item < items; ++item) body(item, 0);
  } else {
    team_.For(items, body);
  }
  return absl::OkStatus();
}

void CpuBackend::BuildTiles(const AttentionTask& task, int32_t n_kv_heads) {
  tiles_.clear();
  tile_splits_.clear();
  const StepRows& rows = step_.rows();
  const int32_t tile_rows = std::max(1, kTileVectors / task.group);
  const int64_t state_floats = AttentionStateFloats(int64_t{tile_rows} * task.group, task.padded_dim);
  int64_t partial = 0;
  for (int32_t s = 0; s < rows.segment_count(); ++s) {
    for (int32_t row = rows.row_begin[s]; row < rows.row_begin[s + 1]; row += tile_rows) {
      RowTile tile{.row_begin = row, .row_count = std::min(tile_rows, rows.row_begin[s + 1] - row), .segment = s};
      const int32_t first = step_.position(row), last = first + tile.row_count - 1;
      tile.split_begin = task.sliding_window > 0 ? std::max(0, first - task.sliding_window + 1) / kSplitTokens : 0;
      tile.split_end = last / kSplitTokens + 1;
      tile.partial_begin = partial;
      partial += (tile.split_end - tile.split_begin) * n_kv_heads * state_floats;
      for (int32_t split = tile.split_begin; split < tile.split_end; ++split) {
        tile_splits_.push_back({static_cast<int32_t>(tiles_.size()), split});
      }
      tiles_.push_back(tile);
    }
  }
}

AttentionTile CpuBackend::TileOf(const RowTile& rows, const CpuKvPool& pool, int layer, int head) const {
  return {.row_begin = rows.row_begin,
          .row_count = rows.row_count,
          .first_position = step_.position(rows.row_begin),
          .block_table = step_.rows().block_table[rows.segment].data(),
          .blocks = reinterpret_cast<const char*>(pool.Head(layer, head)),
          .block_bytes = pool.block().bytes,
          .v_offset = pool.block().v_offset,
          .online_offset = pool.block().online_offset,
          .kv_head = head,
          .scales = pool.scales(layer, head)};
}

absl::Status CpuBackend::Attention(float* out, const float* qkv, const AttentionShape& shape, const KvPool& pool,
                                   int layer) {
  CheckAttention(shape, pool, layer);
  step_.CheckFits(pool);
  const auto& kv = static_cast<const CpuKvPool&>(pool);
  const int64_t width = int64_t{shape.n_heads_local} * shape.head_dim;
  const AttentionTask task{.out = out,
                           .qkv = qkv,
                           .out_stride = width,
                           .qkv_stride = width + 2 * int64_t{shape.n_kv_heads_local} * shape.head_dim,
                           .group = shape.n_heads_local / shape.n_kv_heads_local,
                           .head_dim = shape.head_dim,
                           .padded_dim = kv.block().padded_dim,
                           .score_scale = shape.score_scale,
                           .sliding_window = shape.sliding_window};
  BuildTiles(task, shape.n_kv_heads_local);
  const auto tiles = static_cast<int64_t>(tiles_.size());
  const bool is_by_split = tiles * shape.n_kv_heads_local < kTilesPerThread * team_.size() &&
                           static_cast<int64_t>(tile_splits_.size()) > tiles && team_.size() > 1;
  if (is_by_split) {
    AttendBySplit(task, kv, layer);
  } else {
    AttendByTile(task, kv, layer);
  }
  return absl::OkStatus();
}

AttendSplitFunction* CpuBackend::AttendSplitOf(KvFormat format) const {
  const int floats = std::size(isa_.attend_split), i = static_cast<int>(format);
  return i < floats ? isa_.attend_split[i] : integer_attention_.attend_split[i - floats];
}

void CpuBackend::AttendByTile(const AttentionTask& task, const CpuKvPool& pool, int layer) {
  const auto format = static_cast<int>(pool.shape().format);
  const auto attend_split = AttendSplitOf(pool.shape().format);
  const int64_t vectors = int64_t{std::max(1, kTileVectors / task.group)} * task.group;
  const int64_t state_floats = AttentionStateFloats(vectors, task.padded_dim);
  const int64_t thread_floats = 2 * state_floats + AttentionScratchFloats(vectors, task.padded_dim);
  float* scratch = attention_scratch_.Reserve(team_.size() * thread_floats);
  const int64_t heads = pool.shape().n_kv_heads_local;
  team_.For(static_cast<int64_t>(tiles_.size()) * heads, [&](int64_t item, int thread) {
    const RowTile& rows = tiles_[item / heads];
    const AttentionTile tile = TileOf(rows, pool, layer, static_cast<int>(item % heads));
    float* state = scratch + thread * thread_floats;
    float* split_state = state + state_floats;
    attend_split(task, tile, rows.split_begin, state, split_state + state_floats);
    for (int32_t split = rows.split_begin + 1; split < rows.split_end; ++split) {
      attend_split(task, tile, split, split_state, split_state + state_floats);
      isa_.merge_split(rows.row_count * task.group, task.padded_dim, state, split_state);
    }
    isa_.finish_attention[format](task, tile, state);
  });
}

void CpuBackend::AttendBySplit(const AttentionTask& task, const CpuKvPool& pool, int layer) {
  const auto format = static_cast<int>(pool.shape().format);
  const auto attend_split = AttendSplitOf(pool.shape().format);
  const int64_t vectors = int64_t{std::max(1, kTileVectors / task.group)} * task.group;
  const int64_t state_floats = AttentionStateFloats(vectors, task.padded_dim);
  const int64_t thread_floats = AttentionScratchFloats(vectors, task.padded_dim);
  const int64_t heads = pool.shape().n_kv_heads_local;
  float* scratch = attention_scratch_.Reserve(team_.size() * (2 * state_floats + thread_floats));
  float* partials = partials_.Reserve(static_cast<int64_t>(tile_splits_.size()) * heads * state_floats);
  const auto state_of = [&](const RowTile& rows, int32_t split, int64_t head) {
    return partials + rows.partial_begin + ((split - rows.split_begin) * heads + head) * state_floats;
  };
  // Splits that follow each other in memory follow each other in a thread.
  const int64_t splits = std::ssize(tile_splits_);
  team_.For(splits * heads, [&](int64_t item, int thread) {
    const TileSplit& part = tile_splits_[item % splits];
    const RowTile& rows = tiles_[part.tile];
    const auto head = static_cast<int>(item / splits);
    attend_split(task, TileOf(rows, pool, layer, head), part.split, state_of(rows, part.split, head),
                 scratch + thread * thread_floats);
  });
  team_.For(static_cast<int64_t>(tiles_.size()) * heads, [&](int64_t item, int) {
    const RowTile& rows = tiles_[item / heads];
    float* state = state_of(rows, rows.split_begin, item % heads);
    for (int32_t split = rows.split_begin + 1; split < rows.split_end; ++split) {
      isa_.merge_split(rows.row_count * task.group, task.padded_dim, state, state_of(rows, split, item % heads));
    }
    isa_.finish_attention[format](task, TileOf(rows, pool, layer, static_cast<int>(item % heads)), state);
  });
}

}  // namespace rankwise::kernels
