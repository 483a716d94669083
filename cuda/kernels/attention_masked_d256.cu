// The sm_80 attention kernels where scores are masked or changed, for head dimensions up to 256.
#include "attention_sm80.cuh"

namespace sage::cuda {

template void launch_flash_for<256, true>(const AttentionParams&, DType, int64_t, cudaStream_t);
template void launch_sage_for<256, true>(const AttentionParams&, bool, bool, int64_t, cudaStream_t);

}  // namespace sage::cuda
