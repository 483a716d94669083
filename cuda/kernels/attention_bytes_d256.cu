// The sm_80 attention kernel that multiplies bytes only, for head dimensions up to 256.
#include "attention_sm80.cuh"

namespace sage::cuda {

template void launch_sage_int8_for<256>(const AttentionParams&, int64_t, cudaStream_t);

}  // namespace sage::cuda
