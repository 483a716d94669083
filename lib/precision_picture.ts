// A precision plan as a picture: layers from top to bottom, time steps from left to right.
import type { PrecisionEntry, PrecisionPlanDocument } from "./precision_plan.ts";
import { errorOf } from "./precision_policy.ts";
import { escape, seriesColours, svgDocument } from "./svg.ts";

const left = 64, top = 92, gap = 24;
const faintest = 0.25;

function distinct<T>(values: readonly T[]): T[] {
  return [...new Set(values)];
}

/** From the error of the chosen recipe to how strong its colour is, on a logarithmic scale. */
class Strength {
  readonly low: number;
  readonly high: number;

  constructor(errors: readonly number[]) {
    const positive = errors.filter((error) => error > 0 && error < Infinity);
    this.low = positive.length ? Math.min(...positive) : 0;
    this.high = positive.length ? Math.max(...positive) : 0;
  }

  of(error: number): number {
    if (error >= this.high) return 1;
    if (error <= this.low) return faintest;
    const share = Math.log(error / this.low) / Math.log(this.high / this.low);
    return faintest + share * (1 - faintest);
  }
}

/** Grey comes last: it is that of the scale. */
function colour(rung: number): string {
  return `k${(rung + 1) % seriesColours}`;
}

function short(value: number): string {
  if (!Number.isFinite(value)) return "not finite";
  return value !== 0 && Math.abs(value) < 0.001 ? value.toExponential(1) : value.toPrecision(3);
}

/** Draws a plan. Cells that are large enough say which recipe and error they are; the others on hover. */
export function drawPlan({ model, metric, ladder, entries }: PrecisionPlanDocument): string {
  const layers = model.layers.map(({ layer }) => layer);
  const steps = distinct(entries.map(({ timestep }) => timestep))
    .sort((a, b) => (a ?? -Infinity) - (b ?? -Infinity));
  const rungs = ladder.map(({ name }) => name);
  const errorAt = ({ chosen, candidates }: PrecisionEntry) =>
    errorOf(metric, candidates[rungs.indexOf(chosen)].scores[metric]);
  const strength = new Strength(entries.map(errorAt));
  const width = Math.max(6, Math.min(180, 720 / steps.length));
  const height = Math.max(10, Math.min(30, 640 / layers.length));
  const wide = steps.length * width, high = layers.length * height;
  const text = (x: number, y: number, words: string, more = `class="faint"`) =>
    `<text x="${x.toFixed(1)}" y="${y.toFixed(1)}" ${more}>${escape(words)}</text>`;

  const cells = entries.map((entry) => {
    const { layer, timestep, chosen } = entry, rung = rungs.indexOf(chosen);
    const x = left + steps.indexOf(timestep) * width, y = top + layers.indexOf(layer) * height;
    const error = errorAt(entry), when = timestep === null ? "" : `, time step ${timestep}`;
    const about = `layer ${layer}${when}: ${chosen}, error ${short(error)}`;
    const label = width >= 120 ? `${rung + 1} · ${short(error)}` : width >= 22 ? `${rung + 1}` : "";
    const inside = label && height >= 14
      ? text(
        x + width / 2,
        y + height / 2 + 4,
        label,
        `class="halo" text-anchor="middle" pointer-events="none"`,
      )
      : "";
    return `<rect class="${colour(rung)}" x="${x.toFixed(1)}" y="${y.toFixed(1)}" ` +
      `width="${(width - 1).toFixed(1)}" height="${(height - 1).toFixed(1)}" ` +
      `fill-opacity="${strength.of(error).toFixed(2)}"><title>${
        escape(about)
      }</title></rect>${inside}`;
  });

  const everyLayer = Math.ceil(14 / height), everyStep = Math.ceil(34 / width);
  const rows = layers.map((layer, i) =>
    i % everyLayer ? "" : text(
      left - 8,
      top + (i + 0.5) * height + 4,
      String(layer),
      `class="faint" text-anchor="end"`,
    )
  );
  const columns = steps.map((step, i) =>
    i % everyStep ? "" : text(
      left + (i + 0.5) * width,
      top + high + 16,
      step === null ? (steps.length === 1 ? "every time step" : "every") : String(step),
      `class="faint" text-anchor="middle"`,
    )
  );

  const right = left + wide + gap;
  const counted = 20 + 7.6 * (Math.max(...rungs.map((name) => name.length)) + 4);
  const legend = rungs.map((name, i) => {
    const y = top + 20 * i, count = entries.filter(({ chosen }) => chosen === name).length;
    return `<rect class="${colour(i)}" x="${right}" y="${y}" width="14" height="14"/>` +
      text(right + 20, y + 12, `${i + 1}  ${name}`, `class="label"`) +
      text(right + counted, y + 12, `${count} of ${entries.length}`);
  });
  const scaleTop = top + 20 * rungs.length + 12;
  const scale = [0, 1, 2, 3, 4, 5].map((i) =>
    `<rect class="faint" x="${right + 18 * i}" y="${scaleTop + 8}" width="18" height="10" ` +
    `fill-opacity="${(faintest + i / 5 * (1 - faintest)).toFixed(2)}"/>`
  );
  const error = metric === "relativeL1" || metric === "rmse" ? metric : `1 − ${metric}`;
  const title = `Precision plan${model.name && `: ${model.name}`}`;
  return svgDocument(
    Math.round(Math.max(right + counted + 76 + gap, 2 * gap + 10.2 * title.length, 480)),
    Math.round(Math.max(top + high + 40, scaleTop + 56)),
    "Recipe and error of every layer and time step",
    [
      text(gap, 34, title, `class="title"`),
      text(
        gap,
        60,
        `Layers ↓, time steps →. Colour: the recipe; the stronger, the larger ${error}.`,
      ),
      ...rows.filter(Boolean),
      ...columns.filter(Boolean),
      ...cells,
      ...legend,
      text(right, scaleTop, error),
      ...scale,
      text(right, scaleTop + 34, short(strength.low)),
      text(right + 108, scaleTop + 34, short(strength.high), `class="faint" text-anchor="end"`),
    ].join("\n"),
  );
}
