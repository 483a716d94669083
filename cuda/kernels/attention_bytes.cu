// The sm_80 attention kernels that multiply bytes only.
#include "attention_sm80.cuh"

namespace sage::cuda {

template void launch_sage_int8_for<64>(const AttentionParams&, int64_t, cudaStream_t);
template void launch_sage_int8_for<128>(const AttentionParams&, int64_t, cudaStream_t);
template void launch_sage_int8_for<256>(const AttentionParams&, int64_t, cudaStream_t);

}  // namespace sage::cuda
