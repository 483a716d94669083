// V as the FP16 P.V product takes it: every channel scaled by a power of two into FP16's range, or its codes.
#include "columns.h"
#include "encode.cuh"
#include "workspace.h"

namespace sage::cuda {
namespace {

constexpr int kRows = 8;  // of one thread

struct ValueArguments {
  Tensor v, v16, scales;
  Means means;
  float range;
  int64_t heads;         // of a batch
  const uint32_t* amax;  // [planes, channels of v]
  uint32_t* not_finite;  // [planes, words], zeros so far, or null
  int64_t words;         // of one head
};

// The exponent field of the smallest power of two that brings amax down to `largest`; that of 1 for zeros. Far
// smaller values need no more than 2^-100: what they add to a sum cannot be seen.
__device__ __forceinline__ uint32_t scale_exponent(float amax, float largest) {
  if (amax == 0.0f) return 127;
  return max((bits_of(amax / largest) + 0x7fffffu) >> 23, 127u - 100u);
}

template <DType kCodes>
__device__ __forceinline__ Scale value_scale(float amax, float range) {
  if constexpr (kCodes != DType::kF16) return make_scale(amax, range);
  const uint32_t exponent = scale_exponent(amax, range);
  return {float_of(exponent << 23), float_of((254 - exponent) << 23)};
}

// Codes as numbers; what is not finite stays.
template <DType kCodes>
__device__ __forceinline__ void encode(float (&x)[8], const float (&inverse)[8]) {
  if constexpr (kCodes == DType::kF16) {
#pragma unroll
    for (int j = 0; j < 8; j++) x[j] *= inverse[j];
  } else {
    float code[8];
    unpack(encode_finite<kCodes>(x, [&](int j) { return inverse[j]; }), code);
#pragma unroll
    for (int j = 0; j < 8; j++) x[j] = is_finite(x[j]) ? code[j] : x[j];
  }
}

// kCommon: octets are vectors and a head has one mean at most.
template <DType kType, DType kCodes, bool kCommon>
__global__ void __maxnreg__(kType == DType::kF32 ? 128 : 80)
    values_kernel(const __grid_constant__ ValueArguments a, Place corner) {
  extern __shared__ float4 shared[];
  float* const inverses = reinterpret_cast<float*>(shared);  // of channels
  constexpr int kHeld = kCommon ? kRows : 1;                 // rows a thread loads at once
  const int lane = threadIdx.y, step = blockDim.y, octets = blockDim.x, channel = threadIdx.x * 8;
  const Place place = place_from_the_end(corner);
  const int64_t base = place.tile * (kRows * step);
  const int rows = static_cast<int>(min(a.v.tokens - base, int64_t{kRows * step}));
  const char* const from = plane_of(a.v, place.plane);
  char* const v16 = plane_of(a.v16, place.plane);
  Octet<kType> raw[kHeld];
  if constexpr (kCommon) load<true>(raw, a.v, from, base + lane, step, a.v.tokens, channel);
  std::conditional_t<kCommon, SharedMean, MeanOctet> mean(a.means, place.plane, base, channel);

  const uint32_t* const amax = a.amax + (place.plane.batch * a.heads + place.plane.head) * a.v.channels;
#pragma unroll 1
  for (int c = lane * octets + threadIdx.x; c < octets * 8; c += octets * step) {
    const bool known = c < a.v.channels;
    const Scale scale = value_scale<kCodes>(known ? float_of(amax[c]) : 0.0f, a.range);
    inverses[c] = scale.inverse;
    if (known && base == 0) float_at(a.scales, plane_of(a.scales, place.plane), 0, c) = scale.scale;
  }
  __syncthreads();
  float inverse[8];
  memcpy(inverse, shared + threadIdx.x * 2, sizeof(inverse));

#pragma unroll 1
  for (int first = lane; first < rows; first += kHeld * step) {
    if constexpr (!kCommon) load<false>(raw, a.v, from, base + first, step, a.v.tokens, channel);
    char* to = row_of(a.v16, v16, base + first);
#pragma unroll
    for (int i = 0; i < kHeld; i++, to += step * a.v16.token_stride) {
      mean.seek(first + i * step);
      float x[8];
      unpack(raw[i], x);
#pragma unroll
      for (int j = 0; j < 8; j++) x[j] -= mean[j];
      if (a.not_finite != nullptr) {
        bool finite = true;
#pragma unroll
        for (int j = 0; j < 8; j++) finite &= is_finite(x[j]);
        const int64_t row = base + first + i * step;
        if (!finite && row < a.v.tokens) {
          const int64_t plane = place.plane.batch * a.heads + place.plane.head;
          atomicOr(&a.not_finite[plane * a.words + row / 32], 1u << row % 32);
        }
      }
      encode<kCodes>(x, inverse);
      if (first + i * step < rows) store<kCommon>(pack<DType::kF16>(x), a.v16, to, channel);
    }
    if constexpr (kCommon) return;
  }
}

}  // namespace

size_t values_scratch_bytes(const View& v) { return column_scratch_bytes(v.batch() * v.heads(), v.channels()); }

void launch_values(const View& v, const View& mean, DType codes, float range, const View& v16, const View& scales,
                   uint32_t* not_finite, void* scratch, cudaStream_t stream) {
  auto* const amax = static_cast<uint32_t*>(scratch);
  launch_column_amax(v, mean, v.tokens(), amax, stream);
  const dim3 block = block_of(v16.channels());
  ValueArguments a{};
  a.v = make_tensor(v);
  a.v16 = make_tensor(v16);
  a.scales = make_tensor(scales);
  a.means = make_means(mean, v.tokens());
  a.range = range;
  a.heads = v.heads();
  a.amax = amax;
  a.words = tiles_of(v.tokens(), 32);
  a.not_finite = not_finite;
  if (not_finite != nullptr) {
    SAGE_CUDA(cudaMemsetAsync(not_finite, 0, v.batch() * v.heads() * a.words * sizeof(uint32_t), stream));
  }
  const bool common = a.v.vectors && a.v16.vectors && one_mean_a_head(a.means);
  const size_t shared = block.x * 8 * sizeof(float);
  const auto launch = [&](auto kernel) {
    launch_grid(v, tiles_of(v.tokens(), kRows * block.y),
                [&](dim3 grid, Place corner) { kernel<<<grid, block, shared, stream>>>(a, corner); });
  };
  for_float_type(v.dtype, [&](auto type) {
    constexpr DType kType = decltype(type)::value;
    const auto launch_codes = [&](auto code) {
      constexpr DType kCodes = decltype(code)::value;
      common ? launch(values_kernel<kType, kCodes, true>) : launch(values_kernel<kType, kCodes, false>);
    };
    switch (codes) {
      case DType::kI8: return launch_codes(TypeOf<DType::kI8>{});
      case DType::kE4M3: return launch_codes(TypeOf<DType::kE4M3>{});
      default: return launch_codes(TypeOf<DType::kF16>{});
    }
  });
}

}  // namespace sage::cuda
