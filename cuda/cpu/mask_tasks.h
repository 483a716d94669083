// What becomes of scores before softmax: capped, added to, and -inf where a mask closes.
#pragma once

#include "pack_tasks.h"

namespace sage::cpu::SAGE_ISA {

constexpr float kInfinity = __builtin_inff();
constexpr float kLargest = 0x1.fffffep127f;

// Within 3 units in the last place. NaN stays NaN.
SAGE_INLINE Floats tanh(Floats x) {
  const Floats magnitude = (Floats)((Ints)x & 0x7fffffff), z = x * x;
  Floats q = fma(broadcast(-5.70498872745e-3f), z, broadcast(2.06390887954e-2f));
  q = fma(q, z, broadcast(-5.37397155531e-2f));
  q = fma(q, z, broadcast(1.33314422036e-1f));
  q = fma(q, z, broadcast(-3.33332819422e-1f));
  const Floats near_zero = fma(q * z, x, x);
  const Floats power = exp2(-max(broadcast(-30.0f), -magnitude) * (2.0f * kLog2e));
  const Floats far = 1.0f - 2.0f / (power + 1.0f);
  const Floats signed_far = (Floats)((Words)far | ((Words)x & 0x80000000u));
  return magnitude < 0.625f ? near_zero : signed_far;
}

// ---- which part of a tile a mask lets through ---------------------------------------------------------------

enum class Cover { kOpen, kMixed, kClosed };

// The bits of a mask's elements; each test takes one or a vector of them.
struct BoolMask {
  typedef uint8_t Bits;
  template <class X>
  static SAGE_INLINE auto open(X x) {
    return x != 0;
  }
  template <class X>
  static SAGE_INLINE auto closed(X x) {
    return x == 0;
  }
};

template <class Element, Element kMagnitude, Element kMinusInfinity>
struct AddedMask {
  typedef Element Bits;
  template <class X>
  static SAGE_INLINE auto open(X x) {
    return (x & kMagnitude) == 0;
  }
  template <class X>
  static SAGE_INLINE auto closed(X x) {
    return x == kMinusInfinity;
  }
};

template <class Vector>
SAGE_INLINE bool all_set(Vector x) {
  uint64_t words[sizeof x / 8], result = ~uint64_t(0);
  memcpy(words, &x, sizeof x);
  for (const uint64_t word : words) result &= word;
  return result == ~uint64_t(0);
}

// Of `rows` rows of a mask and keys [from, to).
template <class Mask>
Cover cover_with(const View& mask, int64_t b, int64_t h, int64_t row, int rows, int64_t from, int64_t to) {
  typedef typename Mask::Bits Bits;
  typedef Bits Vector __attribute__((vector_size(4 * kLanes)));
  constexpr int kStep = 4 * kLanes / sizeof(Bits);
  if (to - from == kKeyTile && mask.stride[3] == 1) {
    auto open = Mask::open(Vector{}) | ~Mask::open(Vector{}), closed = open;
    for (int r = 0; r < rows; ++r) {
      const Bits* at_row = at<Bits>(mask, b, h, row + r, from);
      for (int i = 0; i < kKeyTile; i += kStep) {
        const Vector x = load<Vector>(at_row + i);
        open &= Mask::open(x);
        closed &= Mask::closed(x);
      }
    }
    return all_set(open) ? Cover::kOpen : all_set(closed) ? Cover::kClosed : Cover::kMixed;
  }
  bool open = true, closed = true;
  for (int r = 0; r < rows && (open || closed); ++r) {
    for (int64_t key = from; key < to; ++key) {
      const Bits x = *at<Bits>(mask, b, h, row + r, key);
      open &= Mask::open(x);
      closed &= Mask::closed(x);
    }
  }
  return open ? Cover::kOpen : closed ? Cover::kClosed : Cover::kMixed;
}

inline Cover cover_of(const View& mask, int64_t b, int64_t h, int64_t row, int rows, int64_t from, int64_t to) {
  if (mask.tokens() == 1) row = 0, rows = 1;
  switch (mask.dtype) {
    case DType::kBool: return cover_with<BoolMask>(mask, b, h, row, rows, from, to);
    case DType::kF32: return cover_with<AddedMask<uint32_t, 0x7fffffffu, 0xff800000u>>(mask, b, h, row, rows, from, to);
    case DType::kF16: return cover_with<AddedMask<uint16_t, 0x7fff, 0xfc00>>(mask, b, h, row, rows, from, to);
    default: return cover_with<AddedMask<uint16_t, 0x7fff, 0xff80>>(mask, b, h, row, rows, from, to);
  }
}

SAGE_INLINE bool closes(const View& mask, int64_t b, int64_t h, int64_t row, int64_t key) {
  const float x = element(mask, b, h, row, key);
  return mask.dtype == DType::kBool ? x == 0.0f : x == -kInfinity;
}

// ---- one row of scores of a tile, in base 2 -----------------------------------------------------------------

// softcap * tanh(score / softcap) of scores that lack `shift`.
SAGE_INLINE void cap_scores(float softcap, float shift, float* scores) {
  for (int i = 0; i < kKeyTile; i += kLanes) {
    const Floats score = (load<Floats>(scores + i) + shift) * kLn2;
    store(scores + i, tanh(score / softcap) * softcap * kLog2e);
  }
}

// `position` is that of the query, counted from the first key of the tile.
SAGE_INLINE void add_distances(float slope, float position, float* scores) {
  for (int i = 0; i < kKeyTile; i += kLanes) {
    const Floats distance = position - __builtin_convertvector(lane_numbers() + i, Floats);
    const Floats magnitude = (Floats)((Ints)distance & 0x7fffffff);
    store(scores + i, fma(magnitude, broadcast(-slope * kLog2e), load<Floats>(scores + i)));
  }
}

// Says whether it leaves any of the tile's keys [from, to) open.
inline bool add_mask(const View& mask, int64_t b, int64_t h, int64_t row, int64_t first_key, int from, int to,
                     float* scores) {
  const int keys = int(smaller(kKeyTile, mask.channels() - first_key));
  View tile = mask;
  tile.data = static_cast<char*>(mask.data) + first_key * mask.stride[3] * bits_per_element(mask.dtype) / 8;
  alignas(64) float added[kKeyTile] = {};
  if (mask.dtype == DType::kBool) {
    alignas(64) uint8_t bytes[kKeyTile] = {};
    load_codes(tile, b, h, row, 0, keys, bytes);
    for (int i = 0; i < kKeyTile; i += kLanes) {
      const Words x = __builtin_convertvector(load<Bytes>(bytes + i), Words);
      store(added + i, x != 0 ? Floats{} : broadcast(-kInfinity));
    }
  } else {
    load_row(tile, b, h, row, 0, keys, added);
  }
  Ints seen = {};
  for (int i = 0; i < kKeyTile; i += kLanes) {
    const Floats x = load<Floats>(added + i);
    const Ints open = x != -kInfinity, lanes = lane_numbers() + i;
    const Floats in_base_2 = max(broadcast(-kLargest), x * kLog2e);  // what is finite stays so; NaN stays NaN
    store(scores + i, open ? load<Floats>(scores + i) + in_base_2 : broadcast(-kInfinity));
    seen |= open & (lanes >= from) & (lanes < to);
  }
  int any = 0;
  for (int i = 0; i < kLanes; ++i) any |= seen[i];
  return any != 0;
}

}  // namespace sage::cpu::SAGE_ISA
