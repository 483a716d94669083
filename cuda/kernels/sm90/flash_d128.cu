// `flash` on sm_90a for head dimensions up to 128.
#include "flash_launch.h"

namespace sage::cuda::sm90 {

namespace {

template <ptx::Operand kType>
void launch(const F16Params& params, const Operands& operands, F16Mask mask, cudaStream_t stream) {
  if (mask == F16Mask::kWindow) {
    return launch_f16<F16Config<128, kType, F16Mask::kWindow, 128, 2, 3, 1, false>>(params, operands, stream);
  }
  if (mask == F16Mask::kMask) {
    return launch_f16<F16Config<128, kType, F16Mask::kMask, 128, 2, 3, 1, true>>(params, operands, stream);
  }
  const bool pairs = pairs_pay(params, 128, mask, 8192);
  if (mask == F16Mask::kCausal) {
    if (pairs)
      return launch_f16<F16Config<128, kType, F16Mask::kCausal, 128, 2, 3, 1, false, 2>>(params, operands, stream);
    return launch_f16<F16Config<128, kType, F16Mask::kCausal, 128, 2, 3, 1, false>>(params, operands, stream);
  }
  // Blocks of 192 rows read K and V less often.
  if (params.q_tokens >= 4096)
    return launch_f16<F16Config<128, kType, F16Mask::kNone, 80, 3, 4, 1, false, 2>>(params, operands, stream);
  if (pairs) return launch_f16<F16Config<128, kType, F16Mask::kNone, 128, 2, 3, 1, false, 2>>(params, operands, stream);
  launch_f16<F16Config<128, kType, F16Mask::kNone, 128, 2, 3, 1, false>>(params, operands, stream);
}

}  // namespace

template <>
void launch_flash_for<128>(const F16Params& params, const Operands& operands, F16Mask mask, cudaStream_t stream) {
  if (operands.q.dtype == DType::kF16) return launch<ptx::Operand::kF16>(params, operands, mask, stream);
  launch<ptx::Operand::kBF16>(params, operands, mask, stream);
}

}  // namespace sage::cuda::sm90
