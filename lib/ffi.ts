// The native library as TypeScript sees it: every C name, every struct offset, and the only Deno.dlopen.
import { LibraryNotFoundError } from "./errors.ts";
import type { DType } from "./dtype.ts";

// ---- functions ----------------------------------------------------------------------------------------

const error = ["buffer", "usize"] as const;

const functions = {
  sage_build_describe: { parameters: ["buffer", ...error], result: "i32" },
  sage_cuda_device_count: { parameters: ["buffer", ...error], result: "i32" },
  sage_device_describe: { parameters: ["i32", "buffer", ...error], result: "i32" },
  sage_stream_create_for: { parameters: ["i32", "i32", "buffer", ...error], result: "i32" },
  sage_stream_destroy: { parameters: ["u64", ...error], result: "i32" },
  sage_stream_synchronize: { parameters: ["u64", ...error], result: "i32" },
  // On another thread, and without buffers: ending a worker must not leave native code writing to its memory.
  sage_stream_wait: { parameters: ["u64"], result: "i32", nonblocking: true },
  sage_stream_query: { parameters: ["u64", "buffer", ...error], result: "i32" },
  sage_memory_allocate: { parameters: ["u64", "u64", "buffer", ...error], result: "i32" },
  sage_memory_free: { parameters: ["u64", "u64", ...error], result: "i32" },
  sage_memory_write: { parameters: ["u64", "u64", "buffer", "u64", ...error], result: "i32" },
  sage_memory_read: { parameters: ["u64", "buffer", "u64", "u64", ...error], result: "i32" },
  sage_memory_describe: { parameters: ["i32", "buffer", ...error], result: "i32" },
  sage_event_create: { parameters: ["u64", "buffer", ...error], result: "i32" },
  sage_event_record: { parameters: ["u64", "u64", ...error], result: "i32" },
  sage_event_elapsed: { parameters: ["u64", "u64", "buffer", ...error], result: "i32" },
  sage_event_destroy: { parameters: ["u64", ...error], result: "i32" },
  sage_stream_trace: { parameters: ["u64", "i32", ...error], result: "i32" },
  sage_stream_read_trace: {
    parameters: ["u64", "buffer", "u64", "buffer", ...error],
    result: "i32",
  },
  sage_smooth: { parameters: ["buffer", ...error], result: "i32" },
  sage_quantize: { parameters: ["buffer", ...error], result: "i32" },
  sage_dequantize: { parameters: ["buffer", ...error], result: "i32" },
  sage_attention: { parameters: ["buffer", ...error], result: "i32" },
  sage_attention_varlen: {
    parameters: ["buffer", "buffer", "buffer", "u64", ...error],
    result: "i32",
  },
  sage_attention_quantized: { parameters: ["buffer", ...error], result: "i32" },
  sage_flash_attention: { parameters: ["buffer", ...error], result: "i32" },
  sage_explain: { parameters: ["buffer", "buffer", ...error], result: "i32" },
} as const;

const version = { sage_abi_version: { parameters: [], result: "u32" } } as const;

/** The loaded library. */
export type NativeLibrary = Deno.DynamicLibrary<typeof functions>;

/** The functions of sage.h. */
export type NativeFunctions = NativeLibrary["symbols"];

/** Loads the library at a path; one of another ABI version is refused before anything else is called. */
export function open(path: string): NativeLibrary {
  checkWhole(path);
  const probe = dlopen(path, version);
  const found = probe.symbols.sage_abi_version();
  probe.close();
  if (found !== abiVersion) {
    throw new LibraryNotFoundError(
      "abi-mismatch",
      `Cannot use the library ${path} as its ABI version must be ${abiVersion}: current value is ${found}. ` +
        "Build the library and take this module from the same release.",
    );
  }
  return dlopen(path, functions);
}

/** Refuses an ELF file that was cut short, if it may be read: mapping it would kill the process. */
function checkWhole(path: string): void {
  if (Deno.permissions.querySync({ name: "read", path }).state !== "granted") return;
  let size: number;
  const view = new DataView(new ArrayBuffer(64));
  try {
    using file = Deno.openSync(path);
    size = file.statSync().size;
    if (file.readSync(new Uint8Array(view.buffer)) !== 64) return;
  } catch {
    return; // loading it says why
  }
  if (view.getUint32(0) !== 0x7f454c46) return;
  // Linkers put the section headers last: e_shoff + e_shentsize * e_shnum.
  const end = Number(view.getBigUint64(40, true)) +
    view.getUint16(58, true) * view.getUint16(60, true);
  if (size >= end) return;
  throw new LibraryNotFoundError(
    "library-unusable",
    `Cannot load the library ${path} as it must have ${end} bytes: current value is ${size}. ` +
      `Build it again with "deno task build".`,
  );
}

function dlopen<S extends Deno.ForeignLibraryInterface>(
  path: string,
  symbols: S,
): Deno.DynamicLibrary<S> {
  try {
    return Deno.dlopen(path, symbols);
  } catch (cause) {
    if (cause instanceof Deno.errors.NotCapable || !(cause instanceof Error)) throw cause;
    if (cause.message.includes(`${path}: cannot open shared object file: No such file`)) {
      throw new LibraryNotFoundError(
        "library-not-found",
        `Cannot find the library ${path}. Build it with "deno task build", or name another with the ` +
          "environment variable DENO_SAGE_PATH and --allow-env=DENO_SAGE_PATH.",
        { cause: cause.message },
      );
    }
    throw new LibraryNotFoundError(
      "library-unusable",
      `Cannot load the library ${path}: ${cause.message}. Build it again with "deno task build".`,
      { cause: cause.message },
    );
  }
}

// ---- constants ----------------------------------------------------------------------------------------

/** SAGE_ABI_VERSION */
export const abiVersion = 3;

/** The device number of the CPU. */
export const cpuDevice = -1;

/** sage_status */
export const status = {
  ok: 0,
  invalidArgument: 1,
  unsupported: 2,
  outOfMemory: 3,
  noDevice: 4,
  deviceError: 5,
  internal: 6,
} as const;

/** sage_tensor.dtype */
export const dtypeNumbers: Record<DType, number> = {
  f32: 0,
  f16: 1,
  bf16: 2,
  i8: 3,
  i4: 4,
  e4m3: 5,
  bool: 6,
};

/** Kernels by their public name. */
export const kernelNumbers = {
  "auto": 0,
  "flash": 1,
  "sage1": 2,
  "sage1-int8": 3,
  "sage2": 4,
  "sage2-int4": 5,
  "sage2++": 6,
  "sage-int8": 7,
} as const;

/** Granularities by their public name; 0 is the default. */
export const granularityNumbers = { token: 1, block: 2, warp: 3, thread: 4, channel: 5 } as const;

/** sage_quantize_call.operand */
export const operandNumbers = { query: 0, key: 1, value: 2 } as const;

/** Accumulators of P.V; 0 is the default. */
export const accumulatorNumbers = { f32: 1, f16: 2 } as const;

/** Exponentials of kernel sage2; 0 is the default. */
export const exponentialNumbers = { exact: 1, fast: 2 } as const;

/** What P is narrowed to; 0 is the default. */
export const rangeNumbers = { 448: 1, 224: 2, 112: 3 } as const;

/** Where the diagonal lies. */
export const alignmentNumbers = { "bottom-right": 0, "top-left": 1 } as const;

/** Smoothing switches: default, off, on. */
export function switchNumber(value: boolean | undefined): number {
  return value === undefined ? 0 : value ? 2 : 1;
}

// ---- structs: byte offsets ----------------------------------------------------------------------------

/** sage_tensor */
export const tensorStruct = {
  data: 0,
  dtype: 8,
  device: 12,
  shape: 16,
  stride: 48,
  size: 80,
} as const;

/** sage_build_info */
export const buildInfoStruct = {
  abiVersion: 4,
  cudaVersion: 8,
  debug: 12,
  version: 16,
  architectures: 48,
  sourceHash: 176,
  size: 248,
} as const;

/** sage_device_info */
export const deviceInfoStruct = {
  device: 4,
  computeCapability: 8,
  multiprocessors: 12,
  clockKhz: 16,
  driverVersion: 20,
  memoryBytes: 24,
  freeBytes: 32,
  name: 40,
  features: 168,
  size: 296,
} as const;

/** sage_memory_stats */
export const memoryStatsStruct = {
  streams: 4,
  allocations: 8,
  bytes: 16,
  peakBytes: 24,
  size: 32,
} as const;

/** sage_smooth_call */
export const smoothStruct = {
  blockRows: 4,
  stream: 8,
  x: 16,
  mean: 96,
  smoothed: 176,
  size: 256,
} as const;

/** sage_quantize_call */
export const quantizeStruct = {
  granularity: 4,
  stream: 8,
  operand: 16,
  groupRows: 20,
  meanRows: 24,
  range: 28,
  takesMean: 32,
  x: 40,
  mean: 120,
  codes: 200,
  scales: 280,
  size: 360,
} as const;

/** sage_attention_options */
export const optionsStruct = {
  kernel: 0,
  causal: 4,
  scale: 8,
  granularity: 12,
  smoothQ: 16,
  smoothK: 20,
  smoothV: 24,
  pvAccumulator: 28,
  pvRange: 32,
  exponential: 36,
  alignment: 40,
  windowed: 44,
  windowBefore: 48,
  windowAfter: 56,
  softcap: 64,
  rotate: 68,
  band: 72,
  firstToken: 76,
  kMeanRows: 80,
  size: 88,
} as const;

/** sage_attention_call */
export const attentionStruct = {
  stream: 8,
  options: 16,
  q: 104,
  k: 184,
  v: 264,
  o: 344,
  lse: 424,
  mask: 504,
  sinks: 584,
  alibi: 664,
  size: 744,
} as const;

/** sage_attention_quantized_call */
export const attentionQuantizedStruct = {
  stream: 8,
  options: 16,
  qGroupRows: 104,
  kGroupRows: 108,
  qMeanRows: 112,
  q: 120,
  qScales: 200,
  qMean: 280,
  k: 360,
  kScales: 440,
  kMean: 520,
  v: 600,
  vScales: 680,
  vMean: 760,
  o: 840,
  lse: 920,
  size: 1000,
} as const;

/** sage_plan */
export const planStruct = {
  kernel: 4,
  architecture: 8,
  granularity: 12,
  smoothQ: 16,
  smoothK: 20,
  smoothV: 24,
  pvAccumulator: 28,
  pvRange: 32,
  blockQ: 36,
  blockK: 40,
  paddedHeadDim: 44,
  workspaceBytes: 48,
  implementation: 56,
  reason: 120,
  exponential: 376,
  rotate: 380,
  band: 384,
  firstToken: 388,
  kMeanRows: 392,
  size: 400,
} as const;

/** sage_stage */
export const stageStruct = { name: 0, ms: 32, size: 36 } as const;

// ---- reading and writing structs ----------------------------------------------------------------------

/** A struct's memory, made once and used for every call: calls are synchronous. */
export class Struct {
  /** What is passed to the library. */
  readonly bytes: Uint8Array<ArrayBuffer>;
  /** The same memory, field by field. */
  readonly view: DataView<ArrayBuffer>;

  /** @param size sizeof the struct. */
  constructor(size: number) {
    this.bytes = new Uint8Array(size);
    this.view = new DataView(this.bytes.buffer);
  }

  /** Zeroes, with the leading `size` field set. */
  reset(): this {
    this.bytes.fill(0);
    this.view.setUint32(0, this.bytes.length, true);
    return this;
  }

  /** Writes an i32 or u32. */
  setInt(offset: number, value: number): void {
    this.view.setUint32(offset, value, true);
  }

  /** Writes an i64. */
  setLong(offset: number, value: number): void {
    this.view.setBigInt64(offset, BigInt(value), true);
  }

  /** Writes a float. */
  setFloat(offset: number, value: number): void {
    this.view.setFloat32(offset, value, true);
  }

  /** Writes a u64 handle or address. */
  setHandle(offset: number, value: bigint): void {
    this.view.setBigUint64(offset, value, true);
  }

  /** Copies a nested struct, such as a sage_tensor. */
  setStruct(offset: number, bytes: Uint8Array): void {
    this.bytes.set(bytes, offset);
  }

  /** Reads an i32. */
  int(offset: number): number {
    return this.view.getInt32(offset, true);
  }

  /** Reads a float. */
  float(offset: number): number {
    return this.view.getFloat32(offset, true);
  }

  /** Reads a u64 handle or address. */
  handle(offset: number): bigint {
    return this.view.getBigUint64(offset, true);
  }

  /** Reads a u64 count. */
  count(offset: number): number {
    return Number(this.view.getBigUint64(offset, true));
  }

  /** Reads a NUL-terminated text that starts at an offset. */
  text(offset: number): string {
    const end = this.bytes.indexOf(0, offset);
    return new TextDecoder().decode(this.bytes.subarray(offset, end < 0 ? undefined : end));
  }
}

/** A sage_tensor; shape and strides are those of [batch, heads, tokens, channels]. */
export function tensorBytes(
  address: bigint,
  dtype: DType,
  device: number,
  shape: readonly number[],
  stride: readonly number[],
): Uint8Array<ArrayBuffer> {
  const { bytes, view } = new Struct(tensorStruct.size);
  view.setBigUint64(tensorStruct.data, address, true);
  view.setInt32(tensorStruct.dtype, dtypeNumbers[dtype], true);
  view.setInt32(tensorStruct.device, device, true);
  for (let i = 0; i < 4; ++i) {
    view.setBigInt64(tensorStruct.shape + 8 * i, BigInt(shape[i]), true);
    view.setBigInt64(tensorStruct.stride + 8 * i, BigInt(stride[i]), true);
  }
  return bytes;
}
