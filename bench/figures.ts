// The README's figures, from a record: between its two marker comments stands what this program writes there.
import { fromFileUrl, join } from "@std/path";
import type { Results, Row } from "./format.ts";

const root = fromFileUrl(new URL("..", import.meta.url));
const begin = "<!-- figures -->", end = "<!-- /figures -->";

type Select = (row: Row) => boolean;

const lines: [string, Select][] = [
  ["`flash`", (row) => row.kernel === "flash"],
  ["`sage1`", sage1("f32", true)],
  ["`sage1`, FP16 sums", sage1("f16", true)],
  ["`sage1`, kernel alone", sage1("f32", false)],
  ["PyTorch, FlashAttention-2", (row) => row.kernel === "pytorch-fa2"],
  ["PyTorch, cuDNN", (row) => row.kernel === "cudnn"],
];

const columns: [string, Select][] = [128, 64, 256].flatMap((headDim) =>
  [false, true].flatMap((causal) =>
    (headDim === 128 ? [4096, 32768] : [32768]).map((tokens): [string, Select] => [
      `D ${headDim}${causal ? " causal" : ""}, ${tokens / 1024}k`,
      (row) => row.headDim === headDim && row.causal === causal && row.tokens === tokens,
    ])
  )
);

function sage1(accumulator: "f32" | "f16", endToEnd: boolean): Select {
  return (row) =>
    row.kernel === "sage1" && row.accumulator === accumulator && row.endToEnd === endToEnd;
}

function table(head: string[], body: string[][]): string {
  const widths = head.map((_, i) => Math.max(...[head, ...body].map((cells) => cells[i].length)));
  const line = (cells: string[]) =>
    `| ${
      cells.map((cell, i) => i ? cell.padStart(widths[i]) : cell.padEnd(widths[i])).join(" | ")
    } |`;
  const rule = widths.map((width, i) => i ? `${"-".repeat(width - 1)}:` : "-".repeat(width));
  return [line(head), `| ${rule.join(" | ")} |`, ...body.map(line)].join("\n");
}

function speed(results: Results): string {
  const attention = results.rows.filter((row) => row.group === "attention");
  const cell = (line: Select, column: Select) =>
    attention.find((row) => line(row) && column(row))?.tflops?.toFixed(0) ?? "–";
  const body = lines.map((
    [name, line],
  ) => [name, ...columns.map(([, column]) => cell(line, column))])
    .filter((cells) => cells.slice(1).some((text) => text !== "–"));
  return table(["TFLOP/s", ...columns.map(([name]) => name)], body);
}

function accuracy(results: Results): string {
  const files = [...new Set(results.accuracy.map((row) => row.file))];
  const variants = [
    ...new Set(results.accuracy.map((row) => JSON.stringify([row.kernel, row.accumulator]))),
  ];
  const body = variants.map((variant) => {
    const [kernel, accumulator] = JSON.parse(variant);
    const cells = files.map((file) =>
      results.accuracy.find((row) =>
        row.file === file && row.kernel === kernel &&
        (row.accumulator ?? null) === (accumulator ?? null)
      )?.relativeL1.toFixed(4) ?? "–"
    );
    return [`\`${kernel}\`${accumulator === "f16" ? ", FP16 sums" : ""}`, ...cells];
  });
  return table(["relative L1", ...files.map((file) => file.replaceAll("-", " "))], body);
}

const preparations: [string, Select][] = [
  ["queries to INT8 per thread", (row) => row.operand === "query" && !row.smooth],
  ["keys to INT8 per thread, smoothed", (row) => row.operand === "key" && row.smooth === true],
  ["values to FP8 per channel", (row) => row.kernel === "e4m3 channel"],
  ["smoothing alone", (row) => row.group === "smooth" && row.blockRows === undefined],
];

function bandwidth({ rows, copyTbs }: Results): string {
  const at128 = rows.filter(({ group, kernel, headDim }) =>
    headDim === 128 &&
    (group === "smooth" || (group === "quantize" && /thread|channel/.test(kernel)))
  );
  const parts = preparations.flatMap(([name, select]) => {
    const row = at128.find((row) => select(row) && !row.kernel.startsWith("i4"));
    return row ? [`${name} ${row.tbs!.toFixed(2)}`] : [];
  });
  const copy = copyTbs === undefined ? "" : `; a copy reaches ${copyTbs.toFixed(2)}`;
  return `Bytes that must move, in TB/s at D 128: ${parts.join(", ")}${copy}.`;
}

/** The text between the markers. */
export function figures(results: Results): string {
  const { device, driver, date, clocks, source } = results;
  return `Measured on one ${device} (driver ${driver}, SM clock ${clocks.sm.median} MHz of ${clocks.smHighest}) on
${date.slice(0, 10)}, sources \`${
    source.slice(0, 12)
  }\`: from bf16 tensors to the output, 32 heads (16 at
D 256), batch · tokens at most 32k.

${speed(results)}

${bandwidth(results)}

Error against float64 on the same GPU, on the tensors of [tests/data](tests/data):

${accuracy(results)}`;
}

/** The README with the figures in place. */
export function withFigures(readme: string, results: Results): string {
  const from = readme.indexOf(begin), to = readme.indexOf(end);
  if (from < 0 || to < from) throw new Error(`README.md lacks the markers ${begin} and ${end}`);
  return `${readme.slice(0, from + begin.length)}\n\n${figures(results)}\n\n${readme.slice(to)}`;
}

if (import.meta.main) {
  const path = join(root, "README.md");
  const record = join(root, "bench/results/h200.json");
  const results: Results = JSON.parse(await Deno.readTextFile(record));
  await Deno.writeTextFile(path, withFigures(await Deno.readTextFile(path), results));
}
