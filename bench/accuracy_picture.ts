// The error of every kernel and recipe against its speed, where a record has that.
import { type Figures, type Mark, marks, pictureName, recordedShape } from "./accuracy_page.ts";
import type { Results } from "./format.ts";
import {
  accuracySize,
  heading,
  light,
  type Picture,
  placeLabels,
  widened,
} from "./report_pictures.ts";
import { kilo } from "./report_tables.ts";

const height = 460;

type Range = [low: number, high: number];

const heightOf = (error: number, up: Range) =>
  height * (up[1] - Math.log10(error)) / (up[1] - up[0]);

/** Marks with the error at whose height their label stands. */
function labelled(all: readonly Mark[], heights: readonly number[], up: Range) {
  return all.map((mark, i) => ({
    ...mark,
    labelError: 10 ** (up[1] - heights[i] / height * (up[1] - up[0])),
  }));
}

/** Heights near those of the marks, in their order, that leave a line of type between two. */
function spread(heights: readonly number[]): number[] {
  const line = 16, down = [...heights], back = [...heights];
  for (let i = 1; i < down.length; ++i) down[i] = Math.max(down[i], down[i - 1] + line);
  for (let i = back.length - 2; i >= 0; --i) back[i] = Math.min(back[i], back[i + 1] - line);
  return down.map((one, i) => (one + back[i]) / 2);
}

/** Marks at their speed, and in a strip beside them those that no record has. */
export function accuracyPicture(figures: Figures, results: Results): Picture {
  const all = marks(figures, results), { headDim, tokens } = recordedShape(results);
  const fast = all.filter(({ speed }) => speed !== undefined);
  const rest = all.filter(({ speed }) => speed === undefined).sort((a, b) => b.error - a.error);
  const across = widened(fast.map(({ speed }) => speed!), 0.06, 0.35);
  const up = widened(all.map(({ error }) => Math.log10(error)), 0.05, 0.05);
  const { width } = accuracySize;
  const y = {
    field: "error",
    type: "quantitative",
    title: "relative L1 error",
    scale: { type: "log", domain: up.map((power) => 10 ** power), nice: false },
    axis: { format: "~g", values: [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3] },
  };
  const x = {
    field: "speed",
    type: "quantitative",
    title: `TFLOP/s (D ${headDim} causal, ${kilo(tokens)} tokens)`,
    scale: { domain: across, nice: false },
    axis: { tickCount: 8 },
  };
  const layers = (x: Record<string, unknown>, labelX: Record<string, unknown>, colour: string) => [
    {
      mark: { type: "rule", strokeWidth: 1, color: colour },
      encoding: { x, y, x2: { field: labelX.field }, y2: { field: "labelError" } },
    },
    {
      mark: { type: "point", filled: true, size: 80, opacity: 1, color: colour },
      encoding: { x, y },
    },
    {
      mark: { type: "text", align: "left", dx: 9, fontSize: 12, color: light("ink") },
      encoding: { x: labelX, y: { ...y, field: "labelError" }, text: { field: "series" } },
    },
  ];
  const placed = placeLabels(fast.map(({ series, speed, error }) => ({
    text: series,
    x: width * (speed! - across[0]) / (across[1] - across[0]),
    y: heightOf(error, up),
  })));
  const strip = {
    field: "mark",
    type: "quantitative",
    title: "no speed in the record",
    scale: { domain: [0, 1] },
    axis: { labels: false, ticks: false, grid: false, titleAlign: "left", titleAnchor: "start" },
  };
  const noTitle = { title: null, axis: { ...y.axis, labels: false, ticks: false } };
  return {
    name: pictureName,
    alt: "Error of every kernel and option against its speed",
    spec: {
      title: heading(
        "Accuracy against speed",
        `Mean relative L1 on the causal tensors of tests/data/, against float64; speeds on ${results.device}. ` +
          "Lower right is better.",
      ),
      hconcat: [
        {
          ...{ width, height },
          data: { values: labelled(fast, placed, up) },
          layer: layers(x, x, light("blue")),
        },
        {
          ...{ width: 300, height },
          data: {
            values: labelled(rest, spread(rest.map(({ error }) => heightOf(error, up))), up)
              .map((mark) => ({ ...mark, mark: 0, label: 0.08 })),
          },
          layer: layers(strip, { ...strip, field: "label" }, light("orange")).map((layer) => ({
            ...layer,
            encoding: { ...layer.encoding, y: { ...layer.encoding.y, ...noTitle } },
          })),
        },
      ],
    },
  };
}
