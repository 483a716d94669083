// `flash` on sm_90a for head dimensions up to 64.
#include "flash.h"
#include "flash_launch.h"

namespace sage::cuda::sm90 {

namespace {

template <ptx::Operand kType>
void launch(const F16Params& params, const Operands& operands, F16Mask mask, cudaStream_t stream) {
  if (mask == F16Mask::kWindow) {
    return launch_f16<F16Config<64, kType, F16Mask::kWindow, 128, 2, 4, 2, true>>(params, operands, stream);
  }
  if (mask == F16Mask::kMask) {
    if (params.mask.rows == 1)
      return launch_f16<F16Config<64, kType, F16Mask::kMask, 128, 3, 4, 2, true>>(params, operands, stream);
    return launch_f16<F16Config<64, kType, F16Mask::kMask, 128, 2, 4, 2, false>>(params, operands, stream);
  }
  const bool causal = mask == F16Mask::kCausal;
  if (causal && params.q_tokens < kFewRows) {
    return launch_f16<F16Config<64, kType, F16Mask::kCausal, 128, 2, 4, 2, true>>(params, operands, stream);
  }
  if (causal) return launch_f16<F16Config<64, kType, F16Mask::kCausal, 128, 3, 4, 1, true>>(params, operands, stream);
  launch_f16<F16Config<64, kType, F16Mask::kNone, 128, 3, 4, 2, true>>(params, operands, stream);
}

}  // namespace

template <>
void launch_flash_for<64>(const F16Params& params, const Operands& operands, F16Mask mask, cudaStream_t stream) {
  if (operands.q.dtype == DType::kF16) return launch<ptx::Operand::kF16>(params, operands, mask, stream);
  launch<ptx::Operand::kBF16>(params, operands, mask, stream);
}

}  // namespace sage::cuda::sm90
