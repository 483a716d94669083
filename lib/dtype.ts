// Element types: how a tensor stores a value, which typed array holds it, and how to read it as a number.
import { cannot, checkOneOf } from "./check.ts";

/**
 * How a tensor stores its elements.
 *
 * | name | what | typed array |
 * |---|---|---|
 * | `f32` | IEEE single precision | `Float32Array` |
 * | `f16` | IEEE half precision | `Float16Array` |
 * | `bf16` | bfloat16, as bits | `Uint16Array` |
 * | `i8` | codes in [-127, 127]; -128 marks a value that was not finite | `Int8Array` |
 * | `i4` | codes in [-7, 7], two a byte, the even channel low; -8 marks a value that was not finite | `Uint8Array` |
 * | `e4m3` | FP8 e4m3fn, as bits; 0x7f and 0xff are NaN | `Uint8Array` |
 * | `bool` | 0 for false, anything else for true: masks | `Uint8Array` |
 */
export type DType = "f32" | "f16" | "bf16" | "i8" | "i4" | "e4m3" | "bool";

/** The element types that attention takes and returns. */
export type FloatDType = "f32" | "f16" | "bf16";

/** The element types that quantizers produce. */
export type CodeDType = "i8" | "i4" | "e4m3";

/** The typed array that holds each {@linkcode DType}. */
export interface DTypeArrays {
  /** Single precision. */
  f32: Float32Array<ArrayBuffer>;
  /** Half precision. */
  f16: Float16Array<ArrayBuffer>;
  /** The bits of bfloat16. */
  bf16: Uint16Array<ArrayBuffer>;
  /** Integer codes. */
  i8: Int8Array<ArrayBuffer>;
  /** Two integer codes a byte. */
  i4: Uint8Array<ArrayBuffer>;
  /** The bits of FP8 e4m3fn. */
  e4m3: Uint8Array<ArrayBuffer>;
  /** One byte a truth. */
  bool: Uint8Array<ArrayBuffer>;
}

/** The typed arrays that a tensor can be made from. */
export type TensorData =
  | Float32Array
  | Float16Array
  | Uint16Array
  | Int8Array
  | Uint8Array;

interface DTypeFacts {
  bits: number;
  array: (new (buffer: ArrayBuffer, offset?: number, length?: number) => DTypeArrays[DType]) & {
    readonly name: string;
  };
}

const facts: Record<DType, DTypeFacts> = {
  f32: { bits: 32, array: Float32Array },
  f16: { bits: 16, array: Float16Array },
  bf16: { bits: 16, array: Uint16Array },
  i8: { bits: 8, array: Int8Array },
  i4: { bits: 4, array: Uint8Array },
  e4m3: { bits: 8, array: Uint8Array },
  bool: { bits: 8, array: Uint8Array },
};

/** Every dtype. */
export const dtypes: readonly DType[] = Object.keys(facts) as DType[];

/** The dtypes of tensors that are not codes. */
export const floatDTypes: readonly FloatDType[] = ["f32", "f16", "bf16"];

/** Bits of one element. */
export function dtypeBits(dtype: DType): number {
  return facts[dtype].bits;
}

/** The typed array class of a dtype. */
export function arrayOf(dtype: DType): DTypeFacts["array"] {
  return facts[dtype].array;
}

// ---- single values ------------------------------------------------------------------------------------

const scratch = new DataView(new ArrayBuffer(4));

function bitsOf(value: number): number {
  scratch.setFloat32(0, value);
  return scratch.getUint32(0);
}

/** bfloat16 bits of a number that is first rounded to single precision; ties to even, NaN is 0x7fff. */
function toBf16(value: number): number {
  const bits = bitsOf(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return ((bits + 0x7fff + ((bits >>> 16) & 1)) >>> 16) & 0xffff;
}

/** The value of FP8 e4m3fn bits. */
function fromE4m3(code: number): number {
  const sign = code & 0x80 ? -1 : 1, exponent = (code >> 3) & 15, mantissa = code & 7;
  if ((code & 0x7f) === 0x7f) return NaN;
  return sign * (exponent === 0 ? mantissa * 2 ** -9 : (8 + mantissa) * 2 ** (exponent - 10));
}

/** The nearest FP8 e4m3fn bits, saturating at 448; ties to even, NaN is 0x7f. */
function toE4m3(value: number): number {
  const single = Math.fround(value);
  if (Number.isNaN(single)) return 0x7f;
  const sign = bitsOf(single) >>> 31 ? 0x80 : 0, magnitude = Math.abs(single);
  if (magnitude >= 448) return sign | 0x7e;
  const exponent = Math.max(-6, Math.floor(Math.log2(magnitude)));
  const steps = roundHalfEven(magnitude / 2 ** (exponent - 3)); // of 2^(exponent - 3)
  return sign | (steps + (exponent + 6) * 8);
}

/** The nearest integer; of two equally near ones the even one. */
function roundHalfEven(value: number): number {
  const low = Math.floor(value), rest = value - low;
  return rest > 0.5 || (rest === 0.5 && low % 2 !== 0) ? low + 1 : low;
}

// ---- whole arrays -------------------------------------------------------------------------------------

/**
 * The values of a typed array as single-precision numbers.
 *
 * Codes become their code value, and the codes that mark what was not finite become NaN; scales are not applied.
 * `bool` becomes 0 and 1.
 * An `i4` byte gives two values, so an odd number of channels keeps its padding.
 *
 * @param data What `tensor.data()` returned, or an array of that kind.
 * @param dtype How to read it.
 * @returns A new array.
 *
 * @example
 * ```ts
 * import { toFloat32 } from "@sage/attention";
 * import { assertEquals } from "@std/assert";
 *
 * assertEquals(toFloat32(new Uint16Array([0x3f80, 0xc000]), "bf16"), new Float32Array([1, -2]));
 * assertEquals(toFloat32(new Uint8Array([0x7e, 0x21]), "i4"), new Float32Array([-2, 7, 1, 2]));
 * ```
 */
export function toFloat32(data: TensorData, dtype: DType): Float32Array<ArrayBuffer> {
  checkArray("read values", data, dtype);
  switch (dtype) {
    case "f32":
      return Float32Array.from(data);
    case "f16":
      return Float32Array.from(asDType(data, dtype));
    case "bf16":
      return new Float32Array(Uint32Array.from(data, (bits) => bits << 16).buffer);
    case "i8":
      return Float32Array.from(data, (code) => code === -128 ? NaN : code);
    case "i4": {
      const values = new Float32Array(data.length * 2);
      for (let i = 0; i < values.length; ++i) {
        const code = (i % 2 ? data[i >> 1] << 24 : data[i >> 1] << 28) >> 28;
        values[i] = code === -8 ? NaN : code;
      }
      return values;
    }
    case "e4m3":
      return Float32Array.from(data, fromE4m3);
    case "bool":
      return Float32Array.from(data, (byte) => byte === 0 ? 0 : 1);
  }
}

/**
 * Numbers rounded to a floating-point element type, ties to even.
 *
 * @param values Any numbers.
 * @param dtype What to round to: `f32`, `f16`, `bf16` or `e4m3`.
 * @returns A new array of the dtype's kind. `e4m3` saturates at 448.
 *
 * @example
 * ```ts
 * import { fromFloat32 } from "@sage/attention";
 * import { assertEquals } from "@std/assert";
 *
 * assertEquals(fromFloat32([1, -2], "bf16"), new Uint16Array([0x3f80, 0xc000]));
 * assertEquals(fromFloat32([1, 1000], "e4m3"), new Uint8Array([0x38, 0x7e]));
 * ```
 */
export function fromFloat32<D extends FloatDType | "e4m3">(
  values: ArrayLike<number>,
  dtype: D,
): DTypeArrays[D];
export function fromFloat32(
  values: ArrayLike<number>,
  dtype: FloatDType | "e4m3",
): DTypeArrays[FloatDType | "e4m3"] {
  switch (dtype) {
    case "f32":
      return Float32Array.from(values);
    case "f16":
      return Float16Array.from(values);
    case "bf16":
      return Uint16Array.from(values, toBf16);
    case "e4m3":
      return Uint8Array.from(values, toE4m3);
    default:
      return checkOneOf("round values", "dtype", dtype, ["f32", "f16", "bf16", "e4m3"] as never[]);
  }
}

/** Refuses an array that does not hold elements of the dtype. */
export function checkArray(action: string, data: TensorData, dtype: DType): void {
  const { array } = facts[checkOneOf(action, "dtype", dtype, dtypes)];
  if (data instanceof array || (dtype === "f16" && data as unknown instanceof Uint16Array)) return;
  throw new TypeError(
    cannot(action, "data", `be a ${array.name} for dtype "${dtype}"`, data),
  );
}

/** The same bytes as the dtype's own kind of array; half precision may come as bits. */
function asDType(data: TensorData, dtype: DType): TensorData {
  return dtype === "f16" && data instanceof Uint16Array
    ? new Float16Array(data.buffer, data.byteOffset, data.length)
    : data;
}
