// From a packed operation to the instance of the band's kernel that its head dimension and type take.
#include "band_attention.cuh"

namespace sage::cuda::sm90 {

namespace band {

extern template void launch_for<64, ptx::Half::kF16>(const Sage2Op&, cudaStream_t);
extern template void launch_for<64, ptx::Half::kBF16>(const Sage2Op&, cudaStream_t);
extern template void launch_for<128, ptx::Half::kF16>(const Sage2Op&, cudaStream_t);
extern template void launch_for<128, ptx::Half::kBF16>(const Sage2Op&, cudaStream_t);
extern template void launch_for<256, ptx::Half::kF16>(const Sage2Op&, cudaStream_t);
extern template void launch_for<256, ptx::Half::kBF16>(const Sage2Op&, cudaStream_t);

template <int kHeadDim>
void launch_padded(const Sage2Op& op, cudaStream_t stream) {
  if (op.q.dtype == DType::kF16) return launch_for<kHeadDim, ptx::Half::kF16>(op, stream);
  launch_for<kHeadDim, ptx::Half::kBF16>(op, stream);
}

}  // namespace band

void launch_band_attention(const Sage2Op& op, CUstream_st* stream) {
  switch (op.plan.padded_head_dim) {
    case 64: return band::launch_padded<64>(op, stream);
    case 128: return band::launch_padded<128>(op, stream);
    default: return band::launch_padded<256>(op, stream);
  }
}

}  // namespace sage::cuda::sm90
