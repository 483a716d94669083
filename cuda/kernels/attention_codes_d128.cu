// The sm_80 attention kernels whose codes have tensor cores of their own, for head dimensions up to 128.
#include "attention_sm80.cuh"

namespace sage::cuda {

template void launch_codes_for<128, false>(const AttentionParams&, bool, bool, bool, int64_t, cudaStream_t);
template void launch_codes_for<128, true>(const AttentionParams&, bool, bool, bool, int64_t, cudaStream_t);

}  // namespace sage::cuda
