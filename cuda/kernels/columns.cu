// The largest finite magnitude of every channel.
#include "columns.h"
#include "tile.cuh"

namespace sage::cuda {
namespace {

constexpr int kRows = 4, kTiles = 4;  // rows a thread loads at once; how often a block does so

struct ColumnArguments {
  Tensor x;
  Means means;
  int64_t heads, slabs;  // runs of rows that one block reads, of one head
  uint32_t* amax;
};

template <DType kType>
__global__ void __maxnreg__(80) column_amax_kernel(const __grid_constant__ ColumnArguments a, int64_t first) {
  extern __shared__ uint32_t block_amax[];  // of a channel
  const int lane = threadIdx.y, step = blockDim.y, channel = threadIdx.x * 8;
  const int64_t item = first + blockIdx.x, plane = item / a.slabs;
  const Plane where{plane / a.heads, plane % a.heads};
  const int64_t base = item % a.slabs * (kTiles * kRows * step);
  const char* const from = plane_of(a.x, where);
  MeanOctet mean(a.means, where, base, channel);

  float amax[8] = {};
#pragma unroll 1
  for (int tile = 0; tile < kTiles; tile++) {
    const int64_t row = base + lane + tile * kRows * step;
    Octet<kType> raw[kRows];
    load_rows(raw, a.x, from, row, step, a.x.tokens, channel);
#pragma unroll
    for (int i = 0; i < kRows; i++) {
      if (row + i * step >= a.x.tokens) break;
      mean.seek(lane + (tile * kRows + i) * step);
      float x[8];
      unpack(raw[i], x);
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const float magnitude = fabsf(x[j] - mean[j]);
        amax[j] = fmaxf(amax[j], magnitude < INFINITY ? magnitude : 0.0f);
      }
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
  for (int c = thread; c < a.x.channels; c += threads) atomicMax(&a.amax[plane * a.x.channels + c], block_amax[c]);
}

}  // namespace

void launch_column_amax(const View& x, const View& mean, int64_t mean_rows, uint32_t* amax, cudaStream_t stream) {
  const int64_t planes = x.batch() * x.heads();
  SAGE_CUDA(cudaMemsetAsync(amax, 0, planes * x.channels() * sizeof(uint32_t), stream));
  const dim3 block = block_of(x.channels());
  const int64_t slab_rows = kTiles * kRows * block.y;
  ColumnArguments a{};
  a.x = make_tensor(x);
  a.means = make_means(mean, mean_rows);
  a.heads = x.heads();
  a.slabs = (x.tokens() + slab_rows - 1) / slab_rows;
  a.amax = amax;
  for_float_type(x.dtype, [&](auto type) {
    launch_items(planes * a.slabs, [&](int64_t first, unsigned blocks) {
      column_amax_kernel<decltype(type)::value><<<blocks, block, x.channels() * sizeof(uint32_t), stream>>>(a, first);
    });
  });
}

}  // namespace sage::cuda
