// Quantization with scales of groups of rows: one block reads the rows of whole groups, keeps them in registers while
// it finds their largest magnitudes, and writes codes and scales.
#include <algorithm>

#include "encode.cuh"
#include "quantize_channels.h"
#include "workspace.h"

namespace sage::cuda {
namespace {

constexpr int kRows = 8;  // of one thread

struct GroupArguments {
  Tensor x, codes, scales;
  Means means;
  float range;
  int64_t heads;
  int64_t spans;      // runs of rows that one block owns, of one head
  int64_t span_rows;  // of whole groups
  int span_groups;
  uint32_t run_inverse;  // of group_rows, as in Runs
  int row_shift;         // as in Groups
  uint32_t* not_finite;  // or null
  int64_t words;         // of one head
};

// What is subtracted: nothing, one mean from all rows of a tile, or means that change within it.
enum class Subtract { kNothing, kOne, kMany };

template <Subtract kSubtract>
class Subtrahend {
 public:
  __device__ __forceinline__ Subtrahend(const Means& means, Plane plane, int64_t base, int channel)
      : mean_(means, plane, base, channel) {
    if (kSubtract == Subtract::kOne) mean_.seek(0);
  }
  __device__ __forceinline__ void seek(int local) {
    if (kSubtract == Subtract::kMany) mean_.seek(local);
  }
  __device__ __forceinline__ float operator[](int j) const { return mean_[j]; }

 private:
  MeanOctet mean_;
};

template <>
class Subtrahend<Subtract::kNothing> {
 public:
  __device__ __forceinline__ Subtrahend(const Means&, Plane, int64_t, int) {}
  __device__ __forceinline__ void seek(int) {}
  __device__ __forceinline__ float operator[](int) const { return 0.0f; }
};

// Eight values of which some are not finite; out of line, as they are rare.
struct Values {
  float x[8];
};

__device__ __noinline__ float finite_magnitude(Values values) {
  float largest = 0.0f;
#pragma unroll
  for (int j = 0; j < 8; j++) largest = is_finite(values.x[j]) ? magnitude(largest, values.x[j]) : largest;
  return largest;
}

// Largest magnitude of raw values; NaN if one is NaN. Pairs at a time, as nothing is subtracted.
template <DType kType>
__device__ __forceinline__ float raw_magnitude(const Octet<kType>& raw) {
  if constexpr (kType == DType::kF32) {
    float largest = 0.0f;
#pragma unroll
    for (int j = 0; j < 8; j++) largest = magnitude(largest, float_of(raw.word[j]));
    return largest;
  } else {
    using Pair = std::conditional_t<kType == DType::kF16, __half2, __nv_bfloat162>;
    Pair pair[4];
    memcpy(pair, raw.word, sizeof(pair));
    const Pair largest =
        __hmax2_nan(__hmax2_nan(__habs2(pair[0]), __habs2(pair[1])), __hmax2_nan(__habs2(pair[2]), __habs2(pair[3])));
    return magnitude(__low2float(largest), __high2float(largest));
  }
}

// Folds the magnitudes of kRows rows over the threads of a row. The thread whose low bits are `bits` ends up with
// row bit-reversed(bits): at every step it keeps half of the rows and hands over the other half.
__device__ __forceinline__ float fold_rows(float (&largest)[kRows], int& row) {
  static_assert(kRows == 8);
  row = 0;
#pragma unroll
  for (int offset = 1, count = kRows / 2; count > 0; offset *= 2, count /= 2) {
    const bool upper = (threadIdx.x & offset) != 0;
    if (upper) row += count;
#pragma unroll
    for (int j = 0; j < count; j++) {
      const float kept = upper ? largest[j + count] : largest[j], given = upper ? largest[j] : largest[j + count];
      largest[j] = fmaxf(kept, __shfl_xor_sync(~0u, given, offset));
    }
  }
  for (int offset = kRows; offset < blockDim.x; offset *= 2) {
    largest[0] = fmaxf(largest[0], __shfl_xor_sync(~0u, largest[0], offset));
  }
  return largest[0];
}

template <DType kCode>
__device__ __noinline__ Octet<kCode> encode_rare(Values values, float inverse) {
  return encode_any<kCode>(values.x, [&](int) { return inverse; });
}

// Blocks run from the last rows to the first: their mean was taken in the other direction, and the cache knows the
// end. A span of more rows than the block holds is read twice.
template <DType kType, DType kCode, Subtract kSubtract>
__global__ void __maxnreg__(kType == DType::kF32 ? 128 : 80)
    quantize_groups_kernel(const __grid_constant__ GroupArguments a, int64_t last) {
  const int lane = threadIdx.y, step = blockDim.y, octets = blockDim.x, channel = threadIdx.x * 8;
  const int thread = lane * octets + threadIdx.x, threads = octets * step, tile_rows = kRows * step;
  const int64_t item = last - blockIdx.x, span = item % a.spans, plane = item / a.spans;
  const Plane where{plane / a.heads, plane % a.heads};
  const int64_t first_row = span * a.span_rows, end_row = min(first_row + a.span_rows, a.codes.tokens);
  extern __shared__ uint32_t
      group_values[];  // [span_groups] largest magnitudes, then inverse scales; [words of a span]
  uint32_t* const bad_words = group_values + a.span_groups;
  const int span_words = a.not_finite != nullptr ? static_cast<int>(a.span_rows / 32) : 0;
#pragma unroll 1
  for (int i = thread; i < a.span_groups + span_words; i += threads) group_values[i] = 0;
  __syncthreads();

  const char* const from = plane_of(a.x, where);
  Octet<kType> raw[kRows];
  uint32_t bad_rows = 0;  // bit i: a value of raw[i] is not finite
  float largest[kRows];
  Subtrahend<kSubtract> mean(a.means, where, first_row, channel);
  const auto value = [&](int i, int local, float(&x)[8]) {
    mean.seek(local);
    unpack(raw[i], x);
#pragma unroll
    for (int j = 0; j < 8; j++) x[j] -= mean[j];
  };
  const auto group = [&](int64_t base, int local) {
    const int run = __umulhi(2 * local, a.run_inverse), low = (static_cast<int>(base) + local) & 7;
    return (run << (3 - a.row_shift)) + (low >> a.row_shift);
  };
  const auto load = [&](int64_t base) {
    if (kSubtract == Subtract::kMany) mean = Subtrahend<kSubtract>(a.means, where, base, channel);
    load_rows(raw, a.x, from, base + lane, step, min(end_row, a.x.tokens), channel);
    const int rows = static_cast<int>(min(min(end_row, a.x.tokens) - base, int64_t{tile_rows}));
    bad_rows = 0;
#pragma unroll
    for (int i = 0; i < kRows; i++) {
      largest[i] = 0.0f;
      const int local = lane + i * step;
      if (local >= rows) continue;
      Values values;
      value(i, local, values.x);
      if constexpr (kSubtract == Subtract::kNothing) {
        largest[i] = raw_magnitude(raw[i]);
      } else {
#pragma unroll
        for (int j = 0; j < 8; j++) largest[i] = magnitude(largest[i], values.x[j]);
      }
      if (!(largest[i] < INFINITY)) {
        bad_rows |= 1u << i;
        largest[i] = finite_magnitude(values);
      }
    }
  };

#pragma unroll 1
  for (int64_t base = first_row; base < end_row; base += tile_rows) {
    load(base);
    if (octets >= kRows) {
      int i;
      const float magnitude = fold_rows(largest, i);
      if (threadIdx.x < kRows && magnitude > 0.0f) {
        atomicMax(&group_values[group(base, lane + i * step)], bits_of(magnitude));
      }
    } else {
#pragma unroll
      for (int i = 0; i < kRows; i++) {
        if (largest[i] > 0.0f) atomicMax(&group_values[group(base, lane + i * step)], bits_of(largest[i]));
      }
    }
    if (span_words > 0 && bad_rows != 0) {
#pragma unroll
      for (int i = 0; i < kRows; i++) {
        const int local = lane + i * step;
        if (bad_rows >> i & 1) atomicOr(&bad_words[local / 32], 1u << local % 32);
      }
    }
  }
  __syncthreads();

  char* const scales = plane_of(a.scales, where);
#pragma unroll 1
  for (int i = thread; i < a.span_groups; i += threads) {
    const Scale scale = make_scale(float_of(group_values[i]), a.range);
    const int64_t index = span * a.span_groups + i;
    if (index < a.scales.tokens) float_at(a.scales, scales, index, 0) = scale.scale;
    group_values[i] = bits_of(scale.inverse);
  }
#pragma unroll 1
  for (int i = thread; i < span_words; i += threads) {
    const int64_t word = first_row / 32 + i;
    if (word < a.words) a.not_finite[plane * a.words + word] = bad_words[i];
  }
  __syncthreads();

  char* const codes = plane_of(a.codes, where);
#pragma unroll 1
  for (int64_t base = first_row; base < end_row; base += tile_rows) {
    if (end_row - first_row > tile_rows) load(base);
    const int rows = static_cast<int>(min(end_row - base, int64_t{tile_rows}));
    const int known_rows = static_cast<int>(min(a.x.tokens - base, int64_t{tile_rows}));
    char* to = row_of(a.codes, codes, base + lane);
#pragma unroll
    for (int i = 0; i < kRows; i++, to += step * a.codes.token_stride) {
      const int local = lane + i * step;
      if (local >= rows) break;
      Octet<kCode> code = {};
      if (local < known_rows) {
        const float inverse = float_of(group_values[group(base, local)]);
        Values values;
        value(i, local, values.x);
        if (bad_rows >> i & 1)
          code = encode_rare<kCode>(values, inverse);
        else
          code = encode_finite<kCode>(values.x, [&](int) { return inverse; });
      }
      store_octet(code, a.codes, to, channel);
    }
  }
}

void launch_quantize_groups(const QuantizeOp& op, uint32_t* not_finite, cudaStream_t stream) {
  const Groups groups = make_groups(op.grouping, op.group_rows);
  dim3 block = block_of(op.codes.channels());
  const int64_t run_rows = groups.runs.rows;
  if (op.mean.tokens() > 1) {  // no more rows than share a mean, but still whole groups
    while (kRows * block.y > op.mean_rows && kRows * block.y / 2 >= std::max<int64_t>(run_rows, 32)) block.y /= 2;
  }
  const int64_t tile_rows = kRows * block.y;
  const int64_t runs = run_rows < tile_rows ? tile_rows / run_rows : 1;

  GroupArguments a{};
  a.x = make_tensor(op.x);
  a.codes = make_tensor(op.codes);
  a.scales = make_tensor(op.scales);
  a.means = make_means(op.mean, op.mean_rows);
  a.range = op.range;
  a.heads = op.x.heads();
  a.span_rows = runs * run_rows;
  a.spans = (op.codes.tokens() + a.span_rows - 1) / a.span_rows;
  a.span_groups = static_cast<int>(runs * groups.a_run());
  a.run_inverse = groups.runs.inverse;
  a.row_shift = groups.row_shift;
  a.not_finite = not_finite;
  a.words = (op.x.tokens() + 31) / 32;
  size_t shared = a.span_groups * sizeof(uint32_t);
  if (not_finite != nullptr) {
    if (a.span_rows % 32 != 0 || a.span_rows > tile_rows) {
      SAGE_FAIL(SAGE_INTERNAL, "Cannot mark the rows of groups of " + std::to_string(run_rows) + " rows");
    }
    shared += a.span_rows / 32 * sizeof(uint32_t);
  }
  const int64_t items = op.x.batch() * op.x.heads() * a.spans;
  const auto launch = [&](auto type, auto code, auto subtract) {
    launch_items(items, [&](int64_t first, unsigned blocks) {
      quantize_groups_kernel<decltype(type)::value, decltype(code)::value, decltype(subtract)::value>
          <<<blocks, block, shared, stream>>>(a, items - 1 - first);
    });
  };
  const bool one = op.mean.tokens() == 1 || op.mean_rows % a.span_rows == 0;
  for_float_type(op.x.dtype, [&](auto type) {
    for_code_type(op.codes.dtype, [&](auto code) {
      if (!op.mean)
        launch(type, code, std::integral_constant<Subtract, Subtract::kNothing>{});
      else if (one)
        launch(type, code, std::integral_constant<Subtract, Subtract::kOne>{});
      else
        launch(type, code, std::integral_constant<Subtract, Subtract::kMany>{});
    });
  });
}

}  // namespace

size_t quantize_scratch_bytes(const QuantizeOp& op) {
  return op.per_channel ? column_scratch_bytes(op.x.batch() * op.x.heads(), op.x.channels()) : 0;
}

void launch_quantize(const QuantizeOp& op, uint32_t* not_finite, void* scratch, cudaStream_t stream) {
  if (op.per_channel) return launch_quantize_channels(op, static_cast<uint32_t*>(scratch), stream);
  launch_quantize_groups(op, not_finite, stream);
}

}  // namespace sage::cuda
