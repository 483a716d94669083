// The sm_80 attention kernels whose codes have tensor cores of their own, where scores are masked or changed, for head
// dimensions up to 256.
#include "attention_sm80.cuh"

namespace sage::cuda {

template void launch_codes_for<256, true>(const AttentionParams&, bool, bool, bool, int64_t, cudaStream_t);

}  // namespace sage::cuda
