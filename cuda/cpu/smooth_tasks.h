// Means in the order that numerics.h fixes, and what is left of a tensor without them.
#pragma once

#include "rows.h"

namespace sage::cpu::SAGE_ISA {

// Adds, channel by channel, the finite values of one chunk of rows: to a lane of the f64 sums, and to the counts.
inline void add_chunk(const View& x, int64_t b, int64_t h, int64_t row, int rows, int first, int channels, double* sums,
                      Ints* counts) {
  alignas(64) float lanes[kChunkLanes][kSliceChannels] = {};
  alignas(64) float values[kSliceChannels] = {};
  for (int r = 0; r < rows; ++r) {
    load_row(x, b, h, row + r, first, channels, values);
    float* lane = lanes[r % kChunkLanes];
    for (int v = 0; v < kSliceVectors; ++v) {
      const Floats value = load<Floats>(values + v * kLanes);
      const Ints finite = (Ints)(((Words)value & 0x7f800000u) != 0x7f800000u);
      store(lane + v * kLanes, load<Floats>(lane + v * kLanes) + (Floats)((Ints)value & finite));
      counts[v] -= finite;
    }
  }
  for (int step = kChunkLanes / 2; step; step /= 2) {
    for (int r = 0; r < step; ++r) {
      for (int c = 0; c < kSliceChannels; ++c) lanes[r][c] += lanes[r + step][c];
    }
  }
  for (int c = 0; c < kSliceChannels; ++c) sums[c] += double(lanes[0][c]);
}

// One row of the mean, one slice of channels.
void mean(const SmoothOp& op, int64_t task) {
  const View& x = op.x;
  const int64_t slices = ceil_div(x.channels(), kSliceChannels), blocks = op.mean.tokens();
  const int first = int(task % slices * kSliceChannels), channels = int(smaller(kSliceChannels, x.channels() - first));
  const int64_t block = task / slices % blocks, head = task / slices / blocks;
  const int64_t b = head / x.heads(), h = head % x.heads();
  const int64_t begin = block * op.block_rows, rows = smaller(op.block_rows, x.tokens() - begin);

  double folds[kFoldLanes][kSliceChannels] = {};
  int64_t total_counts[kSliceChannels] = {};
  for (int64_t chunk = 0; chunk * kChunkRows < rows; ++chunk) {
    Ints counts[kSliceVectors] = {};
    add_chunk(x, b, h, begin + chunk * kChunkRows, int(smaller(kChunkRows, rows - chunk * kChunkRows)), first, channels,
              folds[chunk % kFoldLanes], counts);
    for (int c = 0; c < kSliceChannels; ++c) total_counts[c] += counts[c / kLanes][c % kLanes];
  }
  for (int step = kFoldLanes / 2; step; step /= 2) {
    for (int r = 0; r < step; ++r) {
      for (int c = 0; c < kSliceChannels; ++c) folds[r][c] += folds[r + step][c];
    }
  }
  float result[kSliceChannels];
  for (int c = 0; c < channels; ++c) {
    result[c] = mean_of(folds[0][c], total_counts[c]);
  }
  store_row(op.mean, b, h, block, first, channels, result);
}

// x - mean for one span of rows.
void subtract_mean(const SmoothOp& op, int64_t task) {
  const View& x = op.x;
  const int64_t spans = ceil_div(x.tokens(), kSpanRows), head = task / spans;
  const int64_t b = head / x.heads(), h = head % x.heads(), begin = task % spans * kSpanRows;
  const int64_t end = begin + smaller(kSpanRows, x.tokens() - begin);
  const int channels = int(x.channels());
  alignas(64) float values[kRowFloats], mean_values[kRowFloats];
  int64_t loaded = -1;
  for (int64_t n = begin; n < end; ++n) {
    const int64_t block = mean_row(op.mean, n, op.block_rows);
    if (block != loaded) load_row(op.mean, b, h, loaded = block, 0, channels, mean_values);
    load_row(x, b, h, n, 0, channels, values);
    for (int c = 0; c < channels; c += kLanes) {
      store(values + c, load<Floats>(values + c) - load<Floats>(mean_values + c));
    }
    store_row(op.smoothed, b, h, n, 0, channels, values);
  }
}

}  // namespace sage::cpu::SAGE_ISA
