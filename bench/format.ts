// What a file in bench/results/ holds.

/** A problem; key-value heads are as many as heads. */
export interface Shape {
  headDim: number;
  causal: boolean;
  batch: number;
  heads: number;
  tokens: number;
}

/** One measurement. */
export interface Row {
  group: "attention" | "decode" | "quantize" | "smooth";
  /** Ours by name; others' as "pytorch-fa2" and "cudnn"; quantizers as "i8 thread". */
  kernel: string;
  headDim: number;
  causal?: boolean;
  batch: number;
  heads: number;
  kvHeads: number;
  tokens: number;
  /** Of the tensors that come in. */
  dtype: string;
  /** From floating-point tensors to the output; else from quantized ones. */
  endToEnd: boolean;
  ms: number;
  /** 4 · batch · heads · tokens² · headDim, halved where causal, over time. */
  tflops?: number;
  /** Bytes that must move over time. */
  tbs?: number;
  /** Those bytes. */
  bytes?: number;
  /** Whether the kernel is another's, measured in the same run. */
  peer: boolean;
  /** sage1: what sums P·V within a tile. */
  accumulator?: "f32" | "f16";
  /** Which code ran. */
  implementation?: string;
  operand?: string;
  /** Whether the mean was taken and subtracted too. */
  smooth?: boolean;
  /** Rows of one mean; absent: all. */
  blockRows?: number;
}

/** How far a kernel was from float64 attention on the tensors of tests/data/. */
export interface Accuracy {
  file: string;
  kernel: string;
  accumulator?: "f32" | "f16";
  cosine: number;
  relativeL1: number;
  rmse: number;
}

/** A whole record. */
export interface Results {
  device: string;
  driver: string;
  date: string;
  /** SHA-256 of the sources in cuda/. */
  source: string;
  compilers: { host: string; cuda: string | null };
  /** Of the SMs, in MHz, while measuring; and the highest that the GPU has. */
  clocks: { sm: { min: number; median: number; max: number }; smHighest: number; memory: number };
  /** While measuring. */
  power: { limitW: number; medianW: number };
  tests: { passed: number; failed: number; skipped: number };
  /** A copy from device memory to device memory, read and written bytes; absent without PyTorch. */
  copyTbs?: number;
  peers?: { torch: string; cudnn: number };
  rows: Row[];
  accuracy: Accuracy[];
}
