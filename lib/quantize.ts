// Quantization: codes and scales for queries, keys and values, back again, and attention on them.
import { type AttentionWithLse, checkShapes, makeResults, showResults } from "./attention.ts";
import {
  cannot,
  checkBoolean,
  checkInteger,
  checkOneOf,
  checkOptions,
  checkPositive,
} from "./check.ts";
import type { Device } from "./device.ts";
import { type CodeDType, type DType, type FloatDType, floatDTypes } from "./dtype.ts";
import {
  attentionQuantizedStruct,
  granularityNumbers,
  operandNumbers,
  quantizeStruct,
  Struct,
} from "./ffi.ts";
import { errorBytes, errorSize, unwrap } from "./library.ts";
import {
  type AttentionQuantizedOptions,
  checkAttentionOptions,
  type Granularity,
  type LseOption,
  optionNames,
  writeOptions,
} from "./options.ts";
import { emptyMean, type Smoothed } from "./smooth.ts";
import type { Stream } from "./stream.ts";
import { interiorOf, type Layout, permute, type Shape, Tensor } from "./tensor.ts";

/** What a tensor is to attention. */
export type Operand = "query" | "key" | "value";

/** Options of {@linkcode quantize}. */
export interface QuantizeOptions {
  /** What the tensor is: it decides the defaults, and with `"thread"` which rows make a group. */
  operand: Operand;
  /** What to quantize to. Default: `"i8"` for queries and keys, `"e4m3"` for values. */
  dtype?: CodeDType;
  /** Which values share a scale. Default: `"thread"` for queries and keys, `"channel"` for values. */
  granularity?: Granularity;
  /**
   * Rows of a group, for `"block"`, `"warp"` and `"thread"`, there a multiple of 8. Default: for queries 128, 32 and
   * 32, for keys and values 64.
   */
  groupRows?: number;
  /** Whether to subtract the mean first: of every 128 queries, or over all tokens of keys and values. */
  smooth?: boolean;
  /** For `"e4m3"`, the code value that the largest magnitude of a group maps to. Default: 448. */
  range?: number;
}

/** How a tensor was quantized. */
interface Recipe {
  operand: Operand;
  dtype: CodeDType;
  granularity: Granularity;
  groupRows: number; // 0 per token and per channel
  meanRows: number; // 0: all rows share a mean
  range: number; // 0: that of the codes
  source: FloatDType;
}

// ---- quantized tensors --------------------------------------------------------------------------------

let createQuantized: (
  codes: Tensor<CodeDType>,
  scales: Tensor<"f32">,
  mean: Tensor<"f32"> | undefined,
  recipe: Recipe,
) => QuantizedTensor;

let recipeOf: (action: string, name: string, tensor: QuantizedTensor) => Recipe;

/**
 * Codes, scales and, where it was smoothed, the mean of a tensor: x ≈ code · scale + mean.
 *
 * {@linkcode quantize} makes it. Disposing it disposes its tensors.
 */
export class QuantizedTensor {
  /** [B, H, N, D]: `i8`, `i4` or `e4m3`. */
  readonly codes: Tensor<CodeDType>;
  /** [B, H, groups, 1], or per channel [B, H, 1, D]. */
  readonly scales: Tensor<"f32">;
  /** What was subtracted: [B, H, 1, D] or, for queries, [B, H, ⌈N / 128⌉, D]; absent if nothing was. */
  readonly mean: Tensor<"f32"> | undefined;
  readonly #recipe: Recipe;

  static {
    createQuantized = (codes, scales, mean, recipe) =>
      new QuantizedTensor(codes, scales, mean, recipe);
    recipeOf = (action, name, tensor) => {
      if (!(tensor instanceof QuantizedTensor)) {
        throw new TypeError(cannot(action, name, "be a QuantizedTensor", tensor));
      }
      return tensor.#recipe;
    };
  }

  private constructor(
    codes: Tensor<CodeDType>,
    scales: Tensor<"f32">,
    mean: Tensor<"f32"> | undefined,
    recipe: Recipe,
  ) {
    this.codes = codes;
    this.scales = scales;
    this.mean = mean;
    this.#recipe = recipe;
  }

  /** Where it lies. */
  get device(): Device {
    return this.codes.device;
  }

  /** What it is to attention. */
  get operand(): Operand {
    return this.#recipe.operand;
  }

  /** Which values share a scale. */
  get granularity(): Granularity {
    return this.#recipe.granularity;
  }

  /** Whether it was disposed. */
  get disposed(): boolean {
    return this.codes.disposed;
  }

  /** Gives up its tensors. Again: nothing happens. */
  dispose(): void {
    this.codes.dispose();
    this.scales.dispose();
    this.mean?.dispose();
  }

  /** The same as {@linkcode QuantizedTensor.dispose}, for `using`. */
  [Symbol.dispose](): void {
    this.dispose();
  }
}

// ---- quantize and dequantize --------------------------------------------------------------------------

const operands = Object.keys(operandNumbers) as readonly Operand[];
const granularities = Object.keys(granularityNumbers) as readonly Granularity[];
const codeDTypes: readonly CodeDType[] = ["i8", "i4", "e4m3"];
const queryMeanRows = 128; // SageAttention2

/** Refuses options that are unknown, of another type, out of range or contradict each other. */
function checkRecipe(action: string, options: QuantizeOptions, source: FloatDType): Recipe {
  checkOptions(action, options, [
    "operand",
    "dtype",
    "granularity",
    "groupRows",
    "smooth",
    "range",
  ]);
  const operand = checkOneOf(action, "operand", options.operand, operands);
  const value = operand === "value";
  const { dtype = value ? "e4m3" : "i8", granularity = value ? "channel" : "thread" } = options;
  checkOneOf(action, "dtype", dtype, codeDTypes);
  checkOneOf(action, "granularity", granularity, granularities);
  checkBoolean(action, "smooth", options.smooth);
  if (granularity === "thread" && value) {
    throw new RangeError(
      cannot(
        action,
        "granularity of values",
        `be "token", "block", "warp" or "channel"`,
        granularity,
      ),
    );
  }
  const { groupRows, range } = options;
  const grouped = granularity !== "token" && granularity !== "channel";
  if (groupRows !== undefined) {
    checkInteger(action, "groupRows", groupRows, 1, 2 ** 32 - 1);
    if (!grouped) {
      throw new TypeError(
        cannot(action, `groupRows with granularity "${granularity}"`, "be absent", groupRows),
      );
    }
    if (granularity === "thread" && groupRows % 8 !== 0) {
      throw new RangeError(
        cannot(action, `groupRows with granularity "thread"`, "be a multiple of 8", groupRows),
      );
    }
  }
  if (range !== undefined) {
    checkPositive(action, "range", range, 448);
    if (dtype !== "e4m3") {
      throw new TypeError(cannot(action, `range with dtype "${dtype}"`, "be absent", range));
    }
  }
  const defaultRows = operand !== "query" ? 64 : granularity === "block" ? 128 : 32;
  return {
    operand,
    dtype,
    granularity,
    groupRows: grouped ? groupRows ?? defaultRows : 0,
    meanRows: operand === "query" ? queryMeanRows : 0,
    range: range ?? 0,
    source,
  };
}

/** Shape of the scales, [batch, heads, groups, 1] or [batch, heads, 1, channels]. */
function scalesShape(recipe: Recipe, [batch, heads, tokens, channels]: Shape): Shape {
  const { operand, granularity, groupRows } = recipe;
  switch (granularity) {
    case "channel":
      return [batch, heads, 1, channels];
    case "token":
      return [batch, heads, tokens, 1];
    case "thread":
      return [batch, heads, Math.ceil(tokens / groupRows) * (operand === "query" ? 8 : 4), 1];
    default:
      return [batch, heads, Math.ceil(tokens / groupRows), 1];
  }
}

const call = new Struct(quantizeStruct.size);

function enqueue(
  name: "sage_quantize" | "sage_dequantize",
  action: string,
  x: Tensor,
  codes: Tensor,
  scales: Tensor,
  mean: Tensor | undefined,
  recipe: Recipe,
): void {
  const { storage: { stream }, bytes } = interiorOf(action, "x", x);
  call.reset();
  call.setInt(quantizeStruct.granularity, granularityNumbers[recipe.granularity]);
  call.setHandle(quantizeStruct.stream, stream.handle);
  call.setInt(quantizeStruct.operand, operandNumbers[recipe.operand]);
  call.setInt(quantizeStruct.groupRows, recipe.groupRows);
  call.setInt(quantizeStruct.meanRows, recipe.meanRows);
  call.setFloat(quantizeStruct.range, recipe.range);
  call.setInt(quantizeStruct.takesMean, name === "sage_quantize" && mean ? 1 : 0);
  call.setStruct(quantizeStruct.x, bytes);
  call.setStruct(quantizeStruct.codes, interiorOf(action, "codes", codes, stream).bytes);
  call.setStruct(quantizeStruct.scales, interiorOf(action, "scales", scales, stream).bytes);
  if (mean) call.setStruct(quantizeStruct.mean, interiorOf(action, "mean", mean, stream).bytes);
  unwrap(stream.native[name](call.bytes, errorBytes, errorSize));
}

/**
 * Quantizes a tensor symmetrically: code = round(x / scale), scale = max|x| / (largest code) of each group, ties to
 * even; the largest code is 127 for INT8, 7 for INT4 and 448 for FP8 e4m3, which saturates.
 *
 * A group of zeros gets codes 0 and a scale of 1. Values that are not finite do not count in scales or means and get
 * a code of their own: −128, −8 or NaN. Every device gives the same bits.
 *
 * Sources: SageAttention (arXiv 2410.02367), SageAttention2 (2411.10958), section 3.
 *
 * @param x [B, H, N, D]: `f32`, `f16` or `bf16`.
 * @param options What the tensor is to attention, code type, groups, smoothing.
 * @returns Codes, scales and mean, in the layout of `x`.
 * @throws {TypeError | RangeError} Where `x` is not of floating point, or an option is unknown, out of range or
 * contradicts another.
 *
 * @example
 * ```ts
 * import { Device, quantize } from "@sage/attention";
 * import { assertEquals } from "@std/assert";
 *
 * using device = Device.open("cpu");
 * using x = device.tensor(new Float32Array([1, -127, 50, 25]), [1, 1, 2, 2]);
 * using quantized = quantize(x, { operand: "query", granularity: "token" });
 *
 * assertEquals(await quantized.codes.data(), new Int8Array([1, -127, 127, 64]));
 * assertEquals((await quantized.scales.data())[0], 1);
 * ```
 */
export function quantize(x: Tensor, options: QuantizeOptions): QuantizedTensor {
  const action = "quantize";
  const { geometry: { shape } } = interiorOf(action, "x", x);
  const source = checkOneOf(action, "x.dtype", x.dtype as FloatDType, floatDTypes);
  const recipe = checkRecipe(action, options, source);
  const { device, layout } = x;
  const made: Tensor[] = [];
  const make = <D extends DType>(shape: Shape, dtype: D): Tensor<D> => {
    const tensor = device.empty(permute(shape, layout), { dtype, layout });
    made.push(tensor);
    return tensor;
  };
  try {
    const codes = make(shape, recipe.dtype);
    const scales = make(scalesShape(recipe, shape), "f32");
    const mean = options.smooth ? emptyMean(x, recipe.meanRows) : undefined;
    if (mean) made.push(mean);
    enqueue("sage_quantize", action, x, codes, scales, mean, recipe);
    return createQuantized(codes, scales, mean, recipe);
  } catch (error) {
    for (const tensor of made) tensor.dispose();
    throw error;
  }
}

/** Options of {@linkcode dequantize}. */
export interface DequantizeOptions<O extends FloatDType = FloatDType> {
  /** Element type of the result. Default: `"f32"`. */
  outDtype?: O;
}

/**
 * Turns codes back into numbers: code · scale, plus the mean that was subtracted.
 *
 * @param tensor What {@linkcode quantize} returned.
 * @param options Element type of the result.
 * @returns [B, H, N, D] in the layout of the codes. Codes that mark what was not finite give NaN.
 * @throws {DisposedError} Where it was disposed.
 *
 * @example
 * ```ts
 * import { dequantize, Device, quantize } from "@sage/attention";
 * import { assertEquals } from "@std/assert";
 *
 * using device = Device.open("cpu");
 * using x = device.tensor(new Float32Array([3, -3, 0, 3]), [1, 1, 2, 2]);
 * using quantized = quantize(x, { operand: "key", dtype: "i4" });
 * using back = dequantize(quantized);
 *
 * assertEquals(await back.data(), new Float32Array([3, -3, 0, 3]));
 * ```
 */
export function dequantize<O extends FloatDType = "f32">(
  tensor: QuantizedTensor,
  options?: DequantizeOptions<O>,
): Tensor<O>;
export function dequantize(
  tensor: QuantizedTensor,
  options: DequantizeOptions = {},
): Tensor<FloatDType> {
  const action = "dequantize";
  const recipe = recipeOf(action, "tensor", tensor);
  checkOptions(action, options, ["outDtype"]);
  const { outDtype = "f32" } = options;
  checkOneOf(action, "outDtype", outDtype, floatDTypes);
  const { codes, scales, mean } = tensor;
  interiorOf(action, "codes", codes);
  const x = codes.device.empty(codes.shape, { dtype: outDtype, layout: codes.layout });
  try {
    enqueue("sage_dequantize", action, x, codes, scales, mean, recipe);
    return x;
  } catch (error) {
    x.dispose();
    throw error;
  }
}

// ---- attention ----------------------------------------------------------------------------------------

type QuantizedKernel = NonNullable<AttentionQuantizedOptions["kernel"]>;

/** What each kernel multiplies. */
const operandDTypes: Record<QuantizedKernel, { qk: CodeDType; v: CodeDType | undefined }> = {
  "sage1": { qk: "i8", v: undefined },
  "sage1-int8": { qk: "i8", v: "i8" },
  "sage2": { qk: "i8", v: "e4m3" },
  "sage2-int4": { qk: "i4", v: "e4m3" },
  "sage2++": { qk: "i8", v: "e4m3" },
  "sage-int8": { qk: "i8", v: "i8" },
};

/** The largest magnitude of V that goes with each one of P. */
const valueRanges: Record<number, 448 | 224 | 112> = { 2.25: 448, 4.5: 224, 9: 112 };

interface Values {
  codes: Tensor;
  scales: Tensor | undefined;
  mean: Tensor | undefined;
  range: number;
}

function readValues(action: string, v: Tensor | Smoothed | QuantizedTensor): Values {
  if (v instanceof Tensor) return { codes: v, scales: undefined, mean: undefined, range: 0 };
  if (v instanceof QuantizedTensor) {
    const { codes, scales, mean } = v, { range } = checkOperand(action, "v", v, "value");
    return { codes, scales, mean, range };
  }
  if (v?.smoothed instanceof Tensor && v?.mean instanceof Tensor) {
    return { codes: v.smoothed, scales: undefined, mean: v.mean, range: 0 };
  }
  throw new TypeError(
    cannot(action, "v", "be a QuantizedTensor, a Tensor or what smooth() returned", v),
  );
}

function checkOperand(
  action: string,
  name: string,
  tensor: QuantizedTensor,
  operand: Operand,
): Recipe {
  const recipe = recipeOf(action, name, tensor);
  if (recipe.operand !== operand) {
    throw new TypeError(
      cannot(action, name, `be quantized with operand "${operand}"`, recipe.operand),
    );
  }
  const channelwise = operand === "value";
  if ((recipe.granularity === "channel") !== channelwise) {
    const must = `be quantized with granularity ${
      channelwise ? `"channel"` : `"token", "block", "warp" or "thread"`
    }`;
    throw new TypeError(cannot(action, name, must, recipe.granularity));
  }
  return recipe;
}

/** The kernel that takes these operands, or the one asked for, if it does. */
function resolveKernel(
  action: string,
  options: AttentionQuantizedOptions,
  qk: CodeDType,
  v: Values,
): QuantizedKernel {
  const vDtype = v.scales ? v.codes.dtype : undefined;
  const fits = (Object.keys(operandDTypes) as QuantizedKernel[]).filter((kernel) =>
    operandDTypes[kernel].qk === qk && operandDTypes[kernel].v === vDtype
  );
  const what = `${qk} queries and keys with ${vDtype ?? "unquantized"} values`;
  if (fits.length === 0) {
    const known = Object.values(operandDTypes)
      .map(({ qk, v }) => `${qk} with ${v ?? "unquantized"}`);
    throw new TypeError(
      `Cannot ${action} as no kernel takes ${what}: there are kernels for ${
        [...new Set(known)].join(", ")
      }.`,
    );
  }
  // Codes of sage2 and sage2++ differ in the range of V.
  const narrow = v.range in valueRanges;
  const kernel = options.kernel ?? (narrow && fits.includes("sage2++") ? "sage2++" : fits[0]);
  if (!fits.includes(kernel)) {
    throw new TypeError(cannot(action, `kernel for ${what}`, `be ${fits.join(" or ")}`, kernel));
  }
  return kernel;
}

/** The range of P that goes with the range V was quantized to. */
function resolveRange(
  action: string,
  options: AttentionQuantizedOptions,
  range: number,
): 448 | 224 | 112 {
  const pvRange = valueRanges[range];
  if (pvRange === undefined) {
    throw new TypeError(
      cannot(action, "range of v for kernel sage2++", "be 2.25, 4.5 or 9", range || 448),
    );
  }
  if (options.pvRange !== undefined && options.pvRange !== pvRange) {
    throw new TypeError(
      cannot(action, `pvRange with range ${range} of v`, `be ${pvRange}`, options.pvRange),
    );
  }
  return pvRange;
}

const attentionCall = new Struct(attentionQuantizedStruct.size);

function setTensor(at: number, name: string, tensor: Tensor | undefined, stream: Stream): void {
  if (!tensor) return;
  attentionCall.setStruct(at, interiorOf("run attention", name, tensor, stream).bytes);
}

/**
 * Attention on quantized tensors: what {@linkcode attention} does inside, for programs that keep K and V quantized.
 *
 * A mean that was subtracted is corrected: that of Q by ΔS = mean(Q)·Kᵀ with the dequantized keys, that of V at the
 * end; that of K changes only the log-sum-exp.
 *
 * @param q Queries, [B, Hq, Nq, D], quantized with operand `"query"`: `i8` or `i4`.
 * @param k Keys, [B, Hkv, Nk, D], quantized with operand `"key"`, to the same type and granularity.
 * @param v Values, [B, Hkv, Nk, Dv]: for `sage1` a floating-point tensor or what {@linkcode smooth} returned, else
 * quantized with operand `"value"` per channel: `i8` for `sage1-int8`, `e4m3` for the others, with range 2.25, 4.5
 * or 9 for `sage2++`.
 * @param options Kernel, mask, scale, output.
 * @returns The output, [B, Hq, Nq, Dv], in the layout of `q` and the element type that `q` had; with `returnLse`,
 * also the log-sum-exp.
 * @throws {TypeError | RangeError} Where tensors do not fit together or to the kernel, or an option is not valid.
 * @throws {UnsupportedError} Where the device lacks the kernel; the message lists those it has.
 *
 * @example
 * ```ts
 * import { attentionQuantized, Device, quantize } from "@sage/attention";
 * import { assertEquals } from "@std/assert";
 *
 * using device = Device.open("cpu");
 * using x = device.tensor(new Float16Array(128 * 64).fill(1), [1, 1, 128, 64]);
 * using q = quantize(x, { operand: "query" });
 * using k = quantize(x, { operand: "key", smooth: true });
 * using v = quantize(x, { operand: "value" });
 *
 * using o = attentionQuantized(q, k, v); // kernel "sage2"
 *
 * assertEquals((await o.data())[0], 1);
 * ```
 */
export function attentionQuantized<O extends FloatDType = FloatDType>(
  q: QuantizedTensor,
  k: QuantizedTensor,
  v: QuantizedTensor | Tensor | Smoothed,
  options: AttentionQuantizedOptions<O> & Required<LseOption<true>>,
): AttentionWithLse<O>;
/** The same, returning the output alone. */
export function attentionQuantized<O extends FloatDType = FloatDType>(
  q: QuantizedTensor,
  k: QuantizedTensor,
  v: QuantizedTensor | Tensor | Smoothed,
  options?: AttentionQuantizedOptions<O> & LseOption<false>,
): Tensor<O>;
export function attentionQuantized(
  q: QuantizedTensor,
  k: QuantizedTensor,
  v: QuantizedTensor | Tensor | Smoothed,
  options: AttentionQuantizedOptions & LseOption = {},
): Tensor<FloatDType> | AttentionWithLse {
  const action = "run attention";
  checkOptions(action, options, optionNames.quantized);
  const qRecipe = checkOperand(action, "q", q, "query");
  const kRecipe = checkOperand(action, "k", k, "key");
  const values = readValues(action, v);
  const { storage: { stream }, geometry: { shape } } = interiorOf(action, "q", q.codes);
  const kShape = interiorOf(action, "k", k.codes, stream).geometry.shape;
  const vShape = interiorOf(action, "v", values.codes, stream).geometry.shape;
  for (const name of ["dtype", "granularity"] as const) {
    if (kRecipe[name] !== qRecipe[name]) {
      throw new TypeError(
        cannot(action, `${name} of k`, `equal that of q ("${qRecipe[name]}")`, kRecipe[name]),
      );
    }
  }
  const kernel = resolveKernel(action, options, qRecipe.dtype, values);
  if (kernel === "sage1") {
    checkOneOf(action, "v.dtype", values.codes.dtype as FloatDType, floatDTypes);
  }
  const resolved = { ...options, kernel };
  checkAttentionOptions(action, resolved, optionNames.quantized);
  if (kernel === "sage2++") resolved.pvRange = resolveRange(action, options, values.range);
  checkShapes(action, shape, kShape, vShape);
  const [batch, heads, tokens] = shape, layout: Layout = q.codes.layout;
  const outShape: Shape = [batch, heads, tokens, vShape[3]];
  const results = makeResults(action, q.device, stream, outShape, layout, qRecipe.source, options);
  try {
    const at = attentionQuantizedStruct;
    attentionCall.reset();
    attentionCall.setHandle(at.stream, stream.handle);
    const { granularity } = qRecipe;
    writeOptions(attentionCall, at.options, {
      ...resolved,
      granularity: granularity === "channel" ? undefined : granularity,
    });
    attentionCall.setInt(at.qGroupRows, qRecipe.groupRows);
    attentionCall.setInt(at.kGroupRows, kRecipe.groupRows);
    attentionCall.setInt(at.qMeanRows, qRecipe.meanRows);
    setTensor(at.q, "q", q.codes, stream);
    setTensor(at.qScales, "q", q.scales, stream);
    setTensor(at.qMean, "q", q.mean, stream);
    setTensor(at.k, "k", k.codes, stream);
    setTensor(at.kScales, "k", k.scales, stream);
    setTensor(at.kMean, "k", k.mean, stream);
    setTensor(at.v, "v", values.codes, stream);
    setTensor(at.vScales, "v", values.scales, stream);
    setTensor(at.vMean, "v", values.mean, stream);
    setTensor(at.o, "out", results.out, stream);
    setTensor(at.lse, "lse", results.lse, stream);
    unwrap(stream.native.sage_attention_quantized(attentionCall.bytes, errorBytes, errorSize));
  } catch (error) {
    results[Symbol.dispose]();
    throw error;
  }
  return showResults(results);
}
