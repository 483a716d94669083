// Quantizers and their inverse, in the roundings and groups of numerics.h.
#pragma once

#include "rows.h"

namespace sage::cpu::SAGE_ISA {

// Rows of x, less the mean.
class CenteredRows {
 public:
  CenteredRows(const View& x, const View& mean, int64_t mean_rows, int64_t head, int first, int channels)
      : x_(x),
        mean_(mean),
        mean_rows_(mean_rows),
        b_(head / x.heads()),
        h_(head % x.heads()),
        first_(first),
        channels_(channels) {}

  void load_centered(int64_t n, float* to) {
    load_row(x_, b_, h_, n, first_, channels_, to);
    if (!mean_) return;
    const int64_t row = mean_row(mean_, n, mean_rows_);
    if (row != loaded_) load_row(mean_, b_, h_, loaded_ = row, first_, channels_, mean_values_);
    for (int c = 0; c < channels_; c += kLanes) store(to + c, load<Floats>(to + c) - load<Floats>(mean_values_ + c));
  }

 private:
  const View& x_;
  const View& mean_;
  const int64_t mean_rows_, b_, h_;
  const int first_, channels_;
  int64_t loaded_ = -1;
  alignas(64) float mean_values_[kRowFloats];
};

// Rotates a row that ends with room for rotated_channels(channels) numbers: see numerics.h.
inline void rotate_row(float* x, int channels) {
  const int padded = rotated_channels(channels);
  for (int c = 0; c < channels; ++c) x[c] *= rotation_sign(uint32_t(c)) / float(padded);
  for (int c = channels; c < padded; ++c) x[c] = 0.0f;
  for (int step = 1; step < padded; step *= 2) {
    for (int first = 0; first < padded; first += 2 * step) {
      for (int c = first; c < first + step; ++c) {
        const float a = x[c], b = x[c + step];
        x[c] = a + b;
        x[c + step] = a - b;
      }
    }
  }
  for (int c = padded; c % kLanes; ++c) x[c] = 0.0f;
}

SAGE_INLINE Ints finite_magnitude(Floats x) {  // in bits, which sort like the numbers; 0 where x is not finite
  const Ints magnitude = (Ints)x & 0x7fffffff;
  return magnitude < 0x7f800000 ? magnitude : Ints{};
}

// round(x * inverse) as one byte a code.
SAGE_INLINE Bytes encode(DType format, Floats x, Floats inverse) {
  const Words finite = (Words)(((Words)x & 0x7f800000u) != 0x7f800000u);
  const Floats scaled = x * inverse;
  if (format != DType::kE4M3) {
    const Words code = (Words)(scaled + 0x1.8p23f);  // the adder rounds; the low byte is the integer
    const uint32_t mark = uint8_t(format == DType::kI8 ? kInt8NotFinite : kInt4NotFinite);
    return __builtin_convertvector((code & finite) | (mark & ~finite), Bytes);
  }
  const Words u = (Words)scaled, sign = (u >> 24) & 0x80u, magnitude = u & 0x7fffffffu;
  const Words tiny = (Words)((Floats)magnitude + 0x1p14f) - bits_of(0x1p14f);
  const Words normal = (magnitude - (120u << 23) + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20;
  const Words code = (Ints)magnitude < 0x3c800000 ? tiny : normal;
  const Words saturated = (Ints)magnitude >= 0x43e00000 ? Words{} + 0x7eu : code;
  return __builtin_convertvector(((sign | saturated) & finite) | (uint32_t(kE4m3NotFinite) & ~finite), Bytes);
}

// The groups of one task: kSpanRows rows (per token), one group (per block or warp), or the groups that share
// group_rows rows (per thread).
void quantize_rows(const QuantizeOp& op, int64_t task) {
  const View& x = op.x;
  const int64_t task_rows = op.grouping == Grouping::kToken ? kSpanRows : op.group_rows;
  const int64_t tasks = ceil_div(x.tokens(), task_rows), head = task / tasks;
  const int64_t b = head / x.heads(), h = head % x.heads(), begin = task % tasks * task_rows;
  const int64_t end = begin + smaller(task_rows, x.tokens() - begin);
  const int64_t first_group = group_of(op.grouping, begin, op.group_rows);
  const int groups =
      op.grouping == Grouping::kToken ? int(end - begin) : int(group_count(op.grouping, op.group_rows, op.group_rows));
  const int row_channels = int(x.channels()), channels = op.rotate ? rotated_channels(row_channels) : row_channels;

  CenteredRows rows(x, op.mean, op.mean_rows, head, 0, row_channels);
  alignas(64) float values[kRowFloats];
  const auto load_values = [&](int64_t n) {
    rows.load_centered(n, values);
    if (op.rotate) rotate_row(values, row_channels);
  };
  Ints peaks[kSpanRows] = {};
  for (int64_t n = begin; n < end; ++n) {
    load_values(n);
    Ints& peak = peaks[group_of(op.grouping, n, op.group_rows) - first_group];
    for (int c = 0; c < channels; c += kLanes) peak = max(peak, finite_magnitude(load<Floats>(values + c)));
  }
  float inverses[kSpanRows];
  for (int g = 0; g < groups; ++g) {
    const Scale scale = make_scale(float_of(uint32_t(largest(peaks[g]))), op.range);
    *at<float>(op.scales, b, h, first_group + g) = scale.scale;
    inverses[g] = scale.inverse;
  }
  alignas(64) uint8_t codes[kRowFloats];
  for (int64_t n = begin; n < end; ++n) {
    load_values(n);
    const Floats inverse = broadcast(inverses[group_of(op.grouping, n, op.group_rows) - first_group]);
    for (int c = 0; c < channels; c += kLanes) {
      store(codes + c, encode(op.codes.dtype, load<Floats>(values + c), inverse));
    }
    store_codes(op.codes, b, h, n, 0, channels, codes);
  }
}

// One slice of channels, all tokens.
void quantize_channels(const QuantizeOp& op, int64_t task) {
  const View& x = op.x;
  const int64_t slices = ceil_div(x.channels(), kSliceChannels), head = task / slices;
  const int64_t b = head / x.heads(), h = head % x.heads();
  const int first = int(task % slices * kSliceChannels), channels = int(smaller(kSliceChannels, x.channels() - first));

  CenteredRows rows(x, op.mean, op.mean_rows, head, first, channels);
  alignas(64) float values[kSliceChannels] = {};
  Ints peaks[kSliceVectors] = {};
  for (int64_t n = 0; n < x.tokens(); ++n) {
    rows.load_centered(n, values);
    for (int v = 0; v < kSliceVectors; ++v)
      peaks[v] = max(peaks[v], finite_magnitude(load<Floats>(values + v * kLanes)));
  }
  alignas(64) float inverses[kSliceChannels] = {};
  for (int c = 0; c < channels; ++c) {
    const Scale scale = make_scale(float_of(uint32_t(peaks[c / kLanes][c % kLanes])), op.range);
    *at<float>(op.scales, b, h, 0, first + c) = scale.scale;
    inverses[c] = scale.inverse;
  }
  alignas(64) uint8_t codes[kSliceChannels];
  for (int64_t n = 0; n < x.tokens(); ++n) {
    rows.load_centered(n, values);
    for (int c = 0; c < channels; c += kLanes) {
      store(codes + c, encode(op.codes.dtype, load<Floats>(values + c), load<Floats>(inverses + c)));
    }
    store_codes(op.codes, b, h, n, first, channels, codes);
  }
}

// x = code * scale + mean for one span of rows.
void dequantize(const QuantizeOp& op, int64_t task) {
  const View& x = op.x;
  const int64_t spans = ceil_div(x.tokens(), kSpanRows), head = task / spans;
  const int64_t b = head / x.heads(), h = head % x.heads(), begin = task % spans * kSpanRows;
  const int64_t end = begin + smaller(kSpanRows, x.tokens() - begin);
  const int channels = int(x.channels());
  alignas(64) float values[kRowFloats], scales[kRowFloats], mean_values[kRowFloats];
  if (op.per_channel) load_row(op.scales, b, h, 0, 0, channels, scales);
  int64_t loaded = -1;
  for (int64_t n = begin; n < end; ++n) {
    load_code_values(op.codes, b, h, n, 0, channels, values);
    if (!op.per_channel) {
      const Floats scale = broadcast(*at<float>(op.scales, b, h, group_of(op.grouping, n, op.group_rows)));
      for (int c = 0; c < channels; c += kLanes) store(scales + c, scale);
    }
    for (int c = 0; c < channels; c += kLanes) store(values + c, load<Floats>(values + c) * load<Floats>(scales + c));
    if (op.mean) {
      const int64_t row = mean_row(op.mean, n, op.mean_rows);
      if (row != loaded) load_row(op.mean, b, h, loaded = row, 0, channels, mean_values);
      for (int c = 0; c < channels; c += kLanes) {
        store(values + c, load<Floats>(values + c) + load<Floats>(mean_values + c));
      }
    }
    store_row(x, b, h, n, 0, channels, values);
  }
}

}  // namespace sage::cpu::SAGE_ISA
