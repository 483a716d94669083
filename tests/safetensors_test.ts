// The safetensors format: what is written reads back, and every kind of broken file is refused.
import { assert, assertEquals, assertStringIncludes, assertThrows } from "@std/assert";
import { parseSafetensors, type SafetensorsEntry, serializeSafetensors } from "../mod.ts";

// deno-lint-ignore no-explicit-any
type Loose = any; // arguments that the types forbid

/** A file of this header, given as an object or as its text, and of so many bytes of data. */
function fileOf(header: unknown, dataLength = 0): Uint8Array<ArrayBuffer> {
  const text = new TextEncoder().encode(
    typeof header === "string" ? header : JSON.stringify(header),
  );
  const bytes = new Uint8Array(8 + text.length + dataLength);
  new DataView(bytes.buffer).setBigUint64(0, BigInt(text.length), true);
  bytes.set(text, 8);
  for (let i = 0; i < dataLength; ++i) bytes[8 + text.length + i] = i + 1;
  return bytes;
}

const everything: Record<string, SafetensorsEntry> = {
  bool: { dtype: "bool", shape: [3], data: Uint8Array.of(0, 1, 1) },
  f64: { dtype: "f64", shape: [2], data: Float64Array.of(Math.PI, -0) },
  f32: { dtype: "f32", shape: [2, 1, 2], data: Float32Array.of(1, -2, Infinity, 1e-45) },
  f16: { dtype: "f16", shape: [1, 3], data: Float16Array.of(65504, NaN, -0.5) },
  bf16: { dtype: "bf16", shape: [1, 1, 1, 1], data: Uint16Array.of(0x3f80) },
  e4m3: { dtype: "e4m3", shape: [5], data: Uint8Array.of(0, 1, 0x7e, 0x7f, 0xff) },
  e5m2: { dtype: "e5m2", shape: [1], data: Uint8Array.of(0x7c) },
  i64: { dtype: "i64", shape: [2], data: BigInt64Array.of(-(2n ** 63n), 2n ** 63n - 1n) },
  i32: { dtype: "i32", shape: [1], data: Int32Array.of(-(2 ** 31)) },
  i16: { dtype: "i16", shape: [1], data: Int16Array.of(-32768) },
  i8: { dtype: "i8", shape: [3], data: Int8Array.of(-128, 0, 127) },
  u64: { dtype: "u64", shape: [1], data: BigUint64Array.of(2n ** 64n - 1n) },
  u32: { dtype: "u32", shape: [1], data: Uint32Array.of(2 ** 32 - 1) },
  u16: { dtype: "u16", shape: [1], data: Uint16Array.of(65535) },
  u8: { dtype: "u8", shape: [1], data: Uint8Array.of(255) },
  scalar: { dtype: "f32", shape: [], data: Float32Array.of(7) },
  nothing: { dtype: "f32", shape: [4, 0, 2], data: new Float32Array(0) },
  'naïve "名" \\ { } name': { dtype: "u8", shape: [2], data: Uint8Array.of(1, 2) },
};

Deno.test("every element type, shape and name reads back as it was written", () => {
  const metadata = { format: "pt", note: 'ünïcode {"}' };
  const { tensors, metadata: back } = parseSafetensors(serializeSafetensors(everything, metadata));
  assertEquals(back, metadata);
  assertEquals([...tensors.keys()].toSorted(), Object.keys(everything).toSorted());
  for (const [name, entry] of Object.entries(everything)) {
    assertEquals(tensors.get(name), entry, name);
  }
});

Deno.test("files may lie at any byte of a buffer, and parts of arrays are written alone", () => {
  const whole = Float32Array.of(1, 2, 3, 4);
  const bytes = serializeSafetensors({
    x: { dtype: "f32", shape: [2], data: whole.subarray(1, 3) },
  });
  for (let offset = 0; offset < 8; ++offset) {
    const shifted = new Uint8Array(bytes.length + offset + 3);
    shifted.set(bytes, offset);
    const { data } = parseSafetensors(shifted.subarray(offset, offset + bytes.length))
      .get("x", "f32");
    assertEquals(data, Float32Array.of(2, 3));
  }
});

Deno.test("no tensors, and a header padded with spaces", () => {
  assertEquals(parseSafetensors(serializeSafetensors({})).tensors.size, 0);
  assertEquals(parseSafetensors(fileOf("{}   ")).tensors.size, 0);
  const [header] = new BigUint64Array(serializeSafetensors(everything).buffer, 0, 1);
  assertEquals(header % 8n, 0n, "data are aligned");
});

Deno.test("the bytes are those of the format", () => {
  const bytes = serializeSafetensors({ x: { dtype: "i8", shape: [2], data: Int8Array.of(5, -1) } });
  const text = `{"x":{"dtype":"I8","shape":[2],"data_offsets":[0,2]}}`;
  const padded = text.padEnd(Math.ceil(text.length / 8) * 8);
  assertEquals(bytes[0], padded.length);
  assertEquals(bytes.slice(1, 8), new Uint8Array(7));
  assertEquals(new TextDecoder().decode(bytes.subarray(8, 8 + padded.length)), padded);
  assertEquals(bytes.slice(8 + padded.length), Uint8Array.of(5, 255));
});

Deno.test("get() knows names and element types", () => {
  const file = parseSafetensors(serializeSafetensors(everything));
  assertEquals(file.get("i8", "i8").data, Int8Array.of(-128, 0, 127));
  const missing = assertThrows(() => file.get("q", "f32"), RangeError) as Error;
  assertStringIncludes(missing.message, `name must be one of "`);
  assertStringIncludes(missing.message, `current value is "q"`);
  const other = assertThrows(() => file.get("i8", "f32"), RangeError) as Error;
  assertStringIncludes(other.message, `dtype of "i8" must be "i8": current value is "f32"`);
});

// ---- broken files -------------------------------------------------------------------------------------

const u8 = (from: unknown, to: unknown, shape: unknown = [Number(to) - Number(from)]) => ({
  dtype: "U8",
  shape,
  data_offsets: [from, to],
});

function withLength(length: bigint): Uint8Array {
  const bytes = fileOf("{}");
  new DataView(bytes.buffer).setBigUint64(0, length, true);
  return bytes;
}

const broken: [string, Uint8Array, string[]][] = [
  ["nothing", new Uint8Array(0), ["8 bytes of its header's length", "current value is 0"]],
  ["seven bytes", new Uint8Array(7), ["8 bytes of its header's length", "current value is 7"]],
  ["an empty header", new Uint8Array(8), ["header must be JSON"]],
  ["a header longer than the file", withLength(3n), [
    "header length must be at most the 2 bytes that follow it",
    "current value is 3n",
  ]],
  ["a header of 2^53 bytes", withLength(2n ** 53n), ["header length must be at most 100000000"]],
  ["a header of 2^64 - 1 bytes", withLength(2n ** 64n - 1n), [
    "header length must be at most 100000000",
    "current value is 18446744073709551615n",
  ]],
  ["a header of no JSON", fileOf("{x}"), ["header must be JSON in UTF-8"]],
  ["a header cut short", fileOf(`{"x":{"dtype":"U8"`), ["header must be JSON in UTF-8"]],
  ["a header of no UTF-8", fileOf("{}").fill(0xff, 8), ["header must be JSON in UTF-8"]],
  ["a header with a byte order mark", fileOf("\ufeff{}"), ["header must be JSON in UTF-8"]],
  ...["[]", "null", "1", `"x"`].map((text): [string, Uint8Array, string[]] => [
    `a header that is ${text}`,
    fileOf(text),
    ["header must be an object", "current value is"],
  ]),
  [
    "a name twice",
    fileOf(`{"x":${JSON.stringify(u8(0, 1))},"\\u0078":${JSON.stringify(u8(0, 1))}}`, 1),
    ["header must have every key once", `current value is "x"`],
  ],
  [
    "a field twice",
    fileOf(`{"x":{"dtype":"U8","dtype":"I8","shape":[],"data_offsets":[0,1]}}`, 1),
    [
      "header must have every key once",
      `current value is "dtype"`,
    ],
  ],
  ["metadata that are no object", fileOf({ __metadata__: [] }), ["__metadata__ must be an object"]],
  ["metadata of numbers", fileOf({ __metadata__: { a: 1 } }), ["__metadata__ must be an object"]],
  ["null for metadata", fileOf({ __metadata__: null }), ["__metadata__ must be an object"]],
  ...[null, 1, [], "U8"].map((entry): [string, Uint8Array, string[]] => [
    `an entry that is ${JSON.stringify(entry)}`,
    fileOf({ x: entry }),
    [`entry of tensor "x" must be an object`],
  ]),
  ...["F8", "u8", 3, undefined, "toString"].map((dtype): [string, Uint8Array, string[]] => [
    `dtype ${dtype}`,
    fileOf({ x: { ...u8(0, 1), dtype } }, 1),
    [`dtype of tensor "x" must be one of "F64", "F32"`, "current value is"],
  ]),
  ...["3", undefined, [-1], [1.5], ["1"], [null], { length: 1 }].map((
    shape,
  ): [string, Uint8Array, string[]] => [
    `shape ${JSON.stringify(shape)}`,
    fileOf({ x: { dtype: "U8", shape, data_offsets: [0, 1] } }, 1),
    [`shape of tensor "x" must be an array of whole numbers`, "current value is"],
  ]),
  ...[[-1, 0], ["0", 1], [0, 1.5], "01", null].map((
    data_offsets,
  ): [string, Uint8Array, string[]] => [
    `data_offsets ${JSON.stringify(data_offsets)}`,
    fileOf({ x: { dtype: "U8", shape: [1], data_offsets } }, 1),
    [`data_offsets of tensor "x" must be an array of whole numbers`],
  ]),
  ...[[], [0], [0, 1, 2], [1, 0]].map((data_offsets): [string, Uint8Array, string[]] => [
    `data_offsets ${JSON.stringify(data_offsets)}`,
    fileOf({ x: { dtype: "U8", shape: [1], data_offsets } }, 1),
    [`data_offsets of tensor "x" must be a begin and an end`],
  ]),
  ["data shorter than the shape", fileOf({ x: u8(0, 1, [2]) }, 1), [
    `data_offsets of tensor "x" must span the 2 bytes of U8 [2]`,
    "current value is [0, 1]",
  ]],
  ["data longer than the shape", fileOf({ x: u8(0, 3, [2]) }, 3), ["must span the 2 bytes"]],
  ["half an element", fileOf({ x: { ...u8(0, 3), dtype: "F16", shape: [1] } }, 3), [
    "must span the 2 bytes of F16 [1]",
  ]],
  ["a shape beyond 64 bits", fileOf({ x: u8(0, 0, [2 ** 32, 2 ** 32]) }), [
    "must span the 18446744073709551616 bytes",
  ]],
  ["tensors that overlap", fileOf({ x: u8(0, 4), y: u8(3, 6) }, 6), [
    `data_offsets of tensor "y" must not overlap the tensor before it, which ends at 4`,
  ]],
  ["the same data twice", fileOf({ x: u8(0, 4), y: u8(0, 4) }, 4), ["must not overlap"]],
  ["a hole", fileOf({ x: u8(0, 2), y: u8(3, 6) }, 6), [
    `data_offsets of tensor "y" must not leave a hole after the tensor before it`,
  ]],
  ["a hole at the start", fileOf({ x: u8(1, 2) }, 2), ["must not leave a hole"]],
  ["data cut short", fileOf({ x: u8(0, 4) }, 3), [
    `data_offsets of tensor "x" must end within the 3 bytes of data`,
  ]],
  ["data that nobody owns", fileOf({ x: u8(0, 4) }, 5), [
    "data must be as long as its tensors, 4 bytes: current value is 5",
  ]],
  ["data without tensors", fileOf({}, 1), ["data must be as long as its tensors, 0 bytes"]],
];

for (const [name, bytes, says] of broken) {
  Deno.test(`parseSafetensors() refuses ${name}`, () => {
    const { message } = assertThrows(() => parseSafetensors(bytes), RangeError) as Error;
    for (const words of ["Cannot parse safetensors as ", ...says]) {
      assertStringIncludes(message, words);
    }
  });
}

Deno.test("parseSafetensors() refuses what is no plain array of bytes", () => {
  const detached = new Uint8Array(16);
  detached.buffer.transfer();
  const wrong = [
    undefined,
    null,
    "{}",
    new ArrayBuffer(16),
    new Float32Array(4),
    [1, 2],
    new Uint8Array(new SharedArrayBuffer(16)),
    detached,
  ];
  for (const bytes of wrong) {
    const { message } = assertThrows(() => parseSafetensors(bytes as Loose), TypeError) as Error;
    assertStringIncludes(message, "Cannot parse safetensors as bytes must be a Uint8Array");
  }
});

Deno.test("a file damaged anywhere is read or refused, never read beyond its end", () => {
  const good = serializeSafetensors(everything);
  let refused = 0;
  for (let at = 0; at < good.length; ++at) {
    for (const value of [0, 0x22, 0x39, 0xff]) {
      const bytes = good.slice();
      bytes[at] = value;
      try {
        for (const { data } of parseSafetensors(bytes).tensors.values()) {
          assert(data.byteLength <= bytes.length);
        }
      } catch (error) {
        assert(error instanceof RangeError, `${error} for ${value} at ${at}`);
        assertStringIncludes(error.message, "Cannot parse safetensors as ");
        ++refused;
      }
    }
  }
  assert(refused > good.length, `${refused} of ${4 * good.length} damaged files were refused`);
});

const unwritable: [string, Loose, typeof TypeError | typeof RangeError, string[]][] = [
  ["a reserved name", { __metadata__: everything.u8 }, RangeError, ["name must not be reserved"]],
  ["an unknown dtype", { x: { ...everything.u8, dtype: "U8" } }, RangeError, [
    `dtype of tensor "x" must be one of "f64"`,
    `current value is "U8"`,
  ]],
  ["another array", { x: { ...everything.u8, data: new Float32Array(1) } }, TypeError, [
    `data of tensor "x" must be a Uint8Array for u8`,
    "current value is a Float32Array",
  ]],
  ["no array", { x: { ...everything.u8, data: [1] } }, TypeError, [`data of tensor "x" must be a`]],
  ["too few elements", { x: { ...everything.u8, shape: [2] } }, RangeError, [
    `data.length of tensor "x" must be 2, as the shape says: current value is 1`,
  ]],
  ["too many elements", { x: { ...everything.u8, shape: [0] } }, RangeError, ["must be 0"]],
  ["half a length", { x: { ...everything.u8, shape: [0.5, 2] } }, RangeError, [
    `shape[0] of tensor "x" must be a whole number`,
    "current value is 0.5",
  ]],
  ["a negative length", { x: { ...everything.u8, shape: [-1, -1] } }, RangeError, ["is -1"]],
  ["a length as text", { x: { ...everything.u8, shape: ["1"] } }, TypeError, [`value is "1"`]],
];

for (const [name, tensors, error, says] of unwritable) {
  Deno.test(`serializeSafetensors() refuses ${name}`, () => {
    const { message } = assertThrows(() => serializeSafetensors(tensors), error) as Error;
    for (const words of ["Cannot serialize safetensors as ", ...says]) {
      assertStringIncludes(message, words);
    }
  });
}
