// Calibration: policies on scores whose right answer is known, calibration on tensors, what it refuses, the program.
import {
  assert,
  assertAlmostEquals,
  assertEquals,
  assertLess,
  assertRejects,
  assertStringIncludes,
  assertThrows,
} from "@std/assert";
import { fromFileUrl, join } from "@std/path";
import {
  attention,
  calibrate,
  type CalibrateOptions,
  type CalibrationProgress,
  type CalibrationSample,
  cosine,
  Device,
  parseSafetensors,
  type PrecisionMetric,
  PrecisionPlan,
  relativeL1,
  rmse,
  sageAttention2Policy,
  sageAttentionPolicy,
  UnsupportedError,
} from "../mod.ts";
import { type Candidate, type Choice, choose, score } from "../lib/precision_policy.ts";
import { deviceTest, download, randomProblem, runs, uploadProblem } from "./devices.ts";
import { runExample } from "./programs.ts";
import { type ErrorClass, type Loose, worksStill } from "./refusals.ts";
import { type Dims, normal, referenceAttention } from "./reference.ts";

const root = fromFileUrl(new URL("..", import.meta.url));

// ---- policies -----------------------------------------------------------------------------------------

/** Pairs whose candidates have these errors and, where given, these times. */
function pairs(errors: (number | null)[][], times: number[][] = []): Candidate[][] {
  return errors.map((rungs, pair) =>
    rungs.map((score, rung) => ({ score, milliseconds: times[pair]?.[rung] ?? null }))
  );
}

const decide = (
  choice: Choice,
  candidates: Candidate[][],
  metric: PrecisionMetric = "relativeL1",
) => choose("calibrate", metric, choice, candidates);

Deno.test("a threshold gives each pair the first recipe that reaches it, else the last", () => {
  const errors = [[0.1, 0.05, 0.01], [0.02, 0.03, 0.01], [0.5, 0.02, 0.03], [0.5, 0.4, 0.3]];
  assertEquals(decide({ threshold: 0.02 }, pairs(errors)), [2, 0, 1, 2]);
  assertEquals(decide({ threshold: 0 }, pairs(errors)), [2, 2, 2, 2]);
  assertEquals(decide({ threshold: 1 }, pairs(errors)), [0, 0, 0, 0]);
  assertEquals(decide({ threshold: 1e9 }, pairs([[null, 0.3]])), [1], "not finite is not reached");
  const cosines = [[0.9981, 1], [0.998, 1], [0.9979, 0.9999], [0.5, 0.6]];
  assertEquals(decide({ threshold: 0.998 }, pairs(cosines), "cosine"), [0, 0, 1, 1]);
  assertEquals(
    decide({ threshold: 0.998 }, pairs(cosines), "cosine*(1-relativeL1)"),
    [0, 0, 1, 1],
  );
});

Deno.test("shares give the best-scoring pairs the cheaper recipes", () => {
  const two = pairs([[0.5, 0], [0.1, 0], [0.3, 0], [0.4, 0], [0.2, 0]]);
  assertEquals(decide({ budget: { shares: [0.7] } }, two), [1, 0, 0, 1, 0]);
  assertEquals(decide({ budget: { shares: [0.6] } }, two), [1, 0, 0, 1, 0], "0.6 · 5 is 3");
  assertEquals(decide({ budget: { shares: [0] } }, two), [1, 1, 1, 1, 1]);
  assertEquals(decide({ budget: { shares: [1] } }, two), [0, 0, 0, 0, 0]);
  const cosines = pairs([[0.5, 1], [0.9, 1], [0.7, 1]]);
  assertEquals(decide({ budget: { shares: [0.34] } }, cosines, "cosine"), [1, 0, 1]);
  assertEquals(decide({ budget: { shares: [0.5] } }, pairs([[null, 0], [0.9, 0]])), [1, 0]);
  // The first recipe goes to pair 1, the second to the better of those that are left there: 0 and 3.
  const three = pairs([[0.5, 0.2, 0], [0.1, 0.9, 0], [0.3, 0.3, 0], [0.4, 0.1, 0]]);
  assertEquals(decide({ budget: { shares: [0.25, 0.5] } }, three), [1, 0, 2, 1]);
});

Deno.test("ten pairs and 30 % of 8 bits are three, of the worst", () => {
  const { budget, ladder, metric } = sageAttention2Policy();
  assertEquals(ladder.map(({ kernel }) => kernel), ["sage2-int4", "sage2"]);
  const scores = [0.9, 0.8, 0.7, 0.95, 0.99, 0.6, 0.97, 0.98, 0.85, 0.96];
  const chosen = decide({ budget }, pairs(scores.map((one) => [one, 0.999])), metric);
  assertEquals(chosen, [0, 1, 1, 0, 0, 1, 0, 0, 0, 0]);
});

Deno.test("a cost is spent where it lowers the error most", () => {
  const costs = [1, 2, 4];
  const budget = (cost: number) => ({ budget: { cost, costs } });
  const errors = pairs([[0.3, 0.2, 0.1], [0.9, 0.1, 0.05], [0.2, 0.19, 0]]);
  // Of 12: 3 is the least; pair 1 gains .8 for 1, pair 0 .1 for 1, pair 2 .2 / 3 for 3 at once.
  assertEquals(decide(budget(3 / 12), errors), [0, 0, 0]);
  assertEquals(decide(budget(4 / 12), errors), [0, 1, 0]);
  assertEquals(decide(budget(5 / 12), errors), [1, 1, 0]);
  assertEquals(decide(budget(8 / 12), errors), [1, 1, 2]);
  assertEquals(decide(budget(10 / 12), errors), [2, 1, 2]);
  assertEquals(decide(budget(1), errors), [2, 2, 2]);
  assertEquals(decide(budget(100), errors), [2, 2, 2]);
  assertThrows(
    () => decide(budget(0.24), errors),
    RangeError,
    "budget.cost must be at least 0.250, which the cheapest recipes cost: current value is 0.24.",
  );
});

Deno.test("a measured cost counts as it is, whatever the order of the ladder", () => {
  // In pair 0 the first recipe is dearer than the second and worse: it is never chosen.
  const candidates = pairs([[0.3, 0.2, 0.1], [0.3, 0.2, 0.1]], [[3, 1, 4], [1, 2, 4]]);
  assertEquals(decide({ budget: { cost: 0.25 } }, candidates), [1, 0]);
  assertEquals(decide({ budget: { cost: 3 / 8 } }, candidates), [1, 1]);
  assertEquals(decide({ budget: { cost: 1 } }, candidates), [2, 2]);
});

Deno.test("a cost is spent first where nothing finite came out", () => {
  const errors = pairs([[null, 0.5, 0.4], [0.9, 0.1, 0], [null, null, null]]);
  const budget = (cost: number) => ({ budget: { cost, costs: [1, 2, 3] } });
  assertEquals(decide(budget(4 / 9), errors), [1, 0, 0]);
  assertEquals(decide(budget(1), errors), [2, 2, 0], "where nothing helps, nothing is spent");
});

Deno.test("a cost is kept, and spent nearly as well as by trying everything", () => {
  const random = normal(7, 4000).map((value) => Math.abs(value));
  let at = 0;
  for (let round = 0; round < 60; ++round) {
    const next = () => random[at++ % random.length];
    const costs = [0, 1, 2].map(() => Array.from({ length: 3 }, () => 0.5 + next()));
    const errors = [0, 1, 2].map(() => Array.from({ length: 3 }, next));
    const dearest = costs.reduce((sum, rungs) => sum + rungs[2], 0);
    const least = costs.reduce((sum, rungs) => sum + Math.min(...rungs), 0);
    const limit = least + 0.5 * next() * (dearest - least);
    if (limit < least) continue;
    const total = (values: number[][], chosen: number[]) =>
      chosen.reduce((sum, rung, pair) => sum + values[pair][rung], 0);
    const chosen = decide({ budget: { cost: limit / dearest } }, pairs(errors, costs));
    assert(total(costs, chosen) <= limit * (1 + 1e-6), `round ${round}`);
    let best = Infinity;
    for (let i = 0; i < 27; ++i) {
      const one = [i % 3, Math.floor(i / 3) % 3, Math.floor(i / 9)];
      if (total(costs, one) <= limit) best = Math.min(best, total(errors, one));
    }
    const largestStep = Math.max(...errors.map((rungs) => Math.max(...rungs) - Math.min(...rungs)));
    assert(total(errors, chosen) <= best + largestStep, `round ${round}: one step at most is lost`);
  }
});

Deno.test("score() is every metric, and their product", () => {
  const actual = [1, 2, 3.5], reference = [1, 2, 3];
  const similarity = cosine(actual, reference), distance = relativeL1(actual, reference);
  assertEquals(score(actual, reference), {
    cosine: similarity,
    relativeL1: distance,
    rmse: rmse(actual, reference),
    "cosine*(1-relativeL1)": similarity * (1 - distance),
  });
});

Deno.test("sageAttention2Policy() takes a share, and nothing else", () => {
  assertEquals(sageAttention2Policy({ eightBitShare: 1 }).budget, { shares: [0] });
  for (const [value, error] of [[-0.1, RangeError], [1.1, RangeError], ["1", TypeError]] as const) {
    assertThrows(
      () => sageAttention2Policy({ eightBitShare: value as Loose }),
      error,
      "eightBitShare must be a number from 0 to 1",
    );
  }
  assertThrows(() => sageAttention2Policy({ share: 0.3 } as Loose), TypeError, `"share"`);
});

// ---- real tensors -------------------------------------------------------------------------------------

const captures = [0, 6, 18];

async function capture(layer: number) {
  const file = `tests/data/tinyllama-layer${String(layer).padStart(2, "0")}.safetensors`;
  const content = parseSafetensors(await Deno.readFile(join(root, file)));
  return ["q", "k", "v"].map((name) => content.get(name, "f16"));
}

/** The three layers of a language model, one after another on the device. */
async function* realSamples(device: Device): AsyncGenerator<CalibrationSample> {
  for (const layer of captures) {
    const tensors = (await capture(layer)).map(({ data, shape }) => device.tensor(data, shape));
    using q = tensors[0], k = tensors[1], v = tensors[2];
    yield { layer, q, k, v, options: { causal: true } };
  }
}

/** Whether the device has every recipe of a ladder for such tensors. */
function has(device: Device, { ladder }: { ladder: CalibrateOptions["ladder"] }): boolean {
  using x = device.empty([1, 1, 64, 64], { dtype: "f16" });
  return ladder.every((recipe) => runs(x, x, x, recipe));
}

/** Relative L1 of kernels on layers 0, 6 and 18 against the definition in float64. */
const recorded: Record<string, number[]> = {
  "sage1-int8": [0.0089, 0.1413, 0.1335],
  sage1: [0.0075, 0.0287, 0.023],
};

deviceTest("calibrate() chooses as SageAttention does on a real model", async (device) => {
  const policy = sageAttentionPolicy();
  if (!has(device, policy)) {
    const { message } = await assertRejects(
      () => calibrate(realSamples(device), policy),
      UnsupportedError,
    );
    assertStringIncludes(message, "sage1-int8");
    return;
  }
  const progress: CalibrationProgress[] = [];
  const plan = await calibrate(realSamples(device), {
    ...policy,
    model: { name: "TinyLlama", heads: 32, kvHeads: 4 },
    total: 3,
    onProgress: (one) => progress.push(one),
  });
  // From the first key to the last, the CPU device meets the sink first, and INT8 loses the weights beside it; CUDA
  // goes the other way.
  const expected = device.kind === "cpu"
    ? ["sage1-int8", "sage1", "sage1"]
    : plan.entries.map(({ candidates }) =>
      candidates[0].scores.cosine! > 0.998 ? "sage1-int8" : "sage1"
    );
  assertEquals(plan.entries.map(({ chosen }) => chosen), expected);
  assertEquals(progress, [
    { done: 1, total: 3, layer: 0, timestep: undefined },
    { done: 2, total: 3, layer: 6, timestep: undefined },
    { done: 3, total: 3, layer: 18, timestep: undefined },
  ]);
  assertEquals(plan.metric, "cosine");
  assertEquals(
    plan.model.layers,
    [0, 6, 18].map((layer) => (
      { layer, heads: 32, kvHeads: 4, headDim: 64, valueDim: 64 }
    )),
  );
  assertStringIncludes(plan.created.device, device.name);
  plan.entries.forEach(({ samples, candidates, timestep }, i) => {
    assertEquals([samples, timestep], [1, null]);
    assertEquals(candidates[0].recipe, "sage1-int8");
    for (const { recipe, scores, milliseconds } of candidates) {
      const most = recorded[recipe][i], room = 1e-4 + 0.01 * most;
      if (device.kind === "cpu") assertAlmostEquals(scores.relativeL1!, most, room);
      else assertLess(scores.relativeL1!, 1.25 * most);
      assert(milliseconds! > 0, recipe);
    }
  });
});

deviceTest("calibrate() scores as the definition in float64 does", async (device) => {
  const [layer, [q, k, v]] = [0, await capture(0)];
  const floats = [q, k, v].map(({ data }) => Float32Array.from(data));
  const problem = {
    q: floats[0],
    k: floats[1],
    v: floats[2],
    qDims: q.shape as readonly number[] as Dims,
    kDims: k.shape as readonly number[] as Dims,
    vDims: v.shape as readonly number[] as Dims,
  };
  const exact = referenceAttention(problem, { causal: true, scale: 0.2 }).out;
  using tensors = uploadProblem(device, problem, "f16");
  const options = { causal: true, scale: 0.2 };
  using out = attention(tensors.q, tensors.k, tensors.v, { ...options, kernel: "sage1" });
  const expected = score(await download(out), exact);
  for (const [reference, room] of [["exact", 1e-6], ["fast", 1e-3]] as const) {
    const plan = await calibrate([{ layer, ...tensors, options }], {
      ladder: [{ kernel: "sage1" }],
      threshold: 0.9,
      repeats: 0,
      reference,
    });
    const { scores, milliseconds } = plan.entries[0].candidates[0];
    assertEquals(milliseconds, null);
    for (const metric of ["cosine", "relativeL1", "rmse", "cosine*(1-relativeL1)"] as const) {
      assertLess(Math.abs(scores[metric]! - expected[metric]), room, `${reference} ${metric}`);
    }
  }
});

deviceTest("calibrate() runs the worst layers in 8 bits as SageAttention2 does", async (device) => {
  const policy = sageAttention2Policy();
  if (!has(device, policy)) return;
  const plan = await calibrate(realSamples(device), { ...policy, repeats: 0 });
  assertEquals(plan.metric, "cosine*(1-relativeL1)");
  const scores = plan.entries.map(({ candidates }) => candidates[0].scores[plan.metric]!);
  const worst = scores.indexOf(Math.min(...scores));
  plan.entries.forEach(({ chosen }, i) => {
    assertEquals(chosen, i === worst ? "sage2" : "sage2-int4", `scores ${scores}`);
  });
  assertEquals(worst, 2, "layer 18");
});

// ---- samples ------------------------------------------------------------------------------------------

const ladder = [{ kernel: "sage1" }, { kernel: "flash" }] as const;

deviceTest(
  "calibrate() takes means over samples and sorts layers and time steps",
  async (device) => {
    const sizes = { heads: 2, queries: 96, channels: 32 };
    using a = uploadProblem(device, randomProblem(sizes, "f16", 1), "f16");
    using b = uploadProblem(device, randomProblem({ ...sizes, queries: 40 }, "f16", 2), "f16");
    const options = { ladder, metric: "relativeL1", threshold: 0.001 } as const;
    const alone = await Promise.all(
      [a, b].map((one) => calibrate([{ layer: 1, timestep: 5, ...one }], options)),
    );
    const plan = await calibrate([
      { layer: 1, timestep: 5, ...a },
      { layer: 0, ...b },
      { layer: 1, timestep: -2.5, ...b },
      { layer: 1, timestep: 5, ...b },
    ], options);
    const places = plan.entries.map(({ layer, timestep, samples }) => [layer, timestep, samples]);
    assertEquals(places, [[0, null, 1], [1, -2.5, 1], [1, 5, 2]]);
    ladder.forEach((_, i) => {
      const [first, second] = alone.map(({ entries }) =>
        entries[0].candidates[i].scores.relativeL1!
      );
      const { scores } = plan.entries[2].candidates[i];
      assertAlmostEquals(scores.relativeL1!, (first + second) / 2, 1e-12);
      assert(first !== second);
    });
    using planned = attention(b.q, b.k, b.v, { plan, layer: 1, timestep: 7 });
    using flash = attention(b.q, b.k, b.v, { kernel: "flash" });
    assertEquals(await planned.data(), await flash.data());
    assertEquals(plan.entries.map(({ chosen }) => chosen), ["flash", "flash", "flash"]);
  },
);

deviceTest(
  "calibrate() takes bf16, f32, another layout and values of another width",
  async (device) => {
    const lengths = { heads: 4, kvHeads: 2, queries: 70, keys: 90, channels: 32, width: 16 };
    for (const dtype of ["bf16", "f32"] as const) {
      using tensors = uploadProblem(device, randomProblem(lengths, dtype), dtype, "NHD");
      const plan = await calibrate([{ layer: 2, ...tensors }], {
        ladder: [{ kernel: "sage1", smoothV: true }],
        threshold: 0.9,
      });
      assertEquals(plan.model.layers, [
        { layer: 2, heads: 4, kvHeads: 2, headDim: 32, valueDim: 16 },
      ]);
      const { scores } = plan.entries[0].candidates[0];
      assertLess(scores.relativeL1!, 0.03, dtype);
      assertLess(0.999, scores.cosine!, dtype);
    }
  },
);

deviceTest(
  "calibrate() takes masks in tensors, and recipes that need a causal call",
  async (device) => {
    const problem = randomProblem({ heads: 2, queries: 200, channels: 32 }, "f16");
    using tensors = uploadProblem(device, problem, "f16");
    using alibi = device.tensor(new Float32Array([0.5, 0.25]), [1, 2, 1, 1]);
    const options = { causal: true, window: 64, softcap: 5, alibi };
    const recipe = { kernel: "sage2", rotate: true, band: true } as const;
    if (!runs(tensors.q, tensors.k, tensors.v, { ...options, ...recipe })) return;
    const plan = await calibrate([{ layer: 0, ...tensors, options }], {
      ladder: [recipe],
      threshold: 0.9,
      repeats: 0,
    });

    using cpu = Device.open("cpu");
    using exactTensors = uploadProblem(cpu, problem, "f32");
    const { q, k, v } = exactTensors;
    using cpuAlibi = cpu.tensor(new Float32Array([0.5, 0.25]), [1, 2, 1, 1]);
    using exact = attention(q, k, v, { ...options, alibi: cpuAlibi, kernel: "flash" });
    using out = attention(tensors.q, tensors.k, tensors.v, { ...options, plan, layer: 0 });
    const expected = score(await download(out), await download(exact));
    assertAlmostEquals(plan.entries[0].candidates[0].scores.relativeL1!, expected.relativeL1, 1e-9);
    assertLess(expected.relativeL1, 0.02);
    assertThrows(
      () => attention(tensors.q, tensors.k, tensors.v, { plan, layer: 0 }),
      TypeError,
      "causal with band must be true",
    );
  },
);

deviceTest("calibrate() passes over a recipe whose score is not finite", async (device) => {
  // Both keys score 1.25, and their values cancel exactly; of their codes one sum is 159, the other 158.
  using q = device.tensor(new Float16Array([1, 1, 1, 1]), [1, 1, 2, 2]);
  using k = device.tensor(new Float16Array([1, 0.25, 0.625, 0.625]), [1, 1, 2, 2]);
  using v = device.tensor(new Float16Array([1, 1, -1, -1]), [1, 1, 2, 2]);
  const plan = await calibrate([{ layer: 0, q, k, v }], {
    ladder: [{ kernel: "sage1", smoothK: false }, { kernel: "flash" }],
    metric: "relativeL1",
    budget: { cost: 1, costs: [1, 2] },
    repeats: 0,
  });
  const [sage1, flash] = plan.entries[0].candidates;
  assertEquals([sage1.scores.relativeL1, sage1.scores.cosine], [null, 0]);
  assertEquals([flash.scores.relativeL1, flash.scores.cosine], [0, 1]);
  assertEquals(plan.entries[0].chosen, "flash");
  assertEquals(plan.recipe(0), { kernel: "flash" });
  assertEquals(PrecisionPlan.parse(JSON.stringify(plan)).toJSON(), plan.toJSON());
});

// ---- what is refused ----------------------------------------------------------------------------------

interface Samples {
  one: CalibrationSample;
  make: (shape: number[]) => Loose;
}

const basic = { ladder, threshold: 0.9, repeats: 0 };
const refusals: [string, (samples: Samples) => [Loose, Loose], ErrorClass, string][] = [
  ["no samples", () => [[], basic], RangeError, "samples must not be empty"],
  ["samples that are none", () => [5, basic], TypeError, "samples must be iterable"],
  ["no ladder", ({ one }) => [[one], { threshold: 1 }], TypeError, "ladder must be an array"],
  [
    "an empty ladder",
    ({ one }) => [[one], { ...basic, ladder: [] }],
    RangeError,
    "ladder must not be empty",
  ],
  [
    "an unknown kernel",
    ({ one }) => [[one], { ...basic, ladder: [...ladder, { kernel: "sage3" }] }],
    RangeError,
    "Cannot calibrate with ladder[2] as kernel must be one of",
  ],
  [
    "a kernel left open",
    ({ one }) => [[one], { ...basic, ladder: [{ kernel: "auto" }] }],
    TypeError,
    `Cannot calibrate with ladder[0] as kernel must be given, and not be "auto"`,
  ],
  [
    "an option that is no matter of precision",
    ({ one }) => [[one], { ...basic, ladder: [{ kernel: "sage1", causal: true }] }],
    TypeError,
    `Cannot calibrate with ladder[0] as options must have no property "causal"`,
  ],
  [
    "options that contradict each other",
    ({ one }) => [[one], { ...basic, ladder: [{ kernel: "flash", smoothK: true }] }],
    TypeError,
    `Cannot calibrate with ladder[0] as smoothK with kernel "flash" must be absent`,
  ],
  [
    "a recipe twice",
    ({ one }) => [[one], { ...basic, ladder: [...ladder, { kernel: "sage1" }] }],
    RangeError,
    "ladder[2] must differ from ladder[0]",
  ],
  [
    "an unknown option",
    ({ one }) => [[one], { ...basic, samples: 3 }],
    TypeError,
    `options must have no property "samples"`,
  ],
  [
    "an unknown metric",
    ({ one }) => [[one], { ...basic, metric: "psnr" }],
    RangeError,
    `metric must be one of "cosine", "relativeL1", "rmse"`,
  ],
  [
    "neither threshold nor budget",
    ({ one }) => [[one], { ladder }],
    TypeError,
    "threshold or budget must be given, and not both",
  ],
  [
    "threshold and budget",
    ({ one }) => [[one], { ...basic, budget: { shares: [1] } }],
    TypeError,
    "threshold or budget must be given, and not both",
  ],
  [
    "a threshold of NaN",
    ({ one }) => [[one], { ...basic, threshold: NaN }],
    RangeError,
    "threshold must be a finite number",
  ],
  ...([
    [{ shares: [0.5, 0.5] }, RangeError, "budget.shares must have length 1 for this ladder"],
    [{ shares: 0.5 }, TypeError, "budget.shares must be an array"],
    [{ shares: [1.5] }, RangeError, "budget.shares[0] must be a number from 0 to 1"],
    [{ shares: ["1"] }, TypeError, "budget.shares[0] must be a number from 0 to 1"],
    [{ shares: [1], cost: 1 }, TypeError, `must have no property "cost"`],
    [{ cost: 0 }, RangeError, "budget.cost must be a positive, finite number"],
    [{ cost: 1, costs: [1] }, RangeError, "budget.costs must have length 2 for this ladder"],
    [{ cost: 1, costs: [1, -1] }, RangeError, "budget.costs[1] must be a positive"],
    [{ cost: 1, costs: [2, 1] }, RangeError, "budget.costs[1] must be at least budget.costs[0]"],
    [{ cost: 1, costs: [1, 2], times: [] }, TypeError, `must have no property "times"`],
    [{ cost: 0.1, costs: [1, 2] }, RangeError, "budget.cost must be at least 0.500"],
    [{ cost: 1 }, RangeError, "repeats must be at least 1 for a budget of measured cost"],
    [{}, TypeError, "budget.cost must be a positive, finite number"],
    [5, TypeError, "options must be an object"],
  ] as const).map(([budget, error, says]): typeof refusals[number] => [
    `a budget of ${Deno.inspect(budget)}`,
    ({ one }) => [[one], { ladder, repeats: 0, budget }],
    error,
    says,
  ]),
  [
    "an unknown reference",
    ({ one }) => [[one], { ...basic, reference: "flash" }],
    RangeError,
    `reference must be one of "exact", "fast"`,
  ],
  [
    "a fraction of a repeat",
    ({ one }) => [[one], { ...basic, repeats: 1.5 }],
    RangeError,
    "repeats must be a whole number from 0",
  ],
  [
    "progress to nowhere",
    ({ one }) => [[one], { ...basic, onProgress: true }],
    TypeError,
    "onProgress must be a function",
  ],
  [
    "a model of no heads",
    ({ one }) => [[one], { ...basic, model: { heads: 0 } }],
    RangeError,
    "model.heads must be a whole number from 1",
  ],
  [
    "a model of another head dimension",
    ({ one }) => [[one], { ...basic, model: { headDim: 128 } }],
    RangeError,
    "headDim of sample 0 must be that of the model (128): current value is 16.",
  ],
  [
    "a layer missing",
    ({ one }) => [[one, { ...one, layer: 2 }], { ...basic, model: { layers: 3 } }],
    RangeError,
    "samples must hold layers 0 to 2, all of the model's: current value is [0, 2].",
  ],
  ["a sample of null", () => [[null], basic], TypeError, "sample 0 must be an object"],
  [
    "a sample without layer",
    ({ one: { layer: _, ...rest } }) => [[rest], basic],
    TypeError,
    "layer of sample 0 must be a whole number",
  ],
  [
    "a sample without keys",
    ({ one: { k: _, ...rest } }) => [[rest], basic],
    TypeError,
    "k of sample 0 must be a Tensor",
  ],
  [
    "a time step that is none",
    ({ one }) => [[{ ...one, timestep: NaN }], basic],
    RangeError,
    "timestep of sample 0 must be a finite number or absent",
  ],
  [
    "a time step in some samples of a layer",
    ({ one }) => [[one, { ...one, timestep: 1 }], basic],
    TypeError,
    "timestep of sample 1 must be absent, as in other samples of layer 0: current value is 1.",
  ],
  [
    "heads that change",
    ({ one, make }) => {
      const x = make([1, 2, 8, 16]);
      return [[one, { layer: 0, q: x, k: x, v: x }], basic];
    },
    RangeError,
    "heads of sample 1 must be 1, as in other samples of layer 0: current value is 2.",
  ],
  [
    "keys of another width",
    ({ one, make }) => [[{ ...one, k: make([1, 1, 8, 8]) }], basic],
    RangeError,
    "channels of k must equal channels of q (16)",
  ],
  [
    "a sample with an output",
    ({ one, make }) => [[{ ...one, options: { out: make([1, 1, 8, 16]) } }], basic],
    TypeError,
    `Cannot calibrate with the options of sample 0 as options must have no property "out"`,
  ],
  [
    "a sample with a kernel",
    ({ one }) => [[{ ...one, options: { kernel: "flash" } }], basic],
    TypeError,
    `Cannot calibrate with the options of sample 0 as options must have no property "kernel"`,
  ],
  [
    "tensors whose attention is not finite",
    ({ one, make }) => {
      const v = make([1, 1, 8, 16]);
      v.write(new Float16Array(8 * 16).fill(NaN));
      return [[{ ...one, v }], basic];
    },
    RangeError,
    "exact attention of sample 0 must be finite, or nothing can be compared with it",
  ],
];

for (const [name, args, error, says] of refusals) {
  deviceTest(`calibrate() refuses ${name}`, async (device) => {
    using kept = new DisposableStack();
    const make = (shape: number[]) => {
      const zeros = new Float16Array(shape.reduce((a, b) => a * b));
      return kept.use(device.tensor(zeros, shape));
    };
    const x = make([1, 1, 8, 16]), one = { layer: 0, q: x, k: x, v: x };
    const [samples, options] = args({ one, make });
    const thrown = await assertRejects(() => calibrate(samples, options), error);
    assertEquals(thrown.constructor, error);
    assertStringIncludes(thrown.message, says);
    assert(thrown.message.startsWith("Cannot ") && thrown.message.endsWith("."), thrown.message);
    await worksStill(device);
  });
}

deviceTest("calibrate() refuses samples of another device and disposed ones", async (device) => {
  using x = device.tensor(new Float16Array(128), [1, 1, 8, 16]);
  const gone = device.tensor(new Float16Array(128), [1, 1, 8, 16]);
  gone.dispose();
  await assertRejects(
    () => calibrate([{ layer: 0, q: x, k: x, v: gone }], basic),
    Error,
    "Cannot use a tensor that was disposed.",
  );
});

deviceTest("calibrate() passes on what a loader or a listener throws", async (device) => {
  using x = device.tensor(new Float16Array(128), [1, 1, 8, 16]);
  let closed = false;
  function* loader() {
    try {
      yield { layer: 0, q: x, k: x, v: x };
      throw new Error("no more files");
    } finally {
      closed = true;
    }
  }
  await assertRejects(() => calibrate(loader(), basic), Error, "no more files");
  assert(closed);
  closed = false;
  const onProgress = () => {
    throw new Error("nobody listens");
  };
  await assertRejects(() => calibrate(loader(), { ...basic, onProgress }), Error, "nobody listens");
  assert(closed, "the loader's resources are freed");
});

// ---- the program --------------------------------------------------------------------------------------

Deno.test("calibrate: writes plans that can be read, their pictures, and what they gain", async () => {
  const folder = await Deno.makeTempDir();
  try {
    const { code, text, errors } = await runExample(
      "calibrate",
      ["--allow-ffi=dist", "--allow-env=DENO_SAGE_PATH", "--allow-read", `--allow-write=${folder}`],
      ["tests/data", folder],
    );
    assertEquals(code, 0, text + errors);
    assert(!errors.includes("█"), "no progress bar where there is no terminal");
    const names = [...Deno.readDirSync(folder)].map(({ name }) => name).sort();
    const plans = names.filter((name) => name.endsWith(".json"));
    assert(plans.includes("plan-tinyllama-1.1b-chat-ladder.json"), String(names));
    assert(plans.includes("plan-whisper-base.en-encoder-ladder.json"), String(names));
    for (const name of plans) {
      const plan = PrecisionPlan.parse(await Deno.readTextFile(join(folder, name)));
      assertEquals(plan.entries.length, name.includes("tinyllama") ? 3 : 1);
      assertStringIncludes(
        await Deno.readTextFile(join(folder, name.replace("json", "svg"))),
        "</svg>",
      );
      for (const { chosen } of plan.entries) {
        assert(new RegExp(`^ +\\d+ .* ${chosen}$`, "m").test(text), `${name}: ${text}`);
      }
    }
    assertEquals(text.match(/^ {2}loaded again: the precision plan of /gm)?.length, plans.length);
    assertEquals(text.match(/^ {2}as planned +[\d.]+ ms +\d+ % {3}mean /gm)?.length, plans.length);
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
});

Deno.test("calibrate: says what is wrong with a folder", async () => {
  const folder = await Deno.makeTempDir();
  try {
    const { code, errors } = await runExample(
      "calibrate",
      ["--allow-ffi", "--allow-env", "--allow-read"],
      [folder],
    );
    assertEquals(code, 1);
    assertStringIncludes(errors, "holds no safetensors.");
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
});
