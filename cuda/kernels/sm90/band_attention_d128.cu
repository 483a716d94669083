// sage2 with the precision band for head dimensions up to 128.
#include "band_attention.cuh"

namespace sage::cuda::sm90 {

void launch_band_d128(const Sage2Op& op, CUstream_st* stream) { band::launch_for<128>(op, stream); }

}  // namespace sage::cuda::sm90
