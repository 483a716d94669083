// What the tests of attention share: problems, how far from the float64 definition each kernel may be, and measures.
import { assert, assertEquals, assertLess } from "@std/assert";
import {
  attention,
  type AttentionOptions,
  type Device,
  explain,
  type FloatDType,
  type Kernel,
  kernels,
  type Layout,
  relativeL1,
  rmse,
  type Tensor,
} from "../mod.ts";
import { download, type Lengths, poisoned, runs, uploadProblem } from "./devices.ts";
import { normal, type Problem, referenceAttention } from "./reference.ts";

/** Every kernel but auto. */
export type TestKernel = Exclude<Kernel, "auto">;

/** What comes back from a device. */
export type Values = Float32Array<ArrayBuffer>;

/** A problem whose numbers a test may change. */
export type FloatProblem = Problem & { q: Float32Array; k: Float32Array; v: Float32Array };

/** Q, K and V on a device. */
export type Tensors = { q: Tensor<FloatDType>; k: Tensor<FloatDType>; v: Tensor<FloatDType> };

/** Every element type of Q, K and V. */
export const dtypes: readonly FloatDType[] = ["f32", "f16", "bf16"];

/** Every kernel that quantizes. */
export const sageKernels = kernels.filter((kernel) => kernel !== "flash");

/** Whether Hopper's own kernel runs a call on groups of rows that are not those of quantize(). */
export function hasOwnGroups({ q, k, v }: Tensors, options: AttentionOptions): boolean {
  return ["sage2", "sage2-int4", "sage2++"].includes(options.kernel!) &&
    explain(q, k, v, exactly(options)).architecture === "sm_90";
}

/** What keeps a kernel of CUDA off groups of its own, which it has per thread alone. */
export function commonGroups({ kind }: Device, kernel: TestKernel): { granularity?: "token" } {
  const own = kind === "cuda" && ["sage2", "sage2-int4", "sage2++"].includes(kernel);
  return own ? { granularity: "token" } : {};
}

/** Every granularity of queries and keys. */
export const granularities = ["token", "block", "warp", "thread"] as const;

// ---- problems -----------------------------------------------------------------------------------------

/** Lengths, as a test's name shows them. */
export function nameOf(
  { batch = 1, heads = 1, kvHeads = heads, queries, ...rest }: Lengths,
): string {
  const { keys = queries, channels, width = channels } = rest;
  return `B${batch} H${heads}/${kvHeads} N${queries}/${keys} D${channels}/${width}`;
}

/** Adds to every channel of a head-major array a number of N(0, size²). */
export function biased(
  values: Float32Array,
  channels: number,
  size: number,
  seed: number,
): Float32Array {
  const offsets = normal(seed, channels).map((offset) => size * offset);
  return values.map((value, i) => value + offsets[i % channels]);
}

/** Every choice of what to smooth. */
export const smoothings = [0, 1, 2, 3, 4, 5, 6, 7].map((i) => ({
  smoothQ: (i & 1) !== 0,
  smoothK: (i & 2) !== 0,
  smoothV: (i & 4) !== 0,
}));

// ---- bounds of the mean -------------------------------------------------------------------------------

/** Of relative L1, and of the root mean square difference of log-sum-exp. */
interface MeanBounds {
  l1: number;
  lse: number;
}

/** The largest seen on N(0, 1), and 30 % more. */
export const meanBounds: Record<TestKernel, MeanBounds> = {
  "flash": { l1: 0.0005, lse: 0.0005 },
  "sage1": { l1: 0.016, lse: 0.0148 },
  "sage1-int8": { l1: 0.028, lse: 0.0148 },
  "sage2": { l1: 0.05, lse: 0.0148 },
  "sage2-int4": { l1: 0.275, lse: 0.11 },
  "sage2++": { l1: 0.053, lse: 0.0148 },
  "sage-int8": { l1: 0.028, lse: 0.0148 },
};

/** Rounding of the output, which the kernels share. */
export const rounding: Record<FloatDType, number> = { f32: 0, f16: 0.0004, bf16: 0.003 };

/** Root mean square difference of log-sum-exps; rows that see nothing must have -Infinity. */
export function lseDifference(actual: ArrayLike<number>, expected: Float64Array): number {
  const rows = expected.map((value, i) => {
    if (value === -Infinity) assertEquals(actual[i], -Infinity);
    return value === -Infinity ? 0 : actual[i] - value;
  });
  return rmse(rows, new Float64Array(rows.length));
}

const seen: Record<string, MeanBounds> = {};
addEventListener("unload", () => Deno.env.get("SAGE_SHOW") && console.log(seen));

/** Runs attention into poisoned memory and holds output and log-sum-exp against the bounds of the mean. */
export async function check(
  device: Device,
  problem: FloatProblem,
  dtype: FloatDType,
  options: AttentionOptions,
  layout: Layout = "HND",
  expected = referenceAttention(problem, options),
): Promise<void> {
  using inputs = uploadProblem(device, problem, dtype, layout);
  const { q, k, v } = inputs;
  if (!runs(q, k, v, options)) return;
  const { kernel } = explain(q, k, v, options);
  const [batch, heads, tokens] = problem.qDims;
  using out = poisoned(device, [batch, heads, tokens, problem.vDims[3]], dtype, layout);
  using result = attention(q, k, v, { ...exactly(options), out, returnLse: true });
  const actual = await download(result.out), lse = await download(result.lse);
  const l1 = relativeL1(actual, expected.out);
  const difference = lseDifference(lse, expected.lse);
  const most = seen[kernel] ??= { l1: 0, lse: 0 };
  most.l1 = Math.max(most.l1, l1 - rounding[dtype]);
  most.lse = Math.max(most.lse, difference);
  const what = `${kernel} ${dtype} ${layout} ${JSON.stringify(problem.qDims)} ${
    JSON.stringify(problem.kDims)
  }`;
  assertLess(l1, meanBounds[kernel].l1 + rounding[dtype], `relative L1 of ${what}`);
  assertLess(difference, meanBounds[kernel].lse, `lse of ${what}`);
}

// ---- bounds of the worst ------------------------------------------------------------------------------

/** Of relative L1 of all and of one row, and of the largest difference of log-sum-exp. */
interface WorstBounds {
  all: number;
  row: number;
  lse: number;
}

/** The largest seen on both devices, and a third more. */
export const worstBounds: Record<TestKernel, Record<FloatDType, WorstBounds>> = {
  flash: {
    f32: { all: 6e-7, row: 2e-6, lse: 2e-6 },
    f16: { all: 3.7e-4, row: 7.5e-4, lse: 3.5e-6 },
    bf16: { all: 2.9e-3, row: 5.4e-3, lse: 3.5e-6 },
  },
  sage1: quantized({ all: 0.017, row: 0.047, lse: 0.047 }),
  "sage1-int8": quantized({ all: 0.025, row: 0.055, lse: 0.047 }),
  sage2: quantized({ all: 0.049, row: 0.11, lse: 0.031 }),
  "sage2-int4": quantized({ all: 0.26, row: 0.66, lse: 0.68 }),
  "sage2++": quantized({ all: 0.047, row: 0.1, lse: 0.031 }),
  "sage-int8": quantized({ all: 0.025, row: 0.055, lse: 0.047 }),
};

/** Where quantization outweighs the rounding of the element types. */
function quantized(bound: WorstBounds): Record<FloatDType, WorstBounds> {
  return { f32: bound, f16: bound, bf16: bound };
}

/** The largest relative L1 distance of a row. */
export function worstRow(
  actual: ArrayLike<number>,
  reference: ArrayLike<number>,
  width: number,
): number {
  let worst = 0;
  for (let start = 0; start < reference.length; start += width) {
    let distance = 0, sum = 0;
    for (let i = start; i < start + width; ++i) {
      distance += Math.abs(actual[i] - reference[i]);
      sum += Math.abs(reference[i]);
    }
    if (!(distance <= worst * sum)) worst = distance / sum;
    if (Number.isNaN(worst)) return worst;
  }
  return worst;
}

/** The largest difference; infinities must be equal. */
export function worstDifference(actual: ArrayLike<number>, reference: ArrayLike<number>): number {
  assertEquals(actual.length, reference.length);
  return Array.from(
    actual,
    (value, i) => value === reference[i] ? 0 : Math.abs(value - reference[i]),
  )
    .reduce((a, b) => Math.max(a, b), 0);
}

/** Fails where `value` is above `bound`, or is NaN. */
export function within(value: number, bound: number, what: string): void {
  assert(value <= bound, `${what}: ${value} is above ${bound}`);
}

// ---- what attention gives -----------------------------------------------------------------------------

/** The exact exponential, unless the options say otherwise: the fast one has tests of its own. */
export function exactly(options: AttentionOptions): AttentionOptions {
  return options.kernel === "sage2" ? { exponential: "exact", ...options } : options;
}

/** Runs attention and returns what it wrote. */
export async function run(
  { q, k, v }: Tensors,
  options: AttentionOptions,
): Promise<{ out: Values; lse: Values }> {
  using result = attention(q, k, v, { ...options, returnLse: true });
  return { out: await download(result.out), lse: await download(result.lse) };
}

/** Bits, so that NaN equals NaN and 0 does not equal -0. */
export function bits(values: Values): Uint32Array {
  return new Uint32Array(values.map((value) => Number.isNaN(value) ? NaN : value).buffer);
}

/** NaN, an infinity or finite, of every element. */
export function kinds(values: ArrayLike<number>): string[] {
  return Array.from(values, (x) => Number.isFinite(x) ? "finite" : String(x));
}

/** Output and log-sum-exp of all rows. */
type Rows = { out: Values; lse: Values };

/**
 * Row i must be that of `good`, but where it sees a value that is not finite: of key keys[n], in channel 8n.
 */
export function checkSeenValues(
  good: Rows,
  bad: Rows,
  i: number,
  channels: number,
  keys: readonly number[],
  sees: (key: number) => boolean,
  what: string,
): void {
  const row = bad.out.subarray(i * channels, (i + 1) * channels);
  const expected = good.out.slice(i * channels, (i + 1) * channels);
  for (const [n, key] of keys.entries()) {
    if (!sees(key)) continue;
    assert(!Number.isFinite(row[8 * n]), `${what}: row ${i} sees value ${key}`);
    expected[8 * n] = row[8 * n];
  }
  assertEquals(bits(row), bits(expected), `${what}: row ${i}`);
  assertEquals(bad.lse[i], good.lse[i], `${what}: lse of row ${i}`);
}
