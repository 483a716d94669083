// Queries and keys as sage2's attention kernel takes them, rotated by tensor cores: one pass over both.
//
// Rows are padded to the head dimension of the kernel and multiplied by diag(signs) * H / kHeadDim of that size, as
// q.k stays the same in any. H is that of four bits of a channel times that of the others. The former is a product of
// 16 x 16 elements that are powers of two, exact in the type of the rows (of f32: in three terms of bf16), and a
// thread, which holds every fragment of two rows of 16, makes the latter of sums and differences of its own. At 256
// channels one more bit is of the product, as sums of 16 fragments would not fit in registers.
//
// Codes have the order of channels in which products come out, which is that of queries and of keys.
#include "../encode.cuh"
#include "../ptx/mma.cuh"
#include "launch.cuh"
#include "pack_sage2.cuh"

namespace sage::cuda::sm90 {
namespace {

constexpr float kLargest = 0x1.fffffep127f;

struct RotateArguments : RowArguments {
  // Of 32 channels each: bits 4c + w and 16 + 4c + w are set where channels 8c + 2w and 8c + 2w + 1 change their sign.
  uint32_t signs[8] = {};

  RotateArguments(const Sage2Op& op, int tokens, int head_dim) : RowArguments(op, tokens) {
    factor *= static_cast<float>(head_dim);
    for (uint32_t channel = 0; channel < 256; channel++) {
      if (rotation_sign(channel) > 0.0f) continue;
      signs[channel / 32] |= 1u << (channel / 8 % 4 * 4 + channel % 8 / 2 + channel % 2 * 16);
    }
  }
};

template <DType kInput, int kPaddedHeadDim, int kBlockN>
struct Config {
  static constexpr DType kType = kInput;
  static constexpr int kHeadDim = kPaddedHeadDim, kTokens = kBlockN;
  static constexpr bool kF32 = kType == DType::kF32;
  // 16 octets a thread, or 8 of f32 where 16 rows have no more.
  static constexpr int kRowsOfWarp = kF32 && kHeadDim < 256 ? 2048 / kHeadDim : 4096 / kHeadDim;
  static constexpr int kRows = kRowsOfWarp / 8;  // of a thread: every eighth
  static constexpr int kOctets = kHeadDim / 32;  // of one of them: every fourth
  static constexpr int kWarps = kTokens / kRowsOfWarp, kThreads = 32 * kWarps;
  static constexpr int kHalves = kHeadDim == 256 ? 2 : 1;
  static constexpr int kFragments = kHeadDim / 16 / kHalves;
  static constexpr int kPanel = panel_width(kHeadDim);
  static constexpr int kWords = kTokens / 32;
  static constexpr int kMeans = (kTokens + kBlockM - 1) / kBlockM;  // of queries that share a tile
  static constexpr int kBlocks = (kF32 ? 256 : 512) / kThreads;
  static constexpr ptx::Operand kOperand = kType == DType::kF16 ? ptx::Operand::kF16 : ptx::Operand::kBF16;
  // 1 / kHeadDim, twice.
  static constexpr uint32_t kPower = kHeadDim == 64 ? 6 : kHeadDim == 128 ? 7 : 8;
  static constexpr uint32_t kElements = (kType == DType::kF16 ? 15 - kPower << 10 : 127 - kPower << 7) * 0x10001u;
};

// Means, and what their products are subtracted from those of rows as: two columns of a fragment, twice, as its two
// rows have the same: [mean][half][tile of 8 columns][fragment][thread of a row].
template <class C>
struct Means {
  float means[C::kMeans][C::kHeadDim];  // with their signs
  float4 products[C::kMeans][C::kHalves][2][C::kFragments][4];
};

__device__ __forceinline__ uint32_t parity(uint32_t bits) { return __popc(bits) & 1; }

// Fills `shared` with the means that mean_of(m, channel) gives.
template <class C, class MeanOf>
__device__ __forceinline__ void take_means(const RotateArguments& a, Means<C>& shared, MeanOf mean_of) {
#pragma unroll 1
  for (int i = threadIdx.x; i < C::kMeans * C::kHeadDim; i += C::kThreads) {
    const int m = i / C::kHeadDim, channel = i % C::kHeadDim, octet = channel / 8 % 4, j = channel % 8;
    const bool changes = a.signs[channel / 32] >> (4 * octet + j / 2 + j % 2 * 16) & 1;
    const float mean = mean_of(m, channel) * (1.0f / C::kHeadDim);
    shared.means[m][channel] = changes ? -mean : mean;
  }
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < C::kMeans * C::kHeadDim; i += C::kThreads) {
    const int n = i % 8, f = i / 8 % C::kFragments, tile = i / (8 * C::kFragments) % 2;
    const int half = i / (16 * C::kFragments) % C::kHalves, m = i / C::kHeadDim;
    float sum = 0.0f;
#pragma unroll 4
    for (int k = 0; k < 16 * C::kHalves; k++) {
      const int fragment = f + k / 16 * C::kFragments, channel = fragment / 2 * 32 + fragment % 2 * 4;
      const float mean = shared.means[m][channel + k / 4 % 4 * 8 + k % 4];
      sum += parity((k & (n | tile << 3)) | (k / 16 & half) << 4) ? -mean : mean;
    }
    float* const product = reinterpret_cast<float*>(&shared.products[m][half][tile][f][n / 2]) + n % 2;
    product[0] = product[2] = -sum;
  }
  __syncthreads();
}

// The first or second four channels of octets of two rows, as a product takes them.
template <class C>
class Fragment {
 public:
  static constexpr int kTerms = C::kType == DType::kF32 ? 3 : 1;

  __device__ __forceinline__ Fragment(const Octet<C::kType>& low, const Octet<C::kType>& high, int second) {
#pragma unroll
    for (int i = 0; i < kWords; i++) {
      low_[i] = low.word[kWords * second + i];
      high_[i] = high.word[kWords * second + i];
      // Terms are made where they are needed, and not kept for the next part.
      if constexpr (kTerms > 1) asm volatile("" : "+r"(low_[i]), "+r"(high_[i]));
    }
  }

  // What is left of the rows, or of f32 the next eight bits of each number.
  __device__ __forceinline__ void next(uint32_t (&a)[4]) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      a[2 * i] = next_pair(low_, i);
      a[2 * i + 1] = next_pair(high_, i);
    }
  }

 private:
  static constexpr int kWords = kTerms == 3 ? 4 : 2;

  __device__ __forceinline__ static uint32_t next_pair(uint32_t (&row)[kWords], int i) {
    if constexpr (kTerms == 1) {
      return row[i];
    } else {
      const uint32_t pair = __byte_perm(row[2 * i], row[2 * i + 1], 0x7632);
#pragma unroll
      for (int j = 2 * i; j < 2 * i + 2; j++) row[j] = bits_of(float_of(row[j]) - float_of(row[j] & 0xffff0000u));
      return pair;
    }
  }

  uint32_t low_[kWords], high_[kWords];
};

// What was made of rows is made again after this, and does not stay in registers.
template <class C>
__device__ __forceinline__ void forget_made_of(Octet<C::kType> (&raw)[C::kOctets][C::kRows]) {
#pragma unroll
  for (auto& rows : raw) {
#pragma unroll
    for (auto& octet : rows) {
#pragma unroll
      for (uint32_t& word : octet.word) asm volatile("" : "+r"(word));
    }
  }
}

enum class Rows { kQueries, kSmoothQueries, kKeys };

template <class C, Rows kWhich>
__device__ __forceinline__ void pack_rows(const RotateArguments& a, unsigned item) {
  constexpr bool kKeys = kWhich == Rows::kKeys, kCentred = kWhich != Rows::kQueries;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, c = lane % 4;
  const unsigned tiles = kKeys ? a.kv_tiles : a.q_tiles, plane = item / tiles, tile = item % tiles;
  const int heads = kKeys ? a.kv_heads : a.q_heads;
  const Tensor& tensor = kKeys ? a.k : a.q;
  const char* const from = plane_of(tensor, Plane{plane / heads, plane % heads});
  const int64_t tile_first = int64_t{tile} * C::kTokens, warp_row = tile_first + warp * C::kRowsOfWarp;
  const int64_t row = warp_row + g;
  const int left = rows_left(tensor.tokens, row, C::kRowsOfWarp);

  Octet<C::kType> raw[C::kOctets][C::kRows];
#pragma unroll
  for (int o = 0; o < C::kOctets; o++) load_rows(raw[o], tensor, from, row, 8, tensor.tokens, 8 * c + 32 * o);
  const float4* products = nullptr;
  if constexpr (kCentred) {
    __shared__ Means<C> means;
    if (kKeys) ptx::wait_for_previous_kernel();
    const int64_t first_block = tile_first / kBlockM, blocks = a.q_rows / kBlockM;
    take_means<C>(a, means, [&](int m, int channel) {
      if (channel >= tensor.channels) return 0.0f;
      if constexpr (kKeys) {
        if (m > 0 || a.packed.k_mean == nullptr) return 0.0f;
        return a.packed.k_mean[int64_t{plane} * tensor.channels + channel];
      }
      const int64_t block = min(first_block + m, blocks - 1) + plane * blocks;
      return half_mean<C::kType>(a.packed.q_mean[block * tensor.channels + channel]);
    });
    products = &means.products[kKeys ? 0 : warp_row / kBlockM - first_block][0][0][0][c];
  }
#pragma unroll
  for (int o = 0; o < C::kOctets; o++) {
    const uint32_t signs = a.signs[o] >> 4 * c;
#pragma unroll
    for (int k = 0; k < C::kRows; k++) {
      if constexpr (C::kType == DType::kF32) {
#pragma unroll
        for (int j = 0; j < 8; j++) raw[o][k].word[j] ^= signs << (31 - j / 2 - j % 2 * 16) & 0x80000000u;
      } else {
#pragma unroll
        for (int w = 0; w < 4; w++) raw[o][k].word[w] ^= signs << (15 - w) & 0x80008000u;
      }
    }
  }

  // H of the channels that threads c hold, 8c + 2s + e: what columns g and, with other signs, g + 8 are made with.
  uint32_t elements[2];
#pragma unroll
  for (int s = 0; s < 2; s++) {
    const uint32_t odd = parity((c & g >> 2) | (s << 1 & g));
    elements[s] = C::kElements ^ (odd ? 0x80008000u : 0u) ^ (g & 1 ? 0x80000000u : 0u);
  }
  const uint32_t second_tile = c & 2 ? 0x80008000u : 0u;

  // Hands out the rotated rows in parts: body(i, tile, half, sums) has sums of rows 16i + g and 16i + g + 8, but for
  // steps from `end` on.
  const auto each_part = [&](auto end, auto body) {
#pragma unroll
    for (int i = 0; i < C::kRows / 2; i++) {
#pragma unroll 1  // sums of two parts at once would not fit in registers
      for (int part = 0; part < 2 * C::kHalves; part++) {
        const int tile = part % 2, half = part / 2;
        float sum[C::kFragments][4];
#pragma unroll
        for (int f = 0; f < C::kFragments * C::kHalves; f++) {
          const bool first = f < C::kFragments;
          float(&to)[4] = sum[f % C::kFragments];
          if (first) {
            float4 start = {};
            if constexpr (kCentred) start = products[((half * 2 + tile) * C::kFragments + f) * 4];
            to[0] = start.x, to[1] = start.y, to[2] = start.z, to[3] = start.w;
          }
          const uint32_t sign = (tile == 1 ? second_tile : 0u) ^ (half == 1 && !first ? 0x80008000u : 0u);
          Fragment<C> fragment(raw[f / 2][2 * i], raw[f / 2][2 * i + 1], f % 2);
#pragma unroll
          for (int term = 0; term < Fragment<C>::kTerms; term++) {
            uint32_t rows[4];
            fragment.next(rows);
            ptx::mma<C::kOperand>(to, rows, elements[0] ^ sign, elements[1] ^ sign, to);
          }
        }
#pragma unroll
        for (int step = 1; step < decltype(end)::value; step *= 2) {
#pragma unroll
          for (int f = 0; f < C::kFragments; f++) {
            if (f & step) continue;
#pragma unroll
            for (int j = 0; j < 4; j++) {
              const float x = sum[f][j], y = sum[f + step][j];
              sum[f][j] = x + y;
              sum[f + step][j] = x - y;
            }
          }
        }
        body(i, tile, half, sum);
      }
    }
  };

  // The larger one of |x + y| and |x - y| is |x| + |y|.
  constexpr int kLastStep = C::kFragments / 2;
  float largest[C::kRows] = {};
  each_part(std::integral_constant<int, kLastStep>{}, [&](int i, int, int, const float(&sum)[C::kFragments][4]) {
#pragma unroll
    for (int f = 0; f < kLastStep; f++) {
      float most[4];
#pragma unroll
      for (int j = 0; j < 4; j++) most[j] = fabsf(sum[f][j]) + fabsf(sum[f + kLastStep][j]);
#pragma unroll
      for (int e = 0; e < 2; e++) {
        largest[2 * i + e] = magnitude(largest[2 * i + e], magnitude(most[2 * e], most[2 * e + 1]));
      }
    }
  });

  // Rows 8k that exist but whose codes are 0. All of a row shows what is not finite in a part of it.
  uint32_t bad = 0;
  bool finite = true;
#pragma unroll
  for (int k = 0; k < C::kRows; k++) {
    if (8 * k >= left) largest[k] = 0.0f;
    finite &= largest[k] < INFINITY;
  }
  if (!__all_sync(~0u, finite)) {
    uint32_t overflows = 0;  // of f32 with the mean
#pragma unroll 1
    for (int k = 0; k < C::kRows; k++) {
      bool own = false, infinite = false;
#pragma unroll 1
      for (int channel = 8 * c; channel < C::kHeadDim; channel += 32) {
        float x[8];
        load_one<C::kType>(x, tensor, from, row + 8 * k, channel);
#pragma unroll
        for (int j = 0; j < 8; j++) own |= !is_finite(x[j]);
      }
#pragma unroll
      for (int r = 0; r < C::kRows; r++) infinite |= r == k && !(largest[r] < INFINITY);
      const auto any_of_row = [&](bool mine) { return (__ballot_sync(~0u, mine) >> (lane & ~3) & 15) != 0; };
      const bool row_is_bad = any_of_row(own), row_is_infinite = any_of_row(infinite);
      if (row_is_bad) {
        bad |= 1u << k;
      } else if (row_is_infinite) {
        overflows |= 1u << k;
      }
    }
#pragma unroll
    for (int k = 0; k < C::kRows; k++) {
      if (bad >> k & 1) {
        largest[k] = 0.0f;
#pragma unroll
        for (int o = 0; o < C::kOctets; o++) raw[o][k] = {};
      }
      if constexpr (C::kType == DType::kF32) {
        if (!(overflows >> k & 1)) continue;
        constexpr float kMost = 0x1.fcp127f;
        largest[k] = kLargest;
#pragma unroll
        for (int o = 0; o < C::kOctets; o++) {
#pragma unroll
          for (uint32_t& word : raw[o][k].word) word = bits_of(fminf(fmaxf(float_of(word), -kMost), kMost));
        }
      }
    }
  }
  forget_made_of<C>(raw);

  const bool any = __syncthreads_or(bad != 0);
  float inverse[C::kRows];
  if constexpr (kKeys) {
    __shared__ float maxima[C::kWarps][4];  // of keys 8i + 2t and 8i + 2t + 1
    float most = largest[0];
#pragma unroll
    for (int k = 1; k < C::kRows; k++) most = fmaxf(most, largest[k]);
#pragma unroll
    for (int offset = 1; offset < 8; offset *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, offset));
    if (lane % 8 == 0) maxima[warp][lane / 8] = most;
    __syncthreads();
    const int t = g / 2;
#pragma unroll
    for (const auto& of_warp : maxima) most = fmaxf(most, of_warp[t]);
    const Scale scale = make_scale(most, a.range);
    if (threadIdx.x % 8 == 0 && warp == 0) a.packed.k_scales[int64_t{item} * 4 + t] = scale.scale;
#pragma unroll
    for (float& x : inverse) x = scale.inverse;
  } else {
#pragma unroll
    for (int i = 0; i < C::kRows / 2; i++) {
      float most = fmaxf(largest[2 * i], largest[2 * i + 1]);
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
      const Scale scale = make_scale(most, a.range);
      if (c == 0 && warp_row < a.q_rows) {
        a.packed.q_scales[((plane * a.q_rows + warp_row) / 16 + i) * 8 + g] = scale.scale * a.factor;
      }
      inverse[2 * i] = inverse[2 * i + 1] = scale.inverse;
    }
  }
#pragma unroll
  for (int k = 0; k < C::kRows; k++) {
    if (8 * k >= left || bad >> k & 1) inverse[k] = 0.0f;
  }

  // Chunk i of a row lies at i ^ swizzle(row), and the swizzle is the same for rows 8 apart. Four threads make 32
  // neighbouring bytes of a row, or 64.
  if (kKeys || warp_row < a.q_rows) {
    constexpr int kTileRows = kKeys ? C::kTokens : kBlockM, kPartBytes = 2 * C::kFragments;
    const int64_t tile_row = (kKeys ? warp * C::kRowsOfWarp : warp_row % kBlockM) + g;
    const int64_t first_row = kKeys ? int64_t{item} * C::kTokens : plane * a.q_rows + warp_row / kBlockM * kBlockM;
    int8_t* const codes = (kKeys ? a.packed.k : a.packed.q) + first_row * C::kHeadDim;
    each_part(std::integral_constant<int, C::kFragments>{}, [&](int i, int tile, int half,
                                                                const float(&sum)[C::kFragments][4]) {
      const int byte = ((half * 2 + tile) * 4 + c) * kPartBytes, chunk = byte / 16 % (C::kPanel / 16);
      const int at = (chunk ^ swizzle(C::kPanel, g)) * 16 + byte % 16, panel = byte / C::kPanel;
#pragma unroll
      for (int e = 0; e < 2; e++) {
        uint32_t words[kPartBytes / 4];
#pragma unroll
        for (int f = 0; f < C::kFragments; f += 4) {
          float x[8];
#pragma unroll
          for (int j = 0; j < 8; j++) x[j] = sum[f + j / 2][2 * e + j % 2];
          const Octet<DType::kI8> code = encode_finite<DType::kI8>(x, [&](int) { return inverse[2 * i + e]; });
          words[f / 2] = code.word[0];
          words[f / 2 + 1] = code.word[1];
        }
        int8_t* const to = codes + (panel * kTileRows + tile_row + 16 * i + 8 * e) * C::kPanel + at;
        if constexpr (kPartBytes == 16) {
          *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
        } else {
          *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
        }
      }
    });
  }

  const int64_t plane_rows = kKeys ? int64_t{a.kv_tiles} * C::kTokens : a.q_rows;
  uint32_t* const bits = (kKeys ? a.packed.k_bits : a.packed.q_bits) + (plane * plane_rows + tile_first) / 32;
  const int words = rows_left(plane_rows, tile_first, C::kTokens) / 32;
  write_bits<C::kWords>(bits, words, any, bad, [&](int k) { return warp * C::kRowsOfWarp + g + 8 * k; });
  if (kKeys && any && threadIdx.x == 0) atomicOr(&a.packed.flags[plane], kKeyFlag);
}

// Blocks of queries come first: what they read and touch is free when the blocks of the kernel before have started.
template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocks) rotate_kernel(const __grid_constant__ RotateArguments a) {
  ptx::let_next_kernel_start();
  if (blockIdx.x >= a.q_items) return pack_rows<C, Rows::kKeys>(a, blockIdx.x - a.q_items);
  if (a.packed.q_mean == nullptr) return pack_rows<C, Rows::kQueries>(a, blockIdx.x);
  pack_rows<C, Rows::kSmoothQueries>(a, blockIdx.x);
}

template <class C>
void launch_for(const Sage2Op& op, CUstream_st* stream) {
  const RotateArguments a(op, C::kTokens, C::kHeadDim);
  launch_overlapped(rotate_kernel<C>, a.q_items + a.kv_items, C::kThreads, 0, stream, a);
}

}  // namespace

void launch_sage2_rotated_rows(const Sage2Op& op, CUstream_st* stream) {
  for_float_type(op.q.dtype, [&](auto type) {
    constexpr DType kType = decltype(type)::value;
    const int head_dim = op.plan.padded_head_dim;
    if (head_dim == 64 && op.plan.block_k == 192) return launch_for<Config<kType, 64, 192>>(op, stream);
    if (head_dim == 64) return launch_for<Config<kType, 64, 256>>(op, stream);
    if (head_dim == 128) return launch_for<Config<kType, 128, 128>>(op, stream);
    launch_for<Config<kType, 256, 128>>(op, stream);
  });
}

}  // namespace sage::cuda::sm90
