// Tables of docs/scaling.md: the model of time and memory, and what it predicts.
import type { Results, Row, Shape } from "./format.ts";
import { ceiling, gpuOf, gpus, precisionOf } from "./gpus.ts";
import {
  blockRows,
  fit,
  fitMemory,
  fitTime,
  inDomain,
  isModelled,
  predictBytes,
  predictMs,
  predictRow,
  type Ring,
  shapeOf,
  stepBytes,
  stepComputeMs,
  stepWireMs,
  type TimeModel,
  tokensToHide,
  wires,
  workOf,
} from "./model.ts";
import { distinct, kilo, seriesOf, squareRows, table, title } from "./report_tables.ts";

/** One kernel at one head dimension: its rows and the model of them. */
export interface Modelled {
  name: string;
  headDim: number;
  rows: Row[];
  model: TimeModel;
}

/** Rows of ours from tensors to the output, with a key-value head for every head. */
function ownRows({ rows }: Results): Row[] {
  return rows.filter((row) =>
    row.group === "attention" && !row.peer && row.endToEnd && row.heads === row.kvHeads &&
    isModelled(row)
  );
}

/** Every kernel of ours that the record lets us model. */
export function modelled(results: Results): Modelled[] {
  const square = new Set(squareRows(results)), rows = ownRows(results);
  const key = (row: Row) => `${seriesOf(row)} ${row.headDim}`;
  return distinct(rows.map(key)).flatMap((one) => {
    const own = rows.filter((row) => key(row) === one), model = fitTime(own, results);
    if (!model) return [];
    const within = own.filter((row) =>
      square.has(row) && inDomain(shapeOf(row), model.multiprocessors)
    );
    return [{ name: title(own[0]), headDim: own[0].headDim, rows: within, model }];
  });
}

/** Predicted time over measured time, less 1. */
export function deviation(model: TimeModel, row: Row): number {
  return predictRow(model, row) / row.ms - 1;
}

function worst(model: TimeModel, rows: readonly Row[]): string {
  const most = Math.max(0, ...rows.map((row) => Math.abs(deviation(model, row))));
  return rows.length ? `${(100 * most).toFixed(1)} %` : "–";
}

/** The constants of the model, and how far it is from the rows that were fitted and from the others. */
export function modelTable(results: Results): string {
  const body = modelled(results).map(({ name, headDim, rows, model }) => {
    const { cyclesPerTile, cyclesPerCausalTile, cyclesPerBlock, cyclesPerMask, launchUs } = model;
    const { multiprocessors, clockMHz } = model;
    const limit = 4 * 128 * 64 * headDim / cyclesPerTile * multiprocessors * clockMHz / 1e6;
    return [
      `${name}, D ${headDim}`,
      cyclesPerTile.toFixed(0),
      cyclesPerCausalTile.toFixed(0),
      cyclesPerBlock.toFixed(0),
      cyclesPerMask.toFixed(0),
      launchUs.toFixed(0),
      limit.toFixed(0),
      worst(model, rows),
    ];
  });
  return table([
    "kernel",
    "cycles a tile",
    "more if causal",
    "cycles a block",
    "cycles its mask",
    "µs a call",
    "TFLOP/s at endless length",
    "off",
  ], body);
}

/** Measured times of calls at D 128 against length, and what the model says. */
export function lengthsTable(results: Results): string {
  const all = modelled(results).filter(({ headDim }) => headDim === 128);
  const lengths = distinct(all.flatMap(({ rows }) => rows.map(({ tokens }) => tokens)));
  const body = all.flatMap(({ name, rows, model }) =>
    [false, true].map((causal) => [
      `${name}${causal ? ", causal" : ""}`,
      ...lengths.map((tokens) => {
        const row = rows.find((one) => one.tokens === tokens && one.causal === causal);
        return row ? `${row.ms.toPrecision(3)} (${predictRow(model, row).toPrecision(3)})` : "–";
      }),
    ])
  );
  return table(["D 128, ms measured (model)", ...lengths.map(kilo)], body);
}

/** What comes before the kernel, as bytes at the speed of a copy. */
export function bytesTable(results: Results): string {
  const { copyTbs, multiprocessors = 1 } = results;
  const body = modelled(results).flatMap(({ name, headDim, rows }) => {
    const before = rows.flatMap((row) => {
      const { attention, ...others } = row.stages ?? {};
      const ms = Object.values(others).reduce((sum, one) => sum + one, 0);
      return attention && ms ? [{ ms, ...workOf(shapeOf(row), multiprocessors) }] : [];
    });
    if (!before.length || copyTbs === undefined) return [];
    const [perBlock, launch] = fit(before.map(({ ms, blocks }) => [blocks / ms, 1 / ms]));
    const bytesOfBlock = perBlock * copyTbs * 1e9 / multiprocessors;
    return [[
      `${name}, D ${headDim}`,
      (1e3 * perBlock / multiprocessors).toFixed(3),
      (bytesOfBlock / blockRows / headDim).toFixed(1),
      (1e3 * launch).toFixed(0),
    ]];
  });
  if (!body.length) return "The record has no stages.";
  return table(
    ["before the kernel", "µs a block", "bytes at the speed of a copy", "µs a call"],
    body,
  );
}

/** Rows of other batches and heads than those that the models are fitted to, with the model of each. */
export function otherSizes(results: Results): { row: Row; model: TimeModel; within: boolean }[] {
  const square = new Set(squareRows(results)), models = modelled(results);
  return ownRows(results).filter((row) => !square.has(row)).flatMap((row) => {
    const found = models.find((one) => one.name === title(row) && one.headDim === row.headDim);
    if (!found) return [];
    const within = inDomain(shapeOf(row), found.model.multiprocessors);
    return [{ row, model: found.model, within }];
  });
}

/** Measured and predicted times of other batches and heads. */
export function sizesTable(results: Results): string {
  const body = otherSizes(results).map(({ row, model, within }) => [
    title(row),
    `${row.batch} × ${row.heads} heads, ${kilo(row.tokens)}`,
    row.ms.toPrecision(3),
    predictRow(model, row).toPrecision(3),
    `${(100 * deviation(model, row)).toFixed(1)} %${within ? "" : " (too few blocks)"}`,
  ]);
  if (!body.length) return "The record has no rows of other batches and heads.";
  return table(["D 128", "shape", "ms", "model, ms", "off"], body);
}

function bytes(count: number): string {
  return count < 1e9 ? `${(count / 1e6).toFixed(0)} MB` : `${(count / 1e9).toFixed(2)} GB`;
}

/** Workspace for each element of the inputs. */
export function memoryTable(results: Results): string {
  const rows = results.rows.filter((row) =>
    row.group === "attention" && !row.peer && row.endToEnd && isModelled(row)
  );
  const body = distinct(rows.map(title)).flatMap((kernel) => {
    const own = rows.filter((row) => title(row) === kernel), model = fitMemory(own);
    if (!model) return [];
    const off = own.map((row) => predictBytes(model, shapeOf(row)) / row.workspaceBytes! - 1);
    const largest = own.reduce((a, b) => a.workspaceBytes! > b.workspaceBytes! ? a : b);
    return [[
      kernel,
      model.perQuery.toFixed(2),
      model.perKey.toFixed(2),
      (model.fixed / 1e6).toFixed(1),
      `${(100 * Math.max(...off.map(Math.abs))).toFixed(1)} %`,
      bytes(largest.workspaceBytes!),
    ]];
  });
  if (!body.length) return "The record tells no workspace.";
  return table([
    "workspace",
    "bytes an element of Q",
    "bytes an element of K with V",
    "MB a call",
    "off",
    "the most of a row",
  ], body);
}

const million: Shape = {
  headDim: 128,
  causal: true,
  batch: 1,
  heads: 32,
  kvHeads: 8,
  tokens: 2 ** 20,
};

function seconds(ms: number): string {
  return `${(ms / 1e3).toFixed(2)} s`;
}

/** A million tokens on one GPU. */
export function millionTable(results: Results): string {
  const memory = (kernel: string) =>
    fitMemory(results.rows.filter((row) => title(row) === kernel && row.group === "attention"));
  const body = modelled(results).filter(({ headDim }) => headDim === million.headDim).map(
    ({ name, model }) => {
      const workspace = memory(name);
      return [
        name,
        seconds(predictMs(model, { ...million, causal: false })),
        seconds(predictMs(model, million)),
        workspace ? bytes(predictBytes(workspace, million)) : "–",
      ];
    },
  );
  return table(["1M tokens, 32 heads on 8, D 128", "full", "causal", "workspace"], body);
}

/** The fastest row of a kernel at D 128, full, and the share of the ceiling that it reaches. */
function bestRows(results: Results): Row[] {
  const rows = squareRows(results).filter(({ headDim, causal, peer, endToEnd, kernel }) =>
    headDim === 128 && !causal && !peer && endToEnd && precisionOf(kernel)
  ).filter(({ accumulator }) => accumulator !== "f16");
  return distinct(rows.map(seriesOf)).map((series) =>
    rows.filter((row) => seriesOf(row) === series).sort((a, b) => b.tflops! - a.tflops!)[0]
  );
}

function ceilingOf(name: string, row: Row): number | undefined {
  const gpu = gpus.find((one) => one.name === name)!;
  return ceiling(gpu, precisionOf(row.kernel)!, row.headDim, row.exp !== "fast")?.tflops;
}

/** What other GPUs would do with the same share of what their units allow. */
export function gpuTable(results: Results): string {
  const here = gpuOf(results.device), rows = bestRows(results);
  if (!here) return "The datasheet of this device is not known here.";
  const cell = (name: string, row: Row) => {
    const top = ceilingOf(name, row), base = ceilingOf(here.name, row)!;
    if (top === undefined) return "–";
    return name === here.name
      ? `${row.tflops!.toFixed(0)} of ${top.toFixed(0)}`
      : `${(top * row.tflops! / base).toFixed(0)} of ${top.toFixed(0)}`;
  };
  const body = gpus.map(({ name }) => [
    name === here.name ? `${name}, measured` : name,
    ...rows.map((row) => cell(name, row)),
  ]);
  return table(["TFLOP/s at D 128", ...rows.map(title)], body);
}

/** Networks between GPUs, in one direction: within a node, and between nodes. */
const networks = [["NVLink, 450 GB/s", 450], ["InfiniBand, 50 GB/s", 50]] as const;

/** A ring over GPUs: bytes and milliseconds of a step, and from where on sending hides. */
export function ringTable(results: Results): string {
  const alone =
    squareRows(results).filter(({ headDim, causal, peer, kernel }) =>
      headDim === 128 && !causal && !peer && kernel !== "flash"
    ).sort((a, b) => b.tflops! - a.tflops!)[0];
  if (!alone) return "";
  const speed = alone.tflops!;
  const body = [8, 64].flatMap((count) => {
    const ring: Ring = { ...million, gpus: count };
    return networks.filter(([, gbs]) => count === 8 || gbs < 100).flatMap(([network, gbs]) =>
      wires.map((wire) => [
        `${count} GPUs, ${network}, ${wire.name}`,
        (stepBytes(ring, wire) / 1e6).toFixed(0),
        stepWireMs(ring, wire, gbs).toFixed(1),
        stepComputeMs(ring, speed).toFixed(1),
        kilo(Math.ceil(tokensToHide(ring, wire, gbs, speed) / 1024) * 1024),
      ])
    );
  });
  return `${title(alone)} at ${speed.toFixed(0)} TFLOP/s, 1M tokens, 32 heads on 8, D 128, causal:

${
    table(
      ["ring", "MB a step", "ms sending", "ms computing", "hidden from tokens a GPU"],
      body,
    )
  }`;
}
