// The benches, the records and what is said of them: no figure may stand in a page that the records do not hold.
import { assert, assertAlmostEquals, assertEquals, assertStringIncludes } from "@std/assert";
import { fromFileUrl, join } from "@std/path";
import { portableCases, recordCases, variants } from "../bench/cases.ts";
import { compare, comparisonLines } from "../bench/compare.ts";
import { describe, flopOf, type Results, type Row, speedOf } from "../bench/format.ts";
import { ceiling, gpuOf } from "../bench/gpus.ts";
import { fileName } from "../bench/machine.ts";
import { measureTogether, RandomTensors, summarize, Timed } from "../bench/measure.ts";
import {
  fit,
  fitLargest,
  fitMemory,
  fitTime,
  inDomain,
  isModelled,
  predictBytes,
  predictMs,
  type Ring,
  shapeOf,
  stepBytes,
  stepComputeMs,
  stepWireMs,
  tokensToHide,
  wires,
  workOf,
} from "../bench/model.ts";
import { Peers, Skips } from "../bench/peers.ts";
import { preparations } from "../bench/preparation.ts";
import { allPictures, formatted, pages, readRecords } from "../bench/report.ts";
import { digest } from "../bench/report_pictures.ts";
import { deviation, modelled, otherSizes } from "../bench/report_scaling.ts";
import { portableTable, squareRows } from "../bench/report_tables.ts";
import { attentionRows } from "../bench/rows.ts";
import { Device, kernels } from "../mod.ts";
import { deviceTest } from "./devices.ts";

const root = fromFileUrl(new URL("..", import.meta.url));
const records = await readRecords();

async function read(path: string): Promise<string> {
  return await Deno.readTextFile(join(root, path));
}

// ---- pages and pictures --------------------------------------------------------------------------

for (const [path, fill] of pages) {
  Deno.test(`${path} says what the records hold`, async () => {
    const text = await read(path);
    assertEquals(text, await formatted(fill(text, records)), "deno task report writes it anew");
  });

  Deno.test(`${path} would not pass with another figure`, () => {
    const [first, ...others] = records;
    const rows = first.results.rows.map((row) => ({ ...row, ms: 2 * row.ms, tflops: 7, tbs: 7 }));
    const changed = [{ ...first, results: { ...first.results, rows } }, ...others];
    const template = `<!-- figures --><!-- /figures --><!-- records --><!-- /records -->` +
      ["provenance", "model", "lengths", "bytes", "sizes", "memory", "million", "gpus", "ring"]
        .map((marker) => `<!-- ${marker} --><!-- /${marker} -->`).join("");
    assert(fill(template, records) !== fill(template, changed));
  });
}

Deno.test("every picture in docs/ is of the records as they are", async () => {
  const expected = allPictures(records);
  for (const picture of expected) {
    const svg = await read(`docs/pictures/${picture.name}.svg`);
    assert(
      svg.includes(`data-digest="${await digest(picture)}"`),
      `${picture.name} is of other data`,
    );
  }
  const files = await Array.fromAsync(Deno.readDir(join(root, "docs/pictures")));
  assertEquals(
    files.map(({ name }) => name).sort(),
    expected.map(({ name }) => `${name}.svg`).sort(),
  );
});

Deno.test("no speed is quoted outside of what the report writes", async () => {
  for (const path of ["README.md", "docs/benchmarks.md", "docs/scaling.md"]) {
    const written = (await read(path)).replaceAll(/<!-- (\w+) -->[^]*?<!-- \/\1 -->/g, "");
    assertEquals(
      written.match(/\d[\d.,]*\s*(T?FLOP\/s|[TG]B\/s|ms\b|µs\b|×|times as fast)/),
      null,
      path,
    );
  }
});

// ---- records -------------------------------------------------------------------------------------

for (const { name, results } of records) {
  Deno.test(`record ${name}: speeds follow from times, and no row is there twice`, () => {
    for (const row of results.rows) {
      if (row.tflops !== undefined) {
        assertAlmostEquals(
          row.tflops / (flopOf(shapeOf(row)) / row.ms / 1e9),
          1,
          1e-4,
          describe(row),
        );
      } else {
        assertAlmostEquals(row.tbs! / (row.bytes! / row.ms / 1e9), 1, 1e-4, describe(row));
      }
    }
    const described = results.rows.map(describe);
    assertEquals(new Set(described).size, described.length);
    assertEquals(results.tests.failed, 0, results.tests.failures?.join("\n"));
    assert(results.tests.passed > 0);
  });

  Deno.test(`record ${name}: the model is within 10 % of every row that it speaks about`, () => {
    for (const { name, headDim, rows, model } of modelled(results)) {
      for (const row of rows) {
        const off = deviation(model, row);
        assert(Math.abs(off) < 0.1, `${name} D ${headDim}: ${off} at ${describe(row)}`);
      }
    }
    for (const { row, model } of otherSizes(results).filter(({ within }) => within)) {
      const off = deviation(model, row);
      assert(Math.abs(off) < 0.1, `${off} at ${describe(row)}`);
    }
  });

  Deno.test(`record ${name}: workspace follows its model within 10 %`, () => {
    const own = results.rows.filter((row) =>
      row.workspaceBytes && row.group === "attention" && isModelled(row)
    );
    for (
      const kernel of new Set(
        own.map((row) => `${row.kernel} ${row.exp} ${row.accumulator} ${row.dtype}`),
      )
    ) {
      const rows = own.filter((row) =>
        `${row.kernel} ${row.exp} ${row.accumulator} ${row.dtype}` === kernel
      );
      const model = fitMemory(rows);
      for (const row of model ? rows : []) {
        const off = predictBytes(model!, shapeOf(row)) / row.workspaceBytes! - 1;
        assert(Math.abs(off) < 0.1, `${off} at ${describe(row)}`);
      }
    }
  });
}

Deno.test("the shown record is modelled", () => {
  const kernels = new Set(modelled(records[0].results).map(({ rows }) => rows[0].kernel));
  assert(kernels.has("flash") && kernels.has("sage1"), [...kernels].join(" "));
});

// ---- the model -----------------------------------------------------------------------------------

const square = { headDim: 128, causal: false, batch: 1, heads: 132, kvHeads: 132, tokens: 1024 };

Deno.test("workOf() counts tiles and blocks", () => {
  assertEquals(workOf(square, 132), { tiles: 8 * 16, causalTiles: 0, blocks: 8, masked: 0 });
  assertEquals(workOf({ ...square, causal: true }, 132), {
    tiles: 2 + 4 + 6 + 8 + 10 + 12 + 14 + 16,
    causalTiles: 2 + 4 + 6 + 8 + 10 + 12 + 14 + 16,
    blocks: 8,
    masked: 8,
  });
  assertEquals(workOf({ ...square, queries: 1, causal: true }, 132), {
    tiles: 16,
    causalTiles: 16,
    blocks: 1,
    masked: 1,
  });
  const oneMore = { ...square, heads: 133 }; // a second round for the blocks of one head
  assertEquals(workOf(oneMore, 132), { tiles: 9 * 16, causalTiles: 0, blocks: 9, masked: 0 });
  assertEquals(workOf(square, 132, 256), { tiles: 8 * 16, causalTiles: 0, blocks: 8, masked: 0 });
  assert(inDomain(square, 132));
  assert(!inDomain({ ...square, heads: 33 }, 132));
  assert(!inDomain({ ...square, queries: 1 }, 132));
});

Deno.test("fit() finds the numbers, none below 0", () => {
  const row = (a: number, b: number, value: number) => [a / value, b / value];
  const exact = fit([row(1, 2, 8), row(2, 1, 7), row(5, 5, 25)]);
  assertAlmostEquals(exact[0], 2, 1e-9);
  assertAlmostEquals(exact[1], 3, 1e-9);
  assertEquals(fit([row(1, 1, 1), row(2, 1, 3), row(3, 1, 5)])[1], 0);
});

Deno.test("fitLargest() finds the numbers whose largest relative error is least", () => {
  const row = (a: number, value: number) => [a / value];
  // 2x between 1 and 3: errors of 2x/1 - 1 and 2x/3 - 1 are as large where x is 3/4; squares weigh the first more.
  assertAlmostEquals(fitLargest([row(2, 1), row(2, 3)])[0], 0.75, 1e-6);
  assertAlmostEquals(fit([row(2, 1), row(2, 3)])[0], 0.6, 1e-9);
  // However many agree on one of them.
  const many = [row(2, 1), ...Array.from({ length: 9 }, () => row(2, 3))];
  assertAlmostEquals(fitLargest(many)[0], 0.75, 1e-6);
  const exact = fitLargest([row(2, 4), row(3, 6)]);
  assertAlmostEquals(exact[0], 2, 1e-9);
});

Deno.test("fitTime() finds the constants of rows that obey the model", () => {
  const results = { multiprocessors: 132, clocks: { sm: { median: 1000 } } } as Results;
  const model = {
    cyclesPerTile: 2000,
    cyclesPerCausalTile: 200,
    cyclesPerBlock: 10_000,
    cyclesPerMask: 3000,
    launchUs: 5,
    queriesAtOnce: 192,
    multiprocessors: 132,
    clockMHz: 1000,
  };
  const rows = [1024, 2048, 4096, 8192, 16384].flatMap((tokens) =>
    [false, true].map((causal) => {
      const shape = { ...square, tokens, causal };
      return { ...shape, ms: predictMs(model, shape), queriesAtOnce: 192 } as Row;
    })
  );
  const found = fitTime(rows, results)!;
  assertAlmostEquals(found.cyclesPerTile, 2000, 1e-3);
  assertAlmostEquals(found.cyclesPerCausalTile, 200, 1e-3);
  assertAlmostEquals(found.cyclesPerBlock, 10_000, 1);
  assertAlmostEquals(found.cyclesPerMask, 3000, 1);
  assertAlmostEquals(found.launchUs, 5, 1e-2);
  assertEquals(fitTime(rows.slice(0, 2), results), undefined);
});

Deno.test("a ring sends half the bytes in 8 bits, and hides sending from so many tokens on", () => {
  const ring: Ring = { gpus: 8, tokens: 8192, heads: 32, kvHeads: 8, headDim: 128, causal: false };
  const [wide, narrow] = wires;
  assertEquals(stepBytes(ring, wide), 1024 * 8 * 128 * 4);
  assertEquals(stepBytes(ring, narrow), 1024 * 8 * (128 * 2 + 0.25));
  const tokens = tokensToHide(ring, wide, 50, 500);
  const even = { ...ring, tokens: 8 * tokens };
  assertAlmostEquals(stepWireMs(even, wide, 50), stepComputeMs(even, 500), 1e-9);
});

Deno.test("ceilings follow from the datasheet", () => {
  const h200 = gpuOf("NVIDIA H200")!;
  assertEquals(h200.name, "H200");
  assertEquals(gpuOf("NVIDIA H200 NVL"), undefined);
  assertEquals(ceiling(h200, "f16", 128), { tflops: 989, unit: "tensor cores" });
  assertEquals(ceiling(h200, "i8 e4m3", 256), { tflops: 1979, unit: "tensor cores" });
  const narrow = ceiling(h200, "i8 e4m3", 64)!;
  assertEquals(narrow.unit, "exponentials");
  assertAlmostEquals(narrow.tflops, 4 * 64 * 16 * 132 * 1830 / 1e6, 1e-9);
  assertEquals(ceiling(h200, "i8 e4m3", 64, false)!.tflops, 1979);
  assertEquals(ceiling(gpuOf("NVIDIA A100-SXM4-80GB")!, "i8 e4m3", 64), undefined);
});

// ---- the regression guard ------------------------------------------------------------------------

function run(times: Record<string, number>, noise = 0.01): Results {
  const rows = Object.entries(times).map(([kernel, ms]): Row => ({
    group: "attention",
    kernel,
    ...square,
    dtype: "bf16",
    endToEnd: true,
    ms,
    noise,
    tflops: 1,
    peer: kernel === "cudnn",
  }));
  const accuracy = [{ file: "x", kernel: "flash", cosine: 1, relativeL1: 0.001, rmse: 0 }];
  return { rows, accuracy } as unknown as Results;
}

Deno.test("compare() names what moved in relation to its yardstick, and nothing else", () => {
  const stored = run({ flash: 10, sage1: 8, sage2: 5, cudnn: 6 });
  const same = compare(stored, run({ flash: 20, sage1: 16.1, sage2: 9.95, cudnn: 12 }));
  assertEquals([same.moves, same.missing, same.compared], [[], [], 4]);

  const worse = compare(stored, run({ flash: 10, sage1: 8.5, sage2: 4.5, cudnn: 6 }));
  assertEquals(worse.moves.map(({ yardstick }) => yardstick), ["flash", "flash"]);
  assertAlmostEquals(worse.moves[0].change, 0.0625, 1e-9);
  assertStringIncludes(worse.moves[0].what, "sage1");
  assertAlmostEquals(worse.moves[1].change, -0.1, 1e-9);
  const lines = comparisonLines(worse);
  assertStringIncludes(lines[0], "worse  +6.3 %");
  assertEquals(lines.at(-1), "4 compared, 1 worse, 1 better, 0 missing");
});

Deno.test("compare() judges flash by another's kernel, or by its own time", () => {
  const slower = compare(run({ flash: 10, cudnn: 6 }), run({ flash: 11, cudnn: 6 }));
  assertEquals(slower.moves.map(({ yardstick }) => yardstick), ["cudnn"]);
  const alone = compare(run({ flash: 10 }), run({ flash: 11, cudnn: 6 }));
  assertEquals(alone.moves.map(({ yardstick }) => yardstick), ["its own time"]);

  const drifting = { ...run({ flash: 11, cudnn: 6 }), drift: 0.12 };
  assertEquals(compare(run({ flash: 10, cudnn: 6 }), drifting).moves, []);

  // Drift excuses what was not sampled in the same turns, and nothing else.
  const slow = { ...run({ flash: 10, sage1: 8.5, cudnn: 6 }), drift: 0.12 };
  const named = compare(run({ flash: 10, sage1: 8, cudnn: 6 }), slow).moves;
  assertEquals(named.map(({ yardstick }) => yardstick), ["flash"]);
});

Deno.test("compare() does not blame others for a yardstick that moved", () => {
  const stored = run({ flash: 10, sage1: 8, sage2: 5, cudnn: 6 });
  const found = compare(stored, run({ flash: 12, sage1: 8.1, sage2: 6.5, cudnn: 6 }));
  assertEquals(found.moves.map(({ what }) => what.includes("flash")), [true, false]);
  assertEquals(found.moves.map(({ yardstick }) => yardstick), ["cudnn", "flash"]);
});

Deno.test("compare() lets noise explain what it can, and tells what is missing", () => {
  const stored = run({ flash: 10, sage1: 8, sage2: 5 }, 0.05);
  const found = compare(stored, run({ flash: 10, sage1: 8.5 }, 0.05));
  assertEquals(found.moves, []);
  assertEquals(found.missing.length, 1);
  assertStringIncludes(found.missing[0], "sage2");
});

Deno.test("compare() names an error that grew", () => {
  const stored = run({}), fresh = run({});
  fresh.accuracy[0].relativeL1 = 0.0011;
  assertEquals(compare(stored, fresh).moves.map(({ what }) => what), ["accuracy flash x"]);
});

// ---- measuring -----------------------------------------------------------------------------------

Deno.test("summarize() gives the median and how far apart the quartiles are", () => {
  assertEquals(summarize([5, 1, 3, 2, 4]), { ms: 3, noise: 2 / 3 });
  assertEquals(summarize([2]), { ms: 2, noise: 0 });
});

Deno.test("speeds are told in units that suit them", () => {
  assertEquals(speedOf({ tflops: 1234.5 }), "1235 TFLOP/s");
  assertEquals(speedOf({ tflops: 0.1234 }), "123 GFLOP/s");
  assertEquals(speedOf({ tbs: 3.456 }), "3.46 TB/s");
});

Deno.test("records are named after the device", () => {
  assertEquals(fileName("NVIDIA H200", "cuda", 132), "h200");
  assertEquals(fileName("NVIDIA GeForce RTX 4090", "cuda", 128), "rtx-4090");
  assertEquals(fileName("Intel(R) Xeon(R) Processor", "cpu", 2), "cpu-intel-xeon-processor-2");
});

Deno.test("measureTogether() takes samples in turn", async () => {
  using device = Device.open("cpu");
  const order: number[] = [];
  const subjects = [0, 1].map((i) => ({
    timed: new Timed(device, [() => void order.push(i)]),
    stages: false,
  }));
  const found = await measureTogether(subjects, 0);
  assertEquals(found.length, 2);
  const turns = order.filter((i, at) => i !== order[at - 1]).length;
  assert(turns >= 14, `${turns} turns`);
});

deviceTest("a record has every kernel that the device can run", async (device) => {
  const shape = { headDim: 64, causal: true, batch: 1, heads: 2, kvHeads: 1, tokens: 200 };
  const skipped: string[] = [];
  const random = new RandomTensors(device);
  const rows = await attentionRows(
    random,
    { shape, dtype: "f16" },
    0,
    new Skips((line) => skipped.push(line)),
  );
  const whole = rows.filter(({ endToEnd }) => endToEnd);
  assertEquals(new Set(variants.map(({ kernel }) => kernel)), new Set(kernels));
  assertEquals(whole.length + skipped.length, variants.length, skipped.join("\n"));
  assertEquals(whole[0].kernel, "flash");
  for (const row of rows) {
    assert(row.ms > 0 && row.noise! >= 0 && row.tflops! > 0, describe(row));
    assertEquals(row.group, "attention");
  }
  for (const row of whole.filter(({ stages }) => stages)) {
    const alone = rows.find((one) =>
      !one.endToEnd && describe(one) === `${describe(row)} kernel alone`
    );
    assertEquals(alone!.ms, row.stages!.attention);
  }
});

Deno.test("others' kernels that are not installed are skipped with one line", async () => {
  for (const kind of ["cpu", "cuda"] as const) {
    const said: string[] = [];
    await using peers = await Peers.start({ kind } as Device, 1, (line) => said.push(line));
    assert(peers || said.length === 1, said.join("\n"));
    for (const line of said) assert(/^skipped \S+.*: \S/.test(line), line);
  }
});

deviceTest("what comes before attention is counted in bytes", (device) => {
  using x = device.empty([1, 2, 256, 64], { dtype: "f16" });
  const elements = 2 * 256 * 64, all = preparations(x);
  const bytes = (kernel: string, operand: string) =>
    all.find(({ labels }) => labels.kernel === kernel && labels.operand === operand)!.bytes;
  assertEquals(bytes("i8 token", "query"), 2 * elements + elements + 4 * 2 * 256);
  assertEquals(bytes("e4m3 channel", "value"), 4 * elements + elements + 4 * 2 * 64);
});

Deno.test("a record of a GPU covers every length, head dimension and mask, grouped queries and decoding", () => {
  const shapes = recordCases({ kind: "cuda" } as Device, false).map(({ shape }) => shape);
  for (const headDim of [64, 128, 256]) {
    for (const causal of [false, true]) {
      for (const tokens of [1024, 2048, 4096, 8192, 16384, 32768]) {
        assert(
          shapes.some((one) =>
            one.headDim === headDim && one.causal === causal && one.tokens === tokens
          ),
        );
      }
    }
  }
  assert(shapes.some(({ heads, kvHeads, queries }) => kvHeads < heads && queries === undefined));
  assert(shapes.filter(({ queries }) => queries === 1).length >= 3);
});

Deno.test("kernels of older GPUs are measured on newer ones, and kept apart", () => {
  const gpu = (computeCapability: string) =>
    portableCases({ kind: "cuda", info: { computeCapability } } as unknown as Device);
  assertEquals(gpu("8.0").concat(portableCases({ kind: "cpu" } as Device)), []);
  assertEquals(
    gpu("9.0").map(({ shape: { headDim, causal, tokens } }) => [headDim, causal, tokens]),
    [[128, false, 4096], [128, false, 16384], [128, true, 4096], [128, true, 16384]],
  );
  const results = run({ flash: 10, "pytorch-fa2": 20 });
  results.rows[1].peer = true;
  const [own] = results.rows;
  const older: Row = { ...own, group: "portable", architecture: 80, tflops: 7, ms: 15 };
  results.rows.push(older);
  assertEquals(squareRows(results).length, 2);
  assert(describe(older) !== describe(own));
  const lines = portableTable(results).split("\n");
  assertEquals(lines.length, 4);
  assertStringIncludes(lines[2], "`flash`, as on sm_80");
  assertStringIncludes(lines[3], "FlashAttention-2");
  assertEquals(compare(results, results).moves, []);
});
