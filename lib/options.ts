// Options of attention: what they are called, which contradict each other, and how the library takes them.
import {
  cannot,
  checkBoolean,
  checkInteger,
  checkOneOf,
  checkOptions,
  checkPositive,
  list,
} from "./check.ts";
import type { FloatDType } from "./dtype.ts";
import {
  accumulatorNumbers,
  exponentialNumbers,
  granularityNumbers,
  kernelNumbers,
  optionsStruct,
  rangeNumbers,
  type Struct,
  switchNumber,
} from "./ffi.ts";
import {
  checkMaskOptions,
  maskNames,
  type MaskOptions,
  maskTensorNames,
  type MaskTensors,
  writeMaskOptions,
} from "./masks.ts";
import type { PlanOptions } from "./recipe.ts";
import type { Tensor } from "./tensor.ts";

/**
 * How attention is computed.
 *
 * | kernel | Q·K | P·V | smoothed by default | source |
 * |---|---|---|---|---|
 * | `flash` | as given | as given | – | FlashAttention-2 (arXiv 2307.08691) |
 * | `sage1` | INT8 per block | FP16 | K | SageAttention (2410.02367) |
 * | `sage1-int8` | INT8 per block | INT8 | K | SageAttention |
 * | `sage2` | INT8 per thread | FP8 | K | SageAttention2 (2411.10958) |
 * | `sage2-int4` | INT4 per thread | FP8 | Q, K | SageAttention2 |
 * | `sage2++` | INT8 per thread | FP8, summed in FP16 | K | SageAttention2++ (2505.21136) |
 * | `sage-int8` | INT8 per thread | INT8, P scaled by row and tile of keys | K | ours |
 * | `auto` | chosen for the device and shape; {@linkcode explain} says which and why | | | |
 *
 * `sage-int8` has exact integer products only: P becomes ⌊255·2^(s − m) + ½⌋, m being the largest score of the row in
 * a tile of 64 keys, V has a scale per channel, and rows are divided by the sum of those codes. Where a language model
 * puts most of its weight on the first token, nothing is left of the other weights of that tile: such layers need
 * `band` or `firstToken`.
 */
export type Kernel =
  | "auto"
  | "flash"
  | "sage1"
  | "sage1-int8"
  | "sage2"
  | "sage2-int4"
  | "sage2++"
  | "sage-int8";

/**
 * Which values share one scale.
 *
 * - `"token"`: every row.
 * - `"block"`: runs of rows, 128 of queries and 64 of keys.
 * - `"warp"`: runs of rows, 32 of queries and 64 of keys.
 * - `"thread"`: the rows that one thread of a tensor core holds (SageAttention2, Eq. 8): of 32 queries, rows t, t + 8,
 *   t + 16 and t + 24 for t = 0..7; of 64 keys, rows 2t, 2t + 1, 2t + 8, 2t + 9 and so on for t = 0..3.
 * - `"channel"`: every channel over all tokens; what values use.
 */
export type Granularity = "token" | "block" | "warp" | "thread" | "channel";

/** Options of {@linkcode flashAttention}, and the ones that every kind of attention has. */
export interface FlashAttentionOptions<O extends FloatDType = FloatDType>
  extends MaskOptions, MaskTensors {
  /** What Q·Kᵀ is multiplied with before softmax. Default: 1 / √D. */
  scale?: number;
  /** Where to write the output: [B, Hq, Nq, Dv] in any layout; returned instead of a new tensor. */
  out?: Tensor<O>;
  /** Element type of the output. Default: that of `out`, else that of `q`. */
  outDtype?: O;
}

/** Asks for the log-sum-exp beside the output, as {@linkcode AttentionWithLse}. */
export interface LseOption<T extends boolean = boolean> {
  /** Whether to return both. Default: `false`. */
  returnLse?: T;
}

/** Options of {@linkcode attentionQuantized}. */
export interface AttentionQuantizedOptions<O extends FloatDType = FloatDType>
  extends Omit<FlashAttentionOptions<O>, keyof MaskTensors> {
  /** How to compute. Default: the kernel whose operands these are. */
  kernel?: Exclude<Kernel, "auto" | "flash">;
  /** What sums P·V within a tile of keys; only for kernel `"sage1"`. Default: `"f32"`. */
  pvAccumulator?: "f32" | "f16";
  /**
   * Largest magnitude of P in FP8, so that FP16 can hold the sums; V is narrowed to 2.25, 4.5 or 9 with it. Only
   * for kernel `"sage2++"`. Default: 112, and with it 9.
   */
  pvRange?: 448 | 224 | 112;
  /**
   * How scores become P in FP8. `"exact"` takes an exponential and rounds it. `"fast"`, only for kernel `"sage2"`,
   * gets the FP8 code from the score by one integer multiplication, as its mantissa is nearly a logarithm: P's rms
   * error is then 3.15 % instead of 2.66 %, and the error of the output about 1.1 times as large,
   * where attention is nearly uniform up to 1.5 times. A log-sum-exp is
   * then that of P as it was coded, up to 0.04 off where a row sees few keys; else that of exact exponentials. Default:
   * `"exact"` where the log-sum-exp is wanted too or queries are smoothed, else what suits the device;
   * {@linkcode explain} says which.
   */
  exponential?: "exact" | "fast";
}

/** Options of {@linkcode attention}. */
export interface AttentionOptions<O extends FloatDType = FloatDType>
  extends Omit<AttentionQuantizedOptions<O>, "kernel">, MaskTensors, PlanOptions {
  /** How to compute. Default: `"auto"`. */
  kernel?: Kernel;
  /** Which rows of Q and K share a scale. Default: `"block"` for `sage1` and `sage1-int8`, else `"thread"`. */
  granularity?: Exclude<Granularity, "channel">;
  /** Whether to subtract from every 128 queries their mean; corrected exactly. Default: for `sage2-int4` only. */
  smoothQ?: boolean;
  /** Whether to subtract from K its mean over tokens; corrected exactly. Default: but for `flash`. */
  smoothK?: boolean;
  /** Whether to subtract from V its mean over tokens; corrected exactly. Default: `false`. */
  smoothV?: boolean;
  /**
   * How many keys share a mean where K is smoothed, a multiple of 64; what each mean adds to the scores is computed in
   * FP32. Fewer keys leave less to quantize, which pays at 4 bits. Default: all of them.
   */
  kMeanRows?: number;
  /**
   * Whether to multiply Q and K, less their means, by a Hadamard matrix with random signs before they are quantized:
   * Q·Kᵀ stays what it is, and what stands out in one channel is spread over all. Default: `false`.
   */
  rotate?: boolean;
  /**
   * Whether each 128 queries meet the first 64 keys, and the tiles of 64 keys on the diagonal, without quantization;
   * only with `causal`. There language models put nearly all of their weight, and the share of these tiles falls with
   * the length: 17 % of all at 2048 tokens, 1.2 % at 32768. Fast on Hopper with kernel `"sage2"`, f16 and bf16,
   * queries not smoothed; on other GPUs these tiles are computed in FP32. Default: `false`.
   */
  band?: boolean;
  /**
   * Whether the first key and value count without quantization, apart from the others: for the sink of attention that
   * many models make of the first token. Default: `false`.
   */
  firstToken?: boolean;
}

const commonNames = [...maskNames, "scale", "out", "outDtype", "returnLse"];
const flashNames = [...commonNames, ...maskTensorNames];
const quantizedNames = [...commonNames, "kernel", "pvAccumulator", "pvRange", "exponential"];
const smoothNames = ["granularity", "smoothQ", "smoothK", "smoothV"];
const beyondNames = ["kMeanRows", "rotate", "band", "firstToken"] as const;
const quantizedOnly = ["granularity", "smoothQ", "smoothK", "smoothV", ...beyondNames] as const;
const attentionNames = [...quantizedNames, ...maskTensorNames, ...smoothNames, ...beyondNames];

/** The options that each function knows. */
export const optionNames = {
  flash: flashNames,
  quantized: quantizedNames,
  attention: attentionNames,
} as const;

/**
 * Every kernel but `"auto"`. Not each of them runs on every device with all options: {@linkcode explain} tells.
 *
 * @example
 * ```ts
 * import { kernels } from "@sage/attention";
 *
 * console.log(kernels.join(", ")); // flash, sage1, sage1-int8, sage2, sage2-int4, sage2++, sage-int8
 * ```
 */
export const kernels: readonly Exclude<Kernel, "auto">[] = Object.freeze(
  (Object.keys(kernelNumbers) as Kernel[]).filter((kernel) => kernel !== "auto"),
);
const allKernels: readonly Kernel[] = ["auto", ...kernels];
const accumulators = Object.keys(accumulatorNumbers) as readonly ("f32" | "f16")[];
const exponentials = Object.keys(exponentialNumbers) as readonly ("exact" | "fast")[];
const ranges: readonly (448 | 224 | 112)[] = [448, 224, 112];
const granularities = ["token", "block", "warp", "thread"] as const;

/** Refuses options that are unknown, of another type, out of range or contradict each other. */
export function checkAttentionOptions(
  action: string,
  options: AttentionOptions & LseOption,
  known: readonly string[],
): void {
  checkOptions(action, options, known);
  checkBoolean(action, "causal", options.causal);
  checkMaskOptions(action, options);
  checkBoolean(action, "returnLse", options.returnLse);
  checkBoolean(action, "smoothQ", options.smoothQ);
  checkBoolean(action, "smoothK", options.smoothK);
  checkBoolean(action, "smoothV", options.smoothV);
  checkBeyond(action, options);
  const { kernel = "auto", scale, granularity, pvAccumulator, pvRange, exponential } = options;
  checkOneOf(action, "kernel", kernel, allKernels);
  // The library computes in single precision, where this must not become 0 or infinite.
  if (scale !== undefined) {
    checkPositive(action, "scale", scale, 3e38);
    if (Math.fround(scale) === 0) {
      throw new RangeError(cannot(action, "scale", "be positive in single precision", scale));
    }
  }
  if (granularity !== undefined) checkOneOf(action, "granularity", granularity, granularities);
  if (pvAccumulator !== undefined) {
    checkOneOf(action, "pvAccumulator", pvAccumulator, accumulators);
    checkKernel(action, "pvAccumulator", kernel, ["sage1"]);
  }
  if (pvRange !== undefined) {
    checkOneOf(action, "pvRange", pvRange, ranges);
    checkKernel(action, "pvRange", kernel, ["sage2++"]);
  }
  if (exponential !== undefined) {
    checkOneOf(action, "exponential", exponential, exponentials);
    if (exponential === "fast") {
      checkKernel(action, 'exponential "fast"', kernel, ["sage2"]);
    }
  }
  if (kernel === "flash") checkUnquantized(action, options);
}

function checkKernel(
  action: string,
  option: string,
  kernel: Kernel,
  allowed: readonly Kernel[],
): void {
  if (allowed.includes(kernel)) return;
  throw new TypeError(cannot(action, `kernel with ${option}`, `be ${list(allowed)}`, kernel));
}

function checkBeyond(action: string, options: AttentionOptions): void {
  const { kMeanRows, rotate, band, firstToken, causal, smoothK } = options;
  checkBoolean(action, "rotate", rotate);
  checkBoolean(action, "band", band);
  checkBoolean(action, "firstToken", firstToken);
  if (band && !causal) {
    throw new TypeError(cannot(action, "causal with band", "be true", causal));
  }
  if (kMeanRows === undefined) return;
  checkInteger(action, "kMeanRows", kMeanRows, 64, 2 ** 32 - 64);
  if (kMeanRows % 64 !== 0) {
    throw new RangeError(cannot(action, "kMeanRows", "be a multiple of 64", kMeanRows));
  }
  if (smoothK === false) {
    throw new TypeError(cannot(action, "smoothK with kMeanRows", "be absent or true", smoothK));
  }
}

function checkUnquantized(action: string, options: AttentionOptions): void {
  for (const name of quantizedOnly) {
    const value = options[name];
    if (value !== undefined && value !== false) {
      throw new TypeError(
        cannot(action, `${name} with kernel "flash"`, "be absent, as nothing is quantized", value),
      );
    }
  }
}

/** Writes sage_attention_options at an offset of a struct that is zero there. */
export function writeOptions(call: Struct, at: number, options: AttentionOptions): void {
  const { kernel, granularity, pvAccumulator, pvRange, exponential, scale } = options;
  if (kernel) call.setInt(at + optionsStruct.kernel, kernelNumbers[kernel]);
  writeMaskOptions(call, at, options);
  if (scale) call.setFloat(at + optionsStruct.scale, scale);
  if (granularity) call.setInt(at + optionsStruct.granularity, granularityNumbers[granularity]);
  call.setInt(at + optionsStruct.smoothQ, switchNumber(options.smoothQ));
  call.setInt(at + optionsStruct.smoothK, switchNumber(options.smoothK));
  call.setInt(at + optionsStruct.smoothV, switchNumber(options.smoothV));
  call.setInt(at + optionsStruct.rotate, switchNumber(options.rotate));
  call.setInt(at + optionsStruct.band, switchNumber(options.band));
  call.setInt(at + optionsStruct.firstToken, switchNumber(options.firstToken));
  if (options.kMeanRows) call.setInt(at + optionsStruct.kMeanRows, options.kMeanRows);
  if (pvAccumulator) {
    call.setInt(at + optionsStruct.pvAccumulator, accumulatorNumbers[pvAccumulator]);
  }
  if (pvRange) call.setInt(at + optionsStruct.pvRange, rangeNumbers[pvRange]);
  if (exponential) call.setInt(at + optionsStruct.exponential, exponentialNumbers[exponential]);
}
