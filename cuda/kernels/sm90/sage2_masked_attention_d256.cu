// sage2 with a bool mask on sm_90a: the instances of head dimension 256.
#include "sage2_launch.cuh"

namespace sage::cuda::sm90 {

void launch_sage2_masked_d256(const Sage2Op& op, const sage2::Sage2Params& params, cudaStream_t stream) {
  sage2::launch_masked<256>(op, params, stream);
}

}  // namespace sage::cuda::sm90
