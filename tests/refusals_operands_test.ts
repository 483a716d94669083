// Operands that attention and the quantizers must refuse: shapes, element types, devices, codes and outputs.
import { assert, assertEquals, assertStringIncludes } from "@std/assert";
import {
  attention,
  attentionQuantized,
  dequantize,
  Device,
  explain,
  flashAttention,
  quantize,
  SageError,
  smooth,
  type Tensor,
  UnsupportedError,
} from "../mod.ts";
import { deviceNames, deviceTest } from "./devices.ts";
import { type Case, type Fixture, length, type Loose, refuses } from "./refusals.ts";

// ---- shapes -------------------------------------------------------------------------------------------

interface Shapes {
  q?: number[];
  k?: number[];
  v?: number[];
}

const mismatches: [string, Shapes, string][] = [
  ["batch of k", { k: [2, 2, 16, 8] }, "batch of k must equal batch of q (1): current value is 2."],
  ["batch of v", { v: [3, 2, 16, 8] }, "batch of v must equal batch of q (1): current value is 3."],
  [
    "channels of k",
    { k: [1, 2, 16, 9] },
    "channels of k must equal channels of q (8): current value is 9.",
  ],
  ["heads of v", { v: [1, 1, 16, 8] }, "heads of v must equal heads of k (2): current value is 1."],
  [
    "tokens of v",
    { v: [1, 2, 15, 8] },
    "tokens of v must equal tokens of k (16): current value is 15.",
  ],
  [
    "heads of q",
    { q: [1, 3, 16, 8] },
    "heads of q must be a multiple of heads of k (2): current value is 3.",
  ],
  [
    "heads of q that those of k and v do not divide",
    { q: [1, 4, 16, 8], k: [1, 3, 16, 8], v: [1, 3, 16, 8] },
    "heads of q must be a multiple of heads of k (3): current value is 4.",
  ],
  [
    "fewer heads of q than of k",
    { q: [1, 1, 16, 8] },
    "heads of q must be a multiple of heads of k (2): current value is 1.",
  ],
  [
    "257 channels",
    { q: [1, 2, 16, 257], k: [1, 2, 16, 257] },
    "channels of q must be at most 256: current value is 257.",
  ],
  [
    "257 channels of v",
    { v: [1, 2, 16, 257] },
    "channels of v must be at most 256: current value is 257.",
  ],
];

refuses(
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
      .map((one) => ({
        ...one,
        error: RangeError,
        says: [`Cannot ${one.name.startsWith("explain") ? "explain" : "run"} attention as ${says}`],
      }));
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

refuses("what is no tensor", [
  ...([
    [undefined, "undefined"],
    [null, "null"],
    [1, "1"],
    ["q", `"q"`],
    [{}, "an Object"],
    [[], "[]"],
    [new Float32Array(8), "a Float32Array"],
    [new Float16Array(4), "a Float16Array"],
  ] as [Loose, string][]).flatMap(([wrong, shown]): Case[] =>
    (["q", "k", "v"] as const).map((name) => ({
      name: `${name} is ${shown}`,
      call: ({ q, k, v }) => {
        const all = { q, k, v, [name]: wrong };
        return attention(all.q, all.k, all.v);
      },
      error: TypeError,
      says: [`Cannot run attention as ${name} must be a Tensor: current value is ${shown}.`],
    }))
  ),
  {
    name: "an imitation of a tensor",
    call: ({ q, k, v }) => attention(q, k, { ...v } as Loose),
    error: TypeError,
    says: ["Cannot run attention as v must be a Tensor: current value is an Object."],
  },
  ...([
    ["smooth()", "smooth as x must be a Tensor", (x) => smooth(x)],
    ["quantize()", "quantize as x must be a Tensor", (x) => quantize(x, { operand: "query" })],
    ["dequantize()", "dequantize as tensor must be a QuantizedTensor", (x) => dequantize(x)],
    [
      "attentionQuantized()",
      "run attention as q must be a QuantizedTensor",
      (x) => attentionQuantized(x, x, x),
    ],
  ] as [string, string, (x: Loose) => unknown][]).map(([name, what, call]): Case => ({
    name: `${name} of an object`,
    call: () => call({ shape: [1, 1, 1, 1] }),
    error: TypeError,
    says: [`Cannot ${what}: current value is an Object.`],
  })),
  {
    name: "dequantize() of a plain tensor",
    call: ({ q }) => dequantize(q as Loose),
    error: TypeError,
    says: ["Cannot dequantize as tensor must be a QuantizedTensor: current value is a Tensor."],
  },
  {
    name: "explain() of shapes without a device",
    call: () => {
      const spec = { shape: [1, 2, 16, 8], dtype: "f32" } as const;
      return explain(spec, spec, spec);
    },
    error: TypeError,
    says: ["Cannot explain attention as device must be a Device: current value is undefined."],
  },
  {
    name: "explain() of a number",
    call: ({ device, q, v }) => explain(q, 5 as Loose, v, { device }),
    error: TypeError,
    says: [
      "Cannot explain attention as k must be a Tensor or its shape and dtype: current value is 5.",
    ],
  },
]);

// ---- element types and devices ------------------------------------------------------------------------

refuses("mixed element types", [
  ...([["f32", "f16"], ["f32", "bf16"], ["f32", "i8"], ["f32", "e4m3"], ["f16", "bf16"]] as const)
    .flatMap(([dtype, other]): Case[] =>
      (["k", "v"] as const).map((name) => ({
        name: `${name} of ${other} beside ${dtype}`,
        call: ({ make }) => {
          const alike = () => make([1, 2, 16, 8], { dtype });
          const all = { q: alike(), k: alike(), v: alike() };
          all[name] = make([1, 2, 16, 8], { dtype: other });
          return attention(all.q, all.k, all.v);
        },
        error: TypeError,
        says: [`${name}.dtype must equal q.dtype ("${dtype}"): current value is "${other}".`],
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
      says: [`q.dtype must be one of "f32", "f16", "bf16": current value is "${dtype}".`],
    },
    {
      name: `smooth() of ${dtype}`,
      call: ({ make }) => smooth(make([1, 2, 16, 8], { dtype })),
      error: RangeError,
      says: [`x.dtype must be one of "f32", "f16", "bf16": current value is "${dtype}".`],
    },
    {
      name: `quantize() of ${dtype}`,
      call: ({ make }) => quantize(make([1, 2, 16, 8], { dtype }), { operand: "key" }),
      error: RangeError,
      says: [`x.dtype must be one of "f32", "f16", "bf16": current value is "${dtype}".`],
    },
    {
      name: `out of ${dtype}`,
      call: ({ q, k, v, make }) => attention(q, k, v, { out: make([1, 2, 16, 8], { dtype }) }),
      error: RangeError,
      says: [`out.dtype must be one of "f32", "f16", "bf16": current value is "${dtype}".`],
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
      `${name.split(" ").at(-1)} must belong to the same Device object as the other tensors: ` +
      `current value is "${deviceName}".`,
    ],
  }));
}

refuses("mixed devices", [
  ...withStranger("k", ({ q, v }, other) => attention(q, other as Loose, v)),
  ...withStranger("v", ({ q, k }, other) => attention(q, k, other as Loose)),
  ...withStranger("out", ({ q, k, v }, out) => attention(q, k, v, { out: out as Loose })),
  ...withStranger("explained k", ({ q, v }, other) => explain(q, other as Loose, v)),
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
    says: [`k must belong to the same Device object as the other tensors: current value is "cpu".`],
  },
]);

refuses("operands of attentionQuantized()", [
  {
    name: "keys for queries",
    call: ({ q, v, pack }) =>
      attentionQuantized(pack(q, { operand: "key" }), pack(q, { operand: "key" }), v),
    error: TypeError,
    says: [`q must be quantized with operand "query": current value is "key".`],
  },
  {
    name: "queries for keys",
    call: ({ q, v, pack }) =>
      attentionQuantized(pack(q, { operand: "query" }), pack(q, { operand: "query" }), v),
    error: TypeError,
    says: [`k must be quantized with operand "key": current value is "query".`],
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
    says: [
      `q must be quantized with granularity "token", "block", "warp" or "thread": current value is "channel".`,
    ],
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
    says: [`v must be quantized with granularity "channel": current value is "token".`],
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
    says: [`granularity of k must equal that of q ("token"): current value is "block".`],
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
    says: [`dtype of k must equal that of q ("i4"): current value is "i8".`],
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
    says: ["no kernel takes e4m3 queries and keys with e4m3 values", "i8 with e4m3"],
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
    says: [
      "kernel for i8 queries and keys with e4m3 values must be sage2 or sage2++: " +
      `current value is "sage2-int4".`,
    ],
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
    says: ["range of v for kernel sage2++ must be 2.25, 4.5 or 9: current value is 448."],
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
    says: ["pvRange with range 9 of v must be 112: current value is 448."],
  },
  {
    name: "granularities of which one is the default, beside plain values",
    call: ({ q, k, v, pack }) =>
      attentionQuantized(
        pack(q, { operand: "query" }),
        pack(k, { operand: "key", granularity: "block" }),
        v,
      ),
    error: TypeError,
    says: [`granularity of k must equal that of q ("thread"): current value is "block".`],
  },
  {
    name: "i4 codes that no kernel takes with plain values",
    call: ({ q, k, v, pack }) =>
      attentionQuantized(
        pack(q, { operand: "query", dtype: "i4" }),
        pack(k, { operand: "key", dtype: "i4" }),
        v,
      ),
    error: TypeError,
    says: ["no kernel takes i4 queries and keys with unquantized values", "i4 with e4m3"],
  },
  {
    name: "a kernel for quantized values with plain ones",
    call: ({ q, k, v, pack }) =>
      attentionQuantized(pack(q, { operand: "query" }), pack(k, { operand: "key" }), v, {
        kernel: "sage2",
      }),
    error: TypeError,
    says: [
      "kernel for i8 queries and keys with unquantized values must be sage1: " +
      `current value is "sage2".`,
    ],
  },
  ...([
    ["undefined", undefined],
    ["1", 1],
    ["an Object", {}],
    ["an Object", { smoothed: 1, mean: 2 }],
  ] as [string, Loose][]).map(([shown, wrong]): Case => ({
    name: `v is ${Deno.inspect(wrong)}`,
    call: ({ q, k, pack }) =>
      attentionQuantized(pack(q, { operand: "query" }), pack(k, { operand: "key" }), wrong),
    error: TypeError,
    says: [
      "v must be a QuantizedTensor, a Tensor or what smooth() returned: " +
      `current value is ${shown}.`,
    ],
  })),
]);

// ---- outputs ------------------------------------------------------------------------------------------

/** Ones that every device has kernels for. */
const half = [[1, 2, 16, 64], { dtype: "f16" }] as const;

refuses("outputs", [
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
    name: "out = q = k = v of flash",
    call: ({ make }) => {
      const x = make(...half);
      return attention(x, x, x, { kernel: "flash", out: x });
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
    name: "out is a view that shares all rows but one with q, k and v",
    call: ({ make }) => {
      const whole = make([1, 4, 9, 64], { dtype: "f16" });
      using x = whole.view({ tokens: [0, 8] });
      using out = whole.view({ tokens: [1, 9] });
      return attention(x, x, x, { kernel: "flash", out });
    },
    error: SageError,
    says: ["o must not overlap q"],
  },
  ...[attention, explain].flatMap((call): Case[] => [
    {
      name: `${call.name}(), out of another shape`,
      call: ({ q, k, v, make }) => call(q, k, v, { out: make([1, 2, 16, 9]) }),
      error: RangeError,
      says: ["out must have shape [1, 2, 16, 8]: current value is [1, 2, 16, 9]."],
    },
    {
      name: `${call.name}(), out of fewer rows`,
      call: ({ q, k, v, make }) => call(q, k, v, { out: make([1, 2, 15, 8]) }),
      error: RangeError,
      says: ["out must have shape [1, 2, 16, 8]: current value is [1, 2, 15, 8]."],
    },
    {
      name: `${call.name}(), out of another shape in its own layout`,
      call: ({ q, k, v, make }) => call(q, k, v, { out: make([1, 2, 16, 8], { layout: "NHD" }) }),
      error: RangeError,
      says: ["out must have shape [1, 16, 2, 8]: current value is [1, 2, 16, 8]."],
    },
    {
      name: `${call.name}(), outDtype that contradicts out`,
      call: ({ q, k, v, make }) =>
        call(q, k, v, { out: make([1, 2, 16, 8]), outDtype: "f16" as Loose }),
      error: TypeError,
      says: [`outDtype must be absent or equal out.dtype ("f32"): current value is "f16".`],
    },
    ...([
      [null, "null"],
      [1, "1"],
      [{}, "an Object"],
      [new Float32Array(length), "a Float32Array"],
    ] as [Loose, string][]).map(([out, shown]): Case => ({
      name: `${call.name}(), out is ${shown}`,
      call: ({ q, k, v }) => call(q, k, v, { out }),
      error: TypeError,
      says: [`out must be a Tensor: current value is ${shown}.`],
    })),
  ]),
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
