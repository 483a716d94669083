// Keys and values in tiles of kKeyTile keys, laid out as the products of attention_tasks.h read them.
//
// Keys: [D, 64] f32, or [ceil(D / kCodesPerWord), 64] words of codes. Values: [64, padded Dv] f32, or
// [64 / kCodesPerWord, padded Dv] words of codes. Keys past the end, padding channels and values that are not finite
// are 0.
#pragma once

#include "quantize_tasks.h"

namespace sage::cpu::SAGE_ISA {

struct KeyTile {
  int64_t index, head, b, h, begin;  // index: of the tile among all; head: among KV heads of all batches
  int keys;

  KeyTile(const Attention& a, int64_t task)
      : index(task),
        head(task / a.tiles()),
        b(head / a.k.heads()),
        h(head % a.k.heads()),
        begin(task % a.tiles() * kKeyTile),
        keys(int(smaller(kKeyTile, a.k.tokens() - begin))) {}
};

SAGE_INLINE int words_of(int64_t codes) { return int(ceil_div(codes, kCodesPerWord)); }

// One row of codes as words, and whether every code holds a number.
inline bool load_words(const View& x, int64_t b, int64_t h, int64_t n, int channels, int offset, Code* to) {
  alignas(64) uint8_t codes[kRowFloats];
  load_codes(x, b, h, n, 0, channels, codes);
  memset(codes + channels, 0, kCodesPerWord);
  int not_finite = 0;
  for (int c = 0; c < channels; ++c) not_finite |= int8_t(codes[c]) == kInt8NotFinite;
  Code words[kRowFloats];
  for (int c = 0; c < words_of(channels) * kCodesPerWord; ++c) words[c] = Code(int8_t(codes[c]) + offset);
  memcpy(to, words, words_of(channels) * 4);
  return !not_finite;
}

// to[w][key] = from[key][w]
SAGE_INLINE void transpose_keys(const uint32_t* from, int words, uint32_t* to) {
  for (int w = 0; w < words; ++w) {
    for (int key = 0; key < kKeyTile; ++key) to[w * kKeyTile + key] = load<uint32_t>(from + key * words + w);
  }
}

// For the correction of smoothed queries, and for the band: numbers less their mean, or dequantized codes.
inline void pack_exact_keys(const Attention& a, const KeyTile& tile, float* rows) {
  const int channels = int(a.k.channels());
  const bool codes = a.k.data == a.k_codes.data;
  const View no_mean;
  CenteredRows centered(a.k, codes ? no_mean : a.k_mean, a.k_mean_rows, tile.head, 0, channels);
  alignas(64) float values[kRowFloats];
  for (int key = 0; key < tile.keys; ++key) {
    float scale = 1.0f;
    if (codes) {
      load_code_values(a.k, tile.b, tile.h, tile.begin + key, 0, channels, values);
      scale = a.key_scales[tile.index * kKeyTile + key];
    } else {
      centered.load_centered(tile.begin + key, values);
    }
    for (int c = 0; c < channels; ++c) rows[key * channels + c] = is_finite(values[c]) ? values[c] * scale : 0.0f;
  }
}

void pack_keys(const Attention& a, int64_t task) {
  const KeyTile tile(a, task);
  const int channels = int(a.k.channels());
  alignas(64) float rows[kKeyTile * kMaxChannels + kLanes];
  uint32_t* to = reinterpret_cast<uint32_t*>(a.key_tiles + task * a.key_tile_bytes);
  if (tile.keys < kKeyTile) memset(rows, 0, sizeof rows);
  if (a.kernel == Kernel::kFlash) {
    for (int key = 0; key < tile.keys; ++key) {  // each row overwrites the zeros past the end of the one before
      load_row(a.k, tile.b, tile.h, tile.begin + key, 0, channels, rows + key * channels);
    }
    return transpose_keys(reinterpret_cast<uint32_t*>(rows), channels, to);
  }
  uint64_t bad = 0;
  Code* codes = reinterpret_cast<Code*>(rows);
  const int code_channels = int(a.k_codes.channels()), words = words_of(code_channels);
  for (int key = 0; key < tile.keys; ++key) {
    const int64_t n = tile.begin + key;
    const bool good =
        load_words(a.k_codes, tile.b, tile.h, n, code_channels, kCodeOffset, codes + key * words * kCodesPerWord);
    bad |= uint64_t(!good) << key;
    a.key_scales[task * kKeyTile + key] =
        *at<float>(a.k_scales, tile.b, tile.h, group_of(a.k_grouping, n, a.k_group_rows));
  }
  for (int key = tile.keys; key < kKeyTile; ++key) a.key_scales[task * kKeyTile + key] = 0.0f;
  a.bad_keys[task] = bad;
  transpose_keys(reinterpret_cast<uint32_t*>(rows), words, to);
  if (a.q_mean || a.band) {
    if (tile.keys < kKeyTile) memset(rows, 0, sizeof rows);
    pack_exact_keys(a, tile, rows);
    transpose_keys(reinterpret_cast<uint32_t*>(rows), channels,
                   reinterpret_cast<uint32_t*>(a.exact_keys + task * channels * kKeyTile));
  }
}

// sage1: the power of two that brings a channel of v, less its mean, just inside what f16 sums can hold.
void scale_values(const Attention& a, int64_t task) {
  const int64_t slices = ceil_div(a.v.channels(), kSliceChannels), head = task / slices;
  const int first = int(task % slices * kSliceChannels);
  const int channels = int(smaller(kSliceChannels, a.v.channels() - first));
  const View no_mean;
  CenteredRows rows(a.v, a.center_values ? a.v_mean : no_mean, a.v.tokens(), head, first, channels);
  alignas(64) float values[kSliceChannels] = {};
  Ints peaks[kSliceVectors] = {};
  for (int64_t n = 0; n < a.v.tokens(); ++n) {
    rows.load_centered(n, values);
    for (int v = 0; v < kSliceVectors; ++v) {
      peaks[v] = max(peaks[v], finite_magnitude(load<Floats>(values + v * kLanes)));
    }
  }
  const int largest_exponent = a.f16_accumulator ? 8 : 15;
  for (int c = 0; c < channels; ++c) {
    const int32_t peak = peaks[c / kLanes][c % kLanes];
    const int exponent = (peak >> 23) - 126;  // peak < 2^exponent
    const int scale = exponent - largest_exponent > -126 ? exponent - largest_exponent : -126;
    *at<float>(a.v_scales, head / a.v.heads(), head % a.v.heads(), 0, first + c) =
        peak ? float_of(uint32_t(scale + 127) << 23) : 1.0f;
  }
}

// Rows of codes to words that hold kCodesPerWord keys of one channel.
inline void pack_value_codes(const Attention& a, const KeyTile& tile, uint64_t& bad) {
  const int channels = int(a.values.channels()), stride = int(a.padded_v_dim());
  uint32_t* to = reinterpret_cast<uint32_t*>(a.value_tiles + tile.index * a.value_tile_bytes);
  alignas(64) uint8_t codes[kRowFloats];
  for (int first = 0; first < kKeyTile; first += kCodesPerWord) {
    uint32_t* words = to + first / kCodesPerWord * stride;
    memset(words, 0, stride * 4);
    for (int i = 0; i < kCodesPerWord; ++i) {
      memset(codes, 0, sizeof codes);
      if (first + i < tile.keys) {
        load_codes(a.values, tile.b, tile.h, tile.begin + first + i, 0, channels, codes);
        int not_finite = 0;
        for (int c = 0; c < channels; ++c) {
          const bool marked = int8_t(codes[c]) == kInt8NotFinite;
          not_finite |= marked;
          codes[c] = marked ? 0 : codes[c];
        }
        bad |= uint64_t(not_finite) << (first + i);
      }
      constexpr int kBits = 8 * sizeof(Code);
      constexpr uint32_t kMask = (1u << kBits) - 1;
      for (int c = 0; c < stride; ++c) words[c] |= (uint32_t(int8_t(codes[c])) & kMask) << (i * kBits);
    }
  }
}

// Rows of numbers, or of e4m3 codes, as f32: for sage1 rounded to f16.
inline void pack_value_numbers(const Attention& a, const KeyTile& tile, uint64_t& bad) {
  const int channels = int(a.values.channels()), stride = int(a.padded_v_dim());
  const bool codes = a.values.dtype == DType::kE4M3;
  const bool to_f16 = a.kernel == Kernel::kSage1;
  const View no_mean;
  CenteredRows rows(a.values, a.center_values ? a.v_mean : no_mean, a.v.tokens(), tile.head, 0, channels);
  alignas(64) float inverse_scales[kRowFloats], values[kRowFloats] = {};
  for (int c = 0; c < kRowFloats; ++c) {
    const bool scaled = to_f16 && a.v_scales && c < channels;
    inverse_scales[c] = scaled ? 1.0f / *at<float>(a.v_scales, tile.b, tile.h, 0, c) : 1.0f;
  }
  Ints peaks = {};
  float* to = reinterpret_cast<float*>(a.value_tiles + tile.index * a.value_tile_bytes);
  memset(to + tile.keys * stride, 0, sizeof(float) * (kKeyTile - tile.keys) * stride);
  for (int key = 0; key < tile.keys; ++key, to += stride) {
    if (codes) {
      load_code_values(a.values, tile.b, tile.h, tile.begin + key, 0, channels, values);
    } else {
      rows.load_centered(tile.begin + key, values);
    }
    Ints not_finite = {};
    for (int c = 0; c < stride; c += kLanes) {
      Floats x = load<Floats>(values + c);
      const Ints finite = (Ints)(((Words)x & 0x7f800000u) != 0x7f800000u);
      not_finite |= ~finite;
      x = (Floats)((Ints)x & finite);
      peaks = max(peaks, finite_magnitude(x));
      if (to_f16) x = round_to_f16(x * load<Floats>(inverse_scales + c));
      store(to + c, x);
    }
    int any = 0;
    for (int i = 0; i < kLanes; ++i) any |= not_finite[i];
    bad |= uint64_t(any != 0) << key;
  }
  a.value_peaks[tile.index] = float_of(uint32_t(largest(peaks)));
}

// For the band: the numbers that codes stand for, over the scales of the codes.
inline void pack_exact_values(const Attention& a, const KeyTile& tile) {
  const int channels = int(a.v.channels()), stride = int(a.padded_v_dim());
  CenteredRows rows(a.v, a.v_mean, a.v.tokens(), tile.head, 0, channels);
  alignas(64) float inverse_scales[kRowFloats], values[kRowFloats] = {};
  for (int c = 0; c < channels; ++c) {
    inverse_scales[c] = a.v_scales ? 1.0f / *at<float>(a.v_scales, tile.b, tile.h, 0, c) : 1.0f;
  }
  float* to = a.exact_values + tile.index * kKeyTile * stride;
  memset(to, 0, sizeof(float) * kKeyTile * stride);
  for (int key = 0; key < tile.keys; ++key, to += stride) {
    rows.load_centered(tile.begin + key, values);
    for (int c = 0; c < channels; ++c) to[c] = is_finite(values[c]) ? values[c] * inverse_scales[c] : 0.0f;
  }
}

void pack_values(const Attention& a, int64_t task) {
  const KeyTile tile(a, task);
  uint64_t bad = 0;
  if (a.integer_values()) {
    pack_value_codes(a, tile, bad);
  } else {
    pack_value_numbers(a, tile, bad);
  }
  a.bad_values[task] = bad;
  if (a.band) pack_exact_values(a, tile);
}

}  // namespace sage::cpu::SAGE_ISA
