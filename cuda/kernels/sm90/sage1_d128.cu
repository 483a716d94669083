// `sage1` on sm_90a for head dimensions up to 128.
#include "flash_launch.h"

namespace sage::cuda::sm90 {

template <>
void launch_sage1_for<128>(const F16Params& params, const Operands& operands, F16Mask mask, cudaStream_t stream) {
  constexpr auto kS8 = ptx::Operand::kS8;
  if (mask == F16Mask::kWindow) {
    return launch_f16<F16Config<128, kS8, F16Mask::kWindow, 128, 2, 4, 1, false>>(params, operands, stream);
  }
  if (mask == F16Mask::kMask) {
    return launch_f16<F16Config<128, kS8, F16Mask::kMask, 128, 2, 4, 1, false>>(params, operands, stream);
  }
  const bool pairs = pairs_pay(params, 128, mask, 8192);
  if (mask == F16Mask::kCausal) {
    if (pairs)
      return launch_f16<F16Config<128, kS8, F16Mask::kCausal, 128, 2, 4, 1, false, 2>>(params, operands, stream);
    return launch_f16<F16Config<128, kS8, F16Mask::kCausal, 128, 2, 4, 1, false>>(params, operands, stream);
  }
  if (pairs) return launch_f16<F16Config<128, kS8, F16Mask::kNone, 128, 2, 4, 1, false, 2>>(params, operands, stream);
  launch_f16<F16Config<128, kS8, F16Mask::kNone, 128, 2, 4, 1, false>>(params, operands, stream);
}

}  // namespace sage::cuda::sm90
