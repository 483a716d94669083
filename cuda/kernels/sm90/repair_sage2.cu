// Rows of sage2's output that see something that is not finite, as exact arithmetic has them. What was packed holds
// zeros in its place, so the attention kernel never meets it.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../tile.cuh"
#include "launch.cuh"
#include "sage2.h"
#include "tile_mask.cuh"

namespace sage::cuda::sm90 {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRows = 32;  // of a block, at a time
constexpr uint32_t kNotFinite = kKeyFlag | kValueFlag;

struct RepairArguments {
  Tensor q, k, v, o, lse;
  DType type, o_type;  // of q, k and v; of o
  const uint32_t *q_bits, *k_bits, *v_bits, *flags;
  int64_t q_words, kv_words;  // of one plane
  int planes, kv_heads, group;
  int64_t chunks;     // of kRows rows, of one head
  int64_t low, high;  // query i sees keys i + low to i + high
  TileMask mask;
};

// Keys `begin` to `end`, less one; of those the mask shows its bits, 64 keys each, where there is one.
struct Span {
  int64_t begin, end;
  const uint64_t* shown = nullptr;
};

template <bool kMasked>
__device__ __forceinline__ Span visible_keys(const RepairArguments& a, Plane where, int64_t row) {
  const int64_t begin = min(max(row + a.low, int64_t{0}), a.k.tokens);
  Span span{begin, max(min(row + a.high + 1, a.k.tokens), begin)};
  if constexpr (kMasked) {
    const int plane = a.mask.plane(static_cast<int>(where.batch), static_cast<int>(where.head));
    span.shown = a.mask.row(plane, static_cast<int>(row));
  }
  return span;
}

__device__ __forceinline__ float value_of(const Tensor& tensor, DType type, const char* plane, int64_t token,
                                          int channel) {
  const char* at = plane + token * tensor.token_stride + channel * tensor.unit_stride;
  if (type == DType::kF16) return __half2float(*reinterpret_cast<const __half*>(at));
  if (type == DType::kBF16) return __bfloat162float(*reinterpret_cast<const __nv_bfloat16*>(at));
  return *reinterpret_cast<const float*>(at);
}

__device__ __forceinline__ void store_value(const Tensor& tensor, DType type, char* plane, int64_t token, int channel,
                                            float value) {
  char* at = plane + token * tensor.token_stride + channel * tensor.unit_stride;
  if (type == DType::kF16) {
    *reinterpret_cast<__half*>(at) = __float2half(value);
  } else if (type == DType::kBF16) {
    *reinterpret_cast<__nv_bfloat16*>(at) = __float2bfloat16(value);
  } else {
    *reinterpret_cast<float*>(at) = value;
  }
}

// Bits of tokens below `end` in word `word`.
__device__ __forceinline__ uint32_t bits_below(int64_t word, int64_t end) {
  const int64_t bits = end - word * 32;
  return bits >= 32 ? ~0u : bits <= 0 ? 0u : (1u << bits) - 1;
}

// Bits of tokens in word `word`, some of which are in the span, that a row sees.
template <bool kMasked>
__device__ __forceinline__ uint32_t bits_of_span(int64_t word, Span span) {
  const uint32_t bits = bits_below(word, span.end) & ~bits_below(word, span.begin);
  if constexpr (kMasked) return bits & static_cast<uint32_t>(span.shown[word / 2] >> word % 2 * 32);
  return bits;
}

// How many keys a row sees, by a warp.
template <bool kMasked>
__device__ __forceinline__ int64_t count_seen(Span visible) {
  if constexpr (!kMasked) return visible.end - visible.begin;
  int count = 0;
  for (int64_t word = visible.begin / 32 + threadIdx.x % 32; word * 32 < visible.end; word += 32) {
    count += __popc(bits_of_span<kMasked>(word, visible));
  }
  return __reduce_add_sync(~0u, count);
}

// Visible keys that are not finite, taken by a warp: true if the score of one is not -inf, or if that of every visible
// key is -inf, so that there is nothing to normalize.
template <bool kMasked>
__device__ __forceinline__ bool keys_break(const RepairArguments& a, const char* q, const char* k,
                                           const uint32_t* k_bits, int64_t row, Span visible) {
  const int lane = threadIdx.x % 32;
  int64_t without_weight = 0;
  for (int64_t first = visible.begin / 32; first * 32 < visible.end; first += 32) {
    const int64_t word = first + lane;
    const uint32_t bits = word * 32 < visible.end ? k_bits[word] & bits_of_span<kMasked>(word, visible) : 0;
    for (uint32_t lanes = __ballot_sync(~0u, bits != 0); lanes != 0; lanes &= lanes - 1) {
      const int source = __ffs(lanes) - 1;
      for (uint32_t left = __shfl_sync(~0u, bits, source); left != 0; left &= left - 1) {
        const int64_t key = (first + source) * 32 + __ffs(left) - 1;
        float score = 0.0f;
        for (int c = lane; c < a.q.channels; c += 32) {
          score += value_of(a.q, a.type, q, row, c) * value_of(a.k, a.type, k, key, c);
        }
        for (int offset = 16; offset > 0; offset /= 2) score += __shfl_xor_sync(~0u, score, offset);
        if (score != -INFINITY) return true;
        without_weight++;
      }
    }
  }
  return without_weight == count_seen<kMasked>(visible);
}

// Rows of queries that are not finite, a warp a word; the warp's lanes share the channels.
template <bool kMasked>
__device__ __forceinline__ void break_queries(const RepairArguments& a) {
  const int lane = threadIdx.x % 32, q_heads = a.kv_heads * a.group;
  const float nan = float_of(0x7fc00000u);
  const int64_t words = int64_t{a.planes} * a.group * a.q_words, step = int64_t{gridDim.x} * kThreads;
#pragma unroll 1
  for (int64_t first = int64_t{blockIdx.x} * kThreads + threadIdx.x - lane; first < words; first += step) {
    const uint32_t bits = first + lane < words ? a.q_bits[first + lane] : 0;
    for (uint32_t lanes = __ballot_sync(~0u, bits != 0); lanes != 0; lanes &= lanes - 1) {
      const int source = __ffs(lanes) - 1;
      const int64_t word = first + source, plane = word / a.q_words;
      const Plane where{plane / q_heads, plane % q_heads};
      for (uint32_t left = __shfl_sync(~0u, bits, source); left != 0; left &= left - 1) {
        const int64_t row = word % a.q_words * 32 + __ffs(left) - 1;
        if (count_seen<kMasked>(visible_keys<kMasked>(a, where, row)) == 0) continue;
        for (int c = lane; c < a.v.channels; c += 32) store_value(a.o, a.o_type, plane_of(a.o, where), row, c, nan);
        if (lane == 0 && a.lse.data != nullptr) float_at(a.lse, plane_of(a.lse, where), row, 0) = nan;
      }
    }
  }
}

// With a mask, taken by a warp: adds up the values that a row sees and that are not finite, of a channel a lane;
// whether there are any.
__device__ __forceinline__ bool add_seen_values(const RepairArguments& a, const char* v, const uint32_t* k_bits,
                                                const uint32_t* v_bits, Span visible, int channel, float& sum) {
  const int lane = threadIdx.x % 32;
  bool any = false;
  for (int64_t first = visible.begin / 32; first * 32 < visible.end; first += 32) {
    const int64_t word = first + lane;
    uint32_t bits = word * 32 < visible.end ? v_bits[word] & ~k_bits[word] : 0;
    if (bits != 0) bits &= bits_of_span<true>(word, visible);
    for (uint32_t lanes = __ballot_sync(~0u, bits != 0); lanes != 0; lanes &= lanes - 1) {
      const int source = __ffs(lanes) - 1;
      for (uint32_t left = __shfl_sync(~0u, bits, source); left != 0; left &= left - 1) {
        if (channel >= a.v.channels) continue;
        const float value = value_of(a.v, a.type, v, (first + source) * 32 + __ffs(left) - 1, channel);
        if (is_finite(value)) continue;
        sum += value;
        any = true;
      }
    }
  }
  return any;
}

// Blocks share the rows of every flagged plane; where nothing is flagged they are done at once.
template <bool kMasked>
__global__ void __launch_bounds__(kThreads, 3) repair_kernel(const __grid_constant__ RepairArguments a) {
  ptx::let_next_kernel_start();
  ptx::wait_for_previous_kernel();
  bool any = false;
  for (int plane = threadIdx.x; plane < a.planes; plane += kThreads) any |= (a.flags[plane] & kNotFinite) != 0;
  break_queries<kMasked>(a);
  if (!__syncthreads_or(any)) return;

  __shared__ bool broken[kRows];  // rows of NaN
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, channel = threadIdx.x;
  const float nan = float_of(0x7fc00000u);
  const int64_t q_tokens = a.q.tokens, items = int64_t{a.planes} * a.group * a.chunks;

#pragma unroll 1
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int64_t plane = item / (a.group * a.chunks), member = item / a.chunks % a.group;
    const uint32_t flags = a.flags[plane];
    if (!(flags & kNotFinite)) continue;
    const int64_t batch = plane / a.kv_heads, kv_head = plane % a.kv_heads, head = kv_head * a.group + member;
    const int64_t first_row = item % a.chunks * kRows;
    const int rows = static_cast<int>(min(q_tokens - first_row, int64_t{kRows}));
    const char* const q = plane_of(a.q, Plane{batch, head});
    const char* const k = plane_of(a.k, Plane{batch, kv_head});
    const char* const v = plane_of(a.v, Plane{batch, kv_head});
    char* const o = plane_of(a.o, Plane{batch, head});
    const uint32_t* const q_bits = a.q_bits + (batch * a.kv_heads * a.group + head) * a.q_words;
    const uint32_t *const k_bits = a.k_bits + plane * a.kv_words, *const v_bits = a.v_bits + plane * a.kv_words;

    __syncthreads();
    for (int r = warp; r < rows; r += kWarps) {
      const int64_t row = first_row + r;
      const Span visible = visible_keys<kMasked>(a, Plane{batch, head}, row);
      bool is_broken = false;
      if (count_seen<kMasked>(visible) > 0) {
        is_broken = (q_bits[row / 32] >> row % 32 & 1) != 0 ||
                    ((flags & kKeyFlag) && keys_break<kMasked>(a, q, k, k_bits, row, visible));
      }
      if (lane == 0) broken[r] = is_broken;
    }
    __syncthreads();

    if constexpr (kMasked) {
      for (int r = 0; r < rows; r++) {
        const Span visible = visible_keys<kMasked>(a, Plane{batch, head}, first_row + r);
        float sum = 0.0f;
        const bool touched = (flags & kValueFlag) != 0 && add_seen_values(a, v, k_bits, v_bits, visible, channel, sum);
        if (channel < a.v.channels && (touched || broken[r])) {
          store_value(a.o, a.o_type, o, first_row + r, channel, broken[r] ? nan : sum);
        }
      }
    }
    // A row sees the values that the row before it sees, and more, unless the window has moved off one that is not
    // finite. Those of a key that is not finite have no weight, or the row is broken.
    if (!kMasked && channel < a.v.channels) {
      int64_t seen = 0, oldest = 0;
      float sum = 0.0f;
      bool touched = false;
      for (int r = 0; r < rows; r++) {
        const int64_t row = first_row + r;
        const Span visible = visible_keys<kMasked>(a, Plane{batch, head}, row);
        if (touched && oldest < visible.begin) {
          seen = 0;
          sum = 0.0f;
          touched = false;
        }
        seen = max(seen, visible.begin);
        while ((flags & kValueFlag) && seen < visible.end) {
          const int64_t word = seen / 32;
          uint32_t bits = v_bits[word] & ~k_bits[word] & bits_of_span<kMasked>(word, {seen, visible.end});
          for (; bits != 0; bits &= bits - 1) {
            const int64_t key = word * 32 + __ffs(bits) - 1;
            const float value = value_of(a.v, a.type, v, key, channel);
            if (!is_finite(value)) {
              if (!touched) oldest = key;
              sum += value;
              touched = true;
            }
          }
          seen = min((word + 1) * 32, visible.end);
        }
        if (touched || broken[r]) store_value(a.o, a.o_type, o, row, channel, broken[r] ? nan : sum);
      }
    }
    if (a.lse.data != nullptr && threadIdx.x < rows && broken[threadIdx.x]) {
      float_at(a.lse, plane_of(a.lse, Plane{batch, head}), first_row + threadIdx.x, 0) = nan;
    }
  }
}

}  // namespace

void launch_sage2_repair(const Sage2Op& op, CUstream_st* stream) {
  RepairArguments a{};
  a.q = make_tensor(op.q);
  a.k = make_tensor(op.k);
  a.v = make_tensor(op.v);
  a.o = make_tensor(op.o);
  if (op.lse) a.lse = make_tensor(op.lse);
  a.type = op.q.dtype;
  a.o_type = op.o.dtype;
  a.q_bits = op.packed.q_bits;
  a.k_bits = op.packed.k_bits;
  a.v_bits = op.packed.v_bits;
  a.flags = op.packed.flags;
  a.q_words = (op.q.tokens() + kBlockM - 1) / kBlockM * (kBlockM / 32);
  a.kv_words = (op.k.tokens() + op.plan.block_k - 1) / op.plan.block_k * (op.plan.block_k / 32);
  a.planes = static_cast<int>(op.k.batch() * op.k.heads());
  a.kv_heads = static_cast<int>(op.k.heads());
  a.group = static_cast<int>(op.q.heads() / op.k.heads());
  a.chunks = (op.q.tokens() + kRows - 1) / kRows;
  const Masking& masking = op.masking;
  const int64_t reach = op.q.tokens() + op.k.tokens();  // as good as no bound
  a.high = masking.after == kUnlimited ? reach : masking.offset + masking.after;
  a.low = masking.before == kUnlimited ? -reach : masking.offset - masking.before;
  a.mask = make_tile_mask(masking.mask, {op.mask_tiles, op.mask_bits}, kBlockM);
  constexpr int64_t kMostBlocks = 264;
  const int64_t items = int64_t{a.planes} * a.group * a.chunks;
  launch_overlapped(masking.mask ? repair_kernel<true> : repair_kernel<false>,
                    static_cast<unsigned>(items < kMostBlocks ? items : kMostBlocks), kThreads, 0, stream, a);
}

}  // namespace sage::cuda::sm90
