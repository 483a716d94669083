// V as the FP16 P.V product takes it: every channel scaled by a power of two into FP16's range.
#include "columns.h"
#include "tile.cuh"
#include "workspace.h"

namespace sage::cuda {
namespace {

constexpr int kRows = 8;  // of one thread

struct ValueArguments {
  Tensor v, v16, scales;
  Means means;
  float largest;
  int64_t heads, tiles;  // of one head
  const uint32_t* amax;  // [planes, channels of v]
};

// The exponent field of the smallest power of two that brings amax down to `largest`; that of 1 for zeros. Far
// smaller values need no more than 2^-100: what they add to a sum cannot be seen.
__device__ __forceinline__ uint32_t scale_exponent(float amax, float largest) {
  if (amax == 0.0f) return 127;
  return max((bits_of(amax / largest) + 0x7fffffu) >> 23, 127u - 100u);
}

template <DType kType>
__global__ void __maxnreg__(kType == DType::kF32 ? 128 : 80)
    values_kernel(const __grid_constant__ ValueArguments a, int64_t last) {
  const int lane = threadIdx.y, step = blockDim.y, channel = threadIdx.x * 8;
  const int64_t item = last - blockIdx.x, tile = item % a.tiles, plane = item / a.tiles;
  const Plane where{plane / a.heads, plane % a.heads};
  const int64_t base = tile * (kRows * step);
  Octet<kType> raw[kRows];
  load_rows(raw, a.v, plane_of(a.v, where), base + lane, step, a.v.tokens, channel);

  float inverse[8];
#pragma unroll
  for (int j = 0; j < 8; j++) {
    const bool known = channel + j < a.v.channels;
    const float amax = known ? float_of(__ldg(&a.amax[plane * a.v.channels + channel + j])) : 0.0f;
    const uint32_t exponent = scale_exponent(amax, a.largest);
    inverse[j] = float_of((254 - exponent) << 23);
    if (tile == 0 && lane == 0 && known) {
      float_at(a.scales, plane_of(a.scales, where), 0, channel + j) = float_of(exponent << 23);
    }
  }

  MeanOctet mean(a.means, where, base, channel);
  mean.seek(0);
  char* to = row_of(a.v16, plane_of(a.v16, where), base + lane);
  const int rows = static_cast<int>(min(a.v.tokens - base, int64_t{kRows * step}));
#pragma unroll
  for (int i = 0; i < kRows; i++, to += step * a.v16.token_stride) {
    const int local = lane + i * step;
    if (local >= rows) break;
    float x[8];
    unpack(raw[i], x);
#pragma unroll
    for (int j = 0; j < 8; j++) x[j] = (x[j] - mean[j]) * inverse[j];
    store_octet(pack<DType::kF16>(x), a.v16, to, channel);
  }
}

}  // namespace

size_t values_scratch_bytes(const View& v) { return column_scratch_bytes(v.batch() * v.heads(), v.channels()); }

void launch_values(const View& v, const View& mean, float largest, const View& v16, const View& scales, void* scratch,
                   cudaStream_t stream) {
  auto* const amax = static_cast<uint32_t*>(scratch);
  launch_column_amax(v, mean, v.tokens(), amax, stream);
  const dim3 block = block_of(v16.channels());
  const int64_t tile_rows = kRows * block.y;
  ValueArguments a{};
  a.v = make_tensor(v);
  a.v16 = make_tensor(v16);
  a.scales = make_tensor(scales);
  a.means = make_means(mean, v.tokens());
  a.largest = largest;
  a.heads = v.heads();
  a.tiles = (v.tokens() + tile_rows - 1) / tile_rows;
  a.amax = amax;
  const int64_t items = v.batch() * v.heads() * a.tiles;
  for_float_type(v.dtype, [&](auto type) {
    launch_items(items, [&](int64_t first, unsigned blocks) {
      values_kernel<decltype(type)::value><<<blocks, block, 0, stream>>>(a, items - 1 - first);
    });
  });
}

}  // namespace sage::cuda
