// The figures of docs/accuracy.md: a part of them measured anew, and what they are to reach.
import { assert, assertAlmostEquals, assertEquals, assertNotEquals } from "@std/assert";
import { fromFileUrl } from "@std/path";
import { exactly, measure } from "../bench/accuracy.ts";
import { realInputs, syntheticInputs } from "../bench/accuracy_inputs.ts";
import { accuracyPage, choices, type Figures } from "../bench/accuracy_page.ts";
import { accuracyPicture } from "../bench/accuracy_picture.ts";
import {
  fourBitRecipes,
  granularityRecipe,
  kernelRecipes,
  keyOf,
  productRecipes,
  type Recipe,
  recipes,
  smoothingRecipe,
} from "../bench/accuracy_recipes.ts";
import { readFigures, readRecords } from "../bench/report.ts";
import { digest } from "../bench/report_pictures.ts";
import { Device } from "../mod.ts";
import { referenceAttention } from "./reference.ts";
import { worstDifference } from "./attention.ts";

const figures = readFigures(), [{ results }] = await readRecords();
const dataFolder = fromFileUrl(new URL("data", import.meta.url));

function measured(input: string, recipe: Recipe) {
  const found = figures.measures[input][keyOf(recipe)];
  assert(found, `${keyOf(recipe)} on ${input} is missing`);
  return found;
}

Deno.test("the figures have every input and every recipe that it allows", async () => {
  const sources = [...await realInputs(dataFolder), ...syntheticInputs];
  assertEquals(figures.inputs.map(({ name }) => name), sources.map(({ name }) => name));
  for (const { name, causal } of figures.inputs) {
    const expected = recipes.filter((recipe) => causal || !recipe.causal).map(keyOf);
    assertEquals(Object.keys(figures.measures[name]).sort(), expected.sort(), name);
  }
});

for (const name of ["tinyllama-layer06", "k-bias-64"]) {
  Deno.test(`the figures of ${name} are what is measured`, async () => {
    const sources = [...await realInputs(dataFolder), ...syntheticInputs];
    const input = await sources.find((source) => source.name === name)!.load();
    using device = Device.open("cpu");
    const some = [
      ...[...kernelRecipes, ...fourBitRecipes.slice(-1)].map(([, recipe]) => recipe),
      smoothingRecipe(8, "QKV"),
      granularityRecipe(4, "tensor"),
    ];
    const fresh = await measure(device, input, some);
    for (const recipe of some.filter((recipe) => input.causal || !recipe.causal)) {
      const stored = measured(name, recipe), now = fresh[keyOf(recipe)];
      for (const measure of ["cosine", "relativeL1", "rmse"] as const) {
        assertAlmostEquals(
          now[measure] / stored[measure],
          1,
          0.005,
          `${measure}, ${keyOf(recipe)}`,
        );
      }
    }
  });
}

Deno.test("exact attention is that of the tests", async () => {
  const source = syntheticInputs.find(({ name }) => name === "causal-64")!;
  const { q, k, v, ...input } = await source.load();
  const rows = 70 * 64, dims = [1, 1, 70, 64] as const;
  const part = { ...input, q: q.slice(0, rows), k: k.slice(0, rows), v: v.slice(0, rows) };
  const problem = { ...part, qDims: dims, kDims: dims, vDims: dims };
  const expected = referenceAttention(problem, { causal: true }).out;
  assert(worstDifference(exactly(problem), expected) < 1e-12);
});

// ---- what is to be reached ----------------------------------------------------------------------------

Deno.test("smoothing as the data wants it makes sage2 better than the official kernel", () => {
  const ratios = choices(figures).filter(({ official }) => official !== undefined)
    .map(({ input, l1, official }) => [input.name, l1 / official!] as const);
  assertEquals(ratios.length, 3);
  // Of layer 0, four heads of the sixteen that the official kernel was measured on are the worse ones.
  for (const [name, ratio] of ratios) {
    assert(ratio <= (name.endsWith("00") ? 0.87 : 0.85), `${name}: ${ratio}`);
  }
});

Deno.test("4 bits reach what they are to reach, per token", () => {
  for (const layer of ["00", "06", "18"]) {
    const { relativeL1 } = measured(`tinyllama-layer${layer}`, fourBitRecipes.at(-1)![1]);
    assert(relativeL1 <= 0.03, `layer ${layer}: ${relativeL1}`);
  }
  for (const [layer, least] of [["06", 0.974], ["18", 0.985]] as const) {
    const { cosine } = measured(`tinyllama-layer${layer}`, granularityRecipe(4, "token"));
    assert(cosine >= least, `layer ${layer}: ${cosine}`);
  }
});

Deno.test("sage2++ is within 1 % of sage2 on real tensors", () => {
  const [sage2, sage2pp] = ["sage2", "sage2++"].map((name) =>
    kernelRecipes.find(([kernel]) => kernel === name)![1]
  );
  for (const { name } of figures.inputs.filter(({ real }) => real)) {
    const ratio = measured(name, sage2pp).relativeL1 / measured(name, sage2).relativeL1;
    assert(ratio <= 1.01, `${name}: ${ratio}`);
  }
});

// ---- the page -----------------------------------------------------------------------------------------

Deno.test("docs/accuracy.md and its picture follow the figures", async () => {
  const changed: Figures = structuredClone(figures);
  const key = keyOf(productRecipes[2][1]);
  changed.measures["tinyllama-layer06"][key].relativeL1 = 0.5;
  assertNotEquals(accuracyPage(figures, results), accuracyPage(changed, results));
  assertNotEquals(
    await digest(accuracyPicture(figures, results)),
    await digest(accuracyPicture(changed, results)),
  );
});
