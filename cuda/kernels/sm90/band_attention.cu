// From a packed operation to the instance of the band's kernel that its head dimension and type take.
#include "band_attention.cuh"

namespace sage::cuda::sm90 {

namespace band {

extern template void launch_for<64, ptx::Half::kF16>(const Sage2Op&, cudaStream_t);
extern template void launch_for<64, ptx::Half::kBF16>(const Sage2Op&, cudaStream_t);
extern template void launch_for<128, ptx::Half::kF16>(const Sage2Op&, cudaStream_t);
extern template void launch_for<128, ptx::Half::kBF16>(const Sage2Op&, cudaStream_t);

}  // namespace band

void launch_band_attention(const Sage2Op& op, CUstream_st* stream) {
  const bool f16 = op.q.dtype == DType::kF16;
  if (op.plan.padded_head_dim == 64) {
    return f16 ? band::launch_for<64, ptx::Half::kF16>(op, stream) : band::launch_for<64, ptx::Half::kBF16>(op, stream);
  }
  f16 ? band::launch_for<128, ptx::Half::kF16>(op, stream) : band::launch_for<128, ptx::Half::kBF16>(op, stream);
}

}  // namespace sage::cuda::sm90
