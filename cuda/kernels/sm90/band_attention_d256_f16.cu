// sage2 with the precision band for head dimensions up to 256, f16 tensors.
#include "band_attention.cuh"

namespace sage::cuda::sm90::band {

template <>
void launch_for<256, ptx::Half::kF16>(const Sage2Op& op, cudaStream_t stream) {
  if (op.plan.fast_exponential) return launch<BandConfig<256, true, ptx::Half::kF16>>(op, stream);
  launch<BandConfig<256, false, ptx::Half::kF16>>(op, stream);
}

}  // namespace sage::cuda::sm90::band
