// From a packed operation to the instance of the sage2 kernel that its head dimension and exponential take.
#include "sage2_attention.cuh"

namespace sage::cuda::sm90 {
namespace {

using namespace sage2;

// K and V of this many bytes stay in the cache: causal items of so many heads are taken together.
constexpr int64_t kCachedBytes = int64_t{24} << 20;

float largest_finite(DType dtype) {
  return dtype == DType::kF16 ? 65504.0f : dtype == DType::kBF16 ? 0x1.fep127f : 0x1.fffffep127f;
}

bool takes_vectors(const View& o) {
  const auto multiple = [&](int axis) { return o.shape[axis] == 1 || o.stride[axis] % 8 == 0; };
  return bits_per_element(o.dtype) == 16 && o.channels() % 8 == 0 && o.stride[3] == 1 && multiple(0) && multiple(1) &&
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
  params.vectors = takes_vectors(op.o);
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
  params.causal = op.causal;
  params.whole_mean = op.plan.smooth_v;
  params.largest = largest_finite(op.v.dtype);
  params.tiles = static_cast<int>((op.k.tokens() + op.plan.block_k - 1) / op.plan.block_k);
  return params;
}

namespace {

template <class C>
void launch(const Sage2Op& op, cudaStream_t stream) {
  const Sage2Params params = make_params(op);
  int device = 0, multiprocessors = 0;
  SAGE_CUDA(cudaGetDevice(&device));
  SAGE_CUDA(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  SAGE_CUDA(cudaFuncSetAttribute(sage2_kernel<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSharedBytes));
  const unsigned blocks = std::min(static_cast<unsigned>(multiprocessors), params.items);
  launch_overlapped(sage2_kernel<C>, blocks, kThreads, C::kSharedBytes, stream, params);
}

template <int kHeadDim>
void launch_for(const Sage2Op& op, cudaStream_t stream) {
  if (op.plan.fast_exponential) {
    launch<Sage2Config<kHeadDim, true>>(op, stream);
  } else {
    launch<Sage2Config<kHeadDim, false>>(op, stream);
  }
}

}  // namespace

void launch_sage2_attention(const Sage2Op& op, CUstream_st* stream) {
  if (op.plan.band) return launch_band_attention(op, stream);
  switch (op.plan.padded_head_dim) {
    case 64: return launch_for<64>(op, stream);
    case 128: return launch_for<128>(op, stream);
    default: return launch_for<256>(op, stream);
  }
}

}  // namespace sage::cuda::sm90
