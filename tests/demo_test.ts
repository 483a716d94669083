// The demo: its reference, its picture, and the program as a user starts it.
import { assert, assertAlmostEquals, assertEquals, assertStringIncludes } from "@std/assert";
import { join } from "@std/path";
import { picture } from "../examples/demo/picture.ts";
import { reference } from "../examples/demo/reference.ts";
import { Device, kernels } from "../mod.ts";

import { runExample } from "./programs.ts";

Deno.test("reference() is attention, worked out by hand", () => {
  const sizes = { batch: 1, heads: 2, kvHeads: 1, queries: 2, keys: 3, headDim: 1, causal: false };
  const ln2 = Math.log(2);
  // Scores of query 0 are 0; of query ln2, the keys times ln2, so weights 1 : 2 : 4.
  const full = reference([0, ln2, ln2, 0], [0, 1, 2], [7, 14, 21], sizes);
  const weighted = (7 + 2 * 14 + 4 * 21) / 7;
  [14, weighted, weighted, 14].forEach((value, i) => assertAlmostEquals(full[i], value, 1e-12));

  // Bottom right: of two queries on three keys the first sees two, the last three.
  const causal = reference([0, 0, ln2, 0], [0, 1, 2], [7, 14, 21], { ...sizes, causal: true });
  [10.5, 14, (7 + 28) / 3, 14].forEach((value, i) => assertAlmostEquals(causal[i], value, 1e-12));
});

Deno.test("reference() gives rows without keys zeros, and heads their own keys", () => {
  const sizes = { batch: 1, heads: 2, kvHeads: 2, queries: 2, keys: 1, headDim: 1, causal: true };
  assertEquals([...reference([1, 1, 1, 1], [1, 1], [3, 5], sizes)], [0, 3, 0, 5]);
});

Deno.test("picture() draws and names every mark, within its frame", () => {
  const three = ["flash", "sage1", "sage2"] as const;
  const panel = (title: string) => ({
    title,
    marks: three.flatMap((kernel, i) => [
      { kernel, device: "cpu", milliseconds: 20 + i, relativeL1: 0.01 * (i + 1) },
      { kernel, device: "cuda", milliseconds: 0.2 + i, relativeL1: 0.01 * (i + 1) },
    ]),
  });
  const svg = picture([panel("one & two"), panel("three")], [["cpu", "a <fast> one"], [
    "cuda",
    "b",
  ]]);
  assertEquals(svg.match(/class="label\b/g)?.length, 12);
  assertEquals(svg.match(/<circle/g)?.length, 6 + 1);
  assertStringIncludes(svg, "one &amp; two");
  assertStringIncludes(svg, "a &lt;fast>");
  assert(!/NaN|undefined|Infinity/.test(svg), svg);
  for (const [, x, y] of svg.matchAll(/<circle cx="([\d.-]+)" cy="([\d.-]+)"/g)) {
    assert(Number(x) > 0 && Number(x) < 1000 && Number(y) > 0 && Number(y) < 300, `${x} ${y}`);
  }
});

Deno.test("demo: runs every kernel on every device, within bounds, and draws", async () => {
  const folder = await Deno.makeTempDir();
  try {
    const { code, text, errors } = await runExample(
      "demo",
      [
        "--allow-ffi=dist",
        "--allow-env=DENO_SAGE_PATH",
        "--allow-read=.",
        `--allow-write=${folder}`,
      ],
      [join(folder, "demo.svg")],
    );
    assertEquals(code, 0, text + errors);
    const devices = Device.list().slice(0, 2).map((info) => info.device);
    const measured = [...text.matchAll(
      /^(cpu|cuda:0) +(\S+) +([\d.]+) ms +([\d.]+) +([\d.]+) +([\d.e+-]+) +([\d.]+ [kM]B)$/gm,
    )];
    const refused = [...text.matchAll(/^(cpu|cuda:0) +(\S+) +not on this device$/gm)];
    assertEquals(measured.length + refused.length, 4 * devices.length * kernels.length, text);
    assert(refused.every(([, device]) => device !== "cpu"), text);
    const bounds: Record<string, number> = { flash: 0.001, "sage1-int8": 0.2, "sage2-int4": 0.3 };
    for (const [line, device, kernel, , cosine, relativeL1] of measured) {
      assert(devices.includes(device) && kernels.some((one) => one === kernel), line);
      assert(Number(relativeL1) <= (bounds[kernel] ?? 0.1), line);
      assert(Number(cosine) >= 1 - (bounds[kernel] ?? 0.1), line);
    }
    assertStringIncludes(await Deno.readTextFile(join(folder, "demo.svg")), "</svg>");
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
});
