// Which instance of the sage2 kernel an operation takes: those of a head dimension are in a file of their own.
#pragma once

#include "sage2_attention.cuh"

namespace sage::cuda::sm90 {
namespace sage2 {

template <class C>
void launch(const Sage2Params& params, cudaStream_t stream) {
  launch_items(sage2_kernel<C>, C::kSharedBytes, params.items, stream, params);
}

template <int kHeadDim, bool kSmooth>
void launch_exact(const Sage2Op& op, const Sage2Params& params, cudaStream_t stream) {
  if (op.lse) return launch<Sage2Config<kHeadDim, false, kSmooth, true>>(params, stream);
  launch<Sage2Config<kHeadDim, false, kSmooth, false>>(params, stream);
}

template <int kHeadDim>
void launch_for(const Sage2Op& op, const Sage2Params& params, cudaStream_t stream) {
  if (op.plan.fast_exponential) {
    if constexpr (kHeadDim < 256) {
      if (op.plan.smooth_q) return launch<Sage2Config<kHeadDim, true, true>>(params, stream);
    }
    return launch<Sage2Config<kHeadDim, true>>(params, stream);
  }
  op.plan.smooth_q ? launch_exact<kHeadDim, true>(op, params, stream)
                   : launch_exact<kHeadDim, false>(op, params, stream);
}

template <int kHeadDim>
void launch_half_sums(const Sage2Op& op, const Sage2Params& params, cudaStream_t stream) {
  if (op.lse) return launch<Sage2Config<kHeadDim, false, false, true, false, true>>(params, stream);
  launch<Sage2Config<kHeadDim, false, false, false, false, true>>(params, stream);
}

// The sums of exact exponentials cost little: one instance serves calls with a log-sum-exp and without.
template <int kHeadDim>
void launch_masked(const Sage2Op& op, const Sage2Params& params, cudaStream_t stream) {
  if (op.plan.fast_exponential) {
    return launch<Sage2Config<kHeadDim, true, false, false, false, false, true>>(params, stream);
  }
  launch<Sage2Config<kHeadDim, false, false, true, false, false, true>>(params, stream);
}

}  // namespace sage2

void launch_sage2_d64(const Sage2Op& op, const sage2::Sage2Params& params, cudaStream_t stream);
void launch_sage2_d128(const Sage2Op& op, const sage2::Sage2Params& params, cudaStream_t stream);
void launch_sage2_d256(const Sage2Op& op, const sage2::Sage2Params& params, cudaStream_t stream);
void launch_sage2_masked_d64(const Sage2Op& op, const sage2::Sage2Params& params, cudaStream_t stream);
void launch_sage2_masked_d128(const Sage2Op& op, const sage2::Sage2Params& params, cudaStream_t stream);
void launch_sage2_masked_d256(const Sage2Op& op, const sage2::Sage2Params& params, cudaStream_t stream);
void launch_sage2pp_d64(const Sage2Op& op, const sage2::Sage2Params& params, cudaStream_t stream);
void launch_sage2pp_d128(const Sage2Op& op, const sage2::Sage2Params& params, cudaStream_t stream);
void launch_sage2pp_d256(const Sage2Op& op, const sage2::Sage2Params& params, cudaStream_t stream);

}  // namespace sage::cuda::sm90
