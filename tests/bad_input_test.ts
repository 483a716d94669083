// Everything that can be done wrong: each a clear error of the right class, nothing left behind, and the next good
// call works.
import {
  assert,
  assertEquals,
  assertInstanceOf,
  assertRejects,
  assertStringIncludes,
  assertThrows,
} from "@std/assert";
import {
  attention,
  attentionQuantized,
  cosine,
  dequantize,
  Device,
  DisposedError,
  explain,
  flashAttention,
  fromFloat32,
  NoDeviceError,
  OutOfMemoryError,
  quantize,
  relativeL1,
  rmse,
  SageError,
  smooth,
  type Tensor,
  toFloat32,
} from "../mod.ts";
import { deviceNames, deviceTest } from "./devices.ts";

/** A small call that must always work. */
async function assertWorks(device: Device): Promise<void> {
  using x = device.tensor(new Float16Array(2 * 64).fill(1), [1, 1, 2, 64]);
  using out = attention(x, x, x, { kernel: "flash" });
  assertEquals(await out.data(), new Float16Array(2 * 64).fill(1));
}

// deno-lint-ignore no-explicit-any
type Anything = any;

interface Case {
  name: string;
  act: (device: Device, x: Tensor<"f16">) => unknown;
  error: new (...args: Anything[]) => Error;
  says: string[];
}

function f16(
  device: Device,
  shape: readonly number[],
  layout: "HND" | "NHD" = "HND",
): Tensor<"f16"> {
  return device.tensor(new Float16Array(shape.reduce((a, b) => a * b)), shape, { layout });
}

/** Runs `act` on a tensor that is disposed afterwards. */
function use<T extends Disposable, R>(resource: T, act: (resource: T) => R): R {
  using held = resource;
  return act(held);
}

function detached<T extends Float32Array | Float16Array>(array: T): T {
  structuredClone(array.buffer, { transfer: [array.buffer as ArrayBuffer] });
  return array;
}

function shrunk(): Float32Array {
  const buffer = new ArrayBuffer(64, { maxByteLength: 64 }), view = new Float32Array(buffer);
  buffer.resize(8);
  return view;
}

const shape = [1, 4, 8, 64] as const; // of x

const cases: Case[] = [
  // ---- tensors
  {
    name: "rank 3",
    act: (device) => device.tensor(new Float32Array(8), [2, 2, 2]),
    error: TypeError,
    says: ["shape must have 4 dimensions, [batch, heads, tokens, channels]", "[2, 2, 2]"],
  },
  {
    name: "rank 5",
    act: (device) => device.empty([1, 1, 1, 1, 1]),
    error: TypeError,
    says: ["4 dimensions", "[1, 1, 1, 1, 1]"],
  },
  {
    name: "a shape that is no array",
    act: (device) => device.empty("1,1,1,1" as Anything),
    error: TypeError,
    says: ["4 dimensions", '"1,1,1,1"'],
  },
  {
    name: "a dimension of 0",
    act: (device) => device.empty([1, 0, 8, 64]),
    error: RangeError,
    says: ["shape[1] must be a whole number from 1", "current value is 0"],
  },
  ...[-1, 1.5, NaN, Infinity, 2 ** 53].map((length): Case => ({
    name: `a dimension of ${length}`,
    act: (device) => device.empty([1, 1, length, 64]),
    error: RangeError,
    says: ["shape[2] must be a whole number", `${length}`],
  })),
  {
    name: "a dimension that is no number",
    act: (device) => device.empty([1, 1, "8" as Anything, 64]),
    error: TypeError,
    says: ["shape[2] must be a whole number", '"8"'],
  },
  {
    name: "a size that overflows 64 bits",
    act: (device) => device.empty([2 ** 40, 2 ** 40, 2 ** 40, 64]),
    error: RangeError,
    says: ["shape must hold less than 2^53 bytes", `${2 ** 40}`],
  },
  {
    name: "more memory than exists",
    act: (device) => device.empty([1, 1, 2 ** 40, 64]),
    error: OutOfMemoryError,
    says: [`${2 ** 48}`],
  },
  {
    name: "an unknown dtype",
    act: (device) => device.empty([1, 1, 8, 64], { dtype: "fp16" as Anything }),
    error: RangeError,
    says: ['dtype must be one of "f32", "f16", "bf16", "i8", "i4", "e4m3"', '"fp16"'],
  },
  {
    name: "an unknown layout",
    act: (device) => device.empty([1, 1, 8, 64], { layout: "BHND" as Anything }),
    error: RangeError,
    says: ['layout must be one of "HND", "NHD"', '"BHND"'],
  },
  {
    name: "an unknown tensor option",
    act: (device) => device.empty([1, 1, 8, 64], { type: "f16" } as Anything),
    error: TypeError,
    says: ['no property "type"', '"dtype", "layout"'],
  },
  {
    name: "data that is too short",
    act: (device) => device.tensor(new Float32Array(511), [1, 1, 8, 64]),
    error: RangeError,
    says: ["data.length must be 512", "current value is 511"],
  },
  {
    name: "data that is too long",
    act: (device) => device.tensor(new Float16Array(513), [1, 1, 8, 64]),
    error: RangeError,
    says: ["data.length must be 512", "current value is 513"],
  },
  {
    name: "a detached buffer",
    act: (device) => device.tensor(detached(new Float32Array(512)), [1, 1, 8, 64]),
    error: TypeError,
    says: ["data must not be detached"],
  },
  {
    name: "a buffer that shrank",
    act: (device) => device.tensor(shrunk(), [1, 1, 1, 16]),
    error: RangeError,
    says: ["data.length must be 16", "current value is 2"],
  },
  {
    name: "data that is a plain array",
    act: (device) => device.tensor([1, 2] as Anything, [1, 1, 1, 2]),
    error: TypeError,
    says: ["data must be a Float32Array, Float16Array", "[1, 2]"],
  },
  {
    name: "data of another type than the dtype",
    act: (device) => device.tensor(new Float32Array(2), [1, 1, 1, 2], { dtype: "f16" } as Anything),
    error: TypeError,
    says: ['data must be a Float16Array for dtype "f16"', "a Float32Array"],
  },
  {
    name: "16-bit data without a dtype",
    act: (device) => device.tensor(new Uint16Array(2), [1, 1, 1, 2]),
    error: TypeError,
    says: ['"bf16" or "f16"'],
  },
  {
    name: "8-bit data without a dtype",
    act: (device) => device.tensor(new Uint8Array(2), [1, 1, 1, 2]),
    error: TypeError,
    says: ['"i4" or "e4m3"'],
  },
  {
    name: "writing too little",
    act: (_, x) => x.write(new Float16Array(5)),
    error: RangeError,
    says: ["data.length must be 2048", "5"],
  },
  {
    name: "writing a detached buffer",
    act: (_, x) => x.write(detached(new Float16Array(2048))),
    error: TypeError,
    says: ["detached"],
  },
  {
    name: "a view that reaches outside",
    act: (_, x) => x.view({ tokens: [4, 9] }),
    error: RangeError,
    says: ["tokens[1] must be a whole number from 5 to 8", "9"],
  },
  {
    name: "an empty view",
    act: (_, x) => x.view({ heads: [1, 1] }),
    error: RangeError,
    says: ["heads[1]", "from 2 to 4"],
  },
  {
    name: "a view of unknown dimensions",
    act: (_, x) => x.view({ channels: [0, 1] } as Anything),
    error: TypeError,
    says: ['"channels"', '"batch", "heads", "tokens"'],
  },
  {
    name: "timing what is no function",
    act: (device) => device.time(5 as Anything),
    error: TypeError,
    says: ["work must be a function", "5"],
  },

  // ---- attention: tensors
  {
    name: "no tensor at all",
    act: (_, x) => attention(x, undefined as Anything, x),
    error: TypeError,
    says: ["k must be a Tensor", "undefined"],
  },
  {
    name: "a typed array instead of a tensor",
    act: (_, x) => attention(x, x, new Float16Array(4) as Anything),
    error: TypeError,
    says: ["v must be a Tensor", "a Float16Array"],
  },
  {
    name: "an imitation of a tensor",
    act: (_, x) => attention(x, x, { ...x } as Anything),
    error: TypeError,
    says: ["v must be a Tensor"],
  },
  ...[
    {
      other: [2, 4, 8, 64],
      k: "batch of k must equal batch of q (1)",
      v: "batch of v must equal batch of q (1)",
    },
    { other: [1, 4, 8, 32], k: "channels of k must equal channels of q (64)" },
    { other: [1, 4, 9, 64], v: "tokens of v must equal tokens of k (8)" },
    { other: [1, 2, 8, 64], v: "heads of v must equal heads of k (4)" },
  ].flatMap(({ other, ...expected }) =>
    Object.entries(expected).map(([name, says]): Case => ({
      name: `${name} of shape [${other}]`,
      act: (device, x) =>
        use(f16(device, other), (y) => attention(x, name === "k" ? y : x, name === "v" ? y : x)),
      error: RangeError,
      says: [says],
    }))
  ),
  {
    name: "heads that don't divide",
    act: (device, x) => use(f16(device, [1, 3, 8, 64]), (y) => attention(x, y, y)),
    error: RangeError,
    says: ["heads of q must be a multiple of heads of k (3)", "current value is 4"],
  },
  {
    name: "more heads of keys than of queries",
    act: (device, x) => use(f16(device, [1, 8, 8, 64]), (y) => attention(x, y, y)),
    error: RangeError,
    says: ["heads of q must be a multiple of heads of k (8)"],
  },
  {
    name: "D over 256",
    act: (device) => use(f16(device, [1, 1, 2, 257]), (y) => attention(y, y, y)),
    error: RangeError,
    says: ["channels of q must be at most 256", "257"],
  },
  {
    name: "Dv over 256",
    act: (device, x) => use(f16(device, [1, 4, 8, 300]), (y) => attention(x, x, y)),
    error: RangeError,
    says: ["channels of v must be at most 256", "300"],
  },
  {
    name: "mixed dtypes",
    act: (device, x) =>
      use(device.empty(shape, { dtype: "bf16" }), (y) => attention(x, y as Tensor, x as Tensor)),
    error: TypeError,
    says: ['k.dtype must equal q.dtype ("f16")', '"bf16"'],
  },
  {
    name: "tensors of codes",
    act: (device) => use(device.empty(shape, { dtype: "i8" }), (y) => attention(y, y, y)),
    error: RangeError,
    says: ['q.dtype must be one of "f32", "f16", "bf16"', '"i8"'],
  },
  {
    name: "tensors of two devices",
    act: (device, x) =>
      use(
        Device.open(deviceNames.find((name) => name !== device.name) ?? "cpu"),
        (other) => use(f16(other, shape), (y) => attention(x, y, x)),
      ),
    error: TypeError,
    says: ["k must belong to the same Device object"],
  },
  {
    name: "tensors of two Device objects",
    act: (device, x) =>
      use(
        Device.open(device.name as "cpu"),
        (other) => use(f16(other, shape), (y) => attention(x, x, y)),
      ),
    error: TypeError,
    says: ["v must belong to the same Device object"],
  },
  {
    name: "a disposed tensor",
    act: (device, x) => {
      const y = f16(device, shape);
      y.dispose();
      y.dispose(); // again: nothing happens
      return attention(x, y, x);
    },
    error: DisposedError,
    says: ["a tensor that was disposed"],
  },
  {
    name: "a tensor of a disposed device",
    act: (device) => {
      const other = Device.open(device.name as "cpu"), y = f16(other, shape);
      other.dispose();
      other.dispose(); // again: nothing happens
      assert(y.disposed);
      return attention(y, y, y);
    },
    error: DisposedError,
    says: ["whose device was disposed"],
  },
  {
    name: "a disposed device",
    act: (device) => {
      const other = Device.open(device.name as "cpu");
      other.dispose();
      return other.empty(shape);
    },
    error: DisposedError,
    says: ["a device that was disposed"],
  },

  // ---- attention: outputs
  {
    name: "out of another shape",
    act: (device, x) => use(f16(device, [1, 4, 7, 64]), (out) => attention(x, x, x, { out })),
    error: RangeError,
    says: ["out must have shape [1, 4, 8, 64]", "[1, 4, 7, 64]"],
  },
  {
    name: "out of another shape, NHD",
    act: (device, x) =>
      use(f16(device, [1, 4, 8, 64], "NHD"), (out) => attention(x, x, x, { out })),
    error: RangeError,
    says: ["out must have shape [1, 8, 4, 64]"],
  },
  {
    name: "out of codes",
    act: (device, x) =>
      use(
        device.empty(shape, { dtype: "i8" }),
        (out) => attention(x, x, x, { out: out as Anything }),
      ),
    error: RangeError,
    says: ['out.dtype must be one of "f32", "f16", "bf16"'],
  },
  {
    name: "out and outDtype that contradict",
    act: (device, x) =>
      use(f16(device, shape), (out) => attention(x, x, x, { out, outDtype: "f32" as Anything })),
    error: TypeError,
    says: ['outDtype must be absent or equal out.dtype ("f16")', '"f32"'],
  },
  {
    name: "out that is an input",
    act: (_, x) => attention(x, x, x, { kernel: "flash", out: x }),
    error: SageError,
    says: ["must not overlap"],
  },
  {
    name: "out that overlaps an input",
    act: (device) =>
      use(
        f16(device, [1, 4, 9, 64]),
        (y) =>
          use(y.view({ tokens: [0, 8] }), (k) =>
            use(y.view({ tokens: [1, 9] }), (out) =>
              attention(k, k, k, { kernel: "flash", out }))),
      ),
    error: SageError,
    says: ["must not overlap"],
  },

  // ---- attention: options
  ...([
    [{ causual: true }, TypeError, 'no property "causual"', '"causal"'],
    [
      { kernel: "sage3" },
      RangeError,
      'kernel must be one of "auto", "flash", "sage1", "sage1-int8", "sage2"',
      '"sage3"',
    ],
    [{ kernel: 1 }, TypeError, "kernel must be one of", "current value is 1"],
    [{ causal: 1 }, TypeError, "causal must be a boolean", "current value is 1"],
    [{ smoothK: "yes" }, TypeError, "smoothK must be a boolean", '"yes"'],
    [{ returnLse: null }, TypeError, "returnLse must be a boolean", "null"],
    [{ scale: 0 }, RangeError, "scale must be a positive", "current value is 0"],
    [{ scale: -1 }, RangeError, "scale must be a positive", "current value is -1"],
    [{ scale: NaN }, RangeError, "scale must be a positive", "NaN"],
    [{ scale: Infinity }, RangeError, "scale must be a positive", "Infinity"],
    [{ scale: 1e-60 }, RangeError, "scale must be positive in single precision", "1e-60"],
    [{ scale: "1" }, TypeError, "scale must be a positive", '"1"'],
    [
      { granularity: "tensor" },
      RangeError,
      'granularity must be one of "token", "block", "warp", "thread"',
      '"tensor"',
    ],
    [{ granularity: "channel" }, RangeError, "granularity must be one of", '"channel"'],
    [{ outDtype: "i8" }, RangeError, 'outDtype must be one of "f32", "f16", "bf16"', '"i8"'],
    [
      { pvAccumulator: "bf16", kernel: "sage1" },
      RangeError,
      'pvAccumulator must be one of "f32", "f16"',
      '"bf16"',
    ],
    [
      { pvAccumulator: "f16", kernel: "sage2" },
      TypeError,
      'kernel with pvAccumulator must be "sage1"',
      '"sage2"',
    ],
    [{ pvAccumulator: "f16" }, TypeError, 'kernel with pvAccumulator must be "sage1"', '"auto"'],
    [
      { pvRange: 100, kernel: "sage2++" },
      RangeError,
      "pvRange must be one of 448, 224, 112",
      "100",
    ],
    [
      { pvRange: 112, kernel: "sage2" },
      TypeError,
      'kernel with pvRange must be "sage2++"',
      '"sage2"',
    ],
    [
      { kernel: "flash", smoothK: true },
      TypeError,
      'smoothK with kernel "flash" must be absent',
      "true",
    ],
    [
      { kernel: "flash", granularity: "token" },
      TypeError,
      'granularity with kernel "flash" must be absent',
    ],
    [{ out: 5 }, TypeError, "out must be a Tensor", "5"],
    ["fast", TypeError, "options must be an object", '"fast"'],
    [null, TypeError, "options must be an object", "null"],
  ] as [unknown, typeof TypeError, ...string[]][]).flatMap(([options, error, ...says]): Case[] => [
    {
      name: `attention() with ${JSON.stringify(options)}`,
      act: (_, x) => attention(x, x, x, options as Anything),
      error,
      says,
    },
    {
      name: `explain() with ${JSON.stringify(options)}`,
      act: (_, x) => explain(x, x, x, options as Anything),
      error,
      says,
    },
  ]),
  {
    name: "flashAttention() with a kernel",
    act: (_, x) => flashAttention(x, x, x, { kernel: "sage1" } as Anything),
    error: TypeError,
    says: ['no property "kernel"'],
  },
  {
    name: "explain() of a plan without a device",
    act: () => {
      const spec = { shape: [1, 1, 1, 1], dtype: "f16" } as const;
      return explain(spec, spec, spec);
    },
    error: TypeError,
    says: ["device must be a Device", "undefined"],
  },
  {
    name: "explain() of nothing",
    act: (device, x) => explain(x, 5 as Anything, x, { device }),
    error: TypeError,
    says: ["k must be a Tensor or its shape and dtype", "5"],
  },

  // ---- smooth, quantize and dequantize
  {
    name: "smooth() of codes",
    act: (device) => use(device.empty(shape, { dtype: "e4m3" }), (y) => smooth(y)),
    error: RangeError,
    says: ["x.dtype must be one of", '"e4m3"'],
  },
  {
    name: "smooth() with no rows",
    act: (_, x) => smooth(x, { blockRows: 0 }),
    error: RangeError,
    says: ["blockRows must be a whole number from 1", "0"],
  },
  ...([
    [undefined, TypeError, "options must be an object", "undefined"],
    [{}, TypeError, 'operand must be one of "query", "key", "value"', "undefined"],
    [{ operand: "q" }, RangeError, "operand must be one of", '"q"'],
    [
      { operand: "key", dtype: "f16" },
      RangeError,
      'dtype must be one of "i8", "i4", "e4m3"',
      '"f16"',
    ],
    [{ operand: "value", granularity: "thread" }, RangeError, "granularity of values", '"thread"'],
    [
      { operand: "key", granularity: "token", groupRows: 8 },
      TypeError,
      "groupRows",
      "must be absent",
    ],
    [{ operand: "key", granularity: "thread", groupRows: 12 }, RangeError, "a multiple of 8", "12"],
    [
      { operand: "key", granularity: "block", groupRows: 0 },
      RangeError,
      "groupRows must be a whole number from 1",
    ],
    [{ operand: "key", range: 9 }, TypeError, 'range with dtype "i8" must be absent', "9"],
    [
      { operand: "value", range: 449 },
      RangeError,
      "range must be a positive number up to 448",
      "449",
    ],
    [{ operand: "value", smooth: 1 }, TypeError, "smooth must be a boolean", "1"],
    [{ operand: "value", smoothing: true }, TypeError, 'no property "smoothing"'],
  ] as [unknown, typeof TypeError, ...string[]][]).map(([options, error, ...says]): Case => ({
    name: `quantize() with ${JSON.stringify(options)}`,
    act: (_, x) => quantize(x, options as Anything),
    error,
    says,
  })),
  {
    name: "dequantize() of a plain tensor",
    act: (_, x) => dequantize(x as Anything),
    error: TypeError,
    says: ["tensor must be a QuantizedTensor", "a Tensor"],
  },
  {
    name: "dequantize() of a disposed tensor",
    act: (_, x) => {
      const quantized = quantize(x, { operand: "key" });
      quantized.dispose();
      assert(quantized.disposed);
      return dequantize(quantized);
    },
    error: DisposedError,
    says: ["disposed"],
  },
  {
    name: "attentionQuantized() with operands mixed up",
    act: (_, x) => use(quantize(x, { operand: "key" }), (k) => attentionQuantized(k, k, x)),
    error: TypeError,
    says: ['q must be quantized with operand "query"', '"key"'],
  },
  {
    name: "attentionQuantized() with granularities mixed",
    act: (_, x) =>
      use(
        quantize(x, { operand: "query" }),
        (q) =>
          use(quantize(x, { operand: "key", granularity: "block" }), (k) =>
            attentionQuantized(q, k, x)),
      ),
    error: TypeError,
    says: ['granularity of k must equal that of q ("thread")', '"block"'],
  },
  {
    name: "attentionQuantized() without a kernel for the types",
    act: (_, x) =>
      use(
        quantize(x, { operand: "query", dtype: "i4" }),
        (q) =>
          use(quantize(x, { operand: "key", dtype: "i4" }), (k) => attentionQuantized(q, k, x)),
      ),
    error: TypeError,
    says: ["no kernel takes i4 queries and keys with unquantized values", "i4 with e4m3"],
  },
  {
    name: "attentionQuantized() with another kernel than the types say",
    act: (_, x) =>
      use(
        quantize(x, { operand: "query" }),
        (q) =>
          use(quantize(x, { operand: "key" }), (k) =>
            attentionQuantized(q, k, x, { kernel: "sage2" })),
      ),
    error: TypeError,
    says: ["kernel for i8 queries and keys with unquantized values must be sage1", '"sage2"'],
  },
  {
    name: "sage2++ with values of full range",
    act: (_, x) =>
      use(
        quantize(x, { operand: "query" }),
        (q) =>
          use(quantize(x, { operand: "key" }), (k) =>
            use(quantize(x, { operand: "value" }), (v) =>
              attentionQuantized(q, k, v, { kernel: "sage2++" }))),
      ),
    error: TypeError,
    says: ["range of v for kernel sage2++ must be 2.25, 4.5 or 9", "448"],
  },

  // ---- devices and helpers
  ...([["gpu", RangeError], ["cuda:", RangeError], ["cuda:-1", RangeError], ["cpu:0", RangeError], [
    "",
    RangeError,
  ], [
    3,
    TypeError,
  ]] as const).map(([name, error]): Case => ({
    name: `device ${JSON.stringify(name)}`,
    act: () => Device.open(name as Anything),
    error,
    says: ['name must be "auto", "cpu", "cuda" or "cuda:N"', JSON.stringify(name)],
  })),
  {
    name: "a CUDA device that is not there",
    act: () => Device.open("cuda:99"),
    error: NoDeviceError,
    says: ["Cannot "],
  },
  {
    name: "cosine() of other lengths",
    act: () => cosine([1], [1, 2]),
    error: RangeError,
    says: ["(2)", "1"],
  },
  {
    name: "relativeL1() of other lengths",
    act: () => relativeL1([1], []),
    error: RangeError,
    says: ["(0)"],
  },
  {
    name: "rmse() of nothing",
    act: () => rmse([], []),
    error: RangeError,
    says: ["must not be 0"],
  },
  {
    name: "toFloat32() of another array",
    act: () => toFloat32(new Float32Array(1), "bf16"),
    error: TypeError,
    says: ["data must be a Uint16Array"],
  },
  {
    name: "fromFloat32() to codes",
    act: () => fromFloat32([1], "i8" as Anything),
    error: RangeError,
    says: ["dtype must be one of", '"i8"'],
  },
];

for (const { name, act, error, says } of cases) {
  deviceTest(`A bad call is refused: ${name}`, async (device) => {
    using x = device.tensor(new Float16Array(2048).fill(1), shape);
    const before = device.memory();
    const thrown = await assertRejects(async () => await act(device, x)) as Error;
    assertInstanceOf(thrown, error);
    for (const part of says) assertStringIncludes(thrown.message, part);
    const after = device.memory();
    assertEquals([after.allocations, after.streams], [before.allocations, before.streams]);
    assertEquals(await x.data(), new Float16Array(2048).fill(1));
    await assertWorks(device);
  });
}

deviceTest("Native errors say where they were noticed", (device) => {
  const error = assertThrows(() => device.empty([1, 1, 2 ** 40, 64])) as SageError;
  assertEquals(error.code, "out-of-memory");
  assert(/^cuda\/.+:\d+$/.test(String(error.cause)), String(error.cause));
});

deviceTest("Shared and resizable buffers are copied as they stand", async (device) => {
  const shared = new Float32Array(new SharedArrayBuffer(32, { maxByteLength: 64 })).fill(3);
  using a = device.tensor(shared, [1, 1, 2, 4]);
  shared.fill(4);
  assertEquals(await a.data(), new Float32Array(8).fill(3));
  const resizable = new Float32Array(new ArrayBuffer(32, { maxByteLength: 64 })).fill(5);
  using b = device.tensor(resizable, [1, 1, 2, 4]);
  (resizable.buffer as ArrayBuffer).resize(0);
  assertEquals(await b.data(), new Float32Array(8).fill(5));
});
