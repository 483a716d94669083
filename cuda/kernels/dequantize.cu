// Codes back to numbers, and the rows of codes that mark values which were not finite.
#include "tile.cuh"

namespace sage::cuda {
namespace {

constexpr int kRows = 16;  // of one thread

struct DequantizeArguments {
  Tensor codes, x, scales;
  Means means;
  Groups groups;
  bool per_channel;
};

// What a kernel is made for: scales of rows or of channels, where octets are vectors and a head has one mean at most;
// or anything.
enum class Case { kRowScales, kChannelScales, kAny };

// A mean that is absent counts as -0, which added to anything is nothing.
template <DType kCode, DType kType, Case kCase>
__global__ void __maxnreg__(80) dequantize_kernel(const __grid_constant__ DequantizeArguments a, Place corner) {
  extern __shared__ float row_scales[];
  constexpr bool kCommon = kCase != Case::kAny;
  constexpr int kHeld = kCommon ? kRows : 1;  // rows a thread loads at once
  const int lane = threadIdx.y, step = blockDim.y, channel = threadIdx.x * 8;
  const Place place = place_of_block(corner);
  const int64_t base = place.tile * (kRows * step);
  const int rows = static_cast<int>(min(a.x.tokens - base, int64_t{kRows * step}));
  const char* const from = plane_of(a.codes, place.plane);
  char* const numbers = plane_of(a.x, place.plane);
  char* const scales = plane_of(a.scales, place.plane);
  Octet<kCode> codes[kHeld];
  if constexpr (kCommon) load<true>(codes, a.codes, from, base + lane, step, a.x.tokens, channel);

  std::conditional_t<kCommon, SharedMean, MeanOctet> mean(a.means, place.plane, base, channel);
  const bool has_mean = a.means.tensor.data != nullptr;
  const bool per_channel = kCase == Case::kChannelScales || (kCase == Case::kAny && a.per_channel);
  float channel_scales[8];
#pragma unroll
  for (int j = 0; j < 8; j++) {
    channel_scales[j] = per_channel && channel + j < a.x.channels ? float_at(a.scales, scales, 0, channel + j) : 1.0f;
  }
  if (!per_channel) {
    const GroupWindow groups(a.groups, base);
#pragma unroll 1
    for (int local = lane * blockDim.x + threadIdx.x; local < rows; local += blockDim.x * step) {
      row_scales[local] = float_at(a.scales, scales, groups.of(local), 0);
    }
    __syncthreads();
  }

#pragma unroll 1
  for (int first = lane; first < rows; first += kHeld * step) {
    if constexpr (!kCommon) load<false>(codes, a.codes, from, base + first, step, a.x.tokens, channel);
    char* to = row_of(a.x, numbers, base + first);
#pragma unroll
    for (int i = 0; i < kHeld; i++, to += step * a.x.token_stride) {
      const int local = first + i * step;
      const float row_scale = kCase == Case::kChannelScales || per_channel ? 1.0f : row_scales[local];
      float x[8];
      unpack(codes[i], x);
      mean.seek(local);
#pragma unroll
      for (int j = 0; j < 8; j++)
        x[j] = x[j] * (per_channel ? channel_scales[j] : row_scale) + (has_mean ? mean[j] : -0.0f);
      if (local < rows) store<kCommon>(pack<kType>(x), a.x, to, channel);
    }
    if constexpr (kCommon) return;
  }
}

// ---- codes that somebody else made ------------------------------------------------------------------------------

struct MarkerArguments {
  Tensor codes;
  uint32_t* not_finite;
  int64_t heads, words;  // of a batch; of one head
};

// One block finds one word, a warp a row at a time.
constexpr int kMarkerWarps = 4;
__global__ void __launch_bounds__(kMarkerWarps * 32)
    find_markers_kernel(const __grid_constant__ MarkerArguments a, Place corner) {
  __shared__ uint32_t found;
  const Place place = place_of_block(corner);
  const Plane where = place.plane;
  const int64_t word = place.tile;
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
  if (threadIdx.x == 0 && threadIdx.y == 0) a.not_finite[(where.batch * a.heads + where.head) * a.words + word] = found;
}

}  // namespace

void launch_dequantize(const QuantizeOp& op, cudaStream_t stream) {
  const dim3 block = block_of(op.x.channels());
  const unsigned tile_rows = kRows * block.y;
  DequantizeArguments a{};
  a.codes = make_tensor(op.codes);
  a.x = make_tensor(op.x);
  a.scales = make_tensor(op.scales);
  a.means = make_means(op.mean, op.mean_rows);
  a.groups = make_groups(op.grouping, op.group_rows);
  a.per_channel = op.per_channel;
  const bool common = a.codes.vectors && a.x.vectors && one_mean_a_head(a.means);
  const size_t shared = tile_rows * sizeof(float);
  for_code_type(op.codes.dtype, [&](auto code) {
    for_float_type(op.x.dtype, [&](auto type) {
      constexpr DType kCode = decltype(code)::value, kType = decltype(type)::value;
      launch_grid(op.x, tiles_of(op.x.tokens(), tile_rows), [&](dim3 grid, Place corner) {
        // What kernels of attention have: no scales per channel in 4 bits, and e4m3 with no others.
        if constexpr (kCode != DType::kI4) {
          if (common && a.per_channel) {
            dequantize_kernel<kCode, kType, Case::kChannelScales><<<grid, block, shared, stream>>>(a, corner);
            return;
          }
        }
        if constexpr (kCode != DType::kE4M3) {
          if (common && !a.per_channel) {
            dequantize_kernel<kCode, kType, Case::kRowScales><<<grid, block, shared, stream>>>(a, corner);
            return;
          }
        }
        dequantize_kernel<kCode, kType, Case::kAny><<<grid, block, shared, stream>>>(a, corner);
      });
    });
  });
}

void launch_find_not_finite(const View& codes, uint32_t* not_finite, cudaStream_t stream) {
  MarkerArguments a{};
  a.codes = make_tensor(codes);
  a.not_finite = not_finite;
  a.heads = codes.heads();
  a.words = tiles_of(codes.tokens(), 32);
  launch_grid(codes, a.words, [&](dim3 grid, Place corner) {
    find_markers_kernel<<<grid, dim3(32, kMarkerWarps), 0, stream>>>(a, corner);
  });
}

}  // namespace sage::cuda
