// From a packed operation to the parameters of the sage2 kernel, and to the instances of its head dimension.
#include "sage2_launch.cuh"

namespace sage::cuda::sm90 {
namespace {

using namespace sage2;

// K and V of this many bytes stay in the cache: causal items of so many heads are taken together.
constexpr int64_t kCachedBytes = int64_t{24} << 20;

float largest_finite(DType dtype) {
  return dtype == DType::kF16 ? 65504.0f : dtype == DType::kBF16 ? 0x1.fep127f : 0x1.fffffep127f;
}

// The band's outputs have no more than 16 bits on their way.
bool takes_vectors(const View& o, bool band) {
  const int bytes = bits_per_element(o.dtype) / 8;
  const auto multiple = [&](int axis) { return o.shape[axis] == 1 || o.stride[axis] * bytes % 16 == 0; };
  return !(band && bytes > 2) && o.channels() % 8 == 0 && o.stride[3] == 1 && multiple(0) && multiple(1) &&
         multiple(2) && reinterpret_cast<uintptr_t>(o.data) % 16 == 0;
}

}  // namespace

Sage2Params sage2::make_params(const Sage2Op& op) {
  Sage2Params params{};
  params.packed = op.packed;
  params.o = static_cast<char*>(op.o.data);
  params.lse = static_cast<float*>(op.lse.data);
  params.adds_lse = op.adds_lse;
  for (int i = 0; i < 4; i++) params.o_stride[i] = op.o.stride[i];
  for (int i = 0; i < 3; i++) params.lse_stride[i] = op.lse.stride[i];
  params.out_dtype = op.o.dtype;
  params.vectors = takes_vectors(op.o, op.plan.band);
  params.q_tokens = static_cast<int>(op.q.tokens());
  params.k_tokens = static_cast<int>(op.k.tokens());
  params.v_dim = static_cast<int>(op.v.channels());
  params.q_heads = Divisor(static_cast<uint32_t>(op.q.heads()));
  params.group = Divisor(static_cast<uint32_t>(op.q.heads() / op.k.heads()));
  params.kv_heads = static_cast<int>(op.k.heads());
  const int64_t blocks = (op.q.tokens() + kBlockM - 1) / kBlockM, planes = op.q.batch() * op.q.heads();
  params.q_blocks = Divisor(static_cast<uint32_t>(blocks));
  params.planes = static_cast<uint32_t>(planes);
  params.items = static_cast<uint32_t>(planes * blocks);
  const int64_t bytes = 2 * op.k.tokens() * op.plan.padded_head_dim, group = op.q.heads() / op.k.heads();
  const int64_t run = std::clamp<int64_t>(kCachedBytes / bytes * group, 1, planes);
  params.run_planes = Divisor(static_cast<uint32_t>(run));
  params.run_items = Divisor(static_cast<uint32_t>(run * blocks));
  params.last_run_planes = Divisor(static_cast<uint32_t>(planes % run == 0 ? run : planes % run));
  const Masking& masking = op.masking;
  const int64_t reach = op.q.tokens() + op.k.tokens();  // as good as no bound
  const bool ends = masking.after != kUnlimited, begins = masking.before != kUnlimited;
  params.high = static_cast<int>(std::clamp(ends ? masking.offset + masking.after : reach, -reach, reach));
  params.low = static_cast<int>(std::clamp(begins ? masking.offset - masking.before : -reach, -reach, reach));
  params.begins = begins;
  params.longest_first = ends && !begins;
  params.whole_mean = op.plan.smooth_v;
  params.largest = largest_finite(op.v.dtype);
  if (masking.mask) {
    const MaskTiles tiles{op.mask_tiles, op.mask_bits};
    const double scores = static_cast<double>(planes) * params.q_tokens * params.k_tokens;
    params.mask = make_tile_mask(masking.mask, tiles, kBlockM);
    params.whole_mask = make_whole_mask(masking.mask, tiles, kBlockM, scores);
  }
  params.tiles = static_cast<int>((op.k.tokens() + op.plan.block_k - 1) / op.plan.block_k);
  return params;
}

void launch_sage2_attention(const Sage2Op& op, CUstream_st* stream) {
  if (op.plan.band) {
    switch (op.plan.padded_head_dim) {
      case 64: return launch_band_d64(op, stream);
      case 128: return launch_band_d128(op, stream);
      default: return launch_band_d256(op, stream);
    }
  }
  const Sage2Params params = make_params(op);
  if (op.plan.kernel == Kernel::kSage2PP) {
    switch (op.plan.padded_head_dim) {
      case 64: return launch_sage2pp_d64(op, params, stream);
      case 128: return launch_sage2pp_d128(op, params, stream);
      default: return launch_sage2pp_d256(op, params, stream);
    }
  }
  if (op.masking.mask) {
    switch (op.plan.padded_head_dim) {
      case 64: launch_sage2_masked_d64(op, params, stream); break;
      case 128: launch_sage2_masked_d128(op, params, stream); break;
      default: launch_sage2_masked_d256(op, params, stream);
    }
    if (params.whole_mask.tiles == nullptr) return;
  }
  switch (op.plan.padded_head_dim) {
    case 64: return launch_sage2_d64(op, params, stream);
    case 128: return launch_sage2_d128(op, params, stream);
    default: return launch_sage2_d256(op, params, stream);
  }
}

}  // namespace sage::cuda::sm90
