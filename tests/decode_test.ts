// Few queries, as in decoding: CUDA splits the keys over blocks, and what they find must add up.
import { assert, assertEquals, assertStringIncludes } from "@std/assert";
import { attention, explain } from "../mod.ts";
import { run, within, worstDifference } from "./attention.ts";
import { deviceTest, type Lengths, randomProblem, uploadProblem } from "./devices.ts";
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
];

for (const dtype of ["f16", "bf16"] as const) {
  deviceTest(`attention() of few queries is exact: ${dtype}`, async (device) => {
    for (const { causal = false, ...lengths } of cases) {
      for (const layout of ["HND", "NHD"] as const) {
        const problem = randomProblem(lengths, dtype, 5);
        using tensors = uploadProblem(device, problem, dtype, layout);
        const label = `${JSON.stringify(lengths)} ${causal ? "causal" : "full"} ${layout}`;
        const reference = referenceAttention(problem, { causal });
        const { out, lse } = await run(tensors, { kernel: "flash", causal, outDtype: "f32" });
        within(worstDifference(out, reference.out), dtype === "f16" ? 2e-3 : 1.2e-2, label);
        within(worstDifference(lse, reference.lse), 1e-4, `lse of ${label}`);
      }
    }
  });
}

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
  assert(plan.workspaceBytes > 0 && plan.workspaceBytes < 2 ** 22);
  using small = device.empty([1, 8, 1, 64], { dtype: "f16" });
  using _out = attention(small, small, small);
  assertEquals(explain(small, small, small).workspaceBytes, 0);
});
