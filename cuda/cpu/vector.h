// Vectors of the instruction set that this inclusion is compiled for (see tasks.h).
#pragma once

#define SAGE_INLINE inline __attribute__((always_inline))

namespace sage::cpu::SAGE_ISA {

// The AVX-512 intrinsics with a mask of all lanes are those that compilers do not take for uninitialized.
constexpr int kLanes = SAGE_LANES;

typedef float Floats __attribute__((vector_size(4 * SAGE_LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * SAGE_LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * SAGE_LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * SAGE_LANES)));
typedef uint8_t Bytes __attribute__((vector_size(SAGE_LANES)));

template <class Vector>
SAGE_INLINE Vector load(const void* from) {
  Vector x;
  memcpy(&x, from, sizeof x);
  return x;
}

template <class Vector>
SAGE_INLINE void store(void* to, Vector x) {
  memcpy(to, &x, sizeof x);
}

SAGE_INLINE Floats broadcast(float x) { return x - Floats{}; }
SAGE_INLINE Ints broadcast(int32_t x) { return x - Ints{}; }

SAGE_INLINE Ints lane_numbers() {
  Ints lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  return lanes;
}

// The second where either is NaN.
SAGE_INLINE Floats max(Floats a, Floats b) {
#if defined(SAGE_AVX512)
  return (Floats)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(SAGE_AVX2)
  return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

SAGE_INLINE Ints max(Ints a, Ints b) { return a > b ? a : b; }

// a * b + c, rounded once where the instruction set can. For attention only: quantizers must agree everywhere.
SAGE_INLINE Floats fma(Floats a, Floats b, Floats c) {
#if defined(SAGE_AVX512)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(SAGE_AVX2)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON)
  return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

SAGE_INLINE float largest(Floats x) {
#if defined(SAGE_AVX512) || defined(SAGE_AVX2)
#if defined(SAGE_AVX512)
  __m256 halves[2];
  memcpy(halves, &x, sizeof x);
  const __m256 eight = _mm256_max_ps(halves[0], halves[1]);
#else
  const __m256 eight = (__m256)x;
#endif
  __m128 four = _mm_max_ps(_mm256_extractf128_ps(eight, 1), _mm256_castps256_ps128(eight));
  four = _mm_max_ps(_mm_movehl_ps(four, four), four);
  return _mm_cvtss_f32(_mm_max_ss(_mm_movehdup_ps(four), four));
#else
  float result = x[0];
  for (int i = 1; i < kLanes; ++i) result = x[i] > result ? x[i] : result;
  return result;
#endif
}

SAGE_INLINE int32_t largest(Ints x) {
  int32_t result = x[0];
  for (int i = 1; i < kLanes; ++i) result = x[i] > result ? x[i] : result;
  return result;
}

SAGE_INLINE float total(Floats x) {
  float result = x[0];
  for (int i = 1; i < kLanes; ++i) result += x[i];
  return result;
}

// ---- products of codes ------------------------------------------------------------------------------------
//
// A word holds the codes of kCodesPerWord neighbours; dot() adds the products of a word of each operand. One operand
// of byte products is unsigned: probabilities are, and keys are stored with kCodeOffset added, and what that adds to
// the sums is taken off in advance.

#if defined(SAGE_BYTE_PRODUCTS)
typedef int8_t Code;
constexpr int kCodeOffset = 128;
#else
typedef int16_t Code;
constexpr int kCodeOffset = 0;
#endif
constexpr int kCodesPerWord = 4 / sizeof(Code);

// sum + positive . x, every code of `positive` in [0, 255].
SAGE_INLINE Ints dot(Ints sum, Ints positive, Ints x) {
#if defined(SAGE_BYTE_PRODUCTS) && defined(SAGE_AVX512)
  return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)positive, (__m512i)x);
#elif defined(SAGE_BYTE_PRODUCTS)
  return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)positive, (__m256i)x);
#elif defined(SAGE_AVX512)
  return sum + (Ints)_mm512_madd_epi16((__m512i)positive, (__m512i)x);
#elif defined(SAGE_AVX2)
  return sum + (Ints)_mm256_madd_epi16((__m256i)positive, (__m256i)x);
#elif defined(__SSE2__)
  return sum + (Ints)_mm_madd_epi16((__m128i)positive, (__m128i)x);
#else
  const Ints low = (Ints)((Words)positive << 16) >> 16, x_low = (Ints)((Words)x << 16) >> 16;
  return sum + low * x_low + (positive >> 16) * (x >> 16);
#endif
}

// ---- f16, bf16 and e4m3 -----------------------------------------------------------------------------------

SAGE_INLINE Floats load_f16(const void* from) {
#if defined(SAGE_AVX512)
  return (Floats)_mm512_maskz_cvtph_ps(0xffff, load<__m256i>(from));
#elif defined(SAGE_AVX2)
  return (Floats)_mm256_cvtph_ps(load<__m128i>(from));
#else
  const Halves halves = load<Halves>(from);
  Floats x;
  for (int i = 0; i < kLanes; ++i) x[i] = f16_to_f32(halves[i]);
  return x;
#endif
}

SAGE_INLINE Floats load_bf16(const void* from) {
  return (Floats)(__builtin_convertvector(load<Halves>(from), Words) << 16);
}

SAGE_INLINE void store_f16(void* to, Floats x) {
#if defined(SAGE_AVX512)
  const Halves halves = (Halves)_mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(SAGE_AVX2)
  const Halves halves = (Halves)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#else
  Halves halves;
  for (int i = 0; i < kLanes; ++i) halves[i] = f32_to_f16(x[i]);
#endif
  const Halves magnitude = halves & 0x7fff;
  store(to, magnitude > 0x7c00 ? magnitude | 0x7fff : halves);
}

SAGE_INLINE void store_bf16(void* to, Floats x) {
  const Words u = (Words)x;
  const Words rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  store(to, __builtin_convertvector((u & 0x7fffffffu) > 0x7f800000u ? Words{} + 0x7fffu : rounded, Halves));
}

// The nearest number of `mantissa_bits` bits and steps of at least 2^lowest, ties to even: adding a large enough
// power of two makes the adder round.
template <int kMantissaBits, int kLowest>
SAGE_INLINE Floats round_to(Floats x) {
  const Ints anchor = (Ints)(((Words)x & 0x7f800000u) + (((23u - kMantissaBits) << 23) | 0x400000u));
  const Floats large = (Floats)max(anchor, broadcast(((kLowest + 23 + 127) << 23) | 0x400000));
  return (x + large) - large;
}

SAGE_INLINE Floats round_to_f16(Floats x) { return round_to<10, -24>(x); }  // |x| < 65520
SAGE_INLINE Floats round_to_e4m3(Floats x) { return round_to<3, -9>(x); }   // |x| < 464

// e4m3 codes in the low byte of every word; NaN is not treated.
SAGE_INLINE Floats e4m3_values(Words codes) {
  const Floats magnitude = (Floats)((codes & 0x7fu) << 20) * 0x1p120f;
  return (Floats)((Words)magnitude | ((codes & 0x80u) << 24));
}

// ---- the exponential --------------------------------------------------------------------------------------

// 2^x for x <= 127 within 1.5 units in the last place; 0 below -126.5. NaN stays NaN.
SAGE_INLINE Floats exp2(Floats x) {
  x = max(broadcast(-127.0f), x);
  const Floats shifted = x + 0x1.8000fep23f;        // the nearest integer, as an exponent in the low bits
  const Floats f = x - (shifted - 0x1.8000fep23f);  // in [-1/2, 1/2]
  const Floats power = (Floats)((Words)shifted << 23);
  Floats q = fma(broadcast(0x1.41fbbcp-13f), f, broadcast(0x1.5f3e54p-10f));
  q = fma(q, f, broadcast(0x1.3b2d4cp-7f));
  q = fma(q, f, broadcast(0x1.c6aee8p-5f));
  q = fma(q, f, broadcast(0x1.ebfbdcp-3f));
  q = fma(q, f, broadcast(0x1.62e430p-1f));
  return fma(q * f, power, power);
}

// An e4m3 number near 2^x for x <= log2(448): its code is linear in x, as the mantissa is nearly a logarithm. The
// shift of 0.057 makes the errors of all mantissas average out. NaN stays NaN.
SAGE_INLINE Floats fast_exp2(Floats x) {
  const Floats code = max(fma(x, broadcast(8.0f), broadcast(8.0f * (7.0f - 0.057f) + 0.5f)), broadcast(0.0f));
  const Ints whole = __builtin_convertvector(code < 126.0f ? code : broadcast(126.0f), Ints);
  return x == x ? e4m3_values((Words)whole) : x;
}

}  // namespace sage::cpu::SAGE_ISA
