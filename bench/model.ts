// How long attention takes and how much memory, from its sizes: cycles for the work that each multiprocessor does,
// bytes for what must be stored. The constants of a kernel are fitted to some rows of a record and hold for the others.
import type { Results, Row, Shape } from "./format.ts";

/** Queries of a block, as work is counted. */
export const blockRows = 128;
const tileKeys = 64;

/** Attention as multiprocessors meet it, counted in tiles of 128 queries by 64 keys and in blocks of 128 queries. */
export interface Work {
  /** On one multiprocessor. */
  tiles: number;
  /** Those of them that are of causal calls. */
  causalTiles: number;
  /** On one multiprocessor. */
  blocks: number;
  /** Those of them whose last tiles are masked. */
  masked: number;
}

/**
 * The work of a shape, spread over multiprocessors, for a kernel that takes so many queries at a time. Where blocks
 * are alike they are done in rounds, the last of which keeps all waiting; causal ones are taken longest first.
 */
export function workOf(shape: Shape, multiprocessors: number, queriesAtOnce = blockRows): Work {
  const { batch, heads, tokens, queries = tokens, causal } = shape;
  const rows = Math.ceil(queries / queriesAtOnce), most = Math.ceil(tokens / tileKeys);
  let tiles = 0;
  for (let row = 0; row < rows; ++row) {
    const keys = causal ? Math.max(0, (row + 1) * queriesAtOnce + tokens - queries) : tokens;
    tiles += Math.min(most, Math.ceil(keys / tileKeys));
  }
  const share = batch * heads * rows / multiprocessors;
  const done = causal ? share : Math.ceil(share);
  const blocks = done * queriesAtOnce / blockRows;
  const all = blocks * tiles / rows;
  return { tiles: all, causalTiles: causal ? all : 0, blocks, masked: causal ? blocks : 0 };
}

/** A model of one kernel at one head dimension. */
export interface TimeModel {
  /** Cycles of a multiprocessor for a tile of 128 queries by 64 keys. */
  cyclesPerTile: number;
  /** What it takes more of them in a causal call, which may be another instance and finds less in the cache. */
  cyclesPerCausalTile: number;
  /** Cycles of a multiprocessor for what a block of 128 queries costs besides: quantizing, loading, storing. */
  cyclesPerBlock: number;
  /** Cycles of a multiprocessor for the mask of a block. */
  cyclesPerMask: number;
  /** Microseconds of a call without work. */
  launchUs: number;
  /** Queries that the kernel takes at a time, where a call does not tell. */
  queriesAtOnce: number;
  multiprocessors: number;
  clockMHz: number;
}

/** Milliseconds of a call. */
export function predictMs(model: TimeModel, shape: Shape): number {
  const { cyclesPerTile, cyclesPerCausalTile, cyclesPerBlock, cyclesPerMask, launchUs, clockMHz } =
    model;
  const { tiles, causalTiles, blocks, masked } = workOf(
    shape,
    model.multiprocessors,
    model.queriesAtOnce,
  );
  const cycles = tiles * cyclesPerTile + causalTiles * cyclesPerCausalTile +
    blocks * cyclesPerBlock + masked * cyclesPerMask;
  return cycles / clockMHz / 1e3 + launchUs / 1e3;
}

/** Milliseconds of a measured call, whose blocks may be others than those of the kernel's other calls. */
export function predictRow(model: TimeModel, row: Row): number {
  return predictMs(
    { ...model, queriesAtOnce: row.queriesAtOnce ?? model.queriesAtOnce },
    shapeOf(row),
  );
}

/** Whether the model speaks about a row: every multiprocessor has several blocks, so that none waits for others. */
export function inDomain(shape: Shape, multiprocessors: number): boolean {
  const { tokens, queries = tokens } = shape;
  return queries > 1 && workOf(shape, multiprocessors).blocks >= 3;
}

// ---- fitting -------------------------------------------------------------------------------------

/** Solves a small system of linear equations; undefined where it has no single solution. */
function solve(matrix: number[][], right: number[]): number[] | undefined {
  const n = right.length, a = matrix.map((row, i) => [...row, right[i]]);
  for (let i = 0; i < n; ++i) {
    const best = a.slice(i).reduce(
      (k, row, j) => Math.abs(row[i]) > Math.abs(a[k][i]) ? i + j : k,
      i,
    );
    [a[i], a[best]] = [a[best], a[i]];
    if (Math.abs(a[i][i]) < 1e-12) return;
    for (let j = 0; j < n; ++j) {
      if (j === i) continue;
      const factor = a[j][i] / a[i][i];
      for (let k = i; k <= n; ++k) a[j][k] -= factor * a[i][k];
    }
  }
  return a.map((row, i) => row[n] / row[i]);
}

/** Numbers from 0 up with the least relative squared error: features · numbers ≈ 1, every feature over its value. */
export function fit(features: readonly number[][]): number[] {
  return fitScaled(features, (rows) => fitWeighted(rows, rows.map(() => 1)));
}

const rounds = 100;

/**
 * The same with the least largest error: the weights of rows grow with their errors, round by round (Lawson's
 * algorithm).
 */
export function fitLargest(features: readonly number[][]): number[] {
  return fitScaled(features, (rows) => {
    let best: number[] = [], least = Infinity, weights = rows.map(() => 1);
    for (let round = 0; round < rounds && least > 1e-9; ++round) {
      const found = fitWeighted(rows, weights);
      const errors = rows.map((row) => Math.abs(dot(row, found) - 1));
      const largest = Math.max(...errors);
      if (largest < least) [best, least] = [found, largest];
      const grown = weights.map((weight, i) => weight * errors[i]);
      const sum = grown.reduce((a, b) => a + b);
      weights = grown.map((weight) => weight / sum);
    }
    return best;
  });
}

/** Fits with features between 0 and 1. */
function fitScaled(
  features: readonly number[][],
  fitRows: (rows: readonly number[][]) => number[],
): number[] {
  const scale = features[0].map((_, i) => Math.max(...features.map((row) => row[i])));
  const best = fitRows(features.map((row) => row.map((value, i) => value / scale[i])));
  return best.map((value, i) => value / scale[i]);
}

function dot(a: readonly number[], b: readonly number[]): number {
  return a.reduce((sum, value, i) => sum + value * b[i], 0);
}

/** Least squares of weighted rows: every choice of numbers above 0 is solved, the best that is possible wins. */
function fitWeighted(features: readonly number[][], weights: readonly number[]): number[] {
  const count = features[0].length;
  let best: number[] = new Array(count).fill(0), least = Infinity;
  for (let subset = 1; subset < 2 ** count; ++subset) {
    const used = Array.from({ length: count }, (_, i) => i).filter((i) => subset >> i & 1);
    const sum = (f: (row: number[]) => number) =>
      features.reduce((sum, row, i) => sum + weights[i] * f(row), 0);
    const found = solve(
      used.map((i) => used.map((j) => sum((row) => row[i] * row[j]))),
      used.map((i) => sum((row) => row[i])),
    );
    if (!found || found.some((value) => value < 0)) continue;
    const all: number[] = new Array(count).fill(0);
    used.forEach((i, k) => all[i] = found[k]);
    const error = sum((row) => (dot(row, all) - 1) ** 2);
    if (error < least) [best, least] = [all, error];
  }
  return best;
}

/** A row of attention as a shape. */
export function shapeOf(row: Row): Shape {
  const { headDim, causal = false, batch, heads, kvHeads, tokens, queries } = row;
  return { headDim, causal, batch, heads, kvHeads, tokens, ...queries ? { queries } : {} };
}

/**
 * Of rows of one kernel, those that the model is fitted to: of every length those with the largest batch, of smaller
 * ones every other product of batch and heads. The rest are what it is judged by.
 */
export function fittedOf(rows: readonly Row[]): Row[] {
  return rows.filter(({ batch, heads, tokens }) => {
    const most = Math.max(...rows.filter((row) => row.tokens === tokens).map(({ batch }) => batch));
    return batch === most || Math.round(Math.log2(batch * heads)) % 2 === 1;
  });
}

/** Whether the model speaks about a kernel: those that smooth queries make one product more, of another size. */
export function isModelled({ kernel, smoothQ }: Row): boolean {
  return !smoothQ && kernel !== "sage2-int4";
}

/** The model of rows that differ in mask and sizes only; undefined where there are too few. */
export function fitTime(
  rows: readonly Row[],
  { multiprocessors, clocks }: Results,
): TimeModel | undefined {
  const sms = multiprocessors ?? 132, clockMHz = clocks?.sm.median;
  const used = fittedOf(rows).filter((row) => inDomain(shapeOf(row), sms));
  if (used.length < 5 || clockMHz === undefined) return;
  const queriesAtOnce = used[0].queriesAtOnce ?? blockRows;
  const works = used.map((row) => workOf(shapeOf(row), sms, row.queriesAtOnce));
  // Where all have about as many blocks, what a call takes is part of what its blocks take.
  const blocks = works.map(({ blocks }) => blocks);
  const call = Math.max(...blocks) > 1.5 * Math.min(...blocks) ? [1] : [];
  const [perTile, perCausalTile, perBlock, perMask, launch = 0] = fitLargest(
    used.map(({ ms }, i) => {
      const { tiles, causalTiles, blocks, masked } = works[i];
      return [tiles, causalTiles, blocks, masked, ...call].map((value) => value / ms);
    }),
  );
  return {
    cyclesPerTile: perTile * clockMHz * 1e3,
    cyclesPerCausalTile: perCausalTile * clockMHz * 1e3,
    cyclesPerBlock: perBlock * clockMHz * 1e3,
    cyclesPerMask: perMask * clockMHz * 1e3,
    launchUs: launch * 1e3,
    queriesAtOnce,
    multiprocessors: sms,
    clockMHz,
  };
}

// ---- memory --------------------------------------------------------------------------------------

/** Bytes of workspace: for each element of Q, for each of K with that of V, and of any call. */
export interface MemoryModel {
  perQuery: number;
  perKey: number;
  fixed: number;
}

function elements(
  { batch, heads, kvHeads, tokens, queries = tokens, headDim }: Shape,
): [number, number] {
  return [batch * heads * queries * headDim, batch * kvHeads * tokens * headDim];
}

/** The model of rows of one kernel; undefined where they tell no workspace, or none is taken. */
export function fitMemory(rows: readonly Row[]): MemoryModel | undefined {
  const used = rows.filter(({ tokens, workspaceBytes }) =>
    workspaceBytes && Math.round(Math.log2(tokens)) % 2 === 0
  );
  if (!used.length) return;
  const [perQuery, perKey, fixed] = fit(used.map((row) => {
    const [queries, keys] = elements(shapeOf(row));
    return [queries, keys, 1].map((value) => value / row.workspaceBytes!);
  }));
  return { perQuery, perKey, fixed };
}

/** Bytes of workspace of a call. */
export function predictBytes({ perQuery, perKey, fixed }: MemoryModel, shape: Shape): number {
  const [queries, keys] = elements(shape);
  return perQuery * queries + perKey * keys + fixed;
}

// ---- several GPUs --------------------------------------------------------------------------------

/** Context parallelism: every GPU keeps its queries, keys and values go around a ring. */
export interface Ring {
  gpus: number;
  tokens: number;
  heads: number;
  kvHeads: number;
  headDim: number;
  causal: boolean;
}

/** Bytes of one element of K with its V, and what scales add to every token of a head. */
export interface Wire {
  name: string;
  bytesPerPair: number;
  scaleBytesPerToken: number;
}

/** Keys and values as they are, or as kernel sage2 takes them: INT8 with four scales for 64 keys, FP8. */
export const wires: readonly Wire[] = [
  { name: "bf16", bytesPerPair: 4, scaleBytesPerToken: 0 },
  { name: "INT8 and FP8", bytesPerPair: 2, scaleBytesPerToken: 4 * 4 / 64 },
];

/** Bytes that a GPU sends in a step. */
export function stepBytes({ gpus, tokens, kvHeads, headDim }: Ring, wire: Wire): number {
  return tokens / gpus * kvHeads * (headDim * wire.bytesPerPair + wire.scaleBytesPerToken);
}

/** Milliseconds of attention in a step, masks shared out evenly. */
export function stepComputeMs(ring: Ring, tflops: number): number {
  const { gpus, tokens, heads, headDim, causal } = ring;
  return 4 * heads * (tokens / gpus) ** 2 * headDim / (causal ? 2 : 1) / tflops / 1e9;
}

/** Milliseconds of sending in a step. */
export function stepWireMs(ring: Ring, wire: Wire, gbs: number): number {
  return stepBytes(ring, wire) / gbs / 1e6;
}

/** Tokens a GPU from which sending hides behind computing. */
export function tokensToHide(ring: Ring, wire: Wire, gbs: number, tflops: number): number {
  const one = { ...ring, gpus: 1, tokens: 1 };
  return stepWireMs(one, wire, gbs) / stepComputeMs(one, tflops);
}
