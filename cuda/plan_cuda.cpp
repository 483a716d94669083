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

bool is_hopper(const DeviceTraits& device) { return device.architecture == 90; }

void check_tokens(const AttentionShape& shape) {
  constexpr int64_t kMostTokens = (int64_t{1} << 31) - 1024;
  const int64_t tokens = std::max(shape.q_tokens, shape.k_tokens);
  if (tokens <= kMostTokens) return;
  SAGE_FAIL(SAGE_UNSUPPORTED, "Cannot run attention as q and k must have at most " + std::to_string(kMostTokens) +
                                  " tokens on a CUDA device: current value is " + std::to_string(tokens) + ".");
}

// Causal masks that end at the last key, or none.
bool has_plain_mask(const AttentionShape& shape) {
  const Masking& masking = shape.masking;
  const bool causal = masking.after == 0 && masking.offset == shape.k_tokens - shape.q_tokens;
  return !cuda::is_general(masking) && masking.before == kUnlimited && (causal || masking.after == kUnlimited);
}

// What keeps the precision band from sm_90a's own kernel, which copies tiles as boxes of 16-bit numbers.
std::string not_for_hopper_band(const AttentionShape& shape, const Plan& plan) {
  if (shape.dtype == DType::kF32) return "the band has f32 operands";
  if (!shape.boxes) return "the band has addresses or strides that are not multiples of 16 bytes";
  if (plan.smooth_q) return "the band has smoothed queries";
  if (shape.masking.before != kUnlimited) return "the band has a window";
  return "";
}

// What keeps a quantized call from all kernels of sm_90a; empty: nothing.
std::string not_for_hopper_beyond(const AttentionShape& shape, const Plan& plan) {
  if (plan.first_token) return "the first key is apart";
  if (cuda::has_tile_means(plan, shape.k_tokens)) return "tiles of keys have means of their own";
  return "";
}

bool has_hopper_sage2(Kernel kernel) {
  return kernel == Kernel::kSage2 || kernel == Kernel::kSage2Int4 || kernel == Kernel::kSage2PP;
}

// What keeps a call from sm_90a's own kernel of sage2, sage2-int4 and sage2++; empty: nothing.
std::string not_for_hopper_sage2(const AttentionShape& shape, const Plan& plan) {
  if (bits_per_element(shape.dtype) < 16) return "operands are codes";
  if (plan.granularity != SAGE_GRANULARITY_THREAD) return "scales are not per thread";
  if (!cuda::hides_alone(shape.masking)) return "scores are masked or changed";
  if (shape.masking.mask) {
    if (plan.kernel == Kernel::kSage2PP) return "keys are masked in sage2++";
    if (plan.smooth_q) return "keys are masked and queries smoothed";
    if (plan.band) return "keys are masked beside a band";
  }
  if (plan.kernel == Kernel::kSage2PP) {
    if (plan.smooth_q) return "queries are smoothed";
    if (plan.p_range != cuda::sm90::kHalfWeightRange) return "P and V have other ranges than 112 and 9";
    if (plan.band) return "sage2++ has another band";
  }
  const std::string beyond = not_for_hopper_beyond(shape, plan);
  return beyond.empty() && plan.band ? not_for_hopper_band(shape, plan) : beyond;
}

// Whether flash or sage1 runs on sm_90a's own kernel: boxes of Q, K and V, and what sage1's scales allow.
bool suits_hopper_f16(const AttentionShape& shape, const Plan& plan) {
  const int64_t items = shape.batch * shape.q_heads * ((shape.q_tokens + 127) / 128);
  if (items >= int64_t{1} << 30 || shape.q_tokens + shape.k_tokens >= cuda::sm90::kMostF16Tokens) return false;
  if (!cuda::hides_alone(shape.masking) || bits_per_element(shape.dtype) < 16) return false;
  if (plan.kernel == Kernel::kFlash) return shape.dtype != DType::kF32 && shape.boxes;
  const bool converts_v = shape.dtype != DType::kF16 || plan.smooth_v;
  const bool groups = plan.k_grouping != Grouping::kToken && plan.k_group_rows == 64;
  return plan.kernel == Kernel::kSage1 && groups && !plan.smooth_q && !plan.f16_accumulator &&
         !cuda::is_beyond(plan, shape.k_tokens) && (converts_v || shape.boxes);
}

void set_hopper_sage2(const AttentionShape& shape, Plan& plan) {
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
  constexpr int64_t kMostBlocks = (int64_t{1} << 30) - 1;
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
  plan.architecture = is_hopper(device) ? 90 : 80;
  plan.implementation = is_hopper(device) ? "sm_90a mma, keys split" : "sm_80 mma, keys split";
  plan.block_q = cuda::kDecodeRows;
  plan.block_k = cuda::kDecodeKeys;
  plan.key_splits = cuda::decode_splits(shape, device.multiprocessors);
}

void set_hopper_f16(const AttentionShape& shape, Plan& plan) {
  const cuda::sm90::F16Tiles tiles =
      cuda::sm90::f16_tiles(plan.padded_head_dim, plan.kernel == Kernel::kSage1, shape.masking, shape.q_tokens);
  plan.architecture = 90;
  plan.implementation = "sm_90a wgmma";
  plan.block_q = tiles.block_q;
  plan.block_k = tiles.block_k;
}

// Tensor cores for FP8 are those of 8.9 and 12.x, for INT4 those of 8.x; elsewhere mma.sync emulates them. What goes
// beyond the papers is for accuracy, and has the products that are everywhere; rotated rows have codes of a byte.
void set_products(const AttentionShape& shape, const DeviceTraits& device, Plan& plan) {
  if (cuda::is_beyond(plan, shape.k_tokens)) return;
  const bool int4 = plan.kernel == Kernel::kSage2Int4;
  const bool fp8 = int4 || plan.kernel == Kernel::kSage2 || plan.kernel == Kernel::kSage2PP;
  plan.fp8_products = fp8 && device.code_level >= 89 && (device.architecture == 89 || device.architecture >= 120);
  plan.int4_products = int4 && !plan.rotate && device.architecture <= 89 && bits_per_element(shape.dtype) >= 16 &&
                       !cuda::is_general(shape.masking);
}

void set_portable(const AttentionShape& shape, const DeviceTraits& device, Plan& plan) {
  set_products(shape, device, plan);
  plan.architecture = plan.fp8_products ? 89 : 80;
  plan.implementation = "sm_" + std::to_string(plan.architecture) + " mma";
  if (plan.int4_products) plan.implementation += ", INT4";
  if (plan.fp8_products) plan.implementation += ", FP8";
  plan.block_k = 64;
  const cuda::AttentionTuning tuning = cuda::attention_tuning(
      plan, shape.masking, cuda::has_column_terms(plan, plan.smooth_q, shape.k_tokens), shape.k_tokens);
  plan.block_q = tuning.block_q();
  plan.block_k = tuning.block_k;
}

// Which kernel runs, its tiles, and why where one would expect another.
void set_cuda_tiles(const AttentionShape& shape, const DeviceTraits& device, Plan& plan) {
  check_tokens(shape);
  plan.padded_head_dim = cuda::padded_head_dim(static_cast<int>(std::max(shape.head_dim, shape.v_dim)));
  const bool hopper_sage2 = is_hopper(device) && has_hopper_sage2(plan.kernel);
  if (hopper_sage2) {
    const std::string obstacle = not_for_hopper_sage2(shape, plan);
    if (obstacle.empty()) return set_hopper_sage2(shape, plan);
    plan.reason += "; by the portable kernel, as " + obstacle;
    if (plan.fast_exponential) {
      refuse("options.exponential", "default (0) or exact (1) as " + obstacle + " (flash has no choice)", "fast (2)");
    }
  } else if (is_hopper(device) && suits_hopper_f16(shape, plan)) {
    return set_hopper_f16(shape, plan);
  } else if (is_hopper(device)) {
    std::string obstacle =
        cuda::hides_alone(shape.masking) ? not_for_hopper_beyond(shape, plan) : "scores are masked or changed";
    if (obstacle.empty() && plan.band) obstacle = "only sage2 and sage2-int4 have another band";
    if (!obstacle.empty()) plan.reason += "; by the portable kernel, as " + obstacle;
  }
  if (plan.fast_exponential) {
    refuse("options.exponential", "default (0) or exact (1) on this CUDA device (flash has no choice)", "fast (2)");
  }
  set_portable(shape, device, plan);
}

}  // namespace

// By measurement, end to end (bench/results/): quantizing pays where the products are long.
static Kernel hopper_auto_kernel(const AttentionShape& shape, std::string& reason) {
  const int64_t tokens = std::min(shape.q_tokens, shape.k_tokens), dim = std::max(shape.head_dim, shape.v_dim);
  if (tokens >= (dim <= 64 ? 4096 : dim <= 128 && shape.causal ? 2560 : 2048)) {
    reason =
        "auto: sage2 is the fastest kernel on this device from 2048 tokens on (head dimensions up to 64: 4096; up to "
        "128 and causal: 2560)";
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
  if (is_hopper(device) && cuda::hides_alone(shape.masking)) return hopper_auto_kernel(shape, reason);
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
