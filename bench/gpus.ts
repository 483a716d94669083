// GPUs by their makers' datasheets, and how fast attention could be if their units were never idle.

/** A GPU by its datasheet: products without sparsity. */
export interface Gpu {
  name: string;
  /** What the driver calls it. */
  driverName: RegExp;
  /** Streaming multiprocessors. */
  multiprocessors: number;
  /** Boost clock that the peaks are given for. */
  clockMHz: number;
  /** TFLOP/s of products in FP16 and BF16 with FP32 sums. */
  f16: number;
  /** TOP/s of products in INT8. */
  i8: number;
  /** TFLOP/s of products in FP8 with FP32 sums; absent where there are none. */
  e4m3?: number;
  /** TB/s of device memory. */
  memoryTbs: number;
}

/** exp2 instructions that a multiprocessor starts a clock, on all these. */
const exponentialsPerClock = 16;

/** Every GPU that predictions are made for. */
export const gpus: readonly Gpu[] = [
  {
    name: "A100 SXM 80 GB",
    driverName: /A100-SXM4-80GB/,
    multiprocessors: 108,
    clockMHz: 1410,
    f16: 312,
    i8: 624,
    memoryTbs: 2.04,
  },
  {
    name: "RTX 4090",
    driverName: /RTX 4090$/,
    multiprocessors: 128,
    clockMHz: 2520,
    f16: 165,
    i8: 661,
    e4m3: 330,
    memoryTbs: 1.01,
  },
  {
    name: "L40S",
    driverName: /L40S/,
    multiprocessors: 142,
    clockMHz: 2520,
    f16: 362,
    i8: 733,
    e4m3: 733,
    memoryTbs: 0.864,
  },
  {
    name: "H100 SXM",
    driverName: /H100 80GB HBM3/,
    multiprocessors: 132,
    clockMHz: 1830,
    f16: 989,
    i8: 1979,
    e4m3: 1979,
    memoryTbs: 3.35,
  },
  {
    name: "H200",
    driverName: /H200$/,
    multiprocessors: 132,
    clockMHz: 1830,
    f16: 989,
    i8: 1979,
    e4m3: 1979,
    memoryTbs: 4.8,
  },
  {
    name: "B200",
    driverName: /\bB200/,
    multiprocessors: 148,
    clockMHz: 1856,
    f16: 2250,
    i8: 4500,
    e4m3: 4500,
    memoryTbs: 8,
  },
];

/** The datasheet of a device by the name that its driver gives. */
export function gpuOf(device: string): Gpu | undefined {
  return gpus.find(({ driverName }) => driverName.test(device));
}

/** What limits attention. */
export interface Ceiling {
  tflops: number;
  unit: "tensor cores" | "exponentials";
}

/** In which precision a kernel multiplies: Q·K and P·V. */
export type Precision = "f16" | "i8 f16" | "i8 e4m3";

/** Which precision a kernel has; undefined for those of which it is not known. */
export function precisionOf(kernel: string): Precision | undefined {
  if (kernel.startsWith("sage1") && kernel !== "sage1-int8") return "i8 f16";
  if (kernel.startsWith("sage2") || kernel === "sageattention") return "i8 e4m3";
  return kernel === "flash" || kernel === "pytorch-fa2" || kernel === "cudnn" || kernel === "fa3"
    ? "f16"
    : undefined;
}

/**
 * What attention could reach if the busiest unit never waited: half of its operations are Q·K, half P·V, and every
 * score takes one exponential unless `exponentials` is false. Undefined where the GPU lacks the products.
 */
export function ceiling(
  gpu: Gpu,
  precision: Precision,
  headDim: number,
  exponentials = true,
): Ceiling | undefined {
  const { f16, i8, e4m3, multiprocessors, clockMHz } = gpu;
  const halves = precision === "f16" ? [f16, f16] : precision === "i8 f16" ? [i8, f16] : [i8, e4m3];
  const [first, second] = halves;
  if (first === undefined || second === undefined) return;
  const tensor = 2 * first * second / (first + second);
  const scores = exponentialsPerClock * multiprocessors * clockMHz / 1e6; // millions of millions a second
  const exponential = 4 * headDim * scores;
  return exponentials && exponential < tensor
    ? { tflops: exponential, unit: "exponentials" }
    : { tflops: tensor, unit: "tensor cores" };
}
