// sage2 with the precision band on sm_90a: a causal item's first keys and those about its diagonal go through 16-bit
// products, from the raw tensors, and all others through those of sage2_attention.cuh, in one softmax.
//
// The others come first, so that their weights keep what range FP8 has, whatever the band holds. Their O, in V's own
// units, is what the band's products are added to. A tile of the band has 64 keys, and as many bytes as one of 128 in
// INT8 or FP8: both go through the same rings.
#pragma once

#include "../ptx/tensor.cuh"
#include "sage2_attention.cuh"
#include "tensor_map.h"

namespace sage::cuda::sm90::band {

using namespace sage2;

constexpr int kBandKeys = 64;                                     // of a tile of the band
constexpr int kSinkTiles = 2;                                     // of them that every row has, the first ones
constexpr int kWidth = 128;                                       // bytes of a row of 64 channels: panels of Q, K and V
constexpr int kQueryPanel = 64 * kWidth;                          // of the 64 queries of a warpgroup
constexpr int kScores = kBandKeys / 2, kWeights = kBandKeys / 4;  // registers

struct BandParams {
  CUtensorMap q, k, v;  // boxes of 64 channels: of 64 queries, of kBandKeys keys and values
  Sage2Params sage2;
  float factor;  // scale * log2(e)
  int head_dim;
};

// The sums of exact exponentials cost little: one instance serves calls with a log-sum-exp and without.
template <int kHeadDim, bool kFast, ptx::Half kHalf_>
struct BandConfig : Sage2Config<kHeadDim, kFast, false, !kFast, true> {
  static constexpr ptx::Half kHalf = kHalf_;
  // The first tile of INT8 and FP8 that is not all in the band.
  static constexpr int kFirstLow = kSinkTiles * kBandKeys / sage2_tiles(kHeadDim, kFast, true).block_n;
  static constexpr int kPanels16 = kHeadDim / 64, kTileBytes16 = kBandKeys * kHeadDim * 2;
  // As in Sage2Config; nor is there room for a second number of scores beside 256 channels.
  static constexpr bool kAhead = kHeadDim < 256;
  // P of 16 bits is also scaled by 2^-kShift, so that bf16 values of 3e38 have finite sums.
  static constexpr int kShift = kHalf == ptx::Half::kBF16 ? 30 : 0;
  static constexpr float kShrunk = 1.0f / (1 << kShift);
};

// ---- items --------------------------------------------------------------------------------------------------------

// Key tiles of kBandKeys. For 64 rows those are in the band that hold one of the last 65 keys that any of them sees,
// and the first ones: where diagonal and tiles meet, the tile of the rows themselves and the one before it. That is
// what numerics.h has for 128 rows, and more.
struct Rows64 {
  int first, last;  // of those about the diagonal

  __device__ __forceinline__ Rows64(const Sage2Params& p, int row) {
    first = max(last_key(p, row) - kBandKeys, 0) / kBandKeys;
    last = max(last_key(p, min(row + 63, p.q_tokens - 1)), 0) / kBandKeys;
  }
};

// Those of an item: the first ones, and those about the diagonal of its rows.
struct Parts {
  int diagonal;   // the first of the latter
  int tiles;      // of the band
  int low_tiles;  // of INT8 and FP8: kFirstLow and on, to the last key that is outside of the band for some row

  template <class C>
  static __device__ __forceinline__ Parts of(const Sage2Params& p, int block) {
    const int row = block * kBlockM;
    const Rows64 upper(p, row), lower(p, row + 64);
    const bool seen = last_key(p, min(row + kBlockM, p.q_tokens) - 1) >= 0;
    Parts parts;
    parts.diagonal = shared_by_warp(upper.first);
    parts.tiles =
        shared_by_warp(seen ? max(upper.last, lower.last) + 1 - upper.first + min(upper.first, kSinkTiles) : 0);
    const int end = (lower.first * kBandKeys + C::kBlockN - 1) / C::kBlockN;
    parts.low_tiles = shared_by_warp(lower.first <= kSinkTiles ? 0 : end - C::kFirstLow);
    return parts;
  }
  // The first keys first, so that every row has a maximum.
  __device__ __forceinline__ int tile(int i) const {
    return i < kSinkTiles ? i : diagonal + i - min(diagonal, kSinkTiles);
  }
};

// An item as one lane sees it; `tile` counts those of INT8 and FP8.
template <class C>
struct BandCourse : Course<C> {
  Parts parts;
  int own_first, own_last;  // tiles of the band about the diagonal, for the rows of this warpgroup
  bool bad_values;          // a value of the plane is not finite

  __device__ __forceinline__ BandCourse(const Sage2Params& p, uint32_t index, int group) {
    this->index = index;
    parts.tiles = 0;
    if (index >= p.items) return;
    const Item item = item_at<C>(p, index);
    this->first_row = item.block * kBlockM;
    parts = Parts::of<C>(p, item.block);
    if (parts.tiles == 0) return;
    const uint32_t flags = __ldg(p.packed.flags + item.kv_plane);
    const Rows64 own(p, this->first_row + group * 64);
    own_first = shared_by_warp(own.first), own_last = shared_by_warp(own.last);
    this->tile = parts.low_tiles - 1;
    this->first_key = C::kFirstLow * C::kBlockN;
    this->first_tile = item.kv_plane * p.tiles + C::kFirstLow;
    const int64_t sixteen = (static_cast<int64_t>(item.plane) * p.q_blocks.divisor + item.block) * 8 + threadIdx.x / 32;
    this->q_scale = __ldg(p.packed.q_scales + sixteen * 8 + threadIdx.x % 32 / 4);
    if (this->tile >= 0) this->next_k_scale = this->key_scale(p, this->tile);
    const uint32_t shared_flags = __reduce_or_sync(~0u, flags);
    this->last_open = shared_flags & kKeyFlag ? Course<C>::kFlagged : 0;
    bad_values = shared_flags & kValueFlag;
  }
  __device__ __forceinline__ bool bad_keys() const { return this->last_open == Course<C>::kFlagged; }
  __device__ __forceinline__ bool in_band(int tile) const { return tile < kSinkTiles || tile >= own_first; }
};

// ---- the two products of a tile of the band -------------------------------------------------------------------------

template <class C>
__device__ __forceinline__ void issue_band_scores(float (&s)[kScores], uint64_t q, uint64_t k) {
#pragma unroll
  for (int panel = 0; panel < C::kPanels16; panel++) {
#pragma unroll
    for (int step = 0; step < 4; step++) {
      const uint64_t a = q + (panel * kQueryPanel >> 4) + 2 * step;
      const uint64_t b = k + (panel * kBandKeys * kWidth >> 4) + 2 * step;
      if (panel == 0 && step == 0) {
        ptx::HalfScoreProduct<C::kHalf, kBandKeys>::template issue<false>(s, a, b);
      } else {
        ptx::HalfScoreProduct<C::kHalf, kBandKeys>::template issue<true>(s, a, b);
      }
    }
  }
  ptx::product_commit();
}

template <class C>
__device__ __forceinline__ void issue_band_values(float (&o)[C::kOutputs], const uint32_t (&weights)[kWeights],
                                                  uint64_t v) {
  auto& sums = reinterpret_cast<float(&)[C::kHeadDim / 2]>(o);
#pragma unroll
  for (int step = 0; step < kBandKeys / 16; step++) {
    ptx::HalfValueProduct<C::kHalf, C::kHeadDim>::issue(sums, weights + 4 * step, v + (step * 16 * kWidth >> 4), 1);
  }
  ptx::product_commit();
}

// ---- values that are not finite: zeros here, and repair_sage2 puts them in ------------------------------------------

// By all threads of a warpgroup, each on its own: both may write the same zeros.
template <class C>
__device__ __forceinline__ void clear_not_finite(uint32_t tile, int group) {
  constexpr uint32_t kExponent = C::kHalf == ptx::Half::kF16 ? 0x7c007c00u : 0x7f807f80u;
  constexpr uint32_t kUnit = C::kHalf == ptx::Half::kF16 ? 0x04000400u : 0x00800080u;  // carries into the sign
#pragma unroll 1
  for (int i = threadIdx.x % 128; i < C::kTileBytes16 / 4; i += 128) {
    uint32_t word;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(word) : "r"(tile + 4 * i) : "memory");
    const uint32_t bad = ((word & kExponent) + kUnit) & 0x80008000u;
    if (bad == 0) continue;
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(tile + 4 * i), "r"(word & ~((bad >> 15) * 0xffffu)) : "memory");
  }
  ptx::async_proxy_fence();
  ptx::any_of_warpgroup(3 + group, false);
}

// ---- softmax ------------------------------------------------------------------------------------------------------

template <ptx::Half kHalf>
__device__ __forceinline__ float2 unpack_pair(uint32_t pair) {
  if constexpr (kHalf == ptx::Half::kF16) return __half22float2(*reinterpret_cast<const __half2*>(&pair));
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&pair));
}

__device__ __forceinline__ float sum_of_quad(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// What the smoothed keys' scores lack, for rows g and g + 8: factor * q . k_mean. `queries` is the warp's first row.
template <class C>
__device__ __forceinline__ void scores_of_mean(const BandParams& p, uint32_t queries, uint32_t kv_plane,
                                               float (&scores)[2]) {
  scores[0] = scores[1] = 0.0f;
  if (p.sage2.packed.k_mean == nullptr) return;
  const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
  const float* const mean = p.sage2.packed.k_mean + static_cast<int64_t>(kv_plane) * p.head_dim;
#pragma unroll
  for (int i = 0; i < C::kHeadDim / 32; i++) {
    const int chunk = 4 * i + c;  // of 8 channels
    uint4 octet[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const uint32_t at = queries + chunk / 8 * kQueryPanel + (g + 8 * half) * kWidth + ((chunk % 8) ^ g) * 16;
      asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(octet[half].x), "=r"(octet[half].y), "=r"(octet[half].z), "=r"(octet[half].w)
                   : "r"(at)
                   : "memory");
    }
    const uint32_t words[2][4] = {{octet[0].x, octet[0].y, octet[0].z, octet[0].w},
                                  {octet[1].x, octet[1].y, octet[1].z, octet[1].w}};
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const int channel = 8 * chunk + 2 * j;
      const float low = channel < p.head_dim ? __ldg(mean + channel) : 0.0f;
      const float high = channel + 1 < p.head_dim ? __ldg(mean + channel + 1) : 0.0f;
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const float2 q = unpack_pair<C::kHalf>(words[half][j]);
        scores[half] = fmaf(q.x, low, fmaf(q.y, high, scores[half]));
      }
    }
  }
#pragma unroll
  for (int half = 0; half < 2; half++) scores[half] = sum_of_quad(scores[half]) * p.factor;
}

// Scores of a tile of the band become its P; `sum` is that of the lane's columns. Whether maxima moved.
template <class C>
__device__ __forceinline__ bool softmax_band(const BandParams& p, float (&s)[kScores], RowState& state, float (&sum)[2],
                                             const float (&of_mean)[2], const BandCourse<C>& course, int tile,
                                             float (&rescale)[2]) {
  const int first = tile * kBandKeys + 2 * (threadIdx.x % 4), row = course.first_row + row_of_block();
  if (tile >= course.own_first) {
    const int limit[2] = {last_key(p.sage2, row) - first, last_key(p.sage2, row + 8) - first};
#pragma unroll
    for (int i = 0; i < kScores; i++) {
      if (i / 4 * 8 + (i & 1) > limit[i >> 1 & 1]) s[i] = -INFINITY;
    }
  }
  if (course.bad_keys()) {
    const uint32_t* const bits = p.sage2.packed.k_bits +
                                 static_cast<int64_t>(course.first_tile - C::kFirstLow) * (C::kBlockN / 32) +
                                 tile * (kBandKeys / 32);
#pragma unroll
    for (int word = 0; word < kBandKeys / 32; word++) {
      const bool exists = tile * (kBandKeys / 32) + word < p.sage2.tiles * (C::kBlockN / 32);
      const uint32_t bad = exists ? __ldg(bits + word) >> first % 8 : 0;
#pragma unroll
      for (int i = 0; i < 16; i++) {
        if (bad >> (i / 4 * 8 + (i & 1)) & 1) s[16 * word + i] = -INFINITY;
      }
    }
  }
  float largest[2] = {s[0], s[2]};
#pragma unroll
  for (int i = 0; i < kScores; i++) largest[i >> 1 & 1] = fmaxf(largest[i >> 1 & 1], s[i]);
#pragma unroll
  for (int half = 0; half < 2; half++) largest[half] = fmaf(largest[half], p.factor, -of_mean[half]);
  keep_maxima<C>(state, largest, rescale);
  float addend[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    sum[half] *= rescale[half];
    if (C::kSums) state.exact[half] *= rescale[half];  // of the other keys; in the end, what they lack in `sum`
    addend[half] = addend_of<C>(state.maximum[half]) - of_mean[half] - C::kShift;
  }
#pragma unroll
  for (int i = 0; i < kScores; i++) {
    const int half = i >> 1 & 1;
    s[i] = ptx::exp2_approx(fmaf(s[i], p.factor, addend[half]));
    sum[half] += s[i];
  }
  return moves(rescale);
}

// P of a tile of INT8 scores. Every row sees all keys of it that are not in the band.
template <class C>
__device__ __forceinline__ bool softmax_low(const Sage2Params& p, int (&s)[C::kScores], Exponentials<C>& e,
                                            RowState& state, BandCourse<C>& course, bool first_of_item,
                                            float (&rescale)[2]) {
  constexpr int kTiles = C::kBlockN / kBandKeys;
  const float factor = course.factor(p);
  const int first = (course.tile + C::kFirstLow) * kTiles;
  const bool hidden = course.in_band(first) || course.in_band(first + kTiles - 1), flagged = course.bad_keys();
  if (hidden) {
#pragma unroll
    for (int tile = 0; tile < kTiles; tile++) {
      const bool masked = course.in_band(first + tile);
#pragma unroll
      for (int i = kScores * tile; i < kScores * (tile + 1); i++) s[i] = masked ? kMasked : s[i];
    }
  }
  bool any = flagged;
  if (C::kFast || hidden) {
    any |= __any_sync(~0u, !(factor >= kLeastFactor && (!C::kFast || factor < kMostFactor)));
  }
  if (any) {
    if (flagged) mask_flagged<C>(p, s, course);
    return softmax_whole<C, true>(s, e, state, factor, Shifts{}, rescale);
  }
  if constexpr (C::kFast) {
    return softmax_codes<C>(s, e, state, factor, first_of_item, rescale);
  } else {
    return softmax_exact<C>(s, e, state, factor, Shifts{}, false, rescale);
  }
}

__device__ __forceinline__ void pack_weights(uint32_t (&weights)[kWeights], const float (&s)[kScores], bool f16) {
#pragma unroll
  for (int i = 0; i < kWeights; i++) weights[i] = pack_output(f16, s[2 * i], s[2 * i + 1]);
}

// ---- the producer -------------------------------------------------------------------------------------------------

template <class C>
struct BandRings : Rings<C> {
  Ring<1> band_queries;

  __device__ __forceinline__ BandRings(uint8_t* shared, uint32_t base)
      : Rings<C>(shared, base), band_queries{base + 2 * Ring<C::kStages>::kBytes + Ring<C::kQueryBuffers>::kBytes} {}
};

template <class C>
__device__ __forceinline__ void copy_tiles(const BandParams& params, uint32_t shared, const BandRings<C>& rings) {
  const Sage2Params& p = params.sage2;
  Slot<C::kStages> slot;
  Slot<1> query;  // of the next item
  const auto take_query_buffer = [&](uint32_t index) {
    ptx::barrier_wait(rings.queries.empty(0), query.parity ^ 1);
    atomicExch(rings.items, index);  // atomic for racecheck, which does not follow barriers like these
    query.next();
  };
  for (uint32_t index = blockIdx.x; index < p.items;) {
    const Item item = item_at<C>(p, index);
    const Parts parts = Parts::of<C>(p, item.block);
    const int64_t first_tile = static_cast<int64_t>(item.kv_plane) * p.tiles + C::kFirstLow;
    // Every item has a turn of these, with or without a band.
    const auto copy_band_queries = [&] {
      // Empty: of the queries of the item before, or of the total of this one.
      ptx::barrier_wait(rings.band_queries.empty(0), C::kAfterTotal ? query.parity ^ 1 : query.parity);
      if (parts.tiles == 0) return ptx::barrier_arrive(rings.band_queries.full(0));
      ptx::barrier_expect(rings.band_queries.full(0), C::kBandQueryBytes);
#pragma unroll
      for (int i = 0; i < kGroups * C::kPanels16; i++) {
        const int group = i / C::kPanels16, panel = i % C::kPanels16;
        ptx::copy_box(shared + C::kBandQueryAt + i * kQueryPanel, params.q, panel * 64,
                      item.block * kBlockM + group * 64, item.head, item.batch, rings.band_queries.full(0));
      }
    };
    for (int tile = parts.low_tiles - 1; tile >= 0; tile--) {
      const uint32_t i = slot.index;
      ptx::barrier_wait(rings.keys.empty(i), slot.parity ^ 1);
      ptx::barrier_expect(rings.keys.full(i), C::kKeyBytes);
      ptx::copy_bulk(shared + C::kKeyAt + i * C::kKeyStage, p.packed.k + (first_tile + tile) * C::kKeyBytes,
                     C::kKeyBytes, rings.keys.full(i));
      if (tile == parts.low_tiles - 1) {  // after the first keys: they do not wait for the item before
        take_query_buffer(index);
        ptx::barrier_expect(rings.queries.full(0), C::kQueryBytes);
        ptx::copy_bulk(
            shared + C::kQueryAt,
            p.packed.q + (static_cast<int64_t>(item.plane) * p.q_blocks.divisor + item.block) * C::kQueryBytes,
            C::kQueryBytes, rings.queries.full(0));
      }
      ptx::barrier_wait(rings.values.empty(i), slot.parity ^ 1);
      ptx::barrier_expect(rings.values.full(i), C::kBlockN * C::kHeadDim);
      const uint8_t* const from = p.packed.v + (first_tile + tile) * (C::kBlockN * C::kHeadDim);
#pragma unroll
      for (int chunk = 0; chunk < C::kChunks; chunk++) {
        ptx::copy_bulk(shared + C::kValueAt + i * C::kValueStage + chunk * C::kChunkBytes,
                       from + chunk * C::kHeadDim * C::kVWidth, C::kHeadDim * C::kVWidth, rings.values.full(i));
      }
      slot.next();
      // When all stages hold this item's tiles, those of the item before are done with their queries.
      if (!C::kAfterTotal && tile == max(parts.low_tiles - C::kStages, 0)) copy_band_queries();
    }
    if (parts.low_tiles == 0) {
      take_query_buffer(index);
      ptx::barrier_arrive(rings.queries.full(0));
      if (!C::kAfterTotal || parts.tiles == 0) copy_band_queries();
    }
    const int kv_head = static_cast<int>(item.kv_plane) - item.batch * p.kv_heads;
    for (int j = 0; j < parts.tiles; j++) {
      const uint32_t i = slot.index;
      const int first = parts.tile(j) * kBandKeys;
      ptx::barrier_wait(rings.keys.empty(i), slot.parity ^ 1);
      ptx::barrier_expect(rings.keys.full(i), C::kTileBytes16);
#pragma unroll
      for (int panel = 0; panel < C::kPanels16; panel++) {
        ptx::copy_box(shared + C::kKeyAt + i * C::kKeyStage + panel * kBandKeys * kWidth, params.k, panel * 64, first,
                      kv_head, item.batch, rings.keys.full(i));
      }
      // Before the total leaves there is room for no more than that.
      if (C::kAfterTotal && j == min(1, parts.tiles - 1)) copy_band_queries();
      ptx::barrier_wait(rings.values.empty(i), slot.parity ^ 1);
      ptx::barrier_expect(rings.values.full(i), C::kTileBytes16);
#pragma unroll
      for (int panel = 0; panel < C::kPanels16; panel++) {
        ptx::copy_box(shared + C::kValueAt + i * C::kValueStage + C::kBandValuesAt + panel * kBandKeys * kWidth,
                      params.v, panel * 64, first, kv_head, item.batch, rings.values.full(i));
      }
      slot.next();
    }
    // Whoever is free takes the next item. (The reduction, of one lane, keeps it where a warp shares numbers.)
    index = __reduce_or_sync(1u, atomicAdd(p.packed.next_item, 1)) + gridDim.x;
  }
  take_query_buffer(rings.kNoItem);
  ptx::barrier_arrive(rings.queries.full(0));
}

// ---- a warpgroup that multiplies ------------------------------------------------------------------------------------

// A number of each of a lane's channels of V: of channels 8n + 2c and 8n + 2c + 1.
template <class C>
__device__ __forceinline__ const float2* lane_channels(const float* from, uint32_t kv_plane) {
  return reinterpret_cast<const float2*>(from + static_cast<int64_t>(kv_plane) * C::kHeadDim) + threadIdx.x % 4;
}

// In registers.
template <class C>
struct Channels {
  float2 of_pair[C::kHeadDim / 8];

  __device__ __forceinline__ Channels(const float* from, uint32_t kv_plane) {
    const float2* const pairs = lane_channels<C>(from, kv_plane);
#pragma unroll
    for (int n = 0; n < C::kHeadDim / 8; n++) of_pair[n] = __ldg(pairs + 4 * n);
  }
  __device__ __forceinline__ float2 operator()(int n) const { return of_pair[n]; }
};

// Each where it is wanted: the compiler does not take it further up, where there is no register for it.
template <class C>
struct LateChannels {
  const float2* pairs;

  __device__ __forceinline__ LateChannels(const float* from, uint32_t kv_plane)
      : pairs(lane_channels<C>(from, kv_plane)) {}
  __device__ __forceinline__ float2 operator()(int n) const {
    float2 pair;
    asm volatile("ld.global.v2.f32 {%0, %1}, [%2];" : "=f"(pair.x), "=f"(pair.y) : "l"(pairs + 4 * n) : "memory");
    return pair;
  }
};

template <class C>
__device__ __forceinline__ void multiply_items(const BandParams& params, uint8_t* shared, uint32_t base,
                                               const BandRings<C>& rings, int group) {
  const Sage2Params& p = params.sage2;
  const int lane = threadIdx.x % 32;
  const uint64_t key_tiles = ptx::tile_descriptor<C::kPanelWidth>() | (base + C::kKeyAt) >> 4;
  const uint64_t value_tiles = ptx::tile_descriptor<C::kVWidth>() | (base + C::kValueAt) >> 4;
  const uint64_t queries =
      ptx::tile_descriptor<C::kPanelWidth>() | (base + C::kQueryAt + group * 64 * C::kPanelWidth) >> 4;
  const uint64_t band_keys = ptx::tile_descriptor<kWidth>() | (base + C::kKeyAt) >> 4;
  const uint64_t band_values = ptx::panel_descriptor<kBandKeys>() | (base + C::kValueAt + C::kBandValuesAt) >> 4;
  const uint32_t own_queries = base + C::kBandQueryAt + group * C::kPanels16 * kQueryPanel;  // of 16 bits
  const uint64_t band_queries = ptx::tile_descriptor<kWidth>() | own_queries >> 4;
  const uint64_t ones = ptx::tile_descriptor<32>() | (base + C::kOnesAt) >> 4;
  const auto done = [&](uint32_t barrier) {
    if (lane == 0) ptx::barrier_arrive(barrier);
  };
  const auto release_queries = [&] {
    __syncwarp();  // every lane has read whose queries they are
    done(rings.queries.empty(0));
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
  Slot<1> query;  // of the next item
  if (C::kTurns && group == kGroups - 1) ptx::turn_pass<128 * kGroups>(1);

  int s[C::kScores];
  const auto next_course = [&] {
    ptx::barrier_wait(rings.queries.full(0), query.parity);
    query.next();
    // The reduction leaves it where the compiler keeps what a warp shares.
    return BandCourse<C>(p, __reduce_or_sync(~0u, lane == 0 ? atomicOr(rings.items, 0u) : 0u), group);
  };
  // Scores of the first tile, where there is one; else of whatever lies there, which nobody will read.
  const auto issue_first = [&](const BandCourse<C>& of) {
    if (of.tile >= 0) ptx::barrier_wait(rings.keys.full(slot.index), slot.parity);
    wait_turn();
    ptx::product_fence();
    issue_scores<C>(s, queries, key_tiles + slot.index * (C::kKeyStage >> 4));
    pass_turn();
  };

  const auto take_first = [&](const BandCourse<C>& of) {
    issue_first(of);
    ptx::product_wait<0>();
    ptx::pin(s);
  };

  BandCourse<C> course = next_course();
  if (C::kAhead) take_first(course);
  while (course.index < p.items) {
    const uint32_t index = course.index;
    float o[C::kOutputs] = {}, sums[4] = {};
    RowState state;
    total.used = false;
    // The room of the total is free for the queries of 16 bits.
    const auto leave_total = [&] {
      ptx::async_proxy_fence();
      __syncwarp();
      done(rings.band_queries.empty(0));
    };
    const auto take_band_queries = [&] { ptx::barrier_wait(rings.band_queries.full(0), query.parity ^ 1); };
    if (!C::kAhead) take_first(course);
    if (course.parts.tiles > 0) {
      float band_s[kScores], band_sum[2] = {}, of_mean[2], rescale[2];
      uint32_t band_weights[kWeights];
      const uint32_t first_band_query = own_queries + threadIdx.x % 128 / 32 * 16 * kWidth;
      // Scores of the band's first tile.
      const auto issue_band = [&] {
        take_band_queries();
        ptx::barrier_wait(rings.keys.full(slot.index), slot.parity);
        ptx::product_fence();
        issue_band_scores<C>(band_s, band_queries, band_keys + slot.index * (C::kKeyStage >> 4));
      };
      // The same, and its P, where no other products go beside.
      const auto start_band = [&] {
        issue_band();
        scores_of_mean<C>(params, first_band_query, item_at<C>(p, index).kv_plane, of_mean);
        ptx::product_wait<0>();
        ptx::pin(band_s);
        done(rings.keys.empty(slot.index));
        return softmax_band<C>(params, band_s, state, band_sum, of_mean, course, course.parts.tile(0), rescale);
      };
      if (course.tile >= 0) {
        uint32_t weights[C::kWeights];
        done(rings.keys.empty(slot.index));
        {
          Exponentials<C> e;
          softmax_low<C>(p, s, e, state, course, true, rescale);
          e.store(weights);
        }
        slot.next();
        int summed = 0;  // tiles in O
        const auto row_sum = [&](int half) { return C::kOnesInV ? o[C::kOutputs - 4 + 2 * half] : sums[2 * half]; };
        const auto take_sums = [&] {
          state.sum[0] += row_sum(0), state.sum[1] += row_sum(1);
          // A write to part of an accumulator that no condition guards would make the compiler serialize products.
          if (C::kOnesInV && p.k_tokens > 0) {
#pragma unroll
            for (int i = 1; i <= 4; i++) o[C::kOutputs - i] = 0.0f;
          }
        };

#pragma unroll 1
        while (--course.tile >= 0) {
          Exponentials<C> e;
          ptx::barrier_wait(rings.keys.full(slot.index), slot.parity);
          wait_turn();
          ptx::pin(weights);
          ptx::product_fence();
          issue_scores<C>(s, queries, key_tiles + slot.index * (C::kKeyStage >> 4));
          const Slot<C::kStages> before = slot.previous();
          ptx::barrier_wait(rings.values.full(before.index), before.parity);
          issue_values<C>(o, sums, weights, value_tiles + before.index * (C::kValueStage >> 4), ones, summed++);
          pass_turn();
          ptx::product_wait<1>();
          ptx::pin(s);
          done(rings.keys.empty(slot.index));
          const bool moved = softmax_low<C>(p, s, e, state, course, false, rescale);

          ptx::product_wait<0>();
          ptx::pin(e.bits);
          ptx::pin(o);
          ptx::pin(sums);
          done(rings.values.empty(slot.previous().index));
          take_sums();
          e.store(weights);
          if (moved) {
#pragma unroll
            for (int i = 0; i < C::kHeadDim / 2; i++) o[i] *= rescale[i >> 1 & 1];
            state.sum[0] *= rescale[0], state.sum[1] *= rescale[1];
          }
          if (summed % C::kTestTiles == 0 && drifts<C>(o, state, summed * C::kBlockN, group)) {
            total.add(o, state);
            summed = 0;
          }
          slot.next();
        }

        release_queries();
        const Slot<C::kStages> before = slot.previous();
        const uint32_t kv_plane = item_at<C>(p, index).kv_plane;
        ptx::pin(weights);
        // O becomes a sum in V's units, of weights for the maxima of `of` that take `rescale`.
        const auto join_band = [&](RowState& of, const auto& scales, const auto& means) {
          const float first[2] = {row_sum(0), row_sum(1)};
          of.sum[0] += first[0], of.sum[1] += first[1];
          total.finish(o, of);
          if (C::kAfterTotal && total.used) leave_total();
          float centred[2], weight[2];
#pragma unroll
          for (int half = 0; half < 2; half++) {
            const float rest = of.sum[half] - (C::kFirstLow == 0 ? first[half] : 0.0f);
            centred[half] = p.whole_mean ? 1.0f : of.sum[half] > 0.0f ? rest * ptx::reciprocal(of.sum[half]) : 0.0f;
            weight[half] = of.sum[half] * rescale[half] * C::kShrunk;
            const float share = lane % 4 == 0 ? weight[half] : 0.0f;
            band_sum[half] += share;
            if (C::kSums) state.exact[half] = fmaf(state.exact[half], C::kShrunk, -share);
          }
#pragma unroll
          for (int n = 0; n < C::kHeadDim / 8; n++) {
            const float2 scale = scales(n), mean = means(n);
#pragma unroll
            for (int r = 0; r < 4; r++) {
              const int half = r >> 1;
              const float x = fmaf(o[4 * n + r], r & 1 ? scale.y : scale.x, (r & 1 ? mean.y : mean.x) * centred[half]);
              o[4 * n + r] = x * weight[half];
            }
          }
        };
        if constexpr (C::kAfterTotal) {
          if (!total.used) leave_total();
          ptx::barrier_wait(rings.values.full(before.index), before.parity);
          ptx::product_fence();
          issue_values<C>(o, sums, weights, value_tiles + before.index * (C::kValueStage >> 4), ones, summed);
          ptx::product_wait<0>();
          ptx::pin(o);
          ptx::pin(sums);
          done(rings.values.empty(before.index));
          rescale[0] = rescale[1] = 1.0f;
          join_band(state, LateChannels<C>(p.packed.v_scales, kv_plane), LateChannels<C>(p.packed.v_mean, kv_plane));
        } else {
          issue_band();
          ptx::barrier_wait(rings.values.full(before.index), before.parity);
          issue_values<C>(o, sums, weights, value_tiles + before.index * (C::kValueStage >> 4), ones, summed);
          scores_of_mean<C>(params, first_band_query, kv_plane, of_mean);
          const Channels<C> scales(p.packed.v_scales, kv_plane);
          ptx::product_wait<1>();
          ptx::pin(band_s);
          done(rings.keys.empty(slot.index));
          RowState low = state;
          softmax_band<C>(params, band_s, state, band_sum, of_mean, course, course.parts.tile(0), rescale);
          ptx::product_wait<0>();
          ptx::pin(band_s);
          ptx::pin(o);
          ptx::pin(sums);
          const Channels<C> means(p.packed.v_mean, kv_plane);
          done(rings.values.empty(before.index));
          join_band(low, scales, means);
        }
      } else {
        release_queries();
        if constexpr (C::kAfterTotal) {
          leave_total();
        } else {
          start_band();
        }
      }
      const auto rescale_outputs = [&] {
#pragma unroll
        for (int n = 0; n < C::kHeadDim / 2; n++) o[n] *= rescale[n >> 1 & 1];
      };
      if constexpr (C::kAfterTotal) {
        if (start_band()) rescale_outputs();
      }
      pack_weights(band_weights, band_s, C::kHalf == ptx::Half::kF16);

      const auto wait_band_values = [&](const Slot<C::kStages>& of) {
        ptx::barrier_wait(rings.values.full(of.index), of.parity);
        if (course.bad_values) {
          clear_not_finite<C>(base + C::kValueAt + of.index * C::kValueStage + C::kBandValuesAt, group);
        }
      };
      Slot<C::kStages> before = slot;
      int i = 0;
      // Again: no register has to hold it so long.
      course.parts.diagonal = shared_by_warp(Rows64(p, course.first_row).first);
      // Goes on to the band's next tile that a row of this warpgroup sees. Of two in a row it sees one: two stages do.
      const auto next_tile = [&] {
        before = slot;
        while (true) {
          slot.next();
          if (++i == course.parts.tiles) return false;
          const int tile = course.parts.tile(i);
          if (course.in_band(tile) && tile <= course.own_last) return true;
          ptx::barrier_wait(rings.keys.full(slot.index), slot.parity);
          ptx::barrier_wait(rings.values.full(slot.index), slot.parity);
          done(rings.keys.empty(slot.index));
          done(rings.values.empty(slot.index));
        }
      };
#pragma unroll 1
      while (next_tile()) {
        ptx::barrier_wait(rings.keys.full(slot.index), slot.parity);
        wait_band_values(before);
        ptx::pin(band_weights);
        ptx::product_fence();
        issue_band_scores<C>(band_s, band_queries, band_keys + slot.index * (C::kKeyStage >> 4));
        issue_band_values<C>(o, band_weights, band_values + before.index * (C::kValueStage >> 4));
        ptx::product_wait<1>();
        ptx::pin(band_s);
        done(rings.keys.empty(slot.index));
        const bool moved =
            softmax_band<C>(params, band_s, state, band_sum, of_mean, course, course.parts.tile(i), rescale);
        ptx::product_wait<0>();
        ptx::pin(band_s);
        ptx::pin(o);
        done(rings.values.empty(before.index));
        pack_weights(band_weights, band_s, C::kHalf == ptx::Half::kF16);
        if (moved) rescale_outputs();
      }
      if (!C::kAfterTotal) done(rings.band_queries.empty(0));
      wait_band_values(before);
      ptx::pin(band_weights);
      ptx::product_fence();
      issue_band_values<C>(o, band_weights, band_values + before.index * (C::kValueStage >> 4));
      if (C::kAhead) {
        course = next_course();
        issue_first(course);
        ptx::product_wait<1>();
      } else {
        ptx::product_wait<0>();
      }
      ptx::pin(o);
      done(rings.values.empty(before.index));
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const float sum = sum_of_quad(band_sum[half]);
        rescale[half] = sum > 0.0f ? ptx::reciprocal(sum) : 0.0f;
        state.sum[half] = sum * (1.0f / C::kShrunk);
        if (C::kSums) state.exact[half] = (state.exact[half] + band_sum[half]) * (1.0f / C::kShrunk);
      }
#pragma unroll
      for (int i = 0; i < C::kHeadDim / 2; i++) o[i] *= rescale[i >> 1 & 1];
    } else {
      release_queries();
      if (C::kAfterTotal) leave_total();
      take_band_queries();
      if (!C::kAfterTotal) done(rings.band_queries.empty(0));
      if (C::kAhead) {
        course = next_course();
        issue_first(course);
      }
    }
    const Item item = item_at<C>(p, index);
    const float centred[2] = {};
    // Rows may go through that room, when all of the warpgroup have read the queries there.
    if (C::kAfterTotal && !p.vectors) ptx::any_of_warpgroup(3 + group, false);
    store_rows<C>(p, item, o, state, centred, item.block * kBlockM + row_of_block(), totals);
    if (C::kAhead) {
      ptx::product_wait<0>();
      ptx::pin(s);
    } else {
      course = next_course();
    }
  }
}

template <class C>
__global__ void __launch_bounds__(kThreads, 1) band_kernel(const __grid_constant__ BandParams params) {
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
  const BandRings<C> rings(shared, base);
  if (threadIdx.x == 0) {
    rings.keys.create();
    rings.values.create();
    rings.queries.create();
    rings.band_queries.create();
    ptx::barrier_init_fence();
  }
  write_ones<C>(shared);
  __syncthreads();
  ptx::wait_for_previous_kernel();

  if (group == kGroups) {
    ptx::shrink_registers<24>();  // 24 + 2 * 240 is what three warpgroups of 168 have
    if (threadIdx.x == 128 * kGroups) copy_tiles<C>(params, base, rings);
  } else {
    ptx::grow_registers<240>();
    multiply_items<C>(params, shared, base, rings, group);
  }
}

// ---- host side ----------------------------------------------------------------------------------------------------

template <class C>
void launch(const Sage2Op& op, cudaStream_t stream) {
  BandParams params{};
  params.sage2 = make_params(op);
  params.q = make_tensor_map(op.q, 64, kWidth);
  params.k = make_tensor_map(op.k, kBandKeys, kWidth);
  params.v = make_tensor_map(op.v, kBandKeys, kWidth);
  params.factor = op.scale * kLog2e;
  params.head_dim = static_cast<int>(op.q.channels());
  launch_items(band_kernel<C>, C::kSharedBytes, params.sage2.items, stream, params);
}

template <int kHeadDim, ptx::Half kHalf>
void launch_half(const Sage2Op& op, cudaStream_t stream) {
  if (op.plan.fast_exponential) return launch<BandConfig<kHeadDim, true, kHalf>>(op, stream);
  launch<BandConfig<kHeadDim, false, kHalf>>(op, stream);
}

// One head dimension a source file, so that they compile side by side.
template <int kHeadDim>
void launch_for(const Sage2Op& op, cudaStream_t stream) {
  if (op.q.dtype == DType::kF16) return launch_half<kHeadDim, ptx::Half::kF16>(op, stream);
  launch_half<kHeadDim, ptx::Half::kBF16>(op, stream);
}

}  // namespace sage::cuda::sm90::band
