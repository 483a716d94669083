// The counting of test runs: nothing that goes wrong may end as "0 failed".
import { assertEquals } from "@std/assert";
import { join } from "@std/path";
import { closingLine, type Counts, parseClosingLine, runSuite } from "../tools/suite.ts";

async function countsOf(files: Record<string, string>): Promise<Counts> {
  const folder = await Deno.makeTempDir();
  try {
    await Deno.writeTextFile(join(folder, "deno.json"), "{}");
    for (const [name, text] of Object.entries(files)) {
      await Deno.writeTextFile(join(folder, name), text);
    }
    const { passed, failed, skipped } = await runSuite(folder, [], { quiet: true });
    return { passed, failed, skipped };
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
}

const good = `Deno.test("good", () => {});`;
const cases: [string, string, Counts][] = [
  ["tests that pass", `${good} Deno.test("too", () => {});`, { passed: 2, failed: 0, skipped: 0 }],
  [
    "tests that fail or are ignored",
    `${good} Deno.test("bad", () => { throw new Error("on purpose"); });
     Deno.test.ignore("later", () => {});`,
    { passed: 1, failed: 1, skipped: 1 },
  ],
  [
    "steps",
    `Deno.test("whole", async (t) => { await t.step("one", () => {}); await t.step("two", () => {}); });`,
    { passed: 3, failed: 0, skipped: 0 },
  ],
  ["a file that does not compile", `const x: number = "one"; ${good}`, {
    passed: 0,
    failed: 1,
    skipped: 0,
  }],
  ["a file that throws", `${good} throw new Error("on purpose");`, {
    passed: 0,
    failed: 1,
    skipped: 0,
  }],
  ["a process that dies", `Deno.test("dies", () => Deno.kill(Deno.pid, "SIGKILL"));`, {
    passed: 0,
    failed: 1,
    skipped: 0,
  }],
  ["no tests at all", "export {};", { passed: 0, failed: 1, skipped: 0 }],
];

for (const [name, text, counts] of cases) {
  Deno.test(`runSuite() counts ${name}`, async () => {
    assertEquals(await countsOf({ "some_test.ts": text }), counts);
  });
}

Deno.test("closing lines are written and read", () => {
  for (
    const counts of [{ passed: 12, failed: 0, skipped: 0 }, { passed: 1, failed: 2, skipped: 3 }]
  ) {
    assertEquals(parseClosingLine(closingLine(counts)), counts);
  }
  assertEquals(closingLine({ passed: 12, failed: 0, skipped: 0 }), "12 passed, 0 failed");
  assertEquals(closingLine({ passed: 1, failed: 2, skipped: 3 }), "1 passed, 2 failed, 3 skipped");
  assertEquals(parseClosingLine("ok | 12 passed | 0 failed (3s)"), undefined);
});

Deno.test("runSuite() counts files that run side by side", async () => {
  const folder = await Deno.makeTempDir();
  try {
    await Deno.writeTextFile(join(folder, "deno.json"), "{}");
    await Deno.mkdir(join(folder, "tests"));
    const bad = `Deno.test("bad", () => { throw new Error("on purpose"); });`;
    for (const [i, text] of [good, bad, good + good.replace("good", "too"), "throw 1;"].entries()) {
      await Deno.writeTextFile(join(folder, `tests/${i}_test.ts`), text);
    }
    assertEquals(await runSuite(folder, ["tests/"], { quiet: true, jobs: 2 }), {
      passed: 3,
      failed: 2,
      skipped: 0,
      failures: ["bad"],
    });
    assertEquals(await runSuite(folder, ["--filter=none", "tests/"], { quiet: true, jobs: 3 }), {
      passed: 0,
      failed: 1,
      skipped: 4,
    });
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
});
