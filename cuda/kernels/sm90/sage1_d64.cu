// `sage1` on sm_90a for head dimensions up to 64.
#include "flash_launch.h"

namespace sage::cuda::sm90 {

template <>
void launch_sage1_for<64>(const F16Params& params, const Operands& operands, bool causal, cudaStream_t stream) {
  constexpr auto kS8 = ptx::Operand::kS8;
  if (causal) return launch_f16<F16Config<64, kS8, true, 128, 3, 4, 1, false>>(params, operands, stream);
  launch_f16<F16Config<64, kS8, false, 128, 3, 4, 1, false>>(params, operands, stream);
}

}  // namespace sage::cuda::sm90
