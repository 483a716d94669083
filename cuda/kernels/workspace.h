// Where the intermediate tensors of a CUDA call lie in its workspace. Host-only and pure: plans use it too.
#pragma once

#include "../ops.h"
#include "decode.h"
#include "sm90/sage2.h"

namespace sage::cuda {

// Partial sums and counts of launch_mean; none where every mean has a single chunk.
inline size_t mean_scratch_bytes(int64_t planes, int64_t tokens, int64_t channels, int64_t block_rows) {
  if (block_rows > tokens) block_rows = tokens;
  if (block_rows <= kChunkRows) return 0;
  const int64_t means = (tokens + block_rows - 1) / block_rows, chunks = (block_rows + kChunkRows - 1) / kChunkRows;
  return static_cast<size_t>(planes * means * chunks * channels) * (sizeof(float) + 1);
}

// Largest magnitudes of columns.
inline size_t column_scratch_bytes(int64_t planes, int64_t channels) {
  return static_cast<size_t>(planes * channels) * sizeof(float);
}

// Hands out consecutive ranges on 256-byte boundaries.
class Carver {
 public:
  size_t take(int64_t elements, size_t element_bytes) {
    const size_t at = bytes_;
    bytes_ = (bytes_ + static_cast<size_t>(elements) * element_bytes + 255) / 256 * 256;
    return at;
  }
  size_t take_if(bool needed, int64_t elements, size_t element_bytes) {
    return take(needed ? elements : 0, element_bytes);
  }
  size_t bytes() const { return bytes_; }

 private:
  size_t bytes_ = 0;
};

// Offsets for the tiles of a mask.
struct MaskWorkspace {
  size_t tiles, bits;  // as in MaskTiles; after the tiles one for all of them together

  MaskWorkspace(const View& mask, int block_q, Carver& carver) {
    constexpr int kTileKeys = 64;
    const int64_t planes = mask.batch() * mask.heads(), rows = mask.tokens();
    const int64_t k_tiles = (mask.channels() + kTileKeys - 1) / kTileKeys, q_tiles = (rows + block_q - 1) / block_q;
    tiles = carver.take_if(static_cast<bool>(mask), planes * q_tiles * k_tiles + 1, 1);
    bits = carver.take_if(static_cast<bool>(mask), planes * rows * k_tiles, 8);
  }
};

// Bytes of V in tiles of codes.
inline int64_t value_tile_bytes(int64_t planes, int64_t tokens, const Plan& plan) {
  constexpr int64_t kTileKeys = 64;
  return planes * ((tokens + kTileKeys - 1) / kTileKeys) * kTileKeys * plan.padded_head_dim;
}

// Offsets for flash: masks alone.
struct FlashWorkspace {
  Carver carver;
  MaskWorkspace mask;

  FlashWorkspace(const AttentionShape& shape, const Plan& plan) : mask(shape.masking.mask, plan.block_q, carver) {}
};

// Offsets for kernels that quantize f32, f16 or bf16 tensors; what a call does not need takes no room.
struct SageWorkspace {
  size_t q_mean, k_mean, v_mean;      // f32
  size_t q_codes, k_codes;            // INT8, or INT4 where there are such products, [B, H, N, padded_head_dim]
  size_t q_scales, k_scales;          // f32 [B, H, groups, 1]
  size_t q_not_finite, k_not_finite;  // words of 32 rows
  size_t v_not_finite;                // the same, where V is codes
  size_t delta;                       // f32 [B, Hq, ceil(Nq / 128), Nk]
  size_t lse_shift;                   // f32 [B, Hq, Nq, 1]
  size_t v, v_scales;                 // f16 [B, Hkv, Nk, padded_v_dim] or tiles of INT8 codes, f32 [B, Hkv, 1, Dv]
  size_t v_codes;                     // INT8 [B, Hkv, Nk, padded_v_dim], before they are tiles
  size_t v_tiles;                     // of FP8 codes
  size_t first_scores;                // f32 [B, Hq, Nq, 1]
  size_t mask_tiles, mask_bits;       // as in MaskTiles
  size_t scratch;                     // of one step at a time
  size_t bytes;                       // of all
  bool convert_v;                     // else V is used as it is
  int64_t q_means, k_means, q_groups, k_groups, padded_v_dim;

  SageWorkspace(const AttentionShape& shape, const Plan& plan) {
    const int64_t q_planes = shape.batch * shape.q_heads, k_planes = shape.batch * shape.kv_heads;
    const int64_t nq = shape.q_tokens, nk = shape.k_tokens, d = shape.head_dim, dv = shape.v_dim;
    q_means = (nq + kQueryMeanRows - 1) / kQueryMeanRows;
    k_means = (nk + plan.k_mean_rows - 1) / plan.k_mean_rows;
    q_groups = group_count(plan.q_grouping, nq, plan.q_group_rows);
    k_groups = group_count(plan.k_grouping, nk, plan.k_group_rows);
    padded_v_dim = (dv + 7) / 8 * 8;
    convert_v = plan.kernel != Kernel::kSage1 || shape.dtype != DType::kF16 || plan.f16_accumulator || plan.smooth_v;

    Carver carver;
    q_mean = carver.take_if(plan.smooth_q, q_planes * q_means * d, 4);
    k_mean = carver.take_if(plan.smooth_k, k_planes * k_means * d, 4);
    v_mean = carver.take_if(plan.smooth_v, k_planes * dv, 4);
    const int64_t row_bytes = plan.int4_products ? plan.padded_head_dim / 2 : plan.padded_head_dim;
    q_codes = carver.take(q_planes * nq * row_bytes, 1);
    k_codes = carver.take(k_planes * nk * row_bytes, 1);
    q_scales = carver.take(q_planes * q_groups, 4);
    k_scales = carver.take(k_planes * k_groups, 4);
    q_not_finite = carver.take(q_planes * ((nq + 31) / 32), 4);
    k_not_finite = carver.take(k_planes * ((nk + 31) / 32), 4);
    v_not_finite = carver.take_if(plan.kernel != Kernel::kSage1, k_planes * ((nk + 31) / 32), 4);
    delta = carver.take_if(plan.smooth_q, q_planes * q_means * nk, 4);
    lse_shift = carver.take_if(plan.smooth_k, q_planes * nq, 4);
    const bool tiles = plan.kernel == Kernel::kSageInt8;
    v = tiles ? carver.take(value_tile_bytes(k_planes, nk, plan), 1)
              : carver.take_if(convert_v, k_planes * nk * padded_v_dim, 2);
    v_codes = carver.take_if(tiles, k_planes * nk * padded_v_dim, 1);
    v_scales = carver.take_if(convert_v, k_planes * dv, 4);
    v_tiles = carver.take_if(plan.fp8_products, value_tile_bytes(k_planes, nk, plan), 1);
    first_scores = carver.take_if(plan.first_token, q_planes * nq, 4);
    const MaskWorkspace mask(shape.masking.mask, plan.block_q, carver);
    mask_tiles = mask.tiles;
    mask_bits = mask.bits;

    size_t step = 0;
    const auto at_least = [&](bool needed, size_t more) { step = needed && more > step ? more : step; };
    at_least(plan.smooth_k, mean_scratch_bytes(k_planes, nk, d, plan.k_mean_rows));
    at_least(plan.smooth_v, mean_scratch_bytes(k_planes, nk, dv, nk));
    at_least(convert_v, column_scratch_bytes(k_planes, dv));
    scratch = carver.take(static_cast<int64_t>(step), 1);
    bytes = carver.bytes();
  }
};

// What a call on codes may need.
struct QuantizedNeeds {
  bool pack_q, pack_k, pack_q_scales, pack_k_scales, pack_v_scales, pack_v_mean;
  bool delta, lse_shift, convert_v;
  int64_t delta_rows;
};

// Offsets for kernels on codes.
struct QuantizedWorkspace {
  size_t q_codes, k_codes, q_scales, k_scales, q_not_finite, k_not_finite;  // as in SageWorkspace
  size_t v_not_finite, delta, lse_shift, v, v_scales, v_mean, v_tiles, scratch, bytes;
  int64_t deltas, q_groups, k_groups, padded_v_dim;

  QuantizedWorkspace(const AttentionShape& shape, const Plan& plan, const QuantizedNeeds& needs) {
    const int64_t q_planes = shape.batch * shape.q_heads, k_planes = shape.batch * shape.kv_heads;
    const int64_t nq = shape.q_tokens, nk = shape.k_tokens, dv = shape.v_dim;
    deltas = (nq + needs.delta_rows - 1) / needs.delta_rows;
    q_groups = group_count(plan.q_grouping, nq, plan.q_group_rows);
    k_groups = group_count(plan.k_grouping, nk, plan.k_group_rows);
    padded_v_dim = (dv + 7) / 8 * 8;

    Carver carver;
    q_codes = carver.take_if(needs.pack_q, q_planes * nq * plan.padded_head_dim, 1);
    k_codes = carver.take_if(needs.pack_k, k_planes * nk * plan.padded_head_dim, 1);
    q_scales = carver.take_if(needs.pack_q_scales, q_planes * q_groups, 4);
    k_scales = carver.take_if(needs.pack_k_scales, k_planes * k_groups, 4);
    q_not_finite = carver.take(q_planes * ((nq + 31) / 32), 4);
    k_not_finite = carver.take(k_planes * ((nk + 31) / 32), 4);
    const bool tiles = plan.kernel == Kernel::kSageInt8;
    v_not_finite = carver.take_if(tiles, k_planes * ((nk + 31) / 32), 4);
    delta = carver.take_if(needs.delta, q_planes * deltas * nk, 4);
    lse_shift = carver.take_if(needs.lse_shift, q_planes * nq, 4);
    v = tiles ? carver.take(value_tile_bytes(k_planes, nk, plan), 1)
              : carver.take_if(needs.convert_v, k_planes * nk * padded_v_dim, 2);
    v_scales = carver.take_if(needs.convert_v || needs.pack_v_scales, k_planes * dv, 4);
    v_mean = carver.take_if(needs.pack_v_mean, k_planes * dv, 4);
    v_tiles = carver.take_if(plan.fp8_products, value_tile_bytes(k_planes, nk, plan), 1);
    scratch = carver.take_if(needs.convert_v, static_cast<int64_t>(column_scratch_bytes(k_planes, dv)), 1);
    bytes = carver.bytes();
  }
};

// Offsets for sage2 on sm_90a.
struct Sage2Workspace {
  size_t q, q_scales, q_bits, k, k_scales, k_bits, v, v_scales, v_bits, v_peaks, flags, next_item, q_mean, k_mean,
      v_mean, shifts, shift_peaks, mask_tiles, mask_bits;
  size_t bytes;

  Sage2Workspace(const AttentionShape& shape, const Plan& plan) {
    const int64_t q_planes = shape.batch * shape.q_heads, k_planes = shape.batch * shape.kv_heads;
    const int64_t blocks = q_planes * ((shape.q_tokens + sm90::kBlockM - 1) / sm90::kBlockM);
    const int64_t tiles = k_planes * ((shape.k_tokens + plan.block_k - 1) / plan.block_k);
    const int64_t dim = plan.padded_head_dim;

    Carver carver;
    q = carver.take(blocks * sm90::kBlockM * dim, 1);
    q_scales = carver.take(blocks * sm90::kBlockM / 2, 4);
    q_bits = carver.take(blocks * sm90::kBlockM / 32, 4);
    k = carver.take(tiles * plan.block_k * dim, 1);
    k_scales = carver.take(tiles * 4, 4);
    k_bits = carver.take(tiles * plan.block_k / 32, 4);
    v = carver.take(tiles * plan.block_k * dim, 1);
    v_scales = carver.take(k_planes * dim, 4);
    v_bits = carver.take(tiles * plan.block_k / 32, 4);
    v_peaks = carver.take(k_planes * dim, 4);
    flags = carver.take(k_planes, 4);
    next_item = carver.take(1, 4);
    q_mean = carver.take_if(plan.smooth_q, blocks * shape.head_dim, 4);
    k_mean = carver.take_if(plan.smooth_k, k_planes * shape.head_dim, 4);
    v_mean = carver.take(k_planes * dim, 4);
    const int64_t shift_count = blocks * (tiles / k_planes) * plan.block_k;
    shifts = carver.take_if(plan.smooth_q, shift_count, 4);
    shift_peaks = carver.take_if(plan.smooth_q, shift_count / sm90::kShiftsOfPeak, 4);
    const MaskWorkspace mask(shape.masking.mask, sm90::kBlockM, carver);
    mask_tiles = mask.tiles;
    mask_bits = mask.bits;
    bytes = carver.bytes();
  }

  sm90::Sage2Packed at(char* base, const Plan& plan) const {
    const auto floats = [&](size_t offset) { return reinterpret_cast<float*>(base + offset); };
    const auto words = [&](size_t offset) { return reinterpret_cast<uint32_t*>(base + offset); };
    sm90::Sage2Packed packed{};
    packed.q = reinterpret_cast<int8_t*>(base + q);
    packed.q_scales = floats(q_scales);
    packed.q_bits = words(q_bits);
    packed.k = reinterpret_cast<int8_t*>(base + k);
    packed.k_scales = floats(k_scales);
    packed.k_bits = words(k_bits);
    packed.v = reinterpret_cast<uint8_t*>(base + v);
    packed.v_scales = floats(v_scales);
    packed.v_bits = words(v_bits);
    packed.v_peaks = floats(v_peaks);
    packed.flags = words(flags);
    packed.next_item = words(next_item);
    packed.q_mean = plan.smooth_q ? floats(q_mean) : nullptr;
    packed.k_mean = plan.smooth_k ? floats(k_mean) : nullptr;
    packed.v_mean = floats(v_mean);
    packed.shifts = plan.smooth_q ? floats(shifts) : nullptr;
    packed.shift_peaks = plan.smooth_q ? floats(shift_peaks) : nullptr;
    return packed;
  }
};

// sm_90a has a kernel of its own for these.
inline bool is_hopper_sage2(const Plan& plan) {
  return plan.architecture == 90 &&
         (plan.kernel == Kernel::kSage2 || plan.kernel == Kernel::kSage2Int4 || plan.kernel == Kernel::kSage2PP);
}

inline size_t attention_workspace_bytes(const AttentionShape& shape, const Plan& plan) {
  if (plan.key_splits != 0) return decode_workspace_bytes(shape, plan.key_splits);
  if (plan.kernel == Kernel::kFlash) return FlashWorkspace(shape, plan).carver.bytes();
  if (is_hopper_sage2(plan)) return Sage2Workspace(shape, plan).bytes;
  return SageWorkspace(shape, plan).bytes;
}

}  // namespace sage::cuda
