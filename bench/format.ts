// What a file in bench/results/ holds.

/** A problem of attention; a query token sees every key, or with `causal` those up to its own place. */
export interface Shape {
  headDim: number;
  causal: boolean;
  batch: number;
  heads: number;
  kvHeads: number;
  /** Keys, and queries too where `queries` is absent. */
  tokens: number;
  queries?: number;
}

/** What lies between floating-point tensors and the output, and how many milliseconds each part takes. */
export type Stages = Record<string, number>;

/** One measurement. */
export interface Row {
  /** `portable`: attention by the kernels of an older `architecture`. */
  group: "attention" | "decode" | "quantize" | "smooth" | "portable";
  /** Ours by name; others' as "pytorch-fa2" and "cudnn"; quantizers as "i8 thread". */
  kernel: string;
  headDim: number;
  causal?: boolean;
  batch: number;
  heads: number;
  kvHeads: number;
  /** Keys, and queries too where `queries` is absent. */
  tokens: number;
  queries?: number;
  /** Of the tensors that come in. */
  dtype: string;
  /** From floating-point tensors to the output; else from quantized ones. */
  endToEnd: boolean;
  /** Median of the samples. */
  ms: number;
  /** What lies between the quartiles of the samples, over their median. */
  noise?: number;
  /** 4 · batch · heads · queries · tokens · headDim, halved where causal, over time. */
  tflops?: number;
  /** Bytes that must move over time. */
  tbs?: number;
  /** Those bytes. */
  bytes?: number;
  /** Whether the kernel is another's, measured in the same run. */
  peer: boolean;
  /** sage1: what sums P·V within a tile. */
  accumulator?: "f32" | "f16";
  /** sage2: how scores become codes of P. */
  exp?: "exact" | "fast";
  /** Whether queries were smoothed beside keys. */
  smoothQ?: boolean;
  /** Whether the sink and the diagonal ran in the precision of the inputs. */
  band?: boolean;
  /** The compute capability whose kernels ran, 80 for 8.0, where that is not the device's own. */
  architecture?: number;
  /** Which code ran. */
  implementation?: string;
  /** Of a block. */
  queriesAtOnce?: number;
  /** Of a call, besides its tensors. */
  workspaceBytes?: number;
  /** Medians of the parts of a call. */
  stages?: Stages;
  /** Of the SMs while this row was measured, as the driver tells it; under a power limit the real one is lower. */
  clockMHz?: number;
  operand?: string;
  /** Whether the mean was taken and subtracted too. */
  smooth?: boolean;
  /** Rows of one mean; absent: all. */
  blockRows?: number;
}

/** What a mask costs, or what it saves. */
export interface MaskRow {
  kernel: string;
  accumulator?: "f32" | "f16";
  exp?: "exact" | "fast";
  smoothQ?: boolean;
  band?: boolean;
  what: string;
  /** The same work without it. */
  against: string;
  ms: number;
  plainMs: number;
  noise: number;
}

/** Time of one call on an idle device, from the call until a program that waits for it goes on. */
export interface LatencyRow {
  kernel: string;
  accumulator?: "f32" | "f16";
  exp?: "exact" | "fast";
  smoothQ?: boolean;
  band?: boolean;
  heads: number;
  tokens: number;
  headDim: number;
  ms: number;
  noise: number;
}

/** How far a kernel was from float64 attention on the tensors of tests/data/. */
export interface Accuracy {
  file: string;
  kernel: string;
  accumulator?: "f32" | "f16";
  exp?: "exact" | "fast";
  smoothQ?: boolean;
  band?: boolean;
  cosine: number;
  relativeL1: number;
  rmse: number;
}

/** Of the SMs and the memory, in MHz, while measuring; and the highest that the GPU has. */
export interface Clocks {
  sm: { min: number; median: number; max: number };
  smHighest: number;
  memory: number;
}

/** A whole record. */
export interface Results {
  device: string;
  /** Instruction sets in use: "sm_90", "avx512 vnni". */
  features?: string;
  /** Streaming multiprocessors, or threads of the CPU. */
  multiprocessors?: number;
  /** Of the GPU. */
  driver?: string;
  date: string;
  /** SHA-256 of the sources in cuda/. */
  source: string;
  compilers: { host: string; cuda: string | null };
  /** Of a GPU. */
  clocks?: Clocks;
  /** Of a GPU, while measuring. */
  power?: { limitW: number; medianW: number };
  /** Of the suite, or of those of its tests whose name contains `filter`. */
  tests: {
    passed: number;
    failed: number;
    skipped: number;
    /** Names of those that failed. */
    failures?: string[];
    filter?: string;
  };
  /** A copy from device memory to device memory, read and written bytes; absent without PyTorch. */
  copyTbs?: number;
  /** How much the same call's time differed between the beginning and the end of the run, as a share. */
  drift?: number;
  /** Versions of the programs that were measured beside ours. */
  peers?: Record<string, string | number>;
  rows: Row[];
  masks?: MaskRow[];
  latency?: LatencyRow[];
  accuracy: Accuracy[];
}

/** What tells a row from the others of its group, in words and in order. */
export function describe(row: Row): string {
  return [
    row.group,
    nameOf(row),
    row.architecture === undefined ? undefined : `as on sm_${row.architecture}`,
    row.operand,
    `D=${row.headDim}`,
    row.causal === undefined ? undefined : row.causal ? "causal" : "full",
    `B=${row.batch}`,
    `H=${row.heads}${row.kvHeads === row.heads ? "" : `/${row.kvHeads}`}`,
    `N=${row.queries === undefined ? "" : `${row.queries}×`}${row.tokens}`,
    row.dtype === "bf16" ? undefined : row.dtype,
    row.smooth ? "smoothed" : undefined,
    row.blockRows ? `mean of ${row.blockRows}` : undefined,
    row.endToEnd ? undefined : "kernel alone",
  ].filter((part) => part !== undefined).join(" ");
}

/** A kernel and its choices, as records name them. */
export type Named = Pick<Row, "kernel" | "accumulator" | "exp" | "smoothQ" | "band">;

/** In words: "sage1 f16", "sage2 fast". */
export function nameOf({ kernel, accumulator, exp, smoothQ, band }: Named): string {
  const choices = [smoothQ ? "smoothed Q" : undefined, band ? "band" : undefined];
  return [kernel, accumulator, exp, ...choices].filter((part) => part !== undefined).join(" ");
}

/** Floating-point operations of attention as the field counts them. */
export function flopOf(shape: Shape): number {
  const { batch, heads, tokens, queries = tokens, headDim, causal } = shape;
  return 4 * batch * heads * queries * tokens * headDim / (causal ? 2 : 1);
}

/** Bytes of keys and values in 16 bits: what decoding must read. */
export function cacheBytes({ batch, kvHeads, tokens, headDim }: Shape): number {
  return 2 * 2 * batch * kvHeads * tokens * headDim;
}

/** How fast a row is, in units that suit it. */
export function speedOf({ tflops, tbs }: Pick<Row, "tflops" | "tbs">): string {
  const unit = tbs === undefined ? "FLOP/s" : "B/s", value = tbs ?? tflops!;
  return value < 1
    ? `${(1000 * value).toPrecision(3)} G${unit}`
    : `${value.toPrecision(value < 1000 ? 3 : 4)} T${unit}`;
}
