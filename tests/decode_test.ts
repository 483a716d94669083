// Few queries, as in decoding: CUDA splits the keys over blocks, and what they find must add up.
import { assert, assertEquals, assertStringIncludes } from "@std/assert";
import { attention, attentionVarlen, Device, explain, type Layout, type Tensor } from "../mod.ts";
import { bits, run, within, worstDifference } from "./attention.ts";
import {
  deviceNames,
  deviceTest,
  download,
  type Lengths,
  randomProblem,
  upload,
  uploadProblem,
} from "./devices.ts";
import { referenceAttention } from "./reference.ts";

const cases: (Lengths & { causal?: boolean })[] = [
  { queries: 1, keys: 1, channels: 64 },
  { heads: 2, queries: 1, keys: 63, channels: 64, causal: true },
  { batch: 2, heads: 8, kvHeads: 2, queries: 1, keys: 257, channels: 128 },
  { heads: 8, kvHeads: 1, queries: 4, keys: 1000, channels: 128 },
  { heads: 32, kvHeads: 8, queries: 1, keys: 3001, channels: 128, causal: true },
  { heads: 4, kvHeads: 2, queries: 5, keys: 700, channels: 72, width: 40 },
  { heads: 3, queries: 17, keys: 900, channels: 256 },
  { heads: 16, kvHeads: 1, queries: 4, keys: 520, channels: 192, width: 128 },
  { queries: 1, keys: 5000, channels: 33, width: 7 },
  { heads: 2, kvHeads: 1, queries: 1, keys: 20000, channels: 64 },
  { heads: 32, kvHeads: 2, queries: 3, keys: 4000, channels: 128 },
];

async function expectExact(
  device: Device,
  dtype: "f16" | "bf16",
  layouts: readonly Layout[],
): Promise<void> {
  for (const { causal = false, ...lengths } of cases) {
    const problem = randomProblem(lengths, dtype, 5);
    const reference = referenceAttention(problem, { causal });
    for (const layout of layouts) {
      using tensors = uploadProblem(device, problem, dtype, layout);
      const label = `${JSON.stringify(lengths)} ${causal ? "causal" : "full"} ${layout}`;
      const { out, lse } = await run(tensors, { kernel: "flash", causal, outDtype: "f32" });
      within(worstDifference(out, reference.out), dtype === "f16" ? 2e-3 : 1.2e-2, label);
      within(worstDifference(lse, reference.lse), 1e-4, `lse of ${label}`);
    }
  }
}

for (const dtype of ["f16", "bf16"] as const) {
  deviceTest(
    `attention() of few queries is exact: ${dtype}`,
    (device) => expectExact(device, dtype, ["HND", "NHD"]),
  );
}

Deno.test({
  name: "attention() of few queries is exact by the kernels of older GPUs on cuda:0",
  ignore: !deviceNames.includes("cuda:0"),
  fn: async () => {
    using device = Device.open("cuda:0", { architecture: 80 });
    await expectExact(device, "f16", ["HND"]);
  },
});

deviceTest(
  "attention() of few queries puts values that are not finite where they belong",
  async (device) => {
    const problem = randomProblem(
      { heads: 4, kvHeads: 2, queries: 2, keys: 2000, channels: 64 },
      "f16",
      6,
    );
    problem.q[3 * 2 * 64 + 64 + 5] = NaN; // head 3, row 1
    problem.v[1500 * 64 + 7] = Infinity; // key-value head 0, channel 7
    problem.k[(2000 + 1999) * 64] = NaN; // key-value head 1: heads 2 and 3
    using tensors = uploadProblem(device, problem, "f16");
    const { out } = await run(tensors, { kernel: "flash" });
    for (let head = 0; head < 4; ++head) {
      for (let row = 0; row < 2; ++row) {
        for (let channel = 0; channel < 64; ++channel) {
          const value = out[(head * 2 + row) * 64 + channel], label = `${head} ${row} ${channel}`;
          if (head >= 2) assert(Number.isNaN(value), label);
          else if (channel === 7) assertEquals(value, Infinity, label);
          else assert(Number.isFinite(value), label);
        }
      }
    }
  },
);

deviceTest("explain() says where keys are split", (device) => {
  if (device.kind === "cpu") return;
  const q = { shape: [1, 32, 1, 128], dtype: "f16" } as const;
  const k = { shape: [1, 8, 32768, 128], dtype: "f16" } as const;
  const plan = explain(q, k, k, { device });
  assertEquals(plan.kernel, "flash");
  assertStringIncludes(plan.implementation, "keys split");
  const hopper = Math.floor(Number(device.info.computeCapability)) === 9;
  assertEquals(plan.architecture, hopper ? "sm_90" : "sm_80");
  assert(plan.workspaceBytes > 0 && plan.workspaceBytes < 2 ** 22);
  using small = device.empty([1, 8, 1, 64], { dtype: "f16" });
  using _out = attention(small, small, small);
  assertEquals(explain(small, small, small).workspaceBytes, 0);
});

// ---- calls that follow each other ----------------------------------------------------------------------

/** What calls leave when they are enqueued all at once, and when each waits for the one before; twice each. */
async function expectSameApart(
  device: Device,
  calls: readonly (() => void)[],
  results: () => Tensor[],
): Promise<void> {
  const runs: Uint32Array[][] = [];
  for (const apart of [true, false, false, true]) {
    for (const call of calls) {
      call();
      if (apart) await device.synchronize();
    }
    runs.push(await Promise.all(results().map(async (tensor) => bits(await download(tensor)))));
  }
  for (const run of runs.slice(1)) {
    for (const [i, words] of run.entries()) assertEquals(words, runs[0][i], `result ${i}`);
  }
}

for (const [keys, channels] of [[100, 64], [4096, 128], [3000, 256]]) {
  deviceTest(
    `attention() of few queries reads what calls before it wrote: ${keys} keys, ${channels} channels`,
    async (device) => {
      const steps = device.kind === "cpu" ? 3 : 200;
      const problem = randomProblem({ heads: 8, kvHeads: 2, queries: 1, keys, channels }, "f16", 7);
      using tensors = uploadProblem(device, problem, "f16");
      const { k, v } = tensors;
      const outs = Array.from(
        { length: 3 },
        () => upload(device, problem.q, problem.qDims, "f16"),
      );
      // What a call reads the one before wrote, over what the one three steps earlier read.
      const calls = Array.from({ length: steps }, (_, i) => () => {
        attention(i === 0 ? tensors.q : outs[(i - 1) % 3], k, v, {
          kernel: "flash",
          scale: 1,
          out: outs[i % 3],
        });
      });
      await expectSameApart(device, calls, () => outs);
      for (const out of outs) out.dispose();
    },
  );
}

deviceTest(
  "attention() of few queries reads keys that calls before it wrote, and they may be written again",
  async (device) => {
    const rounds = device.kind === "cpu" ? 2 : 40, size = device.kind === "cpu" ? 128 : 2048;
    const dims = { heads: 2, queries: size, channels: 64 };
    using one = uploadProblem(device, randomProblem(dims, "f16", 8), "f16");
    using other = uploadProblem(device, randomProblem(dims, "f16", 9), "f16");
    const few = randomProblem({ heads: 8, kvHeads: 2, queries: 1, channels: 64 }, "f16", 10);
    using q = upload(device, few.q, few.qDims, "f16");
    using keys = device.empty([1, 2, size, 64], { dtype: "f16" });
    const outs = Array.from(
      { length: rounds },
      () => device.empty([1, 8, 1, 64], { dtype: "f16" }),
    );
    for (const kernel of ["flash", "sage2"] as const) {
      const calls = outs.flatMap((out, i) => {
        const from = i % 2 ? one : other;
        return [
          () => void attention(from.q, from.k, from.v, { kernel, scale: 1, out: keys }),
          () => void attention(q, keys, keys, { kernel: "flash", scale: 4, out }),
        ];
      });
      await expectSameApart(device, calls, () => outs);
    }
    for (const out of outs) out.dispose();
  },
);

deviceTest(
  "attentionVarlen() of few queries is what attention() does, side by side",
  async (device) => {
    const lengths = [700, 3000, 520, 1, 2048, 999, 1500, 640, 4000, 800, 1024];
    const starts = lengths.reduce((all, length) => [...all, all.at(-1)! + length], [0]);
    const sequences = lengths.length;
    const problem = randomProblem(
      { heads: 8, kvHeads: 2, queries: sequences, keys: starts.at(-1)!, channels: 64 },
      "f16",
      11,
    );
    using tensors = uploadProblem(device, problem, "f16");
    const { q, k, v } = tensors;
    const options = { kernel: "flash" } as const;
    const alone: Uint32Array[] = [];
    for (const [i] of lengths.entries()) {
      using row = q.view({ tokens: [i, i + 1] });
      using keys = k.view({ tokens: [starts[i], starts[i + 1]] });
      using values = v.view({ tokens: [starts[i], starts[i + 1]] });
      using out = attention(row, keys, values, options);
      alone.push(bits(await download(out)));
    }
    const cu = { cuSeqlensQ: lengths.map((_, i) => i).concat(sequences), cuSeqlensK: starts };
    const outs = [0, 1, 2].map(() => attentionVarlen(q, k, v, { ...options, ...cu }));
    for (const out of outs) {
      const words = bits(await download(out));
      for (const [i, expected] of alone.entries()) {
        for (let head = 0; head < 8; ++head) {
          const at = (head * sequences + i) * 64;
          assertEquals(words.slice(at, at + 64), expected.slice(head * 64, head * 64 + 64), `${i}`);
        }
      }
      out.dispose();
    }
  },
);
