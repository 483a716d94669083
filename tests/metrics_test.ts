// Metrics and the conversion of element types, against values worked out by hand.
import {
  assert,
  assertAlmostEquals,
  assertEquals,
  assertStringIncludes,
  assertThrows,
} from "@std/assert";
import { cosine, type DType, fromFloat32, relativeL1, rmse, toFloat32 } from "../mod.ts";

// deno-lint-ignore no-explicit-any
type Loose = any; // arguments that the types forbid

// ---- metrics ------------------------------------------------------------------------------------------

Deno.test("cosine() of known arrays", () => {
  assertEquals(cosine([1, 0], [0, 1]), 0);
  assertEquals(cosine([-2, 0], [1, 0]), -1);
  assertAlmostEquals(cosine([3, 4], [4, 3]), 24 / 25, 1e-15);
  assertAlmostEquals(cosine([1, 1, 1, 1], [1, 0, 0, 0]), 1 / 2, 1e-15);
  assertAlmostEquals(cosine(Float32Array.of(1, 2), Float16Array.of(2, 1)), 4 / 5, 1e-15);
  assertEquals(cosine([0, 0], [0, 0]), 1);
  assertEquals(cosine([0, 0], [1, 0]), 0);
  assertEquals(cosine([1, 0], [0, 0]), 0);
  assertEquals(cosine([NaN, 1], [1, 1]), NaN);
});

Deno.test("relativeL1() of known arrays", () => {
  assertEquals(relativeL1([1, 2], [1, 2]), 0);
  assertEquals(relativeL1([2, 2], [1, -3]), 6 / 4);
  assertEquals(relativeL1([0, 0], [5, 5]), 1);
  assertEquals(relativeL1([0, 0], [0, 0]), 0);
  assertEquals(relativeL1([1, 0], [0, 0]), Infinity);
  assertEquals(relativeL1([1, 5], [1, 3]), 0.5);
  assertEquals(relativeL1([1, 3], [1, 5]), 2 / 6); // it is not symmetric
  assertEquals(relativeL1([NaN, 1], [1, 1]), NaN);
});

Deno.test("rmse() of known arrays", () => {
  assertEquals(rmse([1, 2], [1, 2]), 0);
  assertEquals(rmse([3, 4], [0, 0]), Math.sqrt(25 / 2));
  assertEquals(rmse([2, 0, 0, 0], [0, 0, 0, 0]), 1);
  assertEquals(rmse([-5], [5]), 10);
  assertEquals(rmse([NaN, 1], [1, 1]), NaN);
});

Deno.test("metrics refuse arrays of different lengths, and empty ones", () => {
  for (const metric of [cosine, relativeL1, rmse]) {
    const { message } = assertThrows(() => metric([1, 2], [1]), RangeError) as Error;
    assertStringIncludes(message, "Cannot compute a");
    assertStringIncludes(message, "actual.length must equal reference.length (1)");
    assertStringIncludes(message, "current value is 2");
    const nothing = assertThrows(() => metric([1], []), RangeError) as Error;
    assertStringIncludes(nothing.message, "actual.length must equal reference.length (0)");
    assertStringIncludes(nothing.message, "current value is 1");
    const empty = assertThrows(() => metric([], []), RangeError) as Error;
    assertStringIncludes(empty.message, "actual.length must not be 0");
  }
});

// ---- element types ------------------------------------------------------------------------------------

Deno.test("every code of every element type keeps its bits there and back", () => {
  const e4m3 = Uint8Array.from({ length: 256 }, (_, code) => code);
  assertEquals(
    fromFloat32(toFloat32(e4m3, "e4m3"), "e4m3"),
    e4m3.map((code) => code === 0xff ? 0x7f : code), // a NaN has no sign
  );
  const words = Uint16Array.from({ length: 65536 }, (_, code) => code);
  const isNaN16 = (code: number, infinity: number) => (code & 0x7fff) > infinity;
  const bf16 = words.filter((code) => !isNaN16(code, 0x7f80));
  assertEquals(fromFloat32(toFloat32(bf16, "bf16"), "bf16"), bf16);
  const f16 = words.filter((code) => !isNaN16(code, 0x7c00));
  assertEquals(new Uint16Array(fromFloat32(toFloat32(f16, "f16"), "f16").buffer), f16);
  for (const [dtype, code] of [["bf16", 0x7fc0], ["f16", 0x7e00], ["e4m3", 0x7f]] as const) {
    const data = dtype === "e4m3" ? Uint8Array.of(code) : Uint16Array.of(code);
    const [value] = toFloat32(data, dtype);
    assert(Number.isNaN(value), dtype);
    assert(Number.isNaN(toFloat32(fromFloat32([value], dtype), dtype)[0]), dtype);
  }
});

Deno.test("toFloat32() of known codes", () => {
  assertEquals(toFloat32(Float32Array.of(1.5, -0), "f32"), Float32Array.of(1.5, -0));
  assertEquals(toFloat32(Float16Array.of(65504), "f16"), Float32Array.of(65504));
  assertEquals(
    toFloat32(Uint16Array.of(0x3c00, 0xc000, 1), "f16"),
    Float32Array.of(1, -2, 2 ** -24),
  );
  assertEquals(
    toFloat32(Uint16Array.of(0x3f80, 0xff80, 1), "bf16").slice(0, 2),
    Float32Array.of(1, -Infinity),
  );
  assertEquals(
    toFloat32(Int8Array.of(127, -127, 0, -128), "i8"),
    Float32Array.of(127, -127, 0, NaN),
  );
  assertEquals(
    toFloat32(Uint8Array.of(0x97, 0x08, 0x8f), "i4"),
    Float32Array.of(7, -7, NaN, 0, -1, NaN),
  );
  assertEquals(
    toFloat32(Uint8Array.of(0, 1, 255), "bool"),
    Float32Array.of(0, 1, 1),
  );
  assertEquals(
    toFloat32(Uint8Array.of(0x00, 0x80, 0x01, 0x38, 0x7e, 0xfe, 0x7f, 0xff), "e4m3"),
    Float32Array.of(0, -0, 2 ** -9, 1, 448, -448, NaN, NaN),
  );
});

Deno.test("fromFloat32() rounds to nearest, ties to even", () => {
  const bf16 = (value: number) => fromFloat32([value], "bf16")[0];
  assertEquals(bf16(1), 0x3f80);
  assertEquals(bf16(1 + 2 ** -8), 0x3f80); // half way: down to even
  assertEquals(bf16(1 + 3 * 2 ** -8), 0x3f82); // half way: up to even
  assertEquals(bf16(1 + 2 ** -8 + 2 ** -20), 0x3f81);
  assertEquals(bf16(-Infinity), 0xff80);
  assertEquals(bf16(3.4e38), 0x7f80); // the largest bfloat16 is less
  assertEquals(bf16(-0), 0x8000);
  assertEquals(bf16(NaN), 0x7fff);

  const e4m3 = (value: number) => fromFloat32([value], "e4m3")[0];
  assertEquals(e4m3(1), 0x38);
  assertEquals(e4m3(1 + 1 / 16), 0x38); // half way: down to even
  assertEquals(e4m3(1 + 3 / 16), 0x3a); // half way: up to even
  assertEquals(e4m3(2 ** -10), 0); // half way: down to zero
  assertEquals(e4m3(3 * 2 ** -10), 2);
  assertEquals(e4m3(2 - 1 / 32), 0x40); // carries into the exponent
  assertEquals(e4m3(1e6), 0x7e);
  assertEquals(e4m3(-Infinity), 0xfe);
  assertEquals(e4m3(-0), 0x80);

  assertEquals(fromFloat32([65519, 65520, 2 ** -25], "f16"), Float16Array.of(65504, Infinity, 0));
  assertEquals(fromFloat32([0.1], "f32"), Float32Array.of(0.1));
});

Deno.test("conversions refuse other arrays and element types", () => {
  const arrays: [Loose, DType, string][] = [
    [new Float32Array(1), "f16", "a Float16Array"],
    [new Float16Array(1), "f32", "a Float32Array"],
    [new Float32Array(1), "bf16", "a Uint16Array"],
    [new Uint8Array(1), "i8", "a Int8Array"],
    [new Int8Array(1), "i4", "a Uint8Array"],
    [[1, 2], "f32", "a Float32Array"],
    [undefined, "e4m3", "a Uint8Array"],
  ];
  for (const [data, dtype, expected] of arrays) {
    const { message } = assertThrows(() => toFloat32(data, dtype), TypeError) as Error;
    assertStringIncludes(message, `data must be ${expected} for dtype "${dtype}"`);
    assertStringIncludes(message, "current value is");
  }
  for (const dtype of ["f64", "toString", ""]) {
    const call = () => toFloat32(new Float32Array(1), dtype as Loose);
    const { message } = assertThrows(call, RangeError) as Error;
    assertStringIncludes(message, `dtype must be one of "f32"`);
  }
  for (const dtype of ["i8", "i4", "f64"]) {
    const { message } = assertThrows(() => fromFloat32([1], dtype as Loose), RangeError) as Error;
    assertStringIncludes(message, `dtype must be one of "f32", "f16", "bf16", "e4m3"`);
    assertStringIncludes(message, `current value is "${dtype}"`);
  }
});
