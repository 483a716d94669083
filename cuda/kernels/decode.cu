// `flash` for few queries: keys are split over blocks, and their warps; every part has a softmax of its own, and the
// parts are added up by their log-sum-exp.
//
// A warp takes 16 keys at a time, of which it has some tiles on their way: what counts is how fast K and V are read.
// Fragments are those of the PTX manual: lane l holds rows g and g + 8 (g = l / 4) and columns 8n + 2c, + 1 (c = l %
// 4).
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "decode.h"
#include "kernels.h"
#include "ptx/memory.cuh"
#include "ptx/mma.cuh"

namespace sage::cuda {

namespace {

struct DecodeParams {
  const char *q, *k, *v;
  int64_t q_stride[3], k_stride[3], v_stride[3];  // elements
  char* o;
  float* lse;
  int64_t o_stride[4], lse_stride[3];
  DType out_dtype;
  float *parts, *part_lse;  // [planes, row blocks, splits, 16, v_dim] and [.., 16]; null where keys are not split
  int q_tokens, k_tokens, head_dim, v_dim;
  int kv_heads, group;  // query heads that share one KV head
  int row_blocks, splits, split_keys;
  float scale_log2, largest;  // largest: that V can hold
};

template <int kHeadDim_, ptx::Operand kOperand_>
struct DecodeConfig {
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
  static constexpr float kHeadroom = 8.0f;
  // bf16 values go up to 3e38, and their sums must not overflow.
  static constexpr float kShift = kOperand == ptx::Operand::kBF16 ? 32.0f : 0.0f;
  // Where the warps leave their parts: 16 rows of O, then maxima and sums.
  static constexpr int kPartFloats = kDecodeRows * (kHeadDim + 2);
  static_assert(kWarps * kPartFloats * 4 <= kTilesBytes && kSharedBytes <= 99 * 1024);
};

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
      part[kDecodeRows * C::kHeadDim + row] = maximum[half];
      part[kDecodeRows * C::kHeadDim + kDecodeRows + row] = total;
    }
#pragma unroll
    for (int n = 0; n < C::kHeadDim / 8; n++) {
      *reinterpret_cast<float2*>(part + row * C::kHeadDim + n * 8 + c * 2) =
          make_float2(o[n][2 * half], o[n][2 * half + 1]);
    }
  }
  __syncthreads();

  for (int row = warp; row < kDecodeRows; row += C::kWarps) {
    const Row of(p, kv_head, row_block * kDecodeRows + row);
    if (!of.exists) break;
    const auto* const parts = reinterpret_cast<const float*>(shared);
    float most = -INFINITY, total = 0.0f, weight[C::kWarps];
#pragma unroll
    for (int w = 0; w < C::kWarps; w++) {
      most = fmaxf(most, parts[w * C::kPartFloats + kDecodeRows * C::kHeadDim + row]);
    }
#pragma unroll
    for (int w = 0; w < C::kWarps; w++) {
      const float own = parts[w * C::kPartFloats + kDecodeRows * C::kHeadDim + row];
      weight[w] = own == -INFINITY ? 0.0f : exp2f(own - most);
      total += weight[w] * parts[w * C::kPartFloats + kDecodeRows * C::kHeadDim + kDecodeRows + row];
    }
    const float lse2 = most + log2f(total) + C::kShift;
    const int64_t part_row = (int64_t{blockIdx.x}) * kDecodeRows + row;
    for (int channel = lane; channel < p.v_dim; channel += 32) {
      float value = 0.0f;
#pragma unroll
      for (int w = 0; w < C::kWarps; w++) {
        if (weight[w] != 0.0f) value += weight[w] * parts[w * C::kPartFloats + row * C::kHeadDim + channel];
      }
      if (p.parts == nullptr) {
        store_result(p, batch, of, channel, value / total, lse2);
      } else {
        p.parts[part_row * p.v_dim + channel] = total == 0.0f ? 0.0f : value / total;
      }
    }
    if (p.parts != nullptr && lane == 0) p.part_lse[part_row] = lse2;
  }
}

// Over the block; `shared` holds a value a warp.
template <class Join>
__device__ __forceinline__ float join_block(float x, float* shared, Join join) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = join(x, __shfl_xor_sync(~0u, x, step));
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  return join(join(shared[0], shared[1]), join(shared[2], shared[3]));
}

// Adds up the parts of a row: a block each, whose warps take parts in turn.
__global__ void __launch_bounds__(128) merge_kernel(const __grid_constant__ DecodeParams p) {
  __shared__ float weights[kMostSplits], sums[4][256], scratch[4];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = blockIdx.x % kDecodeRows;
  const int64_t block = blockIdx.x / kDecodeRows;
  const int row_block = static_cast<int>(block % p.row_blocks), plane = static_cast<int>(block / p.row_blocks);
  const Row of(p, plane % p.kv_heads, row_block * kDecodeRows + row);
  if (!of.exists) return;
  const int64_t first = block * p.splits * kDecodeRows + row;
  float most = -INFINITY, total = 0.0f;
  for (int split = threadIdx.x; split < p.splits; split += 128) {
    weights[split] = p.part_lse[first + split * kDecodeRows];
    most = fmaxf(most, weights[split]);
  }
  most = join_block(most, scratch, [](float a, float b) { return fmaxf(a, b); });
  for (int split = threadIdx.x; split < p.splits; split += 128) {
    const float own = weights[split];
    weights[split] = own == -INFINITY ? 0.0f : exp2f(own - most);
    total += weights[split];
  }
  total = join_block(total, scratch, [](float a, float b) { return a + b; });

  float value[8] = {};
#pragma unroll 4
  for (int split = warp; split < p.splits; split += 4) {
    const float* const part = p.parts + (first + split * kDecodeRows) * p.v_dim;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const int channel = i * 32 + lane;
      const float x = channel < p.v_dim ? part[channel] : 0.0f;
      value[i] += weights[split] == 0.0f ? 0.0f : weights[split] * x;  // x may be infinite
    }
  }
#pragma unroll
  for (int i = 0; i < 8; i++) sums[warp][i * 32 + lane] = value[i];
  __syncthreads();
  for (int channel = threadIdx.x; channel < p.v_dim; channel += 128) {
    const float sum = (sums[0][channel] + sums[1][channel]) + (sums[2][channel] + sums[3][channel]);
    store_result(p, plane / p.kv_heads, of, channel, sum / total, most + log2f(total));
  }
}

template <class C>
void launch(const DecodeParams& params, int64_t blocks, cudaStream_t stream) {
  SAGE_CUDA(cudaFuncSetAttribute(decode_kernel<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSharedBytes));
  decode_kernel<C><<<static_cast<unsigned>(blocks), C::kThreads, C::kSharedBytes, stream>>>(params);
  SAGE_CUDA(cudaGetLastError());
}

template <ptx::Operand kOperand>
void launch_for(const DecodeParams& params, int padded_head_dim, int64_t blocks, cudaStream_t stream) {
  switch (padded_head_dim) {
    case 64: return launch<DecodeConfig<64, kOperand>>(params, blocks, stream);
    case 128: return launch<DecodeConfig<128, kOperand>>(params, blocks, stream);
    default: return launch<DecodeConfig<256, kOperand>>(params, blocks, stream);
  }
}

}  // namespace

void launch_decode(const AttentionOp& op, void* workspace, cudaStream_t stream) {
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
  p.kv_heads = static_cast<int>(op.k.heads());
  p.group = static_cast<int>(op.q.heads() / op.k.heads());
  p.row_blocks = (p.group * p.q_tokens + kDecodeRows - 1) / kDecodeRows;
  p.splits = op.plan.key_splits;
  const int tiles = (p.k_tokens + kDecodeKeys - 1) / kDecodeKeys;
  p.split_keys = (tiles + p.splits - 1) / p.splits * kDecodeKeys;
  p.scale_log2 = op.scale * kLog2e;
  p.largest = op.v.dtype == DType::kF16 ? 65504.0f : 0x1.fep127f;
  const int64_t blocks = op.k.batch() * op.k.heads() * p.row_blocks;
  if (p.splits > 1) {
    p.parts = static_cast<float*>(workspace);
    p.part_lse = p.parts + blocks * p.splits * kDecodeRows * p.v_dim;
  }
  if (op.q.dtype == DType::kF16) {
    launch_for<ptx::Operand::kF16>(p, op.plan.padded_head_dim, blocks * p.splits, stream);
  } else {
    launch_for<ptx::Operand::kBF16>(p, op.plan.padded_head_dim, blocks * p.splits, stream);
  }
  if (p.splits == 1) return;
  merge_kernel<<<static_cast<unsigned>(blocks * kDecodeRows), 128, 0, stream>>>(p);
  SAGE_CUDA(cudaGetLastError());
}

}  // namespace sage::cuda
