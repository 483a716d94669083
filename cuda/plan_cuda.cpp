// Plans for CUDA devices: what the portable kernels (sm_80 and later) and those for sm_90a can run, their tiles and
// workspace.
#include <algorithm>

#include "kernels/sm90/flash.h"
#include "kernels/tuning.h"
#include "kernels/workspace.h"
#include "plan.h"

namespace sage {

namespace {

[[noreturn]] void refuse(const std::string& what, const std::string& must, const std::string& value) {
  SAGE_FAIL(SAGE_UNSUPPORTED,
            "Cannot run attention as " + what + " must be " + must + ": current value is " + value + ".");
}

// What no kernel here has yet.
void refuse_masking(const AttentionShape& shape) {
  const Masking& masking = shape.masking;
  const auto check = [](const char* what, bool good, const char* must, const std::string& value) {
    if (!good)
      refuse(what, std::string(must) + " on a CUDA device, with kernel flash too, or the device the CPU", value);
  };
  check("options.alignment", masking.after != 0 || masking.offset == shape.k_tokens - shape.q_tokens,
        "bottom-right (0)", "top-left (1)");
  check("options.windowed", masking.before == kUnlimited && masking.after <= 0, "0", "1");
  check("options.softcap", masking.softcap == 0, "0", std::to_string(masking.softcap));
  check("mask", !masking.mask, "absent", "given");
  check("sinks", !masking.sinks, "absent", "given");
  check("alibi", !masking.alibi, "absent", "given");
}

bool is_hopper(const DeviceTraits& device) { return device.compute_capability == 90; }

void check_tokens(const AttentionShape& shape) {
  constexpr int64_t kMostTokens = (int64_t{1} << 31) - 1024;
  const int64_t tokens = std::max(shape.q_tokens, shape.k_tokens);
  if (tokens <= kMostTokens) return;
  SAGE_FAIL(SAGE_UNSUPPORTED, "Cannot run attention as q and k must have at most " + std::to_string(kMostTokens) +
                                  " tokens on a CUDA device: current value is " + std::to_string(tokens) + ".");
}

// sage2 on sm_90a.
void set_hopper_tiles(const AttentionShape& shape, Plan& plan) {
  if (plan.granularity != SAGE_GRANULARITY_THREAD) {
    refuse("options.granularity", "thread (4) for sage2 on a CUDA device, or the kernel flash or sage1",
           std::to_string(plan.granularity));
  }
  if (plan.smooth_q) {
    refuse("options.smooth_q", "off (1) for sage2 on a CUDA device, or the kernel flash or sage1", "on (2)");
  }
  const cuda::sm90::Sage2Tiles tiles = cuda::sm90::sage2_tiles(plan.padded_head_dim, plan.fast_exponential);
  plan.architecture = 90;
  plan.implementation = "sm_90a wgmma";
  plan.block_q = cuda::sm90::kBlockM;
  plan.block_k = tiles.block_n;
  plan.q_group_rows = 16;
  plan.k_group_rows = tiles.block_n;
  constexpr int64_t kMostBlocks = (int64_t{1} << 31) - 1;
  const int64_t q_blocks = shape.batch * shape.q_heads * ((shape.q_tokens + plan.block_q - 1) / plan.block_q);
  const int64_t key_tiles = shape.batch * shape.kv_heads * ((shape.k_tokens + plan.block_k - 1) / plan.block_k);
  if (q_blocks + 2 * key_tiles > kMostBlocks) {
    refuse("the blocks of q, k and v", "at most " + std::to_string(kMostBlocks) + " for sage2, or the kernel flash",
           std::to_string(q_blocks + 2 * key_tiles));
  }
}

// Whether flash or sage1 runs on sm_90a's own kernel: boxes of Q, K and V, and what sage1's scales allow.
bool suits_hopper(const AttentionShape& shape, const Plan& plan) {
  const int64_t items = shape.batch * shape.q_heads * ((shape.q_tokens + 127) / 128);
  if (items >= int64_t{1} << 30) return false;
  if (plan.kernel == Kernel::kFlash) return shape.dtype != DType::kF32 && shape.boxes;
  const bool converts_v = shape.dtype != DType::kF16 || plan.smooth_v;
  const bool groups = plan.k_grouping != Grouping::kToken && plan.k_group_rows == 64;
  return groups && !plan.smooth_q && !plan.f16_accumulator && (converts_v || shape.boxes);
}

void set_cuda_tiles(const AttentionShape& shape, const DeviceTraits& device, Plan& plan) {
  check_tokens(shape);
  plan.padded_head_dim = cuda::padded_head_dim(static_cast<int>(std::max(shape.head_dim, shape.v_dim)));
  if (plan.kernel == Kernel::kSage2 && is_hopper(device)) return set_hopper_tiles(shape, plan);
  if (plan.kernel != Kernel::kFlash && plan.kernel != Kernel::kSage1) {
    refuse("options.kernel",
           std::string(is_hopper(device) ? "flash, sage1 or sage2" : "flash or sage1") +
               " on this CUDA device, or the device must be the CPU",
           kernel_name(plan.kernel));
  }
  plan.architecture = 80;
  plan.implementation = "sm_80 mma";
  const cuda::AttentionTuning tuning = cuda::attention_tuning(plan.padded_head_dim, plan.kernel != Kernel::kFlash,
                                                              plan.f16_accumulator, cuda::few_rows_pay(shape.k_tokens));
  plan.block_q = tuning.block_q();
  plan.block_k = tuning.block_k;
}

void choose_hopper_kernel(const AttentionShape& shape, const DeviceTraits& device, Plan& plan) {
  if (plan.kernel == Kernel::kSage2 || !is_hopper(device) || !suits_hopper(shape, plan)) return;
  const cuda::sm90::F16Tiles tiles =
      cuda::sm90::f16_tiles(plan.padded_head_dim, plan.kernel == Kernel::kSage1, shape.causal, shape.q_tokens);
  plan.architecture = 90;
  plan.implementation = "sm_90a wgmma";
  plan.block_q = tiles.block_q;
  plan.block_k = tiles.block_k;
}

}  // namespace

// By measurement, end to end (bench/results/): quantizing pays where the products are long.
static Kernel hopper_auto_kernel(const AttentionShape& shape, std::string& reason) {
  const int64_t tokens = std::min(shape.q_tokens, shape.k_tokens);
  if (tokens >= (shape.causal ? 2048 : 1024)) {
    reason = "auto: sage2 is the fastest kernel on this device from 1024 tokens on (causal: 2048)";
    return Kernel::kSage2;
  }
  if (shape.dtype == DType::kF32) {
    reason = "auto: sage1, as flash takes no f32 on this device, and sage2 pays for more tokens only";
    return Kernel::kSage1;
  }
  reason = "auto: flash is the fastest kernel on this device for so few tokens, and the most accurate";
  return Kernel::kFlash;
}

Kernel cuda_auto_kernel(const AttentionShape& shape, const DeviceTraits& device, std::string& reason) {
  if (is_hopper(device)) return hopper_auto_kernel(shape, reason);
  if (shape.dtype == DType::kF32) {
    reason = "auto: sage1, as flash takes no f32 on this device";
    return Kernel::kSage1;
  }
  const int64_t dim = std::max(shape.head_dim, shape.v_dim);
  if (dim > 128 || (dim > 64 && shape.k_tokens >= 16384)) {
    reason = "auto: sage1 is the fastest portable kernel for this head dimension and length";
    return Kernel::kSage1;
  }
  reason = "auto: flash is the fastest portable kernel for this head dimension and length, and the most accurate";
  return Kernel::kFlash;
}

// Measured: always faster.
bool cuda_fast_exponential(const AttentionShape&, const DeviceTraits& device) { return is_hopper(device); }

void plan_cuda(const AttentionShape& shape, const DeviceTraits& device, Plan& plan) {
  refuse_masking(shape);
  set_cuda_tiles(shape, device, plan);
  choose_hopper_kernel(shape, device, plan);
  if (plan.kernel == Kernel::kFlash) {
    if (shape.dtype == DType::kF32) refuse("q.dtype", "f16 or bf16 for flash on a CUDA device", "f32");
    plan.workspace_bytes = 0;
  } else if (plan.kernel == Kernel::kSage2) {
    plan.workspace_bytes = cuda::Sage2Workspace(shape, plan).bytes;
  } else {
    plan.workspace_bytes = cuda::Sage1Workspace(shape, plan).bytes;
  }
}

// Its workspace follows from the operands' strides as well: the stream sizes it.
void plan_cuda_quantized(const AttentionShape& shape, const DeviceTraits& device, Plan& plan) {
  refuse_masking(shape);
  if (plan.kernel == Kernel::kSage2) {
    refuse("options.kernel", "sage1 for quantized operands on a CUDA device (flash takes none), or the device the CPU",
           kernel_name(plan.kernel));
  }
  set_cuda_tiles(shape, device, plan);
}

}  // namespace sage
