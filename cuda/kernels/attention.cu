// From checked operations to the sm_80 attention kernels: parameters, and which instance a head dimension takes.
#include <algorithm>
#include <climits>
#include <cmath>

#include "attention_sm80.cuh"

namespace sage::cuda {

extern template void launch_flash_for<64, false>(const AttentionParams&, DType, int64_t, cudaStream_t);
extern template void launch_sage_for<64, false>(const AttentionParams&, bool, bool, int64_t, cudaStream_t);
extern template void launch_flash_for<128, false>(const AttentionParams&, DType, int64_t, cudaStream_t);
extern template void launch_sage_for<128, false>(const AttentionParams&, bool, bool, int64_t, cudaStream_t);
extern template void launch_flash_for<256, false>(const AttentionParams&, DType, int64_t, cudaStream_t);
extern template void launch_sage_for<256, false>(const AttentionParams&, bool, bool, int64_t, cudaStream_t);
extern template void launch_codes_for<64, false>(const AttentionParams&, bool, bool, bool, int64_t, cudaStream_t);
extern template void launch_codes_for<128, false>(const AttentionParams&, bool, bool, bool, int64_t, cudaStream_t);
extern template void launch_codes_for<256, false>(const AttentionParams&, bool, bool, bool, int64_t, cudaStream_t);
extern template void launch_flash_for<64, true>(const AttentionParams&, DType, int64_t, cudaStream_t);
extern template void launch_sage_for<64, true>(const AttentionParams&, bool, bool, int64_t, cudaStream_t);
extern template void launch_flash_for<128, true>(const AttentionParams&, DType, int64_t, cudaStream_t);
extern template void launch_sage_for<128, true>(const AttentionParams&, bool, bool, int64_t, cudaStream_t);
extern template void launch_flash_for<256, true>(const AttentionParams&, DType, int64_t, cudaStream_t);
extern template void launch_sage_for<256, true>(const AttentionParams&, bool, bool, int64_t, cudaStream_t);
extern template void launch_codes_for<64, true>(const AttentionParams&, bool, bool, bool, int64_t, cudaStream_t);
extern template void launch_codes_for<128, true>(const AttentionParams&, bool, bool, bool, int64_t, cudaStream_t);
extern template void launch_codes_for<256, true>(const AttentionParams&, bool, bool, bool, int64_t, cudaStream_t);
extern template void launch_sage_int8_for<64>(const AttentionParams&, int64_t, cudaStream_t);
extern template void launch_sage_int8_for<128>(const AttentionParams&, int64_t, cudaStream_t);
extern template void launch_sage_int8_for<256>(const AttentionParams&, int64_t, cudaStream_t);

namespace {

const float* f32(const View& view) { return static_cast<const float*>(view.data); }

float largest_finite(DType dtype) {
  return dtype == DType::kF16 ? 65504.0f : dtype == DType::kBF16 ? 0x1.fep127f : 0x1.fffffep127f;
}

void set_masking(AttentionParams& params, const Masking& masking, const MaskTiles& tiles) {
  constexpr int64_t kFar = int64_t{1} << 40;
  params.offset = static_cast<int>(masking.offset);
  params.first_key = masking.before == kUnlimited ? -kFar : masking.offset - std::min(masking.before, kFar);
  params.last_key = masking.after == kUnlimited ? kFar : masking.offset + std::min(masking.after, kFar);
  params.softcap = masking.softcap * kLog2e;
  if (masking.alibi) {
    params.alibi = f32(masking.alibi);
    params.alibi_batch_stride = masking.alibi.stride[0];
    params.alibi_head_stride = masking.alibi.stride[1];
  }
  if (masking.sinks) {
    params.sinks = f32(masking.sinks);
    params.sinks_stride = masking.sinks.stride[1];
  }
  if (const View& mask = masking.mask) {
    params.mask_tiles = reinterpret_cast<const uint8_t*>(tiles.tiles);
    params.mask_bits = tiles.bits;
    params.mask_batch_step = mask.batch() > 1 ? static_cast<int>(mask.heads()) : 0;
    params.mask_head_step = mask.heads() > 1 ? 1 : 0;
    params.mask_rows = static_cast<int>(mask.tokens());
    params.adds_mask = mask.dtype != DType::kBool;
    params.mask = make_rows(mask);
    params.mask_dtype = mask.dtype;
  }
  params.changes_open_tiles = masking.softcap > 0 || masking.alibi;
}

// What all kernels have in common.
AttentionParams make_params(const View& q, const View& k, const View& v, const View& o, const View& lse,
                            const Masking& masking, const MaskTiles& tiles, float scale) {
  AttentionParams params{};
  params.q = make_rows(q);
  params.k = make_rows(k);
  params.v = make_rows(v);
  params.o = static_cast<char*>(o.data);
  params.lse = static_cast<float*>(lse.data);
  for (int i = 0; i < 4; i++) params.o_stride[i] = o.stride[i];
  for (int i = 0; i < 3; i++) params.lse_stride[i] = lse.stride[i];
  params.out_dtype = o.dtype;
  params.q_tokens = static_cast<int>(q.tokens());
  params.k_tokens = static_cast<int>(k.tokens());
  params.v_dim = static_cast<int>(v.channels());
  params.q_heads = static_cast<int>(q.heads());
  params.group = static_cast<int>(q.heads() / k.heads());
  set_masking(params, masking, tiles);
  params.scale_log2 = scale * kLog2e;
  params.largest = largest_finite(v.dtype);
  return params;
}

// Calls launch(head dimension, whether scores may be masked or changed).
template <class Launch>
void choose(bool general, const Plan& plan, Launch launch) {
  const auto with = [&](auto general) {
    switch (plan.padded_head_dim) {
      case 64: return launch(std::integral_constant<int, 64>{}, general);
      case 128: return launch(std::integral_constant<int, 128>{}, general);
      default: return launch(std::integral_constant<int, 256>{}, general);
    }
  };
  general ? with(std::true_type{}) : with(std::false_type{});
}

// What tells whether the call's mask hides something, where looking costs little beside the work: two launches take
// microseconds, and each block of both looks. What many tiles say is put together first.
WholeMask look_at_whole_mask(const View& mask, const MaskTiles& tiles, int block_q, double scores,
                             cudaStream_t stream) {
  constexpr double kLeastScores = 1 << 27;
  constexpr int64_t kTilesOfBlock = 16 * 128;  // of a block's threads, 16 each
  const int64_t count = count_mask_tiles(mask, block_q);
  if (scores < kLeastScores || count > INT_MAX) return {};
  const WholeMask all{tiles.tiles, static_cast<int>(count)};
  if (count <= kTilesOfBlock) return all;
  TileState* const whole = tiles.tiles + count;  // as MaskWorkspace has it
  launch_whole_mask(all, whole, stream);
  return {whole, 1};
}

// Calls launch(params, masking), first as if there were no mask where that may be so.
template <class Launch>
void launch_masked(AttentionParams& params, const Masking& masking, const MaskTiles& tiles, const Plan& plan,
                   int64_t planes, cudaStream_t stream, Launch launch) {
  Masking unmasked = masking;
  unmasked.mask = View{};
  if (masking.mask && !is_general(unmasked) && !is_beyond(plan, params.k_tokens)) {
    const double scores = static_cast<double>(planes) * params.q_tokens * params.k_tokens;
    params.whole_mask = look_at_whole_mask(masking.mask, tiles, plan.block_q, scores, stream);
    if (params.whole_mask.tiles != nullptr) {
      AttentionParams without = params;
      without.mask_tiles = nullptr;
      launch(without, unmasked);
    }
  }
  launch(params, masking);
}

}  // namespace

void launch_flash(const AttentionOp& op, const MaskTiles& tiles, cudaStream_t stream) {
  AttentionParams params = make_params(op.q, op.k, op.v, op.o, op.lse, op.masking, tiles, op.scale);
  const int64_t planes = op.q.batch() * op.q.heads();
  launch_masked(
      params, op.masking, tiles, op.plan, planes, stream, [&](const AttentionParams& params, const Masking& masking) {
        choose(is_general(masking), op.plan, [&](auto head_dim, auto general) {
          launch_flash_for<decltype(head_dim)::value, decltype(general)::value>(params, op.q.dtype, planes, stream);
        });
      });
}

namespace {

// What P is rounded to, as bits of FP16 pairs; see round_codes.
void set_probabilities(AttentionParams& params, const Plan& plan) {
  switch (plan.kernel) {
    case Kernel::kSage1: params.headroom = plan.f16_accumulator ? 0.0f : 8.0f; return;
    case Kernel::kSage1Int8:
      params.log2_range = std::log2(kInt8Range);
      params.step_shift = 0x64006400u;  // whole numbers
      return;
    case Kernel::kSageInt8: params.log2_range = std::log2(kUint8Range); return;
    default:
      params.log2_range = std::log2(plan.p_range);
      params.least_step = 0x24002400u;  // 2^-6: numbers below it share their steps
      params.step_mask = 0x7c007c00u;
      params.step_shift = 0x1c001c00u;  // of 3 bits of mantissa
  }
}

}  // namespace

void launch_sage(const SageOp& op, cudaStream_t stream) {
  const Plan& plan = op.plan;
  AttentionParams params = make_params(op.q, op.k, op.v, op.o, op.lse, op.masking, op.mask_tiles, op.scale);
  params.v_dim = static_cast<int>(op.o.channels());
  params.largest = largest_finite(op.v_dtype);
  params.q_scales = f32(op.q_scales);
  params.k_scales = f32(op.k_scales);
  params.q_groups = static_cast<int>(op.q_scales.tokens());
  params.k_groups = static_cast<int>(op.k_scales.tokens());
  params.q_grouping = plan.q_grouping;
  params.q_group_rows = static_cast<int>(plan.q_group_rows);
  params.k_grouping = make_groups(plan.k_grouping, plan.k_group_rows);
  // One factor a lane, row and tile suffices where a tile's keys are one run of groups.
  const bool whole_tiles = plan.k_grouping != Grouping::kToken && plan.k_group_rows == plan.block_k;
  params.k_groups_a_tile = whole_tiles ? params.k_grouping.a_run() : 0;
  params.q_not_finite = op.q_not_finite;
  params.k_not_finite = op.k_not_finite;
  params.v_not_finite = op.v_not_finite;
  params.q_words = (params.q_tokens + 31) / 32;
  params.k_words = (params.k_tokens + 31) / 32;
  if (op.q_raw && op.k_raw) {
    params.q_raw = make_rows(op.q_raw);
    params.k_raw = make_rows(op.k_raw);
    params.raw_dtype = op.q_raw.dtype;
  }
  params.delta = f32(op.delta);
  params.delta_blocks = static_cast<int>(op.delta.tokens());
  params.delta_rows = static_cast<int>(op.delta_rows);
  params.v_scales = f32(op.v_scales);
  params.v_mean = f32(op.v_mean);
  (op.masking.softcap > 0 ? params.row_shift : params.lse_shift) = f32(op.lse_shift);
  set_probabilities(params, plan);

  params.raw_log2 = plan.rotate ? params.scale_log2 / rotated_channels(op.q_raw.channels()) : params.scale_log2;
  params.first_scores = f32(op.first_scores);
  params.k_mean = f32(op.k_mean);
  params.k_means = static_cast<int>(op.k_mean.tokens());
  params.k_mean_rows = static_cast<int>(std::min<int64_t>(plan.k_mean_rows, params.k_tokens));
  params.changes_open_tiles |= params.k_means > 1;
  params.band = plan.band;
  if (op.v_raw) {
    params.v_raw = make_rows(op.v_raw);
    params.v_raw_dtype = op.v_raw.dtype;
  }

  const bool column_terms = has_column_terms(plan, static_cast<bool>(op.delta), params.k_tokens);
  const bool f16_accumulator = plan.f16_accumulator || plan.kernel == Kernel::kSage2PP;
  const int64_t planes = op.q.batch() * op.q.heads();
  const auto launch = [&](const AttentionParams& params, const Masking& masking) {
    choose(is_general(masking) || is_beyond(plan, params.k_tokens), plan, [&](auto head_dim, auto general) {
      constexpr int kHeadDim = decltype(head_dim)::value;
      constexpr bool kGeneral = decltype(general)::value;
      if (kGeneral && plan.kernel == Kernel::kSageInt8) return launch_sage_int8_for<kHeadDim>(params, planes, stream);
      if (plan.fp8_products || plan.int4_products) {
        return launch_codes_for<kHeadDim, kGeneral>(params, plan.int4_products, plan.fp8_products, f16_accumulator,
                                                    planes, stream);
      }
      launch_sage_for<kHeadDim, kGeneral>(params, f16_accumulator, column_terms, planes, stream);
    });
  };
  launch_masked(params, op.masking, op.mask_tiles, plan, planes, stream, launch);
}

}  // namespace sage::cuda
