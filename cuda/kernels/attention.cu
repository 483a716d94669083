// From checked operations to the sm_80 attention kernels: parameters, and which instance a head dimension takes.
#include "attention_sm80.cuh"

namespace sage::cuda {

extern template void launch_flash_for<64>(const AttentionParams&, DType, int64_t, cudaStream_t);
extern template void launch_flash_for<128>(const AttentionParams&, DType, int64_t, cudaStream_t);
extern template void launch_flash_for<256>(const AttentionParams&, DType, int64_t, cudaStream_t);
extern template void launch_sage1_for<64>(const AttentionParams&, bool, bool, int64_t, cudaStream_t);
extern template void launch_sage1_for<128>(const AttentionParams&, bool, bool, int64_t, cudaStream_t);
extern template void launch_sage1_for<256>(const AttentionParams&, bool, bool, int64_t, cudaStream_t);

namespace {

float largest_finite(DType dtype) {
  return dtype == DType::kF16 ? 65504.0f : dtype == DType::kBF16 ? 0x1.fep127f : 0x1.fffffep127f;
}

// What `flash` and `sage1` have in common.
AttentionParams make_params(const View& q, const View& k, const View& v, const View& o, const View& lse, bool causal,
                            float scale) {
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
  params.causal = causal;
  params.scale_log2 = scale * kLog2e;
  params.largest = largest_finite(v.dtype);
  return params;
}

const float* f32(const View& view) { return static_cast<const float*>(view.data); }

}  // namespace

void launch_flash(const AttentionOp& op, cudaStream_t stream) {
  const AttentionParams params = make_params(op.q, op.k, op.v, op.o, op.lse, op.causal, op.scale);
  const int64_t planes = op.q.batch() * op.q.heads();
  switch (op.plan.padded_head_dim) {
    case 64: return launch_flash_for<64>(params, op.q.dtype, planes, stream);
    case 128: return launch_flash_for<128>(params, op.q.dtype, planes, stream);
    default: return launch_flash_for<256>(params, op.q.dtype, planes, stream);
  }
}

void launch_sage1(const Sage1Op& op, cudaStream_t stream) {
  AttentionParams params = make_params(op.q, op.k, op.v, op.o, op.lse, op.causal, op.scale);
  params.v_dim = static_cast<int>(op.o.channels());
  params.largest = largest_finite(op.v_dtype);
  params.q_scales = f32(op.q_scales);
  params.k_scales = f32(op.k_scales);
  params.q_groups = static_cast<int>(op.q_scales.tokens());
  params.k_groups = static_cast<int>(op.k_scales.tokens());
  params.q_grouping = op.plan.q_grouping;
  params.k_grouping = op.plan.k_grouping;
  params.q_group_rows = static_cast<int>(op.plan.q_group_rows);
  params.k_group_rows = static_cast<int>(op.plan.k_group_rows);
  params.q_not_finite = op.q_not_finite;
  params.k_not_finite = op.k_not_finite;
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
  params.lse_shift = f32(op.lse_shift);

  // One factor a lane, row and tile suffices where a tile's keys are one run of groups.
  const bool whole_tiles = op.plan.k_grouping != Grouping::kToken && op.plan.k_group_rows == op.plan.block_k;
  const bool column_terms = op.delta || !whole_tiles;
  const int64_t planes = op.q.batch() * op.q.heads();
  switch (op.plan.padded_head_dim) {
    case 64: return launch_sage1_for<64>(params, op.plan.f16_accumulator, column_terms, planes, stream);
    case 128: return launch_sage1_for<128>(params, op.plan.f16_accumulator, column_terms, planes, stream);
    default: return launch_sage1_for<256>(params, op.plan.f16_accumulator, column_terms, planes, stream);
  }
}

}  // namespace sage::cuda
