// Pictures of a record: what is drawn (Vega-Lite, as data), and drawing it as SVG that is readable on light and on dark.
import { nameOf, type Results, type Row } from "./format.ts";
import { ceiling, gpuOf, type Precision } from "./gpus.ts";
import { deviation, modelled } from "./report_scaling.ts";
import { distinct, kilo, squareRows, title } from "./report_tables.ts";

/** A picture before it is drawn. */
export interface Picture {
  /** Of the file, without its ending. */
  name: string;
  /** For those who cannot see it. */
  alt: string;
  spec: Record<string, unknown>;
}

// ---- what it looks like --------------------------------------------------------------------------

/** Each colour on light ground and on dark; told apart also by eyes that mix red and green. */
const palette = {
  paper: ["#ffffff", "#14171c"],
  ink: ["#1c2128", "#e6e9ee"],
  faint: ["#6b7480", "#98a2ae"],
  line: ["#e3e6ea", "#2a2f37"],
  grey: ["#5b6572", "#aab4c0"],
  blue: ["#0b62c4", "#66a9ff"],
  teal: ["#0a8f86", "#3fd0c4"],
  orange: ["#c2410c", "#ff9a5c"],
  purple: ["#8a2ea8", "#d896f0"],
  gold: ["#a16207", "#e8c04a"],
  green: ["#3f7d20", "#8fd16a"],
  pink: ["#be185d", "#ff8fc0"],
} as const;

type Colour = keyof typeof palette;

/** As a picture is written; a browser that prefers dark shows the other one. */
export const light = (colour: Colour) => palette[colour][0];

const solid = [1, 0], dashed = [6, 3], dotted = [2, 2];

interface Look {
  colour: Colour;
  dash: number[];
}

const ours: Record<string, Colour> = {
  flash: "grey",
  "sage1 f32": "blue",
  "sage1 f16": "blue",
  "sage1-int8": "teal",
  "sage2 exact": "orange",
  "sage2 fast": "purple",
  "sage2-int4": "gold",
  "sage2++": "pink",
  "sage-int8": "green",
};

const others: Record<string, Colour> = {
  "pytorch-fa2": "grey",
  cudnn: "green",
  fa3: "gold",
  "fa3-fp8": "pink",
  sageattention: "teal",
  onnxruntime: "green",
};

function lookOf(row: Row): Look {
  return row.peer
    ? { colour: others[row.kernel] ?? "faint", dash: dotted }
    : { colour: ours[nameOf(row)] ?? "ink", dash: row.endToEnd ? solid : dashed };
}

const plain = (row: Parameters<typeof title>[0]) => title(row).replaceAll("`", "");

const config = {
  background: light("paper"),
  font: "system-ui, sans-serif",
  padding: 14,
  axis: {
    labelColor: light("faint"),
    titleColor: light("faint"),
    gridColor: light("line"),
    domainColor: light("line"),
    tickColor: light("line"),
    labelFontSize: 11,
    titleFontSize: 11,
    titleFontWeight: "normal",
  },
  header: {
    labelColor: light("ink"),
    labelFontSize: 13,
    labelFontWeight: "bold",
    titleColor: light("ink"),
  },
  legend: {
    labelColor: light("ink"),
    titleColor: light("faint"),
    labelFontSize: 12,
    labelLimit: 300,
    symbolSize: 260,
    symbolStrokeWidth: 2.5,
    title: null,
  },
  title: {
    color: light("ink"),
    subtitleColor: light("faint"),
    fontSize: 18,
    subtitleFontSize: 12,
    anchor: "start",
    offset: 14,
  },
  view: { stroke: null },
};

/** A title, and what is shown in smaller type below it. */
export function heading(text: string, subtitle: string): Record<string, unknown> {
  return { text, subtitle };
}

/** Colour and dash of every series, in one legend. */
function scales(rows: readonly Row[]): Record<string, unknown> {
  const domain = distinct([...rows].sort((a, b) => Number(a.peer) - Number(b.peer)).map(plain));
  const looks = domain.map((name) => lookOf(rows.find((row) => plain(row) === name)!));
  return {
    color: {
      field: "series",
      type: "nominal",
      sort: null,
      scale: { domain, range: looks.map(({ colour }) => light(colour)) },
      legend: { orient: "bottom", columns: 3, symbolType: "stroke" },
    },
    strokeDash: {
      field: "series",
      type: "nominal",
      sort: null,
      scale: { domain, range: looks.map(({ dash }) => dash) },
    },
  };
}

function lengthAxis(tokens: readonly number[]): Record<string, unknown> {
  return {
    field: "tokens",
    type: "quantitative",
    title: "tokens",
    scale: { type: "log", base: 2, nice: false },
    axis: {
      values: distinct(tokens),
      labelExpr: "datum.value >= 1024 ? datum.value / 1024 + 'k' : datum.value",
      grid: false,
    },
  };
}

// ---- speed against length ------------------------------------------------------------------------

/** The kernels that lead somewhere, so that the picture stays readable: with sage2, sage1's variants are left out. */
function shown(rows: readonly Row[]): Row[] {
  const names = new Set(rows.map(nameOf));
  const sage2 = names.has("sage2 fast") || names.has("sage2 exact");
  const alone = names.has("sage2 fast")
    ? "sage2 fast"
    : names.has("sage2 exact")
    ? "sage2 exact"
    : "sage1 f32";
  return rows.filter((row) => {
    const name = nameOf(row);
    if (row.peer) return true;
    if (!row.endToEnd) return name === alone;
    return name !== "sage1 f16" && (!sage2 || !["sage2-int4", "sage2++"].includes(name));
  });
}

interface Rule {
  speed: number;
  label: string;
}

const ceilingNames: Record<Precision, string> = {
  f16: "FP16 products",
  "i8 f16": "INT8 and FP16 products",
  "i8 e4m3": "INT8 and FP8 products",
};

/** What the GPU's units allow where they are never idle; such as fall together share a line. */
function ceilings(device: string, headDim: number): Rule[] {
  const gpu = gpuOf(device);
  if (!gpu) return [];
  const rules = (["f16", "i8 e4m3"] as const).flatMap((precision) => {
    const one = ceiling(gpu, precision, headDim, false);
    return one ? [{ speed: one.tflops, label: ceilingNames[precision] }] : [];
  });
  const exact = ceiling(gpu, "i8 e4m3", headDim) ?? ceiling(gpu, "f16", headDim)!;
  if (exact.unit === "exponentials") {
    const near = rules.find(({ speed }) => Math.abs(speed / exact.tflops - 1) < 0.05);
    if (near) near.label += "; exponentials";
    else rules.push({ speed: exact.tflops, label: "exponentials" });
  }
  return rules;
}

const maskName = (causal: boolean | undefined) => causal ? "causal" : "full";

function speedPicture(results: Results, file: string): Picture {
  const rows = shown(squareRows(results));
  const slow = Math.max(...rows.map(({ tflops }) => tflops!)) < 10;
  const unit = slow ? "GFLOP/s" : "TFLOP/s", factor = slow ? 1000 : 1;
  const headDims = distinct(rows.map(({ headDim }) => headDim)).sort((a, b) => a - b);
  const masks = distinct(rows.map(({ causal }) => maskName(causal)));
  const tokens = rows.map((row) => row.tokens);
  const panel = (headDim: number, mask: string) => `D ${headDim}, ${mask}`;
  const panels = masks.flatMap((mask) => headDims.map((headDim) => panel(headDim, mask)));
  const values = [
    ...rows.map((row) => ({
      kind: "row",
      panel: panel(row.headDim, maskName(row.causal)),
      tokens: row.tokens,
      speed: factor * row.tflops!,
      series: plain(row),
    })),
    ...masks.flatMap((mask) =>
      headDims.flatMap((headDim) =>
        ceilings(results.device, headDim).map((rule) => ({
          kind: "ceiling",
          panel: panel(headDim, mask),
          tokens: Math.min(...tokens),
          ...rule,
        }))
      )
    ),
  ];
  const isRow = [{ filter: "datum.kind === 'row'" }];
  const isCeiling = [{ filter: "datum.kind === 'ceiling'" }];
  const y = { field: "speed", type: "quantitative", title: unit };
  const x = lengthAxis(tokens);
  const lines = scales(rows);
  return {
    name: `${file}-speed`,
    alt:
      `Speed of attention on ${results.device} against length, one panel for each head dimension and mask`,
    spec: {
      title: heading(
        `Attention on ${results.device}: speed against length`,
        `${unit} from ${
          rows[0].dtype
        } tensors to the output, and of the kernel alone. Higher is better.`,
      ),
      data: { values },
      facet: { field: "panel", sort: panels, title: null },
      columns: headDims.length,
      spec: {
        width: 260,
        height: 230,
        layer: [
          {
            transform: isCeiling,
            mark: { type: "rule", strokeWidth: 1, strokeDash: [1, 3], color: light("ink") },
            encoding: { y },
          },
          {
            transform: isCeiling,
            mark: {
              type: "text",
              align: "left",
              dy: -5,
              fontSize: 10,
              color: light("faint"),
            },
            encoding: { x, y, text: { field: "label" } },
          },
          {
            transform: isRow,
            mark: { type: "line", strokeWidth: 2 },
            encoding: { x, y, ...lines },
          },
          {
            transform: isRow,
            mark: { type: "point", filled: true, size: 28, opacity: 1 },
            encoding: { x, y, color: lines.color },
          },
        ],
      },
    },
  };
}

// ---- accuracy against speed ----------------------------------------------------------------------

function mean(values: readonly number[]): number {
  return values.reduce((a, b) => a + b, 0) / values.length;
}

function accuracyPicture(results: Results, file: string): Picture | undefined {
  const all = squareRows(results).filter(({ endToEnd, peer, causal }) =>
    endToEnd && !peer && causal
  );
  const headDim = all.some((row) => row.headDim === 128) ? 128 : all[0]?.headDim;
  const tokens = Math.max(...all.filter((row) => row.headDim === headDim).map((row) => row.tokens));
  const rows = all.filter((row) => row.headDim === headDim && row.tokens === tokens);
  if (!rows.length || !results.accuracy.length) return;
  const slow = Math.max(...rows.map(({ tflops }) => tflops!)) < 10;
  const unit = slow ? "GFLOP/s" : "TFLOP/s";
  const values = rows.flatMap((row) => {
    const own = results.accuracy.filter((one) => nameOf(one) === nameOf(row));
    return own.length
      ? [{
        series: plain(row),
        speed: (slow ? 1000 : 1) * row.tflops!,
        error: mean(own.map(({ relativeL1 }) => relativeL1)),
      }]
      : [];
  });
  const across = widened(values.map(({ speed }) => speed), 0.06, 0.3);
  const up = widened(values.map(({ error }) => Math.log10(error)), 0.1, 0.1);
  const placed = placeLabels(values.map(({ series, speed, error }) => ({
    text: series,
    x: accuracySize.width * (speed - across[0]) / (across[1] - across[0]),
    y: accuracySize.height * (up[1] - Math.log10(error)) / (up[1] - up[0]),
  })));
  const marks = values.map((value, i) => ({
    ...value,
    labelError: 10 ** (up[1] - placed[i] / accuracySize.height * (up[1] - up[0])),
  }));
  const x = {
    field: "speed",
    type: "quantitative",
    title: `${unit} → (D ${headDim} causal, ${kilo(tokens)} tokens)`,
    scale: { domain: across, nice: false },
    axis: { tickCount: 8 },
  };
  const y = {
    field: "error",
    type: "quantitative",
    title: "relative L1 error ↑",
    scale: { type: "log", domain: up.map((power) => 10 ** power), nice: false },
    axis: { format: "~g", values: [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3] },
  };
  const labelY = { ...y, field: "labelError" };
  const color = { ...scales(rows).color as object, legend: null };
  return {
    name: `${file}-accuracy`,
    alt: `Error of every kernel on ${results.device} against its speed`,
    spec: {
      title: heading(
        `Attention on ${results.device}: accuracy against speed`,
        `Mean relative L1 error on the tensors of tests/data/, against float64. Lower right is better.`,
      ),
      data: { values: marks },
      ...accuracySize,
      layer: [
        {
          mark: { type: "rule", strokeWidth: 1 },
          encoding: { x, y, y2: { field: "labelError" }, color },
        },
        { mark: { type: "point", filled: true, size: 90, opacity: 1 }, encoding: { x, y, color } },
        {
          mark: { type: "text", align: "left", dx: 9, fontSize: 12, fontWeight: "bold" },
          encoding: { x, y: labelY, text: { field: "series" }, color },
        },
      ],
    },
  };
}

/** Of a picture of error against speed. */
export const accuracySize = { width: 720, height: 320 };

/** The range of values with some room, as shares of it, before and after. */
export function widened(
  values: readonly number[],
  before: number,
  after: number,
): [number, number] {
  const low = Math.min(...values), high = Math.max(...values), range = high - low || Math.abs(low);
  return [low - before * range, high + after * range];
}

/** Heights at which labels to the right of their marks cover neither each other nor another mark. */
export function placeLabels(marks: readonly { text: string; x: number; y: number }[]): number[] {
  const height = 15, em = 7.2, taken: { x: number; width: number; y: number }[] = [];
  return marks.map(({ text, x, y }, i) => {
    const width = text.length * em + 14;
    const free = (at: number) =>
      marks.every((mark, j) =>
        j === i || mark.x < x || mark.x > x + width || Math.abs(mark.y - at) >= height / 1.5
      ) &&
      taken.every((one) =>
        one.x > x + width || x > one.x + one.width || Math.abs(one.y - at) >= height
      );
    const steps = Array.from(
      { length: 40 },
      (_, k) => (k % 2 ? 1 : -1) * (k + 1 >> 1) * height / 2,
    );
    const at = y + (steps.find((step) => free(y + step)) ?? 0);
    taken.push({ x, width, y: at });
    return at;
  });
}

// ---- where the time goes -------------------------------------------------------------------------

const stageColours: Record<string, Colour> = {
  mean: "gold",
  smooth: "gold",
  quantize: "teal",
  pack: "green",
  attention: "blue",
};
const spareColours: Colour[] = ["purple", "pink", "orange", "grey"];

function stagesPicture(results: Results, file: string): Picture | undefined {
  const all = squareRows(results).filter((row) => row.stages && row.causal === false);
  const headDim = all.some((row) => row.headDim === 128) ? 128 : all[0]?.headDim;
  const own = all.filter((row) => row.headDim === headDim);
  if (!own.length) return;
  const lengths = distinct(own.map(({ tokens }) => tokens)).sort((a, b) => a - b);
  const picked = distinct([lengths[0], lengths[lengths.length >> 1], lengths.at(-1)!]);
  const rows = own.filter(({ tokens }) => picked.includes(tokens));
  const values = rows.flatMap((row) => {
    const total = Object.values(row.stages!).reduce((a, b) => a + b, 0);
    return Object.entries(row.stages!).map(([stage, ms], order) => ({
      panel: `${kilo(row.tokens)} tokens`,
      series: plain(row),
      stage,
      order,
      share: ms / total,
      label: ms / total > 0.09 ? `${(100 * ms / total).toFixed(0)} %` : "",
    }));
  });
  const known = Object.keys(stageColours);
  const place = (stage: string) =>
    known.includes(stage) ? known.indexOf(stage) : known.length - 1.5;
  const stages = distinct(values.map(({ stage }) => stage)).sort((a, b) => place(a) - place(b));
  const series = distinct(values.map((value) => value.series));
  const spare = [...spareColours];
  const colours = stages.map((stage) => light(stageColours[stage] ?? spare.shift() ?? "faint"));
  const y = {
    field: "series",
    type: "nominal",
    sort: series,
    title: null,
    axis: { labelColor: light("ink"), labelLimit: 260, ticks: false },
  };
  const x = {
    field: "share",
    type: "quantitative",
    stack: "zero",
    title: "share of the time",
    axis: { format: ".0%", grid: false, values: [0, 0.5, 1] },
  };
  const order = { field: "order" };
  return {
    name: `${file}-stages`,
    alt: `Shares of the stages of attention on ${results.device}`,
    spec: {
      title: heading(
        `Attention on ${results.device}: where the time goes`,
        `Stages of a call at D ${headDim}, full attention, as shares of their sum.`,
      ),
      data: { values },
      facet: {
        column: {
          field: "panel",
          sort: picked.map((tokens) => `${kilo(tokens)} tokens`),
          title: null,
        },
      },
      spec: {
        width: 250,
        height: { step: 24 },
        layer: [
          {
            mark: { type: "bar", height: { band: 0.7 } },
            encoding: {
              x,
              y,
              order,
              color: {
                field: "stage",
                type: "nominal",
                sort: null,
                scale: { domain: stages, range: colours },
                legend: { orient: "bottom", symbolType: "square", symbolSize: 120 },
              },
            },
          },
          {
            mark: { type: "text", fontSize: 10, align: "center", color: light("paper") },
            encoding: {
              x: { ...x, bandPosition: 0.5 },
              y,
              order,
              detail: { field: "stage" },
              text: { field: "label" },
            },
          },
        ],
      },
      resolve: { scale: { y: "shared" } },
    },
  };
}

// ---- the model against the measurement -----------------------------------------------------------

function modelPicture(results: Results, file: string): Picture | undefined {
  const shown = modelled(results).flatMap(({ rows, model }) =>
    rows.filter(({ kernel, accumulator }) => kernel !== "sage1-int8" && accumulator !== "f16")
      .map((row) => ({ row, model }))
  );
  const rows = shown.map(({ row }) => row);
  const values = shown.map(({ row, model }) => ({
    panel: `D ${row.headDim}`,
    tokens: row.tokens,
    error: deviation(model, row),
    series: plain(row),
    mask: maskName(row.causal),
  }));
  if (!values.length) return;
  const headDims = distinct(rows.map(({ headDim }) => headDim)).sort((a, b) => a - b);
  const x = lengthAxis(rows.map(({ tokens }) => tokens));
  return {
    name: `${file}-model`,
    alt: `Deviation of the time model from the measurement on ${results.device}`,
    spec: {
      title: heading(
        `Attention on ${results.device}: model against measurement`,
        "Predicted time over measured time, less 1.",
      ),
      data: { values },
      facet: {
        column: { field: "panel", sort: headDims.map((headDim) => `D ${headDim}`), title: null },
      },
      spec: {
        width: 260,
        height: 220,
        layer: [
          {
            data: { values: [{ limit: 0.1 }, { limit: -0.1 }] },
            mark: { type: "rule", strokeDash: [2, 3], color: light("ink") },
            encoding: { y: { field: "limit", type: "quantitative" } },
          },
          {
            mark: { type: "point", filled: true, size: 50, opacity: 0.9 },
            encoding: {
              x,
              y: {
                field: "error",
                type: "quantitative",
                title: "deviation",
                axis: { format: "+.0%" },
                scale: { domain: [-0.15, 0.15] },
              },
              color: {
                ...scales(rows).color as object,
                legend: { orient: "bottom", symbolType: "circle", symbolSize: 70 },
              },
              shape: {
                field: "mask",
                type: "nominal",
                legend: {
                  orient: "bottom",
                  symbolFillColor: light("faint"),
                  symbolStrokeColor: light("faint"),
                  symbolSize: 70,
                },
              },
            },
          },
        ],
      },
    },
  };
}

/** Every picture that a record has the data for. */
export function pictures(results: Results, file: string): Picture[] {
  return [speedPicture, accuracyPicture, stagesPicture, modelPicture]
    .flatMap((draw) => draw(results, file) ?? []);
}

// ---- drawing -------------------------------------------------------------------------------------

/** What a picture shows, in few characters: it stands in the SVG, so that one can tell whether it is of this record. */
export async function digest({ spec }: Picture): Promise<string> {
  const bytes = new TextEncoder().encode(JSON.stringify(spec));
  return new Uint8Array(await crypto.subtle.digest("SHA-256", bytes)).toHex().slice(0, 16);
}

interface View {
  toSVG(): Promise<string>;
}

interface Libraries {
  vega: {
    parse(spec: unknown): unknown;
    View: new (runtime: unknown, options: { renderer: "none" }) => View;
  };
  vegaLite: { compile(spec: unknown): { spec: unknown } };
}

const charactersPerEm = 1.85; // of sans-serif type; without a browser Vega takes one character for 0.8 em

/** Vega and Vega-Lite, named where Deno cannot see it in advance: nothing else needs them. */
export async function loadVega(): Promise<Libraries> {
  const names = ["npm:vega@6.4.0", "npm:vega-lite@6.5.0"];
  const [vega, vegaLite] = await Promise.all(names.map((name) => import(name)));
  vega.textMetrics.width = ({ fontSize = 11 }: { fontSize?: number }, text: unknown) =>
    String(text ?? "").length * fontSize / charactersPerEm;
  return { vega, vegaLite };
}

/** Rules by which a browser shows light colours as dark ones where dark is preferred. */
function darkStyle(): string {
  const rules = Object.values(palette).map(([light, dark]) =>
    `[fill="${light}"]{fill:${dark}}[stroke="${light}"]{stroke:${dark}}`
  );
  return `<style>@media (prefers-color-scheme:dark){${rules.join("")}}</style>`;
}

/** The picture as an SVG document. */
export async function draw(picture: Picture, { vega, vegaLite }: Libraries): Promise<string> {
  const { spec } = vegaLite.compile({
    $schema: "https://vega.github.io/schema/vega-lite/v6.json",
    ...picture.spec,
    config,
  });
  const svg = await new vega.View(vega.parse(spec), { renderer: "none" }).toSVG();
  const label = `role="img" aria-label="${picture.alt}" data-digest="${await digest(picture)}"`;
  return svg.replace("<svg ", `<svg ${label} `).replace(/(<svg [^>]*>)/, `$1${darkStyle()}`) + "\n";
}
