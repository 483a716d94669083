// Codes of V as products of bytes take them: in tiles of 64 keys, a row for each channel.
#include "encode.cuh"

namespace sage::cuda {
namespace {

constexpr int kTileKeys = 64;

// Where in its 16 keys one lies: those whose scores one lane of a fragment holds come together.
__device__ __forceinline__ int place_of_key(int key) { return key % 8 / 2 * 4 + key / 8 * 2 + key % 2; }

// ---- FP8 ----------------------------------------------------------------------------------------------------------

constexpr int kFp8Threads = 256;
constexpr int kPitch = kTileKeys + 4;  // of a row in shared memory

struct Fp8Arguments {
  Tensor v;
  uint8_t* tiles;
  int64_t heads, tiles_a_head;
  int channels;  // of a tile
};

// -0 is left to what is not finite, and does not matter.
__device__ __forceinline__ uint8_t code_of(float x, uint8_t code) {
  if (is_finite(x)) return code == 0x80u ? 0 : code;
  return x != x ? kNotANumberCode : x > 0.0f ? kInfinityCode : kMinusInfinityCode;
}

template <DType kType>
__global__ void __launch_bounds__(kFp8Threads) fp8_tiles_kernel(const __grid_constant__ Fp8Arguments a, Place corner) {
  extern __shared__ uint32_t shared[];
  auto* const codes = reinterpret_cast<uint8_t*>(shared);  // [channels][kPitch]
  const Place place = place_of_block(corner);
  const char* const plane = plane_of(a.v, place.plane);
  const int octets = a.channels / 8;
#pragma unroll 1
  for (int i = threadIdx.x; i < kTileKeys * octets; i += kFp8Threads) {
    const int key = i / octets, channel = i % octets * 8;
    const int64_t row = place.tile * kTileKeys + key;
    Octet<kType> raw[1] = {};
    if (channel < a.v.channels) load_rows(raw, a.v, plane, row, 1, a.v.tokens, channel);
    float x[8];
    unpack(raw[0], x);
    const Octet<DType::kE4M3> octet = encode_finite<DType::kE4M3>(x, [](int) { return 1.0f; });
    uint8_t* const column = codes + channel * kPitch + key / 16 * 16 + place_of_key(key % 16);
#pragma unroll
    for (int j = 0; j < 8; j++) column[j * kPitch] = code_of(x[j], octet.word[j / 4] >> j % 4 * 8 & 255u);
  }
  __syncthreads();
  constexpr int kWords = kTileKeys / 4;
  const int64_t index = (place.plane.batch * a.heads + place.plane.head) * a.tiles_a_head + place.tile;
  auto* const to = reinterpret_cast<uint32_t*>(a.tiles + index * a.channels * kTileKeys);
  for (int i = threadIdx.x; i < a.channels * kWords; i += kFp8Threads) {
    to[i] = shared[i / kWords * (kPitch / 4) + i % kWords];
  }
}

// ---- INT8 ---------------------------------------------------------------------------------------------------------

constexpr int kInt8Threads = 128;

struct Int8Arguments {
  Tensor codes;
  int64_t heads, tiles, words;  // of a batch; of one head
  int rows;                     // of a tile: channels, padded
  int8_t* out;                  // [planes, tiles, rows, kTileKeys]
  uint32_t* not_finite;         // [planes, words]
};

// One block a tile; a thread takes 16 keys of a channel.
__global__ void __launch_bounds__(kInt8Threads)
    int8_tiles_kernel(const __grid_constant__ Int8Arguments a, int64_t first) {
  __shared__ uint32_t marks[kTileKeys / 32];
  if (threadIdx.x < kTileKeys / 32) marks[threadIdx.x] = 0;
  __syncthreads();
  const int64_t item = first + blockIdx.x, tile = item % a.tiles, plane = item / a.tiles, key0 = tile * kTileKeys;
  const char* const from = plane_of(a.codes, {plane / a.heads, plane % a.heads});
#pragma unroll 1
  for (int i = threadIdx.x; i < a.rows * (kTileKeys / 16); i += kInt8Threads) {
    const int channel = i % a.rows, part = i / a.rows;
    uint32_t words[4] = {};
#pragma unroll
    for (int key = 0; key < 16; key++) {
      const int64_t row = key0 + part * 16 + key;
      if (channel >= a.codes.channels || row >= a.codes.tokens) continue;
      const int8_t code =
          *reinterpret_cast<const int8_t*>(from + row * a.codes.token_stride + channel * a.codes.unit_stride);
      const bool finite = code != kInt8NotFinite;
      if (!finite) atomicOr(&marks[part / 2], 1u << (part % 2 * 16 + key));
      const int place = place_of_key(key);
      words[place / 4] |= (finite ? code & 255u : 0u) << place % 4 * 8;
    }
    int8_t* const to = a.out + ((plane * a.tiles + tile) * a.rows + channel) * kTileKeys + part * 16;
    *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
  }
  __syncthreads();
  const int64_t word = tile * (kTileKeys / 32) + threadIdx.x;
  if (threadIdx.x < kTileKeys / 32 && word < a.words) a.not_finite[plane * a.words + word] = marks[threadIdx.x];
}

}  // namespace

void launch_fp8_tiles(const View& v, const View& tiles, cudaStream_t stream) {
  Fp8Arguments a{};
  a.v = make_tensor(v);
  a.tiles = static_cast<uint8_t*>(tiles.data);
  a.heads = v.heads();
  a.tiles_a_head = tiles_of(v.tokens(), kTileKeys);
  a.channels = static_cast<int>(tiles.tokens() / a.tiles_a_head);
  const auto launch = [&](auto kernel) {
    launch_grid(v, a.tiles_a_head, [&](dim3 grid, Place corner) {
      kernel<<<grid, kFp8Threads, a.channels * kPitch, stream>>>(a, corner);
    });
  };
  v.dtype == DType::kE4M3 ? launch(fp8_tiles_kernel<DType::kE4M3>) : launch(fp8_tiles_kernel<DType::kF16>);
}

void launch_int8_tiles(const View& codes, int rows, void* tiles, uint32_t* not_finite, cudaStream_t stream) {
  Int8Arguments a{};
  a.codes = make_tensor(codes);
  a.heads = codes.heads();
  a.tiles = tiles_of(codes.tokens(), kTileKeys);
  a.words = tiles_of(codes.tokens(), 32);
  a.rows = rows;
  a.out = static_cast<int8_t*>(tiles);
  a.not_finite = not_finite;
  launch_items(codes.batch() * a.heads * a.tiles, [&](int64_t first, unsigned blocks) {
    int8_tiles_kernel<<<blocks, kInt8Threads, 0, stream>>>(a, first);
  });
}

}  // namespace sage::cuda
