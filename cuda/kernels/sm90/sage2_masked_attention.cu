// sage2 with a bool mask on sm_90a.
#include "sage2_launch.cuh"

namespace sage::cuda::sm90 {

void launch_sage2_masked_d64(const Sage2Op& op, const sage2::Sage2Params& params, cudaStream_t stream) {
  sage2::launch_masked<64>(op, params, stream);
}

void launch_sage2_masked_d128(const Sage2Op& op, const sage2::Sage2Params& params, cudaStream_t stream) {
  sage2::launch_masked<128>(op, params, stream);
}

void launch_sage2_masked_d256(const Sage2Op& op, const sage2::Sage2Params& params, cudaStream_t stream) {
  sage2::launch_masked<256>(op, params, stream);
}

}  // namespace sage::cuda::sm90
