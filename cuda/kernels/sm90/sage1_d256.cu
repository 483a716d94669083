// `sage1` on sm_90a for head dimensions up to 256.
#include "flash_launch.h"

namespace sage::cuda::sm90 {

template <>
void launch_sage1_for<256>(const F16Params& params, const Operands& operands, F16Mask mask, cudaStream_t stream) {
  constexpr auto kS8 = ptx::Operand::kS8;
  if (mask == F16Mask::kWindow) {
    return launch_f16<F16Config<256, kS8, F16Mask::kWindow, 64, 2, 4, 1, false>>(params, operands, stream);
  }
  if (mask == F16Mask::kMask) {
    return launch_f16<F16Config<256, kS8, F16Mask::kMask, 64, 2, 4, 1, false>>(params, operands, stream);
  }
  if (mask == F16Mask::kCausal) {
    if (pairs_pay(params, 128, mask, 8192)) {
      return launch_f16<F16Config<256, kS8, F16Mask::kCausal, 64, 2, 4, 1, false, 2>>(params, operands, stream);
    }
    return launch_f16<F16Config<256, kS8, F16Mask::kCausal, 64, 2, 4, 1, false>>(params, operands, stream);
  }
  launch_f16<F16Config<256, kS8, F16Mask::kNone, 64, 2, 4, 1, false>>(params, operands, stream);
}

}  // namespace sage::cuda::sm90
