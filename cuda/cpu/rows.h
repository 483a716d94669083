// Rows of strided tensors of any type, to and from contiguous f32 or codes.
#pragma once

#include "vector.h"

namespace sage::cpu::SAGE_ISA {

constexpr int kRowFloats = kMaxChannels + 16;  // room for a row that is rounded up to whole vectors
constexpr int kSliceVectors = kSliceChannels / kLanes;

SAGE_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

SAGE_INLINE int64_t offset_of(const View& x, int64_t b, int64_t h, int64_t n, int64_t c) {
  return b * x.stride[0] + h * x.stride[1] + n * x.stride[2] + c * x.stride[3];
}

template <class T>
SAGE_INLINE T* at(const View& x, int64_t b, int64_t h, int64_t n, int64_t c = 0) {
  return static_cast<T*>(x.data) + offset_of(x, b, h, n, c);
}

// One element of any type; codes as the number they stand for, NaN where they stand for none.
inline float element(const View& x, int64_t b, int64_t h, int64_t n, int64_t c) {
  switch (x.dtype) {
    case DType::kF32: return *at<float>(x, b, h, n, c);
    case DType::kF16: return f16_to_f32(*at<uint16_t>(x, b, h, n, c));
    case DType::kBF16: return bf16_to_f32(*at<uint16_t>(x, b, h, n, c));
    case DType::kI8: return int8_value(*at<int8_t>(x, b, h, n, c));
    case DType::kE4M3: return e4m3_to_f32(*at<uint8_t>(x, b, h, n, c));
    case DType::kBool: return *at<uint8_t>(x, b, h, n, c) != 0 ? 1.0f : 0.0f;
    case DType::kI4: {
      const int64_t offset = offset_of(x, b, h, n, 0) + c;
      return int4_value(unpack_int4(static_cast<const uint8_t*>(x.data)[offset / 2], int(c)));
    }
  }
  return 0.0f;
}

// The largest number of a floating-point type; for codes, which are scaled, that of f32.
inline float largest_finite(DType dtype) {
  return dtype == DType::kF16 ? 65504.0f : dtype == DType::kBF16 ? 0x1.fep127f : 0x1.fffffep127f;
}

SAGE_INLINE Floats load_vector(DType dtype, const void* from) {
  if (dtype == DType::kF32) return load<Floats>(from);
  return dtype == DType::kF16 ? load_f16(from) : load_bf16(from);
}

SAGE_INLINE void store_vector(DType dtype, void* to, Floats x) {
  if (dtype == DType::kF32) return store(to, x);
  return dtype == DType::kF16 ? store_f16(to, x) : store_bf16(to, x);
}

// Channels [first, first + count) of a row of f32, f16 or bf16. The rest of the last vector is 0.
inline void load_row(const View& x, int64_t b, int64_t h, int64_t n, int first, int count, float* to) {
  if (x.stride[3] != 1) {
    for (int c = 0; c < count; ++c) to[c] = element(x, b, h, n, first + c);
    for (int c = count; c % kLanes; ++c) to[c] = 0.0f;
    return;
  }
  const int bytes = bits_per_element(x.dtype) / 8;
  const char* from = static_cast<const char*>(x.data) + offset_of(x, b, h, n, first) * bytes;
  int c = 0;
  for (; c + kLanes <= count; c += kLanes) store(to + c, load_vector(x.dtype, from + c * bytes));
  if (c < count) {
    alignas(64) char tail[4 * kLanes] = {};
    memcpy(tail, from + c * bytes, (count - c) * bytes);
    store(to + c, load_vector(x.dtype, tail));
  }
}

inline void store_row(const View& x, int64_t b, int64_t h, int64_t n, int first, int count, const float* from) {
  if (x.stride[3] != 1) {
    for (int c = 0; c < count; ++c) {
      switch (x.dtype) {
        case DType::kF32: *at<float>(x, b, h, n, first + c) = from[c]; break;
        case DType::kF16: *at<uint16_t>(x, b, h, n, first + c) = f32_to_f16(from[c]); break;
        default: *at<uint16_t>(x, b, h, n, first + c) = f32_to_bf16(from[c]);
      }
    }
    return;
  }
  const int bytes = bits_per_element(x.dtype) / 8;
  char* to = static_cast<char*>(x.data) + offset_of(x, b, h, n, first) * bytes;
  int c = 0;
  for (; c + kLanes <= count; c += kLanes) store_vector(x.dtype, to + c * bytes, load<Floats>(from + c));
  if (c < count) {
    alignas(64) float last[kLanes] = {};
    alignas(64) char tail[4 * kLanes];
    memcpy(last, from + c, (count - c) * 4);
    store_vector(x.dtype, tail, load<Floats>(last));
    memcpy(to + c * bytes, tail, (count - c) * bytes);
  }
}

// Codes, one a byte; INT4 is widened, and its mark of what is not finite becomes that of INT8.
inline void load_codes(const View& x, int64_t b, int64_t h, int64_t n, int first, int count, uint8_t* to) {
  if (x.dtype == DType::kI4) {
    const uint8_t* from = static_cast<const uint8_t*>(x.data) + (offset_of(x, b, h, n, 0) + first) / 2;
    for (int c = 0; c < count; ++c) {
      const int8_t code = unpack_int4(from[c / 2], c);
      to[c] = uint8_t(code == kInt4NotFinite ? kInt8NotFinite : code);
    }
  } else if (x.stride[3] == 1) {
    memcpy(to, at<uint8_t>(x, b, h, n, first), count);
  } else {
    for (int c = 0; c < count; ++c) to[c] = *at<uint8_t>(x, b, h, n, first + c);
  }
}

inline void store_codes(const View& x, int64_t b, int64_t h, int64_t n, int first, int count, const uint8_t* from) {
  if (x.dtype == DType::kI4) {
    uint8_t* to = static_cast<uint8_t*>(x.data) + (offset_of(x, b, h, n, 0) + first) / 2;
    for (int c = 0; c < count; c += 2) {
      to[c / 2] = pack_int4(int8_t(from[c]), c + 1 < count ? int8_t(from[c + 1]) : int8_t(0));
    }
  } else if (x.stride[3] == 1) {
    memcpy(at<uint8_t>(x, b, h, n, first), from, count);
  } else {
    for (int c = 0; c < count; ++c) *at<uint8_t>(x, b, h, n, first + c) = from[c];
  }
}

// The values of codes, without their scale; the rest of the last vector is 0.
inline void load_code_values(const View& x, int64_t b, int64_t h, int64_t n, int first, int count, float* to) {
  alignas(64) uint8_t codes[kRowFloats];
  load_codes(x, b, h, n, first, count, codes);
  memset(codes + count, 0, kLanes);
  const Floats not_finite = broadcast(float_of(0x7fc00000u));
  for (int c = 0; c < count; c += kLanes) {
    const Words code = __builtin_convertvector(load<Bytes>(codes + c), Words);
    if (x.dtype == DType::kE4M3) {
      store(to + c, (code & 0x7fu) == 0x7fu ? not_finite : e4m3_values(code));
    } else {
      const Ints value = (Ints)(code << 24) >> 24;
      store(to + c, value == int(kInt8NotFinite) ? not_finite : __builtin_convertvector(value, Floats));
    }
  }
}

// A mean has one row, or one for every `rows` rows.
SAGE_INLINE int64_t mean_row(const View& mean, int64_t n, int64_t rows) { return mean.tokens() == 1 ? 0 : n / rows; }

}  // namespace sage::cpu::SAGE_ISA
