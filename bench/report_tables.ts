// Tables of a record in Markdown: what the README and docs/benchmarks.md show.
import { type Accuracy, type Named, nameOf, type Results, type Row } from "./format.ts";

// ---- Markdown ------------------------------------------------------------------------------------

/** A table; the first column reads from the left, numbers from the right. */
export function table(head: string[], body: string[][]): string {
  if (body.some((cells) => cells.length !== head.length)) {
    throw new Error(`Cells do not fit ${head}`);
  }
  const line = (cells: string[]) => `| ${cells.join(" | ")} |`;
  const rule = head.map((_, i) => i ? "---:" : "---");
  return [line(head), line(rule), ...body.map(line)].join("\n");
}

/** Text with what stands between two marker comments put in place. */
export function between(text: string, marker: string, content: string, file: string): string {
  const begin = `<!-- ${marker} -->`, end = `<!-- /${marker} -->`;
  const from = text.indexOf(begin), to = text.indexOf(end);
  if (from < 0 || to < from) throw new Error(`${file} lacks the markers ${begin} and ${end}`);
  return `${text.slice(0, from + begin.length)}\n\n${content}\n\n${text.slice(to)}`;
}

/** 4096 as 4k. */
export function kilo(tokens: number): string {
  return tokens % 1024 ? String(tokens) : `${tokens / 1024}k`;
}

/** Values in the order in which they first come. */
export function distinct<T>(values: readonly T[]): T[] {
  return [...new Set(values)];
}

// ---- names ---------------------------------------------------------------------------------------

const peerNames: Record<string, string> = {
  "pytorch-fa2": "PyTorch, FlashAttention-2",
  cudnn: "PyTorch, cuDNN",
  fa3: "FlashAttention-3",
  "fa3-fp8": "FlashAttention-3, FP8",
  sageattention: "SageAttention (official)",
  onnxruntime: "onnxruntime",
};

/** "`sage1`, FP16 sums", "`sage2`, fast exponential, kernel alone", "PyTorch, cuDNN" */
export function title(row: Named & Partial<Pick<Row, "endToEnd" | "architecture">>): string {
  const parts = [
    peerNames[row.kernel] ?? `\`${row.kernel}\``,
    row.accumulator === "f16" ? "FP16 sums" : undefined,
    row.exp === "fast" ? "fast exponential" : undefined,
    row.smoothQ ? "smoothed Q" : undefined,
    row.band ? "precision band" : undefined,
    row.architecture === undefined ? undefined : `as on sm_${row.architecture}`,
    row.endToEnd ?? true ? undefined : "kernel alone",
  ];
  return parts.filter((part) => part !== undefined).join(", ");
}

/** What tells one kernel's rows from another's. */
export function seriesOf(row: Row): string {
  const older = row.architecture === undefined ? "" : ` as on ${row.architecture}`;
  return `${nameOf(row)}${older}${row.endToEnd ? "" : " alone"}`;
}

// ---- speed ---------------------------------------------------------------------------------------

/** The rows of one kernel against length: as many key-value heads as heads, a batch as in the other rows. */
export function squareRows({ rows }: Results): Row[] {
  const square = rows.filter((row) =>
    row.group === "attention" && row.queries === undefined && row.heads === row.kvHeads &&
    row.dtype === square0(rows)?.dtype
  );
  return square.filter((row) => {
    const others = square.filter((one) =>
      one.headDim === row.headDim && one.causal === row.causal && one.tokens === row.tokens
    );
    return sizeOf(row) === sizeOf(others[0]);
  });
}

function square0(rows: readonly Row[]): Row | undefined {
  return rows.find(({ group }) => group === "attention");
}

function sizeOf({ batch, heads }: Row): string {
  return `${batch} ${heads}`;
}

type Column = [name: string, select: (row: Row) => boolean];

function speedTable(rows: readonly Row[], columns: readonly Column[], unit: string): string {
  const factor = unit === "GFLOP/s" ? 1000 : 1;
  const body = distinct(rows.map(seriesOf)).map((series) => {
    const own = rows.filter((row) => seriesOf(row) === series);
    const cells = columns.map(([, select]) => {
      const row = own.find(select);
      return row ? (factor * row.tflops!).toFixed(0) : "–";
    });
    return { peer: own[0].peer, cells: [title(own[0]), ...cells] };
  }).filter(({ cells }) => cells.slice(1).some((text) => text !== "–"));
  const ordered = [...body.filter(({ peer }) => !peer), ...body.filter(({ peer }) => peer)];
  return table([unit, ...columns.map(([name]) => name)], ordered.map(({ cells }) => cells));
}

function unitOf(rows: readonly Row[]): string {
  return Math.max(...rows.map(({ tflops }) => tflops ?? 0)) < 10 ? "GFLOP/s" : "TFLOP/s";
}

/** Speed at some head dimension and mask against length. */
export function lengthTable(results: Results, headDim: number, causal: boolean): string {
  const rows = squareRows(results).filter((row) =>
    row.headDim === headDim && row.causal === causal
  );
  const columns = distinct(rows.map(({ tokens }) => tokens))
    .map((tokens): Column => [kilo(tokens), (row) => row.tokens === tokens]);
  return speedTable(rows, columns, unitOf(rows));
}

/** The README's: the kernels of most use, two lengths at D 128, the longest elsewhere. */
function shortTable(results: Results): string {
  const shown = ({ kernel, peer, accumulator, smoothQ }: Row) =>
    peer || ["flash", "sage1", "sage2"].includes(kernel) && accumulator !== "f16" && !smoothQ;
  const rows = squareRows(results).filter((row) =>
    shown(row) && (row.endToEnd || row.kernel !== "sage1")
  );
  const longest = Math.max(...rows.map(({ tokens }) => tokens));
  const columns = [128, 64, 256].flatMap((headDim) =>
    [false, true].flatMap((causal) =>
      (headDim === 128 ? [4096, longest] : [longest]).map((tokens): Column => [
        `D ${headDim}${causal ? " causal" : ""}, ${kilo(tokens)}`,
        (row) => row.headDim === headDim && row.causal === causal && row.tokens === tokens,
      ])
    )
  );
  return speedTable(rows, columns, "TFLOP/s");
}

/** The kernels of older GPUs on this one, beside what others wrote for those. */
export function portableTable({ rows }: Results): string {
  const portable = rows.filter(({ group }) => group === "portable");
  if (!portable.length) return "";
  const shapeOf = ({ headDim, causal, batch, heads, kvHeads, tokens, dtype }: Row) =>
    [headDim, causal, batch, heads, kvHeads, tokens, dtype].join(" ");
  const shapes = distinct(portable.map(shapeOf));
  const beside = rows.filter((row) =>
    row.group === "attention" && row.kernel === "pytorch-fa2" && shapes.includes(shapeOf(row))
  );
  const columns = shapes.map((shape): Column => {
    const { headDim, causal, tokens } = portable.find((row) => shapeOf(row) === shape)!;
    return [
      `D ${headDim}${causal ? " causal" : ""}, ${kilo(tokens)}`,
      (row) => shapeOf(row) === shape,
    ];
  });
  return speedTable([...portable, ...beside], columns, unitOf(portable));
}

/** How much faster than the same work without a mask every kernel is. */
export function maskTable({ masks = [] }: Results): string {
  if (!masks.length) return "";
  const cases = distinct(masks.map(({ what }) => what));
  const against = (what: string) => masks.find((row) => row.what === what)!.against;
  const body = distinct(masks.map(nameOf)).map((name) => [
    title(masks.find((row) => nameOf(row) === name)!),
    ...cases.map((what) => {
      const row = masks.find((one) => nameOf(one) === name && one.what === what);
      return row ? (row.plainMs / row.ms).toFixed(2) : "–";
    }),
  ]);
  return table([
    "speed over that without",
    ...cases.map((what) => `${what}, over ${against(what)}`),
  ], body);
}

/** How long one small call takes. */
export function latencyTable({ latency = [] }: Results): string {
  if (!latency.length) return "";
  const [{ heads, tokens, headDim }] = latency;
  return table(
    [`${heads} heads, ${tokens} tokens, D ${headDim}`, "µs from launch to result"],
    latency.map((row) => [title(row), (1e3 * row.ms).toFixed(1)]),
  );
}

/** Rows of other shapes, one a line: grouped queries, batches, heads. */
export function otherShapes(results: Results): string {
  const square = new Set(squareRows(results));
  const rows = results.rows.filter((row) => row.group === "attention" && !square.has(row));
  if (!rows.length) return "";
  const unit = unitOf(rows);
  const name = (row: Row) =>
    `D ${row.headDim}${row.causal ? " causal" : ""}, ${row.batch} × ${row.heads}${
      row.kvHeads === row.heads ? "" : ` on ${row.kvHeads}`
    } heads, ${kilo(row.tokens)}, ${row.dtype}`;
  const series = distinct(rows.filter(({ endToEnd }) => endToEnd).map(seriesOf));
  const first = (one: string) => rows.find((row) => seriesOf(row) === one)!;
  const body = distinct(rows.map(name)).map((shape) => [
    shape,
    ...series.map((one) => {
      const row = rows.find((row) => name(row) === shape && seriesOf(row) === one);
      return row ? ((unit === "GFLOP/s" ? 1000 : 1) * row.tflops!).toFixed(0) : "–";
    }),
  ]);
  return table([unit, ...series.map((one) => title(first(one)))], body);
}

/** One new token against a cache: microseconds, and bytes of keys and values a second. */
export function decodeTable({ rows }: Results): string {
  const decode = rows.filter((row) => row.group === "decode" && row.endToEnd);
  if (!decode.length) return "";
  const name = (row: Row) =>
    `batch ${row.batch}, ${row.heads} heads on ${row.kvHeads}, D ${row.headDim}, ${
      kilo(row.tokens)
    }`;
  const series = distinct(decode.map(seriesOf));
  const cell = (row: Row | undefined) =>
    row ? `${(1000 * row.ms).toFixed(0)} µs${row.tbs ? ` (${row.tbs.toFixed(2)})` : ""}` : "–";
  const body = distinct(decode.map(name)).map((shape) => [
    shape,
    ...series.map((one) =>
      cell(decode.find((row) => name(row) === shape && seriesOf(row) === one))
    ),
  ]);
  const heads = series.map((one) => title(decode.find((row) => seriesOf(row) === one)!));
  return table(["one token (TB/s of keys and values)", ...heads], body);
}

// ---- accuracy and preparation --------------------------------------------------------------------

/** Relative L1 on the tensors of tests/data/. */
export function accuracyTable({ accuracy }: Results): string {
  const files = distinct(accuracy.map(({ file }) => file));
  const name = (row: Accuracy) => title({ ...row, endToEnd: true });
  const body = distinct(accuracy.map(name)).map((kernel) => [
    kernel,
    ...files.map((file) =>
      accuracy.find((row) => row.file === file && name(row) === kernel)?.relativeL1.toFixed(4) ??
        "–"
    ),
  ]);
  return table(["relative L1", ...files.map((file) => file.replaceAll("-", " "))], body);
}

function perSecond(tbs: number): string {
  return tbs < 0.1 ? `${(1000 * tbs).toFixed(1)} GB/s` : `${tbs.toFixed(2)} TB/s`;
}

/** Every way to quantize and to smooth. */
export function preparationTable({ rows }: Results): string {
  const prepared = rows.filter(({ group }) => group === "quantize" || group === "smooth");
  const name = ({ group, kernel, operand, smooth, blockRows }: Row) =>
    group === "smooth"
      ? `smoothing alone, mean of ${blockRows ?? "all"} rows`
      : `${operand} to ${kernel}${smooth ? ", smoothed" : ""}`;
  const dims = distinct(prepared.map(({ headDim }) => headDim));
  const body = distinct(prepared.map(name)).map((what) => [
    what,
    ...dims.map((headDim) => {
      const row = prepared.find((row) => row.headDim === headDim && name(row) === what);
      return row ? perSecond(row.tbs!) : "–";
    }),
  ]);
  return table(["bytes that must move", ...dims.map((dim) => `D ${dim}`)], body);
}

const named: [string, (row: Row) => boolean][] = [
  ["queries to INT8 per thread", (row) => row.operand === "query" && !row.smooth],
  ["keys to INT8 per thread, smoothed", (row) => row.operand === "key" && row.smooth === true],
  ["values to FP8 per channel", (row) => row.kernel === "e4m3 channel"],
  ["smoothing alone", (row) => row.group === "smooth" && row.blockRows === undefined],
];

function bandwidth({ rows, copyTbs }: Results): string {
  const at128 = rows.filter(({ group, kernel, headDim }) =>
    headDim === 128 && !kernel.startsWith("i4") &&
    (group === "smooth" || (group === "quantize" && /thread|channel/.test(kernel)))
  );
  const parts = named.flatMap(([name, select]) => {
    const row = at128.find(select);
    return row ? [`${name} ${row.tbs!.toFixed(2)}`] : [];
  });
  const copy = copyTbs === undefined ? "" : `; a copy reaches ${copyTbs.toFixed(2)}`;
  return `Bytes that must move, in TB/s at D 128: ${parts.join(", ")}${copy}.`;
}

// ---- the whole -----------------------------------------------------------------------------------

/** Where and when a record was measured, and beside which programs. */
export function provenance(results: Results): string {
  const others = Object.entries(results.peers ?? {}).map(([name, version]) => `${name} ${version}`);
  return machineAndDate(results) + (others.length ? `, beside ${others.join(" and ")}` : "");
}

/** How the suite went in the same run. */
export function suiteLine({ tests: { passed, failed, skipped, failures = [] } }: Results): string {
  const names = failures.map((name) => `"${name}"`).join(", ");
  return `The suite on that machine: ${passed} passed, ${failed} failed, ${skipped} skipped${
    names ? `; failed: ${names}` : ""
  }.`;
}

function machineAndDate(results: Results): string {
  const { device, features, multiprocessors, driver, date, clocks, power, source } = results;
  const machine = [
    driver ? `driver ${driver}` : undefined,
    driver ? undefined : features,
    driver ? undefined : multiprocessors ? `${multiprocessors} threads` : undefined,
    clocks ? `SM clock ${clocks.sm.median} MHz of ${clocks.smHighest}` : undefined,
    power ? `${power.medianW.toFixed(0)} W of ${power.limitW}` : undefined,
  ].filter((part) => part !== undefined).join(", ");
  return `Measured on one ${device} (${machine}) on ${date.slice(0, 10)}, sources \`${
    source.slice(0, 12)
  }\``;
}

/** The README's figures. */
export function readmeFigures(results: Results): string {
  return `${
    machineAndDate(results)
  }: from bf16 tensors to the output, 32 heads (16 at D 256), batch · tokens at most 32k.

${shortTable(results)}

${bandwidth(results)}

Error against float64 on the same GPU, on the tensors of [tests/data](tests/data):

${accuracyTable(results)}`;
}
