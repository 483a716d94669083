// Tile shapes of the sm_80 attention kernels, by measurement on an H200; shared with the planner (host-only).
#pragma once

namespace sage::cuda {

struct AttentionTuning {
  int row_tiles;        // 16-row tiles a warp: two halve shared-memory traffic, one halves registers
  int min_blocks;       // resident blocks per multiprocessor that registers must allow
  int stages;           // 2: a tile of K and V is on its way while another is used
  bool q_in_registers;  // else its fragments are read again for every tile
  int warps = 4;
  int block_k = 64;

  constexpr int block_q() const { return 16 * row_tiles * warps; }
};

constexpr int padded_head_dim(int head_dim) { return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256; }

// Blocks of few rows waste less on the diagonal and fill the device sooner; those of many read K and V less often.
// Column terms leave no registers for many.
constexpr bool few_rows_pay(bool column_terms, long long k_tokens) { return column_terms || k_tokens <= 8192; }

constexpr AttentionTuning attention_tuning(int padded_head_dim, bool quantized, bool f16_accumulator, bool few_rows) {
  if (padded_head_dim > 128) return {1, 2, 1, false};
  if (padded_head_dim > 64) {
    if (!quantized) return {2, 2, 1, false};
    return f16_accumulator || few_rows ? AttentionTuning{1, 3, 2, false} : AttentionTuning{2, 2, 2, false};
  }
  return quantized ? AttentionTuning{1, 4, 2, false} : AttentionTuning{2, 2, 2, true};
}

}  // namespace sage::cuda
