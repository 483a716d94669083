// Device.open(name, { architecture }): the portable kernels of older GPUs, proven on a newer one, and which architectures
// a device refuses.
import { assert, assertEquals, assertStringIncludes, assertThrows } from "@std/assert";
import {
  type AttentionOptions,
  attentionQuantized,
  Device,
  explain,
  quantize,
  relativeL1,
  UnsupportedError,
} from "../mod.ts";
import {
  bits,
  dtypes,
  exactly,
  nameOf,
  run,
  within,
  worstBounds,
  worstDifference,
  worstRow,
} from "./attention.ts";
import {
  deviceNames,
  download,
  type Lengths,
  olderArchitectures,
  randomProblem,
  uploadProblem,
} from "./devices.ts";
import { referenceAttention } from "./reference.ts";

const spec = { shape: [1, 2, 300, 64], dtype: "f16" } as const;

Deno.test("Device.open() refuses an architecture on the CPU and numbers that are none", () => {
  assertThrows(
    () => Device.open("cpu", { architecture: 80 }),
    RangeError,
    "architecture must be absent on the CPU: current value is 80",
  );
  for (const wrong of [0, -80, 8.9, NaN, 1000]) {
    assertThrows(
      () => Device.open("cpu", { architecture: wrong }),
      RangeError,
      `architecture must be a whole number from 1 to 999: current value is ${wrong}`,
    );
  }
  assertThrows(
    () => Device.open("cpu", { architecture: "80" as never }),
    TypeError,
    "architecture",
  );
  assertThrows(() => Device.open("cpu", { arch: 80 } as never), TypeError, `"arch"`);
});

Deno.test({
  name: "Device.open() refuses architectures that the GPU cannot run, and says which it can",
  ignore: !deviceNames.includes("cuda:0"),
  fn: () => {
    using own = Device.open("cuda:0");
    const { streams } = own.memory();
    const capability = Number(own.info.computeCapability) * 10;
    for (const wrong of [1, 75, 81, capability + 1, 999]) {
      assertThrows(
        () => Device.open("cuda:0", { architecture: wrong }),
        UnsupportedError,
        `current value is ${wrong}`,
      );
    }
    assertThrows(() => Device.open("cuda:0", { architecture: 75 }), UnsupportedError, "must be 80");
    assertEquals(own.memory().streams, streams, "a stream was left behind");
    using same = Device.open("cuda:0", { architecture: capability });
    const options = { kernel: "sage2" } as const;
    assertEquals(
      explain(spec, spec, spec, { ...options, device: same }),
      explain(spec, spec, spec, { ...options, device: own }),
    );
    using older = Device.open("cuda:0", { architecture: 80 });
    assertEquals(explain(spec, spec, spec, { ...options, device: older }).architecture, "sm_80");
  },
});

// ---- products of FP8 and INT4 codes --------------------------------------------------------------------

const name = "cuda:0" as const;
const hasCuda = deviceNames.includes(name);

const kernels = ["sage2", "sage2++", "sage2-int4"] as const;
const architectures = hasCuda ? olderArchitectures(name) : [];

/** One test for each older architecture that the GPU can stand in for. */
function architectureTest(
  what: string,
  body: (device: Device, architecture: 80 | 89) => Promise<void>,
): void {
  for (const architecture of [80, 89] as const) {
    Deno.test({
      name: `${what} as on ${architecture}`,
      ignore: !architectures.some((one) => one === architecture),
      fn: async () => {
        using device = Device.open(name, { architecture });
        const { allocations } = device.memory();
        await body(device, architecture);
        await device.synchronize();
        assertEquals(device.memory().allocations, allocations, "memory was left behind");
      },
    });
  }
}

const implementations = {
  80: { "sage2": "sm_80 mma", "sage2++": "sm_80 mma", "sage2-int4": "sm_80 mma, INT4" },
  89: {
    "sage2": "sm_89 mma, FP8",
    "sage2++": "sm_89 mma, FP8",
    "sage2-int4": "sm_89 mma, INT4, FP8",
  },
};

architectureTest("explain() names the products", (device, architecture) => {
  for (const kernel of kernels) {
    const plan = explain(spec, spec, spec, { kernel, device });
    assertEquals(
      [plan.architecture, plan.implementation],
      [`sm_${architecture}`, implementations[architecture][kernel]],
    );
  }
  return Promise.resolve();
});

/** Lengths and masks that end within tiles, and every head dimension that kernels are compiled for. */
const problems: [Lengths, AttentionOptions][] = [
  [{ queries: 1, keys: 1, channels: 64 }, {}],
  [{ batch: 2, heads: 4, kvHeads: 2, queries: 150, keys: 333, channels: 64 }, {}],
  [{ heads: 2, queries: 257, channels: 40 }, { causal: true }],
  [{ heads: 4, kvHeads: 1, queries: 300, channels: 128 }, { causal: true }],
  [{ batch: 2, heads: 2, queries: 130, keys: 700, channels: 128, width: 72 }, {}],
  [{ heads: 2, queries: 200, keys: 190, channels: 72, width: 128 }, {
    smoothQ: true,
    smoothV: true,
  }],
  [{ heads: 2, queries: 190, keys: 320, channels: 256 }, { causal: true }],
  [{ heads: 1, queries: 70, keys: 129, channels: 200, width: 160 }, {}],
  [{ heads: 2, queries: 400, channels: 128 }, { causal: true, granularity: "token" }],
  [{ heads: 2, queries: 256, channels: 64 }, { granularity: "block", smoothK: false }],
];

architectureTest("sage2, sage2++ and sage2-int4 against float64", async (device, architecture) => {
  for (const [at, [lengths, options]] of problems.entries()) {
    for (const dtype of dtypes) {
      const problem = randomProblem(lengths, dtype, 400 + at);
      const reference = referenceAttention(problem, options);
      using tensors = uploadProblem(device, problem, dtype);
      for (const kernel of kernels) {
        const what = `${kernel} as on ${architecture}, ${dtype}, ${nameOf(lengths)}`;
        const { out, lse } = await run(tensors, { ...options, kernel });
        const bounds = worstBounds[kernel][dtype];
        within(relativeL1(out, reference.out), bounds.all, what);
        within(worstRow(out, reference.out, lengths.width ?? lengths.channels), bounds.row, what);
        within(worstDifference(lse, reference.lse), bounds.lse, `log-sum-exp of ${what}`);
      }
    }
  }
});

/**
 * With the keys of one tile the maximum of a row is the same for every order of summation, so codes of P are those of
 * the CPU device but near ties. As on 8.9 P is rounded once: what remains are sums of 13 bits (2^-12 of the partial
 * sums, which are a few times larger than O) or 2^-11 in FP16. As on 8.0 P is FP16 first: 2^-8 of the codes are one step
 * of 2^-3 off, which makes 2^-7 of P's error of about 3 %.
 */
const oneTile = {
  80: { "sage2": 4e-3, "sage2-int4": 4e-3, "sage2++": 4e-3 },
  89: { "sage2": 5e-4, "sage2-int4": 5e-4, "sage2++": 1e-3 },
};

architectureTest("one tile of keys is what the CPU device gives", async (device, architecture) => {
  using cpu = Device.open("cpu");
  for (const channels of [64, 128, 256]) {
    const lengths = { heads: 4, queries: 128, keys: 64, channels };
    const problem = randomProblem(lengths, "f32", 700 + channels);
    using there = uploadProblem(device, problem, "f32");
    using here = uploadProblem(cpu, problem, "f32");
    for (const kernel of kernels) {
      for (const pvRange of kernel === "sage2++" ? [448, 224, 112] as const : [undefined]) {
        const options = exactly({ kernel, ...pvRange && { pvRange } });
        const what = `${kernel} ${pvRange ?? ""} D${channels}`;
        const { out, lse } = await run(there, options), expected = await run(here, options);
        within(relativeL1(out, expected.out), oneTile[architecture][kernel], what);
        within(worstDifference(lse, expected.lse), 2e-5, `log-sum-exp of ${what}`);
      }
    }
  }
});

Deno.test({
  name: "INT4 tensor cores and INT8 ones give the same integers",
  ignore: !hasCuda,
  fn: async () => {
    using own = Device.open(name);
    for (const [at, [lengths, given]] of problems.entries()) {
      // Not per thread, which Hopper's own kernel would take.
      const granularity = at % 2 ? "token" as const : "warp" as const;
      const options = { ...given, granularity, kernel: "sage2-int4" } as const;
      const problem = randomProblem(lengths, "f16", 500 + at);
      using tensors = uploadProblem(own, problem, "f16");
      const { implementation } = explain(tensors.q, tensors.k, tensors.v, options);
      const expected = await run(tensors, options);
      for (const architecture of architectures) {
        using device = Device.open(name, { architecture });
        using older = uploadProblem(device, problem, "f16");
        const { out, lse } = await run(older, options);
        const what = `as on ${architecture}, ${nameOf(lengths)}`;
        // Of the scores alone: P's codes have no part in it.
        assertEquals(bits(lse), bits(expected.lse), `log-sum-exp ${what}`);
        const { implementation: olders } = explain(older.q, older.k, older.v, options);
        assertStringIncludes(olders, "INT4");
        if (olders.includes("FP8") === implementation.includes("FP8")) {
          assertEquals(bits(out), bits(expected.out), what);
        }
      }
    }
  },
});

architectureTest("a mask that is fully open changes no bit", async (device) => {
  for (const channels of [64, 128, 256]) {
    const lengths = { heads: 2, queries: 130, keys: 260, channels };
    const problem = randomProblem(lengths, "f16", 600 + channels);
    using tensors = uploadProblem(device, problem, "f16");
    const open = new Uint8Array(130 * 260).fill(1);
    using mask = device.tensor(open, [1, 1, 130, 260], { dtype: "bool" });
    for (const kernel of kernels) {
      const plain = await run(tensors, { kernel }), masked = await run(tensors, { kernel, mask });
      assertEquals(bits(masked.out), bits(plain.out), `${kernel} D${channels}`);
      assertEquals(bits(masked.lse), bits(plain.lse), `log-sum-exp of ${kernel} D${channels}`);
    }
  }
});

architectureTest("values that are not finite reach who sees them", async (device) => {
  const lengths = { heads: 2, queries: 150, channels: 64 };
  const channel = 21;
  const clean = randomProblem(lengths, "f16", 800);
  for (const kernel of kernels) {
    for (const causal of [false, true]) {
      for (const token of [0, 77, 149]) {
        for (const bad of [NaN, Infinity, -Infinity]) {
          const v = clean.v.slice();
          v[token * 64 + channel] = bad;
          using tensors = uploadProblem(device, { ...clean, v }, "f16");
          const { out } = await run(tensors, { kernel, causal });
          out.forEach((number, i) => {
            const row = Math.floor(i / 64), sees = row < 150 && (!causal || row >= token);
            const what = `${bad} at ${token}, ${kernel}: ${number} is element ${i}`;
            if (sees && i % 64 === channel) assertEquals(number, bad, what);
            else assert(Number.isFinite(number), what);
          });
        }
      }
    }
  }
});

architectureTest("codes as operands give what tensors give", async (device) => {
  const lengths = { batch: 2, heads: 2, queries: 140, keys: 270, channels: 128 };
  const problem = randomProblem(lengths, "f16", 900);
  using tensors = uploadProblem(device, problem, "f16");
  for (const kernel of kernels) {
    const recipe = kernel === "sage2-int4" ? "i4" as const : "i8" as const;
    using q = quantize(tensors.q, { dtype: recipe, granularity: "thread", operand: "query" });
    using k = quantize(tensors.k, { dtype: recipe, granularity: "thread", operand: "key" });
    const range = kernel === "sage2++" ? { range: 9 } : {};
    using v = quantize(tensors.v, {
      dtype: "e4m3",
      granularity: "channel",
      operand: "value",
      ...range,
    });
    using result = attentionQuantized(q, k, v, { kernel, returnLse: true });
    const whole = await run(tensors, { kernel, smoothK: false, smoothQ: false });
    assertEquals(bits(await download(result.lse)), bits(whole.lse), `log-sum-exp of ${kernel}`);
    assertEquals(bits(await download(result.out)), bits(whole.out), kernel);
  }
});
