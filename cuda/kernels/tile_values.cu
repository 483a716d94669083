// Codes of V as FP8 products take them: in tiles of 64 keys, a row for each channel.
#include "encode.cuh"

namespace sage::cuda {
namespace {

constexpr int kTileKeys = 64, kThreads = 256;
constexpr int kPitch = kTileKeys + 4;  // of a row in shared memory

struct TileArguments {
  Tensor v;
  uint8_t* tiles;
  int64_t heads, tiles_a_head;
  int channels;  // of a tile
};

// Where in its 16 keys one lies: those whose scores one lane of a fragment holds come together.
__device__ __forceinline__ int place_of_key(int key) { return key % 8 / 2 * 4 + key / 8 * 2 + key % 2; }

// -0 is left to what is not finite, and does not matter.
__device__ __forceinline__ uint8_t code_of(float x, uint8_t code) {
  if (is_finite(x)) return code == 0x80u ? 0 : code;
  return x != x ? kNotANumberCode : x > 0.0f ? kInfinityCode : kMinusInfinityCode;
}

template <DType kType>
__global__ void __launch_bounds__(kThreads) tile_values_kernel(const __grid_constant__ TileArguments a, Place corner) {
  extern __shared__ uint32_t shared[];
  auto* const codes = reinterpret_cast<uint8_t*>(shared);  // [channels][kPitch]
  const Place place = place_of_block(corner);
  const char* const plane = plane_of(a.v, place.plane);
  const int octets = a.channels / 8;
#pragma unroll 1
  for (int i = threadIdx.x; i < kTileKeys * octets; i += kThreads) {
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
  for (int i = threadIdx.x; i < a.channels * kWords; i += kThreads) {
    to[i] = shared[i / kWords * (kPitch / 4) + i % kWords];
  }
}

}  // namespace

void launch_tile_values(const View& v, const View& tiles, cudaStream_t stream) {
  TileArguments a{};
  a.v = make_tensor(v);
  a.tiles = static_cast<uint8_t*>(tiles.data);
  a.heads = v.heads();
  a.tiles_a_head = tiles_of(v.tokens(), kTileKeys);
  a.channels = static_cast<int>(tiles.tokens() / a.tiles_a_head);
  const auto launch = [&](auto kernel) {
    launch_grid(v, a.tiles_a_head,
                [&](dim3 grid, Place corner) { kernel<<<grid, kThreads, a.channels * kPitch, stream>>>(a, corner); });
  };
  v.dtype == DType::kE4M3 ? launch(tile_values_kernel<DType::kE4M3>) : launch(tile_values_kernel<DType::kF16>);
}

}  // namespace sage::cuda
