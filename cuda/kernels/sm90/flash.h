// Attention with 16-bit P.V on sm_90a: `flash` and `sage1`. Where can_run says no, the portable kernels run.
#pragma once

#include "../../ops.h"

struct CUstream_st;

namespace sage::cuda {
struct SageOp;
}

namespace sage::cuda::sm90 {

// Rows and keys of a tile, as the sources of each head dimension choose them.
struct F16Tiles {
  int block_q, block_k;
};

// Below so many queries, blocks of few rows waste less on the diagonal.
constexpr int kFewRows = 2048;

constexpr F16Tiles f16_tiles(int padded_head_dim, bool quantized, bool causal, int64_t q_tokens) {
  if (padded_head_dim == 64)
    return !quantized && causal && q_tokens < kFewRows ? F16Tiles{128, 128} : F16Tiles{192, 128};
  if (padded_head_dim == 128) return !quantized && !causal && q_tokens >= 4096 ? F16Tiles{192, 80} : F16Tiles{128, 128};
  return quantized || (causal && q_tokens < 4096) ? F16Tiles{128, 64} : F16Tiles{128, 80};
}

// Whether the tensors' strides and the plan suit these kernels; host-only and pure.
bool can_run_flash(const AttentionOp& op);
bool can_run_sage1(const SageOp& op);

void launch_flash(const AttentionOp& op, CUstream_st* stream);
void launch_sage1(const SageOp& op, CUstream_st* stream);

}  // namespace sage::cuda::sm90
