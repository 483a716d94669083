// Sequences of different lengths in one call: each as if it were alone.
import { assertEquals } from "@std/assert";
import {
  alibiSlopes,
  attention,
  type AttentionOptions,
  attentionVarlen,
  type FloatDType,
  kernels,
  type Layout,
  UnsupportedError,
} from "../mod.ts";
import { bits, exactly, type Tensors, within, worstDifference } from "./attention.ts";
import { deviceTest, download, poisoned, randomProblem, runs, uploadProblem } from "./devices.ts";
import { type Case, length, type Loose, refuses } from "./refusals.ts";
import { normal, referenceAttention } from "./reference.ts";

/** Where sequences of these lengths begin, and where the last one ends. */
function startsOf(lengths: readonly number[]): number[] {
  return lengths.reduce((starts, length) => [...starts, starts.at(-1)! + length], [0]);
}

/** Lengths of the sequences of queries and of keys: one token, whole tiles, tails, and none. */
const packs: [name: string, queries: number[], keys: number[]][] = [
  ["alike", [1, 64, 200, 7, 128], [1, 64, 200, 7, 128]],
  ["more keys", [3, 1, 70], [40, 129, 100]],
  ["fewer keys", [140, 2, 66], [70, 1, 64]],
  ["one", [90], [150]],
];
const empty: typeof packs[number] = ["some empty", [0, 5, 30, 0, 64, 0], [9, 0, 40, 0, 70, 3]];

interface Sequence {
  tensors: Tensors;
  queries: [number, number];
  keys: [number, number];
}

/** Calls `visit` with each sequence that has queries and keys. */
async function eachSequence(
  { q, k, v }: Tensors,
  queries: readonly number[],
  keys: readonly number[],
  visit: (sequence: Sequence) => Promise<void>,
): Promise<void> {
  for (let s = 0; s + 1 < queries.length; ++s) {
    const rows: [number, number] = [queries[s], queries[s + 1]];
    const seen: [number, number] = [keys[s], keys[s + 1]];
    if (rows[0] === rows[1] || seen[0] === seen[1]) continue;
    using qPart = q.view({ tokens: rows });
    using kPart = k.view({ tokens: seen });
    using vPart = v.view({ tokens: seen });
    await visit({ tensors: { q: qPart, k: kPart, v: vPart }, queries: rows, keys: seen });
  }
}

/** Tokens [from, to) of [heads, tokens, channels]. */
function tokensOf(
  values: Float32Array<ArrayBuffer>,
  heads: number,
  tokens: number,
  [from, to]: [number, number],
): Float32Array<ArrayBuffer> {
  const width = values.length / heads / tokens;
  const parts = Array.from(
    { length: heads },
    (_, h) => [...values.subarray((h * tokens + from) * width, (h * tokens + to) * width)],
  );
  return Float32Array.from(parts.flat());
}

const variants: AttentionOptions[] = [
  {},
  { causal: true },
  { causal: true, alignment: "top-left" },
  { causal: true, window: 20, softcap: 4 },
];

for (const [layout, dtype] of [["HND", "f16"], ["NHD", "f32"]] as [Layout, FloatDType][]) {
  for (const [name, queries, keys] of [...packs, empty]) {
    deviceTest(
      `attentionVarlen() makes of ${name} sequences what attention() does: ${layout}`,
      async (device) => {
        const qStarts = startsOf(queries), kStarts = startsOf(keys);
        const [heads, width] = [4, 24], tokens = qStarts.at(-1)!;
        const problem = randomProblem(
          { heads, kvHeads: 2, queries: tokens, keys: kStarts.at(-1)!, channels: 40, width },
          dtype,
          21,
        );
        using inputs = uploadProblem(device, problem, dtype, layout);
        using sinks = device.tensor(normal(5, heads), [1, heads, 1, 1]);
        using alibi = device.tensor(alibiSlopes(heads), [1, heads, 1, 1]);
        const { q, k, v } = inputs;
        const all = [...variants, { sinks }, { alibi, causal: true }];
        for (const kernel of kernels) {
          for (const options of all.map((one) => exactly({ kernel, ...one }))) {
            if (!runs(q, k, v, options)) continue;
            using out = poisoned(device, [1, heads, tokens, width], dtype, layout);
            const call = () =>
              attentionVarlen(q, k, v, {
                ...options,
                cuSeqlensQ: qStarts,
                cuSeqlensK: kStarts,
                out,
                returnLse: true,
              });
            if (device.kind === "cuda" && name === "some empty") {
              try {
                call()[Symbol.dispose]();
              } catch (error) {
                if (error instanceof UnsupportedError) continue;
                throw error;
              }
            }
            using result = call();
            const actual = await download(result.out), lse = await download(result.lse);
            const what = `${kernel} ${JSON.stringify(options)}`;
            await eachSequence(inputs, qStarts, kStarts, async (sequence) => {
              const { q, k, v } = sequence.tensors;
              using alone = attention(q, k, v, { ...options, returnLse: true });
              const part = (values: Float32Array<ArrayBuffer>) =>
                bits(tokensOf(values, heads, tokens, sequence.queries));
              assertEquals(part(actual), bits(await download(alone.out)), what);
              assertEquals(part(lse), bits(await download(alone.lse)), `lse of ${what}`);
            });
            if (name !== "some empty") continue;
            const blind = tokensOf(actual, heads, tokens, [0, 5]); // five queries without keys
            assertEquals(bits(blind), new Uint32Array(blind.length), what);
            const lone = options.sinks ? await download(options.sinks) : undefined;
            tokensOf(lse, heads, tokens, [0, 5]).forEach((value, i) =>
              assertEquals(value, lone ? lone[Math.floor(i / 5)] : -Infinity, what)
            );
          }
        }
      },
    );
  }
}

deviceTest("attentionVarlen() agrees with float64, and slices masks", async (device) => {
  const starts = [0, 50, 51, 180], tokens = 180;
  const problem = randomProblem({ heads: 2, queries: tokens, channels: 32 }, "f32", 22);
  using inputs = uploadProblem(device, problem, "f32");
  const values = normal(23, tokens * tokens).map((value) => value < -1 ? -Infinity : value);
  using mask = device.tensor(values, [1, 1, tokens, tokens]);
  const { q, k, v } = inputs;
  if (!runs(q, k, v, { kernel: "flash", mask })) return;
  using o = attentionVarlen(q, k, v, {
    kernel: "flash",
    mask,
    causal: true,
    cuSeqlensQ: Int32Array.from(starts),
    cuSeqlensK: BigInt64Array.from(starts, BigInt),
  });
  const actual = await download(o);
  for (let s = 0; s + 1 < starts.length; ++s) {
    const range: [number, number] = [starts[s], starts[s + 1]], rows = range[1] - range[0];
    const part = (x: Float32Array<ArrayBuffer>) => tokensOf(x, 2, tokens, range);
    const dims = [1, 2, rows, 32] as const;
    const expected = referenceAttention(
      {
        q: part(problem.q as Float32Array<ArrayBuffer>),
        k: part(problem.k as Float32Array<ArrayBuffer>),
        v: part(problem.v as Float32Array<ArrayBuffer>),
        qDims: dims,
        kDims: dims,
        vDims: dims,
      },
      { causal: true },
      {
        mask: {
          values: Float32Array.from(
            { length: rows * rows },
            (_, i) => values[(range[0] + Math.floor(i / rows)) * tokens + range[0] + i % rows],
          ),
          dims: [1, 1, rows, rows],
          bool: false,
        },
      },
    );
    within(worstDifference(part(actual), expected.out), 2e-6, `sequence ${s}`);
  }
});

deviceTest(
  "attentionVarlen() takes many sequences, and its arrays may change at once",
  async (device) => {
    const count = 3000, starts = Int32Array.from({ length: count + 1 }, (_, i) => 2 * i);
    const data = Float16Array.from({ length: 2 * count * 64 }, (_, i) => Math.floor(i / 128) % 100);
    using x = device.tensor(data, [1, 1, 2 * count, 64]);
    using o = attentionVarlen(x, x, x, { cuSeqlensQ: starts, kernel: "flash" });
    starts.fill(0);
    // The keys of a sequence are alike.
    const worst = (await o.data()).reduce(
      (most, x, i) => Math.max(most, Math.abs(x - data[i]) / 100),
      0,
    );
    within(worst, device.kind === "cpu" ? 0 : 0.0007, "the largest difference");
  },
);

// ---- bad input ----------------------------------------------------------------------------------------

const good = { cuSeqlensQ: [0, 4, 16], cuSeqlensK: [0, 10, 16] };
const starts: [name: string, options: Loose, error: Case["error"], says: string][] = [
  [
    "no starts",
    {},
    TypeError,
    "cuSeqlensQ must be an array of numbers, an Int32Array or a BigInt64Array: current value is undefined.",
  ],
  [
    "a Float32Array",
    { cuSeqlensQ: new Float32Array(2) },
    TypeError,
    "current value is a Float32Array.",
  ],
  ["a text", { cuSeqlensQ: "0,16" }, TypeError, `current value is "0,16".`],
  [
    "one number",
    { cuSeqlensQ: [0] },
    RangeError,
    "cuSeqlensQ.length must be at least 2: current value is 1.",
  ],
  [
    "none for k",
    { ...good, cuSeqlensK: [] },
    RangeError,
    "cuSeqlensK.length must be at least 2: current value is 0.",
  ],
  [
    "other counts",
    { ...good, cuSeqlensK: [0, 16] },
    RangeError,
    "cuSeqlensK.length must equal that of cuSeqlensQ (3): current value is 2.",
  ],
  [
    "a start after 0",
    { cuSeqlensQ: [1, 16] },
    RangeError,
    "cuSeqlensQ[0] must be 0: current value is 1.",
  ],
  [
    "a negative start",
    { cuSeqlensQ: [0, -3, 16] },
    RangeError,
    "cuSeqlensQ[1] must be at least the number before it (0): current value is -3.",
  ],
  [
    "falling starts",
    { cuSeqlensQ: [0, 9, 8, 16] },
    RangeError,
    "cuSeqlensQ[2] must be at least the number before it (9): current value is 8.",
  ],
  [
    "too large starts",
    { cuSeqlensQ: [0, 17, 16] },
    RangeError,
    "cuSeqlensQ[1] must be at most the tokens of q (16): current value is 17.",
  ],
  [
    "an early end",
    { cuSeqlensQ: [0, 4, 15] },
    RangeError,
    "cuSeqlensQ[2] must equal the tokens of q (16): current value is 15.",
  ],
  [
    "an early end of keys",
    { ...good, cuSeqlensK: [0, 4, 15] },
    RangeError,
    "cuSeqlensK[2] must equal the tokens of k (16): current value is 15.",
  ],
  [
    "half a token",
    { cuSeqlensQ: [0, 1.5, 16] },
    RangeError,
    "cuSeqlensQ[1] must be a whole number: current value is 1.5.",
  ],
  [
    "NaN",
    { cuSeqlensQ: [0, NaN, 16] },
    RangeError,
    "cuSeqlensQ[1] must be a whole number: current value is NaN.",
  ],
  [
    "a hole",
    { cuSeqlensQ: [0, , 16] },
    TypeError,
    "cuSeqlensQ[1] must be a whole number: current value is undefined.",
  ],
  [
    "a huge number",
    { cuSeqlensQ: BigInt64Array.of(0n, 1n << 62n, 16n) },
    RangeError,
    "cuSeqlensQ[1] must be at most the tokens of q (16)",
  ],
  [
    "an unknown option",
    { ...good, maxSeqlen: 16 },
    TypeError,
    `options must have no property "maxSeqlen"`,
  ],
];

refuses("sequences", [
  ...starts.map(([name, options, error, says]): Case => ({
    name,
    call: ({ q, k, v }) => attentionVarlen(q, k, v, options),
    error,
    says: ["Cannot run attention as", says],
  })),
  {
    name: "a batch",
    call: ({ device, make }) => {
      void device;
      const x = make([2, 1, 16, 8]);
      return attentionVarlen(x, x, x, { cuSeqlensQ: [0, 16] });
    },
    error: RangeError,
    says: ["batch of q must be 1: current value is 2."],
  },
  {
    name: "a mask of one sequence",
    call: ({ q, k, v, make }) => attentionVarlen(q, k, v, { ...good, mask: make([1, 1, 4, 10]) }),
    error: RangeError,
    says: ["mask must have shape [1, 1 or 2, 1 or 16, 16]: current value is [1, 1, 4, 10]."],
  },
]);

deviceTest("refused sequences leave a working device", async (device) => {
  using q = device.tensor(new Float32Array(length).fill(1), [1, 2, 16, 8]);
  using o = attentionVarlen(q, q, q, {
    ...good,
    kernel: device.kind === "cpu" ? "flash" : "sage1",
  });
  assertEquals((await o.data())[0], 1);
});
