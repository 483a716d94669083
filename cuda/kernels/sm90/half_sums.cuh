// O while products add to it: numbers, or pairs of neighbouring channels in FP16, which must not overflow.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "sage2.h"

namespace sage::cuda::sm90::sage2 {

template <class C>
using Output = std::conditional_t<C::kHalfSums, uint32_t, float>;

__device__ __forceinline__ __half2 pair_of(uint32_t bits) { return *reinterpret_cast<const __half2*>(&bits); }
__device__ __forceinline__ uint32_t bits_of_pair(__half2 pair) { return *reinterpret_cast<const uint32_t*>(&pair); }

// Number i of an accumulator: of row g where i & 2 is 0, else of g + 8.
__device__ __forceinline__ float output_at(const float* o, int i) { return o[i]; }
__device__ __forceinline__ float output_at(const uint32_t* o, int i) {
  return i & 1 ? __high2float(pair_of(o[i / 2])) : __low2float(pair_of(o[i / 2]));
}

// Sums of rows whose kept maximum moves; `rescale` becomes what they took, which FP16 has rounded.
template <class C>
__device__ __forceinline__ void scale_outputs(Output<C> (&o)[C::kOutputRegisters], float (&rescale)[2]) {
  if constexpr (C::kHalfSums) {
    const __half2 factor[2] = {__float2half2_rn(rescale[0]), __float2half2_rn(rescale[1])};
#pragma unroll
    for (int i = 0; i < C::kHeadDim / 4; i++) o[i] = bits_of_pair(__hmul2(pair_of(o[i]), factor[i & 1]));
    rescale[0] = __low2float(factor[0]), rescale[1] = __low2float(factor[1]);
  } else {
#pragma unroll
    for (int i = 0; i < C::kHeadDim / 2; i++) o[i] *= rescale[i >> 1 & 1];
  }
}

// What a lane's sums in FP16 may have grown to. Products of a tile add at most what the sum of its weights allows;
// where that might be too much for the next tile to fit in, the sums themselves are asked, and those that leave too
// little room leave for the total. FP16 rounds once every 32 keys: a large sum also leaves after kLongest tiles.
template <class C>
struct Crowd {
  float bound = 0.0f;
  static constexpr int kLongest = 8192 / C::kBlockN;
  static constexpr float kLargestTile = C::kLargestWeight * half_value_sum(C::kBlockN);
  static constexpr float kRoom = 65504.0f * 0.99f - kLargestTile;  // rounding takes less than a hundredth
  static_assert(!C::kHalfSums || kRoom > 4096.0f, "tiles would leave the accumulator one by one");

  __device__ __forceinline__ void add(float first_sum, float second_sum) {
    bound = fmaf(fmaxf(first_sum, second_sum), kHalfValueRange, bound);
  }

  // Whether the sums must leave; a warp agrees.
  __device__ __forceinline__ bool leaves(const uint32_t (&o)[C::kOutputRegisters], int tiles) {
    if (tiles % kLongest == 0) return true;
    if (!__any_sync(~0u, bound > kRoom)) return false;
    __half2 largest = __habs2(pair_of(o[0]));
#pragma unroll
    for (int i = 1; i < C::kHeadDim / 4; i++) largest = __hmax2(largest, __habs2(pair_of(o[i])));
    bound = fmaxf(__low2float(largest), __high2float(largest));
    return __any_sync(~0u, bound > 0.75f * kRoom);
  }
};

}  // namespace sage::cuda::sm90::sage2
