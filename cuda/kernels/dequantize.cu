// Codes back to numbers, and the rows of codes that mark values which were not finite.
#include "tile.cuh"

namespace sage::cuda {
namespace {

constexpr int kRows = 8;  // of one thread

struct DequantizeArguments {
  Tensor codes, x, scales;
  Means means;
  Groups groups;
  bool per_channel;
  int64_t heads, tiles;  // of one head
};

template <DType kCode, DType kType>
__global__ void __maxnreg__(80) dequantize_kernel(const __grid_constant__ DequantizeArguments a, int64_t first) {
  const int lane = threadIdx.y, step = blockDim.y, channel = threadIdx.x * 8;
  const int64_t item = first + blockIdx.x, plane = item / a.tiles;
  const Plane where{plane / a.heads, plane % a.heads};
  const int64_t base = item % a.tiles * (kRows * step);
  Octet<kCode> codes[kRows];
  load_rows(codes, a.codes, plane_of(a.codes, where), base + lane, step, a.x.tokens, channel);

  char* const scales = plane_of(a.scales, where);
  float scale[8];
#pragma unroll
  for (int j = 0; j < 8; j++) {
    scale[j] = a.per_channel && channel + j < a.x.channels ? float_at(a.scales, scales, 0, channel + j) : 1.0f;
  }
  const GroupWindow groups(a.groups, base);
  MeanOctet mean(a.means, where, base, channel);
  char* to = row_of(a.x, plane_of(a.x, where), base + lane);
  const int rows = static_cast<int>(min(a.x.tokens - base, int64_t{kRows * step}));
#pragma unroll
  for (int i = 0; i < kRows; i++, to += step * a.x.token_stride) {
    const int local = lane + i * step;
    if (local >= rows) break;
    const float row_scale = a.per_channel ? 1.0f : float_at(a.scales, scales, groups.of(local), 0);
    float x[8];
    unpack(codes[i], x);
#pragma unroll
    for (int j = 0; j < 8; j++) x[j] *= a.per_channel ? scale[j] : row_scale;
    if (mean.present()) {
      mean.seek(local);
#pragma unroll
      for (int j = 0; j < 8; j++) x[j] += mean[j];
    }
    store_octet(pack<kType>(x), a.x, to, channel);
  }
}

// ---- codes that somebody else made ------------------------------------------------------------------------------

struct MarkerArguments {
  Tensor codes;
  uint32_t* not_finite;
  int64_t heads, words;  // of one head
};

// One block finds one word, a warp a row at a time.
constexpr int kMarkerWarps = 4;
__global__ void __launch_bounds__(kMarkerWarps * 32)
    find_markers_kernel(const __grid_constant__ MarkerArguments a, int64_t first) {
  __shared__ uint32_t found;
  const int64_t item = first + blockIdx.x, plane = item / a.words, word = item % a.words;
  const Plane where{plane / a.heads, plane % a.heads};
  const int rows = static_cast<int>(min(a.codes.tokens - word * 32, int64_t{32}));
  if (threadIdx.x == 0 && threadIdx.y == 0) found = 0;
  __syncthreads();
  for (int row = threadIdx.y; row < rows; row += kMarkerWarps) {
    Octet<DType::kI8> octet[1];
    load_rows(octet, a.codes, plane_of(a.codes, where), word * 32 + row, 1, a.codes.tokens, threadIdx.x * 8);
    const bool marked = (__vcmpeq4(octet[0].word[0], 0x80808080u) | __vcmpeq4(octet[0].word[1], 0x80808080u)) != 0;
    if (__any_sync(~0u, marked) && threadIdx.x == 0) atomicOr(&found, 1u << row);
  }
  __syncthreads();
  if (threadIdx.x == 0 && threadIdx.y == 0) a.not_finite[item] = found;
}

}  // namespace

void launch_dequantize(const QuantizeOp& op, cudaStream_t stream) {
  const dim3 block = block_of(op.x.channels());
  const int64_t tile_rows = kRows * block.y;
  DequantizeArguments a{};
  a.codes = make_tensor(op.codes);
  a.x = make_tensor(op.x);
  a.scales = make_tensor(op.scales);
  a.means = make_means(op.mean, op.mean_rows);
  a.groups = make_groups(op.grouping, op.group_rows);
  a.per_channel = op.per_channel;
  a.heads = op.x.heads();
  a.tiles = (op.x.tokens() + tile_rows - 1) / tile_rows;
  for_code_type(op.codes.dtype, [&](auto code) {
    for_float_type(op.x.dtype, [&](auto type) {
      launch_items(op.x.batch() * op.x.heads() * a.tiles, [&](int64_t first, unsigned blocks) {
        dequantize_kernel<decltype(code)::value, decltype(type)::value><<<blocks, block, 0, stream>>>(a, first);
      });
    });
  });
}

void launch_find_not_finite(const View& codes, uint32_t* not_finite, cudaStream_t stream) {
  MarkerArguments a{};
  a.codes = make_tensor(codes);
  a.not_finite = not_finite;
  a.heads = codes.heads();
  a.words = (codes.tokens() + 31) / 32;
  launch_items(codes.batch() * codes.heads() * a.words, [&](int64_t first, unsigned blocks) {
    find_markers_kernel<<<blocks, dim3(32, kMarkerWarps), 0, stream>>>(a, first);
  });
}

}  // namespace sage::cuda
