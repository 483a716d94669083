// Tile shapes of the sm_80 attention kernels, by measurement on an H200; shared with the planner (host-only).
#pragma once

#include "../ops.h"

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

// Whether some keys have means of their own.
inline bool has_tile_means(const Plan& plan, int64_t k_tokens) { return plan.smooth_k && plan.k_mean_rows < k_tokens; }

// Whether a call takes the instances that have what goes beyond the papers; rotation is for all.
inline bool is_beyond(const Plan& plan, int64_t k_tokens) {
  return plan.kernel == Kernel::kSageInt8 || plan.band || plan.first_token || has_tile_means(plan, k_tokens);
}

// Whether a call needs the kernels that mask or change scores; windows of any kind are for all.
inline bool is_general(const Masking& masking) {
  return masking.mask || masking.sinks || masking.alibi || masking.softcap > 0;
}

// Whether masking hides keys and does nothing else: a mask, if there is one, is bool, and scores stay what they are.
inline bool hides_alone(const Masking& masking) {
  return !masking.sinks && !masking.alibi && masking.softcap <= 0 &&
         (!masking.mask || masking.mask.dtype == DType::kBool);
}

// Whether scores need more than one factor a row and tile of keys, or P is codes.
inline bool has_column_terms(const Plan& plan, bool delta, int64_t k_tokens) {
  if (is_beyond(plan, k_tokens)) return true;
  constexpr int kBlockKeys = 64;
  const bool whole_tiles = plan.k_grouping != Grouping::kToken && plan.k_group_rows == kBlockKeys;
  return plan.kernel != Kernel::kFlash && (plan.kernel != Kernel::kSage1 || delta || !whole_tiles);
}

constexpr int padded_head_dim(int head_dim) { return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256; }

// Blocks of few rows waste less on the diagonal and fill the device sooner; those of many read K and V less often.
// Column terms and masks ("crowded") leave no registers for many.
constexpr bool few_rows_pay(bool crowded, bool diagonal, long long k_tokens) {
  return crowded || k_tokens <= (diagonal ? 2048 : 1024);
}

constexpr AttentionTuning attention_tuning(int padded_head_dim, bool quantized, bool f16_accumulator, bool few_rows,
                                           bool crowded) {
  if (padded_head_dim > 128) return {1, 2, 1, false};
  if (padded_head_dim > 64) {
    if (!quantized) return {2, 2, 1, false};
    return f16_accumulator || few_rows ? AttentionTuning{1, 3, 2, false} : AttentionTuning{2, 2, 2, false};
  }
  if (quantized) return {1, crowded ? 3 : 4, 2, false};
  return {2, 2, 2, true};
}

// What the portable kernels choose for a call.
inline AttentionTuning attention_tuning(const Plan& plan, const Masking& masking, bool column_terms,
                                        long long k_tokens) {
  const bool quantized = plan.kernel != Kernel::kFlash;
  const bool crowded = is_general(masking) || column_terms;  // as whatever is beyond the papers is
  const bool diagonal = masking.after != kUnlimited && masking.after < k_tokens;
  const bool few_rows = few_rows_pay(crowded, diagonal, k_tokens);
  return attention_tuning(plan.padded_head_dim, quantized, plan.f16_accumulator, few_rows, crowded);
}

}  // namespace sage::cuda
