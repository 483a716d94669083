// sage2++ on sm_90a.
#include "sage2_launch.cuh"

namespace sage::cuda::sm90 {

void launch_sage2pp_d64(const Sage2Op& op, const sage2::Sage2Params& params, cudaStream_t stream) {
  sage2::launch_half_sums<64>(op, params, stream);
}

void launch_sage2pp_d128(const Sage2Op& op, const sage2::Sage2Params& params, cudaStream_t stream) {
  sage2::launch_half_sums<128>(op, params, stream);
}

void launch_sage2pp_d256(const Sage2Op& op, const sage2::Sage2Params& params, cudaStream_t stream) {
  sage2::launch_half_sums<256>(op, params, stream);
}

}  // namespace sage::cuda::sm90
