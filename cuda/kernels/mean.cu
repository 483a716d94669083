// Means over rows, summed in the order that numerics.h fixes, and their subtraction.
#include "tile.cuh"
#include "workspace.h"

namespace sage::cuda {
namespace {

constexpr int kLaneRows = kChunkRows / kChunkLanes;

struct MeanArguments {
  Tensor x, mean;
  int64_t heads, block_rows;
  int64_t means, chunks;  // of one head; of one mean
  float* sums;            // [planes, means, chunks, channels]
  uint8_t* counts;
};

// One block a chunk, one lane of the chunk a thread row. The only chunk of a mean becomes the mean itself.
template <DType kType>
__global__ void __maxnreg__(kType == DType::kF32 ? 128 : 80)
    sum_chunks_kernel(const __grid_constant__ MeanArguments a, int64_t first) {
  const int octets = blockDim.x, width = octets * 8, lane = threadIdx.y, channel = threadIdx.x * 8;
  extern __shared__ float shared[];
  float* const lane_sums = shared;                                            // [kChunkLanes][width]
  int* const missing = reinterpret_cast<int*>(shared + kChunkLanes * width);  // [width]

  const int64_t item = first + blockIdx.x;
  const int64_t chunk = item % a.chunks, mean = item / a.chunks % a.means, plane = item / a.chunks / a.means;
  const Plane where{plane / a.heads, plane % a.heads};
  const int64_t row = mean * a.block_rows + chunk * kChunkRows;
  const int64_t end = min(min((mean + 1) * a.block_rows, a.x.tokens), row + kChunkRows);

  const char* const from = plane_of(a.x, where);
  Octet<kType> raw[kLaneRows];
  load_rows(raw, a.x, from, row + lane, kChunkLanes, end, channel);
  float sum[8] = {}, x[8];
#pragma unroll
  for (int i = 0; i < kLaneRows; i++) {
    unpack(raw[i], x);
#pragma unroll
    for (int j = 0; j < 8; j++) sum[j] += x[j];
  }
  if (lane == 0) {
#pragma unroll
    for (int j = 0; j < 8; j++) missing[channel + j] = 0;
  }
  __syncthreads();

  // A sum is finite only where all its values are; otherwise they are looked at one by one.
  bool finite = true;
#pragma unroll
  for (int j = 0; j < 8; j++) finite &= is_finite(sum[j]);
  if (!finite) {
#pragma unroll
    for (int j = 0; j < 8; j++) sum[j] = 0.0f;
#pragma unroll 1
    for (int i = 0; i < kLaneRows; i++) {
      Octet<kType> again[1];
      load_rows(again, a.x, from, row + lane + i * kChunkLanes, 1, end, channel);
      unpack(again[0], x);
#pragma unroll
      for (int j = 0; j < 8; j++) {
        if (is_finite(x[j])) {
          sum[j] += x[j];
        } else {
          atomicAdd(&missing[channel + j], 1);
        }
      }
    }
  }
#pragma unroll
  for (int j = 0; j < 8; j++) lane_sums[lane * width + channel + j] = sum[j];
  __syncthreads();

  const int rows = static_cast<int>(max(end - row, int64_t{0}));
  for (int c = lane * octets + threadIdx.x; c < a.x.channels; c += octets * kChunkLanes) {
    float lanes[kChunkLanes];
#pragma unroll
    for (int i = 0; i < kChunkLanes; i++) lanes[i] = lane_sums[i * width + c];
#pragma unroll
    for (int halving = 2; halving <= kChunkLanes; halving *= 2) {
      const int step = kChunkLanes / halving;
#pragma unroll
      for (int i = 0; i < step; i++) lanes[i] += lanes[i + step];
    }
    const int count = rows - missing[c];
    if (a.chunks == 1) {
      float_at(a.mean, plane_of(a.mean, where), mean, c) = mean_of(lanes[0], count);
    } else {
      a.sums[item * a.x.channels + c] = lanes[0];
      a.counts[item * a.x.channels + c] = static_cast<uint8_t>(count);
    }
  }
}

constexpr int kFoldChannels = 32;

// One block for kFoldChannels channels of a mean: threadIdx.x counts channels, threadIdx.y lanes.
__global__ void __launch_bounds__(kFoldChannels* kFoldLanes)
    fold_chunks_kernel(const __grid_constant__ MeanArguments a, int64_t first) {
  __shared__ double sums[kFoldLanes][kFoldChannels];
  __shared__ int64_t counts[kFoldLanes][kFoldChannels];
  const int x = threadIdx.x, lane = threadIdx.y;
  const int64_t item = first + blockIdx.x;
  const int slices = (a.x.channels + kFoldChannels - 1) / kFoldChannels;
  const int channel = static_cast<int>(item % slices) * kFoldChannels + x;
  const int64_t mean = item / slices % a.means, plane = item / slices / a.means;

  double sum = 0.0;
  int64_t count = 0;
  if (channel < a.x.channels) {
    const int64_t chunks = (plane * a.means + mean) * a.chunks;
    for (int64_t chunk = lane; chunk < a.chunks; chunk += kFoldLanes) {
      sum += static_cast<double>(a.sums[(chunks + chunk) * a.x.channels + channel]);
      count += a.counts[(chunks + chunk) * a.x.channels + channel];
    }
  }
  for (int step = kFoldLanes / 2; step > 0; step /= 2) {
    sums[lane][x] = sum;
    counts[lane][x] = count;
    __syncthreads();
    if (lane < step) {
      sum += sums[lane + step][x];
      count += counts[lane + step][x];
    }
    __syncthreads();
  }
  if (lane == 0 && channel < a.x.channels) {
    const Plane where{plane / a.heads, plane % a.heads};
    float_at(a.mean, plane_of(a.mean, where), mean, channel) = mean_of(sum, count);
  }
}

struct SubtractArguments {
  Tensor x, smoothed;
  Means means;
  int64_t heads, tiles;  // of one head
};

constexpr int kSubtractRows = 4;

// Blocks run from the last rows to the first: the mean was taken in the other direction, and the cache knows the end.
template <DType kIn, DType kOut>
__global__ void __maxnreg__(80) subtract_mean_kernel(const __grid_constant__ SubtractArguments a, int64_t last) {
  const int64_t item = last - blockIdx.x, plane = item / a.tiles;
  const Plane where{plane / a.heads, plane % a.heads};
  const int step = blockDim.y, channel = threadIdx.x * 8;
  const int64_t base = item % a.tiles * (kSubtractRows * step);
  const int lane = threadIdx.y, rows = static_cast<int>(min(a.x.tokens - base, int64_t{kSubtractRows * step}));
  Octet<kIn> raw[kSubtractRows];
  load_rows(raw, a.x, plane_of(a.x, where), base + lane, step, a.x.tokens, channel);
  char* to = row_of(a.smoothed, plane_of(a.smoothed, where), base + lane);
  MeanOctet mean(a.means, where, base, channel);
#pragma unroll
  for (int i = 0; i < kSubtractRows; i++, to += step * a.smoothed.token_stride) {
    const int local = lane + i * step;
    if (local >= rows) break;
    mean.seek(local);
    float x[8];
    unpack(raw[i], x);
#pragma unroll
    for (int j = 0; j < 8; j++) x[j] -= mean[j];
    store_octet(pack<kOut>(x), a.smoothed, to, channel);
  }
}

}  // namespace

size_t mean_scratch_bytes(const View& x, int64_t block_rows) {
  return mean_scratch_bytes(x.batch() * x.heads(), x.tokens(), x.channels(), block_rows);
}

void launch_mean(const View& x, const View& mean, int64_t block_rows, void* scratch, cudaStream_t stream) {
  MeanArguments a{};
  a.x = make_tensor(x);
  a.mean = make_tensor(mean);
  a.heads = x.heads();
  a.block_rows = block_rows < x.tokens() ? block_rows : x.tokens();
  a.means = (x.tokens() + a.block_rows - 1) / a.block_rows;
  a.chunks = (a.block_rows + kChunkRows - 1) / kChunkRows;
  const int64_t means = x.batch() * x.heads() * a.means;
  a.sums = static_cast<float*>(scratch);
  a.counts = reinterpret_cast<uint8_t*>(a.sums + means * a.chunks * x.channels());

  const dim3 block(block_of(x.channels()).x, kChunkLanes);
  const size_t shared = (kChunkLanes + 1) * block.x * 8 * sizeof(float);
  for_float_type(x.dtype, [&](auto type) {
    launch_items(means * a.chunks, [&](int64_t first, unsigned blocks) {
      sum_chunks_kernel<decltype(type)::value><<<blocks, block, shared, stream>>>(a, first);
    });
  });
  if (a.chunks == 1) return;
  const int64_t slices = (x.channels() + kFoldChannels - 1) / kFoldChannels;
  launch_items(means * slices, [&](int64_t first, unsigned blocks) {
    fold_chunks_kernel<<<blocks, dim3(kFoldChannels, kFoldLanes), 0, stream>>>(a, first);
  });
}

void launch_subtract_mean(const View& x, const View& mean, int64_t block_rows, const View& smoothed,
                          cudaStream_t stream) {
  const dim3 block = block_of(x.channels());
  const int64_t tile_rows = kSubtractRows * block.y;
  SubtractArguments a{};
  a.x = make_tensor(x);
  a.smoothed = make_tensor(smoothed);
  a.means = make_means(mean, block_rows);
  a.heads = x.heads();
  a.tiles = (x.tokens() + tile_rows - 1) / tile_rows;
  const int64_t items = x.batch() * x.heads() * a.tiles;
  for_float_type(x.dtype, [&](auto in) {
    for_float_type(smoothed.dtype, [&](auto out) {
      launch_items(items, [&](int64_t first, unsigned blocks) {
        subtract_mean_kernel<decltype(in)::value, decltype(out)::value>
            <<<blocks, block, 0, stream>>>(a, items - 1 - first);
      });
    });
  });
}

}  // namespace sage::cuda
