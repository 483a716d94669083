// Eight numbers as codes, in the roundings of numerics.h.
#pragma once

#include "tile.cuh"

namespace sage::cuda {

// Rounds to nearest even by adding 1.5 * 2^23: the code is the sum's low byte.
__device__ __forceinline__ uint32_t low_byte_code(float scaled) { return bits_of(scaled + 12582912.0f); }

// Codes of 8 values that are all finite; inverse(j) is that of the scale of value j.
template <DType kCode, class Inverse>
__device__ __forceinline__ Octet<kCode> encode_finite(const float (&x)[8], Inverse inverse) {
  Octet<kCode> octet;
  if constexpr (kCode == DType::kI8) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      uint32_t code[4];
#pragma unroll
      for (int j = 0; j < 4; j++) code[j] = low_byte_code(x[4 * i + j] * inverse(4 * i + j));
      octet.word[i] = __byte_perm(__byte_perm(code[0], code[1], 0x0040), __byte_perm(code[2], code[3], 0x0040), 0x5410);
    }
  } else if constexpr (kCode == DType::kI4) {
    // Codes that are 8 too large are no less than 1 and add up without borrowing; so is every nibble's top bit wrong.
    constexpr uint32_t kZero = 0x4b400000u * 0x11111111u;  // what the exponents of the sums add up to
    uint32_t sum = 0;
#pragma unroll
    for (int j = 7; j >= 0; j--) sum = 16 * sum + bits_of(x[j] * inverse(j) + (12582912.0f + 8.0f));
    octet.word[0] = (sum - kZero) ^ 0x88888888u;
  } else {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      uint32_t word = 0;
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        const float low = x[4 * i + j] * inverse(4 * i + j), high = x[4 * i + j + 1] * inverse(4 * i + j + 1);
#if __CUDA_ARCH__ >= 890
        uint16_t pair;
        asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
#else
        const uint32_t pair = f32_to_e4m3(low) | f32_to_e4m3(high) << 8;
#endif
        word |= static_cast<uint32_t>(pair) << (8 * j);
      }
      octet.word[i] = word;
    }
  }
  return octet;
}

// The same where any value may not be finite, straight from numerics.h.
template <DType kCode, class Inverse>
__device__ __forceinline__ Octet<kCode> encode_any(const float (&x)[8], Inverse inverse) {
  Octet<kCode> octet = {};
#pragma unroll
  for (int j = 0; j < 8; j++) {
    if constexpr (kCode == DType::kI8) octet.word[j / 4] |= (to_int8(x[j], inverse(j)) & 255u) << (j % 4 * 8);
    if constexpr (kCode == DType::kI4) octet.word[0] |= (to_int4(x[j], inverse(j)) & 15u) << (j * 4);
    if constexpr (kCode == DType::kE4M3) octet.word[j / 4] |= uint32_t{to_e4m3(x[j], inverse(j))} << (j % 4 * 8);
  }
  return octet;
}

}  // namespace sage::cuda
