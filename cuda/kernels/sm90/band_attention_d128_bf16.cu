// sage2 with the precision band for head dimensions up to 128, bf16 tensors.
#include "band_attention.cuh"

namespace sage::cuda::sm90::band {

template <>
void launch_for<128, ptx::Half::kBF16>(const Sage2Op& op, cudaStream_t stream) {
  if (op.plan.fast_exponential) return launch<BandConfig<128, true, ptx::Half::kBF16>>(op, stream);
  launch<BandConfig<128, false, ptx::Half::kBF16>>(op, stream);
}

}  // namespace sage::cuda::sm90::band
