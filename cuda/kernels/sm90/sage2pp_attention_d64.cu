// sage2++ on sm_90a: the instances of head dimension 64.
#include "sage2_launch.cuh"

namespace sage::cuda::sm90 {

void launch_sage2pp_d64(const Sage2Op& op, const sage2::Sage2Params& params, cudaStream_t stream) {
  sage2::launch_half_sums<64>(op, params, stream);
}

}  // namespace sage::cuda::sm90
