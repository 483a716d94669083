// Q, K and V as sage2's attention kernel takes them: one pass over each.
//
// A thread holds 16 rows of 8 channels. Those of Q and K are rows 8i + 2t and 8i + 2t + 1 of 64, all of one key scale;
// those of V are 16 tokens on end, so that what it makes of a channel is a chunk of 16 bytes and the transpose needs
// no shared memory.
//
// Where a cluster of blocks holds all keys (or values) of a plane, it takes their means and maxima itself. Longer
// contexts have those of a sample, and are packed again where a value does not fit.
#include "../encode.cuh"
#include "../ptx/cluster.cuh"
#include "../ptx/memory.cuh"
#include "launch.cuh"
#include "pack_sage2.cuh"

namespace sage::cuda::sm90 {
namespace {

constexpr int kRows = 16;  // of one thread
constexpr int kSpan = 64;  // rows that four neighbouring sets of threads share
constexpr float kLargest = 0x1.fffffep127f;

struct PackArguments : RowArguments {
  Tensor v;
  bool centre_all;   // V's first tile too
  ValueCodes codes;  // of V

  PackArguments(const Sage2Op& op, int tokens)
      : RowArguments(op, tokens), v(make_tensor(op.v)), centre_all(op.plan.smooth_v) {}
};

template <DType kInput, int kPaddedHeadDim, int kBlockN>
struct Config {
  static constexpr DType kType = kInput;
  static constexpr int kHeadDim = kPaddedHeadDim;
  static constexpr int kTokens = kBlockN;
  static constexpr int kOctets = kHeadDim / 8;
  static constexpr int kSets = kTokens / kRows;  // of threads that hold one row of 16
  static constexpr int kThreads = kSets * kOctets;
  static constexpr int kPanel = panel_width(kHeadDim);
  static constexpr int kVWidth = kTokens % 128 == 0 ? 128 : 64;
  static constexpr int kWords = kTokens / 32;
  static constexpr bool kHasHalfSums = kTokens != 192;  // sage2++ has no such tiles
  static constexpr int kThreadsOfMultiprocessor = kType == DType::kF32 ? 256 : 512;
  static constexpr int kBlocks = kThreadsOfMultiprocessor / kThreads;
  static constexpr int kWholeBlocks = kBlocks < 4 ? kBlocks : 4;  // five would not leave it enough registers
  static_assert(kThreads >= kHeadDim, "a thread folds a channel");
  static_assert(kTokens % kSpan == 0 && kThreads % 32 == 0 && kHeadDim % kVWidth % 64 == 0);
};

__device__ __forceinline__ float clamped(float x) { return fminf(fmaxf(x, -kLargest), kLargest); }

__device__ __forceinline__ void load_mean(float (&mean)[8], const float* means, int channels, int channel) {
#pragma unroll
  for (int j = 0; j < 8; j++) {
    mean[j] = means != nullptr && channel + j < channels ? means[channel + j] : 0.0f;
  }
}

template <DType kType>
__device__ __forceinline__ float element(const Octet<kType>& octet, int j) {
  const uint32_t word = octet.word[j * kBits<kType> / 32];
  if constexpr (kType == DType::kF32) return float_of(word);
  if constexpr (kType == DType::kBF16) return float_of(j % 2 == 0 ? word << 16 : word & 0xffff0000u);
  float low = 0.0f, high = 0.0f;
  if constexpr (kType == DType::kF16) unpack_f16(word, low, high);
  return j % 2 == 0 ? low : high;
}

// What is unpacked before this is unpacked again after it, and does not stay in registers.
template <DType kType>
__device__ __forceinline__ void forget_unpacked(Octet<kType>& octet) {
#pragma unroll
  for (uint32_t& word : octet.word) asm volatile("" : "+r"(word));
}

// ---- a plane that a cluster of blocks holds ---------------------------------------------------------------------

constexpr unsigned kMostTiles = 4;  // larger clusters are slower than a sample

template <class C>
struct PlaneSummary {
  Summary of_set[C::kSets][C::kHeadDim], of_block[C::kHeadDim];  // channel 8i + j is at j * kOctets + i
  float pivot[C::kHeadDim], mean[C::kHeadDim], inverse[C::kHeadDim];
  float magnitudes[C::kHeadDim];  // sums of those of the block's codes
};

// One for keys and values: a block has one of them.
template <class C>
__device__ __forceinline__ PlaneSummary<C>& shared_summary() {
  __shared__ PlaneSummary<C> summary;
  return summary;
}

__device__ __forceinline__ void load_octet_of(float (&x)[8], const float* from) {
  const float4 low = reinterpret_cast<const float4*>(from)[0], high = reinterpret_cast<const float4*>(from)[1];
  x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
  x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
}

// Others may still read what this block has summarized.
__device__ __forceinline__ void leave_cluster(const PackArguments& a) {
  if (a.kv_tiles > 1) ptx::cluster_wait();
}

// The channel that a thread sums up for its block.
template <class C>
__device__ __forceinline__ int channel_of_slot(int slot) {
  return slot % C::kOctets * 8 + slot / C::kOctets;
}

// Takes means and, of values, scales of a plane's channels, and hands every thread those of its own. Octet i of a
// thread is raw_of(i), row row_of(i), if exists(i). Blocks must end with leave_cluster();
// where sums are bounded, those of values with bound_sums() before it.
template <class C, bool kValues, class RawOf, class RowOf, class Exists>
__device__ __forceinline__ void summarize_plane(const PackArguments& a, unsigned plane, unsigned tile, int set,
                                                int channel, RawOf raw_of, RowOf row_of, Exists exists,
                                                const char* from, float (&mean)[8], float (&inverse)[8]) {
  PlaneSummary<C>& shared = shared_summary<C>();
  const Tensor& tensor = kValues ? a.v : a.k;
  float pivot[8] = {};  // keys need none, having no use for squares
  if (kValues) load_pivot<C::kType>(pivot, tensor, from, channel);
  constexpr int kTogether = 2;  // channels: more would not fit in registers
  Summary* const own = &shared.of_set[set][channel / 8];
  bool finite = true;
#pragma unroll
  for (int first = 0; first < 8; first += kTogether) {
    Summary summary[kTogether] = {};
#pragma unroll
    for (int i = 0; i < kRows; i++) {
      if (!exists(i)) continue;
#pragma unroll
      for (int j = 0; j < kTogether; j++) {
        const float x = element(raw_of(i), first + j);
        if (kValues)
          add_value(summary[j], x, pivot[first + j]);
        else
          summary[j].sum += x;
      }
    }
#pragma unroll
    for (int j = 0; j < kTogether; j++) {
      finite &= is_finite(summary[j].sum);
      own[(first + j) * C::kOctets] = summary[j];
      if (kValues && set == 0) shared.pivot[channel + first + j] = pivot[first + j];
    }
  }
  if (!finite) {
#pragma unroll
    for (int j = 0; j < 8; j++) own[j * C::kOctets] = {};
#pragma unroll 1
    for (int i = 0; i < kRows; i++) {
      if (!exists(i)) continue;
      float x[8];
      load_one<C::kType>(x, tensor, from, row_of(i), channel);
#pragma unroll
      for (int j = 0; j < 8; j++) {
        if (is_finite(x[j]))
          add_value(own[j * C::kOctets], x[j], pivot[j]);
        else
          own[j * C::kOctets].missing += 1.0f;
      }
    }
  }
  __syncthreads();

  const int slot = threadIdx.x, c = channel_of_slot<C>(slot);
  if (slot < C::kHeadDim) {
    Summary all = shared.of_set[0][slot];
#pragma unroll
    for (int i = 1; i < C::kSets; i++) add_summary(all, shared.of_set[i][slot]);
    shared.of_block[slot] = all;
  }
  if (a.kv_tiles > 1) {
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
  bool any_missing = false;
  if (slot < C::kHeadDim) {
    Summary all = {};
    const uint32_t address = ptx::shared_address(&shared.of_block[slot]);
#pragma unroll 1
    for (unsigned rank = 0; rank < a.kv_tiles; rank++) {
      const float4 part = ptx::load_cluster(address, rank);
      add_summary(all, {part.x, part.y, part.z, part.w});
    }
    any_missing = all.missing != 0.0f;
    const bool known = c < tensor.channels;
    if constexpr (kValues) {
      Channel values = channel_of_values(all, shared.pivot[c], tensor.tokens, a.centre_all, a.codes);
      if (!known) values = {0.0f, 1.0f};
      shared.mean[c] = values.mean;
      shared.inverse[c] = inverse_of_power(values.scale);
      if (tile == 0) {
        a.packed.v_mean[int64_t{plane} * C::kHeadDim + c] = values.mean;
        a.packed.v_scales[int64_t{plane} * C::kHeadDim + c] = values.scale;
      }
    } else {
      const bool smooth = a.packed.k_mean != nullptr && known;
      const float of_channel = smooth ? mean_of_channel(all, 0.0f, tensor.tokens) : 0.0f;
      shared.mean[c] = of_channel;
      if (tile == 0 && smooth) a.packed.k_mean[int64_t{plane} * tensor.channels + c] = of_channel;
    }
  }
  if (a.kv_tiles > 1 && !(kValues && a.codes.bounds_sums())) ptx::cluster_arrive();
  any_missing = __syncthreads_or(any_missing);
  if (tile == 0 && threadIdx.x == 0) {
    const uint32_t flag = any_missing ? (kValues ? kValueFlag >> 16 : kKeyFlag) : 0;
    reinterpret_cast<uint16_t*>(a.packed.flags)[2 * plane + (kValues ? 1 : 0)] = static_cast<uint16_t>(flag);
  }
  load_octet_of(mean, &shared.mean[channel]);
  if (kValues) load_octet_of(inverse, &shared.inverse[channel]);
}

// ---- queries and keys -------------------------------------------------------------------------------------------

// Keeps half of the magnitudes and folds in those of the lane `offset` further, which keeps the other half.
template <int kKept>
__device__ __forceinline__ void exchange_groups(float (&largest)[8], int offset) {
  const bool upper = (threadIdx.x & offset) != 0;
#pragma unroll
  for (int j = 0; j < kKept; j++) {
    const float kept = upper ? largest[j + kKept] : largest[j], given = upper ? largest[j] : largest[j + kKept];
    largest[j] = fmaxf(kept, __shfl_xor_sync(~0u, given, offset));
  }
}

// Folds 8 magnitudes over the kLanes threads of a row: lane l ends up with that of group bit_reversed(l % 8).
template <int kLanes>
__device__ __forceinline__ float fold_groups(float (&largest)[8]) {
  exchange_groups<4>(largest, 1);
  exchange_groups<2>(largest, 2);
  exchange_groups<1>(largest, 4);
  float folded = largest[0];
#pragma unroll
  for (int offset = 8; offset < kLanes; offset *= 2) folded = fmaxf(folded, __shfl_xor_sync(~0u, folded, offset));
  return folded;
}

__device__ __forceinline__ int bit_reversed(int group) { return (group & 1) << 2 | (group & 2) | group >> 2; }

enum class Rows { kQueries, kSmoothQueries, kKeys, kWholeKeys };

template <class C, Rows kWhich>
__device__ __forceinline__ void pack_rows(const PackArguments& a, unsigned item) {
  constexpr bool kKeys = kWhich == Rows::kKeys || kWhich == Rows::kWholeKeys;
  const int octet = threadIdx.x % C::kOctets, channel = octet * 8;
  const int set = threadIdx.x / C::kOctets, t = set % 4, span = set / 4;
  const unsigned tiles = kKeys ? a.kv_tiles : a.q_tiles, plane = item / tiles, tile = item % tiles;
  const int heads = kKeys ? a.kv_heads : a.q_heads;
  const Tensor& tensor = kKeys ? a.k : a.q;
  const char* const from = plane_of(tensor, Plane{plane / heads, plane % heads});
  const int64_t span_row = int64_t{tile} * C::kTokens + span * kSpan, row = span_row + 2 * t;
  const int left = rows_left(tensor.tokens, row, kSpan);

  Octet<C::kType> raw[2][kRows / 2];
#pragma unroll
  for (int e = 0; e < 2; e++) load_rows(raw[e], tensor, from, row + e, 8, tensor.tokens, channel);
  float mean[8] = {};
  if constexpr (kWhich == Rows::kKeys) {
    ptx::wait_for_previous_kernel();
    const float* const means = a.packed.k_mean;
    load_mean(mean, means == nullptr ? means : means + int64_t{plane} * tensor.channels, tensor.channels, channel);
  }
  if constexpr (kWhich == Rows::kSmoothQueries) {
    const int64_t block = min(span_row / kBlockM, a.q_rows / kBlockM - 1) + plane * (a.q_rows / kBlockM);
    load_mean(mean, a.packed.q_mean + block * tensor.channels, tensor.channels, channel);
#pragma unroll
    for (float& x : mean) x = half_mean<C::kType>(x);
  }
  if constexpr (kWhich == Rows::kWholeKeys) {
    const auto local = [](int r) { return 8 * (r / 2) + r % 2; };
    float unused[8];
    summarize_plane<C, false>(
        a, plane, tile, set, channel, [&](int r) { return raw[r % 2][r / 2]; }, [&](int r) { return row + local(r); },
        [&](int r) { return local(r) < left; }, from, mean, unused);
#pragma unroll
    for (int r = 0; r < kRows; r++) forget_unpacked(raw[r % 2][r / 2]);
  }

  // Largest magnitudes of groups: of queries 16 * (i / 2) + 2t + e and the one 8 further, or of all keys of a thread.
  constexpr int kGroups = kKeys ? 1 : 8;
  const auto group = [](int i, int e) { return kKeys ? 0 : i / 2 * 2 + e; };
  float largest[kGroups] = {};
#pragma unroll
  for (int i = 0; i < kRows / 2; i++) {
#pragma unroll
    for (int e = 0; e < 2; e++) {
      if (kKeys && 8 * i + e >= left) continue;
      float x[8];
      unpack(raw[e][i], x);
#pragma unroll
      for (int j = 0; j < 8; j++) largest[group(i, e)] = magnitude(largest[group(i, e)], x[j] - mean[j]);
    }
  }

#pragma unroll
  for (int r = 0; r < kRows; r++) forget_unpacked(raw[r % 2][r / 2]);

  // Rows 8 * (r / 2) + r % 2 of a thread with values that are not finite, and those whose codes need care.
  uint32_t bad = 0, careful = 0;
  bool finite = true;
#pragma unroll
  for (int g = 0; g < kGroups; g++) finite &= largest[g] < INFINITY;
  if (!finite) {
#pragma unroll
    for (int g = 0; g < kGroups; g++) largest[g] = 0.0f;
#pragma unroll 1
    for (int r = 0; r < kRows; r++) {
      if (8 * (r / 2) + r % 2 >= left) break;
      float x[8], most = 0.0f;
      load_one<C::kType>(x, tensor, from, row + 8 * (r / 2) + r % 2, channel);
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const float difference = x[j] - mean[j];
        if (!is_finite(difference)) careful |= 1u << r;
        if (is_finite(x[j]))
          most = fmaxf(most, fabsf(clamped(difference)));
        else
          bad |= 1u << r;
      }
#pragma unroll
      for (int g = 0; g < kGroups; g++) largest[g] = g == group(r / 2, r % 2) ? fmaxf(largest[g], most) : largest[g];
    }
  }

  bool any;
  float inverse[kGroups];
  if constexpr (kKeys) {
    __shared__ float maxima[C::kTokens / kSpan][4];
#pragma unroll
    for (int offset = 1; offset < C::kOctets; offset *= 2) {
      largest[0] = fmaxf(largest[0], __shfl_xor_sync(~0u, largest[0], offset));
    }
    if (octet == 0) maxima[span][t] = largest[0];
    any = __syncthreads_or(bad != 0);
    float most = 0.0f;
#pragma unroll
    for (const auto& of_span : maxima) most = fmaxf(most, of_span[t]);
    const Scale scale = make_scale(most, a.range);
    if (octet == 0 && span == 0) a.packed.k_scales[int64_t{item} * 4 + t] = scale.scale;
    inverse[0] = scale.inverse;
  } else {
    const Scale scale = make_scale(fold_groups<C::kOctets>(largest), a.range);
#pragma unroll
    for (int g = 0; g < kGroups; g++) {
      inverse[g] = __shfl_sync(~0u, scale.inverse, bit_reversed(g), C::kOctets);
    }
    const int g = bit_reversed(octet);
    if (octet < kGroups && span_row < a.q_rows) {
      const int64_t sixteen = (plane * a.q_rows + span_row) / 16 + g / 2;
      a.packed.q_scales[sixteen * 8 + 2 * t + g % 2] = scale.scale * a.factor;
    }
    any = __syncthreads_or(bad != 0);
  }

  // Chunk i of a row lies at i ^ swizzle(row), and the swizzle is the same for rows 8 apart.
  constexpr int kChunks = C::kPanel / 16, kTileRows = kKeys ? C::kTokens : kBlockM;
  const int panel = octet / (2 * kChunks), chunk = octet / 2 % kChunks;
  const int64_t tile_row = kKeys ? span * kSpan : span_row % kBlockM;
  const int64_t first_row = kKeys ? int64_t{item} * C::kTokens : plane * a.q_rows + span_row / kBlockM * kBlockM;
  int8_t* const codes = kKeys ? a.packed.k : a.packed.q;
  int8_t* const to = codes + first_row * C::kHeadDim + (panel * kTileRows + tile_row) * C::kPanel + octet % 2 * 8;
  const auto codes_of = [&](int i, int e) {
    const int low_row = 2 * t + e;
    return to + (8 * i + low_row) * C::kPanel + (chunk ^ swizzle(C::kPanel, low_row)) * 16;
  };
  if (kKeys || span_row < a.q_rows) {
#pragma unroll
    for (int i = 0; i < kRows / 2; i++) {
#pragma unroll
      for (int e = 0; e < 2; e++) {
        Octet<DType::kI8> code = {};
        if (!kKeys || 8 * i + e < left) {
          float x[8];
          unpack(raw[e][i], x);
#pragma unroll
          for (int j = 0; j < 8; j++) x[j] -= mean[j];
          code = encode_finite<DType::kI8>(x, [&](int) { return inverse[group(i, e)]; });
        }
        *reinterpret_cast<uint2*>(codes_of(i, e)) = make_uint2(code.word[0], code.word[1]);
      }
    }
  }
#pragma unroll 1
  for (; careful != 0; careful &= careful - 1) {
    const int r = __ffs(careful) - 1, i = r / 2, e = r % 2;
    float x[8];
    load_one<C::kType>(x, tensor, from, row + 8 * i + e, channel);
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const float difference = x[j] - mean[j];  // of a finite value it can overflow for keys only
      if (is_finite(difference)) continue;
      codes_of(i, e)[j] = is_finite(x[j]) ? to_int8(clamped(difference), inverse[0]) : int8_t{0};
    }
  }

  const int64_t tile_first = int64_t{tile} * C::kTokens;
  const int64_t plane_rows = kKeys ? int64_t{a.kv_tiles} * C::kTokens : a.q_rows;
  uint32_t* const bits = (kKeys ? a.packed.k_bits : a.packed.q_bits) + (plane * plane_rows + tile_first) / 32;
  const int words = rows_left(plane_rows, tile_first, C::kTokens) / 32;
  write_bits<C::kWords>(bits, words, any, bad, [&](int r) { return span * kSpan + 2 * t + 8 * (r / 2) + r % 2; });
  if (kWhich == Rows::kKeys && any && threadIdx.x == 0) atomicOr(&a.packed.flags[plane], kKeyFlag);
  if (kWhich == Rows::kWholeKeys) leave_cluster(a);
}

// ---- values -----------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t e4m3_pair(float low, float high) {
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
}

// Where the scales come from: a sample; for a plane that is packed again, the peaks; or all values of the plane.
enum class Values { kSampled, kAgain, kWhole };

// Where P·V is summed in FP16, magnitudes of a tile's codes must not add up to more than their bound: scales of a plane
// that a cluster holds become as large as that takes, and so does `inverse`.
template <class C>
__device__ __forceinline__ void bound_sums(const PackArguments& a, unsigned plane, unsigned tile, int set, int channel,
                                           const Octet<C::kType> (&raw)[kRows], const char* from, int64_t row, int left,
                                           bool centred, float (&mean)[8], float (&inverse)[8]) {
  PlaneSummary<C>& shared = shared_summary<C>();
  Summary* const own = &shared.of_set[set][channel / 8];
  bool finite = true;
#pragma unroll
  for (int j = 0; j < 8; j++) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kRows; i++) {
      if (i < left) sum += fabsf(element(raw[i], j) - mean[j]) * inverse[j];
    }
    finite &= is_finite(sum);
    own[j * C::kOctets].sum = sum;
  }
  if (!finite) {
#pragma unroll
    for (int j = 0; j < 8; j++) own[j * C::kOctets].sum = 0.0f;
#pragma unroll 1
    for (int i = 0; i < left; i++) {
      float x[8];
      load_one<C::kType>(x, a.v, from, row + i, channel);
#pragma unroll
      for (int j = 0; j < 8; j++) {
        if (is_finite(x[j])) own[j * C::kOctets].sum += fabsf(clamped(x[j] - mean[j])) * inverse[j];
      }
    }
  }
  __syncthreads();

  const int slot = threadIdx.x, c = channel_of_slot<C>(slot);
  float sum = 0.0f;
  if (slot < C::kHeadDim) {
#pragma unroll 4
    for (int i = 0; i < C::kSets; i++) sum += shared.of_set[i][slot].sum;
    shared.magnitudes[slot] = sum;
  }
  if (a.kv_tiles > 1) {
    ptx::cluster_arrive();
    ptx::cluster_wait();
    if (slot < C::kHeadDim) {
      const uint32_t address = ptx::shared_address(&shared.magnitudes[slot]);
#pragma unroll 1
      for (unsigned rank = 0; rank < a.kv_tiles; rank++) sum = fmaxf(sum, ptx::load_cluster_number(address, rank));
    }
    ptx::cluster_arrive();
  }
  if (slot < C::kHeadDim && sum > a.codes.sum) {
    const float scale = scale_of(sum / a.codes.sum * power_of_inverse(shared.inverse[c]));
    shared.inverse[c] = inverse_of_power(scale);
    if (tile == 0) a.packed.v_scales[int64_t{plane} * C::kHeadDim + c] = scale;
  }
  __syncthreads();
  if (centred) load_octet_of(mean, &shared.mean[channel]);  // so that it need not stay in registers until here
  load_octet_of(inverse, &shared.inverse[channel]);
}

template <class C, Values kWhich>
__device__ __forceinline__ void pack_values(const PackArguments& a, unsigned item) {
  constexpr int kOctetsOfWarp = 8, kWarpsOfRow = C::kOctets / kOctetsOfWarp, kChunks = C::kVWidth / 16;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int octet = warp % kWarpsOfRow * kOctetsOfWarp + lane % kOctetsOfWarp, channel = octet * 8;
  const int set = warp / kWarpsOfRow * 4 + lane / kOctetsOfWarp;  // of 16 tokens
  const unsigned plane = item / a.kv_tiles, tile = item % a.kv_tiles;
  const char* const from = plane_of(a.v, Plane{plane / a.kv_heads, plane % a.kv_heads});
  const int64_t row = int64_t{tile} * C::kTokens + set * kRows;
  const int left = rows_left(a.v.tokens, row, kRows);

  Octet<C::kType> raw[kRows];
  load_rows(raw, a.v, from, row, 1, a.v.tokens, channel);
  float mean[8], inverse[8];
  if constexpr (kWhich == Values::kWhole) {
    summarize_plane<C, true>(
        a, plane, tile, set, channel, [&](int i) { return raw[i]; }, [&](int i) { return row + i; },
        [&](int i) { return i < left; }, from, mean, inverse);
#pragma unroll
    for (int i = 0; i < kRows; i++) forget_unpacked(raw[i]);
  } else {
    if (kWhich == Values::kSampled) ptx::wait_for_previous_kernel();
    load_mean(mean, a.packed.v_mean + int64_t{plane} * C::kHeadDim, C::kHeadDim, channel);
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const int64_t at = int64_t{plane} * C::kHeadDim + channel + j;
      const float peak = kWhich == Values::kAgain ? a.packed.v_peaks[at] : 0.0f;
      float scale;
      if (peak == 0.0f) {
        scale = a.packed.v_scales[at];
      } else {
        scale = scale_of(peak);
        if (tile == 0 && set == 0) a.packed.v_scales[at] = scale;
      }
      inverse[j] = inverse_of_power(scale);
    }
  }

  const bool centred = tile != 0 || a.centre_all;
  if (!centred) {
#pragma unroll
    for (int j = 0; j < 8; j++) mean[j] = 0.0f;
  }
  if constexpr (C::kHasHalfSums && kWhich == Values::kWhole) {
    if (a.codes.bounds_sums()) {
      bound_sums<C>(a, plane, tile, set, channel, raw, from, row, left, centred, mean, inverse);
#pragma unroll
      for (int i = 0; i < kRows; i++) forget_unpacked(raw[i]);
    }
  }

  // Tokens that do not exist take the values of the first one, and then code 0.
  uint32_t existing[4];  // bytes of a word: tokens 2c, 2c + 1, 2c + 8, 2c + 9
#pragma unroll
  for (int c = 0; c < 4; c++) existing[c] = ~0u;
  if (left < kRows) {
#pragma unroll
    for (int i = 1; i < kRows; i++) {
      if (i >= left) raw[i] = raw[0];
    }
#pragma unroll
    for (int c = 0; c < 4; c++) {
      const int first = left - 2 * c, second = first - 8;
      existing[c] = (first > 1   ? 0xffffu
                     : first > 0 ? 0xffu
                                 : 0u) |
                    (second > 1   ? 0xffff0000u
                     : second > 0 ? 0xff0000u
                                  : 0u);
    }
  }

  const int64_t chunk_row = int64_t{item} * (C::kTokens / C::kVWidth) + set / kChunks;
  uint8_t* const to = a.packed.v + (chunk_row * C::kHeadDim + channel) * C::kVWidth;
  const auto chunk_of = [&](int j) { return to + j * C::kVWidth + ((set % kChunks) ^ swizzle(C::kVWidth, j)) * 16; };
  const auto want_scale = [&](int j, float least) {
    auto* const peaks = reinterpret_cast<uint32_t*>(a.packed.v_peaks);
    atomicMax(&peaks[int64_t{plane} * C::kHeadDim + channel + j], bits_of(fminf(least, 0x1p127f)));
  };
  float largest = 0.0f;
  const bool sums = kWhich == Values::kSampled && a.codes.bounds_sums();
  bool out_of_range = false;
#pragma unroll
  for (int j = 0; j < 8; j++) {
    uint32_t word[4];
    float sum = 0.0f;
#pragma unroll
    for (int c = 0; c < 4; c++) {
      float x[4];
#pragma unroll
      for (int e = 0; e < 4; e++) {
        x[e] = (element(raw[2 * c + e % 2 + e / 2 * 8], j) - mean[j]) * inverse[j];
        largest = magnitude(largest, x[e]);
        if (sums && fabsf(x[e]) < kLargest) sum += fabsf(x[e]);
      }
      word[c] = (e4m3_pair(x[0], x[1]) | e4m3_pair(x[2], x[3]) << 16) & existing[c];
    }
    *reinterpret_cast<uint4*>(chunk_of(j)) = make_uint4(word[0], word[1], word[2], word[3]);
    if constexpr (kWhich == Values::kSampled) {
      if (!sums) continue;
#pragma unroll
      for (int offset = kOctetsOfWarp; offset < 32; offset *= 2) sum += __shfl_xor_sync(~0u, sum, offset);
      if (sum > a.codes.sum) {
        out_of_range = true;
        want_scale(j, sum / a.codes.sum / inverse[j]);
      }
    }
  }

  uint32_t bad = 0;
  if (!(largest <= a.codes.range)) {
#pragma unroll 1
    for (int r = 0; r < left; r++) {
      float x[8];
      load_one<C::kType>(x, a.v, from, row + r, channel);
      const int position = (r % 8 / 2) * 4 + r % 2 + r / 8 * 2;
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const float difference = x[j] - mean[j], value = clamped(difference);
        if (!is_finite(x[j])) {
          bad |= 1u << r;
          chunk_of(j)[position] = 0;
        } else if (!is_finite(difference)) {
          chunk_of(j)[position] = f32_to_e4m3(value * inverse[j]);
        }
        if (kWhich == Values::kSampled && is_finite(x[j]) && fabsf(value) * inverse[j] > a.codes.range) {
          out_of_range = true;
          want_scale(j, fabsf(value) / a.codes.power);
        }
      }
    }
  }
  if constexpr (kWhich != Values::kAgain) {
    const bool any = __syncthreads_or(bad != 0);
    write_bits<C::kWords>(a.packed.v_bits + int64_t{item} * C::kWords, C::kWords, any, bad,
                          [&](int r) { return set * kRows + r; });
    if (kWhich == Values::kSampled && any && threadIdx.x == 0) atomicOr(&a.packed.flags[plane], kValueFlag);
    if (out_of_range) atomicOr(&a.packed.flags[plane], kRangeFlag);
  }
  if (kWhich == Values::kWhole) leave_cluster(a);
}

// ---- kernels ----------------------------------------------------------------------------------------------------

template <class C>
__device__ __forceinline__ void pack_queries(const PackArguments& a, unsigned item) {
  if (a.packed.q_mean == nullptr) return pack_rows<C, Rows::kQueries>(a, item);
  pack_rows<C, Rows::kSmoothQueries>(a, item);
}

// Blocks of queries come first: what they read (means included) and touch is free when the sample's blocks have
// started.
template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocks) pack_kernel(const __grid_constant__ PackArguments a) {
  ptx::let_next_kernel_start();
  if (blockIdx.x < a.q_items) return pack_queries<C>(a, blockIdx.x);
  const unsigned item = blockIdx.x - a.q_items;
  if (item < a.kv_items) return pack_values<C, Values::kSampled>(a, item);
  pack_rows<C, Rows::kKeys>(a, item - a.kv_items);
}

// Clusters of kv_tiles blocks; the last ones may be idle in part.
template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kWholeBlocks)
    pack_whole_kernel(const __grid_constant__ PackArguments a) {
  ptx::wait_for_previous_kernel();
  ptx::let_next_kernel_start();
  if (blockIdx.x == 0 && threadIdx.x == 0) *a.packed.next_item = 0;
  if (blockIdx.x < a.kv_items) return pack_values<C, Values::kWhole>(a, blockIdx.x);
  const unsigned item = blockIdx.x - a.kv_items;
  if (item < a.kv_items) return pack_rows<C, Rows::kWholeKeys>(a, item);
  if (item - a.kv_items < a.q_items) pack_queries<C>(a, item - a.kv_items);
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocks)
    repack_values_kernel(const __grid_constant__ PackArguments a) {
  ptx::let_next_kernel_start();
  ptx::wait_for_previous_kernel();
  const unsigned planes = a.kv_items / a.kv_tiles;
  bool any = false;
  for (unsigned plane = threadIdx.x; plane < planes; plane += C::kThreads) {
    any |= (a.packed.flags[plane] & kRangeFlag) != 0;
  }
  if (!__syncthreads_or(any)) return;
#pragma unroll 1
  for (unsigned item = blockIdx.x; item < a.kv_items; item += gridDim.x) {
    if (a.packed.flags[item / a.kv_tiles] & kRangeFlag) pack_values<C, Values::kAgain>(a, item);
  }
}

template <class C>
void launch_pack_of(const Sage2Op& op, CUstream_st* stream) {
  PackArguments a(op, C::kTokens);
  const bool whole = a.kv_tiles <= kMostTiles;
  a.codes = ValueCodes::of(op.plan, whole);
  const bool rotates = op.plan.rotate;  // then these kernels pack values alone, which are their first items
  if (rotates) a.q_items = 0;
  if (whole) {
    const unsigned q_clusters = (a.q_items + a.kv_tiles - 1) / a.kv_tiles;
    const unsigned blocks = rotates ? a.kv_items : 2 * a.kv_items + q_clusters * a.kv_tiles;
    if (rotates) launch_sage2_sample(op, true, stream);
    launch_clusters(pack_whole_kernel<C>, a.kv_tiles, blocks, C::kThreads, 0, stream, a);
    if (rotates) launch_sage2_rotated_rows(op, stream);
    return;
  }
  launch_sage2_sample(op, false, stream);
  launch_overlapped(pack_kernel<C>, rotates ? a.kv_items : a.q_items + 2 * a.kv_items, C::kThreads, 0, stream, a);
  if (rotates) launch_sage2_rotated_rows(op, stream);
  constexpr unsigned kMostBlocks = 264;
  launch_overlapped(repack_values_kernel<C>, a.kv_items < kMostBlocks ? a.kv_items : kMostBlocks, C::kThreads, 0,
                    stream, a);
}

}  // namespace

void launch_sage2_pack(const Sage2Op& op, CUstream_st* stream) {
  for_float_type(op.q.dtype, [&](auto type) {
    constexpr DType kType = decltype(type)::value;
    const int head_dim = op.plan.padded_head_dim, tokens = op.plan.block_k;
    if (head_dim == 64 && tokens == 192) return launch_pack_of<Config<kType, 64, 192>>(op, stream);
    if (head_dim == 64 && tokens == 256) return launch_pack_of<Config<kType, 64, 256>>(op, stream);
    if (head_dim == 128 && tokens == 128) return launch_pack_of<Config<kType, 128, 128>>(op, stream);
    if (head_dim == 256 && tokens == 128) return launch_pack_of<Config<kType, 256, 128>>(op, stream);
    SAGE_FAIL(SAGE_INTERNAL,
              "Cannot pack tiles of " + std::to_string(tokens) + " keys of " + std::to_string(head_dim) + " channels");
  });
}

}  // namespace sage::cuda::sm90
