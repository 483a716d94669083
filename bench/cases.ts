// What is measured: problems that fit a device, and every way that the device can compute them.
import {
  attention,
  type AttentionOptions,
  type AttentionPlan,
  type Device,
  explain,
  type FloatDType,
  type Kernel,
  type Tensor,
  UnsupportedError,
} from "../mod.ts";
import type { Row, Shape } from "./format.ts";
import { type RandomTensors, Timed } from "./measure.ts";

// ---- kernels and their choices -------------------------------------------------------------------

/** A kernel with a choice of its options; `flash` comes first, as what the others are compared with. */
export type Variant = Required<Pick<AttentionOptions, "kernel">> & AttentionOptions;

/** Every kernel, with both of its choices where it has one. */
export const variants: readonly Variant[] = [
  { kernel: "flash" },
  { kernel: "sage1", pvAccumulator: "f32" },
  { kernel: "sage1", pvAccumulator: "f16" },
  { kernel: "sage1-int8" },
  { kernel: "sage2", exponential: "exact" },
  { kernel: "sage2", exponential: "fast" },
  { kernel: "sage2", exponential: "exact", smoothQ: true },
  { kernel: "sage2", exponential: "fast", band: true },
  { kernel: "sage2-int4" },
  { kernel: "sage2++" },
  { kernel: "sage-int8" },
];

/** Those that a mask leaves: the precision band lies along a causal one. */
export function variantsOf({ causal }: Pick<Shape, "causal">): Variant[] {
  return variants.filter(({ band }) => causal || !band);
}

/** Those whose portable kernels a record sets beside others' on a newer GPU. */
export const portableVariants: readonly Variant[] = [
  { kernel: "flash" },
  { kernel: "sage1", pvAccumulator: "f32" },
];

/** What a record calls it. */
export function labels(
  { kernel, pvAccumulator, exponential, smoothQ, band }: Variant,
): Pick<Row, "accumulator" | "exp" | "smoothQ" | "band"> & { kernel: Exclude<Kernel, "auto"> } {
  return {
    kernel: kernel as Exclude<Kernel, "auto">,
    ...pvAccumulator ? { accumulator: pvAccumulator } : {},
    ...exponential ? { exp: exponential } : {},
    ...smoothQ ? { smoothQ } : {},
    ...band ? { band } : {},
  };
}

// ---- problems ------------------------------------------------------------------------------------

/** One shape in one element type. */
export interface Case {
  shape: Shape;
  dtype: FloatDType;
}

function square(
  headDim: number,
  causal: boolean,
  tokens: number,
  batch: number,
  heads: number,
  kvHeads = heads,
): Shape {
  return { headDim, causal, batch, heads, kvHeads, tokens };
}

function product<A, B>(first: readonly A[], second: readonly B[]): [A, B][] {
  return first.flatMap((a) => second.map((b): [A, B] => [a, b]));
}

/** Batch · tokens is at most 32k, as in the papers. */
function gpuShape(headDim: number, causal: boolean, tokens: number, kvHeads?: number): Shape {
  const batch = Math.max(1, 32768 / tokens);
  return square(headDim, causal, tokens, batch, headDim === 256 ? 16 : 32, kvHeads);
}

const masks = [false, true];
const bf16 = (shape: Shape): Case => ({ shape, dtype: "bf16" });

function decodeShape(batch: number, tokens: number): Shape {
  return { ...square(128, false, tokens, batch, 32, 8), queries: 1 };
}

/** What a record of a GPU holds. */
function gpuRecord(): Case[] {
  const lengths = [1024, 2048, 4096, 8192, 16384, 32768];
  return [
    ...product([64, 128, 256], product(masks, lengths))
      .map(([headDim, [causal, tokens]]) => gpuShape(headDim, causal, tokens)),
    // grouped queries
    ...product(masks, [4096, 16384]).map(([causal, tokens]) => gpuShape(128, causal, tokens, 8)),
    // against batch and heads
    ...[1, 2, 4, 8].map((batch) => square(128, false, 2048, batch, 32)),
    ...[4, 8, 16, 64].map((heads) => square(128, false, 4096, 1, heads)),
    // one new token
    decodeShape(1, 1024),
    decodeShape(1, 32768),
    decodeShape(1, 131072),
    decodeShape(16, 8192),
    decodeShape(64, 8192),
  ].map(bf16);
}

/** The oldest architecture, and what a record holds of its kernels; nothing where they are the device's own. */
export const oldest = 80;
export function portableCases({ kind, info }: Device): Case[] {
  if (kind === "cpu" || Number(info.computeCapability) < 9) return [];
  return product(masks, [4096, 16384]).map(([causal, tokens]) =>
    bf16(gpuShape(128, causal, tokens))
  );
}

/** The same for the CPU, whose kernels take f32 as it is. */
function cpuRecord(): Case[] {
  const f32 = (shape: Shape): Case => ({ shape, dtype: "f32" });
  return [
    ...product([64, 128], product(masks, [256, 512, 1024, 2048]))
      .map(([headDim, [causal, tokens]]) => f32(square(headDim, causal, tokens, 1, 8))),
    bf16(square(64, false, 1024, 1, 8)),
    f32(square(64, false, 1024, 1, 8, 2)),
    ...[2, 4].map((batch) => f32(square(64, false, 512, batch, 8))),
    ...[2, 4, 16].map((heads) => f32(square(64, false, 512, 1, heads))),
    f32({ ...square(128, false, 4096, 1, 32, 8), queries: 1 }),
  ];
}

/** The problems of a record. */
export function recordCases(device: Device, quick: boolean): Case[] {
  const all = device.kind === "cpu" ? cpuRecord() : gpuRecord();
  if (!quick) return all;
  const lengths = device.kind === "cpu" ? [512] : [1024, 8192];
  return all.filter(({ shape: { headDim, tokens, batch, heads, kvHeads, queries } }) =>
    headDim !== 256 && lengths.includes(tokens) && queries === undefined && heads === kvHeads &&
    (device.kind === "cpu" ? batch * heads === 8 : batch * tokens === 32768)
  );
}

/** The problems of `deno bench`: fewer, each there for one thing that it shows. */
export function benchCases(device: Device, quick: boolean): Case[] {
  if (device.kind === "cpu") {
    const f32 = (shape: Shape): Case => ({ shape, dtype: "f32" });
    const short = [f32(square(64, false, 1024, 1, 8)), f32(square(128, true, 512, 1, 8))];
    return quick ? short : [
      ...short,
      f32(square(128, false, 1024, 1, 8)),
      f32(square(64, false, 1024, 1, 8, 2)),
      f32(square(64, false, 512, 4, 8)),
      bf16(square(64, false, 1024, 1, 8)),
    ];
  }
  const short = [gpuShape(128, false, 4096), gpuShape(128, true, 4096)];
  return (quick ? short : [
    ...short,
    gpuShape(128, false, 1024),
    gpuShape(128, false, 32768),
    gpuShape(64, false, 8192),
    gpuShape(64, true, 8192),
    gpuShape(256, false, 8192),
    gpuShape(256, true, 8192),
    gpuShape(128, true, 8192, 8),
    square(128, false, 4096, 1, 32),
    decodeShape(16, 8192),
  ]).map(bf16);
}

// ---- a problem on a device -----------------------------------------------------------------------

/** What the device would do; undefined, with the reason to `skipped`, where it cannot. */
export function planOf(
  device: Device,
  { shape, dtype }: Case,
  variant: Variant,
  skipped: (reason: string) => void,
): AttentionPlan | undefined {
  const { batch, heads, kvHeads, tokens, queries = tokens, headDim, causal } = shape;
  const q = { shape: [batch, heads, queries, headDim], dtype };
  const k = { shape: [batch, kvHeads, tokens, headDim], dtype };
  try {
    return explain(q, k, k, { ...variant, causal, device });
  } catch (error) {
    if (!(error instanceof UnsupportedError)) throw error;
    skipped(error.message);
  }
}

interface Buffers {
  q: Tensor<FloatDType>;
  k: Tensor<FloatDType>;
  v: Tensor<FloatDType>;
  out: Tensor<FloatDType>;
}

// Bytes: more than any L2 that these GPUs have; on the CPU, whose attention is far from its memory's limit, a few sets.
const beyondCaches = { cuda: 2 ** 27, cpu: 2 ** 25 };
const mostSets = 64;

/** Random tensors of a case, in so many sets that no call finds its own in a cache. */
export class Problem implements Disposable {
  readonly #device: Device;
  readonly #shape: Shape;
  readonly #sets: Buffers[] = [];

  constructor(random: RandomTensors, { shape, dtype }: Case) {
    this.#device = random.device;
    this.#shape = shape;
    const { batch, heads, kvHeads, tokens, queries = tokens, headDim } = shape;
    const q = [batch, heads, queries, headDim], k = [batch, kvHeads, tokens, headDim];
    try {
      let bytes = 0;
      while (
        this.#sets.length < mostSets &&
        (bytes < beyondCaches[random.device.kind] || !this.#sets.length)
      ) {
        const set = {
          q: random.make(q, dtype),
          k: random.make(k, dtype),
          v: random.make(k, dtype),
          out: random.device.empty(q, { dtype }),
        };
        this.#sets.push(set);
        bytes += Object.values(set).reduce((sum, tensor) => sum + tensor.byteLength, 0);
      }
    } catch (error) {
      this[Symbol.dispose]();
      throw error;
    }
  }

  /** Attention from these tensors to the output. */
  timed(variant: Variant): Timed {
    const options = { ...variant, causal: this.#shape.causal };
    return new Timed(
      this.#device,
      this.#sets.map(({ q, k, v, out }) => () => void attention(q, k, v, { ...options, out })),
    );
  }

  [Symbol.dispose](): void {
    for (const set of this.#sets) Object.values(set).forEach((tensor) => tensor.dispose());
  }
}
