// Devices: the CPU and each CUDA device, every one with its own queue of work.
import { cannot, checkInteger, checkOptions } from "./check.ts";
import type { DType, TensorData } from "./dtype.ts";
import { NoDeviceError } from "./errors.ts";
import {
  cpuDevice,
  deviceInfoStruct,
  memoryStatsStruct,
  type NativeFunctions,
  Struct,
} from "./ffi.ts";
import { acquire, cudaVersion, errorBytes, errorSize, release, unwrap } from "./library.ts";
import { Stream } from "./stream.ts";
import {
  createTensor,
  denseBytes,
  denseGeometry,
  dtypeOfArray,
  hostBytes,
  type Tensor,
  type TensorOptions,
} from "./tensor.ts";

/** The kinds of device. */
export type DeviceKind = "cpu" | "cuda";

/** Options of {@linkcode Device.open}. */
export interface DeviceOptions {
  /**
   * Uses the attention kernels that GPUs of an older compute capability get, to prove and measure them here: `80`;
   * `89`, where the GPU is as new and the library holds code for it (FP8 products; Hopper and Blackwell's `100`
   * emulate them). Default: the device's own. A CUDA device is needed.
   */
  architecture?: number;
}

/** What a device is. */
export interface DeviceInfo {
  /** What {@linkcode Device.open} takes: `"cpu"` or `"cuda:0"`. */
  device: string;
  /** The product's name. */
  name: string;
  /** Kind of device. */
  kind: DeviceKind;
  /** CUDA ordinal; 0 for the CPU. */
  index: number;
  /** CUDA compute capability, such as `"9.0"`; empty for the CPU. */
  computeCapability: string;
  /** Streaming multiprocessors, or threads of the CPU. */
  multiprocessors: number;
  /** Highest clock in MHz; 0 where unknown. */
  clockMhz: number;
  /** CUDA version that the driver supports, such as `"13.0"`; empty for the CPU. */
  driverVersion: string;
  /** Bytes of memory. */
  memoryBytes: number;
  /** Bytes of memory that nobody uses now. */
  freeBytes: number;
  /** Instruction sets in use, such as `"sm_90a"` or `"avx512 vnni"`. */
  features: string;
}

/** A part of a call, such as `"quantize"` or `"attention"`, and how long it took on the device. */
export interface Stage {
  /** What it does. */
  name: string;
  /** Milliseconds. */
  ms: number;
}

/** What all programs' parts in this process, workers included, hold on a device. */
export interface MemoryStats {
  /** Open devices of this name. */
  streams: number;
  /** Live allocations: tensors, less those that share memory. */
  allocations: number;
  /** Bytes of them. */
  bytes: number;
  /** The most bytes there ever were. */
  peakBytes: number;
}

/** The stream of a live device. */
export let streamOf: (action: string, name: string, device: Device) => Stream;

const finalization = new FinalizationRegistry<Stream>((stream) => stream.close());

/**
 * A CUDA device or the CPU, with a queue of work of its own.
 *
 * Calls on its tensors are enqueued in order and return at once; `await tensor.data()` or
 * {@linkcode Device.synchronize} waits. Tensors belong to the `Device` object that made them. Any number of devices
 * may be open at once, in any number of workers.
 *
 * Disposing a device waits for its work and frees its tensors.
 *
 * @example
 * ```ts
 * import { attention, Device } from "@sage/attention";
 * import { assertEquals } from "@std/assert";
 *
 * using device = Device.open(); // cuda:0 where there is one, else cpu
 * using q = device.tensor(new Float32Array([1, 0, 0, 1]), [1, 1, 2, 2]);
 * using k = device.tensor(new Float32Array([1, 2, 3, 4]), [1, 1, 2, 2]);
 * using v = device.tensor(new Float32Array([5, 5, 5, 5]), [1, 1, 2, 2]);
 * using o = attention(q, k, v, { kernel: device.kind === "cpu" ? "flash" : "auto" });
 *
 * assertEquals(o.shape, [1, 1, 2, 2]);
 * ```
 */
export class Device {
  /** `"cpu"`, `"cuda:0"`, `"cuda:1"` and so on. */
  readonly name: string;
  /** Kind of device. */
  readonly kind: DeviceKind;
  /** CUDA ordinal; 0 for the CPU. */
  readonly index: number;
  readonly #stream: Stream;

  static {
    streamOf = (action, name, device) => {
      if (!(device instanceof Device)) {
        throw new TypeError(cannot(action, name, "be a Device", device));
      }
      void device.#stream.handle; // throws where it was disposed
      return device.#stream;
    };
  }

  private constructor(number: number, architecture: number | undefined) {
    if (number === cpuDevice && architecture !== undefined) {
      throw new RangeError(
        cannot("open a device", "architecture", "be absent on the CPU", architecture),
      );
    }
    this.name = deviceName(number);
    this.kind = number === cpuDevice ? "cpu" : "cuda";
    this.index = Math.max(0, number);
    this.#stream = new Stream(number, architecture ?? 0);
    finalization.register(this, this.#stream, this);
  }

  /**
   * Opens a device.
   *
   * @param name `"cpu"`; `"cuda:N"`; `"cuda"` for `"cuda:0"`; or `"auto"`, the default: `"cuda:0"` where there is a
   * usable one, else `"cpu"`. To learn why there is none, open `"cuda"`: the error says it.
   * @param options Whose kernels it uses.
   * @returns The device; declare it with `using`.
   * @throws {NoDeviceError} Where there is no such device, no driver, or a driver that is too old.
   * @throws {LibraryNotFoundError} Where the native library is missing or does not fit.
   * @throws {UnsupportedError} Where the device cannot run the kernels of the architecture; says which it can.
   * @throws {TypeError | RangeError} Where the name is none of those above, or an option is unknown or out of range.
   *
   * @example
   * ```ts
   * import { Device, explain } from "@sage/attention";
   * import { assertEquals } from "@std/assert";
   *
   * using device = Device.open();
   * if (device.kind === "cuda") { // as on an A100
   *   using older = Device.open(`cuda:${device.index}`, { architecture: 80 });
   *   const q = { shape: [1, 8, 4096, 128], dtype: "f16" } as const;
   *   assertEquals(explain(q, q, q, { kernel: "sage2", device: older }).architecture, "sm_80");
   * }
   * ```
   */
  static open(
    name: "auto" | "cpu" | "cuda" | `cuda:${number}` = "auto",
    options: DeviceOptions = {},
  ): Device {
    const action = "open a device", must = `be "auto", "cpu", "cuda" or "cuda:N"`;
    checkOptions(action, options, ["architecture"]);
    const { architecture } = options;
    if (architecture !== undefined) {
      checkInteger(action, "architecture", architecture, 1, 999);
    }
    if (typeof name !== "string") throw new TypeError(cannot(action, "name", must, name));
    const [, kind, index] = /^(auto|cpu|cuda)(?:(?<=cuda):(\d{1,9}))?$/.exec(name) ?? [];
    if (!kind) throw new RangeError(cannot(action, "name", must, name));
    if (kind === "cuda") return new Device(Number(index ?? 0), architecture);
    const native = acquire();
    try {
      const number = kind === "auto" && cudaDeviceCount(native) > 0 ? 0 : cpuDevice;
      return new Device(number, architecture);
    } finally {
      release();
    }
  }

  /**
   * Describes every device that can be opened.
   *
   * @returns The CPU first, then CUDA devices in order.
   * @throws {LibraryNotFoundError} Where the native library is missing or does not fit.
   *
   * @example
   * ```ts
   * import { Device } from "@sage/attention";
   * import { assertEquals } from "@std/assert";
   *
   * assertEquals(Device.list()[0].device, "cpu");
   * ```
   */
  static list(): DeviceInfo[] {
    const native = acquire();
    try {
      return Array.from(
        { length: 1 + cudaDeviceCount(native) },
        (_, i) => describe(native, i + cpuDevice),
      );
    } finally {
      release();
    }
  }

  /** What the device is, and how much of its memory is free now. */
  get info(): DeviceInfo {
    return describe(this.#stream.native, this.#stream.device);
  }

  /** Whether it was disposed. */
  get disposed(): boolean {
    return this.#stream.closed;
  }

  /**
   * Counts the memory in use.
   *
   * @returns Counts over the whole process.
   */
  memory(): MemoryStats {
    const stats = new Struct(memoryStatsStruct.size).reset();
    const { native, device } = this.#stream;
    unwrap(native.sage_memory_describe(device, stats.bytes, errorBytes, errorSize));
    return {
      streams: stats.int(memoryStatsStruct.streams),
      allocations: stats.count(memoryStatsStruct.allocations),
      bytes: stats.count(memoryStatsStruct.bytes),
      peakBytes: stats.count(memoryStatsStruct.peakBytes),
    };
  }

  /**
   * Waits for all work that was enqueued so far, without blocking the event loop for more than a moment (50 µs, in
   * which small calls end).
   *
   * @throws {SageError} Where the device failed in the meantime.
   */
  async synchronize(): Promise<void> {
    await this.#stream.wait();
  }

  /**
   * Measures, on the device, how long work takes.
   *
   * @param work Enqueues it; may be asynchronous.
   * @returns Milliseconds from before the first of it to after the last.
   *
   * @example
   * ```ts
   * import { attention, Device } from "@sage/attention";
   * import { assert } from "@std/assert";
   *
   * using device = Device.open("cpu");
   * using x = device.tensor(new Float32Array(64 * 16), [1, 1, 64, 16]);
   * const milliseconds = await device.time(() => attention(x, x, x).dispose());
   * assert(milliseconds >= 0);
   * ```
   */
  async time(work: () => unknown): Promise<number> {
    if (typeof work !== "function") {
      throw new TypeError(cannot("time work", "work", "be a function", work));
    }
    return await this.#stream.time(work);
  }

  /**
   * Learns where the time of calls goes: how long each of their stages took on the device.
   *
   * Timing each stage takes a little time itself; {@linkcode Device.time} measures a whole without it.
   *
   * @param work Makes the calls; may be asynchronous.
   * @returns The stages of all calls meanwhile, in order.
   * @throws {SageError} Where another trace of this device is under way.
   *
   * @example
   * ```ts
   * import { attention, Device } from "@sage/attention";
   * import { assertEquals } from "@std/assert";
   *
   * using device = Device.open("cpu");
   * using x = device.tensor(new Float32Array(64 * 16), [1, 1, 64, 16]);
   * const stages = await device.trace(() => attention(x, x, x, { kernel: "sage2" }).dispose());
   *
   * assertEquals(stages.map((stage) => stage.name), ["mean", "quantize", "pack", "attention"]);
   * ```
   */
  async trace(work: () => unknown): Promise<Stage[]> {
    if (typeof work !== "function") {
      throw new TypeError(cannot("trace work", "work", "be a function", work));
    }
    return await this.#stream.trace(work);
  }

  /**
   * Copies an array to the device.
   *
   * @param data The elements, in the order of the layout. It may be changed or dropped on return; an array on a
   * `SharedArrayBuffer` is copied first, as it stands. A `Uint16Array` needs `dtype: "bf16"` (or `"f16"`, as bits),
   * a `Uint8Array` `"i4"`, `"e4m3"` or `"bool"`; other arrays say it themselves.
   * @param shape Lengths of the dimensions: [batch, heads, tokens, channels], or with layout `"NHD"`
   * [batch, tokens, heads, channels].
   * @param options Element type and layout.
   * @returns The tensor; declare it with `using`.
   * @throws {OutOfMemoryError} Where the device has too little memory left.
   * @throws {TypeError | RangeError} Where array, shape and element type do not fit.
   */
  tensor(
    data: Float32Array,
    shape: readonly number[],
    options?: TensorOptions<"f32">,
  ): Tensor<"f32">;
  /** From half precision. */
  tensor(
    data: Float16Array,
    shape: readonly number[],
    options?: TensorOptions<"f16">,
  ): Tensor<"f16">;
  /** From the bits of bfloat16 or half precision. */
  tensor<D extends "bf16" | "f16">(
    data: Uint16Array,
    shape: readonly number[],
    options: TensorOptions<D> & { dtype: D },
  ): Tensor<D>;
  /** From INT8 codes. */
  tensor(data: Int8Array, shape: readonly number[], options?: TensorOptions<"i8">): Tensor<"i8">;
  /** From INT4 or FP8 codes, or the truths of a mask. */
  tensor<D extends "i4" | "e4m3" | "bool">(
    data: Uint8Array,
    shape: readonly number[],
    options: TensorOptions<D> & { dtype: D },
  ): Tensor<D>;
  /** From an array whose kind is only known at run time. */
  tensor(data: TensorData, shape: readonly number[], options?: TensorOptions): Tensor;
  tensor(data: TensorData, shape: readonly number[], options: TensorOptions = {}): Tensor {
    const action = "make a tensor";
    checkOptions(action, options, ["dtype", "layout"]);
    const { layout = "HND" } = options;
    const dtype = dtypeOfArray(action, data, options.dtype);
    const geometry = denseGeometry(action, "shape", shape, dtype, layout);
    const bytes = hostBytes(action, data, dtype, denseBytes(geometry));
    const storage = this.#stream.allocate(bytes.length);
    try {
      storage.write(0, bytes);
    } catch (error) {
      storage.drop();
      throw error;
    }
    return createTensor(this, storage, 0, geometry);
  }

  /**
   * Takes memory for a tensor whose elements are not set.
   *
   * @param shape Lengths of the dimensions, in the order of the layout.
   * @param options Element type, by default `"f32"`, and layout.
   * @returns The tensor; declare it with `using`.
   * @throws {OutOfMemoryError} Where the device has too little memory left.
   *
   * @example
   * ```ts
   * import { Device } from "@sage/attention";
   * import { assertEquals } from "@std/assert";
   *
   * using device = Device.open("cpu");
   * using tensor = device.empty([1, 8, 128, 64], { dtype: "bf16" });
   * assertEquals(tensor.byteLength, 131072);
   * ```
   */
  empty<D extends DType = "f32">(
    shape: readonly number[],
    options: TensorOptions<D> = {},
  ): Tensor<D> {
    const action = "make a tensor";
    checkOptions(action, options, ["dtype", "layout"]);
    const { dtype = "f32", layout = "HND" } = options;
    const geometry = denseGeometry(action, "shape", shape, dtype, layout);
    return createTensor(this, this.#stream.allocate(denseBytes(geometry)), 0, geometry);
  }

  /** Waits for the device's work, frees its tensors and closes it. Again: nothing happens. */
  dispose(): void {
    finalization.unregister(this);
    this.#stream.close();
  }

  /** The same as {@linkcode Device.dispose}, for `using`. */
  [Symbol.dispose](): void {
    this.dispose();
  }

  /** Its name. */
  toString(): string {
    return this.name;
  }
}

function deviceName(number: number): string {
  return number === cpuDevice ? "cpu" : `cuda:${number}`;
}

/** CUDA devices that can be used: none where there is no driver for them. */
function cudaDeviceCount(native: NativeFunctions): number {
  const count = new Struct(4);
  try {
    unwrap(native.sage_cuda_device_count(count.bytes, errorBytes, errorSize));
  } catch (error) {
    if (error instanceof NoDeviceError) return 0;
    throw error;
  }
  return count.int(0);
}

function describe(native: NativeFunctions, number: number): DeviceInfo {
  const info = new Struct(deviceInfoStruct.size).reset();
  unwrap(native.sage_device_describe(number, info.bytes, errorBytes, errorSize));
  const capability = info.int(deviceInfoStruct.computeCapability);
  return {
    device: deviceName(number),
    name: info.text(deviceInfoStruct.name),
    kind: number === cpuDevice ? "cpu" : "cuda",
    index: Math.max(0, number),
    computeCapability: capability === 0 ? "" : `${Math.floor(capability / 10)}.${capability % 10}`,
    multiprocessors: info.int(deviceInfoStruct.multiprocessors),
    clockMhz: info.int(deviceInfoStruct.clockKhz) / 1000,
    driverVersion: cudaVersion(info.int(deviceInfoStruct.driverVersion)),
    memoryBytes: info.count(deviceInfoStruct.memoryBytes),
    freeBytes: info.count(deviceInfoStruct.freeBytes),
    features: info.text(deviceInfoStruct.features),
  };
}
