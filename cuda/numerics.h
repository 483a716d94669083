// Rounding, scales and group index sets: the one definition that the CPU device and CUDA share.
//
// Everything here is exact IEEE-754 single precision with no contraction: host code is compiled with
// -ffp-contract=off and CUDA code that uses it with -fmad=false, so both devices agree bit for bit.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define SAGE_HD __host__ __device__ __forceinline__
#else
#define SAGE_HD inline
#endif

namespace sage {

constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;

constexpr int kQueryMeanRows = 128;  // rows that share one mean when queries are smoothed
constexpr float kInt8Range = 127.0f;
constexpr float kInt4Range = 7.0f;
constexpr float kUint8Range = 255.0f;
constexpr float kE4m3Range = 448.0f;
constexpr int8_t kInt8NotFinite = -128;
constexpr int8_t kInt4NotFinite = -8;
constexpr uint8_t kE4m3NotFinite = 0x7f;

// ---- bits -----------------------------------------------------------------------------------------------

SAGE_HD uint32_t bits_of(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}

SAGE_HD float float_of(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

SAGE_HD bool is_finite(float x) { return (bits_of(x) & 0x7f800000u) != 0x7f800000u; }

// ---- f16 and bf16, round to nearest even ----------------------------------------------------------------

SAGE_HD float f16_to_f32(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16, exponent = (h >> 10) & 31u, mantissa = h & 0x3ffu;
  if (exponent == 31) return float_of(sign | 0x7f800000u | (mantissa << 13));
  if (exponent == 0) {  // zero and subnormals: mantissa * 2^-24, exact
    const float magnitude = float(mantissa) * 0x1p-24f;
    return float_of(sign | bits_of(magnitude));
  }
  return float_of(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

SAGE_HD uint16_t f32_to_f16(float x) {
  const uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fff;                     // NaN, canonical
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // rounds to 2^16 or more
  if (magnitude < 0x38800000u) {                                  // subnormal: the adder rounds for us
    return uint16_t(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u));
  }
  const uint32_t odd = (magnitude >> 13) & 1u;
  return uint16_t(sign | ((magnitude - (112u << 23) + 0xfffu + odd) >> 13));
}

SAGE_HD float bf16_to_f32(uint16_t h) { return float_of(uint32_t(h) << 16); }

SAGE_HD uint16_t f32_to_bf16(float x) {
  const uint32_t u = bits_of(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fff;  // NaN, canonical
  return uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

// ---- FP8 e4m3fn: 4 exponent bits (bias 7), 3 mantissa bits, no infinity, largest 448 ---------------------

SAGE_HD float e4m3_to_f32(uint8_t code) {
  const uint32_t sign = uint32_t(code & 0x80u) << 24, exponent = (code >> 3) & 15u, mantissa = code & 7u;
  if ((code & 0x7fu) == 0x7fu) return float_of(0x7fc00000u);
  if (exponent == 0) return float_of(sign | bits_of(float(mantissa) * 0x1p-9f));
  return float_of(sign | ((exponent + 120) << 23) | (mantissa << 20));
}

// Saturating, round to nearest even; NaN stays NaN.
SAGE_HD uint8_t f32_to_e4m3(float x) {
  const uint32_t u = bits_of(x), sign = (u >> 24) & 0x80u, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return kE4m3NotFinite;
  if (magnitude >= 0x43e00000u) return uint8_t(sign | 0x7eu);  // 448 and above
  if (magnitude < 0x3c800000u) {                               // below 2^-6: subnormal, steps of 2^-9
    return uint8_t(sign | (bits_of(float_of(magnitude) + 0x1p14f) - bits_of(0x1p14f)));
  }
  const uint32_t odd = (magnitude >> 20) & 1u;
  const uint32_t code = (magnitude - (120u << 23) + 0x7ffffu + odd) >> 20;
  return uint8_t(sign | (code > 0x7eu ? 0x7eu : code));
}

// ---- symmetric quantizers -------------------------------------------------------------------------------

struct Scale {
  float scale;    // x is approximately code * scale
  float inverse;  // code is round(x * inverse)
};

// The scale of a group whose largest finite magnitude is amax. A group of zeros (or of values too small to
// divide by) gets codes 0 and a scale of 1, so nothing downstream divides by zero.
SAGE_HD Scale make_scale(float amax, float range) {
  if (!(amax >= 0x1p-100f)) return {1.0f, 0.0f};
  return {amax / range, range / amax};
}

SAGE_HD int8_t to_int8(float x, float inverse) { return is_finite(x) ? int8_t(rintf(x * inverse)) : kInt8NotFinite; }
SAGE_HD int8_t to_int4(float x, float inverse) { return is_finite(x) ? int8_t(rintf(x * inverse)) : kInt4NotFinite; }
SAGE_HD uint8_t to_e4m3(float x, float inverse) { return is_finite(x) ? f32_to_e4m3(x * inverse) : kE4m3NotFinite; }

SAGE_HD float int8_value(int8_t code) { return code == kInt8NotFinite ? float_of(0x7fc00000u) : float(code); }
SAGE_HD float int4_value(int8_t code) { return code == kInt4NotFinite ? float_of(0x7fc00000u) : float(code); }

// Two INT4 codes a byte: channel 2i in the low half, channel 2i+1 in the high half.
SAGE_HD uint8_t pack_int4(int8_t even, int8_t odd) { return uint8_t((even & 15) | (odd & 15) << 4); }
SAGE_HD int8_t unpack_int4(uint8_t byte, int channel) {
  return int8_t((channel & 1) ? int8_t(byte) >> 4 : int8_t(byte << 4) >> 4);
}

// ---- which rows share a scale ---------------------------------------------------------------------------

enum class Grouping { kToken, kRows, kThreadQuery, kThreadKey };  // kRows: per block and per warp

// SageAttention2, Eq. 8: exactly the rows that one lane of the tensor core's fragment holds.
SAGE_HD int64_t group_of(Grouping grouping, int64_t row, int64_t group_rows) {
  switch (grouping) {
    case Grouping::kToken: return row;
    case Grouping::kRows: return row / group_rows;
    case Grouping::kThreadQuery: return row / group_rows * 8 + row % 8;
    case Grouping::kThreadKey: return row / group_rows * 4 + row % 8 / 2;
  }
  return 0;
}

SAGE_HD int64_t group_count(Grouping grouping, int64_t rows, int64_t group_rows) {
  switch (grouping) {
    case Grouping::kToken: return rows;
    case Grouping::kRows: return (rows + group_rows - 1) / group_rows;
    case Grouping::kThreadQuery: return (rows + group_rows - 1) / group_rows * 8;
    case Grouping::kThreadKey: return (rows + group_rows - 1) / group_rows * 4;
  }
  return 0;
}

// ---- rotation -------------------------------------------------------------------------------------------
//
// A row of Q or K, less its mean and padded with zeros to rotated_channels(D) channels, is multiplied by
// diag(rotation_sign(c) / channels), which is exact, and then by the Hadamard matrix: for step = 1, 2, 4, ...
// channels / 2, every pair (a, b) of channels c and c + step, bit `step` of c clear, becomes (a + b, a - b). No sum
// can overflow. q.k is rotated_channels(D) times the product of what rotation makes of them.

SAGE_HD int rotated_channels(int64_t channels) {
  int padded = 1;
  while (padded < channels) padded *= 2;
  return padded;
}

SAGE_HD float rotation_sign(uint32_t channel) {
  uint32_t mixed = (channel + 1) * 0x9e3779b1u;
  mixed = (mixed ^ mixed >> 15) * 0x85ebca6bu;
  return mixed >> 31 ? -1.0f : 1.0f;
}

// ---- the precision band ---------------------------------------------------------------------------------

constexpr int kBandQueries = 128;  // rows of a query tile
constexpr int kBandKeys = 64;      // keys of a key tile

// Whether the rows of a query tile take a key tile exactly: the first, and those that the diagonal, key i + offset of
// query i, passes through.
SAGE_HD bool in_band(int64_t query_tile, int64_t key_tile, int64_t offset) {
  const int64_t first_key = query_tile * kBandQueries + offset, last_key = first_key + kBandQueries - 1;
  return key_tile == 0 || (first_key < (key_tile + 1) * kBandKeys && last_key >= key_tile * kBandKeys);
}

// ---- the order in which a mean is summed ----------------------------------------------------------------
//
// The rows of one mean are cut into chunks of kChunkRows. In a chunk, lane r of kChunkLanes adds the finite
// values of rows r, r + kChunkLanes, ... in f32, in that order, starting from +0; lanes are then folded in
// halves (lane r += lane r + step for step = 8, 4, 2, 1). Chunk sums are folded in f64: lane c of kFoldLanes
// adds chunks c, c + kFoldLanes, ... in order, and the lanes are folded in halves (16, 8, 4, 2, 1). The mean is
// mean_of(f64 sum, count of finite values).

// f32(sum / count), but 0 where there is no finite value, and where the mean is so large (or has overflowed) that
// subtracting it could lose or overflow a value: any constant is an exact shift, so none is as good.
SAGE_HD float mean_of(double sum, int64_t count) {
  const float mean = count == 0 ? 0.0f : static_cast<float>(sum / static_cast<double>(count));
  return fabsf(mean) < 0x1p119f ? mean : 0.0f;
}

constexpr int kChunkRows = 128;
constexpr int kChunkLanes = 16;
constexpr int kFoldLanes = 32;

}  // namespace sage
