// What every operation should give: attention in float64, and numerics.h said again in TypeScript. Short enough to
// be checked by reading; tests/reference_test.ts holds cases checked by hand.
import type { CodeDType, FloatDType, Granularity, Layout, MaskOptions, Operand } from "../mod.ts";

// ---- random numbers -----------------------------------------------------------------------------------

/** Uniform numbers in [0, 1), the same for the same seed. */
export function uniform(seed: number): () => number {
  let state = seed | 0;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** `length` numbers of N(0, 1). */
export function normal(seed: number, length: number): Float32Array<ArrayBuffer> {
  const next = uniform(seed);
  return Float32Array.from(
    { length },
    () => Math.sqrt(-2 * Math.log(1 - next())) * Math.cos(2 * Math.PI * next()),
  );
}

// ---- rounding -----------------------------------------------------------------------------------------

/** To the nearest integer, ties to even. */
export function roundHalfEven(value: number): number {
  const low = Math.floor(value);
  const up = value - low > 0.5 || (value - low === 0.5 && low % 2 !== 0);
  return up ? low + 1 : low;
}

/** The value of an e4m3fn code: sign, 4 bits of exponent (bias 7), 3 bits of mantissa. */
export function e4m3Value(code: number): number {
  const sign = code & 0x80 ? -1 : 1, exponent = (code >> 3) & 15, mantissa = code & 7;
  if ((code & 0x7f) === 0x7f) return NaN;
  return sign * (exponent === 0 ? mantissa / 512 : (1 + mantissa / 8) * 2 ** (exponent - 7));
}

const e4m3Codes = new Map(Array.from({ length: 0x7f }, (_, code) => [e4m3Value(code), code]));

/** The code whose value is nearest, of two the one with an even mantissa, 448 for all above. */
export function e4m3Code(value: number): number {
  if (Number.isNaN(value)) return 0x7f;
  const sign = value < 0 || Object.is(value, -0) ? 0x80 : 0, magnitude = Math.abs(value);
  const step = 2 ** (Math.max(-6, Math.floor(Math.log2(magnitude))) - 3);
  return sign | e4m3Codes.get(Math.min(448, roundHalfEven(magnitude / step) * step))!;
}

/** Rounds single precision to a dtype and back. */
export function roundTo(value: number, dtype: FloatDType): number {
  const single = Math.fround(value);
  if (dtype === "f32") return single;
  if (dtype === "f16") return Math.f16round(single);
  if (!Number.isFinite(single)) return single;
  const bits = new DataView(new ArrayBuffer(4));
  bits.setFloat32(0, single);
  const low = bits.getUint32(0) & 0xffff, high = bits.getUint32(0) >>> 16;
  bits.setUint32(0, (low > 0x8000 || (low === 0x8000 && high % 2 === 1) ? high + 1 : high) << 16);
  return bits.getFloat32(0);
}

// ---- shapes -------------------------------------------------------------------------------------------

/** [batch, heads, tokens, channels] */
export type Dims = readonly [number, number, number, number];

/** How many elements. */
export function count(dims: readonly number[]): number {
  return dims.reduce((product, length) => product * length, 1);
}

/** A shape in the order of a layout. */
export function inLayout([batch, heads, tokens, channels]: Dims, layout: Layout): Dims {
  return layout === "HND" ? [batch, heads, tokens, channels] : [batch, tokens, heads, channels];
}

/** Elements of [batch, heads, tokens, channels] moved to the order of a layout, or (`back`) from it. */
export function reorder<T extends { [index: number]: number; slice(): T }>(
  data: T,
  dims: Dims,
  layout: Layout,
  back = false,
): T {
  const moved = data.slice();
  if (layout === "HND") return moved;
  const [batch, heads, tokens, channels] = dims;
  for (let b = 0; b < batch; ++b) {
    for (let h = 0; h < heads; ++h) {
      for (let n = 0; n < tokens; ++n) {
        for (let c = 0; c < channels; ++c) {
          const hnd = ((b * heads + h) * tokens + n) * channels + c;
          const nhd = ((b * tokens + n) * heads + h) * channels + c;
          if (back) moved[hnd] = data[nhd];
          else moved[nhd] = data[hnd];
        }
      }
    }
  }
  return moved;
}

// ---- attention ----------------------------------------------------------------------------------------

/** Q, K and V in HND order, and their lengths. */
export interface Problem {
  q: ArrayLike<number>;
  k: ArrayLike<number>;
  v: ArrayLike<number>;
  qDims: Dims;
  kDims: Dims;
  vDims: Dims;
}

/** Numbers by [batch, heads, queries, keys], each dimension repeated where it is 1. */
export interface ReferenceMask {
  values: ArrayLike<number>;
  dims: Dims;
  /** Whether 0 hides a key and all else shows it; otherwise values are added to scores, and -Infinity hides. */
  bool: boolean;
}

/** What changes scores and the softmax: the mask, and numbers of every head (slopes also of every batch). */
export interface ReferenceTensors {
  mask?: ReferenceMask;
  sinks?: ArrayLike<number>;
  alibi?: ArrayLike<number>;
}

function maskAt(
  { values, dims }: ReferenceMask,
  ...index: [number, number, number, number]
): number {
  const at = index.reduce((at, i, d) => at * dims[d] + (dims[d] === 1 ? 0 : i), 0);
  return values[at];
}

/**
 * softmax(scale·Q·Kᵀ)·V in float64, over the keys that masks leave: query i stands at key i + offset. Scores are
 * capped, then added to; a sink counts in the denominator alone; a row that sees no key gives 0.
 */
export function referenceAttention(
  { q, k, v, qDims, kDims, vDims }: Problem,
  { causal = false, scale = 1 / Math.sqrt(qDims[3]), alignment, window, softcap }:
    & MaskOptions
    & { scale?: number } = {},
  { mask, sinks, alibi }: ReferenceTensors = {},
): { out: Float64Array; lse: Float64Array } {
  const [batch, heads, queries, channels] = qDims, [, kvHeads, keys] = kDims, width = vDims[3];
  const out = new Float64Array(batch * heads * queries * width);
  const lse = new Float64Array(batch * heads * queries);
  const offset = alignment === "top-left" ? 0 : keys - queries;
  const [before, after] = typeof window === "object"
    ? window
    : [window ?? Infinity, window ?? Infinity];
  for (let b = 0; b < batch; ++b) {
    for (let h = 0; h < heads; ++h) {
      const kvHead = b * kvHeads + Math.floor(h / (heads / kvHeads));
      const slope = alibi ? alibi[(alibi.length === heads ? 0 : b * heads) + h] : 0;
      const sink = sinks ? sinks[h] : -Infinity;
      for (let i = 0; i < queries; ++i) {
        const row = (b * heads + h) * queries + i, position = i + offset;
        const scores = new Map<number, number>(); // of the keys that are seen
        for (let j = 0; j < keys; ++j) {
          if (j < position - before || j > position + (causal ? 0 : after)) continue;
          const value = mask ? maskAt(mask, b, h, i, j) : 0;
          if (mask && value === (mask.bool ? 0 : -Infinity)) continue;
          let dot = 0;
          for (let c = 0; c < channels; ++c) {
            dot += q[row * channels + c] * k[(kvHead * keys + j) * channels + c];
          }
          const score = softcap ? softcap * Math.tanh(scale * dot / softcap) : scale * dot;
          const added = mask && !mask.bool ? value : 0;
          scores.set(j, score - slope * Math.abs(position - j) + added);
        }
        const most = [...scores.values()].reduce((a, b) => Math.max(a, b), sink);
        const sum = [...scores.values()].reduce(
          (a, b) => a + Math.exp(b - most),
          Math.exp(sink - most),
        );
        lse[row] = scores.size === 0 ? sink : most + Math.log(sum);
        for (const [j, score] of scores) {
          const p = Math.exp(score - most) / sum;
          for (let c = 0; c < width; ++c) {
            out[row * width + c] += p * v[(kvHead * keys + j) * width + c];
          }
        }
      }
    }
  }
  return { out, lse };
}

// ---- means --------------------------------------------------------------------------------------------

/** The mean of the finite ones of some values, summed in the order that numerics.h fixes; 0 where it is huge. */
export function referenceMean(column: readonly number[]): number {
  const fold = (lanes: number[], add: (a: number, b: number) => number) => {
    for (let step = lanes.length / 2; step >= 1; step /= 2) {
      for (let lane = 0; lane < step; ++lane) lanes[lane] = add(lanes[lane], lanes[lane + step]);
    }
    return lanes[0];
  };
  const chunks = new Array(32).fill(0); // float64
  for (let start = 0; start < column.length; start += 128) {
    const lanes = new Array(16).fill(0); // float32
    column.slice(start, start + 128).forEach((value, i) => {
      if (Number.isFinite(value)) lanes[i % 16] = Math.fround(lanes[i % 16] + value);
    });
    chunks[start / 128 % 32] += fold(lanes, (a, b) => Math.fround(a + b));
  }
  const finite = column.filter(Number.isFinite).length;
  const mean = Math.fround(fold(chunks, (a, b) => a + b) / finite); // NaN where there is none
  return Math.abs(mean) < 2 ** 119 ? mean : 0;
}

/** Means of every `blockRows` rows: [B, H, ⌈N / blockRows⌉, D]. */
export function referenceMeans(
  x: ArrayLike<number>,
  [batch, heads, tokens, channels]: Dims,
  blockRows: number = tokens,
): Float32Array<ArrayBuffer> {
  const blocks = Math.ceil(tokens / blockRows);
  const means = new Float32Array(batch * heads * blocks * channels);
  for (let i = 0; i < means.length; ++i) {
    const c = i % channels, block = Math.floor(i / channels) % blocks;
    const head = Math.floor(i / channels / blocks);
    const first = block * blockRows, rows = Math.min(blockRows, tokens - first);
    means[i] = referenceMean(
      Array.from({ length: rows }, (_, n) => x[(head * tokens + first + n) * channels + c]),
    );
  }
  return means;
}

/** x − mean in float32. */
export function referenceSmooth(
  x: ArrayLike<number>,
  [, , tokens, channels]: Dims,
  means: ArrayLike<number>,
  blockRows: number = tokens,
): Float32Array<ArrayBuffer> {
  const blocks = Math.ceil(tokens / blockRows);
  return Float32Array.from(x, (value, i) => {
    const c = i % channels, n = Math.floor(i / channels) % tokens;
    const head = Math.floor(i / channels / tokens);
    return value - means[(head * blocks + Math.floor(n / blockRows)) * channels + c];
  });
}

// ---- quantizers ---------------------------------------------------------------------------------------

/** How {@linkcode referenceQuantize} quantizes. */
export interface ReferenceRecipe {
  operand: Operand;
  dtype: CodeDType;
  granularity: Granularity;
  groupRows?: number;
  range?: number;
}

/** Which scale each element of a head has, and how many there are. */
export function referenceGroups(
  { operand, granularity, groupRows }: ReferenceRecipe,
  tokens: number,
  channels: number,
): { groupOf: (n: number, c: number) => number; groups: number } {
  const query = operand === "query";
  const rows = groupRows ?? (query ? granularity === "block" ? 128 : 32 : 64);
  const runs = Math.ceil(tokens / rows), run = (n: number) => Math.floor(n / rows);
  switch (granularity) {
    case "token":
      return { groupOf: (n) => n, groups: tokens };
    case "block":
    case "warp":
      return { groupOf: run, groups: runs };
    case "thread": // SageAttention2, Eq. 8
      return query
        ? { groupOf: (n) => run(n) * 8 + n % 8, groups: runs * 8 }
        : { groupOf: (n) => run(n) * 4 + Math.floor(n % 8 / 2), groups: runs * 4 };
    case "channel":
      return { groupOf: (_, c) => c, groups: channels };
  }
}

/** Codes (one number an element, not packed) and scales of [B, H, N, D]. */
export function referenceQuantize(
  x: ArrayLike<number>,
  [batch, heads, tokens, channels]: Dims,
  recipe: ReferenceRecipe,
): { codes: Float64Array; scales: Float32Array<ArrayBuffer> } {
  const { groupOf, groups } = referenceGroups(recipe, tokens, channels);
  const range = { i8: 127, i4: 7, e4m3: recipe.range ?? 448 }[recipe.dtype];
  const notFinite = { i8: -128, i4: -8, e4m3: 0x7f }[recipe.dtype];
  const most = new Float64Array(batch * heads * groups);
  const group = (i: number) =>
    Math.floor(i / channels / tokens) * groups +
    groupOf(Math.floor(i / channels) % tokens, i % channels);
  for (let i = 0; i < x.length; ++i) {
    if (Number.isFinite(x[i])) most[group(i)] = Math.max(most[group(i)], Math.abs(x[i]));
  }
  const usable = (amax: number) => amax >= 2 ** -100;
  const single = Math.fround(range);
  const codes = Float64Array.from(x, (value, i) => {
    if (!Number.isFinite(value)) return notFinite;
    const amax = most[group(i)];
    const scaled = Math.fround(value * (usable(amax) ? Math.fround(single / amax) : 0));
    return recipe.dtype === "e4m3" ? e4m3Code(scaled) : roundHalfEven(scaled) + 0;
  });
  return { codes, scales: Float32Array.from(most, (amax) => usable(amax) ? amax / single : 1) };
}

/** code · scale, plus the mean where there is one, in float32. */
export function referenceDequantize(
  codes: ArrayLike<number>,
  scales: ArrayLike<number>,
  [, , tokens, channels]: Dims,
  recipe: ReferenceRecipe,
  means?: { values: ArrayLike<number>; rows: number },
): Float32Array<ArrayBuffer> {
  const { groupOf, groups } = referenceGroups(recipe, tokens, channels);
  const value = (code: number) =>
    recipe.dtype === "e4m3"
      ? e4m3Value(code)
      : code === (recipe.dtype === "i8" ? -128 : -8)
      ? NaN
      : code;
  return Float32Array.from(codes, (code, i) => {
    const head = Math.floor(i / channels / tokens), n = Math.floor(i / channels) % tokens;
    const c = i % channels;
    const product = Math.fround(value(code) * scales[head * groups + groupOf(n, c)]);
    if (!means) return product;
    const blocks = Math.ceil(tokens / means.rows);
    return product +
      means.values[(head * blocks + Math.floor(n / means.rows)) * channels + c];
  });
}

/** i4 codes packed two a byte, the even channel low; odd rows end with a zero. */
export function packInt4(codes: ArrayLike<number>, channels: number): Uint8Array<ArrayBuffer> {
  const rowBytes = Math.ceil(channels / 2), rows = codes.length / channels;
  return Uint8Array.from({ length: rows * rowBytes }, (_, i) => {
    const at = Math.floor(i / rowBytes) * channels + i % rowBytes * 2;
    const odd = i % rowBytes * 2 + 1 < channels ? codes[at + 1] : 0;
    return (codes[at] & 15) | ((odd & 15) << 4);
  });
}
