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

// ---- the keys that a row reaches ----------------------------------------------------------------------------

struct Reach {
  int64_t first, last;  // [first, last); both rise with the row
};

SAGE_INLINE Reach reach_of(const Attention& a, int64_t row) {
  const Masking& m = a.masking;
  const int64_t keys = a.k.tokens(), diagonal = row + m.offset;
  const auto clamp = [keys](int64_t key) { return key < 0 ? 0 : smaller(key, keys); };
  return {m.before == kUnlimited ? 0 : clamp(diagonal - m.before),
          m.after == kUnlimited ? keys : clamp(diagonal + m.after + 1)};
}

// ---- which tiles a mask opens and closes --------------------------------------------------------------------

// Of one row or, by &, of several; a row that does not reach the tile is both.
enum Cover : uint8_t { kMixed = 0, kOpen = 1, kClosed = 2 };

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

// Of a comparison: whether it holds everywhere.
template <class Vector>
SAGE_INLINE bool all_set(Vector x) {
#if defined(SAGE_AVX512)
  return _mm512_movepi8_mask((__m512i)x) == ~uint64_t(0);
#elif defined(SAGE_AVX2)
  return _mm256_movemask_epi8((__m256i)x) == -1;
#else
  uint64_t words[sizeof x / 8], result = ~uint64_t(0);
  memcpy(words, &x, sizeof x);
  for (const uint64_t word : words) result &= word;
  return result == ~uint64_t(0);
#endif
}

// Of one row and keys [from, to).
template <class Mask>
SAGE_INLINE uint8_t cover_of(const View& mask, int64_t b, int64_t h, int64_t row, int64_t from, int64_t to) {
  typedef typename Mask::Bits Bits;
  typedef Bits Vector __attribute__((vector_size(4 * kLanes)));
  constexpr int kStep = 4 * kLanes / sizeof(Bits);
  if (to - from == kKeyTile && mask.stride[3] == 1) {
    const Bits* bits = at<Bits>(mask, b, h, row, from);
    auto open = Mask::open(load<Vector>(bits)), closed = Mask::closed(load<Vector>(bits));
    for (int i = kStep; i < kKeyTile; i += kStep) {
      const Vector x = load<Vector>(bits + i);
      open &= Mask::open(x);
      closed &= Mask::closed(x);
    }
    return uint8_t((all_set(open) ? kOpen : 0) | (all_set(closed) ? kClosed : 0));
  }
  bool open = true, closed = true;
  for (int64_t key = from; key < to && (open || closed); ++key) {
    const Bits x = *at<Bits>(mask, b, h, row, key);
    open &= Mask::open(x);
    closed &= Mask::closed(x);
  }
  return uint8_t((open ? kOpen : 0) | (closed ? kClosed : 0));
}

template <class Mask>
void cover_with(const Attention& a, int64_t task) {
  const View& mask = a.masking.mask;
  const int64_t blocks = a.cover_blocks(), tiles = a.tiles(), block_rows = a.cover_rows();
  const int64_t head = task / blocks, begin = task % blocks * kQueryTile;
  const int64_t rows = smaller(block_rows, mask.tokens() - begin);
  const bool one_for_all = mask.tokens() == 1;
  uint8_t* covers = a.covers + task * tiles * block_rows;
  memset(covers, kOpen | kClosed, tiles * block_rows);
  for (int64_t r = 0; r < rows; ++r) {
    const Reach reach = one_for_all ? Reach{0, a.k.tokens()} : reach_of(a, begin + r);
    for (int64_t tile = reach.first / kKeyTile; tile * kKeyTile < reach.last; ++tile) {
      const int64_t from = tile * kKeyTile, to = smaller(from + kKeyTile, reach.last);
      covers[tile * block_rows + r] = cover_of<Mask>(mask, head / mask.heads(), head % mask.heads(), begin + r,
                                                     from > reach.first ? from : reach.first, to);
    }
  }
}

void cover_mask(const Attention& a, int64_t task) {
  switch (a.masking.mask.dtype) {
    case DType::kBool: return cover_with<BoolMask>(a, task);
    case DType::kF32: return cover_with<AddedMask<uint32_t, 0x7fffffffu, 0xff800000u>>(a, task);
    case DType::kF16: return cover_with<AddedMask<uint16_t, 0x7fff, 0xfc00>>(a, task);
    default: return cover_with<AddedMask<uint16_t, 0x7fff, 0xff80>>(a, task);
  }
}

// The covers of rows from `row` on, which must be of one tile of queries, and how far apart they are.
struct Covers {
  const uint8_t* first;
  int64_t stride;
};

SAGE_INLINE Covers covers_of(const Attention& a, int64_t b, int64_t h, int64_t row, int64_t tile) {
  const View& mask = a.masking.mask;
  const int64_t head = (mask.batch() == 1 ? 0 : b) * mask.heads() + (mask.heads() == 1 ? 0 : h);
  if (mask.tokens() == 1) return {a.covers + head * a.tiles() + tile, 0};
  const int64_t block = head * a.cover_blocks() + row / kQueryTile;
  return {a.covers + (block * a.tiles() + tile) * kQueryTile + row % kQueryTile, 1};
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

inline void add_mask(const View& mask, int64_t b, int64_t h, int64_t row, int64_t first_key, float* scores) {
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
  for (int i = 0; i < kKeyTile; i += kLanes) {
    const Floats x = load<Floats>(added + i);
    const Floats in_base_2 = max(broadcast(-kLargest), x * kLog2e);  // what is finite stays so; NaN stays NaN
    store(scores + i, x != -kInfinity ? load<Floats>(scores + i) + in_base_2 : broadcast(-kInfinity));
  }
}

}  // namespace sage::cpu::SAGE_ISA
