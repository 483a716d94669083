// sage2 with the precision band for head dimensions up to 64, f16 tensors.
#include "band_attention.cuh"

namespace sage::cuda::sm90::band {

template <>
void launch_for<64, ptx::Half::kF16>(const Sage2Op& op, cudaStream_t stream) {
  if (op.plan.fast_exponential) return launch<BandConfig<64, true, ptx::Half::kF16>>(op, stream);
  launch<BandConfig<64, false, ptx::Half::kF16>>(op, stream);
}

}  // namespace sage::cuda::sm90::band
