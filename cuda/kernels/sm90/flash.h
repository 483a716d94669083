// Attention with 16-bit P.V on sm_90a: `flash` and `sage1`. plan_cuda.cpp decides when these run.
#pragma once

#include "../../ops.h"

struct CUstream_st;

namespace sage::cuda {
struct MaskTiles;
struct SageOp;
}  // namespace sage::cuda

namespace sage::cuda::sm90 {

// Queries and keys are fewer together, so that positions of both fit in 32 bits.
constexpr int64_t kMostF16Tokens = (int64_t{1} << 31) - 1024;

// What of a row is hidden: nothing, keys after its last, those before its first as well, and those that a mask hides.
enum class F16Mask { kNone, kCausal, kWindow, kMask };

inline F16Mask f16_mask(const Masking& masking) {
  return masking.mask                   ? F16Mask::kMask
         : masking.before != kUnlimited ? F16Mask::kWindow
         : masking.after != kUnlimited  ? F16Mask::kCausal
                                        : F16Mask::kNone;
}

// Rows and keys of a tile, as the sources of each head dimension choose them.
struct F16Tiles {
  int block_q, block_k;
};

// Below so many queries, blocks of few rows waste less on the diagonal.
constexpr int kFewRows = 2048;

// Blocks of many rows fit few patterns of masks, but where all rows see the same keys.
inline bool rows_share_mask(const Masking& masking) { return masking.mask && masking.mask.tokens() == 1; }

inline F16Tiles f16_tiles(int padded_head_dim, bool quantized, const Masking& masking, int64_t q_tokens) {
  const F16Mask mask = f16_mask(masking);
  if (padded_head_dim == 64 && !quantized && rows_share_mask(masking)) return {192, 128};
  if (mask == F16Mask::kWindow || mask == F16Mask::kMask)
    return padded_head_dim == 256 ? F16Tiles{128, 64} : F16Tiles{128, 128};
  const bool causal = mask == F16Mask::kCausal;
  if (padded_head_dim == 64)
    return !quantized && causal && q_tokens < kFewRows ? F16Tiles{128, 128} : F16Tiles{192, 128};
  if (padded_head_dim == 128) return !quantized && !causal && q_tokens >= 4096 ? F16Tiles{192, 80} : F16Tiles{128, 128};
  return quantized || (causal && q_tokens < 4096) ? F16Tiles{128, 64} : F16Tiles{128, 80};
}

void launch_flash(const AttentionOp& op, const MaskTiles& tiles, CUstream_st* stream);
void launch_sage1(const SageOp& op, CUstream_st* stream);

}  // namespace sage::cuda::sm90
