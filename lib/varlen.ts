// Attention of sequences of different lengths, one after the other in one tensor.
import { cannot } from "./check.ts";
import { type AttentionWithLse, runAttention } from "./attention.ts";
import type { DType, FloatDType } from "./dtype.ts";
import { errorBytes, errorSize } from "./library.ts";
import { type AttentionOptions, type LseOption, optionNames } from "./options.ts";
import type { Shape, Tensor } from "./tensor.ts";

/** Where sequences begin, and after them where the last one ends. */
export type SequenceStarts = readonly number[] | Int32Array | BigInt64Array;

/** Options of {@linkcode attentionVarlen}. */
export interface AttentionVarlenOptions<O extends FloatDType = FloatDType>
  extends AttentionOptions<O> {
  /**
   * Where each sequence begins in the tokens of `q`, and after them where the last one ends: rising from 0 to all
   * tokens. Sequence s has tokens `cuSeqlensQ[s]` to `cuSeqlensQ[s + 1]`, the latter excluded; it may have none.
   */
  cuSeqlensQ: SequenceStarts;
  /** The same for the tokens of `k` and `v`. Default: `cuSeqlensQ`. */
  cuSeqlensK?: SequenceStarts;
}

const action = "run attention";

/** The numbers as the library takes them. */
function readStarts(name: string, starts: SequenceStarts): BigInt64Array<ArrayBuffer> {
  if (
    !Array.isArray(starts) && !(starts instanceof Int32Array || starts instanceof BigInt64Array)
  ) {
    const must = "be an array of numbers, an Int32Array or a BigInt64Array";
    throw new TypeError(cannot(action, name, must, starts));
  }
  if (starts.length < 2) {
    throw new RangeError(cannot(action, `${name}.length`, "be at least 2", starts.length));
  }
  return BigInt64Array.from(starts as readonly (number | bigint)[], (start, i) => {
    if (typeof start === "bigint") return start;
    if (Number.isSafeInteger(start)) return BigInt(start);
    const Refusal = typeof start === "number" ? RangeError : TypeError;
    throw new Refusal(cannot(action, `${name}[${i}]`, "be a whole number", start));
  });
}

/** Refuses what does not rise from 0 to the tokens of a tensor. */
function checkStarts(name: string, starts: BigInt64Array, tensor: string, tokens: number): void {
  const fail = (i: number, must: string) => {
    throw new RangeError(cannot(action, `${name}[${i}]`, must, Number(starts[i])));
  };
  if (starts[0] !== 0n) fail(0, "be 0");
  for (let i = 1; i < starts.length; ++i) {
    if (starts[i] < starts[i - 1]) {
      fail(i, `be at least the number before it (${starts[i - 1]})`);
    }
    if (starts[i] > tokens) fail(i, `be at most the tokens of ${tensor} (${tokens})`);
  }
  const last = starts.length - 1;
  if (Number(starts[last]) !== tokens) fail(last, `equal the tokens of ${tensor} (${tokens})`);
}

/**
 * Attention of sequences of different lengths, packed one after the other without padding, in one call.
 *
 * Each sequence is what {@linkcode attention} makes of it alone: queries see the keys of their own sequence only, and
 * means, scales, the diagonal of masks and, with kernel `"auto"`, the kernel are those of the sequence. A sequence
 * without keys gives zeros and a log-sum-exp of −∞. A `mask` is indexed by all tokens, [1, Hq or 1, all queries or 1,
 * all keys]; `sinks` and `alibi` are as for a batch of one.
 *
 * Source: FlashAttention's `flash_attn_varlen_func` (arXiv 2307.08691), whose `cu_seqlens` these are.
 *
 * @param q Queries, [1, Hq, tokens of all sequences, D]: `f32`, `f16` or `bf16`. Layout `"NHD"` is
 * [1, tokens, Hq, D], the order of FlashAttention.
 * @param k Keys, [1, Hkv, tokens of all sequences, D].
 * @param v Values, [1, Hkv, tokens of all sequences, Dv].
 * @param options Where sequences begin, and the options of {@linkcode attention}.
 * @returns The output, [1, Hq, tokens, Dv], in the layout and element type of `q`; with `returnLse`, also the
 * log-sum-exp.
 * @throws {TypeError | RangeError} Where sequences do not rise from 0 to all tokens, tensors do not fit together, or an
 * option is unknown, out of range or contradicts another.
 * @throws {UnsupportedError} Where the device lacks the kernel; the message lists those it has.
 *
 * @example
 * ```ts
 * import { attentionVarlen, Device } from "@sage/attention";
 * import { assertEquals } from "@std/assert";
 *
 * using device = Device.open("cpu");
 * const data = Float32Array.from({ length: 5 * 8 }, (_, i) => i < 2 * 8 ? 1 : 2); // 2 tokens, then 3
 * using x = device.tensor(data, [1, 1, 5, 8]);
 *
 * using o = attentionVarlen(x, x, x, { cuSeqlensQ: [0, 2, 5], kernel: "flash" });
 *
 * assertEquals(await o.data(), data); // no sequence sees the other
 * ```
 */
export function attentionVarlen<D extends DType, O extends FloatDType = Extract<D, FloatDType>>(
  q: Tensor<D>,
  k: Tensor<D>,
  v: Tensor<D>,
  options: AttentionVarlenOptions<O> & Required<LseOption<true>>,
): AttentionWithLse<O>;
/** The same, returning the output alone. */
export function attentionVarlen<D extends DType, O extends FloatDType = Extract<D, FloatDType>>(
  q: Tensor<D>,
  k: Tensor<D>,
  v: Tensor<D>,
  options: AttentionVarlenOptions<O> & LseOption<false>,
): Tensor<O>;
export function attentionVarlen(
  q: Tensor,
  k: Tensor,
  v: Tensor,
  options: AttentionVarlenOptions & LseOption,
): Tensor<FloatDType> | AttentionWithLse {
  let qStarts = new BigInt64Array(), kStarts = qStarts;
  const check = (qShape: Shape, kShape: Shape) => {
    const { cuSeqlensQ, cuSeqlensK = cuSeqlensQ } = options;
    qStarts = readStarts("cuSeqlensQ", cuSeqlensQ);
    kStarts = readStarts("cuSeqlensK", cuSeqlensK);
    if (kStarts.length !== qStarts.length) {
      const must = `equal that of cuSeqlensQ (${qStarts.length})`;
      throw new RangeError(cannot(action, "cuSeqlensK.length", must, kStarts.length));
    }
    if (qShape[0] !== 1) throw new RangeError(cannot(action, "batch of q", "be 1", qShape[0]));
    checkStarts("cuSeqlensQ", qStarts, "q", qShape[2]);
    checkStarts("cuSeqlensK", kStarts, "k", kShape[2]);
  };
  return runAttention([...optionNames.attention, "cuSeqlensQ", "cuSeqlensK"], q, k, v, options, {
    check,
    enqueue: (native, call) =>
      native.sage_attention_varlen(
        call,
        qStarts,
        kStarts,
        BigInt(qStarts.length - 1),
        errorBytes,
        errorSize,
      ),
  });
}
