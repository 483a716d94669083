// Which keys a query sees and what is done to its scores: options of every kind of attention.
import { cannot, checkInteger, checkOneOf, checkPositive } from "./check.ts";
import type { DType } from "./dtype.ts";
import { alignmentNumbers, attentionStruct, optionsStruct, type Struct } from "./ffi.ts";
import type { Stream } from "./stream.ts";
import { interiorOf, permute, type Shape, type Tensor } from "./tensor.ts";

/** Masks that follow from positions alone. Query i stands at key i + offset: the diagonal. */
export interface MaskOptions {
  /** Whether query i sees only keys j ≤ i + offset. A row that sees none gives zeros. Default: `false`. */
  causal?: boolean;
  /**
   * Where the diagonal lies that `causal`, `window` and `alibi` count from. `"bottom-right"`: offset = Nk − Nq, the
   * last query stands at the last key, as where keys of earlier tokens were kept. `"top-left"`: offset = 0. The same
   * where Nq = Nk. Default: `"bottom-right"`.
   */
  alignment?: "bottom-right" | "top-left";
  /**
   * A sliding window (Longformer, arXiv 2004.05150): query i sees keys i + offset − before ≤ j ≤ i + offset + after.
   * [before, after], each a whole number or `Infinity` for no limit; a single number stands for both, or with `causal`
   * for `before`. The query's own position is not counted: a model's "window of 4096 tokens" is 4095 here. Keys
   * outside are never touched, so the cost is that of the window. Default: no limits.
   */
  window?: number | readonly [before: number, after: number];
  /**
   * Caps scores: softcap · tanh(score / softcap), before anything is added to them (Gemma 2, arXiv 2408.00118).
   * Default: none.
   */
  softcap?: number;
}

/** Tensors that change scores or the softmax. */
export interface MaskTensors {
  /**
   * [B or 1, Hq or 1, Nq or 1, Nk], repeated where 1. `bool`: true where query i sees key j. `f32`, `f16` or `bf16`:
   * added to the scores, and −∞ hides a key as false does. A tile of keys that it leaves fully open costs no more
   * than without it, and one that it closes is skipped. Hidden keys, whatever they hold, show nowhere; but finite
   * ones still count in the scales and means of quantization, so leave none that are far larger than the others.
   */
  mask?: Tensor<"bool" | "f32" | "f16" | "bf16">;
  /**
   * Attention sinks: [1, Hq, 1, 1] of `f32`, a logit for every head that counts in the denominator of softmax alone
   * (gpt-oss, arXiv 2508.10925; cf. StreamingLLM, 2309.17453). The log-sum-exp includes it.
   */
  sinks?: Tensor<"f32">;
  /**
   * ALiBi (arXiv 2108.12409): [B or 1, Hq, 1, 1] of `f32`, a slope for every head; −slope · |i + offset − j| is added
   * to the scores. {@linkcode alibiSlopes} gives the paper's slopes.
   */
  alibi?: Tensor<"f32">;
}

/** The names of {@linkcode MaskOptions}. */
export const maskNames: readonly string[] = ["causal", "alignment", "window", "softcap"];
/** The names of {@linkcode MaskTensors}. */
export const maskTensorNames: readonly string[] = ["mask", "sinks", "alibi"];

// ---- options ------------------------------------------------------------------------------------------

/** [before, after], each -1 for no limit. */
function limitsOf({ window, causal }: MaskOptions): [number, number] {
  const [before, after] = typeof window === "object" ? window : [window!, causal ? 0 : window!];
  return [before, after].map((limit) => limit === Infinity ? -1 : limit) as [number, number];
}

/** Refuses masks that are no masks or contradict each other. */
export function checkMaskOptions(action: string, options: MaskOptions): void {
  const { alignment, window, softcap, causal } = options;
  if (alignment !== undefined) {
    checkOneOf(action, "alignment", alignment, ["bottom-right", "top-left"]);
  }
  if (window !== undefined) {
    const limits = typeof window === "number" ? [window] : window;
    if (!Array.isArray(limits) || (typeof window !== "number" && limits.length !== 2)) {
      throw new TypeError(cannot(action, "window", "be a number or [before, after]", window));
    }
    limits.forEach((limit, i) => {
      const name = typeof window === "number" ? "window" : `window[${i}]`;
      if (limit === Infinity || (Number.isSafeInteger(limit) && limit >= 0)) return;
      const must = "be a whole number of at least 0, or Infinity for no limit";
      const Refusal = typeof limit === "number" ? RangeError : TypeError;
      throw new Refusal(cannot(action, name, must, limit));
    });
    if (causal && limits.length === 2 && limits[1] !== 0 && limits[1] !== Infinity) {
      throw new TypeError(
        cannot(action, "window[1] with causal", "be 0 or Infinity", limits[1]),
      );
    }
  }
  if (softcap !== undefined) {
    checkPositive(action, "softcap", softcap, 3e38);
    if (Math.fround(softcap) === 0) {
      throw new RangeError(cannot(action, "softcap", "be positive in single precision", softcap));
    }
  }
}

/** Writes them at the offset of a sage_attention_options that is zero there. */
export function writeMaskOptions(call: Struct, at: number, options: MaskOptions): void {
  const { causal, alignment, window, softcap } = options;
  if (causal) call.setInt(at + optionsStruct.causal, 1);
  if (alignment) call.setInt(at + optionsStruct.alignment, alignmentNumbers[alignment]);
  if (window !== undefined) {
    const [before, after] = limitsOf(options);
    call.setInt(at + optionsStruct.windowed, 1);
    call.setLong(at + optionsStruct.windowBefore, before);
    call.setLong(at + optionsStruct.windowAfter, after);
  }
  if (softcap) call.setFloat(at + optionsStruct.softcap, softcap);
}

// ---- tensors ------------------------------------------------------------------------------------------

/** Whether there are none, as in most calls. */
function lacksMaskTensors({ mask, sinks, alibi }: MaskTensors): boolean {
  return mask === undefined && sinks === undefined && alibi === undefined;
}

/** Refuses tensors that do not fit to the others; shapes are in the order [batch, heads, tokens, channels]. */
export function checkMaskTensors(
  action: string,
  stream: Stream,
  q: Shape,
  k: Shape,
  options: MaskTensors,
): void {
  if (lacksMaskTensors(options)) return;
  const [batch, heads, queries] = q, keys = k[2];
  const lengths: Record<keyof MaskTensors, number[][]> = {
    mask: [[1, batch], [1, heads], [1, queries], [keys]],
    sinks: [[1], [heads], [1], [1]],
    alibi: [[1, batch], [heads], [1], [1]],
  };
  for (const name of maskTensorNames as readonly (keyof MaskTensors)[]) {
    const tensor = options[name];
    if (tensor === undefined) continue;
    const { geometry: { shape, layout } } = interiorOf(action, name, tensor, stream);
    const dtypes: readonly DType[] = name === "mask" ? ["bool", "f32", "f16", "bf16"] : ["f32"];
    checkOneOf(action, `${name}.dtype`, tensor.dtype, dtypes);
    if (shape.every((length, i) => lengths[name][i].includes(length))) continue;
    const allowed = lengths[name].map((some) => [...new Set(some)].join(" or ")) as unknown;
    const must = `have shape [${permute(allowed as Shape, layout).join(", ")}]`;
    throw new RangeError(cannot(action, name, must, [...tensor.shape]));
  }
}

/** Writes them into a sage_attention_call. */
export function writeMaskTensors(
  call: Struct,
  action: string,
  stream: Stream,
  options: MaskTensors,
): void {
  if (lacksMaskTensors(options)) return;
  for (const name of maskTensorNames as readonly (keyof MaskTensors)[]) {
    const tensor = options[name];
    if (tensor) {
      call.setStruct(attentionStruct[name], interiorOf(action, name, tensor, stream).bytes);
    }
  }
}

/**
 * The slopes of ALiBi for a number of heads: 2^(−8/n), 2^(−16/n), … for n heads where n is a power of two; else those
 * of the next smaller power of two, and every other one of the next larger.
 *
 * Source: Press et al., Train Short, Test Long (arXiv 2108.12409), section 3 and the authors' program.
 *
 * @param heads How many heads of queries.
 * @returns A slope for every head, to be made a tensor [1, heads, 1, 1].
 * @throws {TypeError | RangeError} Where `heads` is not a whole number of at least 1.
 *
 * @example
 * ```ts
 * import { alibiSlopes, Device, flashAttention } from "@sage/attention";
 * import { assertEquals } from "@std/assert";
 *
 * assertEquals(alibiSlopes(2), new Float32Array([1 / 16, 1 / 256]));
 * using device = Device.open("cpu");
 * using alibi = device.tensor(alibiSlopes(2), [1, 2, 1, 1]);
 * using q = device.tensor(new Float32Array(2 * 4 * 8).fill(1), [1, 2, 4, 8]);
 * using o = flashAttention(q, q, q, { causal: true, alibi });
 * assertEquals(o.shape, [1, 2, 4, 8]);
 * ```
 */
export function alibiSlopes(heads: number): Float32Array<ArrayBuffer> {
  checkInteger("make slopes", "heads", heads, 1, 2 ** 20);
  const power = 2 ** Math.floor(Math.log2(heads));
  return Float32Array.from(
    { length: heads },
    (_, i) => i < power ? 2 ** (-8 * (i + 1) / power) : 2 ** (-4 * (2 * (i - power) + 1) / power),
  );
}
