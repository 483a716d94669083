// Precision plans: the document and all that may be wrong with it, following a plan, its sums and its picture.
import { assert, assertEquals, assertMatch, assertStringIncludes, assertThrows } from "@std/assert";
import {
  attention,
  type AttentionOptions,
  explain,
  PrecisionPlan,
  type PrecisionPlanDocument,
} from "../mod.ts";
import { deviceTest, randomProblem, uploadProblem } from "./devices.ts";
import { type Case, type ErrorClass, type Loose, refuses } from "./refusals.ts";

// ---- a plan to work with ------------------------------------------------------------------------------

function candidate(recipe: string, error: number, milliseconds: number | null): Loose {
  return {
    recipe,
    scores: {
      cosine: 1 - error / 10,
      relativeL1: error,
      rmse: error / 100,
      "cosine*(1-relativeL1)": (1 - error / 10) * (1 - error),
    },
    milliseconds,
  };
}

function entry(layer: number, timestep: number | null, chosen: string, errors: number[]): Loose {
  const names = ["sage1", "sage2, smoothQ", "flash"];
  return {
    layer,
    timestep,
    samples: 2,
    chosen,
    candidates: names.map((name, i) => candidate(name, errors[i], i + 1)),
  };
}

/** A good document: layer 0 without time steps, layer 3 with three. */
function good(): Loose {
  const shape = { heads: 2, kvHeads: 2, headDim: 8, valueDim: 8 };
  return {
    format: "sage-attention-precision-plan",
    version: 1,
    created: { library: "0.1.0", device: "cpu, a processor", date: "2026-01-01T00:00:00.000Z" },
    model: { name: "A <model>", layers: [{ layer: 0, ...shape }, { layer: 3, ...shape }] },
    metric: "relativeL1",
    threshold: 0.03,
    ladder: [
      { name: "sage1", recipe: { kernel: "sage1" } },
      { name: "sage2, smoothQ", recipe: { kernel: "sage2", smoothQ: true } },
      { name: "flash", recipe: { kernel: "flash" } },
    ],
    entries: [
      entry(0, null, "sage1", [0.01, 0.009, 0.001]),
      entry(3, 10, "flash", [0.5, 0.4, 0.002]),
      entry(3, 20, "sage2, smoothQ", [0.04, 0.02, 0.001]),
      entry(3, 40, "sage1", [0.03, 0.02, 0.001]),
    ],
  };
}

const plan = PrecisionPlan.fromJSON(good());

// ---- reading ------------------------------------------------------------------------------------------

Deno.test("a plan is the same after JSON and back", () => {
  const again = PrecisionPlan.parse(JSON.stringify(plan), {
    name: "A <model>",
    layers: 2,
    heads: 2,
    kvHeads: 2,
    headDim: 8,
    valueDim: 8,
  });
  assertEquals(again.toJSON(), plan.toJSON());
  assertEquals(again.toJSON(), good() as PrecisionPlanDocument);
  const { threshold: _, ...rest } = good();
  for (const budget of [{ shares: [0.5, 0.25] }, { cost: 0.7 }, { cost: 2, costs: [1, 1, 2] }]) {
    const document = { ...rest, budget };
    assertEquals(PrecisionPlan.fromJSON(document).toJSON() as Loose, document);
  }
});

Deno.test("a plan does not change, and not with what it was made of", () => {
  const document = good();
  const made = PrecisionPlan.fromJSON(document);
  document.entries[0].chosen = "flash";
  document.ladder[0].recipe.kernel = "sage2";
  assertEquals(made.recipe(0), { kernel: "sage1" });
  for (
    const change of [
      () => (made as Loose).metric = "rmse",
      () => (made.entries as Loose).push({}),
      () => (made.entries[0] as Loose).chosen = "flash",
      () => (made.recipe(0) as Loose).kernel = "flash",
      () => (made.toJSON() as Loose).version = 2,
    ]
  ) assertThrows(change, TypeError);
});

/** What is done to a good document, the class of the error, and its sentence less "Cannot read a precision plan as ". */
const damages: [string, (document: Loose) => unknown, ErrorClass, string][] = [
  ["another format", (d) => d.format = "x", RangeError, `format must be one of "sage-attention`],
  ["no format", (d) => delete d.format, TypeError, "format must be one of"],
  [
    "a later version",
    (d) => d.version = 2,
    RangeError,
    "version must be 1, which this library reads: current value is 2.",
  ],
  ["no version", (d) => delete d.version, TypeError, "version must be 1"],
  ["a version that is text", (d) => d.version = "1", RangeError, "version must be 1"],
  [
    "an unknown property",
    (d) => d.note = "mine",
    TypeError,
    `note must be absent, as known are "format", "version"`,
  ],
  ["no origin", (d) => delete d.created, TypeError, "created must be an object"],
  [
    "a date that is a number",
    (d) => d.created.date = 7,
    TypeError,
    "created.date must be a string",
  ],
  ["no model", (d) => d.model = null, TypeError, "model must be an object: current value is null."],
  ["a model without name", (d) => delete d.model.name, TypeError, "model.name must be a string"],
  ["no layers", (d) => d.model.layers = [], RangeError, "model.layers must not be empty"],
  [
    "layers that are none",
    (d) => d.model.layers = "all",
    TypeError,
    "model.layers must be an array",
  ],
  [
    "a fractional layer",
    (d) => d.model.layers[1].layer = 1.5,
    RangeError,
    "model.layers[1].layer must be a whole number from 0",
  ],
  [
    "a layer twice",
    (d) => d.model.layers[1].layer = 0,
    RangeError,
    "model.layers[1].layer must be greater than that of the layer before",
  ],
  [
    "no head dimension",
    (d) => delete d.model.layers[0].headDim,
    TypeError,
    "model.layers[0].headDim must be a whole number from 1",
  ],
  [
    "heads that share nothing",
    (d) => d.model.layers[0].kvHeads = 3,
    RangeError,
    "model.layers[0].heads must be a multiple of kvHeads (3): current value is 2.",
  ],
  ["an unknown metric", (d) => d.metric = "psnr", RangeError, `metric must be one of "cosine"`],
  [
    "neither threshold nor budget",
    (d) => delete d.threshold,
    TypeError,
    "threshold or budget must be given, and not both",
  ],
  [
    "threshold and budget",
    (d) => d.budget = { cost: 1 },
    TypeError,
    "threshold or budget must be given, and not both",
  ],
  ["a threshold that is text", (d) => d.threshold = "1", TypeError, "threshold must be a finite"],
  [
    "shares for another ladder",
    (d) => {
      delete d.threshold;
      d.budget = { shares: [1] };
    },
    RangeError,
    "budget.shares must have length 2 for this ladder",
  ],
  ["no ladder", (d) => d.ladder = {}, TypeError, "ladder must be an array"],
  [
    "an unknown kernel",
    (d) => d.ladder[1].recipe.kernel = "sage3",
    RangeError,
    `ladder[1].recipe.kernel must be one of "flash", "sage1"`,
  ],
  [
    "a kernel left open",
    (d) => d.ladder[1].recipe.kernel = "auto",
    RangeError,
    "ladder[1].recipe.kernel must be one of",
  ],
  [
    "no kernel",
    (d) => delete d.ladder[0].recipe.kernel,
    TypeError,
    "ladder[0].recipe.kernel must be one of",
  ],
  [
    "an unknown option",
    (d) => d.ladder[1].recipe.smoothX = true,
    TypeError,
    `ladder[1].recipe.smoothX must be absent, as known are "kernel"`,
  ],
  [
    "an option that is no matter of precision",
    (d) => d.ladder[1].recipe.causal = true,
    TypeError,
    "ladder[1].recipe.causal must be absent",
  ],
  [
    "a name that is another's",
    (d) => d.ladder[0].name = "flash",
    RangeError,
    `ladder[0].name must be "sage1", as its recipe says: current value is "flash".`,
  ],
  [
    "a recipe twice",
    (d) => d.ladder[2] = d.ladder[0],
    RangeError,
    "ladder[2].name must differ from those before",
  ],
  ["no entries", (d) => d.entries = [], RangeError, "entries must not be empty"],
  [
    "an entry that is none",
    (d) => d.entries[1] = 5,
    TypeError,
    "entries[1] must be an object: current value is 5.",
  ],
  [
    "a layer without entries",
    (d) => d.entries.shift(),
    RangeError,
    'entries must have one for every layer of model.layers: current value is "none for 0".',
  ],
  [
    "an entry of no layer",
    (d) => d.entries[3].layer = 4,
    RangeError,
    "entries[3].layer must be a layer of model.layers (0, 3): current value is 4.",
  ],
  [
    "entries out of order",
    (d) => d.entries.reverse(),
    RangeError,
    "entries[1].timestep must be greater than that of the entry before",
  ],
  [
    "layers out of order",
    (d) => d.entries.push(d.entries.shift()),
    RangeError,
    "entries[3].layer must not be less than that of the entry before",
  ],
  [
    "a time step twice",
    (d) => d.entries[2].timestep = 10,
    RangeError,
    "entries[2].timestep must be greater than that of the entry before",
  ],
  [
    "one entry for all time steps beside others",
    (d) => d.entries[1].timestep = null,
    RangeError,
    "entries[2].timestep must be greater than that of the entry before, or be null",
  ],
  [
    "a time step that is text",
    (d) => d.entries[1].timestep = "10",
    TypeError,
    "entries[1].timestep must be a finite number or null",
  ],
  [
    "no time step",
    (d) => delete d.entries[1].timestep,
    TypeError,
    "entries[1].timestep must be a finite number or null",
  ],
  ["no samples", (d) => d.entries[1].samples = 0, RangeError, "entries[1].samples must be a whole"],
  [
    "a choice that is none",
    (d) => d.entries[3].chosen = "sage2",
    RangeError,
    `entries[3].chosen must be one of "sage1", "sage2, smoothQ", "flash": current value is "sage2".`,
  ],
  [
    "a candidate missing",
    (d) => d.entries[1].candidates.pop(),
    RangeError,
    "entries[1].candidates must have length 3, as ladder has",
  ],
  [
    "candidates out of order",
    (d) => d.entries[1].candidates.reverse(),
    RangeError,
    `entries[1].candidates[0].recipe must be one of "sage1": current value is "flash".`,
  ],
  [
    "a score missing",
    (d) => delete d.entries[0].candidates[2].scores.rmse,
    TypeError,
    "entries[0].candidates[2].scores.rmse must be a finite number or null",
  ],
  [
    "a negative time",
    (d) => d.entries[0].candidates[2].milliseconds = -1,
    RangeError,
    "entries[0].candidates[2].milliseconds must be a number of at least 0, or null",
  ],
];

for (const [name, damage, error, says] of damages) {
  Deno.test(`PrecisionPlan.fromJSON() refuses ${name}`, () => {
    const document = good();
    damage(document);
    const { message, constructor } = assertThrows(() => PrecisionPlan.fromJSON(document), error);
    assertEquals(constructor, error);
    assertStringIncludes(message, `Cannot read a precision plan as ${says}`);
    assert(message.endsWith("."), message);
  });
}

Deno.test("PrecisionPlan.fromJSON() refuses options of a recipe in the words of attention()", () => {
  for (
    const [recipe, says] of [
      [{ kernel: "sage2", granularity: "row" }, `granularity must be one of "token"`],
      [{ kernel: "sage2", smoothQ: 1 }, "smoothQ must be a boolean"],
      [{ kernel: "sage2", pvRange: 448 }, `kernel with pvRange must be "sage2++"`],
      [{ kernel: "flash", smoothK: true }, `smoothK with kernel "flash" must be absent`],
    ] as const
  ) {
    const document = good();
    document.ladder[1].recipe = recipe;
    const { message } = assertThrows(() => PrecisionPlan.fromJSON(document), Error);
    assertStringIncludes(message, `Cannot read ladder[1].recipe of a precision plan as ${says}`);
  }
});

Deno.test("PrecisionPlan.parse() refuses text that is no plan", () => {
  const text = JSON.stringify(plan);
  const refused: [Loose, ErrorClass, string][] = [
    [text.slice(0, -20), RangeError, "text must be JSON"],
    ["", RangeError, "text must be JSON"],
    ["[]", TypeError, "the document must be an object"],
    ["null", TypeError, "the document must be an object"],
    ["3", TypeError, "the document must be an object"],
    ["{}", TypeError, "format must be one of"],
    [{}, TypeError, "text must be a string"],
    [undefined, TypeError, "text must be a string"],
  ];
  for (const [value, error, says] of refused) {
    const { message } = assertThrows(() => PrecisionPlan.parse(value), error);
    assertStringIncludes(message, `Cannot read a precision plan as ${says}`);
  }
});

Deno.test("PrecisionPlan.parse() refuses a plan for another model", () => {
  const refused: [Loose, ErrorClass, string][] = [
    [{ name: "another" }, RangeError, `model.name must be "another": current value is "A <model>"`],
    [{ layers: 22 }, RangeError, "model.layers must have length 22: current value is 2."],
    [{ heads: 32 }, RangeError, "model.layers[0].heads must be 32: current value is 2."],
    [{ kvHeads: 1 }, RangeError, "model.layers[0].kvHeads must be 1"],
    [{ headDim: 128 }, RangeError, "model.layers[0].headDim must be 128"],
    [{ valueDim: 16 }, RangeError, "model.layers[0].valueDim must be 16"],
    [{ depth: 22 }, TypeError, `no property "depth"`],
  ];
  for (const [model, error, says] of refused) {
    const { message } = assertThrows(
      () => PrecisionPlan.parse(JSON.stringify(plan), model),
      error,
    );
    assertStringIncludes(message, says);
  }
});

// ---- asking -------------------------------------------------------------------------------------------

Deno.test("a plan gives the recipe of the nearest time step, of two the earlier", () => {
  const expected: [number, string][] = [
    [-1e9, "flash"],
    [10, "flash"],
    [14.9, "flash"],
    [15, "flash"],
    [15.1, "sage2"],
    [20, "sage2"],
    [30, "sage2"],
    [30.1, "sage1"],
    [1e300, "sage1"],
  ];
  for (const [timestep, kernel] of expected) {
    assertEquals(plan.recipe(3, timestep).kernel, kernel, `time step ${timestep}`);
  }
  assertEquals(plan.recipe(3, 20), { kernel: "sage2", smoothQ: true });
  assertEquals(plan.entry(3, 33).timestep, 40);
  assertEquals(plan.entry(0), plan.entry(0, 12));
});

Deno.test("a plan refuses layers and time steps that it has not", () => {
  const refused: [Loose[], ErrorClass, string][] = [
    [[1], RangeError, "layer must be one of 0, 3: current value is 1."],
    [[-1], RangeError, "layer must be a whole number"],
    [["0"], TypeError, "layer must be a whole number"],
    [[], TypeError, "layer must be a whole number"],
    [[3], TypeError, "timestep must be a finite number, as the plan has time steps for layer 3"],
    [[3, NaN], RangeError, "timestep must be a finite number"],
    [[3, "10"], TypeError, "timestep must be a finite number"],
    [[3, null], TypeError, "timestep must be a finite number"],
    [[0, Infinity], RangeError, "timestep must be a finite number or absent"],
    [[0, "0"], TypeError, "timestep must be a finite number or absent"],
  ];
  for (const [args, error, says] of refused) {
    const { message } = assertThrows(() => plan.recipe(args[0], args[1]), error);
    assertStringIncludes(message, `Cannot follow a precision plan as ${says}`);
  }
});

Deno.test("summary() adds up what was measured", () => {
  const { chosen, cheapest, best, counts } = plan.summary();
  assertEquals(counts, { sage1: 2, "sage2, smoothQ": 1, flash: 1 });
  assertEquals(chosen, { milliseconds: 7, mean: (0.01 + 0.002 + 0.02 + 0.03) / 4, worst: 0.03 });
  assertEquals(cheapest, { milliseconds: 4, mean: (0.01 + 0.5 + 0.04 + 0.03) / 4, worst: 0.5 });
  assertEquals(best.milliseconds, 12);
  assertEquals(best.worst, 0.002);

  const document = good();
  document.metric = "cosine";
  document.entries[1].candidates[0] = candidate("sage1", 0.5, null);
  document.entries[2].candidates[2].scores.cosine = null;
  const other = PrecisionPlan.fromJSON(document).summary();
  assertEquals(other.chosen.worst, 1 - 0.03 / 10, "the worst cosine is the smallest");
  assertEquals(other.cheapest.milliseconds, null);
  assertEquals([other.best.mean, other.best.worst], [null, null]);
});

// ---- following ----------------------------------------------------------------------------------------

deviceTest("attention() and explain() follow a plan", async (device) => {
  const problem = randomProblem({ heads: 2, queries: 70, channels: 8 }, "f16");
  using tensors = uploadProblem(device, problem, "f16");
  const { q, k, v } = tensors;
  const calls: [number, number | undefined, AttentionOptions, string][] = [
    [0, undefined, { kernel: "sage1" }, "says sage1 for layer 0, where its relativeL1 was 0.01"],
    [3, 12, { kernel: "flash" }, "says flash for layer 3 at time step 10, where"],
    [3, 99, { kernel: "sage1" }, "says sage1 for layer 3 at time step 40, where"],
  ];
  if (device.kind === "cpu") {
    calls.push([3, 22, { kernel: "sage2", smoothQ: true }, "says sage2, smoothQ for layer 3"]);
  }
  for (const [layer, timestep, recipe, says] of calls) {
    const options = { causal: true, scale: 0.3 };
    for (const more of [{}, { kernel: "auto" } as const, recipe]) {
      using planned = attention(q, k, v, { ...options, ...more, plan, layer, timestep });
      using expected = attention(q, k, v, { ...options, ...recipe });
      assertEquals(await planned.data(), await expected.data());
      const { reason, ...rest } = explain(q, k, v, { ...options, ...more, plan, layer, timestep });
      const { reason: _, ...asked } = explain(q, k, v, { ...options, ...recipe });
      assertEquals(rest, asked);
      assertStringIncludes(reason, says);
    }
  }
  using withLse = attention(q, k, v, { plan, layer: 0, returnLse: true, outDtype: "f32" });
  assertEquals([withLse.out.dtype, withLse.lse.shape[2]], ["f32", 70]);
});

/** Options that contradict a plan, or are no way to follow one. */
const contradictions: [string, Loose, ErrorClass, string][] = [
  ["a plan that is none", { plan: good(), layer: 0 }, TypeError, "plan must be a PrecisionPlan"],
  ["a plan of null", { plan: null, layer: 0 }, TypeError, "plan must be a PrecisionPlan"],
  ["no layer", { plan }, TypeError, "layer must be a whole number"],
  ["a layer without plan", { layer: 0 }, TypeError, "layer must be absent where there is no plan"],
  ["a time step without plan", { timestep: 0 }, TypeError, "timestep must be absent where"],
  ["an unknown layer", { plan, layer: 7 }, RangeError, "layer must be one of 0, 3"],
  ["no time step", { plan, layer: 3 }, TypeError, "timestep must be a finite number, as the plan"],
  [
    "another kernel",
    { plan, layer: 0, kernel: "sage2" },
    TypeError,
    `kernel beside a plan must be absent or "sage1", as the plan says for layer 0: current value is "sage2".`,
  ],
  [
    "an option that the plan does not have",
    { plan, layer: 0, smoothQ: true },
    TypeError,
    "smoothQ beside a plan must be absent, as the plan says for layer 0: current value is true.",
  ],
  [
    "another value of an option",
    { plan, layer: 3, timestep: 20, smoothQ: false },
    TypeError,
    "smoothQ beside a plan must be absent or true",
  ],
  ["an unknown option", { plan, layer: 0, smooth: true }, TypeError, `no property "smooth"`],
];

refuses(
  "options beside a plan",
  [attention, explain].flatMap((call) =>
    contradictions.map(([name, options, error, says]): Case => ({
      name: `${call.name}() with ${name}`,
      call: ({ q, k, v }) => call(q, k, v, options),
      error,
      says: [says],
    }))
  ),
);

refuses(
  "tensors that are not the plan's",
  [attention, explain].flatMap((call) =>
    ([
      ["more heads", [1, 4, 16, 8], [1, 2, 16, 8], [1, 2, 16, 8], "heads of q must be 2"],
      ["fewer heads of k", [1, 2, 16, 8], [1, 1, 16, 8], [1, 1, 16, 8], "heads of k must be 2"],
      ["wider heads", [1, 2, 16, 16], [1, 2, 16, 16], [1, 2, 16, 8], "channels of q must be 8"],
      ["wider values", [1, 2, 16, 8], [1, 2, 16, 8], [1, 2, 16, 24], "channels of v must be 8"],
    ] as const).map(([name, q, k, v, says]): Case => ({
      name: `${call.name}() of ${name}`,
      call: ({ make }) => call(make(q), make(k), make(v), { plan, layer: 0 }),
      error: RangeError,
      says: [`${says}, as the plan says for layer 0: current value is `],
    }))
  ),
);

// ---- drawing ------------------------------------------------------------------------------------------

Deno.test("toSVG() draws a cell for each entry, within its frame, and names every recipe", () => {
  const svg = plan.toSVG();
  const [, width, height] = svg.match(/viewBox="0 0 (\d+) (\d+)"/)!.map(Number);
  const cells = [...svg.matchAll(
    /<rect class="(k\d)" x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)" fill-opacity="([\d.]+)"><title>(.*?)<\/title>/g,
  )];
  assertEquals(cells.map(([, kind, , , , , , about]) => [kind, about]), [
    ["k1", "layer 0: sage1, error 0.0100"],
    ["k3", "layer 3, time step 10: flash, error 0.00200"],
    ["k2", "layer 3, time step 20: sage2, smoothQ, error 0.0200"],
    ["k1", "layer 3, time step 40: sage1, error 0.0300"],
  ]);
  for (const [, , x, y, w, h] of cells) {
    assert(Number(x) >= 0 && Number(x) + Number(w) <= width, `${x} ${w}`);
    assert(Number(y) >= 0 && Number(y) + Number(h) <= height, `${y} ${h}`);
  }
  const strengths = cells.map(([, , , , , , strength]) => Number(strength));
  assertEquals([Math.min(...strengths), Math.max(...strengths)], [strengths[1], strengths[3]]);
  assert(strengths[0] < strengths[2] && strengths[2] < strengths[3], String(strengths));
  assertStringIncludes(svg, "A &lt;model>");
  for (const name of ["sage1", "sage2, smoothQ", "flash"]) assertStringIncludes(svg, `  ${name}<`);
  assertStringIncludes(svg, "prefers-color-scheme: dark");
  assert(!/NaN|undefined|Infinity/.test(svg), svg);
});

Deno.test("toSVG() draws large plans, equal errors and scores that are not finite", () => {
  const document = good();
  const layers = Array.from({ length: 80 }, (_, layer) => ({ ...document.model.layers[0], layer }));
  document.model.layers = layers;
  document.entries = layers.flatMap(({ layer }) =>
    Array.from({ length: 1000 }, (_, i) => entry(layer, i, "sage1", [0.1, 0.1, 0.1]))
  );
  document.entries[5].candidates[0].scores.relativeL1 = null;
  const svg = PrecisionPlan.fromJSON(document).toSVG();
  assertEquals(svg.match(/<title>/g)?.length, 80_000);
  assert(!/NaN|undefined/.test(svg));
  assertMatch(svg, /layer 0, time step 5: sage1, error not finite/);
});

Deno.test("the plan in docs/ can be read, and its picture and figures are its own", async () => {
  const read = (path: string) => Deno.readTextFile(new URL(`../docs/${path}`, import.meta.url));
  const documented = PrecisionPlan.parse(await read("plans/tinyllama.json"));
  assertEquals(await read("plans/tinyllama.svg"), documented.toSVG());
  const guide = await read("adaptive-precision.md");
  for (const { layer, candidates } of documented.entries) {
    const figures = candidates.map(({ scores }) => scores.relativeL1!.toFixed(4).slice(1));
    assertMatch(guide, new RegExp(`\\| layer ${layer} +\\| +${figures.join(" +\\\\| +")} +\\|`));
  }
});

Deno.test("toString() says what a plan runs", () => {
  assertEquals(
    String(plan),
    "PrecisionPlan for A <model>: 2 × sage1; 1 × sage2, smoothQ; 1 × flash",
  );
});
