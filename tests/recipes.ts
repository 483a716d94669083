// Quantized attention in float64: what each kernel and option of attention() is to give but for the rounding of sums.
import type { AttentionOptions } from "../mod.ts";
import {
  count,
  type Dims,
  e4m3Code,
  e4m3Value,
  type Problem,
  referenceDequantize,
  referenceMeans,
  referenceQuantize,
  type ReferenceRecipe,
  referenceSmooth,
  roundHalfEven,
} from "./reference.ts";

/** Rows of a query tile, and keys of a key tile. */
const queryTile = 128, keyTile = 64;

/** The sign that rotation gives a channel. */
export function rotationSign(channel: number): number {
  const mixed = Math.imul(channel + 1, 0x9e3779b1);
  return Math.imul(mixed ^ (mixed >>> 15), 0x85ebca6b) < 0 ? -1 : 1;
}

/** The least power of two that is no less. */
export function rotatedChannels(channels: number): number {
  return 2 ** Math.ceil(Math.log2(channels));
}

/** Rows times diag(signs / channels) times the Hadamard matrix, in float32 and in the order of numerics.h. */
export function referenceRotate(
  x: ArrayLike<number>,
  [batch, heads, tokens, channels]: Dims,
): { values: Float32Array<ArrayBuffer>; dims: Dims } {
  const width = rotatedChannels(channels), dims: Dims = [batch, heads, tokens, width];
  const values = new Float32Array(count(dims));
  for (let row = 0; row < batch * heads * tokens; ++row) {
    const at = values.subarray(row * width, (row + 1) * width);
    for (let c = 0; c < channels; ++c) at[c] = x[row * channels + c] * rotationSign(c) / width;
    for (let step = 1; step < width; step *= 2) {
      for (let c = 0; c < width; ++c) {
        if (c & step) continue;
        const a = at[c], b = at[c + step];
        at[c] = a + b;
        at[c + step] = a - b;
      }
    }
  }
  return { values, dims };
}

/** Whether the rows of a query tile take a key tile exactly: the first, and those that hold a key of the diagonal. */
export function inBand(query: number, key: number, offset: number): boolean {
  const rows = Array.from({ length: queryTile }, (_, i) => query * queryTile + i + offset);
  return key === 0 || rows.some((diagonal) => Math.floor(diagonal / keyTile) === key);
}

/** Q or K, as the numbers that its codes stand for; rotated where the options say so. */
function coded(
  x: ArrayLike<number>,
  dims: Dims,
  operand: "query" | "key",
  { kernel = "sage1", granularity, rotate }: AttentionOptions,
): { values: Float32Array; dims: Dims } {
  const rotated = rotate ? referenceRotate(x, dims) : { values: x, dims };
  const recipe: ReferenceRecipe = {
    operand,
    dtype: kernel === "sage2-int4" ? "i4" : "i8",
    granularity: granularity ?? (kernel.startsWith("sage1") ? "block" : "thread"),
  };
  const { codes, scales } = referenceQuantize(rotated.values, rotated.dims, recipe);
  return {
    values: referenceDequantize(codes, scales, rotated.dims, recipe),
    dims: rotated.dims,
  };
}

/** V as the numbers that its codes stand for. */
function codedValues(v: ArrayLike<number>, dims: Dims, kernel: string): ArrayLike<number> {
  if (kernel === "sage1") return Float64Array.from(v, Math.f16round);
  const dtype = kernel.endsWith("int8") ? "i8" : "e4m3";
  const recipe: ReferenceRecipe = { operand: "value", dtype, granularity: "channel" };
  const { codes, scales } = referenceQuantize(v, dims, recipe);
  return referenceDequantize(codes, scales, dims, recipe);
}

/** P in [0, 1] as the kernel rounds it. */
function roundProbability(p: number, kernel: string): number {
  if (kernel === "sage1") return Math.f16round(p);
  if (kernel === "sage1-int8") return roundHalfEven(127 * p) / 127;
  if (kernel === "sage-int8") return roundHalfEven(255 * p) / 255;
  return e4m3Value(e4m3Code(448 * p)) / 448;
}

/** The sum of some weights, relative to the largest score, and that of their values. */
class Weights {
  top = -Infinity;
  sum = 0;
  readonly values: Float64Array;

  constructor(width: number) {
    this.values = new Float64Array(width);
  }

  /** Makes the sums relative to a score that is no less than the largest so far. */
  raise(top: number): void {
    const keep = this.top === -Infinity ? 0 : Math.exp(this.top - top);
    this.top = top;
    this.sum *= keep;
    this.values.forEach((value, c) => this.values[c] = value * keep);
  }

  add(weight: number, counted: number, values: ArrayLike<number>, start: number): void {
    this.sum += counted;
    for (let c = 0; c < this.values.length; ++c) this.values[c] += weight * values[start + c];
  }
}

/**
 * The order in which tiles of keys are met, as P is rounded relative to the largest score so far: the CPU goes from
 * the first to the last, CUDA's portable kernels from the last to the first, and through those of the band at the end.
 */
export type Walk = "up" | "down";

/** Attention with the options' quantization, in HND order. */
export function referenceRecipe(
  { q, k, v, qDims, kDims, vDims }: Problem,
  options: AttentionOptions,
  walk: Walk = "up",
): { out: Float64Array; lse: Float64Array } {
  const { kernel = "sage1", causal, smoothK = true, kMeanRows = kDims[2], band, firstToken } =
    options;
  const { smoothQ = kernel === "sage2-int4", smoothV } = options;
  const [batch, heads, queries, channels] = qDims, [, kvHeads, keys] = kDims, width = vDims[3];
  const scale = 1 / Math.sqrt(channels), offset = keys - queries;
  const qMeans = smoothQ ? referenceMeans(q, qDims, queryTile) : undefined;
  const kMeans = smoothK ? referenceMeans(k, kDims, kMeanRows) : undefined;
  const qLess = qMeans ? referenceSmooth(q, qDims, qMeans, queryTile) : q;
  const kLess = kMeans ? referenceSmooth(k, kDims, kMeans, kMeanRows) : k;
  const qCodes = coded(qLess, qDims, "query", options);
  const kCodes = coded(kLess, kDims, "key", options);
  const vMeans = smoothV ? referenceMeans(v, vDims) : undefined;
  const vLess = vMeans ? referenceSmooth(v, vDims, vMeans) : v;
  const vCodes = codedValues(vLess, vDims, kernel);
  const codeChannels = qCodes.dims[3], gain = options.rotate ? codeChannels : 1;

  const dot = (a: ArrayLike<number>, ai: number, b: ArrayLike<number>, bi: number, n: number) => {
    let sum = 0;
    for (let c = 0; c < n; ++c) sum += a[ai * n + c] * b[bi * n + c];
    return sum;
  };
  const out = new Float64Array(batch * heads * queries * width);
  const lse = new Float64Array(batch * heads * queries);
  for (let row = 0; row < lse.length; ++row) {
    const i = row % queries, head = Math.floor(row / queries);
    const kvHead = Math.floor(head / heads) * kvHeads +
      Math.floor(head % heads / (heads / kvHeads));
    const qMean = head * Math.ceil(queries / queryTile) + Math.floor(i / queryTile);
    const visible = causal ? Math.max(0, Math.min(keys, i + offset + 1)) : keys;
    const exactScore = (j: number) => scale * dot(q, row, k, kvHead * keys + j, channels);
    const codedScore = (j: number) => {
      const key = kvHead * keys + j;
      const kMean = kvHead * Math.ceil(keys / kMeanRows) + Math.floor(j / kMeanRows);
      return scale * (gain * dot(qCodes.values, row, kCodes.values, key, codeChannels) +
        (qMeans ? dot(qMeans, qMean, kLess, key, channels) : 0) +
        (kMeans ? dot(q, row, kMeans, kMean, channels) : 0));
    };
    const weights = new Weights(width);
    const inBandOf = (tile: number) => band && inBand(Math.floor(i / queryTile), tile, offset);
    const tiles = Array.from({ length: Math.ceil(visible / keyTile) }, (_, tile) => tile);
    if (walk === "down") {
      tiles.reverse().sort((a, b) => Number(inBandOf(a)) - Number(inBandOf(b)));
    }
    for (const tile of tiles) {
      const first = tile * keyTile, exact = inBandOf(tile);
      const from = firstToken ? Math.max(first, 1) : first;
      const last = Math.min(visible, first + keyTile);
      const scores = Array.from(
        { length: Math.max(0, last - from) },
        (_, j) => (exact ? exactScore : codedScore)(from + j),
      );
      if (scores.length === 0) continue;
      const most = Math.max(...scores);
      weights.raise(Math.max(most, weights.top));
      const relative = kernel === "sage-int8" ? most : weights.top;
      const share = Math.exp(relative - weights.top);
      scores.forEach((score, j) => {
        const start = (kvHead * keys + from + j) * width, p = Math.exp(score - relative);
        if (exact) return weights.add(p * share, p * share, vLess, start);
        const rounded = roundProbability(p, kernel);
        const counted = kernel === "sage-int8" ? rounded : p;
        weights.add(rounded * share, counted * share, vCodes, start);
      });
    }
    if (firstToken && visible > 0) {
      const score = exactScore(0);
      weights.raise(Math.max(score, weights.top));
      const p = Math.exp(score - weights.top);
      weights.add(p, p, vLess, kvHead * keys * width);
    }
    lse[row] = weights.top + Math.log(weights.sum);
    for (let c = 0; c < width && visible > 0; ++c) {
      const mean = vMeans ? vMeans[kvHead * width + c] : 0;
      out[row * width + c] = weights.values[c] / weights.sum + mean;
    }
  }
  return { out, lse };
}
