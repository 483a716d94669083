// Attention on floating-point tensors: the front door.
import { cannot, checkOneOf, checkOptions } from "./check.ts";
import { type Device, streamOf } from "./device.ts";
import { type DType, type FloatDType, floatDTypes } from "./dtype.ts";
import {
  accumulatorNumbers,
  attentionStruct,
  exponentialNumbers,
  granularityNumbers,
  kernelNumbers,
  type NativeFunctions,
  planStruct,
  rangeNumbers,
  Struct,
  tensorBytes,
} from "./ffi.ts";
import { errorBytes, errorSize, unwrap } from "./library.ts";
import { checkMaskTensors, writeMaskTensors } from "./masks.ts";
import {
  type AttentionOptions,
  checkAttentionOptions,
  type FlashAttentionOptions,
  type Granularity,
  type Kernel,
  type LseOption,
  optionNames,
  writeOptions,
} from "./options.ts";
import { checkLayer, followPlan } from "./precision_plan.ts";
import { planNames } from "./recipe.ts";
import type { Stream } from "./stream.ts";
import {
  denseGeometry,
  type Geometry,
  interiorOf,
  type Layout,
  permute,
  type Shape,
  Tensor,
} from "./tensor.ts";

const action = "run attention";

// ---- what every kind of attention shares --------------------------------------------------------------

/** Output and log-sum-exp. Disposing it disposes the tensors that the call made. */
export interface AttentionWithLse<O extends DType = FloatDType> extends Disposable {
  /** [B, Hq, Nq, Dv] */
  out: Tensor<O>;
  /**
   * [B, Hq, Nq, 1], in the layout of `q`: the natural logarithm of softmax's denominator, ln Σⱼ exp(scale·q·kⱼ), of
   * the scores after masks and caps and with the sink; −∞ for a row that sees no key and has none.
   *
   * With it, results over parts of the keys can be merged: the whole is Σₚ outₚ·exp(lseₚ − lse), where
   * lse = ln Σₚ exp(lseₚ). For kernel `"flash"` that is exact but for the rounding of FP32. A quantized kernel
   * gives the logarithm of the denominator that it used, of quantized scores: the merged output is as far from exact
   * attention as that of one call, no further.
   */
  lse: Tensor<"f32">;
}

function checkChannels(action: string, name: string, channels: number): void {
  if (channels > 256) throw new RangeError(cannot(action, name, "be at most 256", channels));
}

function checkEqual(
  action: string,
  name: string,
  value: number,
  otherName: string,
  other: number,
): void {
  if (value === other) return;
  throw new RangeError(cannot(action, name, `equal ${otherName} (${other})`, value));
}

/** Refuses shapes that do not belong together; all in the order [batch, heads, tokens, channels]. */
export function checkShapes(action: string, q: Shape, k: Shape, v: Shape): void {
  checkChannels(action, "channels of q", q[3]);
  checkChannels(action, "channels of v", v[3]);
  checkEqual(action, "batch of k", k[0], "batch of q", q[0]);
  checkEqual(action, "batch of v", v[0], "batch of q", q[0]);
  checkEqual(action, "channels of k", k[3], "channels of q", q[3]);
  checkEqual(action, "heads of v", v[1], "heads of k", k[1]);
  checkEqual(action, "tokens of v", v[2], "tokens of k", k[2]);
  if (q[1] % k[1] !== 0) {
    throw new RangeError(
      cannot(action, "heads of q", `be a multiple of heads of k (${k[1]})`, q[1]),
    );
  }
}

/** Where a call's results go; disposing it drops what was made for the call. */
export class Results {
  readonly #made: Tensor | undefined;

  constructor(
    readonly out: Tensor<FloatDType>,
    readonly lse: Tensor<"f32"> | undefined,
    made: Tensor | undefined,
  ) {
    this.#made = made;
  }

  [Symbol.dispose](): void {
    this.#made?.dispose();
    this.lse?.dispose();
  }
}

/** Refuses an output that was given but does not fit; the shape is [batch, heads, tokens, channels]. */
function checkOut(
  action: string,
  stream: Stream,
  shape: Shape,
  options: FlashAttentionOptions,
): void {
  const { out: given, outDtype } = options;
  if (outDtype !== undefined) checkOneOf(action, "outDtype", outDtype, floatDTypes);
  if (given !== undefined) {
    const { geometry } = interiorOf(action, "out", given, stream);
    if (geometry.shape.some((length, i) => length !== shape[i])) {
      const must = `have shape [${permute(shape, geometry.layout).join(", ")}]`;
      throw new RangeError(cannot(action, "out", must, [...given.shape]));
    }
    if (outDtype !== undefined && outDtype !== given.dtype) {
      throw new TypeError(
        cannot(action, "outDtype", `be absent or equal out.dtype ("${given.dtype}")`, outDtype),
      );
    }
    checkOneOf(action, "out.dtype", given.dtype, floatDTypes);
  }
}

/** Takes the output tensor from the options, or makes it; the same for log-sum-exp. */
export function makeResults(
  action: string,
  device: Device,
  stream: Stream,
  shape: Shape, // of the output, [batch, heads, tokens, channels]
  layout: Layout,
  dtype: FloatDType,
  options: FlashAttentionOptions & LseOption,
): Results {
  const { out: given, outDtype, returnLse } = options;
  checkOut(action, stream, shape, options);
  const out = given ?? device.empty(permute(shape, layout), { dtype: outDtype ?? dtype, layout });
  const made = given === undefined ? out : undefined;
  try {
    const lse = returnLse
      ? device.empty(permute([shape[0], shape[1], shape[2], 1], layout), { layout })
      : undefined;
    return new Results(out, lse, made);
  } catch (error) {
    made?.dispose();
    throw error;
  }
}

/** What the caller gets of them. */
export function showResults(results: Results): Tensor<FloatDType> | AttentionWithLse {
  return results.lse === undefined ? results.out : results as AttentionWithLse;
}

// ---- attention ----------------------------------------------------------------------------------------

const attentionNames = [...optionNames.attention, ...planNames];
const call = new Struct(attentionStruct.size);

/** A sage_attention_call without results. */
function writeCall(
  stream: Stream,
  q: Uint8Array,
  k: Uint8Array,
  v: Uint8Array,
  options: AttentionOptions,
): void {
  call.reset();
  call.setHandle(attentionStruct.stream, stream.handle);
  writeOptions(call, attentionStruct.options, options);
  writeMaskTensors(call, action, stream, options);
  call.setStruct(attentionStruct.q, q);
  call.setStruct(attentionStruct.k, k);
  call.setStruct(attentionStruct.v, v);
}

function checkDTypes(action: string, q: DType, k: DType, v: DType): void {
  checkOneOf(action, "q.dtype", q as FloatDType, floatDTypes);
  if (k !== q) throw new TypeError(cannot(action, "k.dtype", `equal q.dtype ("${q}")`, k));
  if (v !== q) throw new TypeError(cannot(action, "v.dtype", `equal q.dtype ("${q}")`, v));
}

/** What kinds of attention on floating-point tensors differ in. */
interface Entry {
  /** Refuses what does not fit to shapes in the order [batch, heads, tokens, channels]. */
  check?(q: Shape, k: Shape): void;
  /** Passes a sage_attention_call; returns the status. */
  enqueue(native: NativeFunctions, call: Uint8Array<ArrayBuffer>): number;
}

/** Checks a call, makes its results and enqueues it. */
export function runAttention(
  known: readonly string[],
  q: Tensor,
  k: Tensor,
  v: Tensor,
  options: AttentionOptions & LseOption,
  { check, enqueue }: Entry,
): Tensor<FloatDType> | AttentionWithLse {
  checkAttentionOptions(action, options, known);
  const { storage: { stream }, geometry, bytes } = interiorOf(action, "q", q);
  const kInside = interiorOf(action, "k", k, stream), vInside = interiorOf(action, "v", v, stream);
  checkDTypes(action, q.dtype, k.dtype, v.dtype);
  const { shape } = geometry;
  checkShapes(action, shape, kInside.geometry.shape, vInside.geometry.shape);
  check?.(shape, kInside.geometry.shape);
  checkMaskTensors(action, stream, shape, kInside.geometry.shape, options);
  const results = makeResults(
    action,
    q.device,
    stream,
    [shape[0], shape[1], shape[2], vInside.geometry.shape[3]],
    q.layout,
    q.dtype as FloatDType,
    options,
  );
  try {
    writeCall(stream, bytes, kInside.bytes, vInside.bytes, options);
    call.setStruct(attentionStruct.o, interiorOf(action, "out", results.out).bytes);
    if (results.lse) {
      call.setStruct(attentionStruct.lse, interiorOf(action, "lse", results.lse).bytes);
    }
    unwrap(enqueue(stream.native, call.bytes));
  } catch (error) {
    results[Symbol.dispose]();
    throw error;
  }
  return showResults(results);
}

/**
 * Attention, softmax(scale·Q·Kᵀ)·V, with Q, K, P and V quantized as the kernel says.
 *
 * The call is enqueued and returns at once; the inputs may be disposed right after it. Where the kernel smooths, a
 * mean is subtracted before quantization and corrected exactly: K by γ(K) = K − mean(K), which changes no output;
 * Q by γ(Qᵢ) = Qᵢ − mean(Qᵢ) over 128 rows, with ΔS = mean(Qᵢ)·γ(K)ᵀ added; V likewise, with mean(V) added at the
 * end.
 *
 * Beyond the papers, `rotate`, `kMeanRows`, `band` and `firstToken` make quantization err less:
 *
 * ```ts
 * import { attention, Device, flashAttention, relativeL1 } from "@sage/attention";
 * import { assert } from "@std/assert";
 *
 * using device = Device.open("cpu");
 * const numbers = (seed: number) =>
 *   new Float32Array(2 * 256 * 64).map((_, i) => Math.sin((i + 1) * (i + seed)) + (i % 64 === 7 ? 20 : 0));
 * using q = device.tensor(numbers(1), [1, 2, 256, 64]);
 * using k = device.tensor(numbers(2), [1, 2, 256, 64]);
 * using v = device.tensor(numbers(3), [1, 2, 256, 64]);
 *
 * using exact = flashAttention(q, k, v, { causal: true });
 * using plain = attention(q, k, v, { kernel: "sage2", causal: true });
 * using better = attention(q, k, v, { kernel: "sage2", causal: true, rotate: true, band: true });
 *
 * const [reference, before, after] = await Promise.all([exact, plain, better].map((o) => o.data()));
 * assert(relativeL1(after, reference) < 0.5 * relativeL1(before, reference));
 * ```
 *
 * Values that are not finite stay where exact attention puts them: one in a row of Q makes that row of the output
 * NaN, one in K or V shows in the rows that see it and in no other.
 *
 * Sources: SageAttention (arXiv 2410.02367), SageAttention2 (2411.10958), SageAttention2++ (2505.21136).
 *
 * @param q Queries, [B, Hq, Nq, D]: `f32`, `f16` or `bf16`; D is at most 256.
 * @param k Keys, [B, Hkv, Nk, D], of the same element type; Hq is a multiple of Hkv, and each head of K and V serves
 * Hq / Hkv successive heads of Q (grouped-query attention).
 * @param v Values, [B, Hkv, Nk, Dv], of the same element type; Dv is at most 256.
 * @param options Kernel, mask, scale, smoothing, output.
 * @returns The output, [B, Hq, Nq, Dv], in the layout and element type of `q`; with `returnLse`, also the
 * log-sum-exp.
 * @throws {TypeError | RangeError} Where tensors do not fit together, or an option is unknown, out of range or
 * contradicts another.
 * @throws {UnsupportedError} Where the device lacks the kernel; the message lists those it has.
 * @throws {OutOfMemoryError} Where the device has too little memory left.
 * @throws {DisposedError} Where a tensor was disposed.
 *
 * @example
 * ```ts
 * import { attention, Device } from "@sage/attention";
 * import { assertEquals } from "@std/assert";
 *
 * using device = Device.open("cpu");
 * using q = device.tensor(new Float16Array(1 * 8 * 128 * 64).fill(1), [1, 8, 128, 64]);
 * using k = device.tensor(new Float16Array(1 * 2 * 128 * 64).fill(1), [1, 2, 128, 64]);
 * using v = device.tensor(new Float16Array(1 * 2 * 128 * 64).fill(3), [1, 2, 128, 64]);
 *
 * using o = attention(q, k, v, { kernel: "sage2", causal: true });
 *
 * assertEquals(o.shape, [1, 8, 128, 64]);
 * assertEquals((await o.data())[0], 3);
 * ```
 */
export function attention<D extends DType, O extends FloatDType = Extract<D, FloatDType>>(
  q: Tensor<D>,
  k: Tensor<D>,
  v: Tensor<D>,
  options: AttentionOptions<O> & Required<LseOption<true>>,
): AttentionWithLse<O>;
/** The same, returning the output alone. */
export function attention<D extends DType, O extends FloatDType = Extract<D, FloatDType>>(
  q: Tensor<D>,
  k: Tensor<D>,
  v: Tensor<D>,
  options?: AttentionOptions<O> & LseOption<false>,
): Tensor<O>;
export function attention(
  q: Tensor,
  k: Tensor,
  v: Tensor,
  options: AttentionOptions & LseOption = {},
): Tensor<FloatDType> | AttentionWithLse {
  const { options: followed, layer } = followPlan(action, options);
  if (layer) {
    const [qInside, vInside] = [interiorOf(action, "q", q), interiorOf(action, "v", v)];
    checkLayer(action, layer, qInside.geometry.shape, vInside.geometry.shape);
  }
  return runAttention(attentionNames, q, k, v, followed, {
    enqueue: (native, call) => native.sage_attention(call, errorBytes, errorSize),
  });
}

/**
 * Attention without quantization, in the element type of its inputs and FP32 sums: what the others are compared
 * with, and what layers that bear no quantization use. The same as {@linkcode attention} with kernel `"flash"`.
 *
 * Source: FlashAttention-2 (arXiv 2307.08691).
 *
 * @param q Queries, [B, Hq, Nq, D].
 * @param k Keys, [B, Hkv, Nk, D].
 * @param v Values, [B, Hkv, Nk, Dv].
 * @param options Masks, scale and output.
 * @returns The output, [B, Hq, Nq, Dv], in the layout and element type of `q`; with `returnLse`, also the
 * log-sum-exp.
 * @throws {TypeError | RangeError} Where tensors do not fit together, or an option is unknown or out of range.
 * @throws {UnsupportedError} Where the device cannot do it for this element type.
 *
 * @example
 * ```ts
 * import { Device, flashAttention } from "@sage/attention";
 * import { assertEquals } from "@std/assert";
 *
 * using device = Device.open("cpu");
 * using q = device.tensor(new Float32Array([1, 2]), [1, 1, 2, 1]);
 * using v = device.tensor(new Float32Array([10, 20]), [1, 1, 2, 1]);
 *
 * using result = flashAttention(q, q, v, { causal: true, scale: 1, returnLse: true });
 *
 * assertEquals((await result.out.data())[0], 10); // the first query sees the first key only
 * assertEquals((await result.lse.data())[0], 1); // ln exp(1·1)
 * ```
 */
export function flashAttention<D extends DType, O extends FloatDType = Extract<D, FloatDType>>(
  q: Tensor<D>,
  k: Tensor<D>,
  v: Tensor<D>,
  options: FlashAttentionOptions<O> & Required<LseOption<true>>,
): AttentionWithLse<O>;
/** The same, returning the output alone. */
export function flashAttention<D extends DType, O extends FloatDType = Extract<D, FloatDType>>(
  q: Tensor<D>,
  k: Tensor<D>,
  v: Tensor<D>,
  options?: FlashAttentionOptions<O> & LseOption<false>,
): Tensor<O>;
export function flashAttention(
  q: Tensor,
  k: Tensor,
  v: Tensor,
  options: FlashAttentionOptions & LseOption = {},
): Tensor<FloatDType> | AttentionWithLse {
  return runAttention(optionNames.flash, q, k, v, options, {
    enqueue: (native, call) => native.sage_flash_attention(call, errorBytes, errorSize),
  });
}

// ---- explain ------------------------------------------------------------------------------------------

/** A tensor that need not exist: what {@linkcode explain} must know of it. */
export interface TensorSpec {
  /** Lengths of the dimensions, in the order of the layout. */
  shape: readonly number[];
  /** Element type. */
  dtype: FloatDType;
  /** Order of the dimensions. Default: `"HND"`. */
  layout?: Layout;
}

/** What {@linkcode attention} does with a call. */
export interface AttentionPlan {
  /** The kernel; never `"auto"`. */
  kernel: Exclude<Kernel, "auto">;
  /** The oldest GPU architecture that has the kernel's instructions, such as `"sm_90"`; empty on the CPU. */
  architecture: string;
  /** Which rows of Q and K share a scale; absent where nothing is quantized. */
  granularity: Granularity | undefined;
  /** Whether Q is smoothed. */
  smoothQ: boolean;
  /** Whether K is smoothed. */
  smoothK: boolean;
  /** Whether V is smoothed. */
  smoothV: boolean;
  /** Keys that share a mean; absent where K is not smoothed. */
  kMeanRows: number | undefined;
  /** Whether Q and K are rotated. */
  rotate: boolean;
  /** Whether the first tile of keys and those on the diagonal count without quantization. */
  band: boolean;
  /** Whether the first key does. */
  firstToken: boolean;
  /** What sums P·V within a tile of keys. */
  pvAccumulator: "f32" | "f16";
  /** Largest magnitude of P in FP8; absent but for kernel `"sage2++"`. */
  pvRange: 448 | 224 | 112 | undefined;
  /** How scores become P. */
  exponential: "exact" | "fast";
  /** Queries of a tile. */
  blockQ: number;
  /** Keys of a tile. */
  blockK: number;
  /** Channels that the kernel computes with. */
  paddedHeadDim: number;
  /** Bytes of memory that the call takes besides its tensors, until it is done. */
  workspaceBytes: number;
  /** Which code runs, such as `"cpu avx512"` or `"sm_89 mma, FP8"`. */
  implementation: string;
  /** Why this kernel, in one sentence. */
  reason: string;
}

/** Options of {@linkcode explain}. */
export interface ExplainOptions extends AttentionOptions, LseOption {
  /** Where it would run. Default: the device of `q`; needed where `q` is no tensor. */
  device?: Device;
}

const plan = new Struct(planStruct.size);

/**
 * Says what {@linkcode attention} would do with these arguments, without doing it.
 *
 * @param q Queries, or what they would be.
 * @param k Keys, or what they would be.
 * @param v Values, or what they would be.
 * @param options The options of {@linkcode attention}, and the device where none of the tensors exists.
 * @returns Kernel, tiles, workspace and the reason.
 * @throws {TypeError | RangeError | UnsupportedError} Where {@linkcode attention} would.
 *
 * @example
 * ```ts
 * import { Device, explain } from "@sage/attention";
 * import { assertEquals } from "@std/assert";
 *
 * using device = Device.open("cpu");
 * const q = { shape: [1, 32, 4096, 128], dtype: "bf16" } as const;
 * const plan = explain(q, q, q, { kernel: "sage2", device });
 *
 * assertEquals(plan.granularity, "thread");
 * assertEquals(plan.smoothK, true);
 * ```
 */
export function explain(
  q: Tensor | TensorSpec,
  k: Tensor | TensorSpec,
  v: Tensor | TensorSpec,
  options: ExplainOptions = {},
): AttentionPlan {
  const action = "explain attention";
  checkOptions(action, options, [...attentionNames, "device"]);
  const { device = q instanceof Tensor ? q.device : undefined, ...given } = options;
  const { options: rest, layer, reason } = followPlan(action, given);
  checkAttentionOptions(action, rest, attentionNames);
  const stream = streamOf(action, "device", device as Device);
  const [qSpec, kSpec, vSpec] = [["q", q], ["k", k], ["v", v]].map(([name, tensor]) =>
    specify(action, name as string, tensor as Tensor | TensorSpec, stream)
  );
  if (layer) checkLayer(action, layer, qSpec.geometry.shape, vSpec.geometry.shape);
  checkDTypes(action, q.dtype, k.dtype, v.dtype);
  checkShapes(action, qSpec.geometry.shape, kSpec.geometry.shape, vSpec.geometry.shape);
  checkMaskTensors(action, stream, qSpec.geometry.shape, kSpec.geometry.shape, rest);
  const [batch, heads, tokens] = qSpec.geometry.shape;
  const outShape: Shape = [batch, heads, tokens, vSpec.geometry.shape[3]];
  checkOut(action, stream, outShape, rest);
  const { layout } = qSpec.geometry, shape = permute(outShape, layout);
  const { outDtype: dtype = q.dtype as FloatDType, out = { shape, dtype, layout } } = rest;
  writeCall(stream, qSpec.bytes, kSpec.bytes, vSpec.bytes, rest);
  call.setStruct(attentionStruct.o, specify(action, "out", out, stream).bytes);
  if (rest.returnLse) {
    const lse = {
      shape: permute([batch, heads, tokens, 1], layout),
      dtype: "f32",
      layout,
    } as const;
    call.setStruct(attentionStruct.lse, specify(action, "lse", lse, stream).bytes);
  }
  plan.reset();
  unwrap(stream.native.sage_explain(call.bytes, plan.bytes, errorBytes, errorSize));
  return { ...readPlan(), ...reason !== undefined && { reason } };
}

function specify(
  action: string,
  name: string,
  tensor: Tensor | TensorSpec,
  stream: Stream,
): { geometry: Geometry; bytes: Uint8Array } {
  if (tensor instanceof Tensor) return interiorOf(action, name, tensor, stream);
  if (typeof tensor !== "object" || tensor === null) {
    throw new TypeError(cannot(action, name, "be a Tensor or its shape and dtype", tensor));
  }
  const { shape, dtype, layout = "HND" } = tensor;
  const geometry = denseGeometry(action, `${name}.shape`, shape, dtype, layout);
  return {
    geometry,
    bytes: tensorBytes(0n, dtype, stream.device, geometry.shape, geometry.stride),
  };
}

function readPlan(): AttentionPlan {
  const architecture = plan.int(planStruct.architecture);
  const smoothK = plan.int(planStruct.smoothK) === 2;
  return {
    kernel: nameOf(kernelNumbers, plan.int(planStruct.kernel)) as AttentionPlan["kernel"],
    architecture: architecture === 0 ? "" : `sm_${architecture}`,
    granularity: nameOf(granularityNumbers, plan.int(planStruct.granularity)),
    smoothQ: plan.int(planStruct.smoothQ) === 2,
    smoothK,
    smoothV: plan.int(planStruct.smoothV) === 2,
    kMeanRows: smoothK ? plan.int(planStruct.kMeanRows) : undefined,
    rotate: plan.int(planStruct.rotate) === 2,
    band: plan.int(planStruct.band) === 2,
    firstToken: plan.int(planStruct.firstToken) === 2,
    pvAccumulator: nameOf(accumulatorNumbers, plan.int(planStruct.pvAccumulator))!,
    pvRange: numberOf(nameOf(rangeNumbers, plan.int(planStruct.pvRange))),
    exponential: nameOf(exponentialNumbers, plan.int(planStruct.exponential))!,
    blockQ: plan.int(planStruct.blockQ),
    blockK: plan.int(planStruct.blockK),
    paddedHeadDim: plan.int(planStruct.paddedHeadDim),
    workspaceBytes: plan.count(planStruct.workspaceBytes),
    implementation: plan.text(planStruct.implementation),
    reason: plan.text(planStruct.reason),
  };
}

function nameOf<T extends Record<string | number, number>>(
  numbers: T,
  number: number,
): keyof T | undefined {
  return Object.keys(numbers).find((name) => numbers[name] === number);
}

function numberOf(name: string | number | undefined): AttentionPlan["pvRange"] {
  return name === undefined ? undefined : Number(name) as AttentionPlan["pvRange"];
}
