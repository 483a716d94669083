// INT8 codes of V as the products of bytes take them: tiles of 64 keys, a row for every channel.
#include "tile.cuh"

namespace sage::cuda {
namespace {

constexpr int kThreads = 128, kKeys = 64;

struct ValueTileArguments {
  Tensor codes;
  int64_t heads, tiles, words;  // of a batch; of one head
  int rows;                     // of a tile: channels, padded
  int8_t* out;                  // [planes, tiles, rows, kKeys]
  uint32_t* not_finite;         // [planes, words]
};

// Where key `key` of 16 stands in a row, so that a lane's scores are four neighbours: 8j + 2c + e goes to 4c + 2j + e.
__device__ __forceinline__ int place_of_key(int key) { return key % 8 / 2 * 4 + key / 8 * 2 + key % 2; }

// One block a tile; a thread takes 16 keys of a channel.
__global__ void __launch_bounds__(kThreads)
    value_tiles_kernel(const __grid_constant__ ValueTileArguments a, int64_t first) {
  __shared__ uint32_t marks[kKeys / 32];
  if (threadIdx.x < kKeys / 32) marks[threadIdx.x] = 0;
  __syncthreads();
  const int64_t item = first + blockIdx.x, tile = item % a.tiles, plane = item / a.tiles, key0 = tile * kKeys;
  const char* const from = plane_of(a.codes, {plane / a.heads, plane % a.heads});
#pragma unroll 1
  for (int i = threadIdx.x; i < a.rows * (kKeys / 16); i += kThreads) {
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
    int8_t* const to = a.out + ((plane * a.tiles + tile) * a.rows + channel) * kKeys + part * 16;
    *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
  }
  __syncthreads();
  const int64_t word = tile * (kKeys / 32) + threadIdx.x;
  if (threadIdx.x < kKeys / 32 && word < a.words) a.not_finite[plane * a.words + word] = marks[threadIdx.x];
}

}  // namespace

void launch_value_tiles(const View& codes, int rows, void* tiles, uint32_t* not_finite, cudaStream_t stream) {
  ValueTileArguments a{};
  a.codes = make_tensor(codes);
  a.heads = codes.heads();
  a.tiles = tiles_of(codes.tokens(), kKeys);
  a.words = tiles_of(codes.tokens(), 32);
  a.rows = rows;
  a.out = static_cast<int8_t*>(tiles);
  a.not_finite = not_finite;
  launch_items(codes.batch() * a.heads * a.tiles,
               [&](int64_t first, unsigned blocks) { value_tiles_kernel<<<blocks, kThreads, 0, stream>>>(a, first); });
}

}  // namespace sage::cuda
