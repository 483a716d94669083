// Tensors: four-dimensional arrays in a device's memory.
import { cannot, checkInteger, checkOneOf, checkOptions, show } from "./check.ts";
import type { Device } from "./device.ts";
import {
  arrayOf,
  checkArray,
  type DType,
  type DTypeArrays,
  dtypeBits,
  dtypes,
  type TensorData,
} from "./dtype.ts";
import { DisposedError } from "./errors.ts";
import { tensorBytes } from "./ffi.ts";
import type { Storage, Stream } from "./stream.ts";

/**
 * The order of a tensor's dimensions: `"HND"` is [batch, heads, tokens, channels], `"NHD"` is
 * [batch, tokens, heads, channels]. Shapes are given and shown in this order, and data lies in it.
 */
export type Layout = "HND" | "NHD";

/** The lengths of a tensor's four dimensions, in the order of its {@linkcode Layout}. */
export type Shape = readonly [number, number, number, number];

/** What a tensor is made of. */
export interface TensorOptions<D extends DType = DType> {
  /** Element type. Default: what the typed array holds; `"f32"` for an empty tensor. */
  dtype?: D;
  /** Order of the dimensions. Default: `"HND"`. */
  layout?: Layout;
}

/** Which part of a tensor a view shows: half-open ranges, everything where absent. */
export interface ViewRanges {
  /** Batch entries, from and to. */
  batch?: readonly [number, number];
  /** Heads, from and to. */
  heads?: readonly [number, number];
  /** Tokens, from and to. */
  tokens?: readonly [number, number];
}

/** A tensor's shape and place as the library takes it: in the order [batch, heads, tokens, channels]. */
export interface Geometry {
  dtype: DType;
  layout: Layout;
  shape: Shape;
  stride: Shape; // in elements
}

/** Between HND, in which the library thinks, and a layout; the permutation is its own inverse. */
export function permute(values: Shape, layout: Layout): Shape {
  return layout === "HND" ? values : [values[0], values[2], values[1], values[3]];
}

/** Channels that a row takes in memory: rows of i4 are whole bytes. */
function rowLength(channels: number, dtype: DType): number {
  return dtype === "i4" ? channels + channels % 2 : channels;
}

/** The geometry of a tensor without gaps; refuses shapes that cannot be. */
export function denseGeometry(
  action: string,
  name: string,
  shape: readonly number[],
  dtype: DType,
  layout: Layout,
): Geometry {
  checkOneOf(action, "dtype", dtype, dtypes);
  checkOneOf(action, "layout", layout, ["HND", "NHD"]);
  if (!Array.isArray(shape) || shape.length !== 4) {
    const must = layout === "HND"
      ? "have 4 dimensions, [batch, heads, tokens, channels]"
      : "have 4 dimensions, [batch, tokens, heads, channels]";
    throw new TypeError(cannot(action, name, must, shape));
  }
  shape.forEach((length, i) => checkInteger(action, `${name}[${i}]`, length, 1));
  const [a, b, c] = shape, d = rowLength(shape[3], dtype);
  if (BigInt(a) * BigInt(b) * BigInt(c) * BigInt(d) * BigInt(dtypeBits(dtype)) >= 2n ** 56n) {
    throw new RangeError(cannot(action, name, "hold less than 2^53 bytes", shape));
  }
  return {
    dtype,
    layout,
    shape: permute([a, b, c, shape[3]], layout),
    stride: permute([b * c * d, c * d, d, 1], layout),
  };
}

/** Bytes of a tensor without gaps. */
export function denseBytes({ dtype, shape }: Geometry): number {
  const [batch, heads, tokens, channels] = shape;
  return batch * heads * tokens * rowLength(channels, dtype) * dtypeBits(dtype) / 8;
}

// ---- tensors ------------------------------------------------------------------------------------------

/** The part of a tensor that is not public. */
interface Interior {
  storage: Storage;
  geometry: Geometry;
  bytes: Uint8Array<ArrayBuffer>; // a sage_tensor
}

/** The geometry and the sage_tensor of a live tensor, which must be of a stream where one is given. */
export let interiorOf: (action: string, name: string, tensor: Tensor, stream?: Stream) => Interior;

/** Makes a tensor that takes over one hold of `storage`. */
export let createTensor: <D extends DType>(
  device: Device,
  storage: Storage,
  byteOffset: number,
  geometry: Geometry,
) => Tensor<D>;

const finalization = new FinalizationRegistry<Storage>((storage) => storage.drop());

/**
 * A four-dimensional array in the memory of a {@linkcode Device}; see {@linkcode Device.tensor} and
 * {@linkcode Device.empty}.
 *
 * It owns its memory until it is disposed: declare it with `using`, or call {@linkcode Tensor.dispose}. A tensor
 * that is forgotten is freed when the garbage collector finds it, which may be much later. Disposing is legal as
 * soon as the last call that uses the tensor has returned, even while the device still works on it.
 *
 * @example
 * ```ts
 * import { Device } from "@sage/attention";
 * import { assertEquals } from "@std/assert";
 *
 * using device = Device.open("cpu");
 * using tensor = device.tensor(new Float32Array([1, 2, 3, 4, 5, 6]), [1, 1, 3, 2]);
 * using last = tensor.view({ tokens: [2, 3] });
 *
 * assertEquals(tensor.strides, [6, 6, 2, 1]);
 * assertEquals(await last.data(), new Float32Array([5, 6]));
 * ```
 */
export class Tensor<D extends DType = DType> {
  /** Where it lies. */
  readonly device: Device;
  /** Element type. */
  readonly dtype: D;
  /** Order of the dimensions. */
  readonly layout: Layout;
  /** Lengths of the dimensions, in the order of {@linkcode Tensor.layout}. */
  readonly shape: Shape;
  /** Elements from one index to the next, in the order of {@linkcode Tensor.layout}. */
  readonly strides: Shape;
  /** Bytes that {@linkcode Tensor.data} returns. */
  readonly byteLength: number;

  readonly #geometry: Geometry;
  readonly #byteOffset: number;
  readonly #bytes: Uint8Array<ArrayBuffer>;
  #storage: Storage | undefined;

  static {
    createTensor = (device, storage, byteOffset, geometry) =>
      new Tensor(device, storage, byteOffset, geometry);
    interiorOf = (action, name, tensor, stream) => {
      if (!(tensor instanceof Tensor)) {
        throw new TypeError(cannot(action, name, "be a Tensor", tensor));
      }
      const storage = tensor.#live();
      if (stream && storage.stream !== stream) {
        throw new TypeError(
          cannot(
            action,
            name,
            "belong to the same Device object as the other tensors",
            tensor.device.name,
          ),
        );
      }
      return { storage, geometry: tensor.#geometry, bytes: tensor.#bytes };
    };
  }

  private constructor(device: Device, storage: Storage, byteOffset: number, geometry: Geometry) {
    this.device = device;
    this.dtype = geometry.dtype as D;
    this.layout = geometry.layout;
    // Copies: every call reads the geometry's own, and frozen arrays are slow to read.
    this.shape = Object.freeze([...permute(geometry.shape, geometry.layout)] as const);
    this.strides = Object.freeze([...permute(geometry.stride, geometry.layout)] as const);
    this.byteLength = denseBytes(geometry);
    this.#geometry = geometry;
    this.#byteOffset = byteOffset;
    this.#bytes = tensorBytes(
      storage.address + BigInt(byteOffset),
      geometry.dtype,
      storage.stream.device,
      geometry.shape,
      geometry.stride,
    );
    this.#storage = storage;
    finalization.register(this, storage, this);
  }

  /** Whether it, or its device, was disposed. */
  get disposed(): boolean {
    return this.#storage === undefined || this.#storage.stream.closed;
  }

  #live(): Storage {
    const storage = this.#storage;
    if (storage === undefined) throw new DisposedError("Cannot use a tensor that was disposed.");
    if (storage.stream.closed) {
      throw new DisposedError("Cannot use a tensor whose device was disposed.");
    }
    return storage;
  }

  /**
   * Waits for the work that was enqueued so far, without blocking the event loop, and copies the elements to the
   * host. The tensor may be disposed in the meantime.
   *
   * @returns The elements in the order of {@linkcode Tensor.layout}, without gaps: a `Float32Array` for `"f32"`,
   * a `Float16Array` for `"f16"`, the bits of `"bf16"` in a `Uint16Array`, and codes as {@linkcode DType} says.
   * Rows of `"i4"` are padded to whole bytes.
   * @throws {DisposedError} Where the tensor was disposed before, or its device before the elements were there.
   */
  async data(): Promise<DTypeArrays[D]> {
    const storage = this.#live().share();
    try {
      await storage.stream.wait();
      const bytes = new Uint8Array(this.byteLength);
      const runs = this.#runs();
      if (runs.length === 1) {
        storage.read(this.#byteOffset, bytes);
      } else {
        const { offset, length } = runs[runs.length - 1];
        const span = new Uint8Array(offset + length);
        storage.read(this.#byteOffset, span);
        let at = 0;
        for (const { offset, length } of runs) {
          bytes.set(span.subarray(offset, offset + length), at);
          at += length;
        }
      }
      return new (arrayOf(this.dtype))(bytes.buffer) as DTypeArrays[D];
    } finally {
      storage.drop();
    }
  }

  /**
   * Replaces the elements, after the work that was enqueued so far.
   *
   * @param data The elements in the order of {@linkcode Tensor.layout}, as {@linkcode Tensor.data} returns them.
   * It may be changed or dropped on return. An array on a `SharedArrayBuffer` is copied first, as it stands.
   * @throws {TypeError} Where the array is of another kind or detached.
   * @throws {RangeError} Where it is too short or too long.
   */
  write(data: TensorData): void {
    const storage = this.#live();
    const bytes = hostBytes("write a tensor", data, this.dtype, this.byteLength);
    let at = 0;
    for (const { offset, length } of this.#runs()) {
      storage.write(this.#byteOffset + offset, bytes.subarray(at, at + length));
      at += length;
    }
  }

  /** Stretches of bytes without gaps, in the order of the layout. */
  #runs(): { offset: number; length: number }[] {
    const size = dtypeBits(this.dtype) / 8;
    const counts = this.shape.slice(0, 3);
    let length = rowLength(this.shape[3], this.dtype);
    while (counts.length && (counts.at(-1) === 1 || this.strides[counts.length - 1] === length)) {
      length *= counts.pop()!;
    }
    const offsets = counts.reduce(
      (offsets, count, i) =>
        offsets.flatMap((offset) =>
          Array.from({ length: count }, (_, index) => offset + index * this.strides[i])
        ),
      [0],
    );
    return offsets.map((offset) => ({ offset: offset * size, length: length * size }));
  }

  /**
   * A tensor that shows a part of this one, in the same memory: writing to either changes both. The memory is
   * freed when both are disposed.
   *
   * @param ranges Half-open ranges of batch entries, heads and tokens.
   * @returns A tensor of the same layout.
   * @throws {RangeError} Where a range is empty or reaches outside.
   */
  view(ranges: ViewRanges): Tensor<D> {
    const action = "view a tensor";
    const storage = this.#live();
    checkOptions(action, ranges, ["batch", "heads", "tokens"]);
    const { shape, stride } = this.#geometry;
    let offset = 0;
    const lengths = [ranges.batch, ranges.heads, ranges.tokens].map((range, i) => {
      const name = ["batch", "heads", "tokens"][i];
      if (range !== undefined && (!Array.isArray(range) || range.length !== 2)) {
        throw new TypeError(cannot(action, name, "be [from, to]", range));
      }
      const [from, to] = range ?? [0, shape[i]];
      checkInteger(action, `${name}[0]`, from, 0, shape[i] - 1);
      checkInteger(action, `${name}[1]`, to, from + 1, shape[i]);
      offset += from * stride[i];
      return to - from;
    });
    return new Tensor(
      this.device,
      storage.share(),
      this.#byteOffset + offset * dtypeBits(this.dtype) / 8,
      { ...this.#geometry, shape: [lengths[0], lengths[1], lengths[2], shape[3]] },
    );
  }

  /** Gives up the tensor; its memory is freed when the work that uses it is done. Again: nothing happens. */
  dispose(): void {
    const storage = this.#storage;
    if (storage === undefined) return;
    this.#storage = undefined;
    finalization.unregister(this);
    storage.drop();
  }

  /** The same as {@linkcode Tensor.dispose}, for `using`. */
  [Symbol.dispose](): void {
    this.dispose();
  }

  /** Shape, type and place in a few words. */
  toString(): string {
    return `Tensor ${this.dtype} ${show([...this.shape])} ${this.layout} on ${this.device.name}`;
  }
}

/** The bytes of an array that must hold a tensor's elements. */
export function hostBytes(
  action: string,
  data: TensorData,
  dtype: DType,
  byteLength: number,
): Uint8Array<ArrayBuffer> {
  checkArray(action, data, dtype);
  const { buffer } = data;
  if (buffer instanceof ArrayBuffer && buffer.detached) {
    throw new TypeError(cannot(action, "data", "not be detached", data));
  }
  if (data.byteLength !== byteLength) {
    const expected = byteLength / data.BYTES_PER_ELEMENT;
    throw new RangeError(
      cannot(action, "data.length", `be ${expected}, as the shape says`, data.length),
    );
  }
  return buffer instanceof ArrayBuffer
    ? new Uint8Array(buffer, data.byteOffset, byteLength)
    : new Uint8Array(data.slice().buffer as ArrayBuffer);
}

/** The dtype of an array whose kind leaves no doubt. */
export function dtypeOfArray(action: string, data: TensorData, dtype: DType | undefined): DType {
  if (dtype !== undefined) return dtype;
  if (data instanceof Float32Array) return "f32";
  if (data instanceof Float16Array) return "f16";
  if (data instanceof Int8Array) return "i8";
  if (data as unknown instanceof Uint16Array || data as unknown instanceof Uint8Array) {
    const choices = data as unknown instanceof Uint16Array
      ? `"bf16" or "f16"`
      : `"i4", "e4m3" or "bool"`;
    throw new TypeError(cannot(action, `dtype for ${show(data)}`, `be given as ${choices}`, dtype));
  }
  throw new TypeError(
    cannot(
      action,
      "data",
      "be a Float32Array, Float16Array, Uint16Array, Int8Array or Uint8Array",
      data,
    ),
  );
}
