// From checked operations to the parameters of the sm_90a kernels with 16-bit P.V.
#include "flash.h"
#include "flash_launch.h"

namespace sage::cuda::sm90 {

extern template void launch_flash_for<64>(const F16Params&, const Operands&, F16Mask, cudaStream_t);
extern template void launch_flash_for<128>(const F16Params&, const Operands&, F16Mask, cudaStream_t);
extern template void launch_flash_for<256>(const F16Params&, const Operands&, F16Mask, cudaStream_t);
extern template void launch_sage1_for<64>(const F16Params&, const Operands&, F16Mask, cudaStream_t);
extern template void launch_sage1_for<128>(const F16Params&, const Operands&, F16Mask, cudaStream_t);
extern template void launch_sage1_for<256>(const F16Params&, const Operands&, F16Mask, cudaStream_t);

namespace {

float largest_finite(DType dtype) {
  return dtype == DType::kF16 ? 65504.0f : dtype == DType::kBF16 ? 0x1.fep127f : 0x1.fffffep127f;
}

Raw raw(const View& view) {
  return {static_cast<const char*>(view.data), {view.stride[0], view.stride[1], view.stride[2], view.stride[3]}};
}

// What takes an F16Mask, for the mask of a call: where it may be open as a whole, what needs none is launched first.
template <class Launch>
void launch_masked(F16Params& params, const Masking& masking, const MaskTiles& tiles, int block_q, Launch launch) {
  if (masking.mask) {
    const double scores = static_cast<double>(params.planes) * params.q_tokens * params.k_tokens;
    params.mask = make_tile_mask(masking.mask, tiles, block_q);
    params.whole_mask = make_whole_mask(masking.mask, tiles, block_q, scores);
    if (params.whole_mask.tiles != nullptr) {
      Masking unmasked = masking;
      unmasked.mask = View{};
      launch(f16_mask(unmasked));
    }
  }
  launch(f16_mask(masking));
}

const float* f32(const View& view) { return static_cast<const float*>(view.data); }

F16Params make_params(const View& q, const View& k, const View& v, const View& o, const View& lse,
                      const Masking& masking, float scale) {
  F16Params params{};
  params.o = static_cast<char*>(o.data);
  params.lse = static_cast<float*>(lse.data);
  bool wide = o.dtype != DType::kF32 && reinterpret_cast<uintptr_t>(o.data) % 16 == 0 && o.channels() % 8 == 0 &&
              o.stride[3] == 1;
  for (int i = 0; i < 4; i++) {
    params.o_stride[i] = o.stride[i];
    if (i < 3) wide = wide && (o.stride[i] % 8 == 0 || o.shape[i] == 1);
  }
  for (int i = 0; i < 3; i++) params.lse_stride[i] = lse.stride[i];
  params.out_dtype = o.dtype;
  params.wide_o = wide;
  params.q_tokens = static_cast<int>(q.tokens());
  params.k_tokens = static_cast<int>(k.tokens());
  params.v_dim = static_cast<int>(o.channels());
  // Further away is no other bound.
  const auto bound = [&](bool limited, int64_t at, int64_t none) {
    return static_cast<int>(limited ? std::clamp<int64_t>(at, -q.tokens(), k.tokens()) : none);
  };
  params.low = bound(masking.before != kUnlimited, masking.offset - masking.before, -q.tokens());
  params.high = bound(masking.after != kUnlimited, masking.offset + masking.after, k.tokens());
  params.q_heads = Divisor(static_cast<int>(q.heads()));
  params.group = Divisor(static_cast<int>(q.heads() / k.heads()));
  params.kv_heads = static_cast<int>(k.heads());
  params.planes = static_cast<int>(q.batch() * q.heads());
  params.scale_log2 = scale * kLog2e;
  params.largest = largest_finite(v.dtype);
  params.raw_v = raw(v);
  return params;
}

}  // namespace

void launch_flash(const AttentionOp& op, const MaskTiles& tiles, CUstream_st* stream) {
  F16Params params = make_params(op.q, op.k, op.v, op.o, op.lse, op.masking, op.scale);
  const Operands operands{op.q, op.k, op.v};
  launch_masked(params, op.masking, tiles, op.plan.block_q, [&](F16Mask mask) {
    switch (op.plan.padded_head_dim) {
      case 64: return launch_flash_for<64>(params, operands, mask, stream);
      case 128: return launch_flash_for<128>(params, operands, mask, stream);
      default: return launch_flash_for<256>(params, operands, mask, stream);
    }
  });
}

void launch_sage1(const SageOp& op, CUstream_st* stream) {
  F16Params params = make_params(op.q, op.k, op.v, op.o, op.lse, op.masking, op.scale);
  params.largest = largest_finite(op.v_dtype);
  params.q_scales = f32(op.q_scales);
  params.k_scales = f32(op.k_scales);
  params.q_groups = static_cast<int>(op.q_scales.tokens());
  params.k_groups = static_cast<int>(op.k_scales.tokens());
  params.q_grouping = op.plan.q_grouping;
  params.q_group_rows = op.plan.q_grouping == Grouping::kToken ? 1 : static_cast<int>(op.plan.q_group_rows);
  params.k_lane_groups = op.plan.k_grouping == Grouping::kThreadKey ? 4 : 1;
  params.q_not_finite = op.q_not_finite;
  params.k_not_finite = op.k_not_finite;
  params.q_words = (params.q_tokens + 31) / 32;
  params.k_words = (params.k_tokens + 31) / 32;
  if (op.q_raw && op.k_raw) {
    params.raw_q = raw(op.q_raw);
    params.raw_k = raw(op.k_raw);
    params.raw_dtype = op.q_raw.dtype;
    params.head_dim = static_cast<int>(op.q_raw.channels());
  }
  params.v_scales = f32(op.v_scales);
  params.v_mean = f32(op.v_mean);
  params.lse_shift = f32(op.lse_shift);
  const Operands operands{op.q, op.k, op.v};
  launch_masked(params, op.masking, op.mask_tiles, op.plan.block_q, [&](F16Mask mask) {
    switch (op.plan.padded_head_dim) {
      case 64: return launch_sage1_for<64>(params, operands, mask, stream);
      case 128: return launch_sage1_for<128>(params, operands, mask, stream);
      default: return launch_sage1_for<256>(params, operands, mask, stream);
    }
  });
}

}  // namespace sage::cuda::sm90
