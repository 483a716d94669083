// sage2 with the precision band for head dimensions up to 64, bf16 tensors.
#include "band_attention.cuh"

namespace sage::cuda::sm90::band {

template <>
void launch_for<64, ptx::Half::kBF16>(const Sage2Op& op, cudaStream_t stream) {
  if (op.plan.fast_exponential) return launch<BandConfig<64, true, ptx::Half::kBF16>>(op, stream);
  launch<BandConfig<64, false, ptx::Half::kBF16>>(op, stream);
}

}  // namespace sage::cuda::sm90::band
