// Layouts and views: attention reads and writes any strides, and nothing beside them.
import { assertEquals, assertLess } from "@std/assert";
import { attention, kernels, relativeL1 } from "../mod.ts";
import { bits, exactly, type FloatProblem, meanBounds, rounding, run } from "./attention.ts";
import { deviceTest, download, poisoned, randomProblem, runs, uploadProblem } from "./devices.ts";
import { count, type Dims, referenceAttention } from "./reference.ts";

deviceTest("attention() reads and writes views of any strides", async (device) => {
  const dims: Dims = [2, 6, 80, 32];
  const all = randomProblem({ batch: 2, heads: 6, queries: 80, channels: 32 }, "f16", 53);
  for (const layout of ["HND", "NHD"] as const) {
    using inputs = uploadProblem(device, all, "f16", layout);
    using whole = poisoned(device, dims, "f16", layout);
    const ranges = { batch: [1, 2], heads: [2, 4], tokens: [3, 70] } as const;
    using q = inputs.q.view(ranges);
    using k = inputs.k.view({ ...ranges, heads: [5, 6] });
    using v = inputs.v.view({ ...ranges, heads: [0, 1] });
    using out = whole.view(ranges);
    const problem = {
      q: await download(q),
      k: await download(k),
      v: await download(v),
      qDims: [1, 2, 67, 32],
      kDims: [1, 1, 67, 32],
      vDims: [1, 1, 67, 32],
    } as const;
    for (const kernel of kernels) {
      if (!runs(q, k, v, { kernel })) continue;
      attention(q, k, v, { kernel, causal: true, out });
      const expected = referenceAttention(problem, { causal: true });
      const bound = meanBounds[kernel].l1 + rounding.f16;
      assertLess(relativeL1(await download(out), expected.out), bound, `${kernel} ${layout}`);
      const poison = (await download(whole)).filter(Number.isNaN).length;
      assertEquals(poison, count(dims) - count(out.shape), "wrote outside the view");
    }
  }
});

for (const kernel of kernels) {
  deviceTest(
    `attention() gives the same bits from any layout and view: ${kernel}`,
    async (device) => {
      const lengths = {
        batch: 2,
        heads: 4,
        kvHeads: 2,
        queries: 70,
        keys: 133,
        channels: 40,
        width: 24,
      };
      const problem = randomProblem(lengths, "f16", 5);
      using hnd = uploadProblem(device, problem, "f16");
      const options = exactly({ kernel, causal: true }); // by default, lse asks for exact exponentials
      if (!runs(hnd.q, hnd.k, hnd.v, options)) return;
      const first = await run(hnd, options);

      using nhd = uploadProblem(device, problem, "f16", "NHD");
      {
        using result = attention(nhd.q, nhd.k, nhd.v, { ...options, returnLse: true });
        assertEquals(result.out.layout, "NHD");
        assertEquals(result.out.shape, [2, 70, 4, 24]);
        assertEquals(result.lse.shape, [2, 70, 4, 1]);
        assertEquals(bits(await download(result.out)), bits(first.out));
        assertEquals(bits(await download(result.lse)), bits(first.lse));
      }
      using mixedOut = poisoned(device, [2, 4, 70, 24], "f16", "NHD");
      attention(hnd.q, nhd.k, hnd.v, { ...options, out: mixedOut });
      assertEquals(bits(await download(mixedOut)), bits(first.out));

      // Views: the second entry of the batch, its last two heads of Q and last of K and V.
      const q = nhd.q.view({ batch: [1, 2], heads: [2, 4], tokens: [3, 60] });
      const k = hnd.k.view({ batch: [1, 2], heads: [1, 2], tokens: [5, 120] });
      const v = nhd.v.view({ batch: [1, 2], heads: [1, 2], tokens: [5, 120] });
      using views = { q, k, v, [Symbol.dispose]: () => [q, k, v].forEach((x) => x.dispose()) };
      const part = await run(views, options);
      const partDims: Dims = [1, 2, 57, 40], keyDims: Dims = [1, 1, 115, 40];
      const copied: FloatProblem = {
        q: await download(q),
        k: await download(k),
        v: await download(v),
        qDims: partDims,
        kDims: keyDims,
        vDims: [1, 1, 115, 24],
      };
      using copies = uploadProblem(device, copied, "f16");
      const dense = await run(copies, options);
      assertEquals(bits(part.out), bits(dense.out));
      assertEquals(bits(part.lse), bits(dense.lse));

      // Writing to a view leaves the rest alone.
      using wide = poisoned(device, [2, 4, 70, 24], "f16", "NHD");
      using window = wide.view({ batch: [1, 2], heads: [1, 3], tokens: [4, 61] });
      attention(q, k, v, { ...options, out: window });
      assertEquals(bits(await download(window)), bits(dense.out));
      assertEquals(
        (await download(wide)).filter(Number.isNaN).length,
        2 * 4 * 70 * 24 - dense.out.length,
      );
    },
  );
}
