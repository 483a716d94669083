// Contexts of 128k and of a million tokens, on a GPU with room for them: sampled rows against float64, no further off
// than those of 4k tokens.
import { assertLess, assertLessOrEqual } from "@std/assert";
import {
  attention,
  type AttentionOptions,
  Device,
  explain,
  NoDeviceError,
  relativeL1,
  type Tensor,
  toFloat32,
} from "../mod.ts";
import { normal, uniform } from "./reference.ts";

const heads = 8, headDim = 128;
const normals = new Float16Array(normal(7, 65536));
/** Value of every f16 by its bits. */
const values = Float64Array.from(
  toFloat32(new Float16Array(Uint16Array.from({ length: 65536 }, (_, i) => i).buffer), "f16"),
);

/** A head [tokens, channels] after the other of N(0, 1), of 65536 different values, from an xorshift generator. */
function randomData(seed: number, tokens: number): Float16Array<ArrayBuffer> {
  const data = new Float16Array(heads * tokens * headDim);
  const bits = new Uint16Array(data.buffer), table = new Uint16Array(normals.buffer);
  let state = seed;
  for (let i = 0; i < bits.length; ++i) {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    bits[i] = table[(state ^ state >>> 16) & 0xffff];
  }
  return data;
}

/** One row of attention in float64; codes are the bits of f16. */
function exactRow(
  query: Uint16Array,
  keys: Uint16Array,
  vs: Uint16Array,
  visible: number,
): Float64Array {
  const q = Float64Array.from(query, (code) => values[code] / Math.sqrt(headDim));
  const scores = new Float64Array(visible);
  let most = -Infinity;
  for (let j = 0; j < visible; ++j) {
    let score = 0;
    for (let c = 0; c < headDim; ++c) score += q[c] * values[keys[j * headDim + c]];
    scores[j] = score;
    most = Math.max(most, score);
  }
  const out = new Float64Array(headDim);
  let sum = 0;
  for (let j = 0; j < visible; ++j) {
    const weight = Math.exp(scores[j] - most);
    sum += weight;
    for (let c = 0; c < headDim; ++c) out[c] += weight * values[vs[j * headDim + c]];
  }
  return out.map((value) => value / sum);
}

/** Attention over one sequence: relative L1 of sampled rows, of the later half where it is causal. */
async function errorOf(
  device: Device,
  tokens: number,
  rows: number,
  options: AttentionOptions,
): Promise<number> {
  const [qData, kData, vData] = [1, 2, 3].map((seed) => randomData(seed, tokens));
  const shape = [1, heads, tokens, headDim];
  using q = device.tensor(qData, shape) as Tensor<"f16">;
  using k = device.tensor(kData, shape) as Tensor<"f16">;
  using v = device.tensor(vData, shape) as Tensor<"f16">;
  const { workspaceBytes } = explain(q, k, v, options);
  assertLessOrEqual(workspaceBytes, 3.1 * qData.length, "a byte of Q, K and V each, and scales");
  using out = attention(q, k, v, options);
  const result = await out.data();
  const next = uniform(5), actual: number[] = [], expected: number[] = [];
  const [qBits, kBits, vBits] = [qData, kData, vData].map(({ buffer }) => new Uint16Array(buffer));
  for (let i = 0; i < rows; ++i) {
    const head = i % heads, row = Math.floor(tokens * (1 + next()) / 2);
    const first = head * tokens * headDim, at = first + row * headDim;
    const ofHead = (bits: Uint16Array) => bits.subarray(first, first + tokens * headDim);
    const visible = options.causal ? row + 1 : tokens;
    const query = qBits.subarray(at, at + headDim);
    expected.push(...exactRow(query, ofHead(kBits), ofHead(vBits), visible));
    actual.push(...result.subarray(at, at + headDim));
  }
  return relativeL1(actual, expected);
}

/** A GPU with so much free memory, or none. */
function hasRoom(bytes: number): boolean {
  try {
    using device = Device.open("cuda");
    return device.info.freeBytes >= bytes;
  } catch (error) {
    if (error instanceof NoDeviceError) return false;
    throw error;
  }
}

for (const [name, tokens, gigabytes] of [["128k", 2 ** 17, 2], ["1M", 2 ** 20, 14]] as const) {
  for (const causal of [false, true]) {
    Deno.test({
      name: `auto over ${name} tokens, ${causal ? "causal" : "full"}, on cuda:0`,
      ignore: !hasRoom(gigabytes * 1e9),
      fn: async () => {
        using device = Device.open("cuda:0");
        const short = await errorOf(device, 4096, 64, { causal });
        const long = await errorOf(device, tokens, 16, { causal });
        assertLess(long, 1.1 * short, "relative L1");
      },
    });
  }
}
