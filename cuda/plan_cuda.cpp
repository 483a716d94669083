// Plans for CUDA devices: what the portable kernels (sm_80 and later) can run, their tiles and workspace.
#include <algorithm>

#include "kernels/tuning.h"
#include "kernels/workspace.h"
#include "plan.h"

namespace sage {

namespace {

void set_cuda_tiles(const AttentionShape& shape, Plan& plan) {
  if (plan.kernel != Kernel::kFlash && plan.kernel != Kernel::kSage1) {
    SAGE_FAIL(SAGE_UNSUPPORTED, std::string("Cannot run attention as options.kernel must be flash or sage1 on a CUDA "
                                            "device, or the device must be the CPU: current value is ") +
                                    kernel_name(plan.kernel) + ".");
  }
  constexpr int64_t kMostTokens = (int64_t{1} << 31) - 1024;
  if (std::max(shape.q_tokens, shape.k_tokens) > kMostTokens) {
    SAGE_FAIL(SAGE_UNSUPPORTED, "Cannot run attention as q and k must have at most " + std::to_string(kMostTokens) +
                                    " tokens on a CUDA device: current value is " +
                                    std::to_string(std::max(shape.q_tokens, shape.k_tokens)) + ".");
  }
  plan.architecture = 80;
  plan.implementation = "sm_80 mma";
  plan.padded_head_dim = cuda::padded_head_dim(static_cast<int>(std::max(shape.head_dim, shape.v_dim)));
  const cuda::AttentionTuning tuning = cuda::attention_tuning(plan.padded_head_dim, plan.kernel != Kernel::kFlash,
                                                              plan.f16_accumulator, cuda::few_rows_pay(shape.k_tokens));
  plan.block_q = tuning.block_q();
  plan.block_k = tuning.block_k;
}

}  // namespace

// By measurement on an H200, end to end (bench/results/): quantizing pays where the products are long.
Kernel cuda_auto_kernel(const AttentionShape& shape, const DeviceTraits&, std::string& reason) {
  const int64_t dim = std::max(shape.head_dim, shape.v_dim);
  if (shape.dtype == DType::kF32) {
    reason = "auto: sage1, as flash takes no f32 on this device";
    return Kernel::kSage1;
  }
  if (dim > 128 || (dim > 64 && shape.k_tokens >= 16384)) {
    reason = "auto: sage1 is the fastest kernel on this device for this head dimension and length";
    return Kernel::kSage1;
  }
  reason = "auto: flash is the fastest kernel on this device for this head dimension and length, and the most accurate";
  return Kernel::kFlash;
}

void plan_cuda(const AttentionShape& shape, const DeviceTraits&, Plan& plan) {
  set_cuda_tiles(shape, plan);
  if (plan.kernel == Kernel::kFlash) {
    if (shape.dtype == DType::kF32) {
      SAGE_FAIL(
          SAGE_UNSUPPORTED,
          "Cannot run attention as q.dtype must be f16 or bf16 for flash on a CUDA device: current value is f32.");
    }
    plan.workspace_bytes = 0;
  } else {
    plan.workspace_bytes = cuda::Sage1Workspace(shape, plan).bytes;
  }
}

// Its workspace follows from the operands' strides as well: the stream sizes it.
void plan_cuda_quantized(const AttentionShape& shape, const DeviceTraits&, Plan& plan) { set_cuda_tiles(shape, plan); }

}  // namespace sage
