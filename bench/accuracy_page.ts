// docs/accuracy.md from the figures in bench/accuracy.json and the speeds in the records.
import * as published from "./accuracy_published.ts";
import {
  beyondRecipes,
  fourBitRecipes,
  granularityChoices,
  granularityRecipe,
  kernelRecipes,
  keyOf,
  type Named,
  productRecipes,
  type Recipe,
  recordedRecipes,
  smoothingChoices,
  smoothingRecipe,
} from "./accuracy_recipes.ts";
import { nameOf, type Results } from "./format.ts";
import { kilo, squareRows, table, title } from "./report_tables.ts";

/** Distances from exact attention, as the papers define them. */
export interface Measures {
  cosine: number;
  relativeL1: number;
  rmse: number;
}

/** What bench/accuracy.json holds. */
export interface Figures {
  inputs: { name: string; title: string; real: boolean; causal: boolean; shape: number[] }[];
  /** By input and recipe. */
  measures: Record<string, Record<string, Measures>>;
}

/** Where the figures are, seen from the root. */
export const figuresPath = "bench/accuracy.json";

/** Of the picture, without its ending. */
export const pictureName = "accuracy";

type Inputs = Figures["inputs"];

// ---- figures ------------------------------------------------------------------------------------------

function measured(figures: Figures, input: string, recipe: Recipe): Measures | undefined {
  return figures.measures[input]?.[keyOf(recipe)];
}

function l1(figures: Figures, input: string, recipe: Recipe): number {
  const found = measured(figures, input, recipe);
  if (!found) throw new Error(`${figuresPath} lacks ${keyOf(recipe)} on ${input}`);
  return found.relativeL1;
}

function mean(values: readonly number[]): number {
  return values.reduce((a, b) => a + b, 0) / values.length;
}

const shownL1 = (value: number) => value.toFixed(4);
const shownCosine = (value: number) => value.toFixed(5);

/** Averages and worsts over some inputs, where the recipe is for all of them. */
function average(figures: Figures, inputs: Inputs, recipe: Recipe) {
  const all = inputs.flatMap(({ name }) => measured(figures, name, recipe) ?? []);
  if (all.length < inputs.length || all.length === 0) return undefined;
  return {
    cosine: mean(all.map(({ cosine }) => cosine)),
    worstCosine: Math.min(...all.map(({ cosine }) => cosine)),
    l1: mean(all.map(({ relativeL1 }) => relativeL1)),
    worstL1: Math.max(...all.map(({ relativeL1 }) => relativeL1)),
    rmse: mean(all.map(({ rmse }) => rmse)),
  };
}

const averageHead = [
  "cosine: average",
  "worst",
  "relative L1: average",
  "worst",
  "RMSE: average",
];

function averageCells(figures: Figures, inputs: Inputs, recipe: Recipe): string[] {
  const found = average(figures, inputs, recipe);
  if (!found) return averageHead.map(() => "–");
  return [
    shownCosine(found.cosine),
    shownCosine(found.worstCosine),
    shownL1(found.l1),
    shownL1(found.worstL1),
    found.rmse.toPrecision(3),
  ];
}

const paperCells = (paper: published.Published | undefined) =>
  paper ? [`${(100 * paper.cosine).toFixed(2)} %`, shownL1(paper.relativeL1)] : ["–", "–"];

function cells(figures: Figures, inputs: Inputs, recipe: Recipe): string[] {
  return inputs.map(({ name }) => {
    const found = measured(figures, name, recipe);
    return found ? shownL1(found.relativeL1) : "–";
  });
}

// ---- tables -------------------------------------------------------------------------------------------

/** Inputs down, kernels across, and beside them what others' kernels reach. */
function kernelTable(figures: Figures): string {
  const head = kernelRecipes.map(([name]) => `\`${name}\``);
  return table(
    ["relative L1", ...head, "official `sage2`", "FA3, FP8"],
    figures.inputs.map((input) => {
      const anchor = published.anchors[input.name];
      return [
        input.title,
        ...kernelRecipes.map(([, recipe]) => cells(figures, [input], recipe)[0]),
        anchor ? shownL1(anchor.sage2.relativeL1) : "–",
        anchor ? shownL1(anchor.fa3.relativeL1) : "–",
      ];
    }),
  );
}

function cosineTable(figures: Figures): string {
  return table(
    ["cosine", ...kernelRecipes.map(([name]) => `\`${name}\``), "official `sage2`", "FA3, FP8"],
    figures.inputs.map(({ name, title }) => {
      const anchor = published.anchors[name];
      return [
        title,
        ...kernelRecipes.map(([, recipe]) => {
          const found = measured(figures, name, recipe);
          return found ? shownCosine(found.cosine) : "–";
        }),
        anchor ? shownCosine(anchor.sage2.cosine) : "–",
        anchor ? shownCosine(anchor.fa3.cosine) : "–",
      ];
    }),
  );
}

const smoothed = (which: string) => which === "" ? "none" : [...which].join(", ");

function smoothingTable(figures: Figures, inputs: Inputs, bits: 8 | 4): string {
  const paper = bits === 4;
  return table(
    [`smoothed, INT${bits}`, ...averageHead, ...paper ? ["paper: cosine", "L1"] : []],
    smoothingChoices.map((which) => [
      smoothed(which),
      ...averageCells(figures, inputs, smoothingRecipe(bits, which)),
      ...paper ? paperCells(published.smoothing[which]) : [],
    ]),
  );
}

function granularityTable(figures: Figures, inputs: Inputs, bits: 8 | 4): string {
  const paper = bits === 4;
  return table(
    [`a scale per, INT${bits}`, ...averageHead, ...paper ? ["paper: cosine", "L1"] : []],
    granularityChoices.map((one) => [
      one === "tensor" ? "tensor (each head)" : one,
      ...averageCells(figures, inputs, granularityRecipe(bits, one)),
      ...paper ? paperCells(published.granularity[one]) : [],
    ]),
  );
}

function averagesTable(
  head: string,
  rows: readonly Named[],
  figures: Figures,
  inputs: Inputs,
): string {
  return table(
    [head, ...averageHead],
    rows.map(([name, recipe]) => [name, ...averageCells(figures, inputs, recipe)]),
  );
}

function inputsTable(
  head: string,
  rows: readonly Named[],
  figures: Figures,
  inputs: Inputs,
): string {
  return table(
    [head, ...inputs.map(({ title }) => title)],
    rows.map(([name, recipe]) => [name, ...cells(figures, inputs, recipe)]),
  );
}

/** Which smoothing each real tensor wants, and what that makes of the official kernel's error. */
export function choices(figures: Figures): {
  input: Inputs[number];
  which: string;
  l1: number;
  official?: number;
}[] {
  return figures.inputs.filter(({ real }) => real).map((input) => {
    const all = smoothingChoices.map((which) => ({
      which,
      l1: l1(figures, input.name, smoothingRecipe(8, which)),
    }));
    const best = all.reduce((a, b) => b.l1 < a.l1 ? b : a);
    return { input, ...best, official: published.anchors[input.name]?.sage2.relativeL1 };
  });
}

function choiceTable(figures: Figures): string {
  return table(
    ["tensors", "K smoothed", "best choice", "its L1", "official `sage2`", "ratio"],
    choices(figures).map(({ input, which, l1: best, official }) => [
      input.title,
      shownL1(l1(figures, input.name, smoothingRecipe(8, "K"))),
      smoothed(which),
      shownL1(best),
      official ? shownL1(official) : "–",
      official ? (best / official).toFixed(2) : "–",
    ]),
  );
}

// ---- accuracy against speed ---------------------------------------------------------------------------

/** The mean error of what a record may have on causal real tensors, and its speed where the record has it. */
export interface Mark {
  series: string;
  error: number;
  speed?: number;
}

/** The longest causal problem of a record, in the head dimension that most of it is about. */
export function recordedShape(
  { rows }: Pick<Results, "rows">,
): { headDim: number; tokens: number } {
  const all = squareRows({ rows } as Results).filter(({ endToEnd, peer, causal }) =>
    endToEnd && !peer && causal
  );
  const headDim = all.some((row) => row.headDim === 128) ? 128 : all[0]?.headDim ?? 128;
  const own = all.filter((row) => row.headDim === headDim);
  return { headDim, tokens: Math.max(0, ...own.map(({ tokens }) => tokens)) };
}

/** Every kernel and recipe, with its speed in a record. */
export function marks(figures: Figures, results: Results): Mark[] {
  const causal = figures.inputs.filter(({ real, causal }) => real && causal);
  const { headDim, tokens } = recordedShape(results);
  const rows = squareRows(results).filter((row) =>
    row.endToEnd && !row.peer && row.causal && row.headDim === headDim && row.tokens === tokens
  );
  const speeds = new Map(rows.map((row) => [nameOf(row), row.tflops!]));
  const known = new Set(recordedRecipes.map(([, recipe]) => keyOf(recipe)));
  const more = [...beyondRecipes, ...fourBitRecipes.slice(-1)].filter(([, recipe]) =>
    recipe.band && !known.has(keyOf(recipe))
  ).map(([name, recipe]): Named => [
    recipe.kernel === "sage2-int4" ? `sage2-int4, ${name}` : name,
    recipe,
  ]);
  return [...recordedRecipes, ...more].flatMap(([name, recipe]) => {
    const found = average(figures, causal, recipe);
    if (!found) return [];
    const series = known.has(keyOf(recipe)) ? seriesTitle(name) : name;
    return [{ series, error: found.l1, speed: speeds.get(name) }];
  });
}

function speedTable(figures: Figures, results: Results): string {
  const { headDim, tokens } = recordedShape(results);
  return table(
    ["", "relative L1, causal layers", `TFLOP/s, D ${headDim} causal, ${kilo(tokens)} tokens`],
    marks(figures, results).map(({ series, error, speed }) => [
      series,
      shownL1(error),
      speed === undefined ? "not recorded" : speed.toFixed(0),
    ]),
  );
}

// ---- what the papers say ------------------------------------------------------------------------------

interface Claim {
  claim: string;
  here: string;
  holds: boolean | "partly";
}

function verdicts(figures: Figures, real: Inputs): Claim[] {
  const of = (recipe: Recipe, inputs = real) => average(figures, inputs, recipe)!;
  const smooth = (bits: 8 | 4, which: string) => of(smoothingRecipe(bits, which)).l1;
  const grain = (one: typeof granularityChoices[number]) => of(granularityRecipe(4, one)).l1;
  const product = (name: string) => productRecipes.find(([one]) => one === name)![1];
  const p = (name: string, inputs = real) => of(product(name), inputs).l1;
  const [none, k, q, both] = ["", "K", "Q", "QK"].map((which) => smooth(4, which));
  const gaussian = figures.inputs.filter(({ name }) => name.startsWith("normal"));
  const biased = figures.inputs.filter(({ name }) => name.startsWith("k-bias"));
  const [vPlain, vSmooth] = [p("E4M3"), p("E4M3, V smoothed")];
  const vBiased = figures.inputs.filter(({ name }) => name.startsWith("v-bias"));
  const vPays = p("E4M3, V smoothed", vBiased) < p("E4M3", vBiased);
  const wide = p("E4M3, sums in FP16, ranges 448 and 2.25");
  const narrow = p("E4M3, sums in FP16, ranges 112 and 9");
  const [rough, fine] = ["", "K"].map((which) => of(smoothingRecipe(8, which), biased).l1);
  const kept = real.filter(({ name }) =>
    measured(figures, name, product("INT8, one scale of P"))!.cosine > 0.998
  );
  return [
    {
      claim: "Smoothing K and Q both is best at 4 bits, either alone next (SageAttention2)",
      here: `relative L1: none ${shownL1(none)}, K ${shownL1(k)}, Q ${shownL1(q)}, both ${
        shownL1(both)
      }`,
      holds: both < Math.min(k, q) && Math.max(k, q) < none,
    },
    {
      claim: "A scale per thread is as good as one per token at 4 bits (SageAttention2)",
      here: `${shownL1(grain("thread"))} per thread, ${shownL1(grain("token"))} per token`,
      holds: grain("thread") <= 1.05 * grain("token"),
    },
    {
      claim: "A scale per thread has less than half the error of one per block (SageAttention2)",
      here: `${shownL1(grain("thread"))} per thread, ${shownL1(grain("block"))} per block`,
      holds: grain("thread") <= 0.5 * grain("block")
        ? true
        : grain("thread") < 0.95 * grain("block")
        ? "partly"
        : false,
    },
    {
      claim: "P·V in E4M3 is as accurate as in FP16 (SageAttention2, Q·K at 4 bits)",
      here: `with Q·K at 8 bits ${shownL1(vPlain)} against ${shownL1(p("FP16"))}`,
      holds: vPlain <= 1.05 * p("FP16"),
    },
    {
      claim: "Smoothing K is what makes INT8 bear outliers in its channels (SageAttention)",
      here: `on such K ${shownL1(rough)} without, ${shownL1(fine)} with`,
      holds: rough > 1.25 * fine,
    },
    {
      claim: "Smoothing V raises accuracy (SageAttention2)",
      here: `real tensors ${shownL1(vPlain)} without, ${shownL1(vSmooth)} with; where V has means ${
        vPays ? "it pays" : "it does not pay"
      }`,
      holds: vSmooth < vPlain ? true : vPays ? "partly" : false,
    },
    {
      claim: "FP16 sums of P·V lose nothing (SageAttention2++)",
      here: `against ${shownL1(vPlain)} in FP32: ${shownL1(wide)} with the ranges 448 and 2.25, ${
        shownL1(narrow)
      } with 112 and 9`,
      holds: wide <= 1.01 * vPlain ? true : narrow <= 1.01 * vPlain ? "partly" : false,
    },
    {
      claim: "INT8 P·V with one scale of P serves many layers, cosine above 99.8 % (SageAttention)",
      here: `${kept.length} of ${real.length} real tensors; N(0, 1): ${
        shownL1(p("INT8, one scale of P", gaussian))
      } (paper: ${shownL1(published.sage1Kernels.vT.relativeL1)} and ${
        shownL1(published.sage1Kernels.vB.relativeL1)
      })`,
      holds: kept.length === real.length ? true : kept.length > 0 ? "partly" : false,
    },
  ];
}

const verdict = (holds: boolean | "partly") =>
  holds === "partly" ? "in part" : holds ? "yes" : "no";

// ---- the page -----------------------------------------------------------------------------------------

const isReal = ({ real }: Inputs[number]) => real;

/** The figures in a few lines, for a terminal. */
export function summary(figures: Figures): string {
  const real = figures.inputs.filter(isReal);
  return [
    kernelTable(figures),
    choiceTable(figures),
    inputsTable("beyond the papers", beyondRecipes, figures, real),
    inputsTable("4 bits", fourBitRecipes, figures, real),
    inputsTable("P·V", productRecipes, figures, real),
  ].join("\n\n");
}

/** The whole page. */
export function accuracyPage(figures: Figures, results: Results): string {
  const real = figures.inputs.filter(isReal), layers = real.filter(({ causal }) => causal);
  const synthetic = figures.inputs.filter((input) => !input.real);
  const some = [...real, ...synthetic.filter(({ name }) => /^(causal|outliers)-128/.test(name))];
  const best = fourBitRecipes.at(-1)!,
    worst = Math.max(...cells(figures, layers, best[1]).map(Number));
  const paperPv = Object.entries(published.products).map(([name, share]) =>
    `${name} ${(100 * share).toFixed(2)} %`
  ).join(", ");
  return `# Accuracy

How far each kernel and option is from attention in float64, in the form of the papers' tables and
beside their figures. \`deno task accuracy\` measures all of it on the CPU in a minute or two and writes
this page; \`--data\` names other tensors. Measures are those of [numerics](numerics.md#metrics): cosine
similarity, relative L1 and root mean square error, averaged over inputs, and the worst of them.

Real tensors are those of [tests/data](../tests/data): ${layers.length} layers of a language model (causal) and ${
    real.length - layers.length
  } of a speech encoder, a text and a recording. Two models are few: take it as a lead, and measure on
tensors of your own. Synthetic ones have ${
    synthetic[0].shape.join(" × ")
  } (batch, heads, tokens, channels) and the like.

## Kernels

${kernelTable(figures)}

${cosineTable(figures)}

The last columns are not measured here: ${published.sources.anchors}.

## Smoothing

Q and K per thread, P·V in E4M3 (\`sage2\` and \`sage2-int4\`), on the real tensors. The paper's figures
are of ${published.sources.sage2.split(": ")[1]}.

${smoothingTable(figures, real, 8)}

${smoothingTable(figures, real, 4)}

On the synthetic ones:

${smoothingTable(figures, synthetic, 8)}

### What to smooth

The best choice is the data's: it takes K and Q where both have means, and V only where V has one that
is not noise. Chosen so, the error of \`sage2\` is a share of the official kernel's (of all heads of the
same layers, with K smoothed).

${choiceTable(figures)}

## Granularity

Smoothed as the kernels are by default: K at 8 bits, Q and K at 4.

${granularityTable(figures, real, 8)}

${granularityTable(figures, real, 4)}

## P·V

Q·K in INT8 per thread with K smoothed. On the real tensors, then on the synthetic ones:

${averagesTable("P·V", productRecipes, figures, real)}

${averagesTable("P·V", productRecipes, figures, synthetic)}

${inputsTable("relative L1", productRecipes, figures, real)}

SageAttention2 has, with Q·K at 4 bits, cosines of ${paperPv}.

## Beyond the papers

Relative L1 of rotation, a smoothed Q, an exact first token, means of 64 keys, and the precision band
(causal only), see [numerics](numerics.md#beyond-the-papers):

${inputsTable("relative L1", beyondRecipes, figures, some)}

In layers 6 and 18 the first token takes most of the weight or nearly half of it, and much of the rest
is on the diagonal: the band keeps what quantization breaks there. In layer 0 attention is nearly
uniform, and the band is worth its share of the tiles, which is a third of them at ${
    layers[0].shape[2]
  } tokens and falls with the length.

## 4 bits

${inputsTable("relative L1 of `sage2-int4`", fourBitRecipes, figures, real)}

The aim was .03 on every causal layer: ${best[0]}, the worst is ${shownL1(worst)}${
    worst <= 0.03 ? "" : ", which misses it"
  }. Scales per thread do not get there in every layer, nor do means of 128 keys.

## Accuracy against speed

![Error of every kernel against its speed](pictures/${pictureName}.svg)

Errors are means over the causal real tensors, measured on the CPU device; speeds are those of the
record of ${results.device}, where it has them.

${speedTable(figures, results)}

## What the papers say, and what these tensors say

${
    table(
      ["claim", "here", "holds"],
      verdicts(figures, real).map(({ claim, here, holds }) => [claim, here, verdict(holds)]),
    )
  }
`;
}

/** The title of a recorded series, as the other pages have it. */
function seriesTitle(name: string): string {
  const [kernel, ...choice] = name.split(" ");
  const accumulator = choice.find((word) => word === "f16" || word === "f32");
  const exp = choice.find((word) => word === "exact" || word === "fast");
  const row = { kernel, accumulator, exp, band: choice.includes("band"), endToEnd: true };
  return title(row as Parameters<typeof title>[0]).replaceAll("`", "");
}
