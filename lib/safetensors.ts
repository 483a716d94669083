// The safetensors format, in which real tensors come: 8 bytes of header length, a JSON header, then the data.
import { cannot, checkInteger, checkOneOf, list, show } from "./check.ts";

/** The typed array that holds each element type of a safetensors file. */
export interface SafetensorsArrays {
  /** `F64` */
  f64: Float64Array<ArrayBuffer>;
  /** `F32` */
  f32: Float32Array<ArrayBuffer>;
  /** `F16` */
  f16: Float16Array<ArrayBuffer>;
  /** `BF16`, as bits */
  bf16: Uint16Array<ArrayBuffer>;
  /** `F8_E4M3`, as bits */
  e4m3: Uint8Array<ArrayBuffer>;
  /** `F8_E5M2`, as bits */
  e5m2: Uint8Array<ArrayBuffer>;
  /** `I64` */
  i64: BigInt64Array<ArrayBuffer>;
  /** `I32` */
  i32: Int32Array<ArrayBuffer>;
  /** `I16` */
  i16: Int16Array<ArrayBuffer>;
  /** `I8` */
  i8: Int8Array<ArrayBuffer>;
  /** `U64` */
  u64: BigUint64Array<ArrayBuffer>;
  /** `U32` */
  u32: Uint32Array<ArrayBuffer>;
  /** `U16` */
  u16: Uint16Array<ArrayBuffer>;
  /** `U8` */
  u8: Uint8Array<ArrayBuffer>;
  /** `BOOL`, a byte each */
  bool: Uint8Array<ArrayBuffer>;
}

/** The element types of safetensors files; those of {@linkcode DType} have the same names. */
export type SafetensorsDType = keyof SafetensorsArrays;

/** A tensor of a safetensors file. */
export interface SafetensorsEntry<D extends SafetensorsDType = SafetensorsDType> {
  /** Element type. */
  dtype: D;
  /** Lengths of the dimensions; any number of them. */
  shape: readonly number[];
  /** The elements, the last dimension fastest. */
  data: SafetensorsArrays[D];
}

const types: Record<
  SafetensorsDType,
  {
    name: string;
    array: new (
      buffer: ArrayBuffer,
      offset: number,
      length: number,
    ) => SafetensorsArrays[SafetensorsDType];
  }
> = {
  f64: { name: "F64", array: Float64Array },
  f32: { name: "F32", array: Float32Array },
  f16: { name: "F16", array: Float16Array },
  bf16: { name: "BF16", array: Uint16Array },
  e4m3: { name: "F8_E4M3", array: Uint8Array },
  e5m2: { name: "F8_E5M2", array: Uint8Array },
  i64: { name: "I64", array: BigInt64Array },
  i32: { name: "I32", array: Int32Array },
  i16: { name: "I16", array: Int16Array },
  i8: { name: "I8", array: Int8Array },
  u64: { name: "U64", array: BigUint64Array },
  u32: { name: "U32", array: Uint32Array },
  u16: { name: "U16", array: Uint16Array },
  u8: { name: "U8", array: Uint8Array },
  bool: { name: "BOOL", array: Uint8Array },
};

const dtypes = Object.keys(types) as readonly SafetensorsDType[];

/** Bytes of one element. */
function elementBytes(dtype: SafetensorsDType): number {
  return (types[dtype].array as unknown as { BYTES_PER_ELEMENT: number }).BYTES_PER_ELEMENT;
}

/** The most bytes that a header may have, as in the reference implementation. */
const longestHeader = 100_000_000;

// ---- reading ------------------------------------------------------------------------------------------

const parsing = "parse safetensors";

/** The contents of a safetensors file. */
export class Safetensors {
  /** Every tensor by its name. */
  readonly tensors: ReadonlyMap<string, SafetensorsEntry>;
  /** The file's own notes. */
  readonly metadata: Readonly<Record<string, string>>;

  /**
   * Puts the contents together.
   *
   * @param tensors Every tensor by its name.
   * @param metadata The file's own notes.
   */
  constructor(
    tensors: ReadonlyMap<string, SafetensorsEntry>,
    metadata: Readonly<Record<string, string>>,
  ) {
    this.tensors = tensors;
    this.metadata = metadata;
  }

  /**
   * Takes one tensor, knowing its element type.
   *
   * @param name Its name.
   * @param dtype What it must be.
   * @returns Shape and elements.
   * @throws {RangeError} Where there is no such tensor, or it is of another type.
   */
  get<D extends SafetensorsDType>(name: string, dtype: D): SafetensorsEntry<D> {
    const action = "get a tensor";
    const entry = this.tensors.get(name);
    if (!entry) {
      throw new RangeError(
        cannot(action, "name", `be one of ${list([...this.tensors.keys()])}`, name),
      );
    }
    if (entry.dtype !== dtype) {
      throw new RangeError(
        cannot(action, `dtype of ${show(name)}`, `be ${show(entry.dtype)}`, dtype),
      );
    }
    return entry as SafetensorsEntry<D>;
  }
}

/**
 * Reads a safetensors file.
 *
 * @param bytes The whole file. Tensors share its memory where they are aligned to their element size.
 * @returns Its tensors and notes.
 * @throws {RangeError} Where the file is cut off or contradicts itself; the message says how.
 * @throws {TypeError} Where `bytes` is no `Uint8Array` on an `ArrayBuffer`.
 *
 * @example
 * ```ts
 * import { parseSafetensors, serializeSafetensors } from "@sage/attention";
 * import { assertEquals } from "@std/assert";
 *
 * const file = serializeSafetensors({
 *   q: { dtype: "f16", shape: [1, 1, 2, 1], data: new Float16Array([1, 2]) },
 * });
 * const { shape, data } = parseSafetensors(file).get("q", "f16");
 *
 * assertEquals(shape, [1, 1, 2, 1]);
 * assertEquals(data, new Float16Array([1, 2]));
 * ```
 */
export function parseSafetensors(bytes: Uint8Array): Safetensors {
  const { buffer } = bytes ?? {};
  if (!(bytes instanceof Uint8Array) || !(buffer instanceof ArrayBuffer) || buffer.detached) {
    throw new TypeError(
      cannot(parsing, "bytes", "be a Uint8Array on an ArrayBuffer that is not detached", bytes),
    );
  }
  if (bytes.length < 8) {
    throw refusal("file", "start with the 8 bytes of its header's length", bytes.length);
  }
  const headerLength = new DataView(buffer, bytes.byteOffset).getBigUint64(0, true);
  if (headerLength > longestHeader) {
    throw refusal("header length", `be at most ${longestHeader}`, headerLength);
  }
  const start = 8 + Number(headerLength);
  if (start > bytes.length) {
    throw refusal(
      "header length",
      `be at most the ${bytes.length - 8} bytes that follow it`,
      headerLength,
    );
  }
  const { __metadata__: metadata = {}, ...header } = parseHeader(bytes.subarray(8, start));
  if (!isObject(metadata) || Object.values(metadata).some((value) => typeof value !== "string")) {
    throw refusal("__metadata__", "be an object of strings", JSON.stringify(metadata));
  }
  const entries = Object.entries(header).map(([name, entry]) => readEntry(name, entry));
  checkCoverage(entries, bytes.length - start);
  return new Safetensors(
    new Map(entries.map(({ name, dtype, shape, from, to }) => {
      const data = bytes.subarray(start + from, start + to);
      const { array } = types[dtype], size = elementBytes(dtype);
      const { buffer, byteOffset } = data.byteOffset % size === 0 ? data : data.slice();
      return [name, {
        dtype,
        shape,
        data: new array(buffer as ArrayBuffer, byteOffset, data.length / size),
      }];
    })),
    metadata as Record<string, string>,
  );
}

function refusal(what: string, must: string, value: unknown): RangeError {
  return new RangeError(cannot(parsing, what, must, value));
}

function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function parseHeader(bytes: Uint8Array): Record<string, unknown> {
  let header: unknown;
  try {
    const text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
    header = JSON.parse(text);
    checkDuplicates(text);
  } catch (error) {
    if (error instanceof RangeError) throw error;
    throw refusal("header", "be JSON in UTF-8", (error as Error).message);
  }
  if (!isObject(header)) throw refusal("header", "be an object", header);
  return header;
}

/** Refuses valid JSON with an object that has a key twice, which `JSON.parse` would overlook. */
function checkDuplicates(text: string): void {
  const open: Set<string>[] = [];
  for (const [token, string, colon] of text.matchAll(/[{}]|("(?:[^"\\]|\\.)*")(\s*:)?/g)) {
    if (token === "{") open.push(new Set());
    else if (token === "}") open.pop();
    else if (colon) {
      const key: string = JSON.parse(string), keys = open[open.length - 1];
      if (keys.has(key)) throw refusal("header", "have every key once", key);
      keys.add(key);
    }
  }
}

interface Entry {
  name: string;
  dtype: SafetensorsDType;
  shape: number[];
  from: number;
  to: number;
}

function readEntry(name: string, entry: unknown): Entry {
  const of = `of tensor ${show(name)}`;
  if (!isObject(entry)) throw refusal(`entry ${of}`, "be an object", entry);
  const dtype = dtypes.find((dtype) => types[dtype].name === entry.dtype);
  if (!dtype) {
    const names = dtypes.map((dtype) => types[dtype].name);
    throw refusal(`dtype ${of}`, `be one of ${list(names)}`, entry.dtype);
  }
  const shape = wholeNumbers(`shape ${of}`, entry.shape);
  const offsets = wholeNumbers(`data_offsets ${of}`, entry.data_offsets);
  const [from, to] = offsets;
  if (offsets.length !== 2 || from > to) {
    throw refusal(`data_offsets ${of}`, "be a begin and an end that follows it", offsets);
  }
  const expected = shape.reduce((product, length) => product * BigInt(length), 1n) *
    BigInt(elementBytes(dtype));
  if (BigInt(to - from) !== expected) {
    throw refusal(
      `data_offsets ${of}`,
      `span the ${expected} bytes of ${types[dtype].name} ${show(shape)}`,
      offsets,
    );
  }
  return { name, dtype, shape, from, to };
}

function wholeNumbers(what: string, value: unknown): number[] {
  if (Array.isArray(value) && value.every((one) => Number.isSafeInteger(one) && one >= 0)) {
    return value;
  }
  throw refusal(what, "be an array of whole numbers", value);
}

/** Tensors must cover the data from its first to its last byte, without holes and without overlaps. */
function checkCoverage(entries: readonly Entry[], length: number): void {
  let end = 0;
  for (const { name, from, to } of entries.toSorted((a, b) => a.from - b.from || a.to - b.to)) {
    if (from !== end) {
      const problem = from < end ? "overlap" : "leave a hole after";
      throw refusal(
        `data_offsets of tensor ${show(name)}`,
        `not ${problem} the tensor before it, which ends at ${end}`,
        [from, to],
      );
    }
    if (to > length) {
      throw refusal(
        `data_offsets of tensor ${show(name)}`,
        `end within the ${length} bytes of data`,
        [from, to],
      );
    }
    end = to;
  }
  if (end !== length) throw refusal("data", `be as long as its tensors, ${end} bytes`, length);
}

// ---- writing ------------------------------------------------------------------------------------------

/**
 * Writes a safetensors file.
 *
 * @param tensors Tensors by their name.
 * @param metadata Notes to put in the header.
 * @returns The whole file; every tensor is aligned to 8 bytes where element sizes allow it.
 * @throws {TypeError | RangeError} Where a shape, element type and array do not fit together.
 *
 * @example
 * ```ts
 * import { parseSafetensors, serializeSafetensors } from "@sage/attention";
 * import { assertEquals } from "@std/assert";
 *
 * const file = serializeSafetensors(
 *   { x: { dtype: "u8", shape: [3], data: new Uint8Array([1, 2, 3]) } },
 *   { about: "three bytes" },
 * );
 *
 * assertEquals(parseSafetensors(file).metadata, { about: "three bytes" });
 * ```
 */
export function serializeSafetensors(
  tensors: Readonly<Record<string, SafetensorsEntry>>,
  metadata?: Readonly<Record<string, string>>,
): Uint8Array<ArrayBuffer> {
  const action = "serialize safetensors";
  const entries = Object.entries(tensors);
  for (const [name, { dtype, shape, data }] of entries) {
    const of = `of tensor ${show(name)}`;
    if (name === "__metadata__") {
      throw new RangeError(cannot(action, "name", "not be reserved", name));
    }
    const { array } = types[checkOneOf(action, `dtype ${of}`, dtype, dtypes)];
    if (!(data instanceof array)) {
      throw new TypeError(cannot(action, `data ${of}`, `be a ${array.name} for ${dtype}`, data));
    }
    shape.forEach((length, i) => checkInteger(action, `shape[${i}] ${of}`, length, 0));
    const expected = shape.reduce((product, length) => product * length, 1);
    if (data.length !== expected) {
      throw new RangeError(
        cannot(action, `data.length ${of}`, `be ${expected}, as the shape says`, data.length),
      );
    }
  }
  // Larger elements first, so that all are aligned.
  entries.sort(([, a], [, b]) => elementBytes(b.dtype) - elementBytes(a.dtype));
  let at = 0;
  const header: Record<string, unknown> = metadata ? { __metadata__: metadata } : {};
  for (const [name, { dtype, shape, data }] of entries) {
    header[name] = { dtype: types[dtype].name, shape, data_offsets: [at, at += data.byteLength] };
  }
  const text = new TextEncoder().encode(JSON.stringify(header));
  const headerLength = Math.ceil(text.length / 8) * 8;
  const bytes = new Uint8Array(8 + headerLength + at);
  new DataView(bytes.buffer).setBigUint64(0, BigInt(headerLength), true);
  bytes.fill(0x20, 8, 8 + headerLength).set(text, 8);
  at = 8 + headerLength;
  for (const [, { data }] of entries) {
    bytes.set(new Uint8Array(data.buffer, data.byteOffset, data.byteLength), at);
    at += data.byteLength;
  }
  return bytes;
}
