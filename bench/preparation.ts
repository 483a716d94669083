// What comes before attention: quantizing and smoothing, counted in the bytes that must move.
import {
  type Device,
  type FloatDType,
  quantize,
  type QuantizeOptions,
  smooth,
  type Tensor,
} from "../mod.ts";
import type { Row } from "./format.ts";

/** One way to prepare a tensor. */
export interface Preparation {
  /** What tells it from the others. */
  labels: Pick<Row, "group" | "kernel"> & Partial<Row>;
  /** Bytes that must move. */
  bytes: number;
  call: () => void;
}

const recipes: readonly QuantizeOptions[] = [
  ...(["token", "block", "warp", "thread"] as const).map((granularity) => ({
    operand: "query" as const,
    granularity,
  })),
  { operand: "query", granularity: "thread", smooth: true },
  { operand: "key", granularity: "block" },
  { operand: "key", granularity: "thread", smooth: true },
  { operand: "key", granularity: "thread", dtype: "i4" },
  { operand: "value", dtype: "e4m3", granularity: "channel" },
  { operand: "value", dtype: "i8", granularity: "channel" },
];

/** Shape of the tensor that is prepared. */
export function preparedShape(
  device: Device,
  headDim: number,
): [batch: number, heads: number, tokens: number, headDim: number] {
  return device.kind === "cpu" ? [1, 8, 4096, headDim] : [1, 32, 32768, headDim];
}

/** Every way, on a tensor. */
export function preparations(x: Tensor<FloatDType>): Preparation[] {
  const quantized = recipes.map((recipe): Preparation => {
    using sample = quantize(x, recipe);
    const { codes, scales, mean } = sample;
    // x once, but twice where a whole column must be seen before the first code can be written.
    const twice = recipe.granularity === "channel" || (recipe.smooth && recipe.operand === "key");
    return {
      labels: {
        group: "quantize",
        kernel: `${codes.dtype} ${recipe.granularity}`,
        operand: recipe.operand,
        smooth: recipe.smooth ?? false,
      },
      bytes: (twice ? 2 : 1) * x.byteLength + codes.byteLength + scales.byteLength +
        (mean?.byteLength ?? 0),
      call: () => quantize(x, recipe).dispose(),
    };
  });
  const smoothed = [undefined, 128].map((blockRows): Preparation => {
    using sample = smooth(x, { blockRows });
    const { byteLength } = sample.smoothed;
    return {
      labels: { group: "smooth", kernel: "smooth", ...blockRows ? { blockRows } : {} },
      bytes: (blockRows ? 1 : 2) * x.byteLength + byteLength + sample.mean.byteLength,
      call: () => smooth(x, { blockRows })[Symbol.dispose](),
    };
  });
  return [...quantized, ...smoothed];
}

/** "key to i8 thread, smoothed" */
export function nameOfPreparation({ labels }: Preparation): string {
  const { group, kernel, operand, smooth, blockRows } = labels;
  return group === "smooth"
    ? `smooth, mean of ${blockRows ?? "all"} rows`
    : `${operand} to ${kernel}${smooth ? ", smoothed" : ""}`;
}

/** A row of it. */
export function preparationRow(
  x: Tensor<FloatDType>,
  { labels, bytes }: Preparation,
  timing: { ms: number; noise: number },
): Row {
  const [batch, heads, tokens, headDim] = x.shape;
  return {
    headDim,
    batch,
    heads,
    kvHeads: heads,
    tokens,
    dtype: x.dtype,
    endToEnd: true,
    tbs: bytes / timing.ms / 1e9,
    peer: false,
    ...labels,
    bytes,
    ...timing,
  };
}
