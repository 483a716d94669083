// Tensors that cannot be made, written, viewed or used any more, and errors that say so.
import { assert, assertEquals, assertThrows } from "@std/assert";
import {
  attention,
  dequantize,
  Device,
  DisposedError,
  OutOfMemoryError,
  quantize,
  type SageError,
} from "../mod.ts";
import { deviceTest } from "./devices.ts";
import { type Case, type ErrorClass, length, type Loose, refuses, worksStill } from "./refusals.ts";

// ---- shapes -------------------------------------------------------------------------------------------

const fourDimensions =
  "Cannot make a tensor as shape must have 4 dimensions, [batch, heads, tokens, channels]: current value is";

refuses("the shape of a tensor", [
  ...([[], [2, 16, 8], [1, 1, 2, 16, 8]] as Loose[]).flatMap((shape): Case[] =>
    (["tensor", "empty"] as const).map((method) => ({
      name: `${method}() of ${shape.length} dimensions`,
      call: ({ device }) =>
        method === "empty" ? device.empty(shape) : device.tensor(new Float32Array(length), shape),
      error: TypeError,
      says: [`${fourDimensions} [${shape.join(", ")}].`],
    }))
  ),
  ...([
    [undefined, "undefined"],
    [null, "null"],
    [4, "4"],
    ["1,2,16,8", `"1,2,16,8"`],
    [new Int32Array([1, 2, 16, 8]), "an Int32Array"],
    [{ length: 4 }, "an Object"],
  ] as [Loose, string][]).map(([shape, shown]): Case => ({
    name: `shape ${shown}`,
    call: ({ device }) => device.empty(shape),
    error: TypeError,
    says: [`${fourDimensions} ${shown}.`],
  })),
  ...[0, 1, 2, 3].flatMap((at): Case[] =>
    ([
      [0, RangeError, "0"],
      [-1, RangeError, "-1"],
      [1.5, RangeError, "1.5"],
      [NaN, RangeError, "NaN"],
      [Infinity, RangeError, "Infinity"],
      [2 ** 53, RangeError, "9007199254740992"],
      ["8", TypeError, `"8"`],
      [8n, TypeError, "8n"],
      [undefined, TypeError, "undefined"],
    ] as [Loose, ErrorClass, string][]).map(([value, error, shown]) => ({
      name: `shape[${at}] = ${shown}`,
      call: ({ device }) => {
        const shape = [1, 2, 16, 8];
        shape[at] = value;
        return device.empty(shape);
      },
      error,
      says: [`shape[${at}] must be a whole number from 1 to 2^53 - 1: current value is ${shown}.`],
    }))
  ),
  ...[
    [2 ** 52, 2 ** 52, 2 ** 52, 2 ** 52],
    [2 ** 40, 2 ** 40, 2 ** 40, 64],
    [2 ** 32, 2 ** 32, 1, 1],
    [2 ** 16, 2 ** 16, 2 ** 16, 2 ** 16],
    [1, 1, 2 ** 53 - 1, 256],
    [1, 1, 2 ** 53 - 1, 1],
  ].map((shape): Case => ({
    name: `shape [${shape}], beyond 2^53 bytes`,
    call: ({ device }) => device.empty(shape),
    error: RangeError,
    says: [
      `Cannot make a tensor as shape must hold less than 2^53 bytes: current value is [${
        shape.join(", ")
      }].`,
    ],
  })),
]);

// ---- host arrays --------------------------------------------------------------------------------------

const anyArray = "data must be a Float32Array, Float16Array, Uint16Array, Int8Array or Uint8Array";
const sameArray = `data must be a Float32Array for dtype "f32"`;

/** Arrays that tensor() and write() must refuse alike: of another length, and none that can be read. */
const misfits: [string, () => Loose, ErrorClass, string][] = [
  ...([
    ["one too short", () => new Float32Array(length - 1), length - 1],
    ["one too long", () => new Float32Array(length + 1), length + 1],
    ["an empty one", () => new Float32Array(0), 0],
    ["a shared one too short", () => new Float32Array(new SharedArrayBuffer(4)), 1],
    ["one whose buffer shrank", () => {
      const buffer = new ArrayBuffer(4 * length, { maxByteLength: 8 * length });
      const data = new Float32Array(buffer, 0, length);
      buffer.resize(4);
      return data;
    }, 0],
    ["one that follows a buffer that shrank", () => {
      const buffer = new ArrayBuffer(4 * length, { maxByteLength: 4 * length });
      const data = new Float32Array(buffer);
      buffer.resize(8);
      return data;
    }, 2],
    ["one that follows a buffer that grew", () => {
      const buffer = new ArrayBuffer(4 * length, { maxByteLength: 8 * length });
      const data = new Float32Array(buffer);
      buffer.resize(8 * length);
      return data;
    }, 2 * length],
  ] as [string, () => Loose, number][]).map(([name, data, found]): typeof misfits[number] => [
    name,
    data,
    RangeError,
    `data.length must be ${length}, as the shape says: current value is ${found}.`,
  ]),
  [
    "a detached one",
    () => {
      const data = new Float32Array(length);
      data.buffer.transfer();
      return data;
    },
    TypeError,
    "data must not be detached: current value is a Float32Array.",
  ],
];

/** What is no array of numbers that a tensor can hold, and how errors show it. */
const others: [string, () => Loose, string][] = [
  ["double precision", () => new Float64Array(length), "a Float64Array"],
  ["two plain numbers", () => [1, 2], "[1, 2]"],
  ["many plain numbers", () => new Array(length).fill(1), `[${"1, ".repeat(8)}...]`],
  ["a buffer", () => new ArrayBuffer(4 * length), "an ArrayBuffer"],
  ["a view of a buffer", () => new DataView(new ArrayBuffer(4 * length)), "a DataView"],
  ["nothing", () => undefined, "undefined"],
];

refuses("arrays that do not fit", [
  ...misfits.flatMap(([name, data, error, says]): Case[] => [
    {
      name: `tensor() of ${name}`,
      call: ({ device }) => device.tensor(data(), [1, 2, 16, 8]),
      error,
      says: [`Cannot make a tensor as ${says}`],
    },
    {
      name: `write() of ${name}`,
      call: ({ q }) => q.write(data()),
      error,
      says: [`Cannot write a tensor as ${says}`],
    },
  ]),
  ...others.flatMap(([name, data, shown]): Case[] => [
    {
      name: `tensor() of ${name}`,
      call: ({ device }) => device.tensor(data(), [1, 2, 16, 8]),
      error: TypeError,
      says: [`Cannot make a tensor as ${anyArray}: current value is ${shown}.`],
    },
    {
      name: `write() of ${name}`,
      call: ({ q }) => q.write(data()),
      error: TypeError,
      says: [`Cannot write a tensor as ${sameArray}: current value is ${shown}.`],
    },
  ]),
  {
    name: "tensor() of one too long, f16",
    call: ({ device }) => device.tensor(new Float16Array(513), [1, 1, 8, 64]),
    error: RangeError,
    says: ["data.length must be 512, as the shape says: current value is 513."],
  },
  {
    name: "write() of one too short, f16",
    call: ({ make }) => make([1, 4, 8, 64], { dtype: "f16" }).write(new Float16Array(5)),
    error: RangeError,
    says: ["data.length must be 2048, as the shape says: current value is 5."],
  },
  {
    name: "write() of a transferred one, f16",
    call: ({ make }) => {
      const data = new Float16Array(2048);
      structuredClone(data.buffer, { transfer: [data.buffer] });
      make([1, 4, 8, 64], { dtype: "f16" }).write(data);
    },
    error: TypeError,
    says: ["Cannot write a tensor as data must not be detached: current value is a Float16Array."],
  },
]);

refuses("arrays of another element type", [
  ...([
    ["f16", new Float32Array(length), "Float16Array", "a Float32Array"],
    ["bf16", new Float16Array(length), "Uint16Array", "a Float16Array"],
    ["f32", new Uint16Array(length), "Float32Array", "an Uint16Array"],
    ["i8", new Uint8Array(length), "Int8Array", "an Uint8Array"],
    ["i4", new Int8Array(length / 2), "Uint8Array", "an Int8Array"],
    ["e4m3", new Float32Array(length), "Uint8Array", "a Float32Array"],
  ] as [string, Loose, string, string][]).map(([dtype, data, expected, found]): Case => ({
    name: `${found} for ${dtype}`,
    call: ({ device }) => device.tensor(data, [1, 2, 16, 8], { dtype } as Loose),
    error: TypeError,
    says: [`data must be a ${expected} for dtype "${dtype}": current value is ${found}.`],
  })),
  ...([
    [new Uint16Array(length), `Uint16Array must be given as "bf16" or "f16"`],
    [new Uint8Array(length), `Uint8Array must be given as "i4", "e4m3" or "bool"`],
  ] as [Loose, string][]).map(([data, choices]): Case => ({
    name: `${data.constructor.name} without a dtype`,
    call: ({ device }) => device.tensor(data, [1, 2, 16, 8]),
    error: TypeError,
    says: [`dtype for an ${choices}: current value is undefined.`],
  })),
  {
    name: "an i4 array without the padding of odd rows",
    call: ({ device }) => device.tensor(new Uint8Array(2 * 3), [1, 1, 2, 7], { dtype: "i4" }),
    error: RangeError,
    says: ["data.length must be 8, as the shape says: current value is 6."],
  },
]);

deviceTest("shared and resizable buffers are copied as they stand", async (device) => {
  const part = new Float32Array(new SharedArrayBuffer(4 * 6), 8, 4);
  part.set([0, 1, 2, 3]);
  using fromPart = device.tensor(part, [1, 1, 2, 2]);
  part.fill(9);
  assertEquals(await fromPart.data(), Float32Array.of(0, 1, 2, 3));

  const growable = new Float32Array(new SharedArrayBuffer(32, { maxByteLength: 64 })).fill(3);
  using fromGrowable = device.tensor(growable, [1, 1, 2, 4]);
  growable.fill(4);
  assertEquals(await fromGrowable.data(), new Float32Array(8).fill(3));

  const buffer = new ArrayBuffer(4 * 6, { maxByteLength: 4 * 64 });
  const window = new Float32Array(buffer, 8, 4);
  window.set([4, 5, 6, 7]);
  using fromWindow = device.tensor(window, [1, 1, 2, 2]);
  buffer.resize(0);
  fromPart.write(Float32Array.of(8, 8, 8, 8));
  assertEquals(await fromWindow.data(), Float32Array.of(4, 5, 6, 7));
  assertEquals(await fromPart.data(), Float32Array.of(8, 8, 8, 8));

  const resizable = new ArrayBuffer(32, { maxByteLength: 64 });
  using fromResizable = device.tensor(new Float32Array(resizable).fill(5), [1, 1, 2, 4]);
  resizable.resize(0);
  assertEquals(await fromResizable.data(), new Float32Array(8).fill(5));

  const detached = new Float32Array([1, 2, 3, 4]);
  using early = device.tensor(detached, [1, 1, 2, 2]);
  detached.buffer.transfer(); // after the call: it must not matter
  assertEquals(await early.data(), Float32Array.of(1, 2, 3, 4));
});

// ---- views --------------------------------------------------------------------------------------------

refuses("views of a tensor", [
  ...([
    [{ tokens: [0, 17] }, RangeError, "tokens[1]", 1, 16, "17"],
    [{ tokens: [4, 17] }, RangeError, "tokens[1]", 5, 16, "17"],
    [{ tokens: [16, 17] }, RangeError, "tokens[0]", 0, 15, "16"],
    [{ tokens: [3, 3] }, RangeError, "tokens[1]", 4, 16, "3"],
    [{ heads: [1, 1] }, RangeError, "heads[1]", 2, 2, "1"],
    [{ heads: [-1, 1] }, RangeError, "heads[0]", 0, 1, "-1"],
    [{ batch: [0, 0.5] }, RangeError, "batch[1]", 1, 1, "0.5"],
    [{ batch: [0, "1"] }, TypeError, "batch[1]", 1, 1, `"1"`],
    [{ heads: [0, undefined] }, TypeError, "heads[1]", 1, 2, "undefined"],
  ] as [Loose, ErrorClass, string, number, number, string][]).map((
    [ranges, error, bound, from, to, shown],
  ): Case => ({
    name: `view(), ${bound} = ${shown} in ${JSON.stringify(ranges)}`,
    call: ({ q }) => q.view(ranges),
    error,
    says: [
      `Cannot view a tensor as ${bound} must be a whole number from ${from} to ${to}: ` +
      `current value is ${shown}.`,
    ],
  })),
  ...([
    [5, "5"],
    [null, "null"],
    ["heads", `"heads"`],
    [{}, "an Object"],
    [[0], "[0]"],
    [[0, 1, 2], "[0, 1, 2]"],
  ] as [Loose, string][]).map(([heads, shown]): Case => ({
    name: `view() with heads ${shown}`,
    call: ({ q }) => q.view({ heads }),
    error: TypeError,
    says: [`Cannot view a tensor as heads must be [from, to]: current value is ${shown}.`],
  })),
  {
    name: "view() of channels",
    call: ({ q }) => q.view({ channels: [0, 1] } as Loose),
    error: TypeError,
    says: [
      `Cannot view a tensor as options must have no property "channels": ` +
      `known options are "batch", "heads", "tokens".`,
    ],
  },
]);

// ---- what was disposed --------------------------------------------------------------------------------

const gone = "Cannot use a tensor that was disposed.";

refuses("disposed tensors and devices", [
  ...[0, 1, 2].map((at): Case => ({
    name: `${["q", "k", "v"][at]} is a view that was disposed`,
    call: ({ q, k, v, make }) => {
      const all: Loose[] = [q, k, v];
      all[at] = make([1, 2, 16, 8]).view({});
      all[at].dispose();
      return attention(all[0], all[1], all[2]);
    },
    error: DisposedError,
    says: [gone],
  })),
  {
    name: "a tensor that was disposed twice",
    call: ({ q, v, device }) => {
      const k = device.empty([1, 2, 16, 8]);
      k.dispose();
      k.dispose(); // again: nothing happens
      return attention(q, k, v);
    },
    error: DisposedError,
    says: [gone],
  },
  {
    name: "out was disposed",
    call: ({ q, k, v, make }) => {
      const out = make([1, 2, 16, 8]).view({});
      out.dispose();
      return attention(q, k, v, { out });
    },
    error: DisposedError,
    says: [gone],
  },
  {
    name: "the device of q was disposed",
    call: ({ device }) => {
      const other = Device.open(device.name as "cpu"), x = other.empty([1, 2, 16, 8]);
      other.dispose();
      other.dispose(); // again: nothing happens
      assert(x.disposed);
      return attention(x, x, x);
    },
    error: DisposedError,
    says: ["Cannot use a tensor whose device was disposed."],
  },
  {
    name: "a device that was disposed",
    call: ({ device }) => {
      const other = Device.open(device.name as "cpu");
      other.dispose();
      return other.empty([1, 2, 16, 8]);
    },
    error: DisposedError,
    says: ["Cannot use a device that was disposed."],
  },
  {
    name: "a quantized tensor that was disposed",
    call: ({ q }) => {
      const packed = quantize(q, { operand: "query" });
      packed.dispose();
      assert(packed.disposed);
      return dequantize(packed);
    },
    error: DisposedError,
    says: [gone],
  },
]);

// ---- memory -------------------------------------------------------------------------------------------

refuses("more memory than there is", [
  ...[2 ** 46, 2 ** 52, 2 ** 53 - 64].map((bytes): Case => ({
    name: `${bytes} bytes`,
    call: ({ device }) => device.empty([1, 1, bytes / 64, 64], { dtype: "e4m3" }),
    error: OutOfMemoryError,
    says: ["Cannot ", `${bytes}`],
  })),
  {
    name: "2^48 bytes of f32",
    call: ({ device }) => device.empty([1, 1, 2 ** 40, 64]),
    error: OutOfMemoryError,
    says: ["Cannot ", `${2 ** 48}`],
  },
]);

deviceTest("after too large a request the next small call works", async (device) => {
  for (let i = 0; i < 3; ++i) {
    let code = "";
    try {
      device.empty([1, 1, 2 ** 40, 64], { dtype: "e4m3" });
    } catch (error) {
      code = (error as SageError).code;
    }
    assertEquals(code, "out-of-memory");
    await worksStill(device);
  }
});

deviceTest("native errors say where they were noticed", (device) => {
  const error = assertThrows(() => device.empty([1, 1, 2 ** 40, 64])) as SageError;
  assertEquals(error.code, "out-of-memory");
  assert(/^cuda\/.+:\d+$/.test(String(error.cause)), String(error.cause));
});
