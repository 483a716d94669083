// The largest finite magnitude of every channel.
#include "columns.h"
#include "tile.cuh"

namespace sage::cuda {
namespace {

constexpr int kRows = 16;  // of one thread

struct ColumnArguments {
  Tensor x;
  Means means;
  int64_t heads;  // of a batch
  uint32_t* amax;
};

// kCommon: octets are vectors and a head has one mean at most.
template <DType kType, bool kCommon>
__global__ void __maxnreg__(80) column_amax_kernel(const __grid_constant__ ColumnArguments a, Place corner) {
  extern __shared__ uint32_t block_amax[];  // of a channel
  constexpr int kHeld = kCommon ? 8 : 1;    // rows a thread loads at once
  const int lane = threadIdx.y, step = blockDim.y, channel = threadIdx.x * 8;
  const Place place = place_of_block(corner);
  const int64_t base = place.tile * (kRows * step);
  const int rows = static_cast<int>(min(a.x.tokens - base, int64_t{kRows * step}));
  const char* const from = plane_of(a.x, place.plane);
  std::conditional_t<kCommon, SharedMean, MeanOctet> mean(a.means, place.plane, base, channel);
  const auto value = [&](const Octet<kType>& octet, int local, float(&x)[8]) {
    mean.seek(local);
    unpack(octet, x);
#pragma unroll
    for (int j = 0; j < 8; j++) x[j] -= mean[j];
  };

  float amax[8] = {};
#pragma unroll 1
  for (int first = lane; first < rows; first += kHeld * step) {
    Octet<kType> raw[kHeld];
    load<kCommon>(raw, a.x, from, base + first, step, a.x.tokens, channel);
#pragma unroll
    for (int i = 0; i < kHeld; i++) {
      if (first + i * step >= rows) break;
      float x[8];
      value(raw[i], first + i * step, x);
#pragma unroll
      for (int j = 0; j < 8; j++) amax[j] = magnitude(amax[j], x[j]);
    }
  }

  // A maximum is finite only where all its values are; otherwise they are looked at one by one.
  bool finite = true;
#pragma unroll
  for (int j = 0; j < 8; j++) finite &= amax[j] < INFINITY;
  if (!finite) {
#pragma unroll
    for (int j = 0; j < 8; j++) amax[j] = 0.0f;
#pragma unroll 1
    for (int local = lane; local < rows; local += step) {
      Octet<kType> octet[1];
      float x[8];
      load<kCommon>(octet, a.x, from, base + local, 1, a.x.tokens, channel);
      value(octet[0], local, x);
#pragma unroll
      for (int j = 0; j < 8; j++) amax[j] = is_finite(x[j]) ? magnitude(amax[j], x[j]) : amax[j];
    }
  }

  const int thread = lane * blockDim.x + threadIdx.x, threads = blockDim.x * step;
  for (int c = thread; c < a.x.channels; c += threads) block_amax[c] = 0;
  __syncthreads();
#pragma unroll
  for (int j = 0; j < 8; j++) {
    if (channel + j < a.x.channels) atomicMax(&block_amax[channel + j], bits_of(amax[j]));
  }
  __syncthreads();
  uint32_t* const head_amax = a.amax + (place.plane.batch * a.heads + place.plane.head) * a.x.channels;
  for (int c = thread; c < a.x.channels; c += threads) atomicMax(&head_amax[c], block_amax[c]);
}

}  // namespace

void launch_column_amax(const View& x, const View& mean, int64_t mean_rows, uint32_t* amax, cudaStream_t stream) {
  const size_t bytes = x.channels() * sizeof(uint32_t);
  SAGE_CUDA(cudaMemsetAsync(amax, 0, x.batch() * x.heads() * bytes, stream));
  const dim3 block = block_of(x.channels());
  ColumnArguments a{};
  a.x = make_tensor(x);
  a.means = make_means(mean, mean_rows);
  a.heads = x.heads();
  a.amax = amax;
  const bool common = a.x.vectors && one_mean_a_head(a.means);
  for_float_type(x.dtype, [&](auto type) {
    launch_grid(x, tiles_of(x.tokens(), kRows * block.y), [&](dim3 grid, Place corner) {
      if (common)
        column_amax_kernel<decltype(type)::value, true><<<grid, block, bytes, stream>>>(a, corner);
      else
        column_amax_kernel<decltype(type)::value, false><<<grid, block, bytes, stream>>>(a, corner);
    });
  });
}

}  // namespace sage::cuda
