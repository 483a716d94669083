// Plans for CUDA devices: what the portable kernels (sm_80 and later) and those for sm_90a can run, their tiles and
// workspace.
#include <algorithm>

#include "kernels/decode.h"
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

bool is_hopper(const DeviceTraits& device) { return device.compute_capability == 90; }

void check_tokens(const AttentionShape& shape) {
  constexpr int64_t kMostTokens = (int64_t{1} << 31) - 1024;
  const int64_t tokens = std::max(shape.q_tokens, shape.k_tokens);
  if (tokens <= kMostTokens) return;
  SAGE_FAIL(SAGE_UNSUPPORTED, "Cannot run attention as q and k must have at most " + std::to_string(kMostTokens) +
                                  " tokens on a CUDA device: current value is " + std::to_string(tokens) + ".");
}

// What only the CPU device has.
void check_beyond(const Plan& plan, const AttentionShape& shape) {
  constexpr const char* kMust = "off (1) on a CUDA device (kernel flash is exact), or the device must be the CPU";
  if (plan.rotate) refuse("options.rotate", kMust, "on (2)");
  if (plan.first_token) refuse("options.first_token", kMust, "on (2)");
  if (plan.k_mean_rows < shape.k_tokens) {
    refuse("options.k_mean_rows", "0 on a CUDA device (kernel flash is exact), or the device must be the CPU",
           std::to_string(plan.k_mean_rows));
  }
}

// Causal masks that end at the last key, or none.
bool has_plain_mask(const AttentionShape& shape) {
  const Masking& masking = shape.masking;
  const bool causal = masking.after == 0 && masking.offset == shape.k_tokens - shape.q_tokens;
  return !cuda::is_general(masking) && masking.before == kUnlimited && (causal || masking.after == kUnlimited);
}

// What keeps a call from sm_90a's own kernel of sage2 and sage2-int4; empty: nothing.
std::string not_for_hopper_sage2(const AttentionShape& shape, const Plan& plan) {
  if (bits_per_element(shape.dtype) < 16) return "operands are codes";
  if (plan.granularity != SAGE_GRANULARITY_THREAD) return "scales are not per thread";
  if (cuda::is_general(shape.masking)) return "keys or scores are masked";
  return "";
}

// Whether flash or sage1 runs on sm_90a's own kernel: boxes of Q, K and V, and what sage1's scales allow.
bool suits_hopper_f16(const AttentionShape& shape, const Plan& plan) {
  const int64_t items = shape.batch * shape.q_heads * ((shape.q_tokens + 127) / 128);
  if (items >= int64_t{1} << 30 || !has_plain_mask(shape) || bits_per_element(shape.dtype) < 16) return false;
  if (plan.kernel == Kernel::kFlash) return shape.dtype != DType::kF32 && shape.boxes;
  const bool converts_v = shape.dtype != DType::kF16 || plan.smooth_v;
  const bool groups = plan.k_grouping != Grouping::kToken && plan.k_group_rows == 64;
  return plan.kernel == Kernel::kSage1 && groups && !plan.smooth_q && !plan.f16_accumulator &&
         (converts_v || shape.boxes);
}

// The band on sm_90a: its tiles are copied as boxes of 16-bit numbers.
void check_hopper_band(const AttentionShape& shape, const Plan& plan) {
  const auto check = [](bool good, const char* what, const char* must, const std::string& value) {
    if (!good) refuse(what, std::string(must) + " with options.band on (2), or the kernel flash", value);
  };
  check(shape.dtype != DType::kF32, "q.dtype", "f16 or bf16", "f32");
  check(plan.padded_head_dim <= 128, "the head dimension", "at most 128",
        std::to_string(std::max(shape.head_dim, shape.v_dim)));
  check(shape.boxes, "the addresses and strides of q, k and v", "multiples of 16 bytes", "one that is not");
  check(!plan.smooth_q, "options.smooth_q", "off (1)", "on (2)");
  check(shape.masking.before == kUnlimited, "options.windowed", "0", "1");
}

void set_hopper_sage2(const AttentionShape& shape, Plan& plan) {
  if (plan.band) check_hopper_band(shape, plan);
  if (plan.smooth_q && plan.fast_exponential && plan.padded_head_dim > 128) {
    refuse("options.exponential",
           "exact (1) where queries of more than 128 channels are smoothed on this CUDA device, or the kernel flash",
           "fast (2)");
  }
  const cuda::sm90::Sage2Tiles tiles = cuda::sm90::sage2_tiles(plan.padded_head_dim, plan.fast_exponential, plan.band);
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

// flash for few queries, whose time is that of reading K and V.
void choose_decode_kernel(const AttentionShape& shape, const DeviceTraits& device, Plan& plan) {
  if (plan.kernel != Kernel::kFlash || !cuda::decodes(shape) || !has_plain_mask(shape)) return;
  plan.architecture = 80;
  plan.implementation = "sm_80 mma, keys split";
  plan.block_q = cuda::kDecodeRows;
  plan.block_k = cuda::kDecodeKeys;
  plan.key_splits = cuda::decode_splits(shape, device.multiprocessors);
}

void set_hopper_f16(const AttentionShape& shape, Plan& plan) {
  const cuda::sm90::F16Tiles tiles =
      cuda::sm90::f16_tiles(plan.padded_head_dim, plan.kernel == Kernel::kSage1, shape.causal, shape.q_tokens);
  plan.architecture = 90;
  plan.implementation = "sm_90a wgmma";
  plan.block_q = tiles.block_q;
  plan.block_k = tiles.block_k;
}

void set_portable(const AttentionShape& shape, Plan& plan) {
  plan.architecture = 80;
  plan.implementation = "sm_80 mma";
  plan.block_k = 64;
  const cuda::AttentionTuning tuning = cuda::attention_tuning(
      plan, shape.masking, cuda::has_column_terms(plan, plan.smooth_q), static_cast<long long>(shape.k_tokens));
  plan.block_q = tuning.block_q();
  plan.block_k = tuning.block_k;
}

// Which kernel runs, its tiles, and why where one would expect another.
void set_cuda_tiles(const AttentionShape& shape, const DeviceTraits& device, Plan& plan) {
  check_tokens(shape);
  if (plan.kernel == Kernel::kSageInt8) {
    refuse("options.kernel",
           "flash, sage1, sage1-int8, sage2, sage2-int4 or sage2++ on this CUDA device, or the device the CPU",
           kernel_name(plan.kernel));
  }
  plan.padded_head_dim = cuda::padded_head_dim(static_cast<int>(std::max(shape.head_dim, shape.v_dim)));
  const bool hopper_sage2 = is_hopper(device) && (plan.kernel == Kernel::kSage2 || plan.kernel == Kernel::kSage2Int4);
  if (plan.band && !hopper_sage2) {
    refuse("options.band",
           "off (1) on a CUDA device, but for sage2 and sage2-int4 on compute capability 9.0, or the kernel flash",
           "on (2)");
  }
  if (hopper_sage2) {
    const std::string obstacle = not_for_hopper_sage2(shape, plan);
    if (obstacle.empty()) return set_hopper_sage2(shape, plan);
    if (plan.band) refuse("options.band", "off (1) as " + obstacle + ", or the kernel flash", "on (2)");
    plan.reason += "; by the portable kernel, as " + obstacle;
    if (plan.fast_exponential) {
      refuse("options.exponential", "default (0) or exact (1) as " + obstacle + " (flash has no choice)", "fast (2)");
    }
  } else if (is_hopper(device) && suits_hopper_f16(shape, plan)) {
    return set_hopper_f16(shape, plan);
  } else if (is_hopper(device) && !has_plain_mask(shape)) {
    plan.reason += "; by the portable kernel, as keys or scores are masked";
  }
  if (plan.fast_exponential) {
    refuse("options.exponential", "default (0) or exact (1) on this CUDA device (flash has no choice)", "fast (2)");
  }
  set_portable(shape, plan);
}

}  // namespace

// By measurement, end to end (bench/results/): quantizing pays where the products are long.
static Kernel hopper_auto_kernel(const AttentionShape& shape, std::string& reason) {
  const int64_t tokens = std::min(shape.q_tokens, shape.k_tokens);
  if (tokens >= (std::max(shape.head_dim, shape.v_dim) <= 64 ? 4096 : 2048)) {
    reason = "auto: sage2 is the fastest kernel on this device from 2048 tokens on (head dimensions up to 64: 4096)";
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
  if (is_hopper(device) && !cuda::is_general(shape.masking)) return hopper_auto_kernel(shape, reason);
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

// Measured: always faster, where the kernel has it.
bool cuda_fast_exponential(const AttentionShape& shape, const DeviceTraits& device, const Plan& plan) {
  return is_hopper(device) && not_for_hopper_sage2(shape, plan).empty();
}

void plan_cuda(const AttentionShape& shape, const DeviceTraits& device, Plan& plan) {
  check_beyond(plan, shape);
  if (plan.kernel == Kernel::kFlash && shape.dtype == DType::kF32) {
    refuse("q.dtype", "f16 or bf16 for flash on a CUDA device", "f32");
  }
  set_cuda_tiles(shape, device, plan);
  choose_decode_kernel(shape, device, plan);
  plan.workspace_bytes = cuda::attention_workspace_bytes(shape, plan);
}

// Its workspace follows from the operands' strides as well: the stream sizes it.
void plan_cuda_quantized(const AttentionShape& shape, const DeviceTraits& device, Plan& plan) {
  set_cuda_tiles(shape, device, plan);
}

}  // namespace sage
