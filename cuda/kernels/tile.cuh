// How the kernels that stream whole tensors see them: an octet is 8 neighbouring channels of one row; a block of
// threads covers rows of one head, threadIdx.x counting octets and threadIdx.y rows.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "kernels.h"

namespace sage::cuda {

// ---- tensors ----------------------------------------------------------------------------------------------------

// A strided tensor as a kernel argument; strides in bytes.
struct Tensor {
  char* data;
  int64_t batch_stride, head_stride, token_stride;
  int64_t unit_stride;  // from a channel to the next; INT4: from a pair of channels to the next
  int64_t tokens;
  int channels;
  bool vectors;  // octets are contiguous, aligned and whole
};

inline Tensor make_tensor(const View& view) {
  const int bits = bits_per_element(view.dtype);
  const auto bytes = [&](int64_t elements) { return elements * bits / 8; };
  const int64_t alignment = bits < 16 ? bits : 16;
  const auto aligned = [&](int axis) { return view.shape[axis] == 1 || bytes(view.stride[axis]) % alignment == 0; };
  return {static_cast<char*>(view.data),
          bytes(view.stride[0]),
          bytes(view.stride[1]),
          bytes(view.stride[2]),
          bits == 4 ? 1 : bytes(view.stride[3]),
          view.tokens(),
          static_cast<int>(view.channels()),
          view.channels() % 8 == 0 && view.stride[3] == 1 && aligned(0) && aligned(1) && aligned(2) &&
              reinterpret_cast<uintptr_t>(view.data) % alignment == 0};
}

// One head of a batch.
struct Plane {
  int64_t batch, head;
};

__device__ __forceinline__ char* plane_of(const Tensor& tensor, Plane plane) {
  return tensor.data + plane.batch * tensor.batch_stride + plane.head * tensor.head_stride;
}

__device__ __forceinline__ float& float_at(const Tensor& tensor, char* plane, int64_t token, int64_t channel) {
  return *reinterpret_cast<float*>(plane + token * tensor.token_stride + channel * tensor.unit_stride);
}

// ---- octets -----------------------------------------------------------------------------------------------------

template <DType kType>
constexpr int kBits = kType == DType::kF32                            ? 32
                      : kType == DType::kF16 || kType == DType::kBF16 ? 16
                      : kType == DType::kI4                           ? 4
                                                                      : 8;

template <DType kType>
struct alignas(kBits<kType> < 16 ? kBits<kType> : 16) Octet {
  static constexpr int kBytes = kBits<kType>;
  static constexpr int kUnitBytes = kBytes < 8 ? 1 : kBytes / 8;  // what is addressed on its own
  static constexpr int kUnits = kBytes / kUnitBytes;
  uint32_t word[kBytes / 4];

  // The first unit falls out, `unit` becomes the last.
  __device__ __forceinline__ void shift_in(uint32_t unit) {
    constexpr int kWords = kBytes / 4;
#pragma unroll
    for (int i = 0; i + 1 < kWords; i++) {
      word[i] = kUnitBytes == 4 ? word[i + 1] : __funnelshift_r(word[i], word[i + 1], kUnitBytes * 8);
    }
    word[kWords - 1] = kUnitBytes == 4 ? unit : __funnelshift_r(word[kWords - 1], unit, kUnitBytes * 8);
  }
};

// How many units of the octet that begins at `channel` exist.
template <class Row>
__device__ __forceinline__ int units_left(const Tensor& tensor, int channel) {
  return min(Row::kUnits, ((tensor.channels - channel) * Row::kUnits + 7) / 8);
}

template <int kBytes>
using VectorOf = std::conditional_t<kBytes == 4, uint32_t, std::conditional_t<kBytes == 8, uint2, uint4>>;
template <int kBytes>
using UnitOf = std::conditional_t<kBytes == 1, uint8_t, std::conditional_t<kBytes == 2, uint16_t, uint32_t>>;

// Unit by unit; out of line, as it is rare and would crowd the instruction cache.
template <DType kType>
__device__ __noinline__ Octet<kType> gather_octet(const char* from, int64_t unit_stride, int units) {
  using Row = Octet<kType>;
  using Unit = UnitOf<Row::kUnitBytes>;
  Row octet = {};
#pragma unroll 1
  for (int j = 0; j < Row::kUnits; j++) {
    octet.shift_in(j < units ? *reinterpret_cast<const Unit*>(from + j * unit_stride) : Unit{0});
  }
  return octet;
}

template <DType kType>
__device__ __noinline__ void scatter_octet(Octet<kType> octet, char* to, int64_t unit_stride, int units) {
  using Row = Octet<kType>;
  using Unit = UnitOf<Row::kUnitBytes>;
#pragma unroll 1
  for (int j = 0; j < units; j++) {
    *reinterpret_cast<Unit*>(to + j * unit_stride) = static_cast<Unit>(octet.word[0]);
    octet.shift_in(0);
  }
}

// Loads the octets at `channel` of the row at `from` and of every step-th row after it, of which `left` rows exist, of
// a tensor whose octets are vectors; rows and channels beyond are zero.
template <DType kType, int kRows>
__device__ __forceinline__ void load_vectors(Octet<kType> (&rows)[kRows], const Tensor& tensor, const char* from,
                                             int left, int step, int channel) {
  using Row = Octet<kType>;
  using Vector = VectorOf<Row::kBytes>;
  from += channel / 8 * Row::kBytes;
  if (channel >= tensor.channels) left = 0;
#pragma unroll
  for (int i = 0; i < kRows; i++, from += step * tensor.token_stride) {
#pragma unroll
    for (uint32_t& word : rows[i].word) word = 0;
    if (i * step >= left) continue;
#pragma unroll
    for (int j = 0; j < Row::kBytes / static_cast<int>(sizeof(Vector)); j++) {
      reinterpret_cast<Vector*>(rows[i].word)[j] = __ldg(reinterpret_cast<const Vector*>(from) + j);
    }
  }
}

// Loads the octets of rows row, row + step, ... below `end` of any tensor.
template <DType kType, int kRows>
__device__ __forceinline__ void load_rows(Octet<kType> (&rows)[kRows], const Tensor& tensor, const char* plane,
                                          int64_t row, int step, int64_t end, int channel) {
  using Row = Octet<kType>;
  const char* from = plane + row * tensor.token_stride;
  const int left = static_cast<int>(min(end - row, int64_t{kRows} * step));
  if (tensor.vectors) {
    load_vectors(rows, tensor, from, left, step, channel);
  } else {
    const int units = units_left<Row>(tensor, channel);
    from += channel * Row::kUnits / 8 * tensor.unit_stride;
#pragma unroll
    for (int i = 0; i < kRows; i++, from += step * tensor.token_stride) {
#pragma unroll
      for (uint32_t& word : rows[i].word) word = 0;
      if (i * step < left) rows[i] = gather_octet<kType>(from, tensor.unit_stride, units);
    }
  }
}

// load_rows for kernels that know whether octets are vectors.
template <bool kVectors, DType kType, int kRows>
__device__ __forceinline__ void load(Octet<kType> (&rows)[kRows], const Tensor& tensor, const char* plane, int64_t row,
                                     int step, int64_t end, int channel) {
  if constexpr (kVectors) {
    const int left = static_cast<int>(min(end - row, int64_t{kRows} * step));
    load_vectors(rows, tensor, plane + row * tensor.token_stride, left, step, channel);
  } else {
    load_rows(rows, tensor, plane, row, step, end, channel);
  }
}

// Stores the octet at `channel`, which exists, of the row at `to`, of a tensor whose octets are vectors.
template <DType kType>
__device__ __forceinline__ void store_vector(const Octet<kType>& octet, char* to, int channel) {
  using Row = Octet<kType>;
  using Vector = VectorOf<Row::kBytes>;
  auto* vectors = reinterpret_cast<Vector*>(to + channel / 8 * Row::kBytes);
#pragma unroll
  for (int j = 0; j < Row::kBytes / static_cast<int>(sizeof(Vector)); j++) {
    vectors[j] = reinterpret_cast<const Vector*>(octet.word)[j];
  }
}

// Stores what exists of an octet of any tensor.
template <DType kType>
__device__ __forceinline__ void store_octet(const Octet<kType>& octet, const Tensor& tensor, char* to, int channel) {
  using Row = Octet<kType>;
  if (tensor.vectors) {
    if (channel < tensor.channels) store_vector(octet, to, channel);
  } else {
    const int units = units_left<Row>(tensor, channel);
    scatter_octet(octet, to + channel * Row::kUnits / 8 * tensor.unit_stride, tensor.unit_stride, units);
  }
}

template <bool kVectors, DType kType>
__device__ __forceinline__ void store(const Octet<kType>& octet, const Tensor& tensor, char* to, int channel) {
  if constexpr (kVectors) {
    if (channel < tensor.channels) store_vector(octet, to, channel);
  } else {
    store_octet(octet, tensor, to, channel);
  }
}

// The first row of a thread that goes from row to row.
__device__ __forceinline__ char* row_of(const Tensor& tensor, char* plane, int64_t row) {
  return plane + row * tensor.token_stride;
}

// ---- octets as floats -------------------------------------------------------------------------------------------

__device__ __forceinline__ void unpack_f16(uint32_t pair, float& low, float& high) {
  asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }"
      : "=f"(low), "=f"(high)
      : "r"(pair));
}

// The hardware's conversions are those of numerics.h; NaN payloads differ, and no result depends on them.
template <DType kType>
__device__ __forceinline__ void unpack(const Octet<kType>& octet, float (&x)[8]) {
#pragma unroll
  for (int j = 0; j < 8; j += 2) {
    const uint32_t word = octet.word[j * kBits<kType> / 32];
    if constexpr (kType == DType::kF32) {
      x[j] = float_of(word);
      x[j + 1] = float_of(octet.word[j + 1]);
    }
    if constexpr (kType == DType::kF16) unpack_f16(word, x[j], x[j + 1]);
    if constexpr (kType == DType::kBF16) {
      x[j] = float_of(word << 16);
      x[j + 1] = float_of(word & 0xffff0000u);
    }
    if constexpr (kType == DType::kE4M3) {
#if __CUDA_ARCH__ >= 890
      uint32_t pair;
      asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"(static_cast<uint16_t>(word >> j % 4 * 8)));
      unpack_f16(pair, x[j], x[j + 1]);
#else
      x[j] = e4m3_to_f32(static_cast<uint8_t>(word >> j % 4 * 8));
      x[j + 1] = e4m3_to_f32(static_cast<uint8_t>(word >> (j % 4 * 8 + 8)));
#endif
    }
  }
}

// Four bytes, each `bias` more than a code, as floats; one that is 0 marks a value that was not finite.
__device__ __forceinline__ void unpack_biased(uint32_t bytes, float bias, float& a, float& b, float& c, float& d) {
  constexpr uint32_t kExponent = 0x4b000000u;  // of 2^23: a byte put below it is added to it
  a = float_of(__byte_perm(bytes, kExponent, 0x7440)) - (8388608.0f + bias);
  b = float_of(__byte_perm(bytes, kExponent, 0x7441)) - (8388608.0f + bias);
  c = float_of(__byte_perm(bytes, kExponent, 0x7442)) - (8388608.0f + bias);
  d = float_of(__byte_perm(bytes, kExponent, 0x7443)) - (8388608.0f + bias);
}

__device__ __forceinline__ bool has_zero_byte(uint32_t bytes) {
  return ((bytes - 0x01010101u) & ~bytes & 0x80808080u) != 0;
}

template <>
__device__ __forceinline__ void unpack(const Octet<DType::kI8>& octet, float (&x)[8]) {
  const uint32_t low = octet.word[0] ^ 0x80808080u, high = octet.word[1] ^ 0x80808080u;
  unpack_biased(low, 128.0f, x[0], x[1], x[2], x[3]);
  unpack_biased(high, 128.0f, x[4], x[5], x[6], x[7]);
  if (has_zero_byte(low) || has_zero_byte(high)) {
#pragma unroll
    for (float& value : x) value = int8_value(static_cast<int8_t>(value));
  }
}

template <>
__device__ __forceinline__ void unpack(const Octet<DType::kI4>& octet, float (&x)[8]) {
  const uint32_t biased = octet.word[0] ^ 0x88888888u;
  const uint32_t even = biased & 0x0f0f0f0fu, odd = biased >> 4 & 0x0f0f0f0fu;
  unpack_biased(even, 8.0f, x[0], x[2], x[4], x[6]);
  unpack_biased(odd, 8.0f, x[1], x[3], x[5], x[7]);
  if (has_zero_byte(even) || has_zero_byte(odd)) {
#pragma unroll
    for (float& value : x) value = int4_value(static_cast<int8_t>(value));
  }
}

// NaN becomes the canonical one of the type.
template <DType kType>
__device__ __forceinline__ Octet<kType> pack(const float (&x)[8]) {
  Octet<kType> octet;
  if constexpr (kType == DType::kF32) {
#pragma unroll
    for (int j = 0; j < 8; j++) octet.word[j] = x[j] == x[j] ? bits_of(x[j]) : 0x7fc00000u;
  } else {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      if constexpr (kType == DType::kF16) {
        const __half2 pair = __floats2half2_rn(x[2 * j], x[2 * j + 1]);
        memcpy(&octet.word[j], &pair, 4);
      } else {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(x[2 * j], x[2 * j + 1]);
        memcpy(&octet.word[j], &pair, 4);
      }
    }
  }
  return octet;
}

// max(|a|, |b|); NaN if either is.
__device__ __forceinline__ float magnitude(float a, float b) {
  float largest;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(largest) : "f"(fabsf(a)), "f"(fabsf(b)));
  return largest;
}

// ---- runs of rows that share something --------------------------------------------------------------------------

struct Runs {
  int64_t rows;
  uint32_t inverse;  // ceil(2^31 / rows) where rows < kWindowRows, else 0
};

constexpr int kWindowRows = 4096;

inline Runs make_runs(int64_t rows) {
  return {rows, rows < kWindowRows ? static_cast<uint32_t>(((int64_t{1} << 31) + rows - 1) / rows) : 0};
}

// Which run holds row base + local, for local < kWindowRows: one division a block, none a row.
class RunWindow {
 public:
  __device__ __forceinline__ RunWindow(const Runs& runs, int64_t base)
      : first_(base / runs.rows), inverse_(runs.inverse), offset_(0) {
    const int64_t offset = base - first_ * runs.rows;
    if (inverse_ != 0) {
      offset_ = static_cast<int>(offset);
    } else {
      offset_ = static_cast<int>(min(runs.rows - offset, int64_t{kWindowRows}));  // rows until the next run
    }
  }

  __device__ __forceinline__ int64_t of(int local) const {
    return first_ + (inverse_ != 0 ? __umulhi(2 * (offset_ + local), inverse_) : local >= offset_);
  }

 private:
  int64_t first_;
  uint32_t inverse_;
  int offset_;
};

// group_of of numerics.h: every run of rows holds 8, 4 or 1 groups.
struct Groups {
  Runs runs;
  int row_shift;

  int a_run() const { return 8 >> row_shift; }
};

inline Groups make_groups(Grouping grouping, int64_t group_rows) {
  switch (grouping) {
    case Grouping::kToken: return {make_runs(1), 3};
    case Grouping::kRows: return {make_runs(group_rows), 3};
    case Grouping::kThreadQuery: return {make_runs(group_rows), 0};
    case Grouping::kThreadKey: return {make_runs(group_rows), 1};
  }
  return {};
}

class GroupWindow {
 public:
  __device__ __forceinline__ GroupWindow(const Groups& groups, int64_t base)
      : runs_(groups.runs, base), low_base_(static_cast<int>(base & 7)), row_shift_(groups.row_shift) {}

  __device__ __forceinline__ int64_t of(int local) const {
    return (runs_.of(local) << (3 - row_shift_)) + (((low_base_ + local) & 7) >> row_shift_);
  }

 private:
  RunWindow runs_;
  int low_base_, row_shift_;
};

// Means that rows share, as a kernel argument. Where there are none they count as zeros.
struct Means {
  Tensor tensor;
  Runs runs;
};

inline Means make_means(const View& mean, int64_t rows) {
  Means means{};
  means.runs = make_runs(mean.tokens() > 1 ? rows : INT64_MAX);
  if (mean) means.tensor = make_tensor(mean);
  return means;
}

// A thread's octet of the mean of the row that it works on; rows count from `base`.
class MeanOctet {
 public:
  __device__ __forceinline__ MeanOctet(const Means& means, Plane plane, int64_t base, int channel)
      : tensor_(&means.tensor), plane_(plane_of(means.tensor, plane)), runs_(means.runs, base), channel_(channel) {
#pragma unroll
    for (float& value : value_) value = 0.0f;
  }

  __device__ __forceinline__ bool present() const { return tensor_->data != nullptr; }

  __device__ __forceinline__ void seek(int local) {
    const int64_t index = runs_.of(local);
    if (!present() || index == index_) return;
    index_ = index;
    unpack(fetch(*tensor_, plane_, index, channel_), value_);
  }

  __device__ __forceinline__ float operator[](int j) const { return value_[j]; }

 private:
  // Out of line: called once for a run of rows, but from every row.
  static __device__ __noinline__ Octet<DType::kF32> fetch(const Tensor& tensor, const char* plane, int64_t index,
                                                          int channel) {
    Octet<DType::kF32> octet[1];
    load_rows(octet, tensor, plane, index, 1, index + 1, channel);
    return octet[0];
  }

  const Tensor* tensor_;
  const char* plane_;
  RunWindow runs_;
  int channel_;
  int64_t index_ = -1;
  float value_[8];
};

// The same where all those rows share one mean, as vectors.
class SharedMean {
 public:
  __device__ __forceinline__ SharedMean(const Means& means, Plane plane, int64_t base, int channel) {
    const int64_t index = means.tensor.tokens <= 1 ? 0 : base / means.runs.rows;
    load_vectors(octet_, means.tensor, plane_of(means.tensor, plane) + index * means.tensor.token_stride, 1, 1,
                 channel);
  }

  __device__ __forceinline__ void seek(int) {}
  __device__ __forceinline__ float operator[](int j) const { return float_of(octet_[0].word[j]); }

 private:
  Octet<DType::kF32> octet_[1];
};

// Nothing, or one row of means for a whole head, as SharedMean takes it.
inline bool one_mean_a_head(const Means& means) {
  return means.tensor.data == nullptr || (means.tensor.tokens == 1 && means.tensor.vectors);
}

// ---- launches ---------------------------------------------------------------------------------------------------

// Threads that cover `channels` in octets, a power of two so that a warp holds whole rows.
inline dim3 block_of(int64_t channels) {
  unsigned octets = 1;
  while (octets * 8 < channels) octets *= 2;
  return dim3(octets, octets > 16 ? 16 : 256 / octets);
}

// Calls launch(first, blocks) until `items` blocks were launched; a grid holds no more than 2^31 - 1.
template <class Launch>
void launch_items(int64_t items, Launch launch) {
  constexpr int64_t kMost = int64_t{1} << 30;
  for (int64_t first = 0; first < items; first += kMost) {
    launch(first, static_cast<unsigned>(items - first < kMost ? items - first : kMost));
    SAGE_CUDA(cudaGetLastError());
  }
}

inline int64_t tiles_of(int64_t tokens, int64_t tile_rows) { return (tokens + tile_rows - 1) / tile_rows; }

// A tile of one head.
struct Place {
  Plane plane;
  int64_t tile;
};

// Calls launch(grid, corner) until all tiles of all heads of `tensor` have had their blocks.
template <class Launch>
void launch_grid(const View& tensor, int64_t tiles, Launch launch) {
  constexpr int64_t kMost = 65535, kMostTiles = int64_t{1} << 30;  // grids hold no more
  const auto part = [](int64_t left, int64_t most) { return static_cast<unsigned>(left < most ? left : most); };
  for (int64_t batch = 0; batch < tensor.batch(); batch += kMost) {
    for (int64_t head = 0; head < tensor.heads(); head += kMost) {
      for (int64_t tile = 0; tile < tiles; tile += kMostTiles) {
        const dim3 grid(part(tiles - tile, kMostTiles), part(tensor.heads() - head, kMost),
                        part(tensor.batch() - batch, kMost));
        launch(grid, Place{{batch, head}, tile});
        SAGE_CUDA(cudaGetLastError());
      }
    }
  }
}

// Where in such a grid a block works.
__device__ __forceinline__ Place place_of_block(const Place& corner) {
  return {{corner.plane.batch + blockIdx.z, corner.plane.head + blockIdx.y}, corner.tile + blockIdx.x};
}

// The other way round: the cache knows the end of what the kernel before has read.
__device__ __forceinline__ Place place_from_the_end(const Place& corner) {
  return {{corner.plane.batch + (gridDim.z - 1 - blockIdx.z), corner.plane.head + (gridDim.y - 1 - blockIdx.y)},
          corner.tile + (gridDim.x - 1 - blockIdx.x)};
}

template <DType kType>
using TypeOf = std::integral_constant<DType, kType>;

template <class Body>
void for_float_type(DType type, Body body) {
  switch (type) {
    case DType::kF32: return body(TypeOf<DType::kF32>{});
    case DType::kF16: return body(TypeOf<DType::kF16>{});
    case DType::kBF16: return body(TypeOf<DType::kBF16>{});
    default: SAGE_FAIL(SAGE_INTERNAL, "Cannot use codes as numbers");
  }
}

template <class Body>
void for_code_type(DType type, Body body) {
  switch (type) {
    case DType::kI8: return body(TypeOf<DType::kI8>{});
    case DType::kI4: return body(TypeOf<DType::kI4>{});
    case DType::kE4M3: return body(TypeOf<DType::kE4M3>{});
    default: SAGE_FAIL(SAGE_INTERNAL, "Cannot use numbers as codes");
  }
}

}  // namespace sage::cuda
