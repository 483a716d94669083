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
  int64_t heads;         // of a batch
  const uint32_t* amax;  // [planes, channels of x]
};

// kCommon: octets are vectors, a head has one mean at most, and codes have the rows of x.
template <DType kType, DType kCode, bool kCommon>
__global__ void __maxnreg__(kType == DType::kF32 ? 128 : 80)
    quantize_channels_kernel(const __grid_constant__ ChannelArguments a, Place corner) {
  extern __shared__ float4 shared[];
  float* const inverses = reinterpret_cast<float*>(shared);  // of channels
  const int lane = threadIdx.y, step = blockDim.y, octets = blockDim.x, channel = threadIdx.x * 8;
  const Place place = place_from_the_end(corner);
  const int64_t base = place.tile * (kRows * step);
  const int rows = static_cast<int>(min(a.codes.tokens - base, int64_t{kRows * step}));
  const char* const from = plane_of(a.x, place.plane);
  char* const codes = plane_of(a.codes, place.plane);
  Octet<kType> raw[kCommon ? kRows : 1];
  if constexpr (kCommon) load<true>(raw, a.x, from, base + lane, step, a.x.tokens, channel);
  std::conditional_t<kCommon, SharedMean, MeanOctet> mean(a.means, place.plane, base, channel);

  const uint32_t* const amax = a.amax + (place.plane.batch * a.heads + place.plane.head) * a.x.channels;
#pragma unroll 1
  for (int c = lane * octets + threadIdx.x; c < octets * 8; c += octets * step) {
    const bool known = c < a.x.channels;
    const Scale scale = make_scale(known ? float_of(amax[c]) : 0.0f, a.range);
    inverses[c] = scale.inverse;
    if (known && base == 0) float_at(a.scales, plane_of(a.scales, place.plane), 0, c) = scale.scale;
  }
  __syncthreads();
  float inverse[8];
  memcpy(inverse, shared + threadIdx.x * 2, sizeof(inverse));
  const auto inverse_of = [&](int j) { return inverse[j]; };

  if constexpr (kCommon) {
    char* to = row_of(a.codes, codes, base + lane);
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < kRows; i++, to += step * a.codes.token_stride) {
      float x[8];
      unpack(raw[i], x);
#pragma unroll
      for (int j = 0; j < 8; j++) {
        x[j] -= mean[j];
        largest = magnitude(largest, x[j]);
      }
      if (lane + i * step < rows) store<true>(encode_finite<kCode>(x, inverse_of), a.codes, to, channel);
    }
    if (largest < INFINITY) return;
  }
  // Any values; where one of the above is not finite, all of them again.
#pragma unroll 1
  for (int local = lane; local < rows; local += step) {
    float x[8] = {};
    if (base + local < a.x.tokens) {
      Octet<kType> octet[1];
      load<kCommon>(octet, a.x, from, base + local, 1, a.x.tokens, channel);
      mean.seek(local);
      unpack(octet[0], x);
#pragma unroll
      for (int j = 0; j < 8; j++) x[j] -= mean[j];
    }
    char* const to = row_of(a.codes, codes, base + local);
    store<kCommon>(encode_any<kCode>(x, inverse_of), a.codes, to, channel);
  }
}

}  // namespace

void launch_quantize_channels(const QuantizeOp& op, uint32_t* amax, cudaStream_t stream) {
  launch_column_amax(op.x, op.mean, op.mean_rows, amax, stream);
  const dim3 block = block_of(op.codes.channels());
  ChannelArguments a{};
  a.x = make_tensor(op.x);
  a.codes = make_tensor(op.codes);
  a.scales = make_tensor(op.scales);
  a.means = make_means(op.mean, op.mean_rows);
  a.range = op.range;
  a.heads = op.x.heads();
  a.amax = amax;
  const bool common = a.x.vectors && a.codes.vectors && one_mean_a_head(a.means) && op.codes.tokens() == op.x.tokens();
  const size_t shared = block.x * 8 * sizeof(float);
  for_float_type(op.x.dtype, [&](auto type) {
    for_code_type(op.codes.dtype, [&](auto code) {
      constexpr DType kType = decltype(type)::value, kCode = decltype(code)::value;
      launch_grid(op.codes, tiles_of(op.codes.tokens(), kRows * block.y), [&](dim3 grid, Place corner) {
        if (common)
          quantize_channels_kernel<kType, kCode, true><<<grid, block, shared, stream>>>(a, corner);
        else
          quantize_channels_kernel<kType, kCode, false><<<grid, block, shared, stream>>>(a, corner);
      });
    });
  });
}

}  // namespace sage::cuda
