// `flash` on sm_90a for head dimensions up to 256.
#include "flash_launch.h"

namespace sage::cuda::sm90 {

namespace {

template <ptx::Operand kType>
void launch(const F16Params& params, const Operands& operands, F16Mask mask, cudaStream_t stream) {
  if (mask == F16Mask::kWindow) {
    return launch_f16<F16Config<256, kType, F16Mask::kWindow, 64, 2, 2, 1, false>>(params, operands, stream);
  }
  if (mask == F16Mask::kMask) {
    return launch_f16<F16Config<256, kType, F16Mask::kMask, 64, 2, 2, 1, false>>(params, operands, stream);
  }
  const bool pairs = pairs_pay(params, 128, mask, 4096);
  if (mask == F16Mask::kCausal) {
    if (pairs)
      return launch_f16<F16Config<256, kType, F16Mask::kCausal, 80, 2, 2, 1, false, 2>>(params, operands, stream);
    return launch_f16<F16Config<256, kType, F16Mask::kCausal, 64, 2, 2, 1, false>>(params, operands, stream);
  }
  if (pairs) return launch_f16<F16Config<256, kType, F16Mask::kNone, 80, 2, 2, 1, false, 2>>(params, operands, stream);
  launch_f16<F16Config<256, kType, F16Mask::kNone, 80, 2, 2, 1, false>>(params, operands, stream);
}

}  // namespace

template <>
void launch_flash_for<256>(const F16Params& params, const Operands& operands, F16Mask mask, cudaStream_t stream) {
  if (operands.q.dtype == DType::kF16) return launch<ptx::Operand::kF16>(params, operands, mask, stream);
  launch<ptx::Operand::kBF16>(params, operands, mask, stream);
}

}  // namespace sage::cuda::sm90
