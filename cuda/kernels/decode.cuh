// `flash` for few queries: keys are split over blocks, and their warps; every part has a softmax of its own, and the
// parts are added up by their log-sum-exp.
//
// A warp takes 16 keys at a time, of which it has some tiles on their way: what counts is how fast K and V are read.
// Fragments are those of the PTX manual: lane l holds rows g and g + 8 (g = l / 4) and columns 8n + 2c, + 1 (c = l %
// 4).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "decode.h"
#include "kernels.h"
#include "ptx/memory.cuh"
#include "ptx/mma.cuh"
#include "sm90/launch.cuh"

namespace sage::cuda::decode {

struct DecodeParams {
  const char *q, *k, *v;
  int64_t q_stride[3], k_stride[3], v_stride[3];  // elements
  char* o;
  float* lse;
  int64_t o_stride[4], lse_stride[3];
  DType out_dtype;
  float *parts, *part_lse;  // [planes, row blocks, splits, 16, part_dim] and [.., 16]; null where keys are not split
  int q_tokens, k_tokens, head_dim, v_dim, part_dim;
  int kv_heads, group;  // query heads that share one KV head
  int64_t planes;
  int row_blocks, splits, split_keys;
  int merge_warps;            // that add up the parts of a row
  float scale_log2, largest;  // largest: that V can hold
};

// kOverlaps: launched while the kernel before may still run (sm_90a).
template <int kHeadDim_, ptx::Operand kOperand_, bool kOverlaps_>
struct DecodeConfig {
  static constexpr bool kOverlaps = kOverlaps_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr ptx::Operand kOperand = kOperand_;
  static constexpr int kWarps = kHeadDim == 256 ? 2 : 4, kThreads = 32 * kWarps, kKeys = 16;
  static constexpr int kStages = kHeadDim == 64 ? 4 : kHeadDim == 128 ? 3 : 2;
  static constexpr int kRowBytes = 2 * kHeadDim, kTileBytes = kKeys * kRowBytes, kChunks = kRowBytes / 16;
  static constexpr int kWarpBytes = kStages * 2 * kTileBytes, kTilesBytes = kWarps * kWarpBytes;
  // In registers, queries need shared memory only until the last stage is filled for the first time; else they are read
  // for every tile.
  static constexpr bool kQueriesInRegisters = kHeadDim <= 128;
  static constexpr int kQueriesAt = kQueriesInRegisters ? (kStages - 1) * 2 * kTileBytes : kTilesBytes;
  static constexpr int kSharedBytes = kTilesBytes + (kQueriesInRegisters ? 0 : kDecodeRows * kRowBytes);
  static constexpr int kAhead = 128;  // keys that are brought into the cache while the kernel before runs
  static constexpr float kHeadroom = 8.0f;
  // bf16 values go up to 3e38, and their sums must not overflow.
  static constexpr float kShift = kOperand == ptx::Operand::kBF16 ? 32.0f : 0.0f;
  // Where the warps leave their parts: 16 rows of O, eight of which share no bank, then maxima and sums.
  static constexpr int kPartPitch = kHeadDim + 8, kMaximaAt = kDecodeRows * kPartPitch;
  static constexpr int kSumsAt = kMaximaAt + kDecodeRows, kPartFloats = kSumsAt + kDecodeRows;
  static_assert(kWarps * kPartFloats * 4 <= kTilesBytes && kSharedBytes <= 99 * 1024);
};

// Brings a multiple of 16 bytes into the L2 cache, where what others write meanwhile is seen (sm_90a).
__device__ __forceinline__ void prefetch(const void* from, uint32_t bytes) {
  if (bytes == 0) return;
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

// Byte of a chunk in a tile: chunks are swizzled by row, so that eight rows of one never share a bank.
template <class C>
__device__ __forceinline__ uint32_t chunk_at(int row, int chunk) {
  return row * C::kRowBytes + ((chunk ^ (row & 7)) << 4);
}

// 16 rows from `first` on of K or V; what lies beyond the tensor becomes zeros.
template <class C>
__device__ __forceinline__ void copy_tile(uint32_t to, const char* plane, int64_t row_stride, int first, int end,
                                          int channels) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < C::kKeys * C::kChunks / 32; i++) {
    const int at = i * 32 + lane, row = at / C::kChunks, chunk = at % C::kChunks;
    const int bytes = first + row < end ? min(max(2 * (channels - 8 * chunk), 0), 16) : 0;
    const char* const from = plane + 2 * ((first + row) * row_stride + 8 * chunk);
    ptx::copy_async_16(to + chunk_at<C>(row, chunk), bytes > 0 ? from : plane, bytes);
  }
}

template <ptx::Operand kOperand>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  if constexpr (kOperand == ptx::Operand::kF16) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
}

__device__ __forceinline__ void store(char* o, DType dtype, int64_t at, float value) {
  if (dtype == DType::kF32) {
    reinterpret_cast<float*>(o)[at] = value;
  } else if (dtype == DType::kF16) {
    reinterpret_cast<__half*>(o)[at] = __float2half_rn(value);
  } else {
    reinterpret_cast<__nv_bfloat16*>(o)[at] = __float2bfloat16_rn(value);
  }
}

// A row of all queries that share a KV head.
struct Row {
  int head, token;
  bool exists;

  __device__ __forceinline__ Row(const DecodeParams& p, int kv_head, int row)
      : head(kv_head * p.group + row / p.q_tokens), token(row % p.q_tokens), exists(row < p.group * p.q_tokens) {}
};

// O of a channel, and by its channel 0 the log-sum-exp (base 2) of the row.
__device__ __forceinline__ void store_result(const DecodeParams& p, int batch, const Row& row, int channel, float value,
                                             float lse2) {
  // A mean of values is no larger than the largest; rounding P must not take it past what the type holds.
  if (fabsf(value) < INFINITY) value = fminf(fmaxf(value, -p.largest), p.largest);
  store(p.o, p.out_dtype,
        batch * p.o_stride[0] + row.head * p.o_stride[1] + row.token * p.o_stride[2] + channel * p.o_stride[3], value);
  if (channel == 0 && p.lse != nullptr) {
    p.lse[batch * p.lse_stride[0] + row.head * p.lse_stride[1] + row.token * p.lse_stride[2]] = lse2 * kLn2;
  }
}

// What a part with this log-sum-exp (base 2) or maximum counts beside the largest.
__device__ __forceinline__ float weight_of(float own, float most) {
  return own == -INFINITY ? 0.0f : exp2f(own - most);
}

__device__ __forceinline__ float weighted(float weight, float x) {
  return weight == 0.0f ? 0.0f : weight * x;  // x may be infinite
}

template <class C>
__global__ void __launch_bounds__(C::kThreads) decode_kernel(const __grid_constant__ DecodeParams p) {
  extern __shared__ __align__(128) uint8_t shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, c = lane % 4;
  const int split = blockIdx.x % p.splits, rest = blockIdx.x / p.splits;
  const int row_block = rest % p.row_blocks, plane = rest / p.row_blocks;
  const int batch = plane / p.kv_heads, kv_head = plane % p.kv_heads;
  const char* const k_plane = p.k + 2 * (batch * p.k_stride[0] + kv_head * p.k_stride[1]);
  const char* const v_plane = p.v + 2 * (batch * p.v_stride[0] + kv_head * p.v_stride[1]);
  const int first_key = split * p.split_keys, end = min(first_key + p.split_keys, p.k_tokens);
  constexpr int kStep = C::kWarps * C::kKeys;
  if constexpr (C::kOverlaps) {
    ptx::let_next_kernel_start();
    for (int64_t row = first_key + threadIdx.x; row < min(first_key + C::kAhead, end); row += C::kThreads) {
      prefetch(k_plane + 2 * row * p.k_stride[2], p.head_dim / 8 * 16);
      prefetch(v_plane + 2 * row * p.v_stride[2], p.v_dim / 8 * 16);
    }
    ptx::wait_for_previous_kernel();
  }
  const uint32_t stages = ptx::shared_address(shared) + warp * C::kWarpBytes;

  const auto fetch = [&](int key, int stage) {
    const uint32_t to = stages + stage * 2 * C::kTileBytes;
    if (key < end) {
      copy_tile<C>(to, k_plane, p.k_stride[2], key, end, p.head_dim);
      copy_tile<C>(to + C::kTileBytes, v_plane, p.v_stride[2], key, end, p.v_dim);
    }
    ptx::copy_async_commit();
  };
  const uint32_t queries = ptx::shared_address(shared) + C::kQueriesAt;
  for (int at = threadIdx.x; at < kDecodeRows * C::kChunks; at += C::kThreads) {
    const int chunk = at % C::kChunks, at_row = at / C::kChunks;
    const Row row(p, kv_head, row_block * kDecodeRows + at_row);
    const int bytes = row.exists ? min(max(2 * (p.head_dim - 8 * chunk), 0), 16) : 0;
    const int64_t from = batch * p.q_stride[0] + row.head * p.q_stride[1] + row.token * p.q_stride[2] + 8 * chunk;
    ptx::copy_async_16(queries + chunk_at<C>(at_row, chunk), p.q + (bytes > 0 ? 2 * from : 0), bytes);
  }
  ptx::copy_async_commit();
  int key = first_key + warp * C::kKeys;
#pragma unroll
  for (int i = 0; i < C::kStages - 1; i++) fetch(key + i * kStep, i);
  ptx::copy_async_wait<C::kStages - 1>();
  __syncthreads();  // the queries are there
  const auto load_queries = [&](uint32_t(&fragment)[4], int step) {
    ptx::load_matrices(fragment, queries + chunk_at<C>(lane % 16, 2 * step + lane / 16));
  };
  uint32_t q[C::kHeadDim / 16][4];
  if constexpr (C::kQueriesInRegisters) {
#pragma unroll
    for (int step = 0; step < C::kHeadDim / 16; step++) load_queries(q[step], step);
    __syncthreads();
  }

  float o[C::kHeadDim / 8][4] = {}, maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {};
  int stage = 0;
  for (; key < end; key += kStep) {
    ptx::copy_async_wait<C::kStages - 2>();
    __syncwarp();  // every lane's part is there, and every lane is done with the stage that is filled next
    const uint32_t k_tile = stages + stage * 2 * C::kTileBytes, v_tile = k_tile + C::kTileBytes;
    fetch(key + (C::kStages - 1) * kStep, stage == 0 ? C::kStages - 1 : stage - 1);
    stage = stage + 1 == C::kStages ? 0 : stage + 1;

    float s[2][4] = {};
#pragma unroll
    for (int step = 0; step < C::kHeadDim / 16; step++) {
      uint32_t b[4];
      ptx::load_matrices(b, k_tile + chunk_at<C>(lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
      if (!C::kQueriesInRegisters) load_queries(q[step], step);
      ptx::mma<C::kOperand>(s[0], q[step], b[0], b[1], s[0]);
      ptx::mma<C::kOperand>(s[1], q[step], b[2], b[3], s[1]);
    }
    if (key + C::kKeys > end) {
#pragma unroll
      for (int n = 0; n < 2; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)
          if (key + n * 8 + c * 2 + e % 2 >= end) s[n][e] = -INFINITY;
    }

    float rescale[2];
    uint32_t probabilities[4];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float largest = fmaxf(fmaxf(s[0][2 * half], s[0][2 * half + 1]), fmaxf(s[1][2 * half], s[1][2 * half + 1]));
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2)) * p.scale_log2;
      const float next = largest > maximum[half] + C::kHeadroom ? largest : maximum[half];
      const float offset = next == -INFINITY ? 0.0f : next;  // nothing but -inf yet
      rescale[half] = ptx::exp2_approx(maximum[half] - offset);
      maximum[half] = next;
      sum[half] *= rescale[half];
#pragma unroll
      for (int n = 0; n < 2; n++) {
        const float low = ptx::exp2_approx(fmaf(s[n][2 * half], p.scale_log2, -offset - C::kShift));
        const float high = ptx::exp2_approx(fmaf(s[n][2 * half + 1], p.scale_log2, -offset - C::kShift));
        sum[half] += low + high;
        probabilities[2 * n + half] = pack<C::kOperand>(low, high);
      }
    }
    if (__any_sync(~0u, rescale[0] != 1.0f || rescale[1] != 1.0f)) {
#pragma unroll
      for (int n = 0; n < C::kHeadDim / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) o[n][e] *= rescale[e / 2];
    }
#pragma unroll
    for (int n = 0; n < C::kHeadDim / 16; n++) {
      uint32_t b[4];
      ptx::load_matrices_transposed(b, v_tile + chunk_at<C>(lane % 16, 2 * n + lane / 16));
      ptx::mma<C::kOperand>(o[2 * n], probabilities, b[0], b[1], o[2 * n]);
      ptx::mma<C::kOperand>(o[2 * n + 1], probabilities, b[2], b[3], o[2 * n + 1]);
    }
  }
  ptx::copy_async_wait<0>();
  __syncthreads();  // the stages are free

  auto* const part = reinterpret_cast<float*>(shared) + warp * C::kPartFloats;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float total = sum[half];
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
    const int row = g + 8 * half;
    if (c == 0) {
      part[C::kMaximaAt + row] = maximum[half];
      part[C::kSumsAt + row] = total;
    }
#pragma unroll
    for (int n = 0; n < C::kHeadDim / 8; n++) {
      *reinterpret_cast<float2*>(part + row * C::kPartPitch + n * 8 + c * 2) =
          make_float2(o[n][2 * half], o[n][2 * half + 1]);
    }
  }
  __syncthreads();

  const int channels = p.parts == nullptr ? p.v_dim : p.part_dim;
  for (int row = warp; row < kDecodeRows; row += C::kWarps) {
    const Row of(p, kv_head, row_block * kDecodeRows + row);
    if (!of.exists) break;
    const auto* const parts = reinterpret_cast<const float*>(shared);
    float most = -INFINITY, total = 0.0f, weight[C::kWarps];
#pragma unroll
    for (int w = 0; w < C::kWarps; w++) {
      most = fmaxf(most, parts[w * C::kPartFloats + C::kMaximaAt + row]);
    }
#pragma unroll
    for (int w = 0; w < C::kWarps; w++) {
      const float own = parts[w * C::kPartFloats + C::kMaximaAt + row];
      weight[w] = weight_of(own, most);
      total += weight[w] * parts[w * C::kPartFloats + C::kSumsAt + row];
    }
    const float lse2 = most + log2f(total) + C::kShift;
    const int64_t part_row = int64_t{blockIdx.x} * kDecodeRows + row;
    for (int channel = lane; channel < channels; channel += 32) {
      float value = 0.0f;
#pragma unroll
      for (int w = 0; w < C::kWarps; w++) {
        value += weighted(weight[w], parts[w * C::kPartFloats + row * C::kPartPitch + channel]);
      }
      if (p.parts == nullptr) {
        store_result(p, batch, of, channel, value / total, lse2);
      } else {
        p.parts[part_row * p.part_dim + channel] = total == 0.0f ? 0.0f : value / total;
      }
    }
    if (p.parts != nullptr && lane == 0) p.part_lse[part_row] = lse2;
  }
}

constexpr int kMergeWarps = 8, kMergeChannels = 128;

__host__ __device__ inline int channel_slices(const DecodeParams& p) {
  return (p.v_dim + kMergeChannels - 1) / kMergeChannels;
}

// Adds up the parts of rows, each by p.merge_warps warps that take parts in turn; a lane has four channels.
template <bool kOverlaps>
__global__ void __launch_bounds__(32 * kMergeWarps) merge_kernel(const __grid_constant__ DecodeParams p) {
  constexpr int kBatch = 8;  // parts on their way at a time
  __shared__ float4 values[kMergeWarps][32];
  __shared__ float maxima[kMergeWarps], sums[kMergeWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, place = warp % p.merge_warps;
  const int slices = channel_slices(p), block_of_rows = blockIdx.x / slices, slice = blockIdx.x % slices;
  const int rows = p.group * p.q_tokens, at = (block_of_rows * kMergeWarps + warp) / p.merge_warps;
  const int plane = at / rows, row = at % rows, channel = slice * kMergeChannels + 4 * lane;
  const int splits = plane < p.planes ? p.splits : 0;
  const int64_t block = int64_t{plane} * p.row_blocks + row / kDecodeRows;
  const int64_t first = block * p.splits * kDecodeRows + row % kDecodeRows;
  if constexpr (kOverlaps) {
    ptx::wait_for_previous_kernel();
    ptx::let_next_kernel_start();
  }

  float most = -INFINITY, total = 0.0f;
  float4 value{};
  const auto rescale = [&](float next) {
    const float weight = weight_of(most, next);
    most = next;
    total = weighted(weight, total);
    value = {weighted(weight, value.x), weighted(weight, value.y), weighted(weight, value.z),
             weighted(weight, value.w)};
  };
  const auto add = [&](float weight, float4 x, float sum) {
    total += weighted(weight, sum);
    value.x += weighted(weight, x.x);
    value.y += weighted(weight, x.y);
    value.z += weighted(weight, x.z);
    value.w += weighted(weight, x.w);
  };
  for (int begin = place; begin < splits; begin += kBatch * p.merge_warps) {
    float lse2[kBatch], next = most;
    float4 x[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; i++) {
      const int split = begin + i * p.merge_warps;
      const int64_t part = first + int64_t{split} * kDecodeRows;
      lse2[i] = split < splits ? __ldcg(p.part_lse + part) : -INFINITY;
      x[i] = split < splits && channel < p.v_dim
                 ? __ldcg(reinterpret_cast<const float4*>(p.parts + part * p.part_dim + channel))
                 : float4{};
    }
#pragma unroll
    for (int i = 0; i < kBatch; i++) next = fmaxf(next, lse2[i]);
    rescale(next);
#pragma unroll
    for (int i = 0; i < kBatch; i++) add(weight_of(lse2[i], most), x[i], 1.0f);
  }
  values[warp][lane] = value;
  if (lane == 0) {
    maxima[warp] = most;
    sums[warp] = total;
  }
  __syncthreads();
  if (place != 0 || plane >= p.planes) return;
  float next = most;
  for (int i = 1; i < p.merge_warps; i++) next = fmaxf(next, maxima[warp + i]);
  rescale(next);
  for (int i = 1; i < p.merge_warps; i++)
    add(weight_of(maxima[warp + i], most), values[warp + i][lane], sums[warp + i]);

  const Row of(p, plane % p.kv_heads, row);
  const float lse2 = most + log2f(total), numbers[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if (channel + i < p.v_dim) store_result(p, plane / p.kv_heads, of, channel + i, numbers[i] / total, lse2);
  }
}

template <bool kOverlaps>
void launch(void (*kernel)(DecodeParams), int64_t blocks, unsigned threads, size_t shared_bytes, cudaStream_t stream,
            const DecodeParams& params) {
  if constexpr (kOverlaps) {
    sm90::launch_overlapped(kernel, static_cast<unsigned>(blocks), threads, shared_bytes, stream, params);
  } else {
    kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, stream>>>(params);
    SAGE_CUDA(cudaGetLastError());
  }
}

template <class C>
void launch_parts(const DecodeParams& params, cudaStream_t stream) {
  SAGE_CUDA(cudaFuncSetAttribute(decode_kernel<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSharedBytes));
  launch<C::kOverlaps>(decode_kernel<C>, params.planes * params.row_blocks * params.splits, C::kThreads,
                       C::kSharedBytes, stream, params);
}

template <ptx::Operand kOperand, bool kOverlaps>
void launch_parts_of(const DecodeParams& params, int padded_head_dim, cudaStream_t stream) {
  switch (padded_head_dim) {
    case 64: return launch_parts<DecodeConfig<64, kOperand, kOverlaps>>(params, stream);
    case 128: return launch_parts<DecodeConfig<128, kOperand, kOverlaps>>(params, stream);
    default: return launch_parts<DecodeConfig<256, kOperand, kOverlaps>>(params, stream);
  }
}

template <bool kOverlaps>
void launch_all(const AttentionOp& op, void* workspace, cudaStream_t stream) {
  DecodeParams p{};
  p.q = static_cast<const char*>(op.q.data);
  p.k = static_cast<const char*>(op.k.data);
  p.v = static_cast<const char*>(op.v.data);
  p.o = static_cast<char*>(op.o.data);
  p.lse = static_cast<float*>(op.lse.data);
  for (int i = 0; i < 3; i++) {
    p.q_stride[i] = op.q.stride[i];
    p.k_stride[i] = op.k.stride[i];
    p.v_stride[i] = op.v.stride[i];
    p.lse_stride[i] = op.lse.stride[i];
  }
  for (int i = 0; i < 4; i++) p.o_stride[i] = op.o.stride[i];
  p.out_dtype = op.o.dtype;
  p.q_tokens = static_cast<int>(op.q.tokens());
  p.k_tokens = static_cast<int>(op.k.tokens());
  p.head_dim = static_cast<int>(op.q.channels());
  p.v_dim = static_cast<int>(op.v.channels());
  p.part_dim = static_cast<int>(decode_part_dim(p.v_dim));
  p.kv_heads = static_cast<int>(op.k.heads());
  p.planes = op.k.batch() * op.k.heads();
  p.group = static_cast<int>(op.q.heads() / op.k.heads());
  p.row_blocks = (p.group * p.q_tokens + kDecodeRows - 1) / kDecodeRows;
  p.splits = op.plan.key_splits;
  const int tiles = (p.k_tokens + kDecodeKeys - 1) / kDecodeKeys;
  p.split_keys = (tiles + p.splits - 1) / p.splits * kDecodeKeys;
  p.scale_log2 = op.scale * kLog2e;
  p.largest = op.v.dtype == DType::kF16 ? 65504.0f : 0x1.fep127f;
  if (p.splits > 1) {
    p.parts = static_cast<float*>(workspace);
    p.part_lse = p.parts + p.planes * p.row_blocks * p.splits * kDecodeRows * p.part_dim;
  }
  if (op.q.dtype == DType::kF16) {
    launch_parts_of<ptx::Operand::kF16, kOverlaps>(p, op.plan.padded_head_dim, stream);
  } else {
    launch_parts_of<ptx::Operand::kBF16, kOverlaps>(p, op.plan.padded_head_dim, stream);
  }
  if (p.splits == 1) return;
  p.merge_warps = p.splits > 8 ? 8 : p.splits > 4 ? 4 : p.splits > 2 ? 2 : 1;
  const int64_t warps = p.planes * p.group * p.q_tokens * p.merge_warps;
  launch<kOverlaps>(merge_kernel<kOverlaps>, (warps + kMergeWarps - 1) / kMergeWarps * channel_slices(p),
                    32 * kMergeWarps, 0, stream, p);
}

}  // namespace sage::cuda::decode
