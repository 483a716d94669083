// sage2 on sm_90a: S = Q K^T in INT8, O = P V in FP8, by warpgroup products.
//
// A block stays on its multiprocessor and works through items of kBlockM query rows. One producer thread fills rings
// of K and V tiles by bulk copies; two warpgroups of 64 rows each take the keys from right to left, and issue the
// scores of a tile before the values of the tile to its right, so that exponentials overlap products. Fragments:
// lane l holds rows g and g + 8 (g = l / 4) and columns 8n + 2c, + 1 (c = l % 4).
//
// V has a column of ones: its products are the row sums of P as the tensor core sees it, and leave that accumulator
// after every tile, because FP8 products are summed with about 13 bits, truncated. O stays as long as it hovers about
// zero, where truncation has no direction; where it drifts further than noise explains, it is added to an f32 total.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <type_traits>

#include "../ptx/barrier.cuh"
#include "../ptx/fragment.cuh"
#include "../ptx/memory.cuh"
#include "../ptx/reciprocal.cuh"
#include "../ptx/wgmma.cuh"
#include "half_sums.cuh"
#include "launch.cuh"
#include "sage2.h"
#include "slot.cuh"
#include "tile_mask.cuh"

namespace sage::cuda::sm90::sage2 {

// Division of numbers below 2^31 by one that is known before the launch.
struct Divisor {
  uint32_t divisor = 1, magic = 0x80000000u, shift = 0;

  Divisor() = default;
  explicit Divisor(uint32_t d) : divisor(d) {
    while (uint64_t{1} << shift < d) shift++;
    magic = static_cast<uint32_t>(((uint64_t{1} << (31 + shift)) + d - 1) / d);
  }
  __device__ __forceinline__ uint32_t quotient(uint32_t n) const { return __umulhi(2 * n, magic) >> shift; }
};

struct Sage2Params {
  Sage2Packed packed;
  char* o;
  float* lse;
  bool adds_lse;  // to what lse holds
  int64_t o_stride[4], lse_stride[3];
  DType out_dtype;
  bool vectors;  // rows of o take 16-byte stores
  int q_tokens, k_tokens, v_dim;
  Divisor q_heads, group;  // group: query heads that share one KV head
  int kv_heads, tiles;     // tiles of one head
  Divisor q_blocks;        // of one head
  uint32_t items, planes;
  // Causal: runs of planes whose K and V stay in the cache together; the last run may be shorter.
  Divisor run_planes, run_items, last_run_planes;
  int low, high;                   // query i sees keys i + low to i + high
  bool begins;                     // low may be above the first key
  bool longest_first, whole_mean;  // whole_mean: V's first tile is less its mean too
  float largest;                   // that V can hold
  WholeMask whole_mask;            // where two kernels are launched of which one runs
  TileMask mask;                   // where C::kBoolMask
};

Sage2Params make_params(const Sage2Op& op);

// kSmooth: queries are less the mean of their block, and what that takes from the scores of a key, one number for the
// whole block, comes with the key. kSums: the row sums of P before it is rounded are wanted, for the log-sum-exp.
// kBand: there is room for tiles of 16 bits (band_attention.cuh). kHalfSums: products with V are summed in FP16.
// kBoolMask: a mask closes tiles, which are skipped, and hides keys of some others.
template <int kHeadDim_, bool kFast_, bool kSmooth_ = false, bool kSums_ = false, bool kBand_ = false,
          bool kHalfSums_ = false, bool kBoolMask_ = false>
struct Sage2Config {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kFast = kFast_, kSmooth = kSmooth_, kSums = kSums_, kBand = kBand_, kHalfSums = kHalfSums_;
  static constexpr bool kBoolMask = kBoolMask_;
  static_assert(!kFast || !kSums, "fast exponentials are codes from the start");
  static_assert(!kBoolMask || !(kSmooth || kBand), "a mask goes with nothing that comes with tiles");
  // Scores leave the tensor core as floats, and what smoothing took is rounded to their unit: a trifle beside what
  // codes cost the scores, but more than an exact log-sum-exp may be off.
  static constexpr bool kCentred = kSmooth && kHeadDim < 256 && !kSums;
  static_assert(!kFast || !kSmooth || kCentred, "fast exponentials are of integer scores");
  static constexpr Sage2Tiles kTiles = sage2_tiles(kHeadDim, kFast, kBand);
  static constexpr int kBlockN = kTiles.block_n, kVWidth = kTiles.v_width;
  static constexpr int kStages = kHeadDim == 256 ? 2 : 3;
  static constexpr int kQueryBuffers = kHeadDim == 256 || kBand ? 1 : 2;
  // The kept maximum moves only when a score exceeds it by this much (base 2). Room above costs range below.
  static constexpr float kHeadroom = kFast ? 4.0f : kHalfSums ? 1.0f : 2.0f;
  // P is scaled by 2^kOffset: at most kLargestWeight; a maximum's P is 7 times a power of two, exactly.
  static constexpr float kLargestWeight = kHalfSums ? kHalfWeightRange : kE4m3Range;
  static constexpr float kOffset = (kHalfSums ? 6.807355f : 8.807355f) - kHeadroom;
  // How often O is tested for drift.
  static constexpr int kTestTiles = 1024 / kBlockN;
  // Warpgroups take turns at issuing products.
  static constexpr bool kTurns = kHeadDim >= 128 || kBoolMask;
  // Exponentials are taken against the kept maximum at once, and again in the rare case that it was too small.
  static constexpr bool kOptimistic = kFast && kHeadDim < 256;
  // So many words of exact exponentials are taken against it beside the search for a larger one.
  static constexpr int kTriedWords = kHeadDim == 256 && !kHalfSums ? 0 : 4;
  // Exponentials of a word wait for one so many words before.
  static constexpr int kLag = kHeadDim == 64 && !kFast && !kHalfSums && !kSmooth && !kBoolMask ? 8 : 2;
  // Misfits (see below) share what they can with others.
  static constexpr bool kFewRegisters = kBlockN == 256;
  // There are registers for what a mask says of a tile while its scores are on their way.
  static constexpr bool kHoldsSeen = kBoolMask && kHeadDim == 128;
  // Of a thread that multiplies; 24 + 2 * 240 is what three warpgroups of 168 have. Where fewer suffice, what the
  // compiler makes of them has been measured to be 2 % faster.
  static constexpr int kRegisters = kHeadDim == 128 && (kBoolMask || (kFast && !kSmooth && !kBand)) ? 216 : 240;
  // The scores of the next item's first tile are issued before this item's output is stored.
  static constexpr bool kAhead = kQueryBuffers == 2;
  // Tiles before an item's end where the next one is claimed.
  static constexpr int kClaimTiles = 10;

  static constexpr bool kOnesInV = kHeadDim < 256;  // else they are a product of their own
  static constexpr int kValueWidth = kHeadDim + (kOnesInV ? 8 : 0);
  static constexpr int kPanelWidth = panel_width(kHeadDim), kPanels = kHeadDim / kPanelWidth;
  static constexpr int kChunks = kBlockN / kVWidth, kChunkBytes = kValueWidth * kVWidth;

  static constexpr int aligned(int bytes) { return (bytes + 1023) / 1024 * 1024; }
  static constexpr int kQueryBytes = kBlockM * kHeadDim, kKeyBytes = kBlockN * kHeadDim;
  // A stage takes 64 keys of 16 bits as well; their values must not touch the ones.
  static constexpr int kBandValuesAt = kVWidth == 128 ? 0 : aligned(kChunks * kChunkBytes);
  static constexpr int kKeyStage = aligned(kKeyBytes),
                       kValueStage = kBand ? std::max(aligned(kChunks * kChunkBytes), kBandValuesAt + 64 * kHeadDim * 2)
                                           : aligned(kChunks * kChunkBytes);
  static constexpr int kItemsAt = 256, kTakenAt = 320, kOnesAt = 512, kRowsAt = 1024, kQueryAt = 2048,
                       kKeyAt = kQueryAt + kQueryBuffers * kQueryBytes;
  // Scales of the queries in a buffer, behind the ones that D 256 alone has there.
  static constexpr int kScaleBytes = 4 * kBlockM / 2, kScalesAt = kRowsAt - kQueryBuffers * kScaleBytes;
  static constexpr int kValueAt = kKeyAt + kStages * kKeyStage, kTotalAt = kValueAt + kStages * kValueStage;
  // A number of the total.
  static constexpr int kTotalBytes = kHeadDim == 256 || (kHeadDim == 128 && !kFast && !kBand) ? 2 : 4;
  static constexpr int kShiftAt = kTotalAt + kBlockM * kHeadDim * kTotalBytes;
  // What smoothing took, for a tile: for each key; then the peaks of that.
  static constexpr int kPeaks = kBlockN / kShiftsOfPeak, kPeaksAt = 4 * kBlockN;
  static constexpr int kShiftBytes = !kSmooth ? 0 : kCentred ? kPeaksAt + 4 * kPeaks : 4 * kBlockN;
  // Queries of 16 bits: of 256 channels they come where the total was, after it.
  static constexpr bool kAfterTotal = kBand && kHeadDim == 256;
  static constexpr int kBandQueryBytes = kBand ? kBlockM * kHeadDim * 2 : 0,
                       kBandQueryAt = kAfterTotal ? kTotalAt : kShiftAt;
  static constexpr int kSharedBytes =
      std::max(kShiftAt + kStages * kShiftBytes, kBand ? kBandQueryAt + kBandQueryBytes : 0);
  static_assert(!kSmooth || !kBand, "what smoothing takes from scores lies where the band has its queries");
  static constexpr int kScores = kBlockN / 2, kOutputs = kValueWidth / 2, kWeights = kBlockN / 8;  // registers
  static constexpr int kOutputRegisters = kOutputs / (kHalfSums ? 2 : 1), kSumRegisters = kHalfSums ? 2 : 4;
  static_assert(kSharedBytes <= 232448 && kBlockN % 32 == 0 && kBlockN % kVWidth == 0);
};

constexpr int kGroups = 2, kThreads = 128 * (kGroups + 1);  // warpgroups that multiply; and one that copies
// A mean of n values of V, whose codes have a root mean square of kValueRms, drifts if it is larger than this many
// times kValueRms / sqrt(n): attention to normal scores has 1.65.
constexpr float kDrift = 10.5f;
// Truncation takes a little of what O holds with every product, so O is added to the total after this many keys even
// if it hovers: left to itself for a million, it lacks 4 %.
constexpr int kLongestSum = 1 << 16;

// ---- rings of tiles ----------------------------------------------------------------------------------------------

// Two barriers a stage: full (copied) and empty (every warp is done with it).
template <int kStages>
struct Ring {
  uint32_t base;
  static constexpr uint32_t kBytes = 16 * kStages;
  __device__ __forceinline__ uint32_t full(uint32_t stage) const { return base + 8 * stage; }
  __device__ __forceinline__ uint32_t empty(uint32_t stage) const { return base + 8 * (kStages + stage); }
  __device__ __forceinline__ void create() const {
    for (int i = 0; i < kStages; i++) {
      ptx::barrier_init(full(i), 1);
      ptx::barrier_init(empty(i), 4 * kGroups);
    }
  }
};

// ---- items --------------------------------------------------------------------------------------------------------

struct Item {
  uint32_t plane, kv_plane;
  int batch, head, block;
  int first_tile, end_tile;  // that any row sees
};

// The first and the last key that a query sees; it sees none where the last comes before the first.
__device__ __forceinline__ int first_key(const Sage2Params& p, int row) { return max(row + p.low, 0); }
__device__ __forceinline__ int last_key(const Sage2Params& p, int row) { return min(row + p.high, p.k_tokens - 1); }

template <class C>
__device__ __forceinline__ Item item_at(const Sage2Params& p, uint32_t index) {
  Item item;
  const uint32_t blocks = p.q_blocks.divisor;
  if (p.longest_first) {  // among planes that share the cache
    const uint32_t run = p.run_items.quotient(index), first = run * p.run_planes.divisor;
    const uint32_t rest = index - run * p.run_items.divisor;
    const bool whole = first + p.run_planes.divisor <= p.planes;
    const uint32_t turn = whole ? p.run_planes.quotient(rest) : p.last_run_planes.quotient(rest);
    item.plane = first + rest - turn * (whole ? p.run_planes.divisor : p.last_run_planes.divisor);
    item.block = static_cast<int>(blocks - 1 - turn);
  } else {
    item.plane = p.q_blocks.quotient(index);
    item.block = static_cast<int>(index - item.plane * blocks);
  }
  const uint32_t batch = p.q_heads.quotient(item.plane), head = item.plane - batch * p.q_heads.divisor;
  item.batch = static_cast<int>(batch);
  item.head = static_cast<int>(head);
  item.kv_plane = batch * p.kv_heads + p.group.quotient(head);
  const int first_row = item.block * kBlockM, last_row = min(first_row + kBlockM, p.q_tokens) - 1;
  const auto tiles_of = [](int keys) { return (keys + C::kBlockN - 1) / C::kBlockN; };
  item.first_tile = first_key(p, first_row) / C::kBlockN;
  item.end_tile = max(tiles_of(max(last_key(p, last_row) + 1, 0)), item.first_tile);
  return item;
}

// ---- the two products of a tile -----------------------------------------------------------------------------------

template <class C>
__device__ __forceinline__ void issue_scores(int (&s)[C::kScores], uint64_t q, uint64_t k) {
#pragma unroll
  for (int panel = 0; panel < C::kPanels; panel++) {
#pragma unroll
    for (int step = 0; step < C::kPanelWidth / 32; step++) {
      const uint64_t a = q + (panel * kBlockM * C::kPanelWidth >> 4) + 2 * step;
      const uint64_t b = k + (panel * C::kBlockN * C::kPanelWidth >> 4) + 2 * step;
      if (panel == 0 && step == 0) {
        ptx::ScoreProduct<C::kBlockN>::template issue<C::kCentred>(s, a, b);
      } else {
        ptx::ScoreProduct<C::kBlockN>::template issue<true>(s, a, b);
      }
    }
  }
  ptx::product_commit();
}

template <class C>
__device__ __forceinline__ void issue_values(Output<C> (&o)[C::kOutputRegisters], Output<C> (&sums)[C::kSumRegisters],
                                             const uint32_t (&weights)[C::kWeights], uint64_t v, uint64_t ones,
                                             int accumulate) {
#pragma unroll
  for (int step = 0; step < C::kBlockN / 32; step++) {
    constexpr int kSteps = C::kVWidth / 32;
    const uint64_t b = v + (step / kSteps * C::kChunkBytes >> 4) + 2 * (step % kSteps);
    using Product =
        std::conditional_t<C::kHalfSums, ptx::ValueProductInHalf<C::kValueWidth>, ptx::ValueProduct<C::kValueWidth>>;
    using SumProduct = std::conditional_t<C::kHalfSums, ptx::ValueProductInHalf<8>, ptx::ValueProduct<8>>;
    Product::issue(o, weights + 4 * step, b, step == 0 ? accumulate : 1);
    if constexpr (!C::kOnesInV) SumProduct::issue(sums, weights + 4 * step, ones, step > 0);
  }
  ptx::product_commit();
}

// ---- softmax ------------------------------------------------------------------------------------------------------

// Registers of scores go by fours of one row: word w holds columns 2c, 2c + 1 of two neighbouring 8-column tiles, of
// row g where w is even, of g + 8 where it is odd.
__device__ constexpr int word_base(int word) { return 8 * (word >> 1) + 2 * (word & 1); }
// Where the word belongs in the fragment of P.
__device__ constexpr int weight_of(int word) { return (word >> 2) * 4 + (word >> 1 & 1) * 2 + (word & 1); }

// P until the products that read its registers are done: two codes in the low half of each word.
template <class C>
struct Exponentials {
  uint32_t bits[C::kScores / 2];

  __device__ __forceinline__ void put(int word, float a, float b, float c, float d) {
    bits[2 * word] = pair(a, b);
    bits[2 * word + 1] = pair(c, d);
  }

  __device__ __forceinline__ void store(uint32_t (&weights)[C::kWeights]) const {
#pragma unroll
    for (int word = 0; word < C::kScores / 4; word++) {
      const uint32_t low = bits[2 * word], high = bits[2 * word + 1];
      // Exact ones have nothing in the high halves. Permutations and multiplications have units of their own.
      weights[weight_of(word)] = C::kFast || word & 1 ? __byte_perm(low, high, 0x5410) : low + (high << 16);
    }
  }

 private:
  static __device__ __forceinline__ uint32_t pair(float low, float high) {
    uint32_t codes;
    asm("{ .reg .b16 pair; cvt.rn.satfinite.e4m3x2.f32 pair, %1, %2; mov.b32 %0, {pair, 0}; }"
        : "=r"(codes)
        : "f"(high), "f"(low));
    return codes;
  }
};

// Of rows g and g + 8: the kept maximum (base 2), and the row sum of P since O was last added to the total.
struct RowState {
  float maximum[2] = {-INFINITY, -INFINITY};
  float sum[2] = {};
  float exact[2] = {};  // a lane's share of the row sum of P before it was rounded
};

// How much sums shrink when their kept maximum moves.
__device__ __forceinline__ float shrink(float from, float to) {
  return from == -INFINITY ? 0.0f : ptx::exp2_approx(from - to);
}

// Moves the kept maxima where this tile's are larger by more than kHeadroom.
template <class C>
__device__ __forceinline__ void keep_maxima(RowState& state, float (&largest)[2], float (&rescale)[2]) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float x = largest[half];
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 2));
    const float kept = state.maximum[half], next = x > kept + C::kHeadroom ? x : kept;
    rescale[half] = shrink(kept, next);
    state.maximum[half] = next;
  }
}

template <class C>
__device__ __forceinline__ float addend_of(float maximum) {
  return C::kOffset - (maximum == -INFINITY ? 0.0f : maximum);  // nothing visible yet
}

// The first of a lane's rows, in its block.
__device__ __forceinline__ int row_of_block() { return threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4; }

// The reduction leaves a number that lanes agree on where the compiler keeps what a warp shares.
__device__ __forceinline__ int shared_by_warp(int x) {
  return static_cast<int>(__reduce_or_sync(~0u, static_cast<uint32_t>(x)));
}

// Beside the index of an item: a mask closes all of its tiles; some key of its plane is not finite.
constexpr uint32_t kNoTiles = 1u << 31, kBadKeys = 1u << 30;
// What the latter comes to.
__device__ __forceinline__ uint32_t bad_keys(const Sage2Params& p, const Item& item) {
  return __ldg(p.packed.flags + item.kv_plane) & kKeyFlag ? kBadKeys : 0;
}

// What the producer says of a tile that it takes, in a word: how many open ones follow to its left, before there is
// another word; whether these are the last of the item.
constexpr uint32_t kTakenLast = 1, kTakenOpen = 2, kTakenMore = 4, kMostMore = 15, kTakenTile = 64;

// Keys of a tile that a mask shows to two rows. The lanes of a quad share the words of both, each of 32 keys: lane c
// holds those of row g + 8 (c & 1).
template <class C>
struct SeenKeys {
  const uint32_t* row;  // its words from key 0 on
  uint32_t word[C::kBlockN / 64];

  __device__ __forceinline__ void start(const Sage2Params& p, const Item& item) {
    const int c = threadIdx.x % 4, own = item.block * kBlockM + row_of_block() + 8 * (c & 1);
    row = reinterpret_cast<const uint32_t*>(p.mask.row(p.mask.plane(item.batch, item.head), own)) + (c >> 1);
  }

  __device__ __forceinline__ void fetch(const Sage2Params& p, int tile) {
    constexpr int kColumns = C::kBlockN / kMaskTileKeys;
#pragma unroll
    for (int i = 0; i < kColumns; i++) {
      const int column = tile * kColumns + i;
      word[i] = column < p.mask.columns ? __ldg(row + 2 * column) : 0;
    }
  }

  // Keys 32n + 2c and on, for row g + 8 half.
  __device__ __forceinline__ uint32_t of(int half, int n) const {
    return __shfl_sync(~0u, word[n / 2], 2 * (n & 1) + half, 4) >> 2 * (threadIdx.x % 4);
  }
};

// An item as one lane sees it, on its way from its first tile to its last. With a mask the producer says which those
// are, tiles count from the first key, and 0 stands for one that is not known yet.
template <class C>
struct Course {
  uint32_t index;            // of the item
  int tile = -1;             // in work, counted from the first that any row sees
  int first_row, first_key;  // of the block, and of its tile 0
  uint32_t first_tile;       // that any row sees, among those of all planes
  float q_scale, next_k_scale;
  uint32_t taken = 0;  // of the tile in work: how many open ones follow, and the flags
  SeenKeys<C> seen;
  int last_open;                       // key that every row sees, or kFlagged
  static constexpr int kFlagged = -1;  // a key of the plane is not finite

  Course() = default;
  // q_scales: of the block, in shared memory.
  __device__ __forceinline__ Course(const Sage2Params& p, uint32_t word, const float* q_scales)
      : index(word & ~(kNoTiles | kBadKeys)) {
    if (index >= p.items) return;
    const Item item = item_at<C>(p, index);
    first_row = item.block * kBlockM;
    if constexpr (C::kBoolMask) {
      tile = word & kNoTiles ? -1 : 0;
      if (tile < 0) return;
      if (C::kHoldsSeen) seen.start(p, item);
    } else {
      tile = shared_by_warp(item.end_tile - item.first_tile) - 1;
      if (tile < 0) return;
    }
    const int first = C::kBoolMask ? 0 : shared_by_warp(item.first_tile);
    first_tile = item.kv_plane * p.tiles + first;
    first_key = first * C::kBlockN;
    q_scale = q_scales[threadIdx.x / 4];
    if (!C::kBoolMask) next_k_scale = key_scale(p, tile);
    // With a mask, the warp that copies has no registers for what another may ask for itself.
    if (C::kBoolMask) word = __reduce_or_sync(~0u, bad_keys(p, item));
    last_open = word & kBadKeys ? kFlagged : max(last_key(p, first_row), 0);
  }

  // Takes the next tile into work; false: there is none.
  __device__ __forceinline__ bool next() {
    if constexpr (C::kBoolMask) return (taken & (kMostMore * kTakenMore | kTakenLast)) != kTakenLast;
    return --tile >= 0;
  }

  // With a mask: which one that is. `read` gives the producer's word of it, where that of an earlier one does not say.
  template <class Read>
  __device__ __forceinline__ void take(const Sage2Params& p, Read read) {
    if (taken & kMostMore * kTakenMore) {
      taken -= kTakenMore;
      tile--;
    } else {
      taken = read();
      const int expected = tile - 1;
      tile = static_cast<int>(taken / kTakenTile);
      if (tile != expected) next_k_scale = key_scale(p, tile);
      if (C::kHoldsSeen && hides()) seen.fetch(p, tile);
    }
  }

  // Whether the mask hides keys of the tile.
  __device__ __forceinline__ bool hides() const { return C::kBoolMask && !(taken & kTakenOpen); }

  // Whether windows hide some key of the tile from some row of the block.
  __device__ __forceinline__ bool is_border(const Sage2Params& p) const {
    const int first = first_key + tile * C::kBlockN, last_row = min(first_row + kBlockM, p.q_tokens) - 1;
    return first < sage2::first_key(p, last_row) || first + C::kBlockN - 1 > last_open;
  }

  __device__ __forceinline__ float key_scale(const Sage2Params& p, int of) const {
    return __ldg(p.packed.k_scales + static_cast<int64_t>(first_tile + of) * 4 + threadIdx.x % 4);
  }

  // What turns a score of this tile into an exponent of 2.
  __device__ __forceinline__ float next_factor() const {
    return fminf(fmaxf(q_scale * next_k_scale, 0x1p-126f), 0x1p100f);
  }

  // The same; fetches that of the tile to the left.
  __device__ __forceinline__ float factor(const Sage2Params& p) {
    const float factor = next_factor();
    if (tile > 0) next_k_scale = key_scale(p, tile - 1);
    return factor;
  }
};

// From kLeastFactor to below kMostFactor integer scores are fine enough, and kMasked ones as good as none.
constexpr float kLeastFactor = 0x1p-19f, kMostFactor = 0x1p-7f;
constexpr int kMasked = -(1 << 30);

// Sums of scores that start at the bits of kCentre + n are the bits of the float kCentre + n + score, as long as that
// is within kCentreRoom of kCentre. Such a score that is masked is -inf, and less than any other as an integer too.
constexpr float kCentre = 0x1.8p23f, kCentreRoom = 0x1p22f;
constexpr int kCentreBits = 0x4b400000, kNoScore = static_cast<int>(0xff800000);

template <class C>
constexpr int kMaskedScore = C::kCentred ? kNoScore : kMasked;

template <class C>
__device__ __forceinline__ void mask(const Sage2Params& p, int (&s)[C::kScores], const Course<C>& course) {
  const int first = course.first_key + course.tile * C::kBlockN + 2 * (threadIdx.x % 4);
  const int row = course.first_row + row_of_block();
  const int last[2] = {last_key(p, row) - first, last_key(p, row + 8) - first};
#pragma unroll
  for (int i = 0; i < C::kScores; i++) {
    if (i / 4 * 8 + (i & 1) > last[i >> 1 & 1]) s[i] = kMaskedScore<C>;
  }
  if (!p.begins) return;
  const int least[2] = {first_key(p, row) - first, first_key(p, row + 8) - first};
#pragma unroll
  for (int i = 0; i < C::kScores; i++) {
    if (i / 4 * 8 + (i & 1) < least[i >> 1 & 1]) s[i] = kMaskedScore<C>;
  }
}

// Keys that the mask hides.
template <class C>
__device__ __forceinline__ void mask_unseen(const Sage2Params& p, int (&s)[C::kScores], Course<C>& course) {
  SeenKeys<C> seen = course.seen;
  if constexpr (!C::kHoldsSeen) {
    seen.start(p, item_at<C>(p, course.index));
    seen.fetch(p, course.tile);
  }
#pragma unroll
  for (int n = 0; n < C::kBlockN / 32; n++) {
    const uint32_t bits[2] = {seen.of(0, n), seen.of(1, n)};
#pragma unroll
    for (int i = 0; i < 16; i++) {
      if (!(bits[i >> 1 & 1] >> (i / 4 * 8 + (i & 1)) & 1)) s[16 * n + i] = kMaskedScore<C>;
    }
  }
}

// Keys that are not finite.
template <class C>
__device__ __forceinline__ void mask_flagged(const Sage2Params& p, int (&s)[C::kScores], const Course<C>& course) {
  const uint32_t* const bits =
      p.packed.k_bits + static_cast<int64_t>(course.first_tile + course.tile) * (C::kBlockN / 32);
#pragma unroll
  for (int word = 0; word < C::kBlockN / 32; word++) {
    const uint32_t bad = __ldg(bits + word) >> 2 * (threadIdx.x % 4);
#pragma unroll
    for (int i = 0; i < 16; i++) {
      if (bad >> (i / 4 * 8 + (i & 1)) & 1) s[16 * word + i] = kMaskedScore<C>;
    }
  }
}

// What smoothing took from scores of the tile: four at a time, of columns 16n + 2c, + 1, + 8 and + 9.
struct Shifts {
  const float* of_tile = nullptr;  // in shared memory, where their peaks follow
  __device__ __forceinline__ float4 operator[](int n) const {
    return reinterpret_cast<const float4*>(of_tile)[4 * n + threadIdx.x % 4];
  }
};
__device__ __forceinline__ float part_of(const float4& four, int i) {
  return i == 0 ? four.x : i == 1 ? four.y : i == 2 ? four.z : four.w;
}

// Sums of scores start at what smoothing took from them; inverse: of the tile's factor, or 0 for misfits.
template <class C>
__device__ __forceinline__ void start_scores(int (&s)[C::kScores], float inverse, Shifts shifts) {
#pragma unroll
  for (int n = 0; n < C::kBlockN / 16; n++) {
    const float4 shift = shifts[n];
#pragma unroll
    for (int r = 0; r < 8; r++) {
      s[8 * n + r] = __float_as_int(fmaf(part_of(shift, r / 4 * 2 + (r & 1)), inverse, kCentre));
    }
  }
}

// Whether a tile is a misfit in some lane of the warp: there is no room for what smoothing took, or its factors are no
// good for integer scores.
template <class C>
__device__ __forceinline__ bool any_misfit(float factor, Shifts shifts) {
  constexpr float kRoom = kCentreRoom - 127.0f * 127.0f * C::kHeadDim - 2.0f;  // 2: what rounding adds
  static_assert(C::kPeaks <= 32, "one for a lane");
  const int lane = threadIdx.x % 32;
  const float own = shifts.of_tile[C::kPeaksAt / 4 + (lane < C::kPeaks ? lane : 0)];
  const float peak = __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(own)));
  const bool fits = peak <= kRoom * factor && factor < kMostFactor && (!C::kFast || factor >= kLeastFactor);
  return __any_sync(~0u, !fits);
}

// Where nothing joins them.
template <class C>
__device__ __forceinline__ void centre_scores(int (&s)[C::kScores]) {
#pragma unroll
  for (int i = 0; i < C::kScores; i++) s[i] = kCentreBits;
}

// P of words kFrom to kTo: score(i, addend) is score i plus addend, base 2. A lane's row sums of P join `sum`.
//
// An exponential keeps its unit busy for eight clocks, in which the warp may issue something else. The compiler puts
// whatever can be done before exponentials before the first of them, unless the addend of a word waits for another.
template <class C, int kFrom, int kTo, class Score>
__device__ __forceinline__ void exponentiate(Exponentials<C>& e, const float (&addend)[2], float (&sum)[2],
                                             Score score) {
  float last[kTo];
#pragma unroll
  for (int word = kFrom; word < kTo; word++) {
    const int b = word_base(word), half = word & 1;
    float waiting = addend[half];
    if (word - kFrom >= C::kLag) waiting = fmaf(last[word - C::kLag], 0.0f, waiting);
    const auto exponential = [&](int i) { return ptx::exp2_approx(score(i, waiting)); };
    const float x[4] = {exponential(b), exponential(b + 1), exponential(b + 4), exponential(b + 5)};
    last[word] = x[3];
    if (C::kSums) sum[half] += (x[0] + x[1]) + (x[2] + x[3]);
    e.put(word, x[0], x[1], x[2], x[3]);
  }
}

// What there is of row sums takes rescale, and new ones join.
__device__ __forceinline__ void add_exact(RowState& state, const float (&rescale)[2], const float (&sum)[2]) {
#pragma unroll
  for (int half = 0; half < 2; half++) state.exact[half] = fmaf(state.exact[half], rescale[half], sum[half]);
}

__device__ __forceinline__ bool moves(const float (&rescale)[2]) {
  return __any_sync(~0u, rescale[0] != 1.0f || rescale[1] != 1.0f);
}

// Scores made whole take the place of the integers, and move the kept maxima: what smoothing took is added, and masked
// ones, where there may be any, are -inf. Factors are of any size.
template <class C, bool kMaskable>
__device__ __forceinline__ void make_whole(int (&s)[C::kScores], RowState& state, float factor, Shifts shifts,
                                           float (&rescale)[2]) {
  float largest[2] = {-INFINITY, -INFINITY};
#pragma unroll
  for (int n = 0; n < C::kBlockN / 16; n++) {
    float4 shift = {};
    if constexpr (C::kSmooth) shift = shifts[n];
#pragma unroll
    for (int r = 0; r < 8; r++) {
      const int score = s[8 * n + r];
      const float number = C::kCentred ? __int_as_float(score) - kCentre : static_cast<float>(score);
      float x = number * factor;
      if (C::kSmooth) x = fmaf(number, factor, part_of(shift, r / 4 * 2 + (r & 1)));
      if (kMaskable && !C::kCentred && score == kMasked) x = -INFINITY;
      largest[r >> 1 & 1] = fmaxf(largest[r >> 1 & 1], x);
      s[8 * n + r] = __float_as_int(x);
    }
  }
  keep_maxima<C>(state, largest, rescale);
}

// Exact exponentials of such scores.
template <class C, bool kMaskable>
__device__ __forceinline__ bool softmax_whole(int (&s)[C::kScores], Exponentials<C>& e, RowState& state, float factor,
                                              Shifts shifts, float (&rescale)[2]) {
  make_whole<C, kMaskable>(s, state, factor, shifts, rescale);
  const float addend[2] = {addend_of<C>(state.maximum[0]), addend_of<C>(state.maximum[1])};
  float sum[2] = {};
  exponentiate<C, 0, C::kScores / 4>(e, addend, sum,
                                     [&](int i, float addend) { return __int_as_float(s[i]) + addend; });
  add_exact(state, rescale, sum);
  return moves(rescale);
}

// The largest of kCount numbers at(i), by most(a, b, c). A chain of them would make a warp wait for each.
template <int kCount, class At, class Most>
__device__ __forceinline__ auto largest_of(At at, Most most, int first = 0) -> decltype(at(0)) {
  if constexpr (kCount <= 3) {
    return kCount == 1 ? at(first) : most(at(first), at(first + 1), at(first + kCount - 1));
  } else {
    constexpr int kThird = kCount / 3 | 1, kRest = kCount - 2 * kThird;  // two odd ones waste nothing
    const auto a = largest_of<kThird>(at, most, first);
    if constexpr (kRest == 0) {
      return most(a, largest_of<kThird>(at, most, first + kThird), a);
    } else {
      return most(a, largest_of<kThird>(at, most, first + kThird), largest_of<kRest>(at, most, first + 2 * kThird));
    }
  }
}

// A lane's largest scores.
template <class C>
__device__ __forceinline__ void integer_maxima(const int (&s)[C::kScores], float factor, float (&largest)[2]) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int bits = largest_of<C::kScores / 2>([&](int i) { return s[i / 2 * 4 + 2 * half + (i & 1)]; },
                                                [](int a, int b, int c) { return __vimax3_s32(a, b, c); });
    if constexpr (C::kCentred) {
      largest[half] = (__int_as_float(bits) - kCentre) * factor;
    } else {
      largest[half] = bits == kMasked ? -INFINITY : static_cast<float>(bits) * factor;
    }
  }
}

// Moves the kept maxima where integer scores are larger.
template <class C>
__device__ __forceinline__ bool keep_integer_maxima(const int (&s)[C::kScores], RowState& state, float factor,
                                                    float (&rescale)[2]) {
  float largest[2];
  integer_maxima<C>(s, factor, largest);
  keep_maxima<C>(state, largest, rescale);
  return moves(rescale);
}

// Exact exponentials of integer scores; those of misfits, about kCentre, are made whole first. The first are taken
// against the kept maxima at once, beside the search for larger ones, and again in the rare case that there are.
template <class C>
__device__ __forceinline__ bool softmax_exact(int (&s)[C::kScores], Exponentials<C>& e, RowState& state, float factor,
                                              Shifts shifts, bool misfit, float (&rescale)[2]) {
  float centre = C::kCentred ? kCentre : 0.0f;
  bool moved = false;
  rescale[0] = rescale[1] = 1.0f;
  if (C::kCentred && misfit) {
    if (!C::kFewRegisters) return softmax_whole<C, true>(s, e, state, factor, shifts, rescale);
    make_whole<C, true>(s, state, factor, shifts, rescale);
    factor = 1.0f, centre = 0.0f;
    moved = moves(rescale);
  }
  float addend[2], sum[2] = {};
  const auto find_addends = [&] {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float whole = addend_of<C>(state.maximum[half]);
      addend[half] = C::kCentred ? fmaf(-centre, factor, whole) : whole;
    }
  };
  const auto score = [&](int i, float addend) {
    return fmaf(C::kCentred ? __int_as_float(s[i]) : static_cast<float>(s[i]), factor, addend);
  };
  constexpr int kTried = C::kTriedWords;
  if constexpr (kTried > 0) {
    find_addends();
    exponentiate<C, 0, kTried>(e, addend, sum, score);
  }
  float largest[2];
  integer_maxima<C>(s, factor, largest);
  const bool larger = !(C::kCentred && misfit) &&
                      (largest[0] > state.maximum[0] + C::kHeadroom || largest[1] > state.maximum[1] + C::kHeadroom);
  if (kTried == 0 || __any_sync(~0u, larger)) {
    keep_maxima<C>(state, largest, rescale);
    moved = kTried > 0 || moves(rescale);
    find_addends();
    sum[0] = sum[1] = 0.0f;
    if constexpr (kTried > 0) exponentiate<C, 0, kTried>(e, addend, sum, score);
  }
  exponentiate<C, kTried, C::kScores / 4>(e, addend, sum, score);
  add_exact(state, rescale, sum);
  return moved;
}

// Exponentials straight to e4m3 codes, whose logarithm is nearly linear in the code: floor(8 (t + 7 - .057) + .5) for
// 2^t. (s + bias) * multiplier is the code in its top byte.
struct CodeLine {
  int bias[2], multiplier, most;
};

template <class C>
__device__ __forceinline__ CodeLine code_line(const RowState& state, float factor) {
  const float inverse = ptx::reciprocal(factor), shift = C::kOffset + 7.0f - 0.057f + 0.0625f;
  CodeLine line;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int bias = __float2int_rn((shift - state.maximum[half]) * inverse);
    constexpr int kMost = C::kCentred ? 1 << 28 : 1 << 30;  // a masked score stays below 0, others do not overflow
    line.bias[half] = max(-kMost, min(kMost, bias)) - (C::kCentred ? kCentreBits : 0);
  }
  line.multiplier = __float2int_rn(factor * 0x1p27f);
  line.most = __float2int_rd(31.7f * inverse);
  return line;
}

// Against the maxima as they are; kOptimistic: whether a score was too large for them.
template <class C, bool kOptimistic>
__device__ __forceinline__ bool codes_of(const int (&s)[C::kScores], Exponentials<C>& e, const RowState& state,
                                         float factor) {
  const CodeLine line = code_line<C>(state, factor);
#pragma unroll
  for (int word = 0; word < C::kScores / 4; word++) {
    const int b = word_base(word);
    const auto code = [&](int i) {  // clamped to 0, and to 253.6 / 256 of the range
      const int above = kOptimistic ? __viaddmin_s32_relu(s[i], line.bias[word & 1], line.most)
                                    : __viaddmax_s32(s[i], line.bias[word & 1], 0);
      return static_cast<uint32_t>(above) * static_cast<uint32_t>(line.multiplier);
    };
    constexpr uint32_t kPair = kOptimistic ? 0x3773 : 0x0073;  // above the pair, the same bytes in turn
    e.bits[2 * word] = __byte_perm(code(b), code(b + 1), kPair);
    e.bits[2 * word + 1] = __byte_perm(code(b + 4), code(b + 5), kPair);
  }
  if (!kOptimistic) return false;
  const uint32_t largest = largest_of<C::kScores / 2>(
      [&](int i) { return e.bits[i]; }, [](uint32_t a, uint32_t b, uint32_t c) { return __vimax3_u16x2(a, b, c); });
  return __any_sync(~0u, (largest >> 24) >= 127u || (largest >> 8 & 255u) >= 127u);  // 126 is 448
}

template <class C>
__device__ __forceinline__ bool softmax_codes(const int (&s)[C::kScores], Exponentials<C>& e, RowState& state,
                                              float factor, bool first, float (&rescale)[2]) {
  if constexpr (!C::kOptimistic) {
    const bool moved = keep_integer_maxima<C>(s, state, factor, rescale);
    codes_of<C, false>(s, e, state, factor);
    return moved;
  } else {
    bool moved = first && keep_integer_maxima<C>(s, state, factor, rescale);
#pragma unroll 1
    while (codes_of<C, true>(s, e, state, factor)) {  // once more at most
      keep_integer_maxima<C>(s, state, factor, rescale);
      moved = true;
    }
    return moved;
  }
}

// P of a tile. Whether maxima moved: then what was summed for them takes `rescale`. `shifts` are those that have not
// joined the scores.
template <class C>
__device__ __forceinline__ bool softmax(const Sage2Params& p, int (&s)[C::kScores], Exponentials<C>& e, RowState& state,
                                        Course<C>& course, Shifts shifts, bool first, float (&rescale)[2]) {
  const float factor = course.factor(p);
  const bool masked = course.is_border(p), flagged = course.last_open == course.kFlagged;
  bool any = C::kFast ? flagged : masked;
  if constexpr (C::kBoolMask && !C::kFast) any |= course.hides();
  if (C::kFast) any |= __any_sync(~0u, !(factor >= kLeastFactor && factor < kMostFactor));
  if (masked || course.hides()) {
    if (masked) mask<C>(p, s, course);
    if constexpr (C::kBoolMask) {
      if (course.hides()) mask_unseen<C>(p, s, course);
    }
  }
  if (any) {
    if (flagged) mask_flagged<C>(p, s, course);
    return softmax_whole<C, true>(s, e, state, factor, shifts, rescale);
  }
  if constexpr (C::kFast) {
    return softmax_codes<C>(s, e, state, factor, first, rescale);
  } else if constexpr (C::kSmooth) {
    return softmax_whole<C, false>(s, e, state, factor, shifts, rescale);
  } else {
    return softmax_exact<C>(s, e, state, factor, shifts, false, rescale);
  }
}

// The same of scores about kCentre, which what smoothing took has joined but for misfits.
template <class C>
__device__ __forceinline__ bool softmax_centred(const Sage2Params& p, int (&s)[C::kScores], Exponentials<C>& e,
                                                RowState& state, Course<C>& course, Shifts shifts, bool misfit,
                                                float (&rescale)[2]) {
  const float factor = course.factor(p);
  if (course.is_border(p)) {
    mask<C>(p, s, course);
    if (course.last_open == course.kFlagged) mask_flagged<C>(p, s, course);
  }
  if constexpr (C::kFast) {
    if (misfit) return softmax_whole<C, true>(s, e, state, factor, shifts, rescale);
    return softmax_codes<C>(s, e, state, factor, false, rescale);
  } else {
    return softmax_exact<C>(s, e, state, factor, shifts, misfit, rescale);
  }
}

// ---- sums that have left the accumulator --------------------------------------------------------------------------

// In shared memory: numbers of a thread, four to an 8-column tile, in f32 (f16 where there is no room for more), and
// for each row its sum of P and the maximum that both were scaled for.
template <class C>
struct Total {
  uint8_t* at;
  float2* rows;  // the lane's row g; g + 8 follows
  bool used = false;

  // The total takes O in: as a sum in f32, as an average in f16, which holds it.
  __device__ __forceinline__ void add(const Output<C> (&o)[C::kOutputRegisters], RowState& state) {
    float sum[2], old[2], fresh[2];
    weigh(state, sum, old, fresh);
#pragma unroll
    for (int n = 0; n < C::kHeadDim / 8; n++) {
      float x[4] = {};
      if (used) load(n, x);
#pragma unroll
      for (int r = 0; r < 4; r++) x[r] = fmaf(x[r], old[r >> 1], output_at(o, 4 * n + r) * fresh[r >> 1]);
      store(n, x);
    }
    __syncwarp();
#pragma unroll
    for (int half = 0; half < 2; half++) {
      rows[8 * half] = make_float2(sum[half], state.maximum[half]);  // all lanes of a row say the same
      state.sum[half] = 0.0f;
    }
    __syncwarp();
    used = true;
  }

  // O becomes the average of V under P; state.sum that of the whole row.
  __device__ __forceinline__ void finish(float (&o)[C::kOutputs], RowState& state) const {
    float sum[2], old[2], fresh[2];
    weigh(state, sum, old, fresh);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      state.sum[half] = sum[half];
      if (C::kTotalBytes == 2) continue;
      fresh[half] = sum[half] > 0.0f ? ptx::reciprocal(sum[half]) : 0.0f;
      old[half] *= fresh[half];
    }
#pragma unroll
    for (int i = 0; i < C::kHeadDim / 2; i++) o[i] *= fresh[i >> 1 & 1];
    if (!used) return;
#pragma unroll
    for (int n = 0; n < C::kHeadDim / 8; n++) {
      float x[4];
      load(n, x);
#pragma unroll
      for (int r = 0; r < 4; r++) o[4 * n + r] = fmaf(x[r], old[r >> 1], o[4 * n + r]);
    }
  }

 private:
  // The total with O in it is total * old + o * fresh.
  __device__ __forceinline__ void weigh(const RowState& state, float (&sum)[2], float (&old)[2],
                                        float (&fresh)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float2 before = used ? rows[8 * half] : make_float2(0.0f, -INFINITY);
      const float factor = shrink(before.y, state.maximum[half]);
      sum[half] = before.x * factor + state.sum[half];
      const float inverse = sum[half] > 0.0f ? ptx::reciprocal(sum[half]) : 0.0f;
      old[half] = C::kTotalBytes == 4 ? factor : before.x * factor * inverse;
      fresh[half] = C::kTotalBytes == 4 ? 1.0f : inverse;
    }
  }

  __device__ __forceinline__ void load(int n, float (&x)[4]) const {
    if constexpr (C::kTotalBytes == 4) {
      const float4 four = reinterpret_cast<const float4*>(at)[n * 128];
      x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
    } else {
      const uint2 four = reinterpret_cast<const uint2*>(at)[n * 128];
      const float2 low = __half22float2(*reinterpret_cast<const __half2*>(&four.x));
      const float2 high = __half22float2(*reinterpret_cast<const __half2*>(&four.y));
      x[0] = low.x, x[1] = low.y, x[2] = high.x, x[3] = high.y;
    }
  }

  __device__ __forceinline__ void store(int n, const float (&x)[4]) const {
    if constexpr (C::kTotalBytes == 4) {
      reinterpret_cast<float4*>(at)[n * 128] = make_float4(x[0], x[1], x[2], x[3]);
    } else {
      const __half2 low = __floats2half2_rn(x[0], x[1]), high = __floats2half2_rn(x[2], x[3]);
      reinterpret_cast<uint2*>(at)[n * 128] =
          make_uint2(*reinterpret_cast<const uint32_t*>(&low), *reinterpret_cast<const uint32_t*>(&high));
    }
  }
};

// Whether a row of the warpgroup drifts, or O has summed for long; `keys` is how many it has.
template <class C>
__device__ __forceinline__ bool drifts(const float (&o)[C::kOutputs], const RowState& state, int keys, int group) {
  float largest[2] = {};
#pragma unroll
  for (int i = 0; i < C::kHeadDim / 2; i++) largest[i >> 1 & 1] = fmaxf(largest[i >> 1 & 1], fabsf(o[i]));
  const float bound = kDrift * kValueRms * rsqrtf(static_cast<float>(keys));
  const bool found = keys >= kLongestSum || largest[0] > bound * state.sum[0] || largest[1] > bound * state.sum[1];
  return __any_sync(~0u, ptx::any_of_warpgroup(3 + group, found));  // the vote tells the compiler that warps agree
}

// ---- output -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t pack_output(bool f16, float low, float high) {
  const __half2 half = __floats2half2_rn(low, high);
  const __nv_bfloat162 brain = __floats2bfloat162_rn(low, high);
  return f16 ? *reinterpret_cast<const uint32_t*>(&half) : *reinterpret_cast<const uint32_t*>(&brain);
}

__device__ __forceinline__ void store_output(char* o, DType type, int64_t at, float value) {
  if (type == DType::kF32) {
    reinterpret_cast<float*>(o)[at] = value;
  } else if (type == DType::kF16) {
    reinterpret_cast<__half*>(o)[at] = __float2half_rn(value);
  } else {
    reinterpret_cast<__nv_bfloat16*>(o)[at] = __float2bfloat16_rn(value);
  }
}

// Room of a warp for its 16 rows in 16 bits: what its lanes have of a total. Of each 8 columns that is a span, 128 of
// whose bytes are a unit: 8 chunks of a row, which is one or more units. Chunks of a unit are in an order that depends
// on the row, so that neither chunks of a row nor those of a column meet in a bank.
template <class C>
struct RowRoom {
  static constexpr int kUnits = C::kHeadDim / 64, kUnitsOfSpan = C::kTotalBytes;  // of a row; of a span
  static constexpr int kRows = 4 / kUnits;                                        // that a warp takes at once
  static_assert(kUnits % kUnitsOfSpan == 0 || kUnitsOfSpan % kUnits == 0);
  uint32_t base;
  int lane;

  __device__ __forceinline__ explicit RowRoom(const uint8_t* totals) {
    uint32_t thread = threadIdx.x;
    // Read again where registers are few, so that nothing made of it occupies one all the while.
    if constexpr (C::kHeadDim == 256 || (C::kHeadDim == 64 && C::kFast))
      asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    lane = static_cast<int>(thread % 32);
    base = ptx::shared_address(totals) + thread % 128 / 32 * (128 * kUnitsOfSpan);
  }

  static __device__ __forceinline__ constexpr int unit(int number) {
    return number / kUnitsOfSpan * (512 * kUnitsOfSpan) + number % kUnitsOfSpan * 128;
  }
  // Where a lane's row of fragments begins, and where those of columns 8n to 8n + 15 are.
  __device__ __forceinline__ uint32_t fragments() const {
    return base + unit(lane % 16 * kUnits) + (lane / 16 ^ lane % 8) * 16;
  }
  static __device__ __forceinline__ uint32_t fragment(uint32_t fragments, int n) {
    return (fragments ^ n % 8 * 16) + unit(n / 8);
  }
  // A lane's chunk of the first kRows rows, and of those that follow.
  __device__ __forceinline__ uint32_t chunks() const {
    return base + unit(lane / 8) + (lane % 8 ^ lane / 8 / kUnits) * 16;
  }
  static __device__ __forceinline__ uint32_t chunk(uint32_t chunks, int step) {
    return (chunks ^ step * kRows % 8 * 16) + unit(4 * step);
  }
};

template <DType kType>
using TypeOfOutput =
    std::conditional_t<kType == DType::kF32, float, std::conditional_t<kType == DType::kF16, __half, __nv_bfloat16>>;

// What averages of V's codes come to, for 8 channels of a lane: scale * average + mean * centred.
struct ChannelsOfLane {
  float scale[8] = {1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f}, mean[8] = {};

  __device__ __forceinline__ void load(const float* scales, const float* means) {
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      const float4 s = __ldg(reinterpret_cast<const float4*>(scales + i));
      const float4 m = __ldg(reinterpret_cast<const float4*>(means + i));
      scale[i] = s.x, scale[i + 1] = s.y, scale[i + 2] = s.z, scale[i + 3] = s.w;
      mean[i] = m.x, mean[i + 1] = m.y, mean[i + 2] = m.z, mean[i + 3] = m.w;
    }
  }

  // Nothing is to be added, and no average can exceed `largest`, however it is rounded.
  __device__ __forceinline__ bool are_plain(float largest) const {
    bool centred = false;
    float most = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) centred |= mean[i] != 0.0f, most = fmaxf(most, scale[i]);
    return !__any_sync(~0u, centred || !(most * (2.0f * kE4m3Range) < largest));
  }
};

// Rows of a warp from its room, in pieces of 16 bytes. Where channels are not plain, what is centred is added, and a
// mean of values, which is no larger than the largest, stays so.
template <class C, DType kOut, bool kPlain>
__device__ __forceinline__ void store_pieces(const Sage2Params& p, const ChannelsOfLane& channels,
                                             const float (&centred)[2], char* to, int rows, const RowRoom<C>& room) {
  using Out = TypeOfOutput<kOut>;
  static_assert(!C::kBand || sizeof(Out) == 2);
  constexpr int kRows = RowRoom<C>::kRows, kChunks = C::kHeadDim / 8;
  const int row = room.lane / kChunks, chunk = room.lane % kChunks;
  const uint32_t chunks = room.chunks();
  const int left = 8 * chunk < p.v_dim ? rows - row : 0;
  to += static_cast<int64_t>(sizeof(Out)) * (row * p.o_stride[2] + 8 * chunk);
#pragma unroll
  for (int step = 0; step < 16 / kRows; step++) {
    const uint4 piece = ptx::load_shared_16(room.chunk(chunks, step));
    const uint32_t word[4] = {piece.x, piece.y, piece.z, piece.w};
    if constexpr (C::kBand) {
      if (step * kRows < left) *reinterpret_cast<uint4*>(to) = piece;
      to += static_cast<int64_t>(sizeof(Out)) * kRows * p.o_stride[2];
      continue;
    }
    float share = 0.0f;
    if (!kPlain) share = __shfl_sync(~0u, centred[step * kRows / 8], (step * kRows % 8 + row) * 4);
    alignas(16) Out out[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(word + i / 2));
      float x = (i & 1 ? pair.y : pair.x) * channels.scale[i];
      if (!kPlain) x = fminf(fmaxf(fmaf(channels.mean[i], share, x), -p.largest), p.largest);
      if constexpr (kOut == DType::kF32) {
        out[i] = x;
      } else if constexpr (kOut == DType::kF16) {
        out[i] = __float2half_rn(x);
      } else {
        out[i] = __float2bfloat16_rn(x);
      }
    }
    if (step * kRows < left) {
#pragma unroll
      for (int i = 0; i < static_cast<int>(sizeof(out)) / 16; i++) {
        reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(out)[i];
      }
    }
    to += static_cast<int64_t>(sizeof(Out)) * kRows * p.o_stride[2];
  }
}

// o: averages in V's codes (with the band: of V); centred: the share of P on values less their mean. `scratch` is the
// room of the warpgroup's total. Rows that see nothing have averages of 0. Averages of codes take their way in f16,
// which has more than their precision, and the range.
template <class C>
__device__ __forceinline__ void store_rows(const Sage2Params& p, const Item& item, float (&o)[C::kOutputs],
                                           const RowState& state, const float (&centred)[2], int first_row,
                                           uint8_t* scratch) {
  const int c = threadIdx.x % 4;
  const RowRoom<C> room(scratch);
  bool visible[2] = {last_key(p, first_row) >= first_key(p, first_row),
                     last_key(p, first_row + 8) >= first_key(p, first_row + 8)};
  if constexpr (C::kBoolMask) {  // a maximum's P is never 0
    visible[0] = state.sum[0] > 0.0f, visible[1] = state.sum[1] > 0.0f;
  }
  const float share[2] = {visible[0] ? centred[0] : 0.0f, visible[1] ? centred[1] : 0.0f};
  const int64_t plane = item.batch * p.o_stride[0] + item.head * p.o_stride[1];
  const float* const scales = p.packed.v_scales + static_cast<int64_t>(item.kv_plane) * C::kHeadDim;
  const float* const means = p.packed.v_mean + static_cast<int64_t>(item.kv_plane) * C::kHeadDim;
  ChannelsOfLane channels;
  if (!C::kBand && p.vectors) {
    const int channel = room.lane % (C::kHeadDim / 8) * 8;
    channels.load(scales + channel, means + channel);
  }
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = first_row + 8 * half;
    float sum = state.sum[half];
    if (C::kSums) {
      sum = state.exact[half] + __shfl_xor_sync(~0u, state.exact[half], 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
    }
    if (p.lse == nullptr || c != 0 || row >= p.q_tokens) continue;
    float& lse = p.lse[item.batch * p.lse_stride[0] + item.head * p.lse_stride[1] + row * p.lse_stride[2]];
    const float own = (state.maximum[half] - C::kOffset + log2f(sum)) * kLn2;
    lse = visible[half] && sum > 0.0f ? (p.adds_lse ? lse + own : own) : -INFINITY;
  }
  if (p.vectors) {
    __syncwarp();  // every lane has read its total
    const uint32_t fragments = room.fragments();
    const auto put = [&](auto pack) {
#pragma unroll
      for (int n = 0; n < C::kHeadDim / 8; n += 2) {
        uint32_t word[4];
#pragma unroll
        for (int i = 0; i < 4; i++) word[i] = pack(o[4 * n + 2 * i], o[4 * n + 2 * i + 1]);
        ptx::store_matrices(room.fragment(fragments, n), word);
      }
      __syncwarp();
    };
    const int row = first_row - room.lane / 4, rows = p.q_tokens - row;
    const auto store = [&](auto type) {
      constexpr DType kOut = decltype(type)::value;
      char* const to = p.o + static_cast<int64_t>(sizeof(TypeOfOutput<kOut>)) * (plane + row * p.o_stride[2]);
      if constexpr (C::kBand) {
        const auto clamped = [&](float x) { return fminf(fmaxf(x, -p.largest), p.largest); };
        put([&](float low, float high) { return pack_output(kOut == DType::kF16, clamped(low), clamped(high)); });
        store_pieces<C, kOut, true>(p, channels, share, to, rows, room);
      } else if (channels.are_plain(p.largest)) {
        store_pieces<C, kOut, true>(p, channels, share, to, rows, room);
      } else {
        store_pieces<C, kOut, false>(p, channels, share, to, rows, room);
      }
    };
    if constexpr (!C::kBand) put([](float low, float high) { return pack_output(true, low, high); });
    if (p.out_dtype == DType::kF16) {
      store(std::integral_constant<DType, DType::kF16>());
    } else if (C::kBand || p.out_dtype == DType::kBF16) {
      store(std::integral_constant<DType, DType::kBF16>());
    } else {
      if constexpr (!C::kBand) store(std::integral_constant<DType, DType::kF32>());
    }
    __syncwarp();
    return;
  }
  // Rows of any kind, by way of shared memory: registers know no loops.
  constexpr int kTiles = C::kHeadDim * C::kTotalBytes / 32;  // that fit in f32
  auto* const own = reinterpret_cast<float4*>(scratch) + threadIdx.x % 128;
#pragma unroll
  for (int first = 0; first < C::kHeadDim / 8; first += kTiles) {
#pragma unroll
    for (int n = 0; n < kTiles; n++) {
      const float* x = o + 4 * (first + n);
      own[n * 128] = make_float4(x[0], x[1], x[2], x[3]);
    }
#pragma unroll 1
    for (int i = 0; i < 4 * kTiles; i++) {
      const int channel = 8 * (first + i / 4) + 2 * c + (i & 1), row = first_row + (i & 2 ? 8 : 0);
      if (row >= p.q_tokens || channel >= p.v_dim) continue;
      float x = reinterpret_cast<float*>(own + i / 4 * 128)[i % 4];
      if constexpr (!C::kBand) {
        const float in_f16 = __half2float(__float2half_rn(x)) * __ldg(scales + channel);
        x = fmaf(__ldg(means + channel), i & 2 ? share[1] : share[0], in_f16);
      }
      store_output(p.o, p.out_dtype, plane + row * p.o_stride[2] + channel * p.o_stride[3],
                   fminf(fmaxf(x, -p.largest), p.largest));
    }
  }
}

// ---- the producer -------------------------------------------------------------------------------------------------

template <class C>
struct Rings {
  Ring<C::kStages> keys, values;  // with keys comes what smoothing took from their scores
  Ring<C::kQueryBuffers> queries;
  uint32_t* items;  // whose queries are in a buffer, in a word; kNoItem: there are no more
  uint32_t* taken;  // with a mask: the tile in a stage
  static constexpr uint32_t kNoItem = ~0u;

  __device__ __forceinline__ Rings(uint8_t* shared, uint32_t base)
      : keys{base},
        values{base + Ring<C::kStages>::kBytes},
        queries{base + 2 * Ring<C::kStages>::kBytes},
        items(reinterpret_cast<uint32_t*>(shared + C::kItemsAt)),
        taken(reinterpret_cast<uint32_t*>(shared + C::kTakenAt)) {}

  // A number that was told, in each lane; the reduction leaves it where the compiler keeps what a warp shares.
  static __device__ __forceinline__ uint32_t told(uint32_t* number) {
    return __reduce_or_sync(~0u, threadIdx.x % 32 == 0 ? atomicOr(number, 0u) : 0u);
  }

  // Queries and their scales of a block.
  __device__ __forceinline__ void fill_queries(const Sage2Packed& packed, uint32_t shared, uint32_t buffer,
                                               int64_t block) const {
    ptx::barrier_expect(queries.full(buffer), C::kQueryBytes + C::kScaleBytes);
    ptx::copy_bulk(shared + C::kQueryAt + buffer * C::kQueryBytes, packed.q + block * C::kQueryBytes, C::kQueryBytes,
                   queries.full(buffer));
    ptx::copy_bulk(shared + C::kScalesAt + buffer * C::kScaleBytes, packed.q_scales + block * (kBlockM / 2),
                   C::kScaleBytes, queries.full(buffer));
  }
};

template <class C>
__device__ __forceinline__ void copy_tiles(const Sage2Params& p, uint32_t shared, const Rings<C>& rings) {
  Slot<C::kStages> slot;
  Slot<C::kQueryBuffers> query;
  // Hands over an item; its queries come where it has tiles.
  const auto claim = [&](uint32_t index) {
    ptx::barrier_wait(rings.queries.empty(query.index), query.parity ^ 1);
    Item item = {};
    uint32_t word = index;
    if (index != rings.kNoItem) {
      item = item_at<C>(p, index);
      word |= bad_keys(p, item);
    }
    atomicExch(rings.items + query.index, word);  // atomic for racecheck, which does not follow barriers like these
    if (item.end_tile > item.first_tile) {
      rings.fill_queries(p.packed, shared, query.index,
                         static_cast<int64_t>(item.plane) * p.q_blocks.divisor + item.block);
    } else {
      ptx::barrier_arrive(rings.queries.full(query.index));
    }
    query.next();
  };
  // Whoever is free takes the next item. (The reduction, of one lane, keeps it where a warp shares numbers.)
  const auto take_item = [&] {
    const uint32_t index = __reduce_or_sync(1u, atomicAdd(p.packed.next_item, 1)) + gridDim.x;
    return index < p.items ? index : rings.kNoItem;
  };
  uint32_t index = blockIdx.x;
  if (C::kAhead) claim(index);
  while (index != rings.kNoItem) {
    const Item item = item_at<C>(p, index);
    const int64_t first_tile = static_cast<int64_t>(item.kv_plane) * p.tiles;
    const int8_t* const keys = p.packed.k + first_tile * C::kKeyBytes;
    const uint8_t* const values = p.packed.v + first_tile * (C::kBlockN * C::kHeadDim);
    const int64_t block = static_cast<int64_t>(item.plane) * p.q_blocks.divisor + item.block;
    // With two buffers the next item is claimed some tiles before this one ends, and nobody waits for it. When all
    // stages hold tiles of this item, the one before has left its buffer; with fewer tiles, claiming waits for that.
    const int claims_at = min(item.end_tile - 1 - C::kStages, item.first_tile + C::kClaimTiles - 1);
    if (!C::kAhead && item.end_tile <= item.first_tile) claim(index);
    for (int tile = item.end_tile - 1; tile >= item.first_tile; tile--) {
      const uint32_t i = slot.index;
      ptx::barrier_wait(rings.keys.empty(i), slot.parity ^ 1);
      ptx::barrier_expect(rings.keys.full(i), C::kKeyBytes + C::kShiftBytes);
      ptx::copy_bulk(shared + C::kKeyAt + i * C::kKeyStage, keys + static_cast<int64_t>(tile) * C::kKeyBytes,
                     C::kKeyBytes, rings.keys.full(i));
      if constexpr (C::kSmooth) {
        const uint32_t to = shared + C::kShiftAt + i * C::kShiftBytes;
        const int64_t from = block * p.tiles + tile;
        ptx::copy_bulk(to, p.packed.shifts + from * C::kBlockN, 4 * C::kBlockN, rings.keys.full(i));
        if constexpr (C::kCentred) {
          ptx::copy_bulk(to + C::kPeaksAt, p.packed.shift_peaks + from * C::kPeaks, 4 * C::kPeaks, rings.keys.full(i));
        }
      }
      // After the first keys, which do not wait for the item before.
      if (!C::kAhead && tile == item.end_tile - 1) claim(index);
      ptx::barrier_wait(rings.values.empty(i), slot.parity ^ 1);
      ptx::barrier_expect(rings.values.full(i), C::kBlockN * C::kHeadDim);
      const uint8_t* const from = values + static_cast<int64_t>(tile) * (C::kBlockN * C::kHeadDim);
#pragma unroll
      for (int chunk = 0; chunk < C::kChunks; chunk++) {
        ptx::copy_bulk(shared + C::kValueAt + i * C::kValueStage + chunk * C::kChunkBytes,
                       from + chunk * C::kHeadDim * C::kVWidth, C::kHeadDim * C::kVWidth, rings.values.full(i));
      }
      slot.next();
      if (C::kAhead && tile == claims_at) {
        index = take_item();
        claim(index);
      }
    }
    if (C::kAhead && claims_at >= item.first_tile) continue;
    index = take_item();
    if (C::kAhead) claim(index);
  }
  if (!C::kAhead) claim(rings.kNoItem);
}

// The tiles of an item that a mask does not close, from right to left. A warp looks at several, a tile of the mask a
// lane; that takes few registers, as a warp that copies has few.
template <class C>
struct OpenTiles {
  static constexpr int kParts = C::kBlockN / kMaskTileKeys, kTiles = 32 / kParts;  // of a tile; of a look
  static_assert(kTiles <= kMostMore + 1, "a word counts the tiles of a look");
  const Sage2Params& p;
  uint32_t index;        // of the item
  int right, unseen;     // the first tile of the last look; how many are left of all looks
  uint32_t untaken = 0;  // of that look, kParts bits a tile: some row sees some key, every row every key

  __device__ __forceinline__ OpenTiles(const Sage2Params& p, uint32_t index) : p(p), index(index) {
    const Item item = item_at<C>(p, index);
    right = item.end_tile - 1 + kTiles;
    unseen = item.end_tile - item.first_tile;
    look();
  }

  __device__ __forceinline__ bool are_left() const { return untaken != 0; }

  // The next of them, and the open ones that follow it, in its word.
  __device__ __forceinline__ uint32_t take() {
    const int at = __ffs(static_cast<int>(untaken)) - 1;
    const bool open = untaken >> at & 2;
    const uint32_t others = untaken >> at ^ 3 * firsts();
    const int many = !open ? 1 : others != 0 ? (__ffs(static_cast<int>(others)) - 1) / kParts : kTiles;
    const uint32_t tile = static_cast<uint32_t>(right - at / kParts), more = static_cast<uint32_t>(many - 1);
    const uint32_t word = tile * kTakenTile + more * kTakenMore + (open ? kTakenOpen : 0);
    untaken &= __funnelshift_lc(0u, ~0u, at + many * kParts);
    look();
    return are_left() ? word : word | kTakenLast;
  }

 private:
  static __device__ constexpr uint32_t firsts() {
    uint32_t bits = 0;
    for (int tile = 0; tile < kTiles; tile++) bits |= 1u << tile * kParts;
    return bits;
  }

  __device__ __forceinline__ void look() {
#pragma unroll 1
    while (untaken == 0 && unseen > 0) {
      const Item item = item_at<C>(p, index);
      right -= kTiles;
      const int lane = threadIdx.x % 32, column = (right + 1) * kParts - 1 - lane;
      const bool there = lane < min(unseen, kTiles) * kParts && column < p.mask.columns;
      TileState state = TileState::kClosed;
      if (there) state = p.mask.at(p.mask.plane(item.batch, item.head), item.block, column);
      uint32_t some = __ballot_sync(~0u, state != TileState::kClosed);
      uint32_t every = __ballot_sync(~0u, !there || state == TileState::kOpen);
#pragma unroll
      for (int part = 1; part < kParts; part++) some |= some >> 1, every &= every >> 1;
      some &= firsts();
      untaken = some | (some & every) << 1;
      unseen -= kTiles;
    }
  }
};

// With a mask: a warp finds the tiles, and its first lane copies them.
template <class C>
__device__ __forceinline__ void copy_open_tiles(const Sage2Params& p, uint32_t shared, const Rings<C>& rings) {
  const bool leads = threadIdx.x % 32 == 0;
  uint32_t i = 0, turns = 0;  // the stage; its parity, and above that bit the items so far
  const auto buffer = [&] { return turns / 2 % C::kQueryBuffers; };
  const auto take_query_buffer = [&](uint32_t word) {
    ptx::barrier_wait(rings.queries.empty(buffer()), (turns / 2 / C::kQueryBuffers & 1) ^ 1);
    atomicExch(rings.items + buffer(), word);
  };
  const auto copy = [&](uint32_t index, uint32_t tile, uint32_t word, bool first) {
    const int64_t from = static_cast<int64_t>(tile) * C::kKeyBytes;
    ptx::barrier_wait(rings.keys.empty(i), (turns & 1) ^ 1);
    atomicExch(rings.taken + i, word);
    ptx::barrier_expect(rings.keys.full(i), C::kKeyBytes);
    ptx::copy_bulk(shared + C::kKeyAt + i * C::kKeyStage, p.packed.k + from, C::kKeyBytes, rings.keys.full(i));
    if (first) {
      const Item item = item_at<C>(p, index);
      const int64_t block = static_cast<int64_t>(item.plane) * p.q_blocks.divisor + item.block;
      take_query_buffer(index);
      rings.fill_queries(p.packed, shared, buffer(), block);
    }
    ptx::barrier_wait(rings.values.empty(i), (turns & 1) ^ 1);
    ptx::barrier_expect(rings.values.full(i), C::kKeyBytes);
#pragma unroll
    for (int chunk = 0; chunk < C::kChunks; chunk++) {
      constexpr int kBytes = C::kHeadDim * C::kVWidth;
      ptx::copy_bulk(shared + C::kValueAt + i * C::kValueStage + chunk * C::kChunkBytes,
                     p.packed.v + from + chunk * kBytes, kBytes, rings.values.full(i));
    }
    if (++i == C::kStages) i = 0, turns ^= 1;
  };
  for (uint32_t index = blockIdx.x; index < p.items;) {
    OpenTiles<C> tiles(p, index);
    if (!tiles.are_left() && leads) {
      take_query_buffer(index | kNoTiles);
      ptx::barrier_arrive(rings.queries.full(buffer()));
    }
#pragma unroll 1
    for (bool first = true; tiles.are_left(); first = false) {
      uint32_t word = tiles.take();
      if (!leads) continue;
      const uint32_t plane = item_at<C>(p, index).kv_plane * p.tiles;
      copy(index, plane + word / kTakenTile, word, first);
#pragma unroll 1
      while (word & kMostMore * kTakenMore) {
        word -= kTakenTile + kTakenMore;
        copy(index, plane + word / kTakenTile, word, false);
      }
    }
    turns += 2;
    index = __reduce_or_sync(~0u, leads ? static_cast<uint32_t>(atomicAdd(p.packed.next_item, 1)) : 0u) + gridDim.x;
  }
  if (!leads) return;
  take_query_buffer(rings.kNoItem);
  ptx::barrier_arrive(rings.queries.full(buffer()));
}

// ---- a warpgroup that multiplies ------------------------------------------------------------------------------------

template <class C>
__device__ __forceinline__ void multiply_items(const Sage2Params& p, uint8_t* shared, uint32_t base,
                                               const Rings<C>& rings, int group) {
  const int lane = threadIdx.x % 32;
  const uint64_t key_tiles = ptx::tile_descriptor<C::kPanelWidth>() | (base + C::kKeyAt) >> 4;
  const uint64_t value_tiles = ptx::tile_descriptor<C::kVWidth>() | (base + C::kValueAt) >> 4;
  const uint64_t query_tiles =
      ptx::tile_descriptor<C::kPanelWidth>() | (base + C::kQueryAt + group * 64 * C::kPanelWidth) >> 4;
  const uint64_t ones = ptx::tile_descriptor<32>() | (base + C::kOnesAt) >> 4;
  const auto done = [&](uint32_t barrier) {
    if (lane == 0) ptx::barrier_arrive(barrier);
  };
  const auto release_queries = [&](uint32_t buffer) {
    __syncwarp();  // every lane has read whose queries they are
    done(rings.queries.empty(buffer));
  };
  const auto wait_turn = [&] {
    if (C::kTurns) ptx::turn_wait<128 * kGroups>(1 + group);
  };
  const auto pass_turn = [&] {
    if (C::kTurns) ptx::turn_pass<128 * kGroups>(1 + (group + 1) % kGroups);
  };
  uint8_t* const totals = shared + C::kTotalAt + group * 64 * C::kHeadDim * C::kTotalBytes;
  Total<C> total;
  total.at = totals + threadIdx.x % 128 * 4 * C::kTotalBytes;
  total.rows = reinterpret_cast<float2*>(shared + C::kRowsAt) + row_of_block();
  Slot<C::kStages> slot;
  Slot<C::kQueryBuffers> query;
  if (C::kTurns && group == kGroups - 1) ptx::turn_pass<128 * kGroups>(1);

  // With a mask: which tile the producer says is in the slot.
  const auto take_tile = [&](Course<C>& of) {
    if constexpr (C::kBoolMask) {
      of.take(p, [&] { return rings.told(rings.taken + slot.index); });
    }
  };

  int s[C::kScores];
  // Scores of the first tile, where there is one; else of whatever lies there, which nobody will read.
  const auto issue_first = [&](const Course<C>& of) {
    if (of.tile >= 0) ptx::barrier_wait(rings.keys.full(slot.index), slot.parity);
    if constexpr (C::kCentred) centre_scores<C>(s);
    wait_turn();
    ptx::product_fence();
    issue_scores<C>(s, query_tiles + query.index * (C::kQueryBytes >> 4), key_tiles + slot.index * (C::kKeyStage >> 4));
    pass_turn();
  };

  const auto next_course = [&] {
    ptx::barrier_wait(rings.queries.full(query.index), query.parity);
    return Course<C>(p, rings.told(rings.items + query.index),
                     reinterpret_cast<const float*>(shared + C::kScalesAt + query.index * C::kScaleBytes));
  };

  const auto shifts_of = [&](const Slot<C::kStages>& of) -> Shifts {
    if constexpr (!C::kSmooth) return {};
    return {reinterpret_cast<const float*>(shared + C::kShiftAt + of.index * C::kShiftBytes)};
  };
  // The tile in a slot has been multiplied (with smoothing: has become P).
  const auto release_keys = [&](uint32_t stage) {
    if (C::kSmooth) __syncwarp();  // every lane has read what smoothing took
    done(rings.keys.empty(stage));
  };

  Course<C> course = next_course();
  if (C::kAhead) {
    issue_first(course);
    ptx::product_wait<0>();
    ptx::pin(s);
  }
  while (course.index < p.items) {
    const uint32_t index = course.index;
    Output<C> o[C::kOutputRegisters] = {}, sums[C::kSumRegisters] = {};
    float average[C::kOutputs] = {}, centred[2] = {};
    RowState state;
    Crowd<C> crowd;
    total.used = false;
    if (!C::kAhead) {
      issue_first(course);
      ptx::product_wait<0>();
      ptx::pin(s);
    }
    if (course.tile >= 0) {
      uint32_t weights[C::kWeights];
      float rescale[2];
      take_tile(course);
      if (!C::kSmooth) release_keys(slot.index);
      {
        Exponentials<C> e;
        if constexpr (C::kCentred) {
          softmax_centred<C>(p, s, e, state, course, shifts_of(slot), true, rescale);
        } else {
          softmax<C>(p, s, e, state, course, shifts_of(slot), true, rescale);
        }
        if (C::kSmooth) release_keys(slot.index);
        e.store(weights);
      }
      slot.next();
      int summed = 0;  // tiles in O
      const auto row_sum = [&](int half) {
        return C::kOnesInV ? output_at(o, C::kOutputs - 4 + 2 * half) : output_at(sums, 2 * half);
      };
      const auto take_sums = [&] {
        state.sum[0] += row_sum(0), state.sum[1] += row_sum(1);
        if (C::kHalfSums) crowd.add(row_sum(0), row_sum(1));
        // A write to part of an accumulator that no condition guards would make the compiler serialize products.
        if (C::kOnesInV && p.k_tokens > 0) {
#pragma unroll
          for (int i = 1; i <= C::kSumRegisters; i++) o[C::kOutputRegisters - i] = 0;
        }
      };

#pragma unroll 1
      while (course.next()) {
        Exponentials<C> e;
        ptx::barrier_wait(rings.keys.full(slot.index), slot.parity);
        take_tile(course);
        [[maybe_unused]] bool misfit = false;
        if constexpr (C::kCentred) {
          const float factor = course.next_factor();
          misfit = any_misfit<C>(factor, shifts_of(slot));
          start_scores<C>(s, misfit ? 0.0f : ptx::reciprocal(factor), shifts_of(slot));
        }
        wait_turn();
        ptx::pin(weights);
        ptx::product_fence();
        issue_scores<C>(s, query_tiles + query.index * (C::kQueryBytes >> 4),
                        key_tiles + slot.index * (C::kKeyStage >> 4));
        const Slot<C::kStages> before = slot.previous();
        ptx::barrier_wait(rings.values.full(before.index), before.parity);
        issue_values<C>(o, sums, weights, value_tiles + before.index * (C::kValueStage >> 4), ones, summed++);
        pass_turn();
        ptx::product_wait<1>();
        ptx::pin(s);
        if (!C::kSmooth) release_keys(slot.index);
        bool moved;
        if constexpr (C::kCentred) {
          moved = softmax_centred<C>(p, s, e, state, course, shifts_of(slot), misfit, rescale);
        } else {
          moved = softmax<C>(p, s, e, state, course, shifts_of(slot), false, rescale);
        }
        if (C::kSmooth) release_keys(slot.index);

        ptx::product_wait<0>();
        ptx::pin(e.bits);
        ptx::pin(o);
        ptx::pin(sums);
        done(rings.values.empty(slot.previous().index));
        take_sums();
        e.store(weights);
        if (moved) {
          scale_outputs<C>(o, rescale);
          state.sum[0] *= rescale[0], state.sum[1] *= rescale[1];
        }
        if constexpr (C::kHalfSums) {
          if (crowd.leaves(o, summed)) {
            total.add(o, state);
            crowd.bound = 0.0f;
#pragma unroll
            for (int i = 0; i < C::kOutputRegisters; i++) o[i] = 0;
          }
        } else if (summed % C::kTestTiles == 0 && drifts<C>(o, state, summed * C::kBlockN, group)) {
          total.add(o, state);
          summed = 0;
        }
        slot.next();
      }

      release_queries(query.index);
      query.next();
      const Slot<C::kStages> before = slot.previous();
      ptx::barrier_wait(rings.values.full(before.index), before.parity);
      ptx::pin(weights);
      ptx::product_fence();
      issue_values<C>(o, sums, weights, value_tiles + before.index * (C::kValueStage >> 4), ones, summed);
      [[maybe_unused]] bool ends_at_first_key = false;
      if constexpr (C::kBoolMask) ends_at_first_key = course.tile == 0;
      if (C::kAhead) {
        course = next_course();
        issue_first(course);
        ptx::product_wait<1>();
      } else {
        ptx::product_wait<0>();
      }
      ptx::pin(o);
      ptx::pin(sums);
      done(rings.values.empty(before.index));
      const bool ends_at_first = C::kBoolMask ? ends_at_first_key : item_at<C>(p, index).first_tile == 0;
      const float first[2] = {row_sum(0), row_sum(1)};
      take_sums();
#pragma unroll
      for (int i = 0; i < C::kOutputs; i++) average[i] = output_at(o, i);
      total.finish(average, state);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const float rest = state.sum[half] - (ends_at_first ? first[half] : 0.0f);
        centred[half] = p.whole_mean ? 1.0f : state.sum[half] > 0.0f ? rest * ptx::reciprocal(state.sum[half]) : 0.0f;
      }
    } else {
      release_queries(query.index);
      query.next();
      if (C::kAhead) {
        course = next_course();
        issue_first(course);
      }
    }
    const Item item = item_at<C>(p, index);
    store_rows<C>(p, item, average, state, centred, item.block * kBlockM + row_of_block(), totals);
    if (C::kAhead) {
      ptx::product_wait<0>();
      ptx::pin(s);
    } else {
      course = next_course();
    }
  }
}

template <class C>
__device__ __forceinline__ void write_ones(uint8_t* shared) {
  constexpr uint32_t kOnes = 0x38383838u;  // 1.0 in e4m3
  if constexpr (C::kOnesInV) {
    constexpr int kWords = 8 * C::kVWidth / 4;
    for (int i = threadIdx.x; i < C::kStages * C::kChunks * kWords; i += kThreads) {
      const int chunk = i / kWords, at = chunk / C::kChunks * C::kValueStage + chunk % C::kChunks * C::kChunkBytes;
      reinterpret_cast<uint32_t*>(shared + C::kValueAt + at + C::kHeadDim * C::kVWidth)[i % kWords] = kOnes;
    }
  } else {
    for (int i = threadIdx.x; i < 64; i += kThreads) reinterpret_cast<uint32_t*>(shared + C::kOnesAt)[i] = kOnes;
  }
  ptx::async_proxy_fence();
}

template <class C>
__global__ void __launch_bounds__(kThreads, 1) sage2_kernel(const __grid_constant__ Sage2Params p) {
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
  const Rings<C> rings(shared, base);
  if (threadIdx.x == 0) {
    rings.keys.create();
    rings.values.create();
    rings.queries.create();
    ptx::barrier_init_fence();
  }
  write_ones<C>(shared);
  __syncthreads();
  ptx::wait_for_previous_kernel();
  if (p.whole_mask.tiles != nullptr && p.whole_mask.is_open() == C::kBoolMask) return;

  if (group == kGroups) {
    ptx::shrink_registers<24>();
    if constexpr (C::kBoolMask) {
      if (threadIdx.x / 32 == 4 * kGroups) copy_open_tiles<C>(p, base, rings);
    } else {
      if (threadIdx.x == 128 * kGroups) copy_tiles<C>(p, base, rings);
    }
  } else {
    ptx::grow_registers<C::kRegisters>();
    multiply_items<C>(p, shared, base, rings, group);
  }
}

// As many blocks as there are multiprocessors, if there are so many items.
template <class Params>
void launch_items(void (*kernel)(Params), int shared_bytes, uint32_t items, cudaStream_t stream, const Params& params) {
  int device = 0, multiprocessors = 0;
  SAGE_CUDA(cudaGetDevice(&device));
  SAGE_CUDA(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  SAGE_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  const unsigned blocks = std::min(static_cast<unsigned>(multiprocessors), items);
  launch_overlapped(kernel, blocks, kThreads, shared_bytes, stream, params);
}

}  // namespace sage::cuda::sm90::sage2
