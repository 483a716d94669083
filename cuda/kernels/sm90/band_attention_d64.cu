// sage2 with the precision band for head dimensions up to 64.
#include "band_attention.cuh"

namespace sage::cuda::sm90 {

void launch_band_d64(const Sage2Op& op, CUstream_st* stream) { band::launch_for<64>(op, stream); }

}  // namespace sage::cuda::sm90
