// The reference itself, against cases checked by hand.
import { assertAlmostEquals, assertEquals } from "@std/assert";
import {
  e4m3Code,
  e4m3Value,
  packInt4,
  referenceAttention,
  referenceDequantize,
  referenceGroups,
  referenceMean,
  referenceQuantize,
  reorder,
  roundHalfEven,
  roundTo,
} from "./reference.ts";

Deno.test("referenceAttention() weighs values by softmax", () => {
  // Scores ln 1 and ln 3: weights 1/4 and 3/4.
  const { out, lse } = referenceAttention({
    q: [1],
    k: [0, Math.log(3)],
    v: [0, 10, 4, 50],
    qDims: [1, 1, 1, 1],
    kDims: [1, 1, 2, 1],
    vDims: [1, 1, 2, 2],
  });
  assertAlmostEquals(out[0], 3, 1e-12);
  assertAlmostEquals(out[1], 40, 1e-12);
  assertAlmostEquals(lse[0], Math.log(4), 1e-12);
});

Deno.test("referenceAttention() scales by 1/sqrt(D), or as told", () => {
  const problem = {
    q: [1, 1, 1, 1],
    k: [2, 2, 2, 2],
    v: [7],
    qDims: [1, 1, 1, 4],
    kDims: [1, 1, 1, 4],
    vDims: [1, 1, 1, 1],
  } as const;
  assertEquals(referenceAttention(problem).lse[0], 4);
  assertEquals(referenceAttention(problem, { scale: 0.25 }).lse[0], 2);
});

Deno.test("referenceAttention() aligns causal masks to the bottom right", () => {
  const v = [1, 10, 100];
  const sums = (queries: number, keys: number) => {
    const { out, lse } = referenceAttention({
      q: new Array(queries).fill(0),
      k: new Array(keys).fill(0),
      v: v.slice(0, keys),
      qDims: [1, 1, queries, 1],
      kDims: [1, 1, keys, 1],
      vDims: [1, 1, keys, 1],
    }, { causal: true });
    return Array.from(out, (mean, i) => Math.round(mean * Math.exp(lse[i])));
  };
  assertEquals(sums(3, 3), [1, 11, 111]);
  assertEquals(sums(2, 3), [11, 111]);
  assertEquals(sums(3, 2), [0, 1, 11]); // the first query sees nothing
});

Deno.test("referenceAttention() masks as it is told", () => {
  // Q = 0: the output is the mean of the values that are seen, and lse the logarithm of how many.
  const means = (
    queries: number,
    keys: number,
    options: Parameters<typeof referenceAttention>[1],
    tensors?: Parameters<typeof referenceAttention>[2],
  ) => {
    const { out, lse } = referenceAttention(
      {
        q: new Array(queries).fill(0),
        k: new Array(keys).fill(1),
        v: [1, 10, 100, 1000].slice(0, keys),
        qDims: [1, 1, queries, 1],
        kDims: [1, 1, keys, 1],
        vDims: [1, 1, keys, 1],
      },
      options,
      tensors,
    );
    return Array.from(out, (mean, i) => Math.round(mean * Math.exp(lse[i])));
  };
  assertEquals(means(2, 4, { causal: true }), [111, 1111]);
  assertEquals(means(2, 4, { causal: true, alignment: "top-left" }), [1, 11]);
  assertEquals(means(4, 4, { window: 1 }), [11, 111, 1110, 1100]);
  assertEquals(means(4, 4, { window: 1, causal: true }), [1, 11, 110, 1100]);
  assertEquals(means(2, 4, { window: [1, Infinity] }), [1110, 1100]);
  assertEquals(means(2, 4, { window: [0, 0], alignment: "top-left" }), [1, 10]);
  const bool = { values: [1, 0, 0, 5, 0, 0, 0, 0], dims: [1, 1, 2, 4], bool: true } as const;
  assertEquals(means(2, 4, {}, { mask: bool }), [1001, 0]);
  const added = { values: [0, Math.log(2), -Infinity], dims: [1, 1, 1, 3], bool: false } as const;
  assertEquals(means(2, 3, {}, { mask: added }), [21, 21]);
  assertEquals(means(1, 3, {}, { alibi: [-Math.log(2)] }), [124]); // 4·1 + 2·10 + 100, slopes up
});

Deno.test("referenceAttention() caps scores, and counts sinks in the denominator alone", () => {
  const problem = {
    q: [1],
    k: [3],
    v: [8],
    qDims: [1, 1, 1, 1],
    kDims: [1, 1, 1, 1],
    vDims: [1, 1, 1, 1],
  } as const;
  assertEquals(referenceAttention(problem, { softcap: 2 }).lse[0], 2 * Math.tanh(1.5));
  const { out, lse } = referenceAttention(problem, {}, { sinks: [3 + Math.log(3)] });
  assertAlmostEquals(out[0], 2, 1e-12); // a quarter of 8
  assertAlmostEquals(lse[0], 3 + Math.log(4), 1e-12);
  const blind = referenceAttention(problem, { window: 0, alignment: "top-left" }, {
    sinks: [5],
    mask: { values: [0], dims: [1, 1, 1, 1], bool: true },
  });
  assertEquals([blind.out[0], blind.lse[0]], [0, 5]);
});

Deno.test("referenceAttention() shares keys among successive heads", () => {
  const { out } = referenceAttention({
    q: [0, 0, 0, 0],
    k: [0, 0],
    v: [5, 6],
    qDims: [1, 4, 1, 1],
    kDims: [1, 2, 1, 1],
    vDims: [1, 2, 1, 1],
  });
  assertEquals([...out], [5, 5, 6, 6]);
});

Deno.test("roundHalfEven() and roundTo() round ties to even", () => {
  assertEquals([0.5, 1.5, 2.5, -0.5, -1.5, 2.4].map((x) => roundHalfEven(x) + 0), [
    0,
    2,
    2,
    0,
    -2,
    2,
  ]);
  assertEquals(roundTo(1 + 2 ** -8, "bf16"), 1);
  assertEquals(roundTo(1 + 3 * 2 ** -8, "bf16"), 1 + 2 ** -6);
  assertEquals(roundTo(1 + 2 ** -11, "f16"), 1);
});

Deno.test("e4m3 codes have the values of the OCP specification", () => {
  assertEquals([0x7e, 0x08, 0x07, 0x01, 0x38, 0xb8].map(e4m3Value), [
    448,
    2 ** -6,
    0.875 * 2 ** -6,
    2 ** -9,
    1,
    -1,
  ]);
  for (let code = 0; code < 256; ++code) {
    if ((code & 0x7f) !== 0x7f) assertEquals(e4m3Code(e4m3Value(code)), code);
  }
  assertEquals([1e9, -1e9, NaN, 1.0625, 1.1875].map(e4m3Code), [0x7e, 0xfe, 0x7f, 0x38, 0x3a]);
});

Deno.test("referenceMean() leaves out what is not finite", () => {
  assertEquals(referenceMean([1, NaN, 3, Infinity, 8]), 4);
  assertEquals(referenceMean([NaN]), 0);
  assertEquals(referenceMean(Array.from({ length: 5000 }, (_, i) => i)), 2499.5);
});

Deno.test("referenceGroups() gives the rows of SageAttention2's Eq. 8", () => {
  const rowsOf = (operand: "query" | "key", group: number) => {
    const { groupOf } = referenceGroups(
      { operand, dtype: "i8", granularity: "thread" },
      128,
      1,
    );
    return Array.from({ length: 128 }, (_, n) => n).filter((n) => groupOf(n, 0) === group);
  };
  assertEquals(rowsOf("query", 0), [0, 8, 16, 24]);
  assertEquals(rowsOf("query", 11), [35, 43, 51, 59]);
  assertEquals(rowsOf("key", 1), [2, 3, 10, 11, 18, 19, 26, 27, 34, 35, 42, 43, 50, 51, 58, 59]);
});

Deno.test("referenceQuantize() and referenceDequantize() undo each other but for rounding", () => {
  const recipe = { operand: "query", dtype: "i8", granularity: "token" } as const;
  const dims = [1, 1, 3, 2] as const;
  const { codes, scales } = referenceQuantize([254, -1, 0, 0, NaN, 0.5], dims, recipe);
  assertEquals([...codes], [127, -0 + 0, 0, 0, -128, 127]); // -1 / 2 is a tie
  assertEquals([...scales].slice(0, 2), [2, 1]);
  assertEquals([...referenceDequantize(codes, scales, dims, recipe)].slice(0, 4), [254, 0, 0, 0]);
});

Deno.test("packInt4() puts the even channel low", () => {
  assertEquals([...packInt4([1, -1, 7, -8, 0, 3], 3)], [0xf1, 0x07, 0x08, 0x03]);
});

Deno.test("reorder() goes to NHD and back", () => {
  const data = Float32Array.of(0, 1, 2, 3, 4, 5), dims = [1, 2, 3, 1] as const;
  assertEquals([...reorder(data, dims, "NHD")], [0, 3, 1, 4, 2, 5]);
  assertEquals([...reorder(reorder(data, dims, "NHD"), dims, "NHD", true)], [...data]);
});
