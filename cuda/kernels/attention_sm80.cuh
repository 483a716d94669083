// Attention by mma.sync and cp.async (sm_80 and later): `flash` and `sage1` are one kernel that differs in the
// type of Q.K and in where the factor of a score comes from.
//
// One block owns kBlockM query rows of one head and walks its keys from right to left in tiles of kBlockN, so the
// tiles that need a mask (the diagonal, the tail) come first. Fragments are those of the PTX manual: lane l holds
// rows g and g + 8 (g = l / 4) and columns 8n + 2c, + 1 (c = l % 4) of every 16 x 8 tile.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "kernels.h"
#include "ptx/memory.cuh"
#include "ptx/mma.cuh"
#include "tuning.h"

namespace sage::cuda {

// One strided operand: element strides, and whether 16-byte copies may be used on its rows.
struct Rows {
  const char* data;
  int64_t batch_stride, head_stride, token_stride, channel_stride;
  int channels;
  bool aligned;
};

struct AttentionParams {
  Rows q, k, v;
  char* o;
  float* lse;
  int64_t o_stride[4], lse_stride[3];
  DType out_dtype;
  int q_tokens, k_tokens, v_dim;
  int q_heads, group;  // query heads that share one KV head
  int q_blocks;        // of one head
  int64_t first_item;
  bool causal;
  float scale_log2;  // softmax scale times log2(e)
  float largest;     // that V can hold

  // sage1 only
  const float *q_scales, *k_scales;
  int q_groups, k_groups;  // of one head
  Grouping q_grouping, k_grouping;
  int q_group_rows, k_group_rows;
  const uint32_t *q_not_finite, *k_not_finite;
  int q_words, k_words;  // of one head
  Rows q_raw, k_raw;     // what the codes were made of; data may be null
  DType raw_dtype;
  const float* delta;  // [B, Hq, delta_blocks, k_tokens] or null
  int delta_blocks, delta_rows;
  const float *v_scales, *v_mean;  // [B, Hkv, v_dim] or null
  const float* lse_shift;          // [B, Hq, q_tokens] or null
};

template <int kHeadDim_, ptx::Operand kQK_, ptx::Operand kPV_, bool kF16Accumulator_ = false,
          bool kColumnTerms_ = false, bool kFewRows = false>
struct AttentionConfig {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr ptx::Operand kQK = kQK_, kPV = kPV_;
  static constexpr bool kF16Accumulator = kF16Accumulator_;
  // Scores need more than one factor a row and tile: per-token or odd groups of keys, or smoothed queries.
  static constexpr bool kColumnTerms = kColumnTerms_;

  static constexpr AttentionTuning kTuning =
      attention_tuning(kHeadDim, kQK == ptx::Operand::kS8, kF16Accumulator, kFewRows);
  static constexpr int kRowTiles = kTuning.row_tiles, kThreads = 32 * kTuning.warps, kMinBlocks = kTuning.min_blocks;
  static constexpr int kBlockM = kTuning.block_q(), kBlockN = kTuning.block_k, kStages = kTuning.stages;
  static constexpr bool kQInRegisters = kTuning.q_in_registers;
  static constexpr int kQKBytes = kQK == ptx::Operand::kS8 ? 1 : 2;
  static constexpr int kQKRow = kHeadDim * kQKBytes, kVRow = kHeadDim * 2;  // bytes
  static constexpr int kQBytes = kBlockM * kQKRow, kKBytes = kBlockN * kQKRow, kVBytes = kBlockN * kVRow;
  static constexpr int kSharedBytes = kQBytes + kStages * (kKBytes + kVBytes);
  // The kept maximum moves only when a score exceeds it by this much (base 2): P stays below 2^kHeadroom, O is
  // rarely rescaled. Sums in f16 have no room for it.
  static constexpr float kHeadroom = kF16Accumulator ? 0.0f : 8.0f;
  // P is also scaled by 2^-kShift, where its type has the range for it: bf16 V go up to 3e38, and their sums must not
  // overflow.
  static constexpr float kShift = kPV == ptx::Operand::kBF16 ? 32.0f : 0.0f;
  static_assert(kQKRow >= 64, "the swizzle needs rows of at least 64 bytes");
};

// ---- shared-memory tiles: 16-byte chunks XOR-swizzled by row, so that 8 rows of one chunk never share a bank ----

template <int kRowBytes>
__device__ __forceinline__ uint32_t swizzle(int row) {
  return kRowBytes >= 128 ? row & 7 : (row >> 1) & 3;
}

template <int kRowBytes>
__device__ __forceinline__ uint32_t chunk_offset(int row, int chunk) {
  return row * kRowBytes + ((chunk ^ swizzle<kRowBytes>(row)) << 4);
}

// One thread's share of a tile: one chunk of every kStep-th row. Tiles are taken from the last to the first.
template <int kRows, int kRowBytes, int kElementBytes, int kThreads, int kStages = 1, int kStageBytes = 0>
struct TileLoader {
  static constexpr int kChunks = kRowBytes / 16, kStep = kThreads / kChunks;
  static_assert(kThreads % kChunks == 0 && kRows % kStep == 0 && (kStep & (kStep - 1)) == 0);

  const char* from;  // this thread's chunk in its first row of the next tile
  uint32_t to;
  int64_t step;  // bytes from one of its rows to the next
  bool present;  // its chunk lies within the tensor's channels

  __device__ __forceinline__ TileLoader(const Rows& rows, const char* plane, int64_t first_row, uint32_t tile) {
    const int chunk = threadIdx.x % kChunks, row = threadIdx.x / kChunks;
    const int64_t stride = rows.token_stride * kElementBytes;
    from = plane + (first_row + row) * stride + chunk * (16 / kElementBytes) * rows.channel_stride * kElementBytes;
    to = tile + chunk_offset<kRowBytes>(row, chunk);
    step = kStep * stride;
    present = chunk * (16 / kElementBytes) < rows.channels;
    if (present) return;
    for (int stage = 0; stage < kStages; stage++)  // padding channels stay zero
      for (int i = 0; i < kRows / kStep; i++)
        ptx::store_shared_16(address(to, stage * kStageBytes, i), make_uint4(0, 0, 0, 0));
  }

  // Rows are kStep apart, so the swizzle changes by a constant.
  static __device__ __forceinline__ uint32_t address(uint32_t to, uint32_t stage, int i) {
    const uint32_t change = kRowBytes >= 128 ? i * kStep & 7 : (i * kStep >> 1) & 3;
    return (to ^ change << 4) + stage + i * kStep * kRowBytes;
  }

  // Enqueues the next tile. kWhole: all rows exist; otherwise rows from `end` on are written as zeros.
  template <bool kWhole>
  __device__ __forceinline__ void load(const Rows& rows, uint32_t stage, int end) {
    if (!rows.aligned) {
      load_elements(from, step, to, stage, rows.channels, rows.channel_stride, end);
    } else if (present) {
      const char* source = from;
#pragma unroll
      for (int i = 0; i < kRows / kStep; i++, source += step) {
        if constexpr (kWhole)
          ptx::copy_async_16(address(to, stage, i), source);
        else
          ptx::copy_async_16(address(to, stage, i), source, threadIdx.x / kChunks + i * kStep < end ? 16 : 0);
      }
    }
    from -= kRows / kStep * step;
  }

  // The same for rows that 16-byte copies cannot take; out of line, as it is rare and long.
  static __device__ __noinline__ void load_elements(const char* source, int64_t step, uint32_t to, uint32_t stage,
                                                    int channels, int64_t channel_stride, int end) {
    constexpr int kElements = 16 / kElementBytes;
    const int channel = threadIdx.x % kChunks * kElements;
    for (int i = 0; i < kRows / kStep; i++, source += step) {
      uint32_t word[4] = {0, 0, 0, 0};
#pragma unroll
      for (int e = 0; e < kElements; e++) {
        if (threadIdx.x / kChunks + i * kStep >= end || channel + e >= channels) continue;
        const char* element = source + e * channel_stride * kElementBytes;
        const uint32_t bits = kElementBytes == 1 ? *reinterpret_cast<const uint8_t*>(element)
                                                 : *reinterpret_cast<const uint16_t*>(element);
        word[e * kElementBytes / 4] |= bits << e * kElementBytes % 4 * 8;
      }
      ptx::store_shared_16(address(to, stage, i), make_uint4(word[0], word[1], word[2], word[3]));
    }
  }
};

// ---- values that are not finite -------------------------------------------------------------------------------

__device__ __forceinline__ float element_value(const char* address, DType dtype) {
  if (dtype == DType::kF16) return __half2float(*reinterpret_cast<const __half*>(address));
  if (dtype == DType::kBF16) return __bfloat162float(*reinterpret_cast<const __nv_bfloat16*>(address));
  return *reinterpret_cast<const float*>(address);
}

// The score of a key that INT8 cannot hold, from the raw tensors: +-inf or NaN as exact arithmetic has it.
__device__ __forceinline__ float raw_score(const AttentionParams& p, int batch, int head, int row, int key) {
  if (p.k_raw.data == nullptr || row >= p.q_tokens) return float_of(0x7fc00000u);
  const int bytes = p.raw_dtype == DType::kF32 ? 4 : 2;
  const char* q =
      p.q_raw.data + (batch * p.q_raw.batch_stride + head * p.q_raw.head_stride + row * p.q_raw.token_stride) * bytes;
  const char* k =
      p.k_raw.data +
      (batch * p.k_raw.batch_stride + head / p.group * p.k_raw.head_stride + key * p.k_raw.token_stride) * bytes;
  float sum = 0.0f;
#pragma unroll 1
  for (int d = 0; d < p.q_raw.channels; d++) {
    sum += element_value(q + d * p.q_raw.channel_stride * bytes, p.raw_dtype) *
           element_value(k + d * p.k_raw.channel_stride * bytes, p.raw_dtype);
  }
  return sum;
}

template <class C>
__device__ __forceinline__ float value_at(const uint8_t* v_tile, int key, int channel) {
  const uint32_t offset = chunk_offset<C::kVRow>(key, channel / 8) + channel % 8 * 2;
  if constexpr (C::kPV == ptx::Operand::kF16) return __half2float(*reinterpret_cast<const __half*>(v_tile + offset));
  return __bfloat162float(*reinterpret_cast<const __nv_bfloat16*>(v_tile + offset));
}

// In a tile with masked scores, a V that is not finite would reach masked rows as 0 * NaN. Adds such values to the
// rows that see them (row 16t + g of a lane sees keys up to lane_limit + 16t), then clears them from the tile. Called
// by the whole block.
template <class C>
__device__ __forceinline__ void isolate_values(uint8_t* v_tile, float (&o)[C::kRowTiles][C::kHeadDim / 8][4],
                                               int lane_limit, int key0) {
  constexpr int kWords = C::kVBytes / 4;
  const uint32_t exponent = C::kPV == ptx::Operand::kF16 ? 0x7c00u : 0x7f80u;
  auto* words = reinterpret_cast<uint32_t*>(v_tile);
  bool found = false;
  for (int i = threadIdx.x; i < kWords; i += C::kThreads) {
    const uint32_t word = words[i];
    found |= (word & exponent) == exponent || (word >> 16 & exponent) == exponent;
  }
  if (!__syncthreads_or(found)) return;

  const int lane = threadIdx.x % 32;
  for (int key = 0; key < C::kBlockN; key++) {
#pragma unroll
    for (int n = 0; n < C::kHeadDim / 8; n++) {
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const float value = value_at<C>(v_tile, key, n * 8 + lane % 4 * 2 + e);
        if (is_finite(value)) continue;
#pragma unroll
        for (int t = 0; t < C::kRowTiles; t++) {
          if (key0 + key <= lane_limit + t * 16) o[t][n][e] += value;
          if (key0 + key <= lane_limit + t * 16 + 8) o[t][n][2 + e] += value;
        }
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kWords; i += C::kThreads) {
    uint32_t word = words[i];
    if ((word & exponent) == exponent) word &= 0xffff0000u;
    if ((word >> 16 & exponent) == exponent) word &= 0x0000ffffu;
    words[i] = word;
  }
  __syncthreads();
}

// s32 accumulators start at these bits, 1.5 * 2^23 as a float: a sum below 2^22 then reads as that float plus the
// sum, and leaves the integer world by one exact subtraction.
constexpr int32_t kBiasBits = 0x4b400000;
constexpr float kBias = 12582912.0f;

// ---- the two products of a tile -------------------------------------------------------------------------------

template <class C>
__device__ __forceinline__ void load_q(uint32_t (&fragment)[4], uint32_t q_tile, int step, int t) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t q_lane = q_tile + chunk_offset<C::kQKRow>(warp * 16 * C::kRowTiles + lane % 16, lane / 16);
  ptx::load_matrices(fragment, (q_lane ^ (step << 5)) + t * 16 * C::kQKRow);
}

template <class C, class Accumulator>
__device__ __forceinline__ void multiply_qk(Accumulator (&s)[C::kRowTiles][C::kBlockN / 8][4], uint32_t q_tile,
                                            const uint32_t (&q)[C::kQKRow / 32][C::kRowTiles][4], uint32_t k_tile) {
  const int lane = threadIdx.x % 32;
  const uint32_t k_lane = k_tile + chunk_offset<C::kQKRow>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  Accumulator start[4];
#pragma unroll
  for (int e = 0; e < 4; e++) start[e] = C::kQK == ptx::Operand::kS8 ? kBiasBits : 0;
#pragma unroll
  for (int step = 0; step < C::kQKRow / 32; step++) {
    uint32_t a[C::kRowTiles][4];
#pragma unroll
    for (int t = 0; t < C::kRowTiles; t++) {
      if constexpr (C::kQInRegisters) {
#pragma unroll
        for (int i = 0; i < 4; i++) a[t][i] = q[step][t][i];
      } else {
        load_q<C>(a[t], q_tile, step, t);
      }
    }
#pragma unroll
    for (int n = 0; n < C::kBlockN / 16; n++) {
      uint32_t b[4];
      ptx::load_matrices(b, (k_lane ^ (step << 5)) + n * 16 * C::kQKRow);
#pragma unroll
      for (int t = 0; t < C::kRowTiles; t++) {
        ptx::mma<C::kQK>(s[t][2 * n], a[t], b[0], b[1], step == 0 ? start : s[t][2 * n]);
        ptx::mma<C::kQK>(s[t][2 * n + 1], a[t], b[2], b[3], step == 0 ? start : s[t][2 * n + 1]);
      }
    }
  }
}

// Keys 16 * step to 16 * step + 15 of the tile: O += P V.
template <class C>
__device__ __forceinline__ void multiply_pv(float (&o)[C::kRowTiles][C::kHeadDim / 8][4],
                                            const uint32_t (&p)[C::kRowTiles][4], uint32_t v_tile, int step) {
  const int lane = threadIdx.x % 32;
  const uint32_t v_lane = v_tile + chunk_offset<C::kVRow>(lane % 16, lane / 16);
#pragma unroll
  for (int n = 0; n < C::kHeadDim / 16; n++) {
    uint32_t b[4];
    ptx::load_matrices_transposed(b, (v_lane ^ (n << 5)) + step * 16 * C::kVRow);
#pragma unroll
    for (int t = 0; t < C::kRowTiles; t++) {
      ptx::mma<C::kPV>(o[t][2 * n], p[t], b[0], b[1], o[t][2 * n]);
      ptx::mma<C::kPV>(o[t][2 * n + 1], p[t], b[2], b[3], o[t][2 * n + 1]);
    }
  }
}

// A whole tile with f16 sums, which are then added to O.
template <class C>
__device__ __forceinline__ void multiply_pv_f16(float (&o)[C::kRowTiles][C::kHeadDim / 8][4],
                                                const uint32_t (&p)[C::kBlockN / 16][C::kRowTiles][4],
                                                uint32_t v_tile) {
  const int lane = threadIdx.x % 32;
  const uint32_t v_lane = v_tile + chunk_offset<C::kVRow>(lane % 16, lane / 16);
#pragma unroll
  for (int n = 0; n < C::kHeadDim / 16; n++) {
    uint32_t part[C::kRowTiles][2][2] = {};
#pragma unroll
    for (int step = 0; step < C::kBlockN / 16; step++) {
      uint32_t b[4];
      ptx::load_matrices_transposed(b, (v_lane ^ (n << 5)) + step * 16 * C::kVRow);
#pragma unroll
      for (int t = 0; t < C::kRowTiles; t++) {
        ptx::mma_f16(part[t][0], p[step][t], b[0], b[1]);
        ptx::mma_f16(part[t][1], p[step][t], b[2], b[3]);
      }
    }
#pragma unroll
    for (int t = 0; t < C::kRowTiles; t++)
#pragma unroll
      for (int half = 0; half < 2; half++)
#pragma unroll
        for (int row = 0; row < 2; row++) {
          const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&part[t][half][row]));
          o[t][2 * n + half][2 * row] += pair.x;
          o[t][2 * n + half][2 * row + 1] += pair.y;
        }
  }
}

template <ptx::Operand kPV>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  if constexpr (kPV == ptx::Operand::kF16) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
}

__device__ __forceinline__ void store_element(char* base, DType dtype, int64_t index, float value) {
  if (dtype == DType::kF16)
    reinterpret_cast<__half*>(base)[index] = __float2half_rn(value);
  else if (dtype == DType::kBF16)
    reinterpret_cast<__nv_bfloat16*>(base)[index] = __float2bfloat16_rn(value);
  else
    reinterpret_cast<float*>(base)[index] = value;
}

// Keeps a factor where neither factor * 0 nor factor * -inf is NaN, and a whole score stays finite. NaN stays.
__device__ __forceinline__ float clamp_factor(float factor) {
  return factor < 0x1p-126f ? 0x1p-126f : factor > 0x1p100f ? 0x1p100f : factor;
}

// ---- the kernel -----------------------------------------------------------------------------------------------

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kMinBlocks)
    attention_kernel(const __grid_constant__ AttentionParams p) {
  constexpr int kRowTiles = C::kRowTiles, kNTiles = C::kBlockN / 8, kDTiles = C::kHeadDim / 8;
  constexpr bool kQuantized = C::kQK == ptx::Operand::kS8;
  using Score = std::conditional_t<kQuantized, int32_t, float>;

  extern __shared__ __align__(1024) uint8_t shared[];
  constexpr int kStageBytes = C::kKBytes + C::kVBytes;
  const uint32_t q_tile = ptx::shared_address(shared);
  const uint32_t first_stage = q_tile + C::kQBytes;

  // Which rows and keys: the longest causal blocks are launched first.
  const int64_t item = p.first_item + blockIdx.x;
  const int q_block = p.q_blocks - 1 - static_cast<int>(item % p.q_blocks);
  const int64_t plane = item / p.q_blocks;
  const int batch = static_cast<int>(plane / p.q_heads), head = static_cast<int>(plane % p.q_heads);
  const int kv_head = head / p.group;
  const int64_t kv_plane = plane / p.q_heads * (p.q_heads / p.group) + kv_head;
  const int row0 = q_block * C::kBlockM;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, c = lane % 4;
  const int first_limit = p.causal ? row0 + p.k_tokens - p.q_tokens : p.k_tokens - 1;  // last key that row0 sees
  const int last_limit = p.causal ? min(first_limit + C::kBlockM - 1, p.k_tokens - 1) : p.k_tokens - 1;
  const int tiles = last_limit < 0 ? 0 : last_limit / C::kBlockN + 1;
  const int open_tiles = min(max(first_limit + 1, 0), p.k_tokens) / C::kBlockN;  // need no mask

  const char* const q_plane = p.q.data + (batch * p.q.batch_stride + head * p.q.head_stride) * C::kQKBytes;
  const char* const k_plane = p.k.data + (batch * p.k.batch_stride + kv_head * p.k.head_stride) * C::kQKBytes;
  const char* const v_plane = p.v.data + (batch * p.v.batch_stride + kv_head * p.v.head_stride) * 2;
  const int64_t last_key0 = static_cast<int64_t>(tiles - 1) * C::kBlockN;
  const int last_keys = p.k_tokens - static_cast<int>(last_key0);
  TileLoader<C::kBlockN, C::kQKRow, C::kQKBytes, C::kThreads, C::kStages, kStageBytes> k_loader(p.k, k_plane, last_key0,
                                                                                                first_stage);
  TileLoader<C::kBlockN, C::kVRow, 2, C::kThreads, C::kStages, kStageBytes> v_loader(p.v, v_plane, last_key0,
                                                                                     first_stage + C::kKBytes);
  if (tiles > 0) {  // only the last tile can be cut short
    TileLoader<C::kBlockM, C::kQKRow, C::kQKBytes, C::kThreads> q_loader(p.q, q_plane, row0, q_tile);
    q_loader.template load<false>(p.q, 0, p.q_tokens - row0);
    k_loader.template load<false>(p.k, 0, last_keys);
    if (C::kStages > 1) v_loader.template load<false>(p.v, 0, last_keys);
    ptx::copy_async_commit();
  }
  uint32_t stage = 0;

  // Row 16t + 8 * half of this lane sees keys up to lane_limit + 16t + 8 * half, and never one beyond the end.
  const int lane_row = row0 + warp * kRowTiles * 16 + g;
  const int lane_limit = p.causal ? lane_row + p.k_tokens - p.q_tokens : p.k_tokens - 1 + C::kBlockN;
  const auto sees = [&](int t, int half, int key) { return key <= lane_limit + t * 16 + half * 8 && key < p.k_tokens; };

  // What turns a raw score into base-2 logits.
  float factor[kRowTiles][2];
#pragma unroll
  for (int t = 0; t < kRowTiles; t++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      factor[t][half] = p.scale_log2;
      if constexpr (kQuantized) {
        const int known = min(lane_row + t * 16 + half * 8, p.q_tokens - 1);
        factor[t][half] *= p.q_scales[plane * p.q_groups + group_of(p.q_grouping, known, p.q_group_rows)];
        if (p.q_not_finite[plane * p.q_words + known / 32] >> known % 32 & 1) factor[t][half] = float_of(0x7fc00000u);
      }
    }
  }
  // The scale of a tile's keys that this lane holds; column terms fetch theirs one by one.
  const int k_groups_a_run = kQuantized && p.k_grouping == Grouping::kThreadKey ? 4 : 1;
  const float* const k_scales =
      kQuantized ? p.k_scales + kv_plane * p.k_groups + (k_groups_a_run == 4 ? c : 0) : nullptr;

  float o[kRowTiles][kDTiles][4], maximum[kRowTiles][2], sum[kRowTiles][2];
#pragma unroll
  for (int t = 0; t < kRowTiles; t++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      maximum[t][half] = -INFINITY;
      sum[t][half] = 0.0f;  // of this lane's columns
    }
#pragma unroll
    for (int n = 0; n < kDTiles; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) o[t][n][e] = 0.0f;
  }

  const auto k_scale_of = [&](int tile) {
    if (!kQuantized || C::kColumnTerms || tile < 0) return 1.0f;
    return k_scales[tile * k_groups_a_run];
  };
  float next_k_scale = k_scale_of(tiles - 1);  // fetched one tile ahead
  // Bit j of word w: key 32w + j of the tile holds a value that is not finite.
  const auto not_finite = [&](int tile, int w) -> uint32_t {
    const int word = tile * (C::kBlockN / 32) + w;
    return kQuantized && tile >= 0 && word < p.k_words ? p.k_not_finite[kv_plane * p.k_words + word] : 0;
  };
  // Tiles with masked scores, or with scores that INT8 cannot hold, take the longer way.
  [[maybe_unused]] uint32_t q[C::kQKRow / 32][kRowTiles][4];
  auto process = [&](int tile, auto masked) {
    constexpr bool kMasked = decltype(masked)::value;
    const int key0 = tile * C::kBlockN;
    ptx::copy_async_wait<0>();
    __syncthreads();  // the tile (K only, of one stage) is there; everybody is done with the one before
    const uint32_t k_tile = first_stage + stage, v_tile = k_tile + C::kKBytes;
    if constexpr (C::kStages > 1) {
      stage ^= kStageBytes;
      if (tile > 0) {
        k_loader.template load<true>(p.k, stage, C::kBlockN);
        v_loader.template load<true>(p.v, stage, C::kBlockN);
      }
    } else {
      v_loader.template load<!kMasked>(p.v, 0, tile == tiles - 1 ? last_keys : C::kBlockN);
    }
    ptx::copy_async_commit();
    if constexpr (C::kQInRegisters) {
      if (tile == tiles - 1) {
#pragma unroll
        for (int step = 0; step < C::kQKRow / 32; step++)
#pragma unroll
          for (int t = 0; t < kRowTiles; t++) load_q<C>(q[step][t], q_tile, step, t);
      }
    }

    Score raw[kRowTiles][kNTiles][4];
    multiply_qk<C>(raw, q_tile, q, k_tile);
    const float k_scale = next_k_scale;
    next_k_scale = k_scale_of(tile - 1);
    if constexpr (C::kStages == 1) {
      ptx::copy_async_wait<0>();
      __syncthreads();  // V is there; everybody is done with K
      if (tile > 0) k_loader.template load<true>(p.k, 0, C::kBlockN);
      ptx::copy_async_commit();
    }

    if constexpr (kQuantized && kMasked) {
      // Scores that are not finite, as the bits that leave the bias as they are.
#pragma unroll
      for (int w = 0; w < C::kBlockN / 32; w++) {
        for (uint32_t bits = not_finite(tile, w); bits != 0; bits &= bits - 1) {
          const int column = w * 32 + __ffs(static_cast<int>(bits)) - 1;
#pragma unroll
          for (int t = 0; t < kRowTiles; t++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
              const int32_t x = __float_as_int(raw_score(p, batch, head, lane_row + t * 16 + half * 8, key0 + column));
#pragma unroll
              for (int n = w * 4; n < w * 4 + 4; n++)
#pragma unroll
                for (int e = 0; e < 2; e++)
                  if (n * 8 + c * 2 + e == column) raw[t][n][2 * half + e] = x;
            }
        }
      }
    }

    // Scores, still without the row's factor unless they have column terms. Open tiles take them as they come.
    constexpr bool kLazy = kQuantized && !C::kColumnTerms && !kMasked;
    [[maybe_unused]] float s[kRowTiles][kNTiles][4];
    if constexpr (!kLazy) {
#pragma unroll
      for (int t = 0; t < kRowTiles; t++)
#pragma unroll
        for (int n = 0; n < kNTiles; n++)
#pragma unroll
          for (int e = 0; e < 4; e++) {
            const int key = key0 + n * 8 + c * 2 + e % 2;
            float x;
            if constexpr (kQuantized)
              x = __int_as_float(raw[t][n][e]) - kBias;
            else
              x = raw[t][n][e];
            if constexpr (C::kColumnTerms) {
              const int known = min(key, p.k_tokens - 1);
              const int64_t k_group = kv_plane * p.k_groups + group_of(p.k_grouping, known, p.k_group_rows);
              x *= clamp_factor(factor[t][e / 2] * p.k_scales[k_group]);
              if (p.delta != nullptr) {
                const int row = min(lane_row + t * 16 + e / 2 * 8, p.q_tokens - 1);
                x += p.scale_log2 * p.delta[(plane * p.delta_blocks + row / p.delta_rows) * p.k_tokens + known];
              }
            }
            if constexpr (kMasked) {
              if (!sees(t, e / 2, key)) x = -INFINITY;
            }
            s[t][n][e] = x;
          }
    }

    // Online softmax in base 2: first the maxima.
    float multiplier[kRowTiles][2], addend[kRowTiles][2];
#pragma unroll
    for (int t = 0; t < kRowTiles; t++) {
      float rescale[2];
#pragma unroll
      for (int half = 0; half < 2; half++) {
        multiplier[t][half] = C::kColumnTerms ? 1.0f : clamp_factor(factor[t][half] * k_scale);
        // The bias of open tiles leaves in one addend with the maximum. That is exact as the multiplier has three
        // bits less, so that its product with the bias fits, and as the kept maximum is an integer.
        if (kQuantized) multiplier[t][half] = float_of(bits_of(multiplier[t][half]) & ~7u);
        float largest;
        if constexpr (kLazy) {
          int32_t bits = raw[t][0][2 * half];
#pragma unroll
          for (int n = 0; n < kNTiles; n++) bits = __vimax3_s32(bits, raw[t][n][2 * half], raw[t][n][2 * half + 1]);
          largest = __int_as_float(bits) - kBias;
        } else {
          largest = s[t][0][2 * half];
#pragma unroll
          for (int n = 0; n < kNTiles; n++) largest = fmaxf(largest, fmaxf(s[t][n][2 * half], s[t][n][2 * half + 1]));
        }
        largest *= multiplier[t][half];
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
        if (kQuantized) largest = ceilf(largest);
        const float next = largest > maximum[t][half] + C::kHeadroom ? largest : maximum[t][half];
        const float offset = next == -INFINITY ? 0.0f : next;  // nothing visible yet
        rescale[half] = ptx::exp2_approx(maximum[t][half] - offset);
        maximum[t][half] = next;
        addend[t][half] = (kLazy ? fmaf(-kBias, multiplier[t][half], -offset) : -offset) - C::kShift;
      }
      if (__any_sync(~0u, rescale[0] != 1.0f || rescale[1] != 1.0f)) {
#pragma unroll
        for (int n = 0; n < kDTiles; n++)
#pragma unroll
          for (int e = 0; e < 4; e++) o[t][n][e] *= rescale[e / 2];
#pragma unroll
        for (int half = 0; half < 2; half++) sum[t][half] *= rescale[half];
      }
    }
    if constexpr (kMasked) isolate_values<C>(shared + (v_tile - q_tile), o, lane_limit, key0);

    // Then P, 16 keys at a time, so that exponentials overlap the products of the keys before.
    constexpr int kSteps = C::kBlockN / 16;
    uint32_t probabilities[kSteps][kRowTiles][4];
    const auto exponentiate = [&](int step) {
#pragma unroll
      for (int t = 0; t < kRowTiles; t++) {
#pragma unroll
        for (int n = 0; n < 2; n++) {
          float e[4];
#pragma unroll
          for (int i = 0; i < 4; i++) {
            float x;
            if constexpr (kLazy)
              x = __int_as_float(raw[t][2 * step + n][i]);
            else
              x = s[t][2 * step + n][i];
            e[i] = ptx::exp2_approx(fmaf(x, multiplier[t][i / 2], addend[t][i / 2]));
            sum[t][i / 2] += e[i];
          }
          probabilities[step][t][2 * n] = pack<C::kPV>(e[0], e[1]);
          probabilities[step][t][2 * n + 1] = pack<C::kPV>(e[2], e[3]);
        }
      }
    };
    exponentiate(0);
#pragma unroll
    for (int step = 0; step < kSteps; step++) {
      if (step + 1 < kSteps) exponentiate(step + 1);
      if constexpr (!C::kF16Accumulator) multiply_pv<C>(o, probabilities[step], v_tile, step);
    }
    if constexpr (C::kF16Accumulator) multiply_pv_f16<C>(o, probabilities, v_tile);
  };
  const auto any_not_finite = [&](int tile) {
    uint32_t bits = 0;
#pragma unroll
    for (int w = 0; w < C::kBlockN / 32; w++) bits |= not_finite(tile, w);
    return bits;
  };
  uint32_t bad = any_not_finite(tiles - 1), next_bad = any_not_finite(tiles - 2);
  const auto is_open = [&](int tile) { return tile >= 0 && tile < open_tiles && bad == 0; };
  const auto advance = [&](int tile) {
    bad = next_bad;
    next_bad = any_not_finite(tile - 2);
    return tile - 1;
  };
  for (int tile = tiles - 1; tile >= 0;) {
    for (; is_open(tile); tile = advance(tile)) process(tile, std::false_type{});
    for (; tile >= 0 && !is_open(tile); tile = advance(tile)) process(tile, std::true_type{});
  }

  // Epilogue: O / sum, straight from the fragments.
#pragma unroll
  for (int t = 0; t < kRowTiles; t++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = lane_row + t * 16 + half * 8;
      float total = sum[t][half];
      total += __shfl_xor_sync(~0u, total, 1);
      total += __shfl_xor_sync(~0u, total, 2);
      if (row >= p.q_tokens) continue;
      const bool visible = sees(t, half, 0);
      const float inverse = 1.0f / total;
      if (p.lse != nullptr && c == 0) {
        float lse = (maximum[t][half] + (log2f(total) + C::kShift)) * kLn2;
        if (p.lse_shift != nullptr) lse += p.lse_shift[plane * p.q_tokens + row];
        p.lse[batch * p.lse_stride[0] + head * p.lse_stride[1] + row * p.lse_stride[2]] = visible ? lse : -INFINITY;
      }
      const int64_t o_row = batch * p.o_stride[0] + head * p.o_stride[1] + row * p.o_stride[2];
#pragma unroll
      for (int n = 0; n < kDTiles; n++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const int channel = n * 8 + c * 2 + e;
          if (channel >= p.v_dim) continue;
          float value = o[t][n][2 * half + e] * inverse;
          if (p.v_scales != nullptr) value *= p.v_scales[kv_plane * p.v_dim + channel];
          if (p.v_mean != nullptr) value += p.v_mean[kv_plane * p.v_dim + channel];
          // A mean of values is no larger than the largest; rounding P must not take it past what the type holds.
          if (is_finite(value)) value = fminf(fmaxf(value, -p.largest), p.largest);
          store_element(p.o, p.out_dtype, o_row + channel * p.o_stride[3], visible ? value : 0.0f);
        }
      }
    }
  }
}

// ---- host side ------------------------------------------------------------------------------------------------

inline Rows make_rows(const View& view) {
  const int bytes = bits_per_element(view.dtype) / 8;
  const auto multiple = [&](int64_t elements) { return elements * bytes % 16 == 0; };
  return {static_cast<const char*>(view.data),
          view.stride[0],
          view.stride[1],
          view.stride[2],
          view.stride[3],
          static_cast<int>(view.channels()),
          reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && multiple(view.channels()) &&
              (view.stride[3] == 1 || view.channels() == 1) && (multiple(view.stride[2]) || view.tokens() == 1) &&
              (multiple(view.stride[1]) || view.heads() == 1) && (multiple(view.stride[0]) || view.batch() == 1)};
}

template <class C>
void launch_attention(AttentionParams params, int64_t planes, cudaStream_t stream) {
  SAGE_CUDA(cudaFuncSetAttribute(attention_kernel<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSharedBytes));
  params.q_blocks = (params.q_tokens + C::kBlockM - 1) / C::kBlockM;
  const int64_t items = planes * params.q_blocks, most = int64_t{1} << 30;
  for (params.first_item = 0; params.first_item < items; params.first_item += most) {
    const int64_t blocks = items - params.first_item < most ? items - params.first_item : most;
    attention_kernel<C><<<static_cast<unsigned>(blocks), C::kThreads, C::kSharedBytes, stream>>>(params);
    SAGE_CUDA(cudaGetLastError());
  }
}

// One head dimension a source file, so that they compile side by side.
template <int kHeadDim>
void launch_flash_for(const AttentionParams& params, DType dtype, int64_t planes, cudaStream_t stream) {
  using ptx::Operand;
  if (dtype == DType::kF16) {
    launch_attention<AttentionConfig<kHeadDim, Operand::kF16, Operand::kF16>>(params, planes, stream);
  } else {
    launch_attention<AttentionConfig<kHeadDim, Operand::kBF16, Operand::kBF16>>(params, planes, stream);
  }
}

template <int kHeadDim>
void launch_sage1_for(const AttentionParams& params, bool f16_accumulator, bool column_terms, int64_t planes,
                      cudaStream_t stream) {
  using ptx::Operand;
  constexpr auto kS8 = Operand::kS8, kF16 = Operand::kF16;
  const auto choose = [&](auto accumulator, auto few_rows) {
    constexpr bool kAccumulator = decltype(accumulator)::value, kFewRows = decltype(few_rows)::value;
    if (column_terms) {
      launch_attention<AttentionConfig<kHeadDim, kS8, kF16, kAccumulator, true, kFewRows>>(params, planes, stream);
    } else {
      launch_attention<AttentionConfig<kHeadDim, kS8, kF16, kAccumulator, false, kFewRows>>(params, planes, stream);
    }
  };
  if (f16_accumulator) return choose(std::true_type{}, std::false_type{});
  constexpr bool kHasChoice = attention_tuning(kHeadDim, true, false, true).row_tiles !=
                              attention_tuning(kHeadDim, true, false, false).row_tiles;
  if constexpr (kHasChoice) {
    if (few_rows_pay(params.k_tokens)) return choose(std::false_type{}, std::true_type{});
  }
  choose(std::false_type{}, std::false_type{});
}

}  // namespace sage::cuda
