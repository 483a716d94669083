// Quantization with one scale a channel, over all tokens: one pass for the scales, one for the codes.
#include "columns.h"
#include "encode.cuh"
#include "quantize_channels.h"

namespace sage::cuda {
namespace {

constexpr int kRows = 8;  // of one thread

struct ChannelArguments {
  Tensor x, codes, scales;
  Means means;
  float range;
  int64_t heads, tiles;  // of one head
  const uint32_t* amax;  // [planes, channels of x]
};

template <DType kType, DType kCode>
__global__ void __maxnreg__(kType == DType::kF32 ? 128 : 80)
    quantize_channels_kernel(const __grid_constant__ ChannelArguments a, int64_t last) {
  const int lane = threadIdx.y, step = blockDim.y, channel = threadIdx.x * 8;
  const int64_t item = last - blockIdx.x, tile = item % a.tiles, plane = item / a.tiles;
  const Plane where{plane / a.heads, plane % a.heads};
  const int64_t base = tile * (kRows * step);
  Octet<kType> raw[kRows];
  load_rows(raw, a.x, plane_of(a.x, where), base + lane, step, a.x.tokens, channel);

  float inverses[8];
#pragma unroll
  for (int j = 0; j < 8; j++) {
    const bool known = channel + j < a.x.channels;
    const Scale scale =
        make_scale(known ? float_of(__ldg(&a.amax[plane * a.x.channels + channel + j])) : 0.0f, a.range);
    inverses[j] = scale.inverse;
    if (tile == 0 && lane == 0 && known) float_at(a.scales, plane_of(a.scales, where), 0, channel + j) = scale.scale;
  }

  MeanOctet mean(a.means, where, base, channel);
  char* to = row_of(a.codes, plane_of(a.codes, where), base + lane);
  const int rows = static_cast<int>(min(a.codes.tokens - base, int64_t{kRows * step}));
  const int known_rows = static_cast<int>(min(a.x.tokens - base, int64_t{kRows * step}));
#pragma unroll
  for (int i = 0; i < kRows; i++, to += step * a.codes.token_stride) {
    const int local = lane + i * step;
    if (local >= rows) break;
    Octet<kCode> code = {};
    if (local < known_rows) {
      mean.seek(local);
      float x[8], largest = 0.0f;
      unpack(raw[i], x);
#pragma unroll
      for (int j = 0; j < 8; j++) {
        x[j] -= mean[j];
        largest = magnitude(largest, x[j]);
      }
      const auto each = [&](int j) { return inverses[j]; };
      code = largest < INFINITY ? encode_finite<kCode>(x, each) : encode_any<kCode>(x, each);
    }
    store_octet(code, a.codes, to, channel);
  }
}

}  // namespace

void launch_quantize_channels(const QuantizeOp& op, uint32_t* amax, cudaStream_t stream) {
  launch_column_amax(op.x, op.mean, op.mean_rows, amax, stream);
  const dim3 block = block_of(op.codes.channels());
  const int64_t tile_rows = kRows * block.y;
  ChannelArguments a{};
  a.x = make_tensor(op.x);
  a.codes = make_tensor(op.codes);
  a.scales = make_tensor(op.scales);
  a.means = make_means(op.mean, op.mean_rows);
  a.range = op.range;
  a.heads = op.x.heads();
  a.tiles = (op.codes.tokens() + tile_rows - 1) / tile_rows;
  a.amax = amax;
  const int64_t items = op.x.batch() * op.x.heads() * a.tiles;
  for_float_type(op.x.dtype, [&](auto type) {
    for_code_type(op.codes.dtype, [&](auto code) {
      launch_items(items, [&](int64_t first, unsigned blocks) {
        quantize_channels_kernel<decltype(type)::value, decltype(code)::value>
            <<<blocks, block, 0, stream>>>(a, items - 1 - first);
      });
    });
  });
}

}  // namespace sage::cuda
