// Attention of one tile of queries: scores, online softmax in base 2, and the sums of values, key tile by key tile.
#pragma once

#include "mask_tasks.h"

namespace sage::cpu::SAGE_ISA {

// ---- what differs between the kernels ---------------------------------------------------------------------

enum class Rounding { kNone, kF16, kE4M3 };

struct Flash {
  static constexpr bool kIntegerScores = false, kIntegerValues = false;
  static constexpr Rounding kProbabilities = Rounding::kNone;
  static constexpr int kF16Sums = 0;  // else: sums are rounded to f16 after so many keys, and start anew every tile
  static constexpr bool kFastExponential = false;  // else: e4m3 probabilities straight from the scores
  static constexpr float kUnit = 1.0f;             // of probabilities as the operand of P.V
  static constexpr bool kTilePeaks = false;        // else: probabilities in u8, relative to the largest of their tile
  static constexpr bool kIsExact = false;
};

struct Sage1 : Flash {
  static constexpr bool kIntegerScores = true;
  static constexpr Rounding kProbabilities = Rounding::kF16;
};

struct Sage1F16 : Sage1 {
  static constexpr int kF16Sums = 16;
};

struct Sage1Int8 : Flash {
  static constexpr bool kIntegerScores = true, kIntegerValues = true;
  static constexpr float kUnit = kInt8Range;
};

struct SageInt8 : Flash {
  static constexpr bool kIntegerScores = true, kIntegerValues = true, kTilePeaks = true;
};

struct Sage2 : Flash {
  static constexpr bool kIntegerScores = true;
  static constexpr Rounding kProbabilities = Rounding::kE4M3;
};

struct Sage2Fast : Sage2 {
  static constexpr bool kFastExponential = true;
};

struct Sage2PP : Sage2 {
  static constexpr int kF16Sums = 32;
};

// Tiles of the band, whatever the others are.
struct ExactTile : Flash {
  static constexpr bool kIsExact = true;
};

// ---- the register tile ------------------------------------------------------------------------------------

constexpr int kTileRows = SAGE_TILE_ROWS;  // rows whose sums are held in registers at once
constexpr int kTileVectors = 2;            // vectors of columns of the same
constexpr int kGroupRows = 2 * kTileRows;  // rows whose softmax is taken at once, so that its latencies overlap

struct Numbers {  // products of f32
  typedef float Scalar;
  typedef Floats Vector;
  static SAGE_INLINE Floats add(Floats sum, float a, Floats b) { return fma(broadcast(a), b, sum); }
};

struct QueriesAndKeys {  // products of codes: keys are offset
  typedef int32_t Scalar;
  typedef Ints Vector;
  static SAGE_INLINE Ints add(Ints sum, int32_t a, Ints b) { return dot(sum, b, broadcast(a)); }
};

struct ProbabilitiesAndValues {  // products of codes: probabilities are positive
  typedef int32_t Scalar;
  typedef Ints Vector;
  static SAGE_INLINE Ints add(Ints sum, int32_t a, Ints b) { return dot(sum, broadcast(a), b); }
};

// sums[r][v] += a[r][k] * b[k][v] over k < depth; steps of b and rows of a are strided in elements.
template <class Product, int kF16Sums, int kRows, int kVectors>
SAGE_INLINE void multiply(const typename Product::Scalar* a, int64_t a_stride, const typename Product::Scalar* b,
                          int64_t b_stride, int depth, typename Product::Vector (&sums)[kRows][kVectors]) {
  typedef typename Product::Vector Vector;
  for (int begin = 0; begin < depth;) {
    const int end = kF16Sums && begin + kF16Sums < depth ? begin + kF16Sums : depth;
    for (int k = begin; k < end; ++k) {
      Vector columns[kVectors];
      for (int v = 0; v < kVectors; ++v) columns[v] = load<Vector>(b + k * b_stride + v * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const auto x = load<typename Product::Scalar>(a + r * a_stride + k);
        for (int v = 0; v < kVectors; ++v) sums[r][v] = Product::add(sums[r][v], x, columns[v]);
      }
    }
    if constexpr (kF16Sums != 0) {
      for (int r = 0; r < kRows; ++r) {
        for (int v = 0; v < kVectors; ++v) sums[r][v] = round_to_f16(sums[r][v]);
      }
    }
    begin = end;
  }
}

// ---- one tile of queries ----------------------------------------------------------------------------------

// What all kernels share is compiled once.
class QueryTile {
 protected:
  QueryTile(const Attention& a, int64_t task, int worker, bool integer_scores, float log2_range);

  template <bool kIntegerScores>
  using Scores = std::conditional_t<kIntegerScores, QueriesAndKeys, Numbers>;

  template <bool kIntegerScores>
  void load_queries();
  void load_query_means();
  float missing_from_scores(int row) const;
  void correct(int64_t tile);
  template <bool kIntegerScores, int kRows>
  void score(int64_t tile, int row, int from, int keys, float (*scores)[kKeyTile]);
  void score_bad_keys(int64_t tile, int row, int rows, float (*scores)[kKeyTile]);
  void change_scores(int64_t tile, int row, int rows, float (*scores)[kKeyTile]);
  template <int kRows>
  void score_exactly(int64_t tile, int row, int from, int keys, float (*scores)[kKeyTile]);
  template <class Recipe, int kRows>
  void soften(int64_t tile, int row, float (*scores)[kKeyTile], float* decay, float* gain, float unit);
  template <class Product, int kF16Sums, bool kGains, int kStep, int kRows>
  void add_values(int row, const float (*scores)[kKeyTile], const void* values, int depth, const float* decay,
                  const float* gain);
  template <class Product, int kF16Sums, bool kGains, int kRows, int kVectors>
  void accumulate(const typename Product::Scalar* probabilities, const typename Product::Scalar* values, int depth,
                  const float* decay, const float* gain, float* out);
  void load_exact_query(int row, float* to) const;
  void load_tile_shifts(int64_t tile);
  void score_first_key(int row, int rows, float (*scores)[kKeyTile]) const;
  void set_first_key_apart(int row, int rows, float (*scores)[kKeyTile]);
  bool sees_any(int row) const;
  void finish(int row, float unit);

  // The keys [first, last) of a tile that a row reaches.
  int first(int row, int64_t tile) const { return within_tile(reach_[row].first, tile); }
  int last(int row, int64_t tile) const { return within_tile(reach_[row].last, tile); }
  static int within_tile(int64_t key, int64_t tile) {
    return int(smaller(kKeyTile, key > tile * kKeyTile ? key - tile * kKeyTile : 0));
  }
  int64_t first_tile() const { return reach_[0].first / kKeyTile; }
  int64_t end_tile() const { return ceil_div(reach_[rows_ - 1].last, kKeyTile); }

  const Attention& a_;
  const int64_t b_, h_, kv_h_, kv_head_, begin_;
  const int rows_, channels_, code_channels_, depth_, v_channels_, v_stride_;
  const float factor_;      // of scores: the softmax scale, in base 2
  float log2_range_;        // of probability 1
  float slope_ = 0.0f;      // of ALiBi
  bool any_bad_values_;     // in the tiles of values of this head
  int64_t first_mean_ = 0;  // of the rows of q_mean that this tile needs
  // In the scratch of the worker:
  float* queries_;                  // [rows, depth]: numbers, or words of codes
  float* out_;                      // [rows, v_stride]: sums of values
  float* sums_;                     // [rows, kLanes]: of probabilities
  float* means_;                    // [rows, channels]
  float* corrections_;              // [rows, kKeyTile]: means . keys
  float* exact_queries_;            // [rows, channels], with their factor, where they are kept
  float top_[kQueryTile];           // the largest score so far
  float row_factor_[kQueryTile];    // of integer scores
  int32_t row_offset_[kQueryTile];  // takes off what kCodeOffset adds to a row's products
  float shift_[kQueryTile];         // soft caps: what scores lack, as keys were smoothed
  float tile_shift_[kQueryTile];    // what the mean of a tile of keys adds to its scores
  float first_score_[kQueryTile];   // of a first key that is apart from the others
  Reach reach_[kQueryTile];
  alignas(64) float k_mean_[kRowFloats], v_scales_[kRowFloats], v_mean_[kRowFloats];
  alignas(64) float first_key_[kRowFloats], first_value_[kRowFloats];  // less the mean; finite values
};

// What a kernel has of its own.
template <class Recipe>
class RecipeTile : QueryTile {
 public:
  RecipeTile(const Attention& a, int64_t task, int worker)
      : QueryTile(a, task, worker, Recipe::kIntegerScores,
                  Recipe::kProbabilities == Rounding::kE4M3 ? log2f(a.p_range)
                  : Recipe::kTilePeaks                      ? log2f(kUint8Range)
                                                            : 0.0f) {}
  void run();

 private:
  using Sums = std::conditional_t<Recipe::kIntegerValues, ProbabilitiesAndValues, Numbers>;

  template <int kRows>
  void attend(int64_t tile, int row);
};

size_t scratch_bytes(const Attention& a) {
  const int64_t queries = a.q.channels() * (a.keeps_queries() ? 2 : 1);
  const int64_t floats = queries + a.padded_v_dim() + kLanes + a.q.channels() + kKeyTile;
  return size_t(round_up(kQueryTile * floats * 4, 64));
}

inline QueryTile::QueryTile(const Attention& a, int64_t task, int worker, bool integer_scores, float log2_range)
    : a_(a),
      b_(task / a.query_tiles() / a.q.heads()),
      h_(task / a.query_tiles() % a.q.heads()),
      kv_h_(h_ / (a.q.heads() / a.k.heads())),
      kv_head_(b_ * a.k.heads() + kv_h_),
      begin_((a.query_tiles() - 1 - task % a.query_tiles()) * kQueryTile),  // causal: the longest first
      rows_(int(smaller(kQueryTile, a.q.tokens() - begin_))),
      channels_(int(a.q.channels())),
      code_channels_(a.rotated ? rotated_channels(channels_) : channels_),
      depth_(integer_scores ? words_of(code_channels_) : channels_),
      v_channels_(int(a.v.channels())),
      v_stride_(int(a.padded_v_dim())),
      factor_(a.scale * kLog2e),
      log2_range_(log2_range) {
  float* scratch = reinterpret_cast<float*>(a.scratch + worker * a.scratch_bytes);
  out_ = scratch;
  sums_ = out_ + kQueryTile * v_stride_;
  corrections_ = sums_ + kQueryTile * kLanes;
  means_ = corrections_ + kQueryTile * kKeyTile;
  queries_ = means_ + kQueryTile * channels_;
  exact_queries_ = means_ + 2 * kQueryTile * channels_;

  if (a.k_mean) load_row(a.k_mean, b_, kv_h_, 0, 0, channels_, k_mean_);
  for (int c = 0; c < kRowFloats; ++c) v_scales_[c] = 1.0f, v_mean_[c] = 0.0f;
  if (a.v_scales) load_row(a.v_scales, b_, kv_h_, 0, 0, v_channels_, v_scales_);
  if (a.v_mean) load_row(a.v_mean, b_, kv_h_, 0, 0, v_channels_, v_mean_);
  for (int c = 0; c < kRowFloats; ++c) first_value_[c] = 0.0f;
  if (a.first_token) {
    load_row(a.k, b_, kv_h_, 0, 0, channels_, first_key_);
    load_row(a.v, b_, kv_h_, 0, 0, v_channels_, first_value_);
    for (int c = 0; c < channels_ && a.k_mean && !a.many_k_means; ++c) first_key_[c] -= k_mean_[c];
    for (int c = 0; c < v_channels_; ++c) first_value_[c] = is_finite(first_value_[c]) ? first_value_[c] : 0.0f;
  }
  memset(out_, 0, sizeof(float) * kQueryTile * v_stride_);
  memset(sums_, 0, sizeof(float) * kQueryTile * kLanes);
  for (int row = 0; row < rows_; ++row) {
    top_[row] = -kInfinity;
    tile_shift_[row] = 0.0f;
    first_score_[row] = -kInfinity;
    reach_[row] = reach_of(a, begin_ + row);
  }
  if (a.masking.alibi) slope_ = *at<float>(a.masking.alibi, b_, h_, 0);
  any_bad_values_ = false;
  for (int64_t tile = first_tile(); tile < end_tile(); ++tile) {
    any_bad_values_ |= a.bad_values[kv_head_ * a.tiles() + tile] != 0;
    if (!integer_scores) {  // values near the end of f32: sums of them must not overflow
      if (a.value_peaks[kv_head_ * a.tiles() + tile] >= 0x1p64f) log2_range_ = -40.0f;
    }
  }
}

template <class Recipe>
void RecipeTile<Recipe>::run() {
  load_queries<Recipe::kIntegerScores>();
  if (a_.q_mean) load_query_means();
  for (int64_t tile = first_tile(); tile < end_tile(); ++tile) {
    if (a_.q_mean) correct(tile);
    if (a_.many_k_means) load_tile_shifts(tile);
    int row = 0;
    for (; row + kGroupRows <= rows_; row += kGroupRows) attend<kGroupRows>(tile, row);
    for (; row + kTileRows <= rows_; row += kTileRows) attend<kTileRows>(tile, row);
    for (; row < rows_; ++row) attend<1>(tile, row);
  }
  for (int row = 0; row < rows_; ++row) finish(row, Recipe::kUnit);
}

template <bool kIntegerScores>
void QueryTile::load_queries() {
  for (int row = 0; row < rows_; ++row) {
    const int64_t n = begin_ + row;
    if constexpr (kIntegerScores) {
      Code* codes = reinterpret_cast<Code*>(queries_ + row * depth_);
      const bool good = load_words(a_.q_codes, b_, h_, n, code_channels_, 0, codes);
      const float scale = *at<float>(a_.q_scales, b_, h_, group_of(a_.q_grouping, n, a_.q_group_rows));
      const float factor = good ? factor_ : float_of(0x7fc00000u);
      row_factor_[row] = scale * factor * (a_.rotated ? float(code_channels_) : 1.0f);
      if (a_.keeps_queries()) {
        alignas(64) float values[kRowFloats];
        load_exact_query(row, values);
        for (int c = 0; c < channels_; ++c) exact_queries_[row * channels_ + c] = values[c] * factor;
      }
      int32_t sum = 0;
      for (int c = 0; c < depth_ * kCodesPerWord; ++c) sum += codes[c];
      row_offset_[row] = -kCodeOffset * sum;
    } else {
      alignas(64) float values[kRowFloats];
      load_row(a_.q, b_, h_, n, 0, channels_, values);
      if (a_.masking.softcap != 0.0f) {  // which would make a number of infinity
        bool finite = true;
        for (int c = 0; c < channels_; ++c) finite &= is_finite(values[c]);
        if (!finite) values[0] = float_of(0x7fc00000u);
      }
      for (int c = 0; c < channels_; c += kLanes) store(values + c, load<Floats>(values + c) * factor_);
      memcpy(queries_ + row * depth_, values, sizeof(float) * channels_);
    }
    shift_[row] =
        a_.masking.softcap != 0.0f && a_.k_mean && !a_.many_k_means ? missing_from_scores(row) * kLog2e : 0.0f;
  }
}

// The product of the query and the mean of the keys.
inline float QueryTile::missing_from_scores(int row) const {
  alignas(64) float query[kRowFloats];
  load_exact_query(row, query);
  Floats products = {};
  for (int c = 0; c < channels_; c += kLanes) {
    products = fma(load<Floats>(query + c), load<Floats>(k_mean_ + c), products);
  }
  return a_.scale * total(products);
}

inline void QueryTile::load_query_means() {
  first_mean_ = mean_row(a_.q_mean, begin_, a_.q_mean_rows);
  const int64_t last = mean_row(a_.q_mean, begin_ + rows_ - 1, a_.q_mean_rows);
  alignas(64) float values[kRowFloats];
  for (int64_t row = first_mean_; row <= last; ++row) {
    load_row(a_.q_mean, b_, h_, row, 0, channels_, values);
    for (int c = 0; c < channels_; ++c) means_[(row - first_mean_) * channels_ + c] = values[c] * factor_;
  }
}

// What the scores of smoothed queries lack.
inline void QueryTile::correct(int64_t tile) {
  const float* keys = a_.exact_keys + (kv_head_ * a_.tiles() + tile) * channels_ * kKeyTile;
  const int rows = int(mean_row(a_.q_mean, begin_ + rows_ - 1, a_.q_mean_rows) - first_mean_) + 1;
  for (int row = 0; row < rows; ++row) {
    for (int column = 0; column < kKeyTile; column += kTileVectors * kLanes) {
      Floats sums[1][kTileVectors] = {};
      multiply<Numbers, 0>(means_ + row * channels_, 0, keys + column, kKeyTile, channels_, sums);
      for (int v = 0; v < kTileVectors; ++v) store(corrections_ + row * kKeyTile + column + v * kLanes, sums[0][v]);
    }
  }
}

// What the mean of a tile's keys adds to its scores.
inline void QueryTile::load_tile_shifts(int64_t tile) {
  alignas(64) float mean[kRowFloats];
  load_row(a_.k_mean, b_, kv_h_, mean_row(a_.k_mean, tile * kKeyTile, a_.k_mean_rows), 0, channels_, mean);
  for (int row = 0; row < rows_; ++row) {
    float sum = 0.0f;
    for (int c = 0; c < channels_; ++c) sum += exact_queries_[row * channels_ + c] * mean[c];
    tile_shift_[row] = sum;
  }
}

// kRows rows and one tile of keys.
template <class Recipe>
template <int kRows>
void RecipeTile<Recipe>::attend(int64_t tile, int row) {
  const int from = first(row, tile), keys = last(row + kRows - 1, tile);
  if (from >= keys) return;
  uint8_t cover = kOpen;
  if (a_.masking.mask) {
    const Covers covers = covers_of(a_, b_, h_, begin_ + row, tile);
    cover = kOpen | kClosed;
    for (int r = 0; r < kRows; ++r) cover &= covers.first[r * covers.stride];
    if (cover & kClosed) return;
  }
  alignas(64) float scores[kRows][kKeyTile];  // in base 2, then probabilities as the operand of P.V
  alignas(64) float decay[(kRows + kLanes - 1) / kLanes * kLanes] = {};
  alignas(64) float gain[(kRows + kLanes - 1) / kLanes * kLanes] = {};
  constexpr int kStep = kRows < kTileRows ? kRows : kTileRows;
  const int64_t index = kv_head_ * a_.tiles() + tile;
  const bool exact = a_.band && in_band(begin_ / kQueryTile, tile, a_.masking.offset);
  for (int r = 0; r < kRows; r += kStep) {
    if (Recipe::kIntegerScores && exact) {
      score_exactly<kStep>(tile, row + r, from, keys, scores + r);
    } else {
      score<Recipe::kIntegerScores, kStep>(tile, row + r, from, keys, scores + r);
    }
  }
  const uint64_t bad = Recipe::kIntegerScores ? a_.bad_keys[index] : 0;
  const bool first_apart = a_.first_token && tile == 0;
  if (first_apart) score_first_key(row, kRows, scores);
  if (bad) score_bad_keys(tile, row, kRows, scores);
  const Masking& masking = a_.masking;
  if (masking.softcap != 0.0f || masking.alibi) change_scores(tile, row, kRows, scores);
  if (!(cover & kOpen)) {
    for (int r = 0; r < kRows; ++r) {
      add_mask(masking.mask, b_, h_, begin_ + row + r, tile * kKeyTile, scores[r]);
    }
  }
  if (first_apart) set_first_key_apart(row, kRows, scores);
  if (Recipe::kIntegerScores && exact) {
    soften<ExactTile, kRows>(tile, row, scores, decay, gain, Recipe::kUnit);
    const float* values = a_.exact_values + index * kKeyTile * v_stride_;
    add_values<Numbers, 0, Recipe::kTilePeaks, kStep, kRows>(row, scores, values, keys, decay, gain);
  } else {
    soften<Recipe, kRows>(tile, row, scores, decay, gain, Recipe::kUnit);
    const char* values = a_.value_tiles + index * a_.value_tile_bytes;
    const int depth = Recipe::kIntegerValues ? words_of(keys) : keys;
    add_values<Sums, Recipe::kF16Sums, Recipe::kTilePeaks, kStep, kRows>(row, scores, values, depth, decay, gain);
  }
}

// out = out * decay + P.V * gain for kRows rows, kStep at a time.
template <class Product, int kF16Sums, bool kGains, int kStep, int kRows>
void QueryTile::add_values(int row, const float (*scores)[kKeyTile], const void* values, int depth, const float* decay,
                           const float* gain) {
  typedef typename Product::Scalar Scalar;
  const Scalar* probabilities = reinterpret_cast<const Scalar*>(scores);
  const Scalar* columns = static_cast<const Scalar*>(values);
  for (int r = 0; r < kRows; r += kStep) {
    const Scalar* p = probabilities + r * kKeyTile;
    float* out = out_ + (row + r) * v_stride_;
    int column = 0;
    for (; column + kTileVectors * kLanes <= v_stride_; column += kTileVectors * kLanes) {
      accumulate<Product, kF16Sums, kGains, kStep, kTileVectors>(p, columns + column, depth, decay + r, gain + r,
                                                                 out + column);
    }
    for (; column < v_stride_; column += kLanes) {
      accumulate<Product, kF16Sums, kGains, kStep, 1>(p, columns + column, depth, decay + r, gain + r, out + column);
    }
  }
}

// Scores from the numbers themselves.
template <int kRows>
void QueryTile::score_exactly(int64_t tile, int row, int from, int keys, float (*scores)[kKeyTile]) {
  const float* packed = a_.exact_keys + (kv_head_ * a_.tiles() + tile) * channels_ * kKeyTile;
  constexpr int kColumns = kTileVectors * kLanes;
  for (int column = from / kColumns * kColumns; column < keys; column += kColumns) {
    Floats sums[kRows][kTileVectors] = {};
    multiply<Numbers, 0>(exact_queries_ + row * channels_, channels_, packed + column, kKeyTile, channels_, sums);
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kTileVectors; ++v) store(scores[r] + column + v * kLanes, sums[r][v] + tile_shift_[row + r]);
    }
  }
}

template <bool kIntegerScores, int kRows>
void QueryTile::score(int64_t tile, int row, int from, int keys, float (*scores)[kKeyTile]) {
  const int64_t index = kv_head_ * a_.tiles() + tile;
  using Product = Scores<kIntegerScores>;
  using Operand = typename Product::Scalar;
  const Operand* packed = reinterpret_cast<const Operand*>(a_.key_tiles + index * a_.key_tile_bytes);
  const Operand* queries = reinterpret_cast<const Operand*>(queries_) + row * depth_;
  constexpr int kColumns = kTileVectors * kLanes;
  for (int column = from / kColumns * kColumns; column < keys; column += kColumns) {
    typename Product::Vector sums[kRows][kTileVectors] = {};
    if constexpr (kIntegerScores && kCodeOffset != 0) {
      for (int r = 0; r < kRows; ++r) {
        for (int v = 0; v < kTileVectors; ++v) sums[r][v] = broadcast(row_offset_[row + r]);
      }
    }
    multiply<Product, 0>(queries, depth_, packed + column, kKeyTile, depth_, sums);
    for (int v = 0; v < kTileVectors; ++v) {
      const int key = column + v * kLanes;
      for (int r = 0; r < kRows; ++r) {
        if constexpr (kIntegerScores) {
          const Floats scale = load<Floats>(a_.key_scales + index * kKeyTile + key);
          const Floats products = __builtin_convertvector(sums[r][v], Floats) * scale;
          Floats correction = broadcast(tile_shift_[row + r]);
          if (a_.q_mean) {
            const int64_t mean = mean_row(a_.q_mean, begin_ + row + r, a_.q_mean_rows) - first_mean_;
            correction += load<Floats>(corrections_ + mean * kKeyTile + key);
          }
          store(scores[r] + key, fma(products, broadcast(row_factor_[row + r]), correction));
        } else {
          store(scores[r] + key, sums[r][v]);
        }
      }
    }
  }
}

// The score of the first key, from the numbers themselves.
inline void QueryTile::score_first_key(int row, int rows, float (*scores)[kKeyTile]) const {
  for (int r = 0; r < rows; ++r) {
    const float* query = exact_queries_ + (row + r) * channels_;
    float sum = 0.0f;
    for (int c = 0; c < channels_; ++c) sum += query[c] * first_key_[c];
    scores[r][0] = sum;
  }
}

// Takes the first key from the others: it is added to what they give at the end.
inline void QueryTile::set_first_key_apart(int row, int rows, float (*scores)[kKeyTile]) {
  for (int r = 0; r < rows; ++r) {
    if (first(row + r, 0) == 0 && last(row + r, 0) > 0) first_score_[row + r] = scores[r][0];
    scores[r][0] = -kInfinity;
  }
}

// Keys whose codes hold no number: infinite or NaN scores, from the products of what is not finite.
inline void QueryTile::score_bad_keys(int64_t tile, int row, int rows, float (*scores)[kKeyTile]) {
  const uint64_t bad = a_.bad_keys[kv_head_ * a_.tiles() + tile];
  alignas(64) float query[kRowFloats];
  for (int r = 0; r < rows; ++r) {
    load_exact_query(row + r, query);
    for (int key = first(row + r, tile); key < last(row + r, tile); ++key) {
      if (!(bad >> key & 1)) continue;
      float score = 0.0f;
      for (int c = 0; c < channels_; ++c) {
        const float x = element(a_.k, b_, kv_h_, tile * kKeyTile + key, c);
        if (!is_finite(x)) score += query[c] * x;
      }
      scores[r][key] = score;
    }
  }
}

inline void QueryTile::change_scores(int64_t tile, int row, int rows, float (*scores)[kKeyTile]) {
  const Masking& masking = a_.masking;
  for (int r = 0; r < rows; ++r) {
    if (masking.softcap != 0.0f) cap_scores(masking.softcap, shift_[row + r], scores[r]);
    const int64_t position = begin_ + row + r + masking.offset - tile * kKeyTile;
    if (masking.alibi) add_distances(slope_, float(position), scores[r]);
  }
}

// Scores to probabilities, relative to the largest so far; decay is what that makes of the sums before. With tile
// peaks, relative to the largest of this tile, and gain is what the largest so far makes of its sums. `unit`: of exact
// ones.
template <class Recipe, int kRows>
void QueryTile::soften(int64_t tile, int row, float (*scores)[kKeyTile], float* decay, float* gain,
                       [[maybe_unused]] float unit) {
  constexpr int kVectors = kKeyTile / kLanes;
  constexpr bool kTilePeaks = Recipe::kTilePeaks;
  const Ints lanes = lane_numbers();
  float base[kRows];
  for (int r = 0; r < kRows; ++r) {
    const int from = first(row + r, tile), to = last(row + r, tile);
    Floats top = broadcast(kTilePeaks ? -kInfinity : top_[row + r]);
    if (from > 0 || to < kKeyTile) {
      for (int v = 0; v < kVectors; ++v) {
        const Floats x = load<Floats>(scores[r] + v * kLanes);
        const Ints key = lanes + v * kLanes;
        store(scores[r] + v * kLanes, (key >= from) & (key < to) ? x : broadcast(-kInfinity));
      }
    }
    for (int v = 0; v < kVectors; ++v) top = max(top, load<Floats>(scores[r] + v * kLanes));
    const float peak = largest(top);
    const float new_top = kTilePeaks && top_[row + r] > peak ? top_[row + r] : peak;
    const float zero = new_top == -kInfinity ? 0.0f : new_top;  // rows of scores that are all -inf
    base[r] = (kTilePeaks && peak > -kInfinity ? peak : zero) - log2_range_;
    decay[r] = top_[row + r] - zero;
    gain[r] = kTilePeaks ? peak - zero : 0.0f;
    top_[row + r] = new_top;
  }
  for (int r = 0; r < kRows; r += kLanes) store(decay + r, exp2(load<Floats>(decay + r)));
  if (kTilePeaks || Recipe::kIsExact) {
    for (int r = 0; r < kRows; r += kLanes) store(gain + r, exp2(load<Floats>(gain + r)));
  }

  for (int r = 0; r < kRows; ++r) {
    Floats sum = load<Floats>(sums_ + (row + r) * kLanes) * decay[r];
    for (int v = 0; v < kVectors; ++v) {
      const Floats x = load<Floats>(scores[r] + v * kLanes) - base[r];
      const Floats p = Recipe::kFastExponential ? fast_exp2(x) : exp2(x);
      if constexpr (kTilePeaks) {  // the sum is that of the codes, and NaN stays
        sum += ((p + 0x1.8p23f) - 0x1.8p23f) * gain[r];
      } else {
        sum += p;
      }
      if constexpr (Recipe::kIsExact) {
        store(scores[r] + v * kLanes, p * unit);
      } else if constexpr (Recipe::kIntegerValues) {
        const Ints code = (Ints)(p * Recipe::kUnit + 0x1.8p23f) & 0xff;
        typedef Code Codes __attribute__((vector_size(sizeof(Code) * kLanes)));
        store(reinterpret_cast<Code*>(scores[r]) + v * kLanes, __builtin_convertvector(code, Codes));
      } else if constexpr (Recipe::kProbabilities == Rounding::kF16) {
        store(scores[r] + v * kLanes, round_to_f16(p));
      } else if constexpr (Recipe::kProbabilities == Rounding::kE4M3 && !Recipe::kFastExponential) {
        store(scores[r] + v * kLanes, round_to_e4m3(p));
      } else {
        store(scores[r] + v * kLanes, p);
      }
    }
    store(sums_ + (row + r) * kLanes, sum);
  }
}

template <class Product, int kF16Sums, bool kGains, int kRows, int kVectors>
void QueryTile::accumulate(const typename Product::Scalar* probabilities, const typename Product::Scalar* values,
                           int depth, const float* decay, const float* gain, float* out) {
  typename Product::Vector sums[kRows][kVectors] = {};
  multiply<Product, kF16Sums>(probabilities, kKeyTile, values, v_stride_, depth, sums);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      Floats sum;
      if constexpr (std::is_same_v<Product, ProbabilitiesAndValues>) {
        sum = __builtin_convertvector(sums[r][v], Floats);
      } else {
        sum = sums[r][v];
      }
      if constexpr (kGains) sum *= gain[r];
      float* to = out + r * v_stride_ + v * kLanes;
      store(to, fma(load<Floats>(to), broadcast(decay[r]), sum));
    }
  }
}

// The query before it was smoothed and quantized, or what its codes stand for.
inline void QueryTile::load_exact_query(int row, float* to) const {
  const int64_t n = begin_ + row;
  if (a_.q.data != a_.q_codes.data) return load_row(a_.q, b_, h_, n, 0, channels_, to);
  load_code_values(a_.q, b_, h_, n, 0, channels_, to);
  const float scale = *at<float>(a_.q_scales, b_, h_, group_of(a_.q_grouping, n, a_.q_group_rows));
  alignas(64) float mean[kRowFloats] = {};
  if (a_.q_mean) load_row(a_.q_mean, b_, h_, mean_row(a_.q_mean, n, a_.q_mean_rows), 0, channels_, mean);
  for (int c = 0; c < channels_; ++c) to[c] = to[c] * scale + mean[c];
}

// Whether any key that the row reaches is open.
inline bool QueryTile::sees_any(int row) const {
  const View& mask = a_.masking.mask;
  const Reach& reach = reach_[row];
  if (!mask) return reach.first < reach.last;
  for (int64_t tile = reach.first / kKeyTile; tile * kKeyTile < reach.last; ++tile) {
    if (*covers_of(a_, b_, h_, begin_ + row, tile).first & kClosed) continue;
    for (int key = first(row, tile); key < last(row, tile); ++key) {
      if (!closes(mask, b_, h_, begin_ + row, tile * kKeyTile + key)) return true;
    }
  }
  return false;
}

// Output and lse of one row.
inline void QueryTile::finish(int row, float unit) {
  const int64_t n = begin_ + row;
  const View &mask = a_.masking.mask, &sinks = a_.masking.sinks;
  const float sink = sinks ? *at<float>(sinks, 0, h_, 0) : -kInfinity;
  alignas(64) float values[kRowFloats];
  float lse = sink;
  if (!sees_any(row)) {
    memset(values, 0, sizeof(float) * v_channels_);
  } else {
    const bool lacks = a_.k_mean && !a_.many_k_means && a_.masking.softcap == 0.0f && (a_.lse || sinks);
    const float missing = lacks ? missing_from_scores(row) : 0.0f;
    float top = top_[row], sum = total(load<Floats>(sums_ + row * kLanes)), keep = 1.0f, share = 1.0f;
    float first_share = 0.0f;
    if (sinks || a_.first_token) {
      const float logit = (sink - missing) * kLog2e, first = first_score_[row];
      top = logit > top ? logit : top;
      top = first > top ? first : top;
      keep = exp2f(top_[row] - top);
      const float of_keys = sum * keep, of_first = exp2f(first - top + log2_range_);
      sum = of_keys + of_first + exp2f(logit - top + log2_range_);
      share = of_keys / sum;
      first_share = of_first / sum;
    }
    // Errors of quantization must not take a mean of values past what they can be.
    const float largest = largest_finite(a_.v_mean ? DType::kF32 : a_.v.dtype);
    const float inverse = keep / unit / sum;
    for (int c = 0; c < v_channels_; c += kLanes) {
      const Floats mean_of_codes = load<Floats>(out_ + row * v_stride_ + c) * inverse;
      const Floats of_first = load<Floats>(first_value_ + c) * first_share;
      const Floats mean = fma(mean_of_codes, load<Floats>(v_scales_ + c), of_first + load<Floats>(v_mean_ + c) * share);
      const Floats not_above = mean > largest ? broadcast(largest) : mean;  // NaN stays
      store(values + c, not_above < -largest ? broadcast(-largest) : not_above);
    }
    for (int64_t tile = first_tile(); any_bad_values_ && tile < end_tile(); ++tile) {
      const uint64_t bad = a_.bad_values[kv_head_ * a_.tiles() + tile];
      for (int key = first(row, tile); bad && key < last(row, tile); ++key) {
        if (!(bad >> key & 1) || (mask && closes(mask, b_, h_, n, tile * kKeyTile + key))) continue;
        for (int c = 0; c < v_channels_; ++c) {
          const float x = element(a_.v, b_, kv_h_, tile * kKeyTile + key, c);
          if (!is_finite(x)) values[c] += x;
        }
      }
    }
    lse = (top + log2f(sum) - log2_range_) * kLn2 + missing;
  }
  store_row(a_.o, b_, h_, n, 0, v_channels_, values);
  if (a_.lse) *at<float>(a_.lse, b_, h_, n) = lse;
}

template <class Recipe>
void attend_with(const Attention& a, int64_t task, int worker) {
  RecipeTile<Recipe>(a, task, worker).run();
}

void attend(const Attention& a, int64_t task, int worker) {
  switch (a.kernel) {
    case Kernel::kAuto:
    case Kernel::kFlash: return attend_with<Flash>(a, task, worker);
    case Kernel::kSage1:
      return a.f16_accumulator ? attend_with<Sage1F16>(a, task, worker) : attend_with<Sage1>(a, task, worker);
    case Kernel::kSage1Int8: return attend_with<Sage1Int8>(a, task, worker);
    case Kernel::kSage2:
      return a.fast_exponential ? attend_with<Sage2Fast>(a, task, worker) : attend_with<Sage2>(a, task, worker);
    case Kernel::kSage2Int4: return attend_with<Sage2>(a, task, worker);
    case Kernel::kSage2PP: return attend_with<Sage2PP>(a, task, worker);
    case Kernel::kSageInt8: return attend_with<SageInt8>(a, task, worker);
  }
}

}  // namespace sage::cpu::SAGE_ISA
