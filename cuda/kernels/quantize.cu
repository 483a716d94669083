// Quantization with scales of groups of rows: one block reads the rows of whole groups, finds their largest magnitudes,
// and writes scales and codes.
#include <algorithm>

#include "chunk_mean.cuh"
#include "encode.cuh"
#include "quantize_channels.h"
#include "workspace.h"

namespace sage::cuda {
namespace {

struct GroupArguments {
  Tensor x, codes, scales;
  Means means;
  float range;
  int rotated;        // channels of a rotated row
  int64_t span_rows;  // of whole groups: what one block owns
  int span_groups, span_words;
  uint32_t run_inverse;  // of group_rows, as in Runs
  int row_shift;         // as in Groups
  uint32_t* not_finite;  // or null, and span_words is 0
  int64_t heads, words;  // of a batch; of one head

  // Which group of its span holds row `local`.
  __device__ __forceinline__ int group_of(int local) const {
    return static_cast<int>(__umulhi(2 * local, run_inverse) << (3 - row_shift)) + ((local & 7) >> row_shift);
  }
};

// What a block knows of its span, in shared memory.
struct Span {
  uint32_t* amax;   // [span_groups]
  uint32_t* marks;  // [span_words]: bits of rows
  int thread, threads;

  __device__ __forceinline__ Span(const GroupArguments& a, uint32_t* shared)
      : amax(shared),
        marks(shared + a.span_groups),
        thread(threadIdx.y * blockDim.x + threadIdx.x),
        threads(blockDim.x * blockDim.y) {
#pragma unroll 1
    for (int i = thread; i < a.span_groups + a.span_words; i += threads) shared[i] = 0;
    __syncthreads();
  }

  __device__ __forceinline__ void add(int group, float magnitude) { atomicMax(&amax[group], bits_of(magnitude)); }

  // A row with values that are not finite.
  __device__ __forceinline__ void add_bad(const GroupArguments& a, int local, const float (&x)[8]) {
    float finite = 0.0f;
#pragma unroll
    for (int j = 0; j < 8; j++) finite = is_finite(x[j]) ? magnitude(finite, x[j]) : finite;
    add(a.group_of(local), finite);
    if (a.span_words > 0) atomicOr(&marks[local / 32], 1u << local % 32);
  }

  __device__ __forceinline__ void write_marks(const GroupArguments& a, const Place& place) const {
    const int64_t word = place.tile * a.span_words, plane = place.plane.batch * a.heads + place.plane.head;
#pragma unroll 1
    for (int i = thread; i < a.span_words; i += threads) {
      if (word + i < a.words) a.not_finite[plane * a.words + word + i] = marks[i];
    }
  }
};

__device__ __forceinline__ void write_scale(const GroupArguments& a, const Place& place, int group, float scale) {
  const int64_t index = place.tile * a.span_groups + group;
  if (index < a.scales.tokens) float_at(a.scales, plane_of(a.scales, place.plane), index, 0) = scale;
}

// ---- rotation ---------------------------------------------------------------------------------------------------

// Rotates the row that an octet is part of, as numerics.h has it: the other octets are those of the threads beside this
// one, which are all here.
__device__ __forceinline__ void rotate(float (&x)[8], int channels) {
  const int octets = max(channels / 8, 1), lane = (threadIdx.y * blockDim.x + threadIdx.x) % 32;
  const int channel = threadIdx.x * 8;
  const uint32_t row = ~0u >> (32 - octets) << lane / octets * octets;  // its threads, but for those of padding
#pragma unroll
  for (int j = 0; j < 8; j++) x[j] *= rotation_sign(channel + j) / static_cast<float>(channels);
#pragma unroll
  for (int step = 1; step < 8; step *= 2) {
    if (step >= channels) return;
#pragma unroll
    for (int j = 0; j < 8; j++) {
      if (j & step) continue;
      const float a = x[j], b = x[j + step];
      x[j] = a + b;
      x[j + step] = a - b;
    }
  }
#pragma unroll 1
  for (int step = 1; step * 8 < channels; step *= 2) {
    const bool upper = (threadIdx.x & step) != 0;
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const float other = __shfl_xor_sync(row, x[j], step);
      x[j] = upper ? other - x[j] : x[j] + other;
    }
  }
}

// ---- spans that a block holds in registers ----------------------------------------------------------------------

constexpr int kRows = 8;  // of one thread

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

// The mean of a span that is a chunk, which is written where SharedMean would read it.
class SpanMean {
 public:
  __device__ __forceinline__ SpanMean(const Means& means, Plane plane, int64_t base, int)
      : tensor_(&means.tensor), plane_(plane), index_(base / kChunkRows) {}

  // Of `rows` rows of the block: what a thread holds of them, and how it reads one again.
  template <DType kType, class Again>
  __device__ __forceinline__ void take(void* shared, const Octet<kType> (&held)[kLaneRows], int rows, Again again) {
    ChunkColumns columns(shared);
    columns.sum(held, again);
    columns.fold([&](int channel, float sum, int missing) {
      const float value = mean_of(sum, rows - missing);
      if (channel < tensor_->channels) float_at(*tensor_, plane_of(*tensor_, plane_), index_, channel) = value;
      return value;
    });
    columns.read(value_);
  }
  __device__ __forceinline__ float operator[](int j) const { return value_[j]; }

 private:
  const Tensor* tensor_;
  Plane plane_;
  int64_t index_;
  float value_[8];
};

// Whether a mean is subtracted, and where it comes from: a tensor, or the span itself, which then is a chunk.
enum class MeanOf { kNothing, kTensor, kSpan };

// Octets are vectors and codes have the rows of x. Blocks run from the last rows to the first: their mean was taken in
// the other direction. Rows are read again only where a value is not finite.
template <DType kType, DType kCode, MeanOf kMean, bool kRotate>
__global__ void __maxnreg__(kRotate || kType == DType::kF32 ? 128 : 80)
    quantize_span_kernel(const __grid_constant__ GroupArguments a, Place corner) {
  // Columns of the mean, a Span, and the inverse scales of rows, as many as a block can hold.
  extern __shared__ float4 memory[];
  constexpr bool kTakesMean = kMean == MeanOf::kSpan;
  uint32_t* const shared =
      reinterpret_cast<uint32_t*>(memory) + (kTakesMean ? ChunkColumns::bytes(blockDim.x) / sizeof(uint32_t) : 0);
  const int lane = threadIdx.y, step = blockDim.y, octets = blockDim.x, channel = threadIdx.x * 8;
  const Place place = place_from_the_end(corner);
  const int64_t first_row = place.tile * a.span_rows;
  const int span_rows = static_cast<int>(a.span_rows);
  const int rows = static_cast<int>(min(a.x.tokens - first_row, a.span_rows));
  const char* const from = row_of(a.x, plane_of(a.x, place.plane), first_row + lane);

  Octet<kType> loaded[kRows];
  load_vectors(loaded, a.x, from, rows - lane, step, channel);
  std::conditional_t<kTakesMean, SpanMean, SharedMean> mean(a.means, place.plane, first_row, channel);
  if constexpr (kTakesMean) {
    mean.take(memory, loaded, rows, [&](int i, float(&x)[8]) {
      Octet<kType> octet[1];
      load_vectors(octet, a.x, from + i * step * a.x.token_stride, i * step < rows - lane ? 1 : 0, 1, channel);
      unpack(octet[0], x);
    });
  }
  const auto center = [&](const Octet<kType>& octet, float(&x)[8]) {
    unpack(octet, x);
    if constexpr (kMean != MeanOf::kNothing) {
#pragma unroll
      for (int j = 0; j < 8; j++) x[j] -= mean[j];
    }
    if constexpr (kRotate) rotate(x, a.rotated);
  };
  // What is held: rotated rows, or those that were loaded.
  std::conditional_t<kRotate, Octet<DType::kF32>, Octet<kType>> raw[kRows];
#pragma unroll
  for (int i = 0; i < kRows; i++) {
    if constexpr (kRotate) {
      float x[8];
      center(loaded[i], x);
      memcpy(raw[i].word, x, sizeof(x));
    } else {
      raw[i] = loaded[i];
    }
  }
  const auto value = [&](const auto& octet, float(&x)[8]) {
    if constexpr (kRotate)
      memcpy(x, octet.word, sizeof(x));
    else
      center(octet, x);
  };
  const auto value_again = [&](int row, float(&x)[8]) {
    Octet<kType> octet[1];
    load_vectors(octet, a.x, from + row * step * a.x.token_stride, 1, 1, channel);
    center(octet[0], x);
  };
  Span span(a, shared);

  float largest[kRows];
#pragma unroll
  for (int i = 0; i < kRows; i++) {
    if constexpr (kMean != MeanOf::kNothing || kRotate) {
      float x[8];
      value(raw[i], x);
      largest[i] = magnitude(magnitude(magnitude(x[0], x[1]), magnitude(x[2], x[3])),
                             magnitude(magnitude(x[4], x[5]), magnitude(x[6], x[7])));
    } else {
      largest[i] = raw_magnitude(raw[i]);
    }
  }
  if (rows < kRows * step) {
#pragma unroll
    for (int i = 0; i < kRows; i++) largest[i] = lane + i * step < rows ? largest[i] : 0.0f;
  }
  float all = largest[0];
#pragma unroll
  for (int i = 1; i < kRows; i++) all = magnitude(all, largest[i]);
  const bool finite = all < INFINITY;
  if (!finite) {
    uint32_t bad = 0;
#pragma unroll
    for (int i = 0; i < kRows; i++) {
      bad |= largest[i] < INFINITY ? 0u : 1u << i;
      largest[i] = largest[i] < INFINITY ? largest[i] : 0.0f;
    }
#pragma unroll 1
    for (; bad != 0; bad &= bad - 1) {
      const int i = __ffs(bad) - 1;
      float x[8];
      value_again(i, x);
      span.add_bad(a, lane + i * step, x);
    }
  }
  if (octets >= kRows) {
    int i;
    const float folded = fold_rows(largest, i);
    if (threadIdx.x < kRows && folded > 0.0f) span.add(a.group_of(lane + i * step), folded);
  } else {
#pragma unroll
    for (int i = 0; i < kRows; i++) {
      if (largest[i] > 0.0f) span.add(a.group_of(lane + i * step), largest[i]);
    }
  }
  __syncthreads();

  // Inverse scales of rows rather than of groups: the loop below need not look for groups.
  float* const inverses = reinterpret_cast<float*>(shared + a.span_groups + a.span_words);
#pragma unroll 1
  for (int local = span.thread; local < span_rows; local += span.threads) {
    inverses[local] = make_scale(float_of(span.amax[a.group_of(local)]), a.range).inverse;
  }
#pragma unroll 1
  for (int group = span.thread; group < a.span_groups; group += span.threads) {
    write_scale(a, place, group, make_scale(float_of(span.amax[group]), a.range).scale);
  }
  span.write_marks(a, place);
  __syncthreads();

  char* to = row_of(a.codes, plane_of(a.codes, place.plane), first_row + lane);
  const int left = channel < a.codes.channels ? rows - lane : 0;
  if (finite) {
#pragma unroll
    for (int i = 0; i < kRows; i++, to += step * a.codes.token_stride) {
      const float inverse = inverses[lane + i * step];
      float x[8];
      value(raw[i], x);
      const Octet<kCode> code = encode_finite<kCode>(x, [&](int) { return inverse; });
      if (i * step < left) store_vector(code, to, channel);
    }
  } else {
#pragma unroll 1
    for (int i = 0; i * step < left; i++, to += step * a.codes.token_stride) {
      const float inverse = inverses[lane + i * step];
      float x[8];
      value_again(i, x);
      store_vector(encode_any<kCode>(x, [&](int) { return inverse; }), to, channel);
    }
  }
}

// ---- any other spans: everything is read twice ------------------------------------------------------------------

template <DType kType, DType kCode, bool kRotate>
__global__ void __maxnreg__(64) quantize_any_kernel(const __grid_constant__ GroupArguments a, Place corner) {
  extern __shared__ uint32_t shared[];  // a Span
  const int lane = threadIdx.y, step = blockDim.y, channel = threadIdx.x * 8;
  const Place place = place_from_the_end(corner);
  const int64_t first_row = place.tile * a.span_rows, end_row = min(first_row + a.span_rows, a.codes.tokens);
  const int64_t end_known = min(end_row, a.x.tokens);
  const char* const from = plane_of(a.x, place.plane);
  char* const codes = plane_of(a.codes, place.plane);

  // Calls body(row, row of its window, values) for all rows of a thread, with zeros for those that x has not. Windows
  // hold no more rows than group_of can tell apart.
  const auto each_row = [&](auto body) {
#pragma unroll 1
    for (int64_t window = first_row; window < end_row; window += kWindowRows) {
      MeanOctet mean(a.means, place.plane, window, channel);
      const int rows = static_cast<int>(min(end_row - window, int64_t{kWindowRows}));
#pragma unroll 1
      for (int local = lane; local < rows; local += step) {
        float x[8] = {};
        if (window + local < end_known) {
          Octet<kType> octet[1];
          load_rows(octet, a.x, from, window + local, 1, end_known, channel);
          mean.seek(local);
          unpack(octet[0], x);
#pragma unroll
          for (int j = 0; j < 8; j++) x[j] -= mean[j];
        }
        if constexpr (kRotate) rotate(x, a.rotated);
        body(window + local, local, x);
      }
    }
  };

  Span span(a, shared);
  each_row([&](int64_t, int local, const float(&x)[8]) {
    float largest = 0.0f;
#pragma unroll
    for (int j = 0; j < 8; j++) largest = magnitude(largest, x[j]);
    if (!(largest < INFINITY))
      span.add_bad(a, local, x);
    else if (largest > 0.0f)
      span.add(a.group_of(local), largest);
  });
  __syncthreads();
#pragma unroll 1
  for (int group = span.thread; group < a.span_groups; group += span.threads) {
    const Scale scale = make_scale(float_of(span.amax[group]), a.range);
    span.amax[group] = bits_of(scale.inverse);
    write_scale(a, place, group, scale.scale);
  }
  span.write_marks(a, place);
  __syncthreads();
  each_row([&](int64_t row, int local, const float(&x)[8]) {
    const float inverse = float_of(span.amax[a.group_of(local)]);
    const Octet<kCode> code = encode_any<kCode>(x, [&](int) { return inverse; });
    store_octet(code, a.codes, row_of(a.codes, codes, row), channel);
  });
}

// ---- both -------------------------------------------------------------------------------------------------------

void launch_quantize_groups(const QuantizeOp& op, uint32_t* not_finite, void* scratch, cudaStream_t stream) {
  if (op.rotate && op.codes.dtype != DType::kI8) SAGE_FAIL(SAGE_INTERNAL, "Cannot rotate rows but for codes of a byte");
  const Groups groups = make_groups(op.grouping, op.group_rows);
  dim3 block = block_of(op.codes.channels());
  const int64_t run_rows = groups.runs.rows;
  const bool chunks = op.takes_mean && op.mean_rows == kChunkRows && kChunkRows % run_rows == 0;
  if (chunks) {  // a block a mean
    block.y = kChunkLanes;
  } else {  // no more rows than share a mean, nor more threads than a multiprocessor likes, but still whole groups
    const int64_t most_rows = op.mean.tokens() > 1 ? op.mean_rows : op.x.tokens();
    const auto may_halve = [&] { return kRows * block.y / 2 >= std::max<int64_t>(run_rows, 32); };
    while ((kRows * block.y > most_rows || block.x * block.y > 256) && may_halve()) block.y /= 2;
  }
  const int64_t tile_rows = kRows * block.y;
  const int64_t runs = run_rows < tile_rows ? tile_rows / run_rows : 1;

  GroupArguments a{};
  a.x = make_tensor(op.x);
  a.codes = make_tensor(op.codes);
  a.scales = make_tensor(op.scales);
  a.means = make_means(op.mean, op.mean_rows);
  a.range = op.range;
  a.rotated = rotated_channels(op.x.channels());
  a.span_rows = runs * run_rows;
  a.span_groups = static_cast<int>(runs * groups.a_run());
  a.run_inverse = groups.runs.inverse;
  a.row_shift = groups.row_shift;
  a.not_finite = not_finite;
  a.heads = op.x.heads();
  a.words = (op.x.tokens() + 31) / 32;
  const bool holds_span = a.span_rows <= tile_rows;
  if (not_finite != nullptr) {
    if (a.span_rows % 32 != 0 || !holds_span) {
      SAGE_FAIL(SAGE_INTERNAL, "Cannot mark the rows of groups of " + std::to_string(run_rows) + " rows");
    }
    a.span_words = static_cast<int>(a.span_rows / 32);
  }
  const size_t shared = (a.span_groups + a.span_words) * sizeof(uint32_t);
  const bool one_mean = a.means.tensor.vectors && (op.mean.tokens() == 1 || op.mean_rows % a.span_rows == 0);
  const bool common =
      holds_span && a.x.vectors && a.codes.vectors && op.codes.tokens() == op.x.tokens() && (!op.mean || one_mean);
  const bool spans_are_chunks = common && chunks && op.codes.dtype != DType::kE4M3 && !op.rotate;
  if (op.takes_mean && !spans_are_chunks) launch_mean(op.x, op.mean, op.mean_rows, scratch, stream);
  const auto launch = [&](auto type, auto code, auto rotate) {
    constexpr DType kType = decltype(type)::value, kCode = decltype(code)::value;
    constexpr bool kRotate = decltype(rotate)::value;
    launch_grid(op.codes, tiles_of(op.codes.tokens(), a.span_rows), [&](dim3 grid, Place corner) {
      const size_t held = shared + tile_rows * sizeof(float);
      if constexpr (kCode != DType::kE4M3 && !kRotate) {
        if (spans_are_chunks) {
          const size_t all = ChunkColumns::bytes(block.x) + held;
          quantize_span_kernel<kType, kCode, MeanOf::kSpan, false><<<grid, block, all, stream>>>(a, corner);
          return;
        }
      }
      if constexpr (kCode != DType::kE4M3) {   // that is for values, whose scales are per channel
        if (common && (op.mean || kRotate)) {  // what is absent counts as zeros
          quantize_span_kernel<kType, kCode, MeanOf::kTensor, kRotate><<<grid, block, held, stream>>>(a, corner);
          return;
        }
        if (common) {
          quantize_span_kernel<kType, kCode, MeanOf::kNothing, false><<<grid, block, held, stream>>>(a, corner);
          return;
        }
      }
      quantize_any_kernel<kType, kCode, kRotate><<<grid, block, shared, stream>>>(a, corner);
    });
  };
  for_float_type(op.x.dtype, [&](auto type) {
    if (op.rotate) return launch(type, TypeOf<DType::kI8>{}, std::true_type{});
    for_code_type(op.codes.dtype, [&](auto code) { launch(type, code, std::false_type{}); });
  });
}

}  // namespace

size_t quantize_scratch_bytes(const QuantizeOp& op) {
  const size_t mean = op.takes_mean ? mean_scratch_bytes(op.x, op.mean_rows) : 0;
  const size_t columns = op.per_channel ? column_scratch_bytes(op.x.batch() * op.x.heads(), op.x.channels()) : 0;
  return std::max(mean, columns);
}

void launch_quantize(const QuantizeOp& op, uint32_t* not_finite, void* scratch, cudaStream_t stream) {
  if (!op.per_channel) return launch_quantize_groups(op, not_finite, scratch, stream);
  if (op.takes_mean) launch_mean(op.x, op.mean, op.mean_rows, scratch, stream);
  launch_quantize_channels(op, static_cast<uint32_t*>(scratch), stream);
}

}  // namespace sage::cuda
