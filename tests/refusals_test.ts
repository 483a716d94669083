// Refusals, case by case: the right error before anything runs, and nothing lost or left behind.
import { assert, assertEquals, assertStringIncludes } from "@std/assert";
import {
  attention,
  attentionQuantized,
  dequantize,
  Device,
  DisposedError,
  explain,
  flashAttention,
  NoDeviceError,
  OutOfMemoryError,
  quantize,
  type QuantizedTensor,
  SageError,
  smooth,
  type Tensor,
  UnsupportedError,
} from "../mod.ts";
import { deviceNames, deviceTest } from "./devices.ts";

// deno-lint-ignore no-explicit-any
type Loose = any; // arguments that the types forbid

/** What a case may use. */
interface Fixture {
  device: Device;
  /** [1, 2, 16, 8] of f32, all ones. */
  q: Tensor<"f32">;
  k: Tensor<"f32">;
  v: Tensor<"f32">;
  /** A tensor that lives until the case is over. */
  make(shape: readonly number[], options?: Loose): Tensor<Loose>;
  /** A quantized tensor that lives as long. */
  pack(x: Tensor, options: Loose): QuantizedTensor;
}

type ErrorClass = new (...args: Loose[]) => Error;

/** A call that must be refused, the class of the error, and what its message must say. */
interface Case {
  name: string;
  call: (fixture: Fixture) => unknown;
  error: ErrorClass;
  says: string[];
}

const length = 2 * 16 * 8;

/** Attention over one key gives its value, exactly; the smallest call that shows the device still works. */
async function worksStill(device: Device): Promise<void> {
  using q = device.tensor(new Float16Array(2 * 16 * 64).fill(1), [1, 2, 16, 64]);
  using v = device.tensor(new Float16Array(2 * 16 * 64).fill(3), [1, 2, 16, 64]);
  using o = flashAttention(q, q, v);
  assertEquals(await o.data(), new Float16Array(2 * 16 * 64).fill(3));
}

function fixtureOf(device: Device): Fixture & Disposable {
  const made: Disposable[] = [];
  const keep = <T extends Disposable>(one: T): T => {
    made.push(one);
    return one;
  };
  const ones = () =>
    keep(device.tensor(new Float32Array(length).fill(1), [1, 2, 16, 8])) as Tensor<"f32">;
  return {
    device,
    q: ones(),
    k: ones(),
    v: ones(),
    make: (shape, options) => keep(device.empty(shape, options)),
    pack: (x, options) => keep(quantize(x, options)),
    [Symbol.dispose]() {
      for (const one of made) one[Symbol.dispose]();
    },
  };
}

function refuses(title: string, cases: readonly Case[]): void {
  deviceTest(`bad input: ${title}`, async (device) => {
    for (const { name, call, error, says } of cases) {
      using fixture = fixtureOf(device);
      const before = device.memory();
      let thrown: unknown;
      let returned: unknown;
      try {
        returned = await call(fixture);
      } catch (caught) {
        thrown = caught;
      }
      assert(thrown !== undefined, `${name}: nothing was refused, but ${returned} returned`);
      assert(
        thrown instanceof error && thrown.constructor === error,
        `${name}: ${error.name} was expected, but there was ${thrown}`,
      );
      for (const words of says) assertStringIncludes(thrown.message, words, name);
      assert(thrown.message.endsWith("."), `${name}: no sentence: ${thrown.message}`);
      assertEquals(device.memory().streams, before.streams, name);
      await device.synchronize();
    }
    await worksStill(device);
  });
}

/** Cases of one call each that must allocate nothing and leave the fixture's tensors as they are. */
function refusesCleanly(title: string, cases: readonly Case[]): void {
  refuses(
    title,
    cases.map(({ call, ...rest }) => ({
      ...rest,
      call: async (fixture: Fixture) => {
        let { allocations, bytes } = fixture.device.memory();
        const recount = <T>(one: T): T => {
          ({ allocations, bytes } = fixture.device.memory());
          return one;
        };
        try {
          return await call({
            ...fixture,
            make: (...args) => recount(fixture.make(...args)),
            pack: (...args) => recount(fixture.pack(...args)),
          });
        } finally {
          const after = fixture.device.memory();
          assertEquals(
            { allocations: after.allocations, bytes: after.bytes },
            { allocations, bytes },
            `${rest.name} left an allocation behind`,
          );
          const [q, v] = [await fixture.q.data(), await fixture.v.data()];
          assertEquals(q, new Float32Array(length).fill(1), `${rest.name} changed q`);
          assertEquals(v, new Float32Array(length).fill(1), `${rest.name} changed v`);
        }
      },
    })),
  );
}

// ---- shapes -------------------------------------------------------------------------------------------

const wrongRanks: readonly [string, Loose][] = [
  ["none", []],
  ["three", [2, 16, 8]],
  ["five", [1, 1, 2, 16, 8]],
];

refusesCleanly("ranks and lengths of a tensor", [
  ...wrongRanks.flatMap(([name, shape]): Case[] =>
    (["tensor", "empty"] as const).map((method) => ({
      name: `${method}() of ${name} dimensions`,
      call: ({ device }) =>
        method === "empty"
          ? device.empty(shape)
          : device.tensor(new Float32Array(length) as Loose, shape),
      error: TypeError,
      says: ["Cannot make a tensor", "4 dimensions", `current value is [${shape.join(", ")}]`],
    }))
  ),
  ...[undefined, null, 4, "1,2,16,8", new Int32Array([1, 2, 16, 8]), { length: 4 }].map((
    shape,
  ): Case => ({
    name: `shape ${shape}`,
    call: ({ device }) => device.empty(shape as Loose),
    error: TypeError,
    says: ["Cannot make a tensor as shape must have 4 dimensions", "current value is"],
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
      says: [`shape[${at}] must be a whole number from 1 to 2^53 - 1: current value is ${shown}`],
    }))
  ),
  ...[
    [2 ** 52, 2 ** 52, 2 ** 52, 2 ** 52],
    [2 ** 32, 2 ** 32, 1, 1],
    [2 ** 16, 2 ** 16, 2 ** 16, 2 ** 16],
    [1, 1, 2 ** 53 - 1, 256],
    [1, 1, 2 ** 53 - 1, 1],
  ].map((shape): Case => ({
    name: `shape [${shape}], beyond 2^53 bytes`,
    call: ({ device }) => device.empty(shape),
    error: RangeError,
    says: ["Cannot make a tensor as shape must", `current value is [${shape.join(", ")}]`],
  })),
]);

interface Shapes {
  q?: number[];
  k?: number[];
  v?: number[];
}

const mismatches: [string, Shapes, string[]][] = [
  ["batch of k", { k: [2, 2, 16, 8] }, ["batch of k must equal batch of q (1)", "value is 2"]],
  ["batch of v", { v: [3, 2, 16, 8] }, ["batch of v must equal batch of q (1)", "value is 3"]],
  ["channels of k", { k: [1, 2, 16, 9] }, [
    "channels of k must equal channels of q (8)",
    "current value is 9",
  ]],
  ["heads of v", { v: [1, 1, 16, 8] }, ["heads of v must equal heads of k (2)", "value is 1"]],
  ["tokens of v", { v: [1, 2, 15, 8] }, ["tokens of v must equal tokens of k (16)", "is 15"]],
  ["heads of q", { q: [1, 3, 16, 8] }, [
    "heads of q must be a multiple of heads of k (2)",
    "current value is 3",
  ]],
  ["fewer heads of q than of k", { q: [1, 1, 16, 8] }, [
    "heads of q must be a multiple of heads of k (2)",
    "current value is 1",
  ]],
  ["257 channels", { q: [1, 2, 16, 257], k: [1, 2, 16, 257] }, [
    "channels of q must be at most 256",
    "current value is 257",
  ]],
  ["257 channels of v", { v: [1, 2, 16, 257] }, [
    "channels of v must be at most 256",
    "current value is 257",
  ]],
];

refusesCleanly(
  "shapes that do not belong together",
  mismatches.flatMap(([name, shapes, says]): Case[] => {
    const q = shapes.q ?? [1, 2, 16, 8], k = shapes.k ?? [1, 2, 16, 8];
    const v = shapes.v ?? [1, 2, 16, 8];
    const float =
      (call: (q: Tensor, k: Tensor, v: Tensor) => unknown): Case["call"] => ({ make }) =>
        call(make(q), make(k), make(v));
    return [
      { name: `attention(), ${name}`, call: float((q, k, v) => attention(q, k, v)) },
      { name: `flashAttention(), ${name}`, call: float((q, k, v) => flashAttention(q, k, v)) },
      { name: `explain(), ${name}`, call: float((q, k, v) => explain(q, k, v)) },
      {
        name: `explain() of shapes, ${name}`,
        call: ({ device }: Fixture) => {
          const [a, b, c] = [q, k, v].map((shape) => ({ shape, dtype: "f32" as const }));
          return explain(a, b, c, { device });
        },
      },
      {
        name: `attentionQuantized(), ${name}`,
        call: ({ make, pack }: Fixture) =>
          attentionQuantized(
            pack(make(q), { operand: "query" }),
            pack(make(k), { operand: "key" }),
            pack(make(v), { operand: "value" }),
          ),
      },
    ] // Quantizers on CUDA refuse 257 channels before attention can: below.
      .filter((one) => !one.name.startsWith("attentionQuantized(), 257"))
      .map((one) => ({ ...one, error: RangeError, says }));
  }),
);

deviceTest(
  "quantize() and smooth() take 257 channels on the CPU, and say so elsewhere",
  (device) => {
    using x = device.empty([1, 1, 8, 257], { dtype: "f16" });
    const calls = [() => quantize(x, { operand: "key" }), () => smooth(x)];
    for (const call of calls) {
      if (device.kind === "cpu") {
        using _ = call();
        continue;
      }
      let error: unknown;
      try {
        call();
      } catch (thrown) {
        error = thrown;
      }
      assert(error instanceof UnsupportedError);
      assertStringIncludes(error.message, "at most 256 on a CUDA device: current value is 257");
    }
  },
);

refusesCleanly("what is no tensor", [
  ...[undefined, null, 1, "q", {}, [], new Float32Array(8)].flatMap((wrong): Case[] =>
    [0, 1, 2].map((at) => ({
      name: `${["q", "k", "v"][at]} = ${wrong}`,
      call: ({ q, k, v }) => {
        const all: Loose[] = [q, k, v];
        all[at] = wrong;
        return attention(all[0], all[1], all[2]);
      },
      error: TypeError,
      says: [`Cannot run attention as ${["q", "k", "v"][at]} must be a Tensor`, "current value is"],
    }))
  ),
  ...([
    ["smooth", "x", (x) => smooth(x)],
    ["quantize", "x", (x) => quantize(x, { operand: "query" })],
    ["dequantize", "tensor", (x) => dequantize(x)],
    ["attentionQuantized q", "q", (x) => attentionQuantized(x, x, x)],
  ] as [string, string, (x: Loose) => unknown][]).map(([name, what, call]): Case => ({
    name,
    call: () => call({ shape: [1, 1, 1, 1] }),
    error: TypeError,
    says: [`${what} must be a`, "current value is an Object"],
  })),
  {
    name: "explain() of shapes without a device",
    call: () => {
      const spec = { shape: [1, 2, 16, 8], dtype: "f32" } as const;
      return explain(spec, spec, spec);
    },
    error: TypeError,
    says: ["device must be a Device", "current value is undefined"],
  },
]);

// ---- element types and devices ------------------------------------------------------------------------

refusesCleanly("mixed element types", [
  ...["k", "v"].flatMap((name): Case[] =>
    ["f16", "bf16", "i8", "e4m3"].map((dtype) => ({
      name: `${name} of ${dtype}`,
      call: ({ q, k, v, make }) => {
        const other = make([1, 2, 16, 8], { dtype });
        return attention(q, name === "k" ? other : k, name === "v" ? other : v);
      },
      error: TypeError,
      says: [`${name}.dtype must equal q.dtype ("f32")`, `current value is "${dtype}"`],
    }))
  ),
  ...["i8", "i4", "e4m3"].flatMap((dtype): Case[] => [
    {
      name: `attention of ${dtype}`,
      call: ({ make }) => {
        const x = make([1, 2, 16, 8], { dtype });
        return attention(x, x, x);
      },
      error: RangeError,
      says: [`q.dtype must be one of "f32", "f16", "bf16"`, `current value is "${dtype}"`],
    },
    {
      name: `smooth() of ${dtype}`,
      call: ({ make }) => smooth(make([1, 2, 16, 8], { dtype })),
      error: RangeError,
      says: [`x.dtype must be one of "f32", "f16", "bf16"`, `current value is "${dtype}"`],
    },
    {
      name: `quantize() of ${dtype}`,
      call: ({ make }) => quantize(make([1, 2, 16, 8], { dtype }), { operand: "key" }),
      error: RangeError,
      says: [`x.dtype must be one of "f32", "f16", "bf16"`, `current value is "${dtype}"`],
    },
    {
      name: `out of ${dtype}`,
      call: ({ q, k, v, make }) => attention(q, k, v, { out: make([1, 2, 16, 8], { dtype }) }),
      error: RangeError,
      says: [`out.dtype must be one of "f32", "f16", "bf16"`, `current value is "${dtype}"`],
    },
  ]),
]);

/** A tensor of another Device object, disposed after the call. */
function withStranger(name: string, call: (fixture: Fixture, stranger: Tensor) => unknown): Case[] {
  return deviceNames.map((deviceName) => ({
    name: `${name} of another device object, ${deviceName}`,
    call: (fixture) => {
      using other = Device.open(deviceName);
      using stranger = other.tensor(new Float32Array(length).fill(1), [1, 2, 16, 8]);
      return call(fixture, stranger);
    },
    error: TypeError,
    says: [
      `${name} must belong to the same Device object as the other tensors`,
      `current value is "${deviceName}"`,
    ],
  }));
}

refusesCleanly("mixed devices", [
  ...withStranger("k", ({ q, v }, other) => attention(q, other as Loose, v)),
  ...withStranger("v", ({ q, k }, other) => attention(q, k, other as Loose)),
  ...withStranger("out", ({ q, k, v }, out) => attention(q, k, v, { out: out as Loose })),
  ...withStranger("k", ({ q, v }, other) => explain(q, other as Loose, v)),
  {
    name: "quantized k of another device object",
    call: ({ q, v, pack }) => {
      const query = pack(q, { operand: "query" }), value = pack(v, { operand: "value" });
      using other = Device.open("cpu");
      using x = other.tensor(new Float32Array(length), [1, 2, 16, 8]);
      using key = quantize(x, { operand: "key" });
      return attentionQuantized(query, key, value);
    },
    error: TypeError,
    says: ["k must belong to the same Device object as the other tensors"],
  },
]);

refusesCleanly("operands of attentionQuantized()", [
  {
    name: "keys for queries",
    call: ({ q, v, pack }) =>
      attentionQuantized(pack(q, { operand: "key" }), pack(q, { operand: "key" }), v),
    error: TypeError,
    says: [`q must be quantized with operand "query"`, `current value is "key"`],
  },
  {
    name: "queries for keys",
    call: ({ q, v, pack }) =>
      attentionQuantized(pack(q, { operand: "query" }), pack(q, { operand: "query" }), v),
    error: TypeError,
    says: [`k must be quantized with operand "key"`, `current value is "query"`],
  },
  {
    name: "queries per channel",
    call: ({ q, k, v, pack }) =>
      attentionQuantized(
        pack(q, { operand: "query", granularity: "channel" }),
        pack(k, { operand: "key" }),
        v,
      ),
    error: TypeError,
    says: [`"token", "block", "warp" or "thread"`, `current value is "channel"`],
  },
  {
    name: "values per token",
    call: ({ q, k, v, pack }) =>
      attentionQuantized(
        pack(q, { operand: "query" }),
        pack(k, { operand: "key" }),
        pack(v, { operand: "value", granularity: "token" }),
      ),
    error: TypeError,
    says: [`v must be quantized with granularity "channel"`, `current value is "token"`],
  },
  {
    name: "other granularities",
    call: ({ q, k, v, pack }) =>
      attentionQuantized(
        pack(q, { operand: "query", granularity: "token" }),
        pack(k, { operand: "key", granularity: "block" }),
        pack(v, { operand: "value" }),
      ),
    error: TypeError,
    says: [`granularity of k must equal that of q ("token")`, `current value is "block"`],
  },
  {
    name: "other codes",
    call: ({ q, k, v, pack }) =>
      attentionQuantized(
        pack(q, { operand: "query", dtype: "i4" }),
        pack(k, { operand: "key" }),
        pack(v, { operand: "value" }),
      ),
    error: TypeError,
    says: [`dtype of k must equal that of q ("i4")`, `current value is "i8"`],
  },
  {
    name: "codes that no kernel takes",
    call: ({ q, k, v, pack }) =>
      attentionQuantized(
        pack(q, { operand: "query", dtype: "e4m3" }),
        pack(k, { operand: "key", dtype: "e4m3" }),
        pack(v, { operand: "value" }),
      ),
    error: TypeError,
    says: ["no kernel takes e4m3 queries and keys", "i8 with e4m3"],
  },
  {
    name: "a kernel for other codes",
    call: ({ q, k, v, pack }) =>
      attentionQuantized(
        pack(q, { operand: "query" }),
        pack(k, { operand: "key" }),
        pack(v, { operand: "value" }),
        { kernel: "sage2-int4" },
      ),
    error: TypeError,
    says: ["kernel for i8 queries and keys", "sage2", `current value is "sage2-int4"`],
  },
  {
    name: "sage2++ with values of the full range",
    call: ({ q, k, v, pack }) =>
      attentionQuantized(
        pack(q, { operand: "query" }),
        pack(k, { operand: "key" }),
        pack(v, { operand: "value" }),
        { kernel: "sage2++" },
      ),
    error: TypeError,
    says: ["range of v for kernel sage2++ must be 2.25, 4.5 or 9", "current value is 448"],
  },
  {
    name: "a pvRange that contradicts the values",
    call: ({ q, k, v, pack }) =>
      attentionQuantized(
        pack(q, { operand: "query" }),
        pack(k, { operand: "key" }),
        pack(v, { operand: "value", range: 9 }),
        { kernel: "sage2++", pvRange: 448 },
      ),
    error: TypeError,
    says: ["pvRange with range 9 of v must be 112", "current value is 448"],
  },
  ...[undefined, 1, {}, { smoothed: 1, mean: 2 }].map((wrong): Case => ({
    name: `v = ${wrong}`,
    call: ({ q, k, pack }) =>
      attentionQuantized(
        pack(q, { operand: "query" }),
        pack(k, { operand: "key" }),
        wrong as Loose,
      ),
    error: TypeError,
    says: ["v must be a QuantizedTensor, a Tensor or what smooth() returned", "current value is"],
  })),
]);

// ---- what was disposed --------------------------------------------------------------------------------

const gone = "Cannot use a tensor that was disposed.";

refusesCleanly("disposed tensors and devices", [
  ...[0, 1, 2].map((at): Case => ({
    name: `${["q", "k", "v"][at]} was disposed`,
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
    call: () => {
      const other = Device.open("cpu");
      const x = other.empty([1, 2, 16, 8]);
      other.dispose();
      return attention(x, x, x);
    },
    error: DisposedError,
    says: ["Cannot use a tensor whose device was disposed."],
  },
  {
    name: "a device that was disposed",
    call: () => {
      const other = Device.open("cpu");
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
      return dequantize(packed);
    },
    error: DisposedError,
    says: [gone],
  },
]);

// ---- host arrays --------------------------------------------------------------------------------------

/** Arrays that make() and write() must refuse alike. */
const arrays: [string, () => Loose, ErrorClass, string[]][] = [
  [
    "one too short",
    () => new Float32Array(length - 1),
    RangeError,
    ["data.length", `${length}`, `current value is ${length - 1}`],
  ],
  [
    "one too long",
    () => new Float32Array(length + 1),
    RangeError,
    ["data.length", `${length}`, `current value is ${length + 1}`],
  ],
  ["an empty one", () => new Float32Array(0), RangeError, ["data.length", "current value is 0"]],
  ["a shared one too short", () => new Float32Array(new SharedArrayBuffer(4)), RangeError, [
    "data.length",
    "current value is 1",
  ]],
  [
    "a detached one",
    () => {
      const data = new Float32Array(length);
      data.buffer.transfer();
      return data;
    },
    TypeError,
    ["data must not be detached"],
  ],
  [
    "one whose buffer shrank",
    () => {
      const buffer = new ArrayBuffer(4 * length, { maxByteLength: 8 * length });
      const data = new Float32Array(buffer, 0, length);
      buffer.resize(4);
      return data;
    },
    RangeError,
    ["data.length", `${length}`, "current value is 0"],
  ],
  [
    "one that follows its buffer's length",
    () => {
      const buffer = new ArrayBuffer(4 * length, { maxByteLength: 8 * length });
      const data = new Float32Array(buffer);
      buffer.resize(8 * length);
      return data;
    },
    RangeError,
    ["data.length", `current value is ${2 * length}`],
  ],
  ["double precision", () => new Float64Array(length), TypeError, [
    "data must be a Float32Array",
    "current value is a Float64Array",
  ]],
  ["plain numbers", () => new Array(length).fill(1), TypeError, [
    "data must be a Float32Array",
    "current value is [1",
  ]],
  ["a buffer", () => new ArrayBuffer(4 * length), TypeError, [
    "data must be a Float32Array",
    "current value is an ArrayBuffer",
  ]],
  ["a view of a buffer", () => new DataView(new ArrayBuffer(4 * length)), TypeError, [
    "data must be a Float32Array",
    "current value is a DataView",
  ]],
  ["nothing", () => undefined, TypeError, [
    "data must be a Float32Array",
    "current value is undefined",
  ]],
];

refusesCleanly(
  "arrays that do not fit",
  arrays.flatMap(([name, data, error, says]): Case[] => [
    {
      name: `tensor() of ${name}`,
      call: ({ device }) => device.tensor(data(), [1, 2, 16, 8]),
      error,
      says: ["Cannot make a tensor", ...says],
    },
    {
      name: `write() of ${name}`,
      call: ({ q }) => q.write(data()),
      error,
      says: ["Cannot write a tensor", ...says],
    },
  ]),
);

refusesCleanly("arrays of another element type", [
  ...([
    ["f16", new Float32Array(length), "Float16Array", "Float32Array"],
    ["bf16", new Float16Array(length), "Uint16Array", "Float16Array"],
    ["f32", new Uint16Array(length), "Float32Array", "Uint16Array"],
    ["i8", new Uint8Array(length), "Int8Array", "Uint8Array"],
    ["i4", new Int8Array(length / 2), "Uint8Array", "Int8Array"],
    ["e4m3", new Float32Array(length), "Uint8Array", "Float32Array"],
  ] as [string, Loose, string, string][]).map(([dtype, data, expected, found]): Case => ({
    name: `${found} for ${dtype}`,
    call: ({ device }) => device.tensor(data, [1, 2, 16, 8], { dtype } as Loose),
    error: TypeError,
    says: [`data must be a ${expected} for dtype "${dtype}"`, `current value is a`, found],
  })),
  ...([
    [new Uint16Array(length), `"bf16" or "f16"`],
    [new Uint8Array(length), `"i4" or "e4m3"`],
  ] as [Loose, string][]).map(([data, choices]): Case => ({
    name: `${data.constructor.name} without a dtype`,
    call: ({ device }) => device.tensor(data, [1, 2, 16, 8]),
    error: TypeError,
    says: ["dtype for", `be given as ${choices}`, "current value is undefined"],
  })),
  {
    name: "an i4 array without the padding of odd rows",
    call: ({ device }) => device.tensor(new Uint8Array(2 * 3), [1, 1, 2, 7], { dtype: "i4" }),
    error: RangeError,
    says: ["data.length must be 8", "current value is 6"],
  },
]);

deviceTest("shared and growable buffers are copied as they stand", async (device) => {
  const shared = new Float32Array(new SharedArrayBuffer(4 * 6), 8, 4).map((_, i) => i);
  const sharedView = new Float32Array(new SharedArrayBuffer(4 * 6), 8, 4);
  sharedView.set(shared);
  using fromShared = device.tensor(sharedView, [1, 1, 2, 2]);
  sharedView.fill(9);
  assertEquals(await fromShared.data(), Float32Array.of(0, 1, 2, 3));

  const buffer = new ArrayBuffer(4 * 6, { maxByteLength: 4 * 64 });
  const growable = new Float32Array(buffer, 8, 4);
  growable.set([4, 5, 6, 7]);
  using fromGrowable = device.tensor(growable, [1, 1, 2, 2]);
  buffer.resize(0);
  fromShared.write(Float32Array.of(8, 8, 8, 8));
  assertEquals(await fromGrowable.data(), Float32Array.of(4, 5, 6, 7));
  assertEquals(await fromShared.data(), Float32Array.of(8, 8, 8, 8));

  const detached = new Float32Array([1, 2, 3, 4]);
  using early = device.tensor(detached, [1, 1, 2, 2]);
  detached.buffer.transfer(); // after the call: it must not matter
  assertEquals(await early.data(), Float32Array.of(1, 2, 3, 4));
});

// ---- outputs ------------------------------------------------------------------------------------------

/** Ones that every device has kernels for. */
const half = [[1, 2, 16, 64], { dtype: "f16" }] as const;

refusesCleanly("outputs that overlap inputs", [
  ...(["q", "k", "v"] as const).flatMap((name): Case[] =>
    [attention, flashAttention, explain].map((call) => ({
      name: `${call.name}(), out = ${name}`,
      call: ({ make }) => {
        const [q, k, v] = [make(...half), make(...half), make(...half)];
        return call(q, k, v, { out: { q, k, v }[name] });
      },
      error: SageError,
      says: [`o must not overlap ${name}`],
    }))
  ),
  {
    name: "out = q beside a log-sum-exp that was made for the call",
    call: ({ make }) => {
      const q = make(...half), k = make(...half);
      return flashAttention(q, k, k, { out: q, returnLse: true });
    },
    error: SageError,
    says: ["o must not overlap q"],
  },
  {
    name: "out is a view that shares rows with q",
    call: ({ make }) => {
      const whole = make([1, 2, 24, 64], { dtype: "f16" }), k = make(...half);
      using q = whole.view({ tokens: [0, 16] });
      using out = whole.view({ tokens: [8, 24] });
      return flashAttention(q, k, k, { out });
    },
    error: SageError,
    says: ["o must not overlap q"],
  },
  {
    name: "out of another shape",
    call: ({ q, k, v, make }) => attention(q, k, v, { out: make([1, 2, 16, 9]) }),
    error: RangeError,
    says: ["out must have shape [1, 2, 16, 8]", "current value is [1, 2, 16, 9]"],
  },
  {
    name: "out of another shape in its own layout",
    call: ({ q, k, v, make }) =>
      attention(q, k, v, { out: make([1, 2, 16, 8], { layout: "NHD" }) }),
    error: RangeError,
    says: ["out must have shape [1, 16, 2, 8]", "current value is [1, 2, 16, 8]"],
  },
  {
    name: "outDtype that contradicts out",
    call: ({ q, k, v, make }) =>
      attention(q, k, v, { out: make([1, 2, 16, 8]), outDtype: "f16" as Loose }),
    error: TypeError,
    says: [`outDtype must be absent or equal out.dtype ("f32")`, `current value is "f16"`],
  },
  {
    name: "explain() with out of another shape",
    call: ({ q, k, v, make }) => explain(q, k, v, { out: make([1, 2, 16, 9]) }),
    error: RangeError,
    says: ["out must have shape [1, 2, 16, 8]", "current value is [1, 2, 16, 9]"],
  },
  ...[null, 1, {}, new Float32Array(length)].flatMap((out): Case[] =>
    [attention, explain].map((call) => ({
      name: `${call.name}(), out = ${out}`,
      call: ({ q, k, v }) => call(q, k, v, { out: out as Loose }),
      error: TypeError,
      says: ["out must be a Tensor", "current value is"],
    }))
  ),
]);

deviceTest("an output between the rows of an input is no overlap", async (device) => {
  using whole = device.tensor(new Float16Array(4 * 16 * 64).fill(1), [1, 4, 16, 64]);
  using q = whole.view({ heads: [0, 2] });
  using out = whole.view({ heads: [2, 4] });
  using v = device.tensor(new Float16Array(2 * 16 * 64).fill(3), [1, 2, 16, 64]);
  assertEquals(flashAttention(q, q, v, { out }), out);
  assertEquals(await out.data(), new Float16Array(2 * 16 * 64).fill(3));
  assertEquals(await q.data(), new Float16Array(2 * 16 * 64).fill(1));
});

// ---- options ------------------------------------------------------------------------------------------

/** Wrong values of one option of attention(), those of another type apart from those out of range. */
const options: [string, Loose[], Loose[], string, Loose?][] = [
  ["kernel", [1, null, {}], ["sage3", "", "Flash"], `be one of "auto", "flash", "sage1"`],
  ["causal", [1, "true", null], [], "be a boolean"],
  ["returnLse", [1, "yes"], [], "be a boolean"],
  ["smoothQ", [1, "on"], [], "be a boolean"],
  ["smoothK", [0, null], [], "be a boolean"],
  ["smoothV", ["off"], [], "be a boolean"],
  ["scale", ["1", 1n, null, true], [NaN, 0, -0, -1, Infinity, -Infinity, 1e300, 1e-300], "be "],
  [
    "granularity",
    [1, null],
    ["channel", "row"],
    `be one of "token", "block", "warp", "thread"`,
    { kernel: "sage2" },
  ],
  ["outDtype", [16, null], ["i8", "f64", "float"], `be one of "f32", "f16", "bf16"`],
  ["pvAccumulator", [16, null], ["bf16", "i32"], `be one of "f32", "f16"`, { kernel: "sage1" }],
  ["pvRange", ["448", null], [1, 9, 100, NaN], "be one of 448, 224, 112", { kernel: "sage2++" }],
];

refusesCleanly(
  "values of each option of attention",
  options.flatMap(([name, wrongTypes, wrongValues, must, others]): Case[] =>
    [...wrongTypes, ...wrongValues].flatMap((value): Case[] =>
      [attention, explain].map((call) => ({
        name: `${call.name}(), ${name} = ${String(value)}`,
        call: ({ q, k, v }) => call(q, k, v, { ...others, [name]: value } as Loose),
        error: wrongTypes.includes(value) ? TypeError : RangeError,
        says: [`attention as ${name} must ${must}`, "current value is"],
      }))
    )
  ),
);

refusesCleanly("unknown options", [
  ...([
    ["attention", ({ q, k, v }, o) => attention(q, k, v, o), `"smoothQ"`],
    ["flashAttention", ({ q, k, v }, o) => flashAttention(q, k, v, o), `"causal"`],
    ["explain", ({ q, k, v }, o) => explain(q, k, v, o), `"device"`],
    ["smooth", ({ q }, o) => smooth(q, o), `"blockRows"`],
    ["quantize", ({ q }, o) => quantize(q, { operand: "query", ...o }), `"groupRows"`],
    ["empty", ({ device }, o) => device.empty([1, 1, 1, 1], o), `"layout"`],
    ["tensor", ({ device }, o) => device.tensor(new Float32Array(1), [1, 1, 1, 1], o), `"dtype"`],
    ["view", ({ q }, o) => q.view(o), `"tokens"`],
    ["dequantize", ({ q, pack }, o) => dequantize(pack(q, { operand: "key" }), o), `"outDtype"`],
    ["attentionQuantized", ({ q, k, v, pack }, o) =>
      attentionQuantized(
        pack(q, { operand: "query" }),
        pack(k, { operand: "key" }),
        pack(v, { operand: "value" }),
        o,
      ), `"pvRange"`],
  ] as [string, (fixture: Fixture, options: Loose) => unknown, string][]).flatMap((
    [name, call, known],
  ): Case[] => [
    {
      name: `${name}() with an unknown option`,
      call: (fixture) => call(fixture, { tpyo: 1 }),
      error: TypeError,
      says: [`options must have no property "tpyo"`, "known options are", known],
    },
    ...(name === "quantize" ? [] : [null, 1, "causal", []]).map((options): Case => ({
      name: `${name}() with options ${options}`,
      call: (fixture) => call(fixture, options),
      error: TypeError,
      says: ["options must be an object", "current value is"],
    })),
  ]),
  ...["kernel", "smoothK", "granularity", "pvRange", "pvAccumulator"].map((name): Case => ({
    name: `flashAttention() with ${name}`,
    call: ({ q, k, v }) => flashAttention(q, k, v, { [name]: undefined } as Loose),
    error: TypeError,
    says: [`options must have no property "${name}"`],
  })),
]);

refusesCleanly("options that contradict each other", [
  ...["smoothQ", "smoothK", "smoothV"].map((name): Case => ({
    name: `${name} with flash`,
    call: ({ q, k, v }) => attention(q, k, v, { kernel: "flash", [name]: true }),
    error: TypeError,
    says: [`${name} with kernel "flash" must be absent`, "current value is true"],
  })),
  {
    name: "granularity with flash",
    call: ({ q, k, v }) => attention(q, k, v, { kernel: "flash", granularity: "block" }),
    error: TypeError,
    says: [`granularity with kernel "flash" must be absent`, `current value is "block"`],
  },
  ...(["auto", "flash", "sage1-int8", "sage2", "sage2-int4", "sage2++"] as const).map((
    kernel,
  ): Case => ({
    name: `pvAccumulator with ${kernel}`,
    call: ({ q, k, v }) => attention(q, k, v, { kernel, pvAccumulator: "f16" }),
    error: TypeError,
    says: [`kernel with pvAccumulator must be "sage1"`, `current value is "${kernel}"`],
  })),
  ...(["auto", "flash", "sage1", "sage1-int8", "sage2", "sage2-int4"] as const).map((
    kernel,
  ): Case => ({
    name: `pvRange with ${kernel}`,
    call: ({ q, k, v }) => attention(q, k, v, { kernel, pvRange: 448 }),
    error: TypeError,
    says: [`kernel with pvRange must be "sage2++"`, `current value is "${kernel}"`],
  })),
]);

/** Wrong values of one option of quantize(). */
const recipes: [string, Loose, ErrorClass, string[]][] = [
  ["no operand", {}, TypeError, [`operand must be one of "query", "key", "value"`, "undefined"]],
  ["operand", { operand: "q" }, RangeError, [`operand must be one of "query"`, `value is "q"`]],
  ["dtype", { operand: "key", dtype: "f16" }, RangeError, [`dtype must be one of "i8"`, `"f16"`]],
  ["granularity", { operand: "key", granularity: "row" }, RangeError, [
    `granularity must be one of "token"`,
    `current value is "row"`,
  ]],
  ["values per thread", { operand: "value", granularity: "thread" }, RangeError, [
    `granularity of values must be "token", "block", "warp" or "channel"`,
    `current value is "thread"`,
  ]],
  ["smooth", { operand: "key", smooth: 1 }, TypeError, ["smooth must be a boolean", "is 1"]],
  ["groupRows 0", { operand: "key", groupRows: 0 }, RangeError, ["groupRows must be", "is 0"]],
  ["groupRows -8", { operand: "key", groupRows: -8 }, RangeError, ["groupRows must", "is -8"]],
  ["groupRows 2^32", { operand: "key", groupRows: 2 ** 32 }, RangeError, [
    "groupRows must be a whole number from 1 to 4294967295",
    "current value is 4294967296",
  ]],
  ["groupRows as text", { operand: "key", groupRows: "64" }, TypeError, [
    "groupRows must be",
    `current value is "64"`,
  ]],
  ["groupRows that threads cannot share", { operand: "key", groupRows: 12 }, RangeError, [
    `groupRows with granularity "thread" must be a multiple of 8`,
    "current value is 12",
  ]],
  ["groupRows per token", { operand: "key", granularity: "token", groupRows: 8 }, TypeError, [
    `groupRows with granularity "token" must be absent`,
    "current value is 8",
  ]],
  ["groupRows per channel", { operand: "value", groupRows: 8 }, TypeError, [
    `groupRows with granularity "channel" must be absent`,
    "current value is 8",
  ]],
  ["range of i8", { operand: "key", range: 100 }, TypeError, [
    `range with dtype "i8" must be absent`,
    "current value is 100",
  ]],
  ...[0, -1, NaN, Infinity, 449].map((range): [string, Loose, ErrorClass, string[]] => [
    `range ${range}`,
    { operand: "value", range },
    RangeError,
    ["range must be a positive number up to 448", `current value is ${range}`],
  ]),
];

refusesCleanly("values of each option elsewhere", [
  ...recipes.map(([name, recipe, error, says]): Case => ({
    name: `quantize(), ${name}`,
    call: ({ q }) => quantize(q, recipe),
    error,
    says: ["Cannot quantize", ...says],
  })),
  {
    name: "quantize() without options",
    call: ({ q }) => quantize(q, undefined as Loose),
    error: TypeError,
    says: ["Cannot quantize as options must be an object", "current value is undefined"],
  },
  ...[0, -1, 1.5, NaN, 2 ** 32].map((blockRows): Case => ({
    name: `smooth(), blockRows ${blockRows}`,
    call: ({ q }) => smooth(q, { blockRows }),
    error: RangeError,
    says: [
      "blockRows must be a whole number from 1 to 4294967295",
      `current value is ${blockRows}`,
    ],
  })),
  {
    name: "smooth(), outDtype",
    call: ({ q }) => smooth(q, { outDtype: "i8" as Loose }),
    error: RangeError,
    says: [`outDtype must be one of "f32", "f16", "bf16"`, `current value is "i8"`],
  },
  {
    name: "smooth(), outDtype null",
    call: ({ q }) => smooth(q, { outDtype: null as Loose }),
    error: TypeError,
    says: [`outDtype must be one of "f32", "f16", "bf16"`, "current value is null"],
  },
  {
    name: "dequantize(), outDtype",
    call: ({ q, pack }) => dequantize(pack(q, { operand: "key" }), { outDtype: "e4m3" as Loose }),
    error: RangeError,
    says: [`outDtype must be one of "f32", "f16", "bf16"`, `current value is "e4m3"`],
  },
  ...["empty", "tensor"].flatMap((method): Case[] =>
    ([
      [{ dtype: "f64" }, RangeError, `dtype must be one of "f32"`, `"f64"`],
      [{ dtype: 1 }, TypeError, `dtype must be one of "f32"`, "1"],
      [{ layout: "DHN" }, RangeError, `layout must be one of "HND", "NHD"`, `"DHN"`],
      [{ layout: 0 }, TypeError, `layout must be one of "HND", "NHD"`, "0"],
      [{ layout: null }, TypeError, `layout must be one of "HND", "NHD"`, "null"],
    ] as [Loose, ErrorClass, string, string][]).map(([options, error, must, value]) => ({
      name: `${method}() with ${JSON.stringify(options)}`,
      call: ({ device }) =>
        method === "empty"
          ? device.empty([1, 2, 16, 8], options)
          : device.tensor(new Float32Array(length), [1, 2, 16, 8], options),
      error,
      says: [must, `current value is ${value}`],
    }))
  ),
  ...([
    [{ tokens: [0, 17] }, RangeError, "tokens[1] must be", "17"],
    [{ tokens: [16, 17] }, RangeError, "tokens[0] must be", "16"],
    [{ tokens: [3, 3] }, RangeError, "tokens[1] must be", "3"],
    [{ heads: [-1, 1] }, RangeError, "heads[0] must be", "-1"],
    [{ batch: [0, 0.5] }, RangeError, "batch[1] must be", "0.5"],
    [{ batch: [0, "1"] }, TypeError, "batch[1] must be", `"1"`],
    [{ heads: [0, undefined] }, TypeError, "heads[1] must be", "undefined"],
  ] as [Loose, ErrorClass, string, string][]).map(([ranges, error, must, value]): Case => ({
    name: `view(${JSON.stringify(ranges)})`,
    call: ({ q }) => q.view(ranges),
    error,
    says: [`Cannot view a tensor as ${must}`, `current value is ${value}`],
  })),
  ...[5, null, "heads", {}, [0], [0, 1, 2]].map((value): Case => ({
    name: `view() with heads ${JSON.stringify(value)}`,
    call: ({ q }) => q.view({ heads: value as Loose }),
    error: TypeError,
    says: ["Cannot view a tensor as heads must be [from, to]", "current value is"],
  })),
  {
    name: "time() of what is no function",
    call: ({ device }) => device.time(5 as Loose),
    error: TypeError,
    says: ["Cannot time work as work must be a function", "current value is 5"],
  },
]);

// ---- devices' names -----------------------------------------------------------------------------------

refusesCleanly("names of devices", [
  ...["gpu", "", "CPU", "cuda:", "cuda:-1", "cuda:x", "cuda:0:0", "cpu:0", "auto:0", " cpu"].map((
    name,
  ): Case => ({
    name: `"${name}"`,
    call: () => Device.open(name as Loose),
    error: RangeError,
    says: [`name must be "auto", "cpu", "cuda" or "cuda:N"`, `current value is "${name}"`],
  })),
  ...[null, 0, {}].map((name): Case => ({
    name: `${name}`,
    call: () => Device.open(name as Loose),
    error: TypeError,
    says: [`name must be "auto", "cpu", "cuda" or "cuda:N"`, "current value is"],
  })),
  {
    name: "cuda:99",
    call: () => Device.open("cuda:99"),
    error: NoDeviceError,
    says: ["Cannot "],
  },
]);

// ---- memory -------------------------------------------------------------------------------------------

refusesCleanly("more memory than there is", [
  ...[2 ** 46, 2 ** 52, 2 ** 53 - 64].map((bytes): Case => ({
    name: `${bytes} bytes`,
    call: ({ device }) => device.empty([1, 1, bytes / 64, 64], { dtype: "e4m3" }),
    error: OutOfMemoryError,
    says: ["Cannot ", `${bytes}`],
  })),
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
