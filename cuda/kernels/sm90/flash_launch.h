// Launchers of the sm_90a kernels with 16-bit P.V: one head dimension a source file, so that they compile side by side.
#pragma once

#include "attention_f16.cuh"

namespace sage::cuda::sm90 {

template <int kHeadDim>
void launch_flash_for(const F16Params& params, const Operands& operands, F16Mask mask, cudaStream_t stream);
template <int kHeadDim>
void launch_sage1_for(const F16Params& params, const Operands& operands, F16Mask mask, cudaStream_t stream);

// Pairs of blocks share K and V, which saves power, but waste time where the number of blocks is odd, and where a
// causal mask gives them different work; `least_tokens` is where that begins to pay.
inline bool pairs_pay(const F16Params& params, int block_m, F16Mask mask, int least_tokens) {
  const int blocks = (params.q_tokens + block_m - 1) / block_m;
  if (mask == F16Mask::kCausal) return params.q_tokens >= least_tokens && params.k_tokens >= least_tokens;
  return blocks % 2 == 0 || blocks >= 32;
}

}  // namespace sage::cuda::sm90
