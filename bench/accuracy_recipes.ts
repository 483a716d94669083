// The ways to compute attention whose accuracy is measured, by the tables that show them.
import type { AttentionOptions } from "../mod.ts";

/** Options of attention(), or a scale for a whole head, which only quantized operands can have. */
export interface Recipe extends AttentionOptions {
  kernel: NonNullable<AttentionOptions["kernel"]>;
  perHead?: boolean;
}

/** What tells recipes apart. */
export function keyOf(recipe: Recipe): string {
  return Object.entries(recipe).filter(([, value]) => value !== undefined)
    .sort(([a], [b]) => a < b ? -1 : 1).map(([name, value]) => `${name}=${value}`).join(" ");
}

/** "Q", "QK" and so on as switches. */
function smooth(which: string): Pick<AttentionOptions, "smoothQ" | "smoothK" | "smoothV"> {
  return {
    smoothQ: which.includes("Q"),
    smoothK: which.includes("K"),
    smoothV: which.includes("V"),
  };
}

/** A recipe and what a row of a table calls it. */
export type Named = [name: string, recipe: Recipe];

const exact = { exponential: "exact" } as const;
const sage2 = { kernel: "sage2", ...exact } as const;

/** Every kernel as it is by default. */
export const kernelRecipes: readonly Named[] = [
  ["flash", { kernel: "flash" }],
  ["sage1", { kernel: "sage1" }],
  ["sage1-int8", { kernel: "sage1-int8" }],
  ["sage2", sage2],
  ["sage2++", { kernel: "sage2++" }],
  ["sage2-int4", { kernel: "sage2-int4" }],
  ["sage-int8", { kernel: "sage-int8" }],
];

/** Every choice of what to smooth. */
export const smoothingChoices = ["", "K", "Q", "QK", "V", "KV", "QV", "QKV"] as const;

/** Smoothing of sage2, at 8 bits or at 4. */
export function smoothingRecipe(bits: 8 | 4, which: string): Recipe {
  return bits === 8 ? { ...sage2, ...smooth(which) } : { kernel: "sage2-int4", ...smooth(which) };
}

/** From the finest on. */
export const granularityChoices = ["token", "thread", "warp", "block", "tensor"] as const;

/** Which rows of sage2 share a scale, at 8 bits or at 4. */
export function granularityRecipe(
  bits: 8 | 4,
  granularity: typeof granularityChoices[number],
): Recipe {
  const kernel = bits === 8 ? "sage2" : "sage2-int4";
  return granularity === "tensor"
    ? { kernel, perHead: true }
    : { ...bits === 8 ? sage2 : { kernel }, granularity };
}

/** How P and V are multiplied, Q·K being the same: INT8 per thread, K smoothed. */
export const productRecipes: readonly Named[] = [
  ["FP16", { kernel: "sage1", granularity: "thread" }],
  ["FP16, sums in FP16", { kernel: "sage1", granularity: "thread", pvAccumulator: "f16" }],
  ["E4M3", sage2],
  ["E4M3 by one multiplication", { kernel: "sage2", exponential: "fast" }],
  ["E4M3, V smoothed", { ...sage2, smoothV: true }],
  ["E4M3, sums in FP16, ranges 448 and 2.25", { kernel: "sage2++", pvRange: 448 }],
  ["E4M3, sums in FP16, ranges 224 and 4.5", { kernel: "sage2++", pvRange: 224 }],
  ["E4M3, sums in FP16, ranges 112 and 9", { kernel: "sage2++", pvRange: 112 }],
  ["INT8, one scale of P", { kernel: "sage1-int8", granularity: "thread" }],
  ["INT8, one scale of P, V smoothed", {
    kernel: "sage1-int8",
    granularity: "thread",
    smoothV: true,
  }],
  ["INT8, P by row and tile", { kernel: "sage-int8" }],
];

const rotate = { rotate: true }, band = { band: true, causal: true };
const first = { firstToken: true };

/** What goes beyond the papers; those with a band are for causal inputs. */
export const beyondRecipes: readonly Named[] = [
  ["sage2", sage2],
  ["sage2, Q smoothed", { ...sage2, smoothQ: true }],
  ["sage2, rotated", { ...sage2, ...rotate }],
  ["sage2, rotated, Q smoothed", { ...sage2, ...rotate, smoothQ: true }],
  ["sage2, first token", { ...sage2, ...first }],
  ["sage2, means of 64 keys", { ...sage2, kMeanRows: 64 }],
  ["sage2, band", { ...sage2, ...band }],
  ["sage2, band, rotated", { ...sage2, ...band, ...rotate }],
  ["sage1", { kernel: "sage1" }],
  ["sage1, rotated", { kernel: "sage1", ...rotate }],
  ["sage1, band", { kernel: "sage1", ...band }],
  ["sage1, band, rotated", { kernel: "sage1", ...band, ...rotate }],
  ["sage-int8", { kernel: "sage-int8" }],
  ["sage-int8, rotated", { kernel: "sage-int8", ...rotate }],
  ["sage-int8, first token", { kernel: "sage-int8", ...first }],
  ["sage-int8, first token, rotated", { kernel: "sage-int8", ...first, ...rotate }],
  ["sage-int8, band", { kernel: "sage-int8", ...band }],
  ["sage-int8, band, rotated", { kernel: "sage-int8", ...band, ...rotate }],
];

const int4 = { kernel: "sage2-int4" } as const, tiles = { kMeanRows: 64 };
const token = { granularity: "token" } as const;

/** The way down at 4 bits, step by step. */
export const fourBitRecipes: readonly Named[] = [
  ["as in the paper: per thread, Q and K smoothed", int4],
  ["rotated", { ...int4, ...rotate }],
  ["means of 64 keys", { ...int4, ...tiles }],
  ["rotated, means of 64 keys", { ...int4, ...rotate, ...tiles }],
  ["band", { ...int4, ...band }],
  ["band, rotated", { ...int4, ...band, ...rotate }],
  ["band, rotated, means of 64 keys", { ...int4, ...band, ...rotate, ...tiles }],
  ["per token", { ...int4, ...token }],
  ["per token, rotated, means of 64 keys", { ...int4, ...token, ...rotate, ...tiles }],
  ["per token, band, rotated", { ...int4, ...token, ...band, ...rotate }],
  ["per token, band, rotated, means of 128 keys", {
    ...int4,
    ...token,
    ...band,
    ...rotate,
    kMeanRows: 128,
  }],
  ["per token, band, rotated, means of 64 keys", {
    ...int4,
    ...token,
    ...band,
    ...rotate,
    ...tiles,
  }],
];

/** What has, or may have, a speed in a record, and what the record calls it. */
export const recordedRecipes: readonly Named[] = [
  ["flash", { kernel: "flash" }],
  ["sage1 f32", { kernel: "sage1" }],
  ["sage1 f16", { kernel: "sage1", pvAccumulator: "f16" }],
  ["sage1-int8", { kernel: "sage1-int8" }],
  ["sage2 exact", sage2],
  ["sage2 fast", { kernel: "sage2", exponential: "fast" }],
  ["sage2 exact band", { ...sage2, ...band }],
  ["sage2 fast band", { kernel: "sage2", exponential: "fast", ...band }],
  ["sage2-int4", int4],
  ["sage2++", { kernel: "sage2++" }],
  ["sage-int8", { kernel: "sage-int8" }],
];

/** Every recipe, once. */
export const recipes: readonly Recipe[] = [
  ...new Map(
    [
      ...[kernelRecipes, productRecipes, beyondRecipes, fourBitRecipes, recordedRecipes].flat()
        .map(([, recipe]) => recipe),
      ...([8, 4] as const).flatMap((bits) => [
        ...smoothingChoices.map((which) => smoothingRecipe(bits, which)),
        ...granularityChoices.map((one) => granularityRecipe(bits, one)),
      ]),
    ].map((recipe) => [keyOf(recipe), recipe]),
  ).values(),
];
