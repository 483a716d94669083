// The mean of a chunk of rows that a block holds in registers, summed in the order that numerics.h fixes.
#pragma once

#include "tile.cuh"

namespace sage::cuda {

constexpr int kLaneRows = kChunkRows / kChunkLanes;  // of one thread

// lanes[0] becomes the sum of all, in halves.
template <class Number, int kLanes>
__device__ __forceinline__ void fold_halves(Number (&lanes)[kLanes]) {
#pragma unroll
  for (int halving = 2; halving <= kLanes; halving *= 2) {
    const int step = kLanes / halving;
#pragma unroll
    for (int i = 0; i < step; i++) lanes[i] += lanes[i + step];
  }
}

// Columns of a chunk in shared memory: thread (x, y) has octet x of the rows y, y + kChunkLanes and so on.
class ChunkColumns {
 public:
  static __host__ __device__ constexpr size_t bytes(unsigned octets) {
    return (kChunkLanes + 1) * octets * 8 * sizeof(float);
  }

  __device__ __forceinline__ explicit ChunkColumns(void* shared)
      : sums_(static_cast<float*>(shared)), missing_(reinterpret_cast<int*>(sums_ + kChunkLanes * width())) {}

  // again(i, x) reads row i of the thread once more.
  template <DType kType, class Again>
  __device__ __forceinline__ void sum(const Octet<kType> (&rows)[kLaneRows], Again again) {
    const int lane = threadIdx.y, channel = threadIdx.x * 8;
    float sum[8] = {}, x[8];
#pragma unroll
    for (int i = 0; i < kLaneRows; i++) {
      unpack(rows[i], x);
#pragma unroll
      for (int j = 0; j < 8; j++) sum[j] += x[j];
    }
    if (lane == 0) {
#pragma unroll
      for (int j = 0; j < 8; j++) missing_[channel + j] = 0;
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
        again(i, x);
#pragma unroll
        for (int j = 0; j < 8; j++) {
          if (is_finite(x[j])) {
            sum[j] += x[j];
          } else {
            atomicAdd(&missing_[channel + j], 1);
          }
        }
      }
    }
    // Low halves of octets, then high ones: neighbouring threads store to neighbouring banks.
    float4* const quads = reinterpret_cast<float4*>(sums_ + lane * width());
    quads[threadIdx.x] = make_float4(sum[0], sum[1], sum[2], sum[3]);
    quads[octets() + threadIdx.x] = make_float4(sum[4], sum[5], sum[6], sum[7]);
    __syncthreads();
  }

  // Calls take(channel, sum, how many values are not finite) for each of them, by one thread; what it returns is kept.
  template <class Take>
  __device__ __forceinline__ void fold(Take take) {
    const int half = width() / 2;
    for (int at = threadIdx.y * octets() + threadIdx.x; at < width(); at += octets() * kChunkLanes) {
      const int channel = at % half / 4 * 8 + at / half * 4 + at % 4;
      float lanes[kChunkLanes];
#pragma unroll
      for (int i = 0; i < kChunkLanes; i++) lanes[i] = sums_[i * width() + at];
      fold_halves(lanes);
      sums_[at] = take(channel, lanes[0], missing_[channel]);
    }
  }

  // What fold() kept for the thread's octet, once all threads have come here.
  __device__ __forceinline__ void read(float (&x)[8]) const {
    __syncthreads();
    const float4 low = reinterpret_cast<const float4*>(sums_)[threadIdx.x];
    const float4 high = reinterpret_cast<const float4*>(sums_)[octets() + threadIdx.x];
    x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
    x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
  }

 private:
  static __device__ __forceinline__ int octets() { return static_cast<int>(blockDim.x); }
  static __device__ __forceinline__ int width() { return octets() * 8; }

  float* sums_;   // [kChunkLanes][width]
  int* missing_;  // [width]: values that are not finite
};

}  // namespace sage::cuda
