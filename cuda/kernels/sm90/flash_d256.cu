// `flash` on sm_90a for head dimensions up to 256.
#include "flash_launch.h"

namespace sage::cuda::sm90 {

namespace {

template <ptx::Operand kType>
void launch(const F16Params& params, const Operands& operands, bool causal, cudaStream_t stream) {
  const bool pairs = pairs_pay(params, 128, causal, 4096);
  if (causal) {
    if (pairs) return launch_f16<F16Config<256, kType, true, 80, 2, 2, 1, false, 2>>(params, operands, stream);
    return launch_f16<F16Config<256, kType, true, 64, 2, 2, 1, false>>(params, operands, stream);
  }
  if (pairs) return launch_f16<F16Config<256, kType, false, 80, 2, 2, 1, false, 2>>(params, operands, stream);
  launch_f16<F16Config<256, kType, false, 80, 2, 2, 1, false>>(params, operands, stream);
}

}  // namespace

template <>
void launch_flash_for<256>(const F16Params& params, const Operands& operands, bool causal, cudaStream_t stream) {
  if (operands.q.dtype == DType::kF16) return launch<ptx::Operand::kF16>(params, operands, causal, stream);
  launch<ptx::Operand::kBF16>(params, operands, causal, stream);
}

}  // namespace sage::cuda::sm90
