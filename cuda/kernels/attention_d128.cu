// The sm_80 attention kernels for head dimensions up to 128.
#include "attention_sm80.cuh"

namespace sage::cuda {

template void launch_flash_for<128, false>(const AttentionParams&, DType, int64_t, cudaStream_t);
template void launch_sage_for<128, false>(const AttentionParams&, bool, bool, int64_t, cudaStream_t);

}  // namespace sage::cuda
