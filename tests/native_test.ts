// The C ABI without Deno: a C program that uses all of it, and a fuzzer under the sanitizers.
import { assert, assertEquals, assertStringIncludes } from "@std/assert";
import { fromFileUrl, join } from "@std/path";
import { makeObjects, type Unit } from "../tools/build/objects.ts";
import { translationUnits } from "../tools/build/sources.ts";
import { findHostCompiler } from "../tools/build/toolchain.ts";

const root = fromFileUrl(new URL("..", import.meta.url)).replace(/\/$/, "");
const fuzzSeconds = Number(Deno.env.get("SAGE_FUZZ_SECONDS") ?? 20);
const fuzzSeed = Deno.env.get("SAGE_FUZZ_SEED") ?? "1";

async function execute(
  program: string,
  args: string[],
  env: Record<string, string> = {},
): Promise<{ code: number; signal: Deno.Signal | null; text: string }> {
  const { code, signal, stdout, stderr } = await new Deno.Command(program, {
    args,
    cwd: root,
    env,
    stdin: "null",
  }).output();
  const decoder = new TextDecoder();
  return { code, signal, text: decoder.decode(stdout) + decoder.decode(stderr) };
}

Deno.test("a C11 program compiles without a warning, links and runs", async () => {
  const folder = await Deno.makeTempDir();
  const program = join(folder, "abi");
  try {
    const compiled = await execute(Deno.env.get("CC") ?? "cc", [
      "-std=c11",
      "-Wall",
      "-Wextra",
      "-Wpedantic",
      "-Werror",
      "-Icuda",
      "tests/abi.c",
      "-Ldist",
      "-lsage",
      "-lm",
      `-Wl,-rpath,${join(root, "dist")}`,
      "-o",
      program,
    ]);
    assertEquals(compiled.code, 0, compiled.text);
    const { code, signal, text } = await execute(program, []);
    assertEquals([code, signal], [0, null], text);
    assertStringIncludes(text, " checks, 0 failed");
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
});

/** Builds a C++ program of the tests and the library's sources, with sanitizers; returns its path. */
async function makeProgram(name: string): Promise<string> {
  const compiler = await findHostCompiler();
  const sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"];
  const flags = ["-std=c++17", "-O1", "-g", "-fno-omit-frame-pointer", "-pthread", "-Icuda"];
  const warnings = ["-Wall", "-Wextra", "-Werror", "-ffp-contract=off"];
  const sources = [`tests/${name}.cpp`, ...await translationUnits(root, false)];
  const units: Unit[] = sources.map((source) => ({
    source,
    object: `build/fuzz/${source}.o`,
    compiler: compiler.version,
    command: [compiler.path, ...flags, ...warnings, ...sanitizers],
  }));
  await makeObjects(root, units, { jobs: navigator.hardwareConcurrency, force: false });
  const program = join(root, `build/fuzz/${name}`);
  const linked = await execute(compiler.path, [
    ...sanitizers,
    "-pthread",
    ...units.map((unit) => unit.object),
    "-o",
    program,
  ]);
  assertEquals(linked.code, 0, linked.text);
  return program;
}

Deno.test("plans of GPUs that are not there are those of their tensor cores", async () => {
  const { code, signal, text } = await execute(await makeProgram("plans"), []);
  assertEquals([code, signal], [0, null], text);
  assertStringIncludes(text, " checks, 0 failed");
});

Deno.test(`${fuzzSeconds} s of random calls neither crash, leak nor break a rule of the language`, async () => {
  const program = await makeProgram("fuzz");
  const { code, signal, text } = await execute(program, [String(fuzzSeconds), fuzzSeed], {
    ASAN_OPTIONS: "allocator_may_return_null=1",
    UBSAN_OPTIONS: "print_stacktrace=1",
  });
  console.log(text.trimEnd());
  assertEquals([code, signal], [0, null], text.slice(-10_000));
  assert(text.trimEnd().endsWith("the library still works"), text.slice(-10_000));
});
