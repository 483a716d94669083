// Attention of few queries, as in decoding: when it runs, and how its keys are split. Host-only: plans use it too.
#pragma once

#include <algorithm>

#include "../ops.h"

namespace sage::cuda {

// Queries of all heads that share a KV head are rows of one tile.
constexpr int kDecodeRows = 16, kDecodeKeys = 64, kMostSplits = 512;

inline int64_t decode_row_blocks(const AttentionShape& shape) {
  const int64_t rows = shape.q_heads / shape.kv_heads * shape.q_tokens;
  return (rows + kDecodeRows - 1) / kDecodeRows;
}

// Whether `flash` reads K and V once for all queries of a KV head: few rows, each of which sees every key.
inline bool decodes(const AttentionShape& shape) {
  return shape.dtype != DType::kF32 && shape.boxes && (!shape.causal || shape.q_tokens == 1) &&
         decode_row_blocks(shape) <= 4;
}

// Parts of the keys that blocks of their own take, so that every multiprocessor has two of them; whole tiles each.
inline int decode_splits(const AttentionShape& shape, int multiprocessors) {
  constexpr int64_t kLeastKeys = 4 * kDecodeKeys;
  const int64_t blocks = shape.batch * shape.kv_heads * decode_row_blocks(shape);
  const int64_t wanted = std::clamp<int64_t>(2 * int64_t{multiprocessors} / blocks, 1, kMostSplits);
  const int64_t most = std::max<int64_t>(shape.k_tokens / kLeastKeys, 1);
  const int64_t tiles = (shape.k_tokens + kDecodeKeys - 1) / kDecodeKeys;
  const int64_t tiles_each = (tiles + std::min(wanted, most) - 1) / std::min(wanted, most);
  return static_cast<int>((tiles + tiles_each - 1) / tiles_each);
}

// Channels of a part: whole quads.
inline int64_t decode_part_dim(int64_t v_dim) { return (v_dim + 3) / 4 * 4; }

// f32 a split, row and channel, and the log-sum-exp of a split and row; none where keys are not split.
inline size_t decode_workspace_bytes(const AttentionShape& shape, int splits) {
  if (splits == 1) return 0;
  const int64_t rows = shape.batch * shape.kv_heads * decode_row_blocks(shape) * kDecodeRows;
  return static_cast<size_t>(rows * splits * (decode_part_dim(shape.v_dim) + 1)) * sizeof(float);
}

}  // namespace sage::cuda
