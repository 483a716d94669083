// What smoothing queries takes from their scores: the mean of every block of queries times every key less its mean,
// one number for a block and a key. Products are exact in f16 or bf16 (keys of f32 as a sum of three of bf16) and
// summed in f32 by the tensor core.
#include <algorithm>

#include "../ptx/memory.cuh"
#include "../ptx/mma.cuh"
#include "launch.cuh"
#include "pack_sage2.cuh"

namespace sage::cuda::sm90 {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kMeans = 16 * kWarps;  // most rows of a block of threads: query blocks of all heads that share keys
constexpr int kKeys = 64;            // at a time: a lane of every four has the peak of 16

struct ShiftArguments {
  Tensor k;
  const float *q_mean, *k_mean;
  float *shifts, *peaks;
  int kv_heads, group;
  int q_blocks;    // of one head
  int64_t keys;    // of one row of shifts: whole tiles
  int chunks;      // of kKeys keys
  int run;         // chunks of a block of threads
  int runs;        // of one plane
  int parts;       // of the rows of one plane
  int row_groups;  // of 16 rows of a part: warps that do not share rows
  float factor;
};

template <DType kType, int kHeadDim>
struct Config {
  static constexpr DType kInput = kType;
  static constexpr int kDim = kHeadDim, kSteps = kHeadDim / 16, kRowBytes = 2 * kHeadDim + 16;
  static constexpr int kStages = 4, kStageBytes = kKeys * kRowBytes;
  static constexpr int kTerms = kType == DType::kF32 ? 3 : 1;  // of a key
  static constexpr ptx::Operand kOperand = kType == DType::kF16 ? ptx::Operand::kF16 : ptx::Operand::kBF16;
};

template <class C>
__device__ __forceinline__ uint32_t pair_of(float low, float high) {
  if constexpr (C::kInput == DType::kF16) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
}

// Of overflow and of keys that are not finite, whose scores are masked.
__device__ __forceinline__ float clamped(float x) {
  constexpr float kLargest = 0x1.fffffep127f;
  return fminf(fmaxf(x, -kLargest), kLargest);
}

// Term `term` of a row of keys: what rounding to bf16 left of the terms before.
template <class C>
__device__ __forceinline__ uint4 octet_of_keys(const Octet<C::kInput>& octet, int term) {
  if constexpr (C::kTerms == 1) {
    return make_uint4(octet.word[0], octet.word[1], octet.word[2], octet.word[3]);
  } else {
    float x[8];
    unpack(octet, x);
    for (; term > 0; term--) {
#pragma unroll
      for (float& value : x) value -= __bfloat162float(__float2bfloat16_rn(value));
    }
    return make_uint4(pair_of<C>(x[0], x[1]), pair_of<C>(x[2], x[3]), pair_of<C>(x[4], x[5]), pair_of<C>(x[6], x[7]));
  }
}

// One chunk of keys into shared memory; keys and channels that do not exist are zeros.
template <class C>
__device__ __forceinline__ void load_keys(const ShiftArguments& a, const char* from, int64_t first_key, int term,
                                          uint8_t* to) {
  for (int i = threadIdx.x; i < kKeys * C::kDim / 8; i += kThreads) {
    const int key = i / (C::kDim / 8), octet = i % (C::kDim / 8);
    uint8_t* const at = to + key * C::kRowBytes + 16 * octet;
    if (C::kTerms == 1 && a.k.vectors) {
      const bool exists = first_key + key < a.k.tokens && 8 * octet < a.k.channels;
      const char* const row = from + (exists ? (first_key + key) * a.k.token_stride + 16 * octet : 0);
      ptx::copy_async_16(ptx::shared_address(at), row, exists ? 16 : 0);
    } else {
      Octet<C::kInput> raw[1];
      load_rows(raw, a.k, from, first_key + key, 1, a.k.tokens, 8 * octet);
      *reinterpret_cast<uint4*>(at) = octet_of_keys<C>(raw[0], term);
    }
  }
  ptx::copy_async_commit();
}

template <class C>
__global__ void __launch_bounds__(kThreads, C::kDim == 256 ? 1 : 2)
    shifts_kernel(const __grid_constant__ ShiftArguments a) {
  extern __shared__ __align__(16) uint8_t stages[];
  ptx::let_next_kernel_start();
  ptx::wait_for_previous_kernel();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, c = lane % 4;
  const unsigned item = blockIdx.x / a.runs, first_chunk = blockIdx.x % a.runs * a.run;
  const int chunks = min(a.run, a.chunks - static_cast<int>(first_chunk));
  const unsigned kv_plane = item / a.parts, part = item % a.parts;
  const Plane plane{kv_plane / a.kv_heads, kv_plane % a.kv_heads};
  // Query heads that share keys follow each other, and so do their blocks.
  const int rows = a.group * a.q_blocks;
  const int first_row = static_cast<int>(part) * kMeans + warp % a.row_groups * 16 + g;
  const int64_t plane_row = int64_t{kv_plane} * rows;
  const int channels = a.k.channels;
  const char* const from = plane_of(a.k, plane);
  const auto stage_of = [&](int chunk) { return stages + chunk % C::kStages * C::kStageBytes; };
  const auto first_key_of = [&](int chunk) { return (int64_t{first_chunk} + chunk) * kKeys; };
  const auto load_chunk = [&](int chunk) {
    if (chunk < chunks) {
      load_keys<C>(a, from, first_key_of(chunk), 0, stage_of(chunk));
    } else {
      ptx::copy_async_commit();  // nothing: what is waited for is counted
    }
  };
#pragma unroll
  for (int chunk = 0; chunk < C::kStages - 1; chunk++) load_chunk(chunk);

  uint32_t mean[C::kSteps][4];
  float less[2] = {};  // the mean of queries times that of keys
#pragma unroll
  for (int step = 0; step < C::kSteps; step++) {
#pragma unroll
    for (int r = 0; r < 4; r++) {
      const int row = first_row + 8 * (r & 1), channel = 16 * step + 2 * c + 8 * (r >> 1);
      float x[2];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const bool exists = row < rows && channel + i < channels;
        x[i] = exists ? half_mean<C::kInput>(a.q_mean[(plane_row + row) * channels + channel + i]) : 0.0f;
        if (exists && a.k_mean != nullptr) less[r & 1] += x[i] * a.k_mean[int64_t{kv_plane} * channels + channel + i];
      }
      mean[step][r] = pair_of<C>(x[0], x[1]);
    }
  }
#pragma unroll
  for (float& x : less) {
    x += __shfl_xor_sync(~0u, x, 1);
    x += __shfl_xor_sync(~0u, x, 2);
  }

  const int key_groups = kWarps / a.row_groups, key_group = warp / a.row_groups;
  const bool idle = first_row - g >= rows;
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; chunk++) {
    ptx::copy_async_wait<C::kStages - 2>();
    __syncthreads();
    load_chunk(chunk + C::kStages - 1);
    uint8_t* const stage = stage_of(chunk);
    // Matrices: keys 0-7 and 8-15 of 16, their channels 0-7 and 8-15 of 16.
    const uint32_t at = ptx::shared_address(stage) + (lane % 8 + lane / 16 * 8) * C::kRowBytes + lane / 8 % 2 * 16;
    float sum[kKeys / 8][4] = {};
#pragma unroll 1
    for (int term = 0; term < C::kTerms; term++) {
      if (term > 0) {
        __syncthreads();
        load_keys<C>(a, from, first_key_of(chunk), term, stage);
        __syncthreads();
      }
      if (idle) continue;
#pragma unroll
      for (int n = 0; n < kKeys / 16; n++) {
        if (n % key_groups != key_group) continue;
#pragma unroll
        for (int step = 0; step < C::kSteps; step++) {
          uint32_t b[4];
          ptx::load_matrices(b, at + 16 * n * C::kRowBytes + 32 * step);
          ptx::mma<C::kOperand>(sum[2 * n], mean[step], b[0], b[1], sum[2 * n]);
          ptx::mma<C::kOperand>(sum[2 * n + 1], mean[step], b[2], b[3], sum[2 * n + 1]);
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = first_row + 8 * half;
      const int64_t first = (plane_row + row) * a.keys + first_key_of(chunk);
      float own = 0.0f;  // the peak that the lane writes
#pragma unroll
      for (int n = 0; n < kKeys / 16; n++) {
        if (idle || n % key_groups != key_group) continue;
        const auto shift = [&](int i, int e) {
          return clamped((sum[2 * n + i][2 * half + e] - less[half]) * a.factor);
        };
        const float4 four = make_float4(shift(0, 0), shift(0, 1), shift(1, 0), shift(1, 1));
        if (row < rows) *reinterpret_cast<float4*>(a.shifts + first + 16 * n + 4 * c) = four;
        float peak = fmaxf(fmaxf(fabsf(four.x), fabsf(four.y)), fmaxf(fabsf(four.z), fabsf(four.w)));
        peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, 1));
        peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, 2));
        if (n == c) own = peak;
      }
      if (row < rows && c % key_groups == key_group) a.peaks[first / kShiftsOfPeak + c] = own;
    }
  }
}

template <DType kType, int kHeadDim>
void launch_for(const ShiftArguments& a, unsigned blocks, cudaStream_t stream) {
  using C = Config<kType, kHeadDim>;
  SAGE_CUDA(
      cudaFuncSetAttribute(shifts_kernel<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kStages * C::kStageBytes));
  launch_overlapped(shifts_kernel<C>, blocks, kThreads, C::kStages * C::kStageBytes, stream, a);
}

}  // namespace

void launch_sage2_shifts(const Sage2Op& op, CUstream_st* stream) {
  ShiftArguments a{};
  a.k = make_tensor(op.k);
  a.q_mean = op.packed.q_mean;
  a.k_mean = op.packed.k_mean;
  a.shifts = op.packed.shifts;
  a.kv_heads = static_cast<int>(op.k.heads());
  a.group = static_cast<int>(op.q.heads() / op.k.heads());
  a.q_blocks = static_cast<int>((op.q.tokens() + kBlockM - 1) / kBlockM);
  a.peaks = op.packed.shift_peaks;
  a.keys = (op.k.tokens() + op.plan.block_k - 1) / op.plan.block_k * op.plan.block_k;
  const int rows = a.group * a.q_blocks;
  a.chunks = static_cast<int>(a.keys / kKeys);
  a.parts = (rows + kMeans - 1) / kMeans;
  a.row_groups = kWarps / (kKeys / 16);
  while (a.row_groups < kWarps && 16 * a.row_groups < rows) a.row_groups *= 2;
  constexpr int64_t kFewestBlocks = 1056;  // below, more are worth more than fewer loads of means
  const int64_t planes = op.k.batch() * a.kv_heads, all = planes * a.parts * a.chunks;
  const int most = static_cast<int>(std::clamp<int64_t>(all / kFewestBlocks, 1, 32));
  const int about = std::max((a.chunks + most / 2) / most, 1);  // runs of nearly the same length
  a.run = (a.chunks + about - 1) / about;
  a.runs = (a.chunks + a.run - 1) / a.run;
  a.factor = op.scale * kLog2e;
  const auto blocks = static_cast<unsigned>(planes * a.parts * a.runs);
  for_float_type(op.k.dtype, [&](auto type) {
    constexpr DType kType = decltype(type)::value;
    switch (op.plan.padded_head_dim) {
      case 64: return launch_for<kType, 64>(a, blocks, stream);
      case 128: return launch_for<kType, 128>(a, blocks, stream);
      default: return launch_for<kType, 256>(a, blocks, stream);
    }
  });
}

}  // namespace sage::cuda::sm90
