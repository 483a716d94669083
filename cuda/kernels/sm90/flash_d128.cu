// `flash` on sm_90a for head dimensions up to 128.
#include "flash_launch.h"

namespace sage::cuda::sm90 {

namespace {

template <ptx::Operand kType>
void launch(const F16Params& params, const Operands& operands, bool causal, cudaStream_t stream) {
  const bool pairs = pairs_pay(params, 128, causal, 8192);
  if (causal) {
    if (pairs) return launch_f16<F16Config<128, kType, true, 128, 2, 3, 1, false, 2>>(params, operands, stream);
    return launch_f16<F16Config<128, kType, true, 128, 2, 3, 1, false>>(params, operands, stream);
  }
  // Blocks of 192 rows read K and V less often.
  if (params.q_tokens >= 4096)
    return launch_f16<F16Config<128, kType, false, 80, 3, 4, 1, false, 2>>(params, operands, stream);
  if (pairs) return launch_f16<F16Config<128, kType, false, 128, 2, 3, 1, false, 2>>(params, operands, stream);
  launch_f16<F16Config<128, kType, false, 128, 2, 3, 1, false>>(params, operands, stream);
}

}  // namespace

template <>
void launch_flash_for<128>(const F16Params& params, const Operands& operands, bool causal, cudaStream_t stream) {
  if (operands.q.dtype == DType::kF16) return launch<ptx::Operand::kF16>(params, operands, causal, stream);
  launch<ptx::Operand::kBF16>(params, operands, causal, stream);
}

}  // namespace sage::cuda::sm90
