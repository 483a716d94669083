// `sage1` on sm_90a for head dimensions up to 64.
#include "flash_launch.h"

namespace sage::cuda::sm90 {

template <>
void launch_sage1_for<64>(const F16Params& params, const Operands& operands, F16Mask mask, cudaStream_t stream) {
  constexpr auto kS8 = ptx::Operand::kS8;
  if (mask == F16Mask::kWindow) {
    return launch_f16<F16Config<64, kS8, F16Mask::kWindow, 128, 2, 4, 2, true>>(params, operands, stream);
  }
  if (mask == F16Mask::kMask) {
    return launch_f16<F16Config<64, kS8, F16Mask::kMask, 128, 2, 4, 2, true>>(params, operands, stream);
  }
  if (mask == F16Mask::kCausal)
    return launch_f16<F16Config<64, kS8, F16Mask::kCausal, 128, 3, 4, 1, true>>(params, operands, stream);
  launch_f16<F16Config<64, kS8, F16Mask::kNone, 128, 3, 4, 1, false>>(params, operands, stream);
}

}  // namespace sage::cuda::sm90
