// What the steps of packing for sage2 share.
#pragma once

#include "../tile.cuh"
#include "sage2.h"

namespace sage::cuda::sm90 {

// Writes k_mean, v_mean and v_scales from a sample of the tokens; clears v_peaks, flags and next_item. It lets the next
// kernel start when all kernels before it are done. Of keys alone: k_mean, flags and next_item.
void launch_sage2_sample(const Sage2Op& op, bool keys_alone, CUstream_st* stream);

// Codes, scales and bits of rotated queries and keys, and the flags of the latter, after k_mean and cleared flags.
void launch_sage2_rotated_rows(const Sage2Op& op, CUstream_st* stream);

// A mean of queries as both their packing and its product with the keys take it: any constant is an exact shift, and
// this one is exact in the element type of the product, and too small for a finite query less it to overflow.
template <DType kType>
__device__ __forceinline__ float half_mean(float mean) {
  if (!(fabsf(mean) < 0x1p100f)) return 0.0f;
  if constexpr (kType == DType::kF16) {
    return __half2float(__float2half_rn(mean));
  } else {
    return __bfloat162float(__float2bfloat16_rn(mean));
  }
}

// ---- rows of a tile ---------------------------------------------------------------------------------------------

__device__ __forceinline__ int swizzle(int width, int row) { return width == 128 ? row & 7 : row >> 1 & 3; }

// How many of `most` rows from `row` on exist.
__device__ __forceinline__ int rows_left(int64_t tokens, int64_t row, int most) {
  return static_cast<int>(max(min(tokens - row, int64_t{most}), int64_t{0}));
}

template <DType kType>
__device__ __forceinline__ void load_one(float (&x)[8], const Tensor& tensor, const char* plane, int64_t row,
                                         int channel) {
  Octet<kType> octet[1];
  load_rows(octet, tensor, plane, row, 1, tensor.tokens, channel);
  unpack(octet[0], x);
}

// Writes one bit a row of the block's tile, set where `bad` has bit i for row row_of(i).
template <int kWords, class RowOf>
__device__ __forceinline__ void write_bits(uint32_t* to, int words, bool any, uint32_t bad, RowOf row_of) {
  const int thread = threadIdx.x;
  if (!any) {
    if (thread < words) to[thread] = 0;
    return;
  }
  __shared__ uint32_t bits[kWords];
  if (thread < kWords) bits[thread] = 0;
  __syncthreads();
#pragma unroll 1
  for (; bad != 0; bad &= bad - 1) {
    const int row = row_of(__ffs(bad) - 1);
    atomicOr(&bits[row / 32], 1u << row % 32);
  }
  __syncthreads();
  if (thread < words) to[thread] = bits[thread];
}

// What packing rows of queries and keys takes.
struct RowArguments {
  Tensor q, k;
  Sage2Packed packed;
  int q_heads, kv_heads;
  unsigned q_tiles, kv_tiles;  // of one plane, of so many tokens
  unsigned q_items, kv_items;  // of all
  int64_t q_rows;              // of one plane, padded to whole query blocks
  float factor;                // of q_scales
  float range;                 // largest code

  RowArguments(const Sage2Op& op, int tokens) : q(make_tensor(op.q)), k(make_tensor(op.k)), packed(op.packed) {
    const auto tiles_of = [&](int64_t rows) { return static_cast<unsigned>((rows + tokens - 1) / tokens); };
    q_heads = static_cast<int>(op.q.heads());
    kv_heads = static_cast<int>(op.k.heads());
    q_rows = (op.q.tokens() + kBlockM - 1) / kBlockM * kBlockM;
    q_tiles = tiles_of(q_rows);
    kv_tiles = tiles_of(op.k.tokens());
    q_items = static_cast<unsigned>(op.q.batch() * op.q.heads()) * q_tiles;
    kv_items = static_cast<unsigned>(op.k.batch() * op.k.heads()) * kv_tiles;
    factor = op.scale * kLog2e;
    range = op.plan.kernel == Kernel::kSage2Int4 ? kInt4Range : kInt8Range;
  }
};

// ---- what a channel's values come to ----------------------------------------------------------------------------

// Of finite values; `pivot` is one of them, or any other constant that all parts of a summary share.
struct alignas(16) Summary {
  float sum, squares;  // of x - pivot
  float largest;       // magnitude of x
  float missing;       // how many are not finite
};

// Something near most values, so that their squares do not cancel: the middle one of three of them.
template <DType kType>
__device__ __forceinline__ void load_pivot(float (&pivot)[8], const Tensor& tensor, const char* plane, int channel) {
  const int64_t quarter = tensor.tokens / 4;
  Octet<kType> octets[3];
  load_rows(octets, tensor, plane, quarter, static_cast<int>(max(quarter, int64_t{1})), tensor.tokens, channel);
  float x[3][8];
#pragma unroll
  for (int i = 0; i < 3; i++) unpack(octets[i], x[i]);
#pragma unroll
  for (int j = 0; j < 8; j++) {
    const float least = fminf(x[0][j], x[1][j]), most = fmaxf(x[0][j], x[1][j]),
                middle = fmaxf(least, fminf(most, x[2][j]));
    pivot[j] = is_finite(middle) ? middle : 0.0f;
  }
}

__device__ __forceinline__ void add_value(Summary& summary, float x, float pivot) {
  const float difference = x - pivot;
  summary.sum += difference;
  summary.squares += difference * difference;
  summary.largest = fmaxf(summary.largest, fabsf(x));
}

__device__ __forceinline__ void add_summary(Summary& summary, const Summary& other) {
  summary.sum += other.sum;
  summary.squares += other.squares;
  summary.largest = fmaxf(summary.largest, other.largest);
  summary.missing += other.missing;
}

// What V's codes may be.
struct ValueCodes {
  float range;      // the largest
  int log2_rms;     // of their root mean square, as near as scales that are powers of two allow
  float least_rms;  // over the largest magnitude: less would put the latter out of range
  float power;      // the largest power of two in range
  float sum;        // the largest, of magnitudes before they are rounded, of a tile (in a long context: of 64); 0: any

  __host__ __device__ bool bounds_sums() const { return sum != 0.0f; }

  // `known`: whether sums are known before scales, and no plane has to be packed again.
  __host__ static ValueCodes of(const Plan& plan, bool known) {
    if (plan.kernel != Kernel::kSage2PP) return {kE4m3Range, 1, 0x1p-7f, 256.0f, 0.0f};
    // What sqrt(2) makes of the range, and what rounding to e4m3 may add to a sum.
    constexpr float kLeast = 1.4175f / kHalfValueRange, kRounding = 1.0625f;
    const int log2_rms = known ? 1 : plan.block_k == 256 ? -1 : 0;
    const float sum = half_value_sum(plan.block_k) / kRounding;
    return {kHalfValueRange, log2_rms, ldexpf(kLeast, log2_rms), 8.0f, known ? sum : sum * 64.0f / plan.block_k};
  }
};
static_assert(kValueRms == 2.0f && kHalfValueRange == 9.0f);

// The exponent of the least power of two that is no smaller.
__device__ __forceinline__ uint32_t ceiling_exponent(float x) { return (bits_of(x) + 0x7fffffu) >> 23; }

// The least that will do where codes must be no larger than they are with `least`.
__device__ __forceinline__ float scale_of(float least) {
  return float_of(min(ceiling_exponent(fmaxf(least, 0x1p-108f)), 254u) << 23);
}

__device__ __forceinline__ float inverse_of_power(float scale) {
  constexpr uint32_t kLeast = 0x00400000u;  // 2^-127, which has no exponent of its own
  return float_of(max(0x7f000000u - bits_of(scale), kLeast));
}

__device__ __forceinline__ float power_of_inverse(float inverse) {
  return inverse < 0x1p-126f ? 0x1p127f : inverse_of_power(inverse);
}

// As mean_of of numerics.h: 0 where subtracting it could lose or overflow a value.
__device__ __forceinline__ float mean_of_channel(const Summary& summary, float pivot, int64_t tokens) {
  const float mean = pivot + summary.sum / (static_cast<float>(tokens) - summary.missing);
  return fabsf(mean) < 0x1p119f ? mean : 0.0f;
}

struct Channel {
  float mean, scale;
};

// The scale is never 0, and no value summarized exceeds its range.
__device__ __forceinline__ Channel channel_of_values(const Summary& summary, float pivot, int64_t tokens, bool centre,
                                                     const ValueCodes& codes) {
  const float count = static_cast<float>(tokens) - summary.missing, inverse_count = 1.0f / count;
  const float offset = summary.sum * inverse_count, variance = summary.squares * inverse_count - offset * offset;
  // A mean that chance explains would do more harm than good in a long context.
  constexpr float kSignificant = 4.0f;
  float mean = mean_of_channel(summary, pivot, tokens);
  if (!centre && !(mean * mean * count > kSignificant * kSignificant * variance)) mean = 0.0f;
  const float distance = mean == 0.0f ? pivot + offset : 0.0f;  // of the values' mean from what is subtracted
  float rms = sqrtf(variance + distance * distance);
  // Squares may overflow, underflow or cancel; magnitudes do not.
  const float most = fminf(summary.largest + fabsf(mean), 0x1.fffffep127f);
  if (!(rms >= 0x1p-40f && rms < INFINITY)) rms = most * 0.25f;
  rms = fmaxf(fmaxf(rms, most * codes.least_rms), 0x1p-110f);
  constexpr uint32_t kHalfPower = 0x3504f3;  // mantissa of sqrt(2)
  const uint32_t exponent = ((bits_of(rms) + (0x800000 - kHalfPower)) >> 23) - codes.log2_rms;
  return {mean, float_of(min(exponent, 254u) << 23)};
}

}  // namespace sage::cuda::sm90
