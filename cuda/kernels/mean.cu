// Means over rows, summed in the order that numerics.h fixes, and their subtraction.
#include "chunk_mean.cuh"
#include "workspace.h"

namespace sage::cuda {
namespace {

struct MeanArguments {
  Tensor x, mean;
  int64_t block_rows, heads;
  int64_t means, chunks;  // of one head; of one mean
  float* sums;            // [planes, means, chunks, channels]
  uint8_t* counts;
  Tensor smoothed;  // what is left of x, where a mean has one chunk
};

struct Nothing {};

// A block sums blockDim.z chunks of a head, one lane of a chunk a thread row. The only chunk of a mean becomes the mean
// itself, and is subtracted, in type Out, from the rows that are still at hand.
template <DType kType, class Out>
__global__ void __maxnreg__(kType == DType::kF32 ? 128 : 80)
    sum_chunks_kernel(const __grid_constant__ MeanArguments a, Place corner) {
  const int lane = threadIdx.y, channel = threadIdx.x * 8;
  extern __shared__ float4 shared[];
  ChunkColumns columns(shared + threadIdx.z * (ChunkColumns::bytes(blockDim.x) / sizeof(float4)));

  const Place place = place_of_block(corner);
  const int64_t item = place.tile * blockDim.z + threadIdx.z;
  const int64_t mean = a.means == 1 ? 0 : a.chunks == 1 ? item : item / a.chunks, chunk = item - mean * a.chunks;
  const int64_t row = mean * a.block_rows + chunk * kChunkRows;
  const int64_t end = min(min((mean + 1) * a.block_rows, a.x.tokens), row + kChunkRows);
  const int rows = static_cast<int>(max(end - row, int64_t{0}));

  const char* const from = plane_of(a.x, place.plane);
  Octet<kType> raw[kLaneRows];
  load_rows(raw, a.x, from, row + lane, kChunkLanes, end, channel);
  columns.sum(raw, [&](int i, float(&x)[8]) {
    Octet<kType> again[1];
    load_rows(again, a.x, from, row + lane + i * kChunkLanes, 1, end, channel);
    unpack(again[0], x);
  });

  constexpr bool kSubtracts = !std::is_same_v<Out, Nothing>;
  const bool exists = item < a.means * a.chunks;
  if (!kSubtracts && !exists) return;
  const int64_t plane = place.plane.batch * a.heads + place.plane.head;
  const int64_t partial = (plane * a.means * a.chunks + item) * a.x.channels;
  columns.fold([&](int c, float sum, int missing) {
    const int count = rows - missing;
    const float value = mean_of(sum, count);
    if (!exists || c >= a.x.channels) return value;
    if (kSubtracts || a.chunks == 1) {
      float_at(a.mean, plane_of(a.mean, place.plane), mean, c) = value;
    } else {
      a.sums[partial + c] = sum;
      a.counts[partial + c] = static_cast<uint8_t>(count);
    }
    return value;
  });
  if constexpr (kSubtracts) {
    float value[8];
    columns.read(value);
    char* to = row_of(a.smoothed, plane_of(a.smoothed, place.plane), row + lane);
#pragma unroll
    for (int i = 0; i < kLaneRows; i++, to += kChunkLanes * a.smoothed.token_stride) {
      if (lane + i * kChunkLanes >= rows) break;
      float x[8];
      unpack(raw[i], x);
#pragma unroll
      for (int j = 0; j < 8; j++) x[j] -= value[j];
      store_octet(pack<Out::value>(x), a.smoothed, to, channel);
    }
  }
}

// Few channels for a block, so that there are blocks enough where there are few heads.
constexpr int kFoldChannels = 8;

// One block for kFoldChannels channels of a mean: threadIdx.x counts channels, threadIdx.y lanes.
__global__ void __launch_bounds__(kFoldChannels* kFoldLanes)
    fold_chunks_kernel(const __grid_constant__ MeanArguments a, Place corner) {
  __shared__ double sums[kFoldLanes][kFoldChannels];
  __shared__ int64_t counts[kFoldLanes][kFoldChannels];
  const int x = threadIdx.x, lane = threadIdx.y;
  const Place place = place_of_block(corner);
  const int slices = (a.x.channels + kFoldChannels - 1) / kFoldChannels;
  const int64_t mean = a.means == 1 ? 0 : place.tile / slices, plane = place.plane.batch * a.heads + place.plane.head;
  const int channel = static_cast<int>(place.tile - mean * slices) * kFoldChannels + x;

  double sum = 0.0;
  int64_t count = 0;
  if (channel < a.x.channels) {
    constexpr int kAtOnce = 8;
    const int64_t first = (plane * a.means + mean) * a.chunks * a.x.channels + channel;
#pragma unroll 1
    for (int64_t begin = lane; begin < a.chunks; begin += kAtOnce * kFoldLanes) {
      float parts[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; i++) {
        const int64_t chunk = begin + i * kFoldLanes;
        parts[i] = 0.0f;
        if (chunk >= a.chunks) continue;
        parts[i] = __ldg(&a.sums[first + chunk * a.x.channels]);
        count += __ldg(&a.counts[first + chunk * a.x.channels]);
      }
#pragma unroll
      for (const float part : parts) sum += static_cast<double>(part);
    }
  }
  sums[lane][x] = sum;
  counts[lane][x] = count;
  __syncthreads();
  if (lane != 0 || channel >= a.x.channels) return;
  double lanes[kFoldLanes];
#pragma unroll
  for (int i = 0; i < kFoldLanes; i++) lanes[i] = sums[i][x];
#pragma unroll
  for (int i = 1; i < kFoldLanes; i++) count += counts[i][x];
  fold_halves(lanes);
  float_at(a.mean, plane_of(a.mean, place.plane), mean, channel) = mean_of(lanes[0], count);
}

struct SubtractArguments {
  Tensor x, smoothed;
  Means means;
};

constexpr int kSubtractRows = 4;

// Blocks run from the last rows to the first: the mean was taken in the other direction.
template <DType kIn, DType kOut>
__global__ void __maxnreg__(80) subtract_mean_kernel(const __grid_constant__ SubtractArguments a, Place corner) {
  const Place place = place_from_the_end(corner);
  const int lane = threadIdx.y, step = blockDim.y, channel = threadIdx.x * 8;
  const int64_t base = place.tile * (kSubtractRows * step);
  const int rows = static_cast<int>(min(a.x.tokens - base, int64_t{kSubtractRows * step}));
  Octet<kIn> raw[kSubtractRows];
  load_rows(raw, a.x, plane_of(a.x, place.plane), base + lane, step, a.x.tokens, channel);
  char* to = row_of(a.smoothed, plane_of(a.smoothed, place.plane), base + lane);
  MeanOctet mean(a.means, place.plane, base, channel);
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

static void launch_subtract_mean(const View& x, const View& mean, int64_t block_rows, const View& smoothed,
                                 cudaStream_t stream) {
  const dim3 block = block_of(x.channels());
  SubtractArguments a{};
  a.x = make_tensor(x);
  a.smoothed = make_tensor(smoothed);
  a.means = make_means(mean, block_rows);
  for_float_type(x.dtype, [&](auto in) {
    for_float_type(smoothed.dtype, [&](auto out) {
      launch_grid(x, tiles_of(x.tokens(), kSubtractRows * block.y), [&](dim3 grid, Place corner) {
        subtract_mean_kernel<decltype(in)::value, decltype(out)::value><<<grid, block, 0, stream>>>(a, corner);
      });
    });
  });
}

void launch_smooth(const View& x, const View& mean, int64_t block_rows, const View& smoothed, void* scratch,
                   cudaStream_t stream) {
  MeanArguments a{};
  a.x = make_tensor(x);
  a.mean = make_tensor(mean);
  a.block_rows = block_rows < x.tokens() ? block_rows : x.tokens();
  a.heads = x.heads();
  a.means = tiles_of(x.tokens(), a.block_rows);
  a.chunks = tiles_of(a.block_rows, kChunkRows);
  const int64_t chunks = a.means * a.chunks;
  a.sums = static_cast<float*>(scratch);
  a.counts = reinterpret_cast<uint8_t*>(a.sums + x.batch() * x.heads() * chunks * x.channels());

  dim3 block(block_of(x.channels()).x, kChunkLanes);
  while (block.x * block.y * block.z < 256) block.z *= 2;
  const size_t shared = block.z * ChunkColumns::bytes(block.x);
  const auto sum = [&](auto in, auto out) {
    launch_grid(x, tiles_of(chunks, block.z), [&](dim3 grid, Place corner) {
      sum_chunks_kernel<decltype(in)::value, decltype(out)><<<grid, block, shared, stream>>>(a, corner);
    });
  };
  if (smoothed && a.chunks == 1) {
    a.smoothed = make_tensor(smoothed);
    return for_float_type(x.dtype, [&](auto in) { for_float_type(smoothed.dtype, [&](auto out) { sum(in, out); }); });
  }
  for_float_type(x.dtype, [&](auto in) { sum(in, Nothing{}); });
  if (a.chunks > 1) {
    launch_grid(x, a.means * tiles_of(x.channels(), kFoldChannels), [&](dim3 grid, Place corner) {
      fold_chunks_kernel<<<grid, dim3(kFoldChannels, kFoldLanes), 0, stream>>>(a, corner);
    });
  }
  if (smoothed) launch_subtract_mean(x, mean, block_rows, smoothed, stream);
}

void launch_mean(const View& x, const View& mean, int64_t block_rows, void* scratch, cudaStream_t stream) {
  launch_smooth(x, mean, block_rows, {}, scratch, stream);
}

}  // namespace sage::cuda
