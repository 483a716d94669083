// Attention by mma.sync and cp.async (sm_80 and later): all kernels are one, which differs in the type of Q.K, in where
// the factor of a score comes from and in what P is rounded to. Codes of P and V are held in FP16, which holds them
// exactly, so one product serves FP16, FP8 and INT8; where FP8 and INT4 have tensor cores there are products of those,
// and sage-int8 multiplies bytes.
//
// One block owns kBlockM query rows of one head and walks those tiles of kBlockN keys that they see, from right to
// left. Tiles that need no mask take a shorter way. Fragments are those of the PTX manual: lane l holds rows g and
// g + 8 (g = l / 4) and columns 8n + 2c, + 1 (c = l % 4) of every 16 x 8 tile.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "kernels.h"
#include "ptx/memory.cuh"
#include "ptx/mma.cuh"
#include "tile.cuh"
#include "tuning.h"
#include "whole_mask.cuh"

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
  float scale_log2;  // softmax scale times log2(e)
  float largest;     // that V can hold

  // What queries see
  int offset;                   // query i stands at key i + offset
  int64_t first_key, last_key;  // that query 0 sees, and every next query one further; may lie far outside
  const uint8_t* mask_tiles;    // TileState [mask planes, q_blocks or 1, k_tiles] or null
  const uint64_t* mask_bits;    // visible keys of a tile [mask planes, q_tokens or 1, k_tiles]
  int mask_batch_step, mask_head_step, mask_rows;  // of planes; rows of one
  WholeMask whole_mask;                            // where two kernels are launched of which one runs
  bool adds_mask;
  Rows mask;  // numbers that are added
  DType mask_dtype;

  // What changes scores before softmax, those of open tiles too
  bool changes_open_tiles;
  float softcap;  // 0: none; times log2(e)
  const float *alibi, *sinks;
  int64_t alibi_batch_stride, alibi_head_stride, sinks_stride;
  const float* row_shift;  // [B, Hq, q_tokens] or null: what scores lack when they are capped

  // Kernels that quantize only
  const float *q_scales, *k_scales;
  int q_groups, k_groups;  // of one head
  Grouping q_grouping;
  int q_group_rows;
  Groups k_grouping;
  int k_groups_a_tile;  // 0: those of a tile are not one run
  const uint32_t *q_not_finite, *k_not_finite;
  const uint32_t* v_not_finite;  // null where P is never 0
  int q_words, k_words;          // of one head
  Rows q_raw, k_raw;             // what the codes were made of; data may be null
  DType raw_dtype;
  const float* delta;  // [B, Hq, delta_blocks, k_tokens] or null
  int delta_blocks, delta_rows;
  const float *v_scales, *v_mean;  // [B, Hkv, v_dim] or null
  const float* lse_shift;          // [B, Hq, q_tokens] or null: what scores lack when they are compared with sinks
  Rows v_raw;                      // V as it was given; data may be null
  DType v_raw_dtype;

  // Beyond the papers
  float raw_log2;             // scale_log2 for numbers instead of codes
  const float* first_scores;  // [B, Hq, q_tokens] or null: of the first key, which is then apart from the others
  const float* k_mean;        // [B, Hkv, k_means, channels of k_raw] or null
  int k_means, k_mean_rows;   // more than one: scores lack the products of queries with their tile's mean
  bool band;

  // With column terms: P is multiplied by 2^log2_range, then rounded by adding and subtracting an anchor, whose bits
  // are (max(P, least_step) & step_mask) + step_shift in both halves of an FP16 pair; an anchor of 0 leaves P as it is.
  float log2_range, headroom;
  uint32_t least_step, step_mask, step_shift;
};

template <int kHeadDim_, ptx::Operand kQK_, ptx::Operand kPV_, bool kF16Accumulator_ = false,
          bool kColumnTerms_ = false, bool kFewRows = false, bool kGeneral_ = false>
struct AttentionConfig {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr ptx::Operand kQK = kQK_, kPV = kPV_;
  static constexpr bool kF16Accumulator = kF16Accumulator_;
  // Scores may need more than one factor a row and tile (per-token or odd groups of keys, smoothed queries), and P may
  // be codes.
  static constexpr bool kColumnTerms = kColumnTerms_;
  // There may be a mask, softcap, ALiBi or sinks; windows are for all.
  static constexpr bool kGeneral = kGeneral_;
  // There may be what only options beyond the papers need.
  static constexpr bool kBeyond = kGeneral && kColumnTerms && kPV != ptx::Operand::kE4M3;
  // P is in unsigned bytes, relative to the largest of its row and tile, and V in signed ones.
  static constexpr bool kTilePeaks = kPV == ptx::Operand::kS8;
  // P and V are e4m3.
  static constexpr bool kFp8 = kPV == ptx::Operand::kE4M3;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890
  static constexpr bool kCompiled = !kFp8;
#else
  static constexpr bool kCompiled = true;
#endif

  static constexpr AttentionTuning kTuning =
      attention_tuning(kHeadDim, ptx::kIsInteger<kQK>, kF16Accumulator, kFewRows, kColumnTerms || kGeneral);
  static constexpr int kRowTiles = kTuning.row_tiles, kThreads = 32 * kTuning.warps;
  static constexpr int kBlockM = kTuning.block_q(), kBlockN = kTuning.block_k, kStages = kTuning.stages;
  static constexpr bool kQInRegisters = kTuning.q_in_registers;
  static constexpr int kQKBytes = ptx::kIsInteger<kQK> ? 1 : 2;                                 // INT4: of a pair
  static constexpr int kQKRow = kQK == ptx::Operand::kS4 ? kHeadDim / 2 : kHeadDim * kQKBytes;  // bytes
  // V in bytes comes in tiles, with a row for every channel.
  static constexpr bool kTiledV = kFp8 || kTilePeaks;
  static constexpr int kVElementBytes = kTiledV ? 1 : 2, kVRow = kTiledV ? kBlockN : kHeadDim * 2;
  static constexpr int kVRows = kTiledV ? kHeadDim : kBlockN;  // of a tile
  static constexpr int kQBytes = kBlockM * kQKRow, kKBytes = kBlockN * kQKRow, kVBytes = kVRows * kVRow;
  static constexpr int kSharedBytes = kQBytes + kStages * (kKBytes + kVBytes);
  // Of FP8 two: GPUs that have its tensor cores have 99 KiB of shared memory, and nothing is spilled.
  static constexpr int kMinBlocks = kFp8 && kTuning.min_blocks > 2 ? 2 : kTuning.min_blocks;
  // The kept maximum moves only when a score exceeds it by this much (base 2): P stays below 2^kHeadroom, O is
  // rarely rescaled. Sums in f16 have no room for it.
  static constexpr float kHeadroom = kF16Accumulator ? 0.0f : 8.0f;
  // P is also scaled by 2^-kShift, where its type has the range for it: bf16 V go up to 3e38, and their sums must not
  // overflow.
  static constexpr float kShift = kPV == ptx::Operand::kBF16 ? 32.0f : 0.0f;
  // Pairs of channels that the epilogue writes without a loop: two compile in half the time, all are up to 3 % faster.
  static constexpr int kOutputsAtATime = kGeneral || kColumnTerms || kHeadDim > 128 ? 2 : kHeadDim / 8;
  static_assert(kQKRow >= 32, "the swizzle needs rows of at least 32 bytes");
  static_assert(!kFp8 || kColumnTerms, "codes have column terms");
  static_assert(kBlockN == kMaskTileKeys, "tiles of masks are those of keys");
};

// ---- shared-memory tiles: 16-byte chunks XOR-swizzled by row, so that 8 rows of one chunk never share a bank ----

template <int kRowBytes>
__device__ __forceinline__ uint32_t swizzle(int row) {
  return kRowBytes >= 128 ? row & 7 : kRowBytes >= 64 ? (row >> 1) & 3 : (row >> 2) & 1;
}

template <int kRowBytes>
__device__ __forceinline__ uint32_t chunk_offset(int row, int chunk) {
  return row * kRowBytes + ((chunk ^ swizzle<kRowBytes>(row)) << 4);
}

// One thread's share of a tile: one chunk of every kStep-th row.
template <int kRows, int kRowBytes, int kElementBytes, int kThreads, int kStages = 1, int kStageBytes = 0>
struct TileLoader {
  static constexpr int kChunks = kRowBytes / 16, kStep = kThreads / kChunks;
  static_assert(kThreads % kChunks == 0 && kRows % kStep == 0 && (kStep & (kStep - 1)) == 0);

  const char* from;  // this thread's chunk in its first row of the tile
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
    const uint32_t change = swizzle<kRowBytes>(i * kStep);
    return (to ^ change << 4) + stage + i * kStep * kRowBytes;
  }

  __device__ __forceinline__ void go_back(int tiles) { from -= kRows / kStep * tiles * step; }

  // Enqueues the tile. kWhole: all rows exist; otherwise rows from `end` on are written as zeros.
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

__device__ __forceinline__ float raw_value(const Rows& rows, DType dtype, int batch, int head, int64_t row,
                                           int channel) {
  const int bytes = dtype == DType::kF32 ? 4 : dtype == DType::kI8 ? 1 : 2;
  const int64_t index = batch * rows.batch_stride + head * rows.head_stride + row * rows.token_stride;
  const char* const address = rows.data + (index + channel * rows.channel_stride) * bytes;
  return dtype == DType::kI8 ? int8_value(*reinterpret_cast<const int8_t*>(address)) : element_value(address, dtype);
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

// The same number, of which the compiler knows nothing: what is made of it is not kept in registers from tile to tile.
__device__ __forceinline__ int forgotten(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Bit 7 of every byte of FP8 codes that stands for a value that is not finite.
__device__ __forceinline__ uint32_t special_codes(uint32_t codes) {
  const uint32_t low = codes & 0x7f7f7f7fu, largest = low + 0x01010101u, zero = ~(low + 0x7f7f7f7fu);
  return (largest | (zero & codes)) & 0x80808080u;
}

__device__ __forceinline__ float special_value(uint8_t code) {
  return code == kInfinityCode ? INFINITY : code == kMinusInfinityCode ? -INFINITY : float_of(0x7fc00000u);
}

// The halves or bytes of a word of V's tile that are not finite, as ones.
template <class C>
__device__ __forceinline__ uint32_t not_finite_bits(uint32_t word) {
  if constexpr (C::kFp8) return (special_codes(word) >> 7) * 255u;
  constexpr uint32_t kExponent = C::kPV == ptx::Operand::kF16 ? 0x7c00u : 0x7f80u;
  return ((word & kExponent) == kExponent ? 0x0000ffffu : 0) |
         ((word >> 16 & kExponent) == kExponent ? 0xffff0000u : 0);
}

template <class C>
__device__ __forceinline__ float value_at(const uint8_t* v_tile, int key, int channel) {
  if constexpr (C::kFp8) {  // only those that are not finite count
    const int place = key % 8 / 2 * 4 + key % 16 / 8 * 2 + key % 2;
    const uint8_t code = v_tile[chunk_offset<C::kVRow>(channel, key / 16) + place];
    return special_codes(code) != 0 ? special_value(code) : 0.0f;
  }
  const uint32_t offset = chunk_offset<C::kVRow>(key, channel / 8) + channel % 8 * 2;
  if constexpr (C::kPV == ptx::Operand::kF16) return __half2float(*reinterpret_cast<const __half*>(v_tile + offset));
  return __bfloat162float(*reinterpret_cast<const __nv_bfloat16*>(v_tile + offset));
}

// In a tile with masked scores, a V that is not finite would reach masked rows as 0 * NaN. Adds such values to the
// rows that see them (visible(t, half) holds a bit for every key), then clears them from the tile. Called by the whole
// block.
template <class C, class Visible>
__device__ __forceinline__ void isolate_values(uint8_t* v_tile, float (&o)[C::kRowTiles][C::kHeadDim / 8][4],
                                               Visible visible) {
  constexpr int kWords = C::kVBytes / 4;
  auto* words = reinterpret_cast<uint32_t*>(v_tile);
  bool found = false;
  for (int i = threadIdx.x; i < kWords; i += C::kThreads) {
    found |= not_finite_bits<C>(words[i]) != 0;
  }
  if (!__syncthreads_or(found)) return;

  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int key = 0; key < C::kBlockN; key++) {
    bool sees[C::kRowTiles][2];
#pragma unroll
    for (int t = 0; t < C::kRowTiles; t++)
#pragma unroll
      for (int half = 0; half < 2; half++) sees[t][half] = visible(t, half) >> key & 1;
#pragma unroll
    for (int n = 0; n < C::kHeadDim / 8; n++) {
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const float value = value_at<C>(v_tile, key, n * 8 + lane % 4 * 2 + e);
        if (is_finite(value)) continue;
#pragma unroll
        for (int t = 0; t < C::kRowTiles; t++) {
          if (sees[t][0]) o[t][n][e] += value;
          if (sees[t][1]) o[t][n][2 + e] += value;
        }
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kWords; i += C::kThreads) {
    words[i] &= ~not_finite_bits<C>(words[i]);
  }
  __syncthreads();
}

// The same where V is in bytes, whose tiles hold 0 for such values: `found` has a bit for every key with one.
template <class C, class Visible>
__device__ __forceinline__ void add_bad_values(const AttentionParams& p, float (&o)[C::kRowTiles][C::kHeadDim / 8][4],
                                               int batch, int kv_head, int key0, uint64_t found, Visible visible) {
#pragma unroll 1
  for (; found != 0; found &= found - 1) {
    const int key = __ffsll(static_cast<long long>(found)) - 1;
    bool sees[C::kRowTiles][2];
#pragma unroll
    for (int t = 0; t < C::kRowTiles; t++)
#pragma unroll
      for (int half = 0; half < 2; half++) sees[t][half] = visible(t, half) >> key & 1;
#pragma unroll
    for (int n = 0; n < C::kHeadDim / 8; n++) {
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const int channel = n * 8 + threadIdx.x % 4 * 2 + e;
        if (channel >= p.v_dim) continue;
        const float value = raw_value(p.v_raw, p.v_raw_dtype, batch, kv_head, key0 + key, channel);
        if (is_finite(value)) continue;
#pragma unroll
        for (int t = 0; t < C::kRowTiles; t++) {
          if (sees[t][0]) o[t][n][e] += value;
          if (sees[t][1]) o[t][n][2 + e] += value;
        }
      }
    }
  }
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
  for (int e = 0; e < 4; e++) start[e] = ptx::kIsInteger<C::kQK> ? kBiasBits : 0;
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
        ptx::mma_f16<C::kPV>(part[t][0], p[step][t], b[0], b[1]);
        ptx::mma_f16<C::kPV>(part[t][1], p[step][t], b[2], b[3]);
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

// A whole tile of FP8 codes, summed apart and then added to O: those tensor cores keep about 13 bits of mantissa.
template <class C>
__device__ __forceinline__ void multiply_pv_fp8(float (&o)[C::kRowTiles][C::kHeadDim / 8][4],
                                                const uint32_t (&p)[C::kBlockN / 32][C::kRowTiles][4],
                                                uint32_t v_tile) {
  static_assert(C::kBlockN == 64, "one load brings the keys of two products");
  const int lane = threadIdx.x % 32;
  const uint32_t v_lane = v_tile + chunk_offset<C::kVRow>(lane % 8, lane / 8);
#pragma unroll
  for (int n = 0; n < C::kHeadDim / 8; n++) {
    uint32_t b[4];
    ptx::load_matrices(b, v_lane + n * 8 * C::kVRow);
#pragma unroll
    for (int t = 0; t < C::kRowTiles; t++) {
      float part[4] = {};
      if constexpr (C::kF16Accumulator) {
        uint32_t pairs[2] = {};
        ptx::mma_f16<C::kPV>(pairs, p[0][t], b[0], b[1]);
        ptx::mma_f16<C::kPV>(pairs, p[1][t], b[2], b[3]);
#pragma unroll
        for (int row = 0; row < 2; row++) {
          const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&pairs[row]));
          part[2 * row] = pair.x;
          part[2 * row + 1] = pair.y;
        }
      } else {
        ptx::mma<C::kPV>(part, p[0][t], b[0], b[1], part);
        ptx::mma<C::kPV>(part, p[1][t], b[2], b[3], part);
      }
#pragma unroll
      for (int e = 0; e < 4; e++) o[t][n][e] += part[e];
    }
  }
}

// A whole tile with P in unsigned bytes: exact sums, times what the largest of a row's tile is to that of all so far.
template <class C>
__device__ __forceinline__ void multiply_pv_bytes(float (&o)[C::kRowTiles][C::kHeadDim / 8][4],
                                                  const uint32_t (&p)[C::kBlockN / 32][C::kRowTiles][4],
                                                  const float (&gain)[C::kRowTiles][2], uint32_t v_tile) {
  const int lane = threadIdx.x % 32;
  const uint32_t v_lane = v_tile + chunk_offset<C::kVRow>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
  for (int n = 0; n < C::kHeadDim / 16; n++) {
    int32_t part[C::kRowTiles][2][4];
#pragma unroll
    for (int t = 0; t < C::kRowTiles; t++)
#pragma unroll
      for (int half = 0; half < 2; half++)
#pragma unroll
        for (int e = 0; e < 4; e++) part[t][half][e] = kBiasBits;
#pragma unroll
    for (int step = 0; step < C::kBlockN / 32; step++) {
      uint32_t b[4];
      ptx::load_matrices(b, (v_lane ^ (step << 5)) + n * 16 * C::kVRow);
#pragma unroll
      for (int t = 0; t < C::kRowTiles; t++) {
        ptx::mma_u8_s8(part[t][0], p[step][t], b[0], b[1]);
        ptx::mma_u8_s8(part[t][1], p[step][t], b[2], b[3]);
      }
    }
#pragma unroll
    for (int t = 0; t < C::kRowTiles; t++)
#pragma unroll
      for (int half = 0; half < 2; half++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          float& sum = o[t][2 * n + half][e];
          sum = fmaf(__int_as_float(part[t][half][e]) - kBias, gain[t][e / 2], sum);
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

__device__ __forceinline__ float larger_or_nan(float a, float b) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
}

// Keeps a factor where neither factor * 0 nor factor * -inf is NaN, and a whole score stays finite. NaN stays.
__device__ __forceinline__ float clamp_factor(float factor) {
  float clamped;
  asm("{ .reg .f32 above; max.NaN.f32 above, %1, 0f00800000; min.NaN.f32 %0, above, 0f71800000; }"
      : "=f"(clamped)
      : "f"(factor));
  return clamped;
}

// Both halves of a pair of P, rounded to multiples of a power of two that depends on P: codes as FP16 holds them.
__device__ __forceinline__ uint32_t round_codes(uint32_t pair, const AttentionParams& p) {
  uint32_t floored, anchor, rounded;
  asm("max.f16x2 %0, %1, %2;" : "=r"(floored) : "r"(pair), "r"(p.least_step));
  anchor = (floored & p.step_mask) + p.step_shift;
  asm("{ .reg .b32 sum; add.rn.f16x2 sum, %1, %2; sub.rn.f16x2 %0, sum, %2; }"
      : "=r"(rounded)
      : "r"(pair), "r"(anchor));
  return rounded;
}

// cap * tanh(x / cap) for base-2 logits, to a relative error of 4e-7: an odd polynomial near 0, where the other form
// would cancel.
__device__ __forceinline__ float soft_cap(float x, float cap, float inverse) {
  const float y = x * inverse, square = y * y;
  const float e = ptx::exp2_approx(-2.0f * kLog2e * fabsf(y));
  const float far = copysignf(__fdividef(1.0f - e, 1.0f + e), y);
  float near = fmaf(square, 62.0f / 2835.0f, -17.0f / 315.0f);
  near = fmaf(square, near, 2.0f / 15.0f);
  near = fmaf(square, near, -1.0f / 3.0f);
  near = fmaf(square * y, near, y);
  return cap * (fabsf(y) < 0.25f ? near : y == y ? far : y);
}

// Softcap, ALiBi and additive masks, on base-2 logits. lane_row: of row 0; each_score is that of the kernel.
template <class EachScore>
__device__ __forceinline__ void change_scores(const AttentionParams& p, EachScore each_score, int batch, int head,
                                              int lane_row, int key0) {
  if (p.row_shift != nullptr) {
    const float* const shifts = p.row_shift + (int64_t{batch} * p.q_heads + head) * p.q_tokens;
    each_score([&](float& x, int t, int half, int) {
      x += shifts[min(lane_row + t * 16 + half * 8, p.q_tokens - 1)] * kLog2e;
    });
  }
  if (p.softcap > 0.0f) {
    const float inverse = 1.0f / p.softcap;
    each_score([&](float& x, int, int, int) { x = soft_cap(x, p.softcap, inverse); });
  }
  if (p.alibi != nullptr) {
    const float slope = p.alibi[batch * p.alibi_batch_stride + head * p.alibi_head_stride] * kLog2e;
    each_score([&](float& x, int t, int half, int local) {
      const int here = lane_row + t * 16 + half * 8 + p.offset, key = key0 + local;
      const uint32_t difference = static_cast<uint32_t>(here) - static_cast<uint32_t>(key);
      x -= slope * static_cast<float>(here > key ? difference : 0u - difference);
    });
  }
  if (p.adds_mask) {
    constexpr float kLargest = 0x1.fffffep127f;
    const int bytes = p.mask_dtype == DType::kF32 ? 4 : 2;
    const char* const mask = p.mask.data + (batch * p.mask.batch_stride + head * p.mask.head_stride) * bytes;
    each_score([&](float& x, int t, int half, int local) {
      const int64_t row = min(lane_row + t * 16 + half * 8, p.q_tokens - 1), key = min(key0 + local, p.k_tokens - 1);
      const int64_t index = row * p.mask.token_stride + key * p.mask.channel_stride;
      const float added = kLog2e * element_value(mask + index * bytes, p.mask_dtype);
      x += added < -kLargest ? -kLargest : added;  // what hides a key is not added
    });
  }
}

// ---- beyond the papers ------------------------------------------------------------------------------------------

// Products of rows of numbers with a row of f32, the channels of one of four lanes.
template <class Number>
__device__ __forceinline__ float2 multiply_rows(const char* first, const char* second, int64_t step, const float* mean,
                                                int channels) {
  float2 sum = {0.0f, 0.0f};
#pragma unroll 4
  for (int d = threadIdx.x % 4; d < channels; d += 4, first += step, second += step) {
    sum.x = fmaf(static_cast<float>(*reinterpret_cast<const Number*>(first)), mean[d], sum.x);
    sum.y = fmaf(static_cast<float>(*reinterpret_cast<const Number*>(second)), mean[d], sum.y);
  }
  return sum;
}

// What the mean of a tile's keys adds to the scores of two rows, `row` and the 8th after it, which four lanes share.
// Out of line, as it is rare.
inline __device__ __noinline__ float2 mean_scores(const AttentionParams& p, int batch, int head, int row, int key0) {
  const int channels = p.q_raw.channels, bytes = p.raw_dtype == DType::kF32 ? 4 : 2;
  const int64_t plane = int64_t{batch} * (p.q_heads / p.group) + head / p.group;
  const float* const mean = p.k_mean + (plane * p.k_means + key0 / p.k_mean_rows) * channels;
  const int64_t begin = batch * p.q_raw.batch_stride + head * p.q_raw.head_stride;
  const int64_t channel_step = p.q_raw.channel_stride * bytes;
  const auto address = [&](int row) {
    return p.q_raw.data + (begin + min(row, p.q_tokens - 1) * p.q_raw.token_stride) * bytes +
           threadIdx.x % 4 * channel_step;
  };
  const char *const first = address(row), *const second = address(row + 8);
  float2 sum;
  if (p.raw_dtype == DType::kF16)
    sum = multiply_rows<__half>(first, second, 4 * channel_step, mean, channels);
  else if (p.raw_dtype == DType::kBF16)
    sum = multiply_rows<__nv_bfloat16>(first, second, 4 * channel_step, mean, channels);
  else
    sum = multiply_rows<float>(first, second, 4 * channel_step, mean, channels);
#pragma unroll
  for (int offset = 1; offset <= 2; offset *= 2) {
    sum.x += __shfl_xor_sync(~0u, sum.x, offset);
    sum.y += __shfl_xor_sync(~0u, sum.y, offset);
  }
  return {sum.x * p.raw_log2, sum.y * p.raw_log2};
}

// Tiles of the precision band, in FP32 from what was given. Shared memory, all of it, is free when they run.
template <class C>
struct ExactTile {
  static_assert(C::kRowTiles == 1);
  static constexpr int kDepth = 16, kKeys = 8;  // channels and keys at a time
  union {
    struct {
      float q[kDepth][C::kBlockM + 4], k[kDepth][C::kBlockN + 4];
    };
    struct {
      float p[C::kBlockM][C::kBlockN + 2], v[kKeys][C::kHeadDim];
    };
  };
};

// Products of queries with keys, less their mean where there is one; values that are not finite count as 0.
template <class C>
__device__ __forceinline__ void multiply_exactly(const AttentionParams& p, ExactTile<C>& shared,
                                                 float (&s)[1][C::kBlockN / 8][4], int batch, int head, int row0,
                                                 int key0) {
  constexpr int kDepth = ExactTile<C>::kDepth;
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4, c = lane % 4, channels = p.k_raw.channels;
  const int kv_head = head / p.group;
  const int64_t kv_plane = int64_t{batch} * (p.q_heads / p.group) + kv_head;
  const float* const mean = p.k_mean != nullptr && p.k_means == 1 ? p.k_mean + kv_plane * channels : nullptr;
#pragma unroll 1
  for (int channel0 = 0; channel0 < channels; channel0 += kDepth) {
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < (C::kBlockM + C::kBlockN) * kDepth; i += C::kThreads) {
      const int depth = i % kDepth, at = i / kDepth, channel = channel0 + depth, key = at - C::kBlockM;
      float x = 0.0f;
      if (key < 0) {
        if (channel < channels && row0 + at < p.q_tokens)
          x = raw_value(p.q_raw, p.raw_dtype, batch, head, row0 + at, channel);
        shared.q[depth][at] = is_finite(x) ? x : 0.0f;
      } else {
        if (channel < channels && key0 + key < p.k_tokens) {
          x = raw_value(p.k_raw, p.raw_dtype, batch, kv_head, key0 + key, channel);
          if (mean != nullptr) x -= mean[channel];
        }
        shared.k[depth][key] = is_finite(x) ? x : 0.0f;
      }
    }
    __syncthreads();
#pragma unroll 4
    for (int depth = 0; depth < kDepth; depth++) {
      const float q[2] = {shared.q[depth][row], shared.q[depth][row + 8]};
#pragma unroll
      for (int n = 0; n < C::kBlockN / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) s[0][n][e] = fmaf(q[e / 2], shared.k[depth][n * 8 + c * 2 + e % 2], s[0][n][e]);
    }
  }
}

// O += P V, in units of the codes' scales. Values that are not finite reach the rows that see them.
template <class C, class Visible>
__device__ __forceinline__ void add_values_exactly(const AttentionParams& p, ExactTile<C>& shared,
                                                   float (&o)[1][C::kHeadDim / 8][4],
                                                   const float (&probabilities)[1][C::kBlockN / 8][4], int batch,
                                                   int kv_head, int key0, Visible visible) {
  constexpr int kKeys = ExactTile<C>::kKeys;
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4, c = lane % 4;
  const int64_t kv_plane = int64_t{batch} * (p.q_heads / p.group) + kv_head;
  __syncthreads();
#pragma unroll
  for (int n = 0; n < C::kBlockN / 8; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) shared.p[row + e / 2 * 8][n * 8 + c * 2 + e % 2] = probabilities[0][n][e];
  uint64_t bad = 0;
#pragma unroll 1
  for (int first = 0; first < C::kBlockN; first += kKeys) {
    bool found = false;
#pragma unroll 1
    for (int i = threadIdx.x; i < kKeys * C::kHeadDim; i += C::kThreads) {
      const int channel = i % C::kHeadDim, key = i / C::kHeadDim;
      float x = 0.0f;
      if (channel < p.v_dim && key0 + first + key < p.k_tokens) {
        x = raw_value(p.v_raw, p.v_raw_dtype, batch, kv_head, key0 + first + key, channel);
        found |= !is_finite(x);
        if (p.v_mean != nullptr) x -= p.v_mean[kv_plane * p.v_dim + channel];
        if (p.v_scales != nullptr) x /= p.v_scales[kv_plane * p.v_dim + channel];
      }
      shared.v[key][channel] = is_finite(x) ? x : 0.0f;
    }
    if (__syncthreads_or(found)) bad |= uint64_t{(1u << kKeys) - 1} << first;
#pragma unroll 1
    for (int key = 0; key < kKeys; key++) {
      const float weight[2] = {shared.p[row][first + key], shared.p[row + 8][first + key]};
#pragma unroll
      for (int n = 0; n < C::kHeadDim / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) o[0][n][e] = fmaf(weight[e / 2], shared.v[key][n * 8 + c * 2 + e % 2], o[0][n][e]);
    }
    __syncthreads();
  }
  const int keys = p.k_tokens - key0;
  if (keys < C::kBlockN) bad &= (uint64_t{1} << keys) - 1;
  add_bad_values<C>(p, o, batch, kv_head, key0, bad, visible);
}

// ---- the kernel -----------------------------------------------------------------------------------------------

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kMinBlocks)
    attention_kernel(const __grid_constant__ AttentionParams p) {
  if (!C::kCompiled) return;  // and never launched
  if (p.whole_mask.tiles != nullptr && p.whole_mask.is_open() == (p.mask_tiles != nullptr)) return;
  constexpr int kRowTiles = C::kRowTiles, kNTiles = C::kBlockN / 8, kDTiles = C::kHeadDim / 8;
  constexpr bool kQuantized = ptx::kIsInteger<C::kQK>;
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
  const int k_tiles = (p.k_tokens + C::kBlockN - 1) / C::kBlockN;
  const int last_row = min(row0 + C::kBlockM, p.q_tokens) - 1;
  const auto clamp_key = [&](int64_t key) {
    return static_cast<int>(min(max(key, int64_t{-1}), static_cast<int64_t>(p.k_tokens)));
  };
  // Tiles that some row sees a part of, and those that all rows see all of (but for a mask).
  const int begin = clamp_key(max(row0 + p.first_key, int64_t{0})) / C::kBlockN;
  const int end = (clamp_key(min(last_row + p.last_key, p.k_tokens - int64_t{1})) + C::kBlockN) / C::kBlockN;
  const bool first_apart = C::kBeyond && p.first_scores != nullptr;
  const int open_begin =
      max((max(clamp_key(last_row + p.first_key), 0) + C::kBlockN - 1) / C::kBlockN, first_apart ? 1 : 0);
  const int open_end = clamp_key(row0 + p.last_key + 1) / C::kBlockN;
  const int mask_plane = batch * p.mask_batch_step + head * p.mask_head_step;
  const uint8_t* const mask_tiles =
      !C::kGeneral || p.mask_tiles == nullptr
          ? nullptr
          : p.mask_tiles + (p.mask_rows > 1 ? int64_t{mask_plane} * p.q_blocks + q_block : mask_plane) * k_tiles;
  const auto mask_state = [&](int tile) {
    return mask_tiles == nullptr || tile < 0 ? TileState::kOpen : static_cast<TileState>(mask_tiles[tile]);
  };
  const auto is_exact = [&](int tile) { return C::kBeyond && p.band && in_band(row0 / kBandQueries, tile, p.offset); };
  // The tile to visit after one; -1: none.
  const auto next_tile = [&](int tile) {
    do tile--;
    while (tile >= begin && (mask_state(tile) == TileState::kClosed || is_exact(tile)));
    return tile >= begin ? tile : -1;
  };
  int tile = next_tile(end), next = next_tile(tile);

  const char* const q_plane = p.q.data + (batch * p.q.batch_stride + head * p.q.head_stride) * C::kQKBytes;
  const char* const k_plane = p.k.data + (batch * p.k.batch_stride + kv_head * p.k.head_stride) * C::kQKBytes;
  const char* const v_plane = p.v.data + (batch * p.v.batch_stride + kv_head * p.v.head_stride) * C::kVElementBytes;
  TileLoader<C::kBlockN, C::kQKRow, C::kQKBytes, C::kThreads, C::kStages, kStageBytes> k_loader(
      p.k, k_plane, static_cast<int64_t>(tile) * C::kBlockN, first_stage);
  TileLoader<C::kVRows, C::kVRow, C::kVElementBytes, C::kThreads, C::kStages, kStageBytes> v_loader(
      p.v, v_plane, static_cast<int64_t>(tile) * C::kVRows, first_stage + C::kKBytes);
  if (tile >= 0) {  // only the first tile that is visited can be cut short
    TileLoader<C::kBlockM, C::kQKRow, C::kQKBytes, C::kThreads> q_loader(p.q, q_plane, row0, q_tile);
    q_loader.template load<false>(p.q, 0, p.q_tokens - row0);
    k_loader.template load<false>(p.k, 0, p.k_tokens - tile * C::kBlockN);
    if (C::kStages > 1) v_loader.template load<C::kTiledV>(p.v, 0, p.k_tokens - tile * C::kBlockN);
    ptx::copy_async_commit();
  }
  uint32_t stage = 0;

  // Which keys of a tile row 16t + 8 * half of this lane sees, a bit each.
  const int lane_row = row0 + warp * kRowTiles * 16 + g;
  const auto visible = [&](int tile, int t, int half) -> uint64_t {
    const int key0 = tile * C::kBlockN, row = forgotten(lane_row) + t * 16 + half * 8;
    const int first = max(clamp_key(row + p.first_key) - key0, 0);
    const int last = min(min(clamp_key(row + p.last_key), p.k_tokens - 1) - key0, C::kBlockN - 1);
    if (first > last) return 0;
    uint64_t bits = ~uint64_t{0} << first & ~uint64_t{0} >> (C::kBlockN - 1 - last);
    if (C::kGeneral && p.mask_bits != nullptr) {
      const int64_t plane = forgotten(mask_plane);
      bits &= p.mask_bits[(plane * p.mask_rows + min(row, p.mask_rows - 1)) * k_tiles + tile];
    }
    return bits;
  };

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
      } else if (C::kGeneral && p.softcap > 0.0f) {  // it would make a number of infinity
        constexpr DType kType = C::kQK == ptx::Operand::kF16 ? DType::kF16 : DType::kBF16;
        const int64_t known = min(lane_row + t * 16 + half * 8, p.q_tokens - 1);
        bool finite = true;
#pragma unroll 1
        for (int d = c; d < p.q.channels; d += 4)
          finite &= is_finite(element_value(q_plane + (known * p.q.token_stride + d * p.q.channel_stride) * 2, kType));
        if (__ballot_sync(~0u, !finite) >> g * 4 & 15) factor[t][half] = float_of(0x7fc00000u);
      }
    }
  }
  // The scale of a tile's keys that this lane holds, where there is one.
  const float* const k_scales =
      kQuantized ? p.k_scales + kv_plane * p.k_groups + (p.k_groups_a_tile == 4 ? c : 0) : nullptr;

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

  const auto k_scale_of = [&](int tile) { return kQuantized && tile >= 0 ? k_scales[tile * p.k_groups_a_tile] : 1.0f; };
  float next_k_scale = k_scale_of(tile);  // fetched one tile ahead
  uint32_t seen = 0;                      // rows that see a key, a bit each
  // The row that was subtracted from a row of Q, times all keys; mostly all rows of a block share one.
  const bool one_delta = C::kColumnTerms && p.delta != nullptr && row0 / p.delta_rows == last_row / p.delta_rows;
  const auto delta_of = [&](int row) {
    return p.delta + (plane * p.delta_blocks + min(row, p.q_tokens - 1) / p.delta_rows) * p.k_tokens;
  };
  // Bit j of word w: key 32w + j of the tile holds a value that is not finite.
  const auto not_finite = [&](int tile, int w) -> uint32_t {
    const int word = tile * (C::kBlockN / 32) + w;
    return kQuantized && tile >= 0 && word < p.k_words ? p.k_not_finite[kv_plane * p.k_words + word] : 0;
  };
  // Tiles with scores that a mask hides or changes, or that INT8 cannot hold, take the longer way.
  [[maybe_unused]] uint32_t q[C::kQKRow / 32][kRowTiles][4];
  [[maybe_unused]] bool has_q = false;
  const auto values_not_finite = [&](int tile) -> uint32_t {
    const bool codes = C::kColumnTerms && p.v_not_finite != nullptr && tile >= 0;
    uint32_t bits = 0;
#pragma unroll
    for (int w = 0; w < C::kBlockN / 32; w++) {
      const int word = tile * (C::kBlockN / 32) + w;
      if (codes && word < p.k_words) bits |= p.v_not_finite[kv_plane * p.k_words + word];
    }
    return bits;
  };
  const auto hides = [&](int tile) {
    return values_not_finite(tile) != 0 || tile < open_begin || tile >= open_end ||
           mask_state(tile) == TileState::kHides;
  };
  // Calls set(row tile, n, element, score) for all scores that are not finite.
  const auto score_bad_keys = [&](int tile, auto set) {
#pragma unroll
    for (int w = 0; w < C::kBlockN / 32; w++) {
      for (uint32_t bits = not_finite(tile, w); bits != 0; bits &= bits - 1) {
        const int column = w * 32 + __ffs(static_cast<int>(bits)) - 1;
#pragma unroll
        for (int t = 0; t < kRowTiles; t++)
#pragma unroll
          for (int half = 0; half < 2; half++) {
            const int row = forgotten(lane_row) + t * 16 + half * 8;
            const float x = raw_score(p, forgotten(batch), forgotten(head), row, tile * C::kBlockN + column);
#pragma unroll
            for (int n = w * 4; n < w * 4 + 4; n++)
#pragma unroll
              for (int e = 0; e < 2; e++)
                if (n * 8 + c * 2 + e == column) set(t, n, 2 * half + e, x);
          }
      }
    }
  };
  // What a row sees of a tile but for a first key that is apart.
  const auto visible_codes = [&](int tile, int t, int half) {
    return visible(tile, t, half) & ~uint64_t{first_apart && tile == 0};
  };
  auto process = [&](auto masked) {
    constexpr bool kMasked = decltype(masked)::value;
    const int key0 = tile * C::kBlockN;
    ptx::copy_async_wait<0>();
    __syncthreads();  // the tile (K only, of one stage) is there; everybody is done with the one before
    const uint32_t k_tile = first_stage + stage, v_tile = k_tile + C::kKBytes;
    if constexpr (C::kStages > 1) {
      stage ^= kStageBytes;
      if (next >= 0) {
        k_loader.go_back(tile - next);
        v_loader.go_back(tile - next);
        k_loader.template load<true>(p.k, stage, C::kBlockN);
        v_loader.template load<true>(p.v, stage, C::kBlockN);
      }
    } else {
      v_loader.template load<!kMasked || C::kTiledV>(p.v, 0, p.k_tokens - key0);
      v_loader.go_back(tile - next);
    }
    ptx::copy_async_commit();
    if constexpr (C::kQInRegisters) {
      if (!has_q) {
        has_q = true;
#pragma unroll
        for (int step = 0; step < C::kQKRow / 32; step++)
#pragma unroll
          for (int t = 0; t < kRowTiles; t++) load_q<C>(q[step][t], q_tile, step, t);
      }
    }

    Score raw[kRowTiles][kNTiles][4];
    multiply_qk<C>(raw, q_tile, q, k_tile);
    const float k_scale = next_k_scale;
    next_k_scale = k_scale_of(next);
    if constexpr (C::kStages == 1) {
      ptx::copy_async_wait<0>();
      __syncthreads();  // V is there; everybody is done with K
      if (next >= 0) {
        k_loader.go_back(tile - next);
        k_loader.template load<true>(p.k, 0, C::kBlockN);
      }
      ptx::copy_async_commit();
    }

    if constexpr (kQuantized && kMasked) {
      // As the bits that leave the bias as they are.
      score_bad_keys(tile, [&](int t, int n, int e, float x) { raw[t][n][e] = __float_as_int(x); });
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
            if constexpr (kQuantized)
              s[t][n][e] = __int_as_float(raw[t][n][e]) - kBias;
            else
              s[t][n][e] = raw[t][n][e];
          }
    }
    float multiplier[kRowTiles][2];
#pragma unroll
    for (int t = 0; t < kRowTiles; t++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        multiplier[t][half] = clamp_factor(factor[t][half] * k_scale);
        // The bias of open tiles leaves in one addend with the maximum. That is exact as the multiplier has three
        // bits less, so that its product with the bias fits, and as the kept maximum is an integer.
        if (kQuantized && !C::kColumnTerms) multiplier[t][half] = float_of(bits_of(multiplier[t][half]) & ~7u);
      }
    const auto each_score = [&](auto change) {  // calls change(score, row tile, half, key less key0)
#pragma unroll
      for (int n = 0; n < kNTiles; n++)
#pragma unroll
        for (int t = 0; t < kRowTiles; t++)
#pragma unroll
          for (int e = 0; e < 4; e++) change(s[t][n][e], t, e / 2, n * 8 + c * 2 + e % 2);
    };
    const auto take_multiplier = [&] {
      each_score([&](float& x, int t, int half, int) { x *= multiplier[t][half]; });
#pragma unroll
      for (int t = 0; t < kRowTiles; t++) multiplier[t][0] = multiplier[t][1] = 1.0f;
    };
    if constexpr (C::kColumnTerms) {
      const int last_local = kMasked ? min(p.k_tokens - 1 - key0, C::kBlockN - 1) : C::kBlockN - 1;
      if (p.k_groups_a_tile == 0) {
        const GroupWindow groups(p.k_grouping, key0);
        each_score([&](float& x, int t, int half, int local) {
          x *= clamp_factor(factor[t][half] * k_scales[groups.of(min(local, last_local))]);
        });
#pragma unroll
        for (int t = 0; t < kRowTiles; t++) multiplier[t][0] = multiplier[t][1] = 1.0f;
      } else if (p.delta != nullptr) {
        take_multiplier();
      }
      // That of a key that is not finite is part of its score already.
      const auto add_delta = [&](float& x, float delta) {
        x = fmaf(p.scale_log2, kMasked && !is_finite(delta) ? 0.0f : delta, x);
      };
      if (one_delta) {
        const float* const delta = delta_of(row0) + key0;
        each_score([&](float& x, int, int, int local) { add_delta(x, delta[min(local, last_local)]); });
      } else if (p.delta != nullptr) {
        each_score([&](float& x, int t, int half, int local) {
          add_delta(x, delta_of(lane_row + t * 16 + half * 8)[key0 + min(local, last_local)]);
        });
      }
    }
    if constexpr (kMasked) {
      if (C::kGeneral && (p.changes_open_tiles || (p.adds_mask && mask_state(tile) != TileState::kOpen))) {
        take_multiplier();
        if (C::kBeyond && p.k_means > 1) {
#pragma unroll
          for (int t = 0; t < kRowTiles; t++) {
            const float2 shift = mean_scores(p, forgotten(batch), forgotten(head), forgotten(lane_row) + t * 16, key0);
            each_score([&](float& x, int score_t, int half, int) {
              if (score_t == t) x += half == 0 ? shift.x : shift.y;
            });
          }
        }
        change_scores(p, each_score, forgotten(batch), forgotten(head), forgotten(lane_row), key0);
      }
#pragma unroll
      for (int t = 0; t < kRowTiles; t++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          uint64_t bits = visible(tile, t, half);
          seen |= bits != 0 ? 1u << (t * 2 + half) : 0;
          if (first_apart && tile == 0) bits &= ~uint64_t{1};
          const uint32_t low = static_cast<uint32_t>(bits) >> c * 2, high = static_cast<uint32_t>(bits >> 32) >> c * 2;
#pragma unroll
          for (int n = 0; n < kNTiles; n++)
#pragma unroll
            for (int e = 0; e < 2; e++)
              if (!((n < 4 ? low : high) & 1u << (n % 4 * 8 + e))) s[t][n][2 * half + e] = -INFINITY;
        }
    } else {
      seen = ~0u;
    }

    // Online softmax in base 2: first the maxima.
    float addend[kRowTiles][2];
    [[maybe_unused]] float gain[kRowTiles][2];
#pragma unroll
    for (int t = 0; t < kRowTiles; t++) {
      float rescale[2];
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float largest;
        if constexpr (C::kTilePeaks) {  // a score that is NaN makes it NaN, and with it the row
          largest = s[t][0][2 * half];
#pragma unroll
          for (int n = 0; n < kNTiles; n++)
            largest = larger_or_nan(largest, larger_or_nan(s[t][n][2 * half], s[t][n][2 * half + 1]));
          largest *= multiplier[t][half];
          largest = larger_or_nan(largest, __shfl_xor_sync(~0u, largest, 1));
          largest = larger_or_nan(largest, __shfl_xor_sync(~0u, largest, 2));
          const float top = fmaxf(maximum[t][half], largest), offset = top == -INFINITY ? 0.0f : top;
          rescale[half] = ptx::exp2_approx(maximum[t][half] - offset);
          gain[t][half] = ptx::exp2_approx(largest - offset);
          maximum[t][half] = top;
          addend[t][half] = p.log2_range - (largest == -INFINITY ? 0.0f : largest);
          continue;
        }
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
        if (kQuantized && !C::kColumnTerms) largest = ceilf(largest);
        const float headroom = C::kColumnTerms ? p.headroom : C::kHeadroom;
        const float top = largest > maximum[t][half] + headroom ? largest : maximum[t][half];
        const float offset = top == -INFINITY ? 0.0f : top;  // nothing visible yet
        rescale[half] = ptx::exp2_approx(maximum[t][half] - offset);
        maximum[t][half] = top;
        addend[t][half] = (kLazy ? fmaf(-kBias, multiplier[t][half], -offset) : -offset) - C::kShift;
        if constexpr (C::kColumnTerms) addend[t][half] += p.log2_range;
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
    if constexpr (kMasked) {
      const auto visible_here = [&](int t, int half) { return visible_codes(tile, t, half); };
      if constexpr (C::kTilePeaks) {
        const int word = tile * (C::kBlockN / 32);
        uint64_t found = p.v_not_finite[kv_plane * p.k_words + word];
        if (word + 1 < p.k_words) found |= uint64_t{p.v_not_finite[kv_plane * p.k_words + word + 1]} << 32;
        add_bad_values<C>(p, o, forgotten(batch), forgotten(kv_head), key0, found, visible_here);
      } else if (hides(tile)) {
        isolate_values<C>(shared + (v_tile - q_tile), o, visible_here);
      }
    }
    if constexpr (C::kTilePeaks) {
      uint32_t codes[C::kBlockN / 32][kRowTiles][4];
#pragma unroll
      for (int t = 0; t < kRowTiles; t++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
          uint32_t total = 0;
#pragma unroll
          for (int n = 0; n < kNTiles; n += 2) {
            uint32_t bits[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
              const float x = s[t][n + i / 2][2 * half + i % 2];
              bits[i] = bits_of(ptx::exp2_approx(fmaf(x, multiplier[t][half], addend[t][half])) + kBias);
            }
            const uint32_t four =
                __byte_perm(__byte_perm(bits[0], bits[1], 0x0040), __byte_perm(bits[2], bits[3], 0x0040), 0x5410);
            codes[n / 4][t][n / 2 % 2 * 2 + half] = four;
            total = __dp4a(four, 0x01010101u, total);
          }
          sum[t][half] = fmaf(static_cast<float>(total), gain[t][half], sum[t][half]);
        }
      }
      multiply_pv_bytes<C>(o, codes, gain, v_tile);
      return;
    } else {
      // Then P, 16 keys at a time, so that exponentials overlap the products of the keys before.
      constexpr int kSteps = C::kBlockN / 16;
      uint32_t probabilities[C::kFp8 ? kSteps / 2 : kSteps][kRowTiles][4];
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
#pragma unroll
            for (int half = 0; half < 2; half++) {
              if constexpr (C::kFp8) {
                const uint32_t pair = ptx::pack_e4m3(e[2 * half], e[2 * half + 1]);
                uint32_t& word = probabilities[step / 2][t][step % 2 * 2 + half];
                word = n == 0 ? pair : word | pair << 16;
              } else {
                uint32_t pair = pack<C::kPV>(e[2 * half], e[2 * half + 1]);
                if constexpr (C::kColumnTerms) pair = round_codes(pair, p);
                probabilities[step][t][2 * n + half] = pair;
              }
            }
          }
        }
      };
      exponentiate(0);
#pragma unroll
      for (int step = 0; step < kSteps; step++) {
        if (step + 1 < kSteps) exponentiate(step + 1);
        if constexpr (!C::kF16Accumulator && !C::kFp8) multiply_pv<C>(o, probabilities[step], v_tile, step);
      }
      if constexpr (C::kFp8)
        multiply_pv_fp8<C>(o, probabilities, v_tile);
      else if constexpr (C::kF16Accumulator)
        multiply_pv_f16<C>(o, probabilities, v_tile);
    }
  };
  // What else takes the longer way than the edges of what rows see; known one tile ahead.
  const auto find_obstacles = [&](int tile) {
    uint32_t bits = values_not_finite(tile) | static_cast<uint32_t>(mask_state(tile) != TileState::kOpen);
#pragma unroll
    for (int w = 0; w < C::kBlockN / 32; w++) bits |= not_finite(tile, w);
    return bits;
  };
  uint32_t obstacles = find_obstacles(tile), next_obstacles = find_obstacles(next);
  const auto is_open = [&] {
    return tile >= open_begin && tile < open_end && obstacles == 0 && !(C::kGeneral && p.changes_open_tiles);
  };
  const auto advance = [&] {
    tile = next;
    next = next_tile(tile);
    obstacles = next_obstacles;
    next_obstacles = find_obstacles(next);
  };
  while (tile >= 0) {
    for (; is_open(); advance()) process(std::false_type{});
    for (; tile >= 0 && !is_open(); advance()) process(std::true_type{});
  }

  if constexpr (C::kBeyond) {
    if (p.band) {
      ptx::copy_async_wait<0>();
      auto& exact = *reinterpret_cast<ExactTile<C>*>(shared);
      static_assert(sizeof(exact) <= C::kSharedBytes);
#pragma unroll 1
      for (tile = end - 1; tile >= begin; tile--) {
        if (!is_exact(tile) || mask_state(tile) == TileState::kClosed) continue;
        const int key0 = tile * C::kBlockN;
        float s[kRowTiles][kNTiles][4] = {};
        multiply_exactly<C>(p, exact, s, batch, head, row0, key0);
        const auto each_score = [&](auto change) {
#pragma unroll
          for (int n = 0; n < kNTiles; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) change(s[0][n][e], 0, e / 2, n * 8 + c * 2 + e % 2);
        };
        each_score([&](float& x, int, int half, int) {
          x *= factor[0][half] == factor[0][half] ? p.raw_log2 : factor[0][half];
        });
        score_bad_keys(tile, [&](int t, int n, int e, float x) { s[t][n][e] = x; });
        change_scores(p, each_score, batch, head, lane_row, key0);
        float rescale[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
          uint64_t bits = visible(tile, 0, half);
          seen |= bits != 0 ? 1u << half : 0;
          bits = visible_codes(tile, 0, half) >> c * 2;
          float largest = -INFINITY;
#pragma unroll
          for (int n = 0; n < kNTiles; n++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
              float& x = s[0][n][2 * half + e];
              x = bits >> (n * 8 + e) & 1 ? x : -INFINITY;
              largest = fmaxf(largest, x);
            }
          largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
          largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
          const float top = fmaxf(maximum[0][half], largest), offset = top == -INFINITY ? 0.0f : top;
          rescale[half] = ptx::exp2_approx(maximum[0][half] - offset);
          maximum[0][half] = top;
          sum[0][half] *= rescale[half];
#pragma unroll
          for (int n = 0; n < kNTiles; n++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
              float& x = s[0][n][2 * half + e];
              x = ptx::exp2_approx(x - offset + p.log2_range);
              sum[0][half] += x;
            }
        }
#pragma unroll
        for (int n = 0; n < kDTiles; n++)
#pragma unroll
          for (int e = 0; e < 4; e++) o[0][n][e] *= rescale[e / 2];
        add_values_exactly<C>(p, exact, o, s, batch, kv_head, key0,
                              [&](int t, int half) { return visible_codes(tile, t, half); });
      }
    }
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
      const bool sees = seen >> (t * 2 + half) & 1;
      const float shift = C::kShift - (C::kColumnTerms ? p.log2_range : 0.0f);  // of sums
      const float row_shift = p.lse_shift != nullptr ? p.lse_shift[plane * p.q_tokens + row] : 0.0f;
      float top = maximum[t][half], kept = 1.0f, share = 1.0f, unseen = -INFINITY;
      // A logit that counts in the denominator alone, and a first key that is apart from the others.
      const bool adds_first = first_apart && (visible(0, t, half) & 1);
      [[maybe_unused]] float first_share = 0.0f;
      if (C::kGeneral && (p.sinks != nullptr || adds_first)) {
        float sink = -INFINITY, of_first = 0.0f;
        if (p.sinks != nullptr) {
          unseen = p.sinks[head * p.sinks_stride];
          sink = (unseen - row_shift) * kLog2e;
          top = fmaxf(top, sink);
        }
        if constexpr (C::kBeyond) {
          float first = -INFINITY;
          if (adds_first) {
            first = p.first_scores[plane * p.q_tokens + row] * kLog2e;
            change_scores(
                p, [&](auto change) { change(first, t, half, 0); }, batch, head, lane_row, 0);
          }
          top = fmaxf(top, first);
          of_first = ptx::exp2_approx(first - top - shift);
        }
        kept = ptx::exp2_approx(maximum[t][half] - top);
        const float of_keys = total * kept;
        total = of_keys + ptx::exp2_approx(sink - top - shift) + of_first;
        share = of_keys / total;
        if constexpr (C::kBeyond) first_share = of_first / total;
      }
      const float inverse = kept / total;
      if (p.lse != nullptr && c == 0) {
        const float lse = (top + (log2f(total) + shift)) * kLn2 + row_shift;
        p.lse[batch * p.lse_stride[0] + head * p.lse_stride[1] + row * p.lse_stride[2]] = sees ? lse : unseen;
      }
      const int64_t o_row = batch * p.o_stride[0] + head * p.o_stride[1] + row * p.o_stride[2];
      float2 outputs[kDTiles];  // in local memory where the loop over them stays one
#pragma unroll
      for (int n = 0; n < kDTiles; n++) outputs[n] = {o[t][n][2 * half] * inverse, o[t][n][2 * half + 1] * inverse};
#pragma unroll(C::kOutputsAtATime)
      for (int n = 0; n < kDTiles; n++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const int channel = n * 8 + c * 2 + e;
          if (channel >= p.v_dim) break;
          float value = e == 0 ? outputs[n].x : outputs[n].y;
          if (p.v_scales != nullptr) value *= p.v_scales[kv_plane * p.v_dim + channel];
          if (p.v_mean != nullptr) value += p.v_mean[kv_plane * p.v_dim + channel] * share;
          if (C::kBeyond && adds_first) {
            const float of_first = raw_value(p.v_raw, p.v_raw_dtype, batch, kv_head, 0, channel);
            value += is_finite(of_first) ? of_first * first_share : of_first;
          }
          // A mean of values is no larger than the largest; rounding P must not take it past what the type holds.
          if (is_finite(value)) value = fminf(fmaxf(value, -p.largest), p.largest);
          store_element(p.o, p.out_dtype, o_row + channel * p.o_stride[3], sees ? value : 0.0f);
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

// One head dimension a source file, and another for masks, so that they compile side by side.
template <int kHeadDim, bool kGeneral>
void launch_flash_for(const AttentionParams& params, DType dtype, int64_t planes, cudaStream_t stream) {
  using ptx::Operand;
  const auto launch = [&](auto operand) {
    constexpr Operand kOperand = decltype(operand)::value;
    launch_attention<AttentionConfig<kHeadDim, kOperand, kOperand, false, false, false, kGeneral>>(params, planes,
                                                                                                   stream);
  };
  if (dtype == DType::kF16) return launch(std::integral_constant<Operand, Operand::kF16>{});
  launch(std::integral_constant<Operand, Operand::kBF16>{});
}

template <int kHeadDim, bool kGeneral>
void launch_sage_for(const AttentionParams& params, bool f16_accumulator, bool column_terms, int64_t planes,
                     cudaStream_t stream) {
  using ptx::Operand;
  const auto launch = [&](auto accumulator, auto terms, auto few_rows) {
    launch_attention<AttentionConfig<kHeadDim, Operand::kS8, Operand::kF16, decltype(accumulator)::value,
                                     decltype(terms)::value, decltype(few_rows)::value, kGeneral>>(params, planes,
                                                                                                   stream);
  };
  constexpr std::true_type kYes;
  constexpr std::false_type kNo;
  if (column_terms || (kGeneral && f16_accumulator)) {
    return f16_accumulator ? launch(kYes, kYes, kYes) : launch(kNo, kYes, kYes);
  }
  if constexpr (!kGeneral) {
    if (f16_accumulator) return launch(kYes, kNo, kYes);
    constexpr bool kHasChoice = attention_tuning(kHeadDim, true, false, true, false).row_tiles !=
                                attention_tuning(kHeadDim, true, false, false, false).row_tiles;
    if constexpr (kHasChoice) {
      const bool diagonal = params.last_key - params.offset < params.k_tokens;
      if (!few_rows_pay(column_terms, diagonal, params.k_tokens)) return launch(kNo, kNo, kNo);
    }
  }
  launch(kNo, kNo, kYes);
}

// Products of codes by FP8 or INT4 tensor cores; where scores may be masked by those of FP8 alone.
template <int kHeadDim, bool kGeneral>
void launch_codes_for(const AttentionParams& params, bool int4, bool fp8, bool f16_accumulator, int64_t planes,
                      cudaStream_t stream) {
  using ptx::Operand;
  const auto launch = [&](auto qk, auto pv, auto accumulator) {
    constexpr Operand kQK = decltype(qk)::value, kPV = decltype(pv)::value;
    launch_attention<AttentionConfig<kHeadDim, kQK, kPV, decltype(accumulator)::value, true, true, kGeneral>>(
        params, planes, stream);
  };
  constexpr std::integral_constant<Operand, Operand::kS8> kInt8;
  constexpr std::integral_constant<Operand, Operand::kE4M3> kE4M3;
  if constexpr (!kGeneral) {
    constexpr std::integral_constant<Operand, Operand::kS4> kInt4;
    constexpr std::integral_constant<Operand, Operand::kF16> kF16;
    if (int4) return fp8 ? launch(kInt4, kE4M3, std::false_type{}) : launch(kInt4, kF16, std::false_type{});
  }
  f16_accumulator ? launch(kInt8, kE4M3, std::true_type{}) : launch(kInt8, kE4M3, std::false_type{});
}

template <int kHeadDim>
void launch_sage_int8_for(const AttentionParams& params, int64_t planes, cudaStream_t stream) {
  using ptx::Operand;
  launch_attention<AttentionConfig<kHeadDim, Operand::kS8, Operand::kS8, false, true, true, true>>(params, planes,
                                                                                                   stream);
}

}  // namespace sage::cuda
