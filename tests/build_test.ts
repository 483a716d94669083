// build.ts, on a small project of its own: what it makes, when it makes it again, and how it fails; then what it
// made of this one.
import { assert, assertEquals, assertNotEquals, assertStringIncludes } from "@std/assert";
import { fromFileUrl, join } from "@std/path";
import type { Manifest } from "../build.ts";
import { parseDependencies } from "../tools/build/objects.ts";
import { sourceHash } from "../tools/build/sources.ts";
import { findCudaCompiler, findGpus } from "../tools/build/toolchain.ts";

const root = fromFileUrl(new URL("..", import.meta.url));
const cuda = await findCudaCompiler();
const gpus = await findGpus();

const sources: Record<string, string> = {
  "mod.ts": "export const answer: number = 42;\n",
  "cuda/sage.h":
    '#define SAGE_ABI_VERSION 2u\n#define SAGE_API __attribute__((visibility("default")))\n',
  "cuda/exports.map": "{ global: sage_*; local: *; };\n",
  "cuda/cpu/six.h": "int times_six(int);\n",
  // std::deque is declared with default visibility, and must stay inside nevertheless.
  "cuda/cpu/six.cpp": `#include "six.h"
#include <deque>
int times_six(int x) {
  std::deque<int> all;
  for (int i = 0; i < 6; ++i) all.push_back(x);
  int sum = 0;
  for (int one : all) sum += one;
  return sum;
}
`,
  "cuda/api.cpp": `#include "cpu/six.h"
#include "sage.h"
int device();
extern "C" SAGE_API int sage_answer(void) { return times_six(7) + 0 * device(); }
extern "C" SAGE_API const char* sage_text(void) {
  return SAGE_VERSION "|" SAGE_ARCHITECTURES "|" SAGE_SOURCE_HASH;
}
extern "C" SAGE_API int sage_cuda(void) { return SAGE_CUDA_VERSION; }
`,
  "cuda/no_cuda.cpp": "int device();\nint device() { return 1; }\n",
  "cuda/kernels/mean.cu": `int device();
__global__ void scale(float* x) { x[threadIdx.x] *= 2.0f; }
int device() {
  scale<<<1, 1>>>(nullptr);
  return cudaGetLastError() == cudaSuccess;
}
`,
};

interface Outcome {
  code: number;
  text: string;
}

/** A project with the build program, deno.json and a few lines of source; removed at the end of its scope. */
class Project implements AsyncDisposable {
  private constructor(readonly folder: string) {}

  static async create(): Promise<Project> {
    const project = new Project(await Deno.makeTempDir());
    for (const name of ["build.ts", "deno.json", "tools", ".offline"]) {
      if (!await exists(join(root, name))) continue; // .offline, where the registry is there
      const { success } = await new Deno.Command("cp", {
        args: ["-r", join(root, name), project.folder],
      }).output();
      assert(success);
    }
    for (const [path, text] of Object.entries(sources)) await project.write(path, text);
    return project;
  }

  path(...parts: string[]): string {
    return join(this.folder, ...parts);
  }

  async write(path: string, text: string): Promise<void> {
    await Deno.mkdir(join(this.path(path), ".."), { recursive: true });
    await Deno.writeTextFile(this.path(path), text);
  }

  async build(args: string[], env: Record<string, string> = {}): Promise<Outcome> {
    return await execute(Deno.execPath(), ["run", "--allow-all", "build.ts", ...args], {
      cwd: this.folder,
      env,
    });
  }

  library(): Promise<Uint8Array> {
    return Deno.readFile(this.path("dist/libsage.so"));
  }

  async manifest(): Promise<Manifest> {
    return JSON.parse(await Deno.readTextFile(this.path("dist/manifest.json")));
  }

  async files(): Promise<string[]> {
    return (await Array.fromAsync(Deno.readDir(this.path("dist")))).map((entry) => entry.name)
      .sort();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await Deno.remove(this.folder, { recursive: true });
  }
}

async function execute(
  program: string,
  args: string[],
  options: { cwd?: string; env?: Record<string, string> } = {},
): Promise<Outcome> {
  const { code, stdout, stderr } = await new Deno.Command(program, {
    args,
    ...options,
    env: { NO_COLOR: "1", ...options.env },
  }).output();
  const decoder = new TextDecoder();
  return { code, text: decoder.decode(stdout) + decoder.decode(stderr) };
}

async function exists(path: string): Promise<boolean> {
  return await Deno.stat(path).then(() => true, () => false);
}

async function program(path: string, script: string): Promise<void> {
  await Deno.mkdir(join(path, ".."), { recursive: true });
  await Deno.writeTextFile(path, `#!/bin/sh\n${script}\n`, { mode: 0o755 });
}

const cpuOnly = ["--cpu-only", "--bundle", "never"];

/** Compiled sources, as the progress lines name them. */
function compiled(outcome: Outcome): string[] {
  return [...outcome.text.matchAll(/^\[ *\d+\/\d+\] (\S+)/gm)].map((match) => match[1]).sort();
}

async function exported(library: string): Promise<string[]> {
  const { code, text } = await execute("nm", [
    "-D",
    "--defined-only",
    "--format=just-symbols",
    library,
  ]);
  assertEquals(code, 0, text);
  return text.trim().split("\n").sort();
}

async function needed(library: string): Promise<string[]> {
  const { code, text } = await execute("readelf", ["-d", library]);
  assertEquals(code, 0, text);
  return [...text.matchAll(/NEEDED.*\[(.*)\]/g)].map((match) => match[1]);
}

/** Fails, says this and nothing more technical last, and leaves the library of before. */
async function assertRefused(
  project: Project,
  attempt: () => Promise<Outcome>,
  sentence: string,
): Promise<void> {
  const before = await project.library(), files = await project.files();
  const outcome = await attempt();
  assertEquals(outcome.code, 1, outcome.text);
  const last = outcome.text.trimEnd().split("\n").at(-1)!;
  assert(last.startsWith("error: "), outcome.text);
  assertStringIncludes(last, sentence);
  assertEquals(await project.library(), before, "the library changed");
  assertEquals(await project.files(), files, "something was left in dist/");
}

// ---- what it makes -------------------------------------------------------------------------------

Deno.test("build: makes the library and a manifest, and says what it found", async () => {
  await using project = await Project.create();
  const outcome = await project.build(cpuOnly);
  assertEquals(outcome.code, 0, outcome.text);
  assertStringIncludes(outcome.text, "compiler ");
  assertEquals(compiled(outcome), ["cuda/api.cpp", "cuda/cpu/six.cpp", "cuda/no_cuda.cpp"]);
  assertEquals(await project.files(), ["libsage.so", "manifest.json"]);
  assertEquals(await exported(project.path("dist/libsage.so")), [
    "sage_answer",
    "sage_cuda",
    "sage_text",
  ]);

  const manifest = await project.manifest();
  assertEquals(manifest.sourceHash, await sourceHash(project.folder));
  assertEquals([manifest.architectures, manifest.cudaVersion, manifest.bundle], [[], null, null]);
  const library = Deno.dlopen(project.path("dist/libsage.so"), {
    sage_answer: { parameters: [], result: "i32" },
    sage_text: { parameters: [], result: "pointer" },
    sage_cuda: { parameters: [], result: "i32" },
  });
  try {
    assertEquals(library.symbols.sage_answer(), 42);
    assertEquals(library.symbols.sage_cuda(), 0);
    const text = Deno.UnsafePointerView.getCString(library.symbols.sage_text()!);
    assertEquals(text, `${manifest.version}||${manifest.sourceHash}`);
  } finally {
    library.close();
  }
});

Deno.test("build: compiles again only what a change touches", async () => {
  await using project = await Project.create();
  assertEquals((await project.build(cpuOnly)).code, 0);
  const { mtime } = await Deno.stat(project.path("dist/libsage.so"));

  const again = await project.build(cpuOnly);
  assertEquals(compiled(again), []);
  assertEquals((await Deno.stat(project.path("dist/libsage.so"))).mtime, mtime);

  await Deno.utime(project.path("cuda/cpu/six.cpp"), new Date(), new Date());
  assertEquals(compiled(await project.build(cpuOnly)), [], "a new time alone is no change");

  await project.write("cuda/cpu/six.cpp", sources["cuda/cpu/six.cpp"] + "// more\n");
  assertEquals(compiled(await project.build(cpuOnly)), ["cuda/api.cpp", "cuda/cpu/six.cpp"]);

  await project.write("cuda/cpu/six.h", sources["cuda/cpu/six.h"] + "// more\n");
  assertEquals(compiled(await project.build(cpuOnly)), ["cuda/api.cpp", "cuda/cpu/six.cpp"]);

  const debug = await project.build([...cpuOnly, "--debug"]);
  assertEquals(compiled(debug).length, 3);
  assert((await project.manifest()).debug);
  assertEquals(compiled(await project.build(cpuOnly)), [], "both kinds are kept");
  assert(!(await project.manifest()).debug);
  assertEquals(compiled(await project.build([...cpuOnly, "--force"])).length, 3);

  await Deno.remove(project.path("dist/libsage.so"));
  assertEquals(compiled(await project.build(cpuOnly)), []);
  assert(await exists(project.path("dist/libsage.so")));
});

Deno.test({
  name: "build: compiles CUDA, links its runtime statically and leaves no_cuda.cpp out",
  ignore: !cuda,
  async fn() {
    await using project = await Project.create();
    const outcome = await project.build(["--arch", "80", "--bundle", "never"]);
    assertEquals(outcome.code, 0, outcome.text);
    assertEquals(compiled(outcome), ["cuda/api.cpp", "cuda/cpu/six.cpp", "cuda/kernels/mean.cu"]);
    assertEquals((await project.manifest()).architectures, ["80"]);
    const library = project.path("dist/libsage.so");
    assertEquals(await exported(library), ["sage_answer", "sage_cuda", "sage_text"]);
    assertEquals((await needed(library)).filter((name) => /cuda|stdc/.test(name)), []);
    const record = await Deno.readTextFile(
      project.path("build/release/80/cuda/kernels/mean.cu.o.json"),
    );
    assert(JSON.parse(record).command.includes("-fmad=false"), record);
    assertEquals(compiled(await project.build(["--arch=80", "--bundle=never"])), []);
  },
});

Deno.test("parseDependencies() reads make's rules", () => {
  const rule = "six.o: cuda/six.cpp cuda/six.h \\\n /usr/include/a\\ b.h \\\n cuda/six.h\n";
  assertEquals(parseDependencies(rule), ["cuda/six.cpp", "cuda/six.h", "/usr/include/a b.h"]);
});

// ---- how it fails --------------------------------------------------------------------------------

Deno.test("build: refuses arguments it does not know", async (t) => {
  await using project = await Project.create();
  assertEquals((await project.build(cpuOnly)).code, 0);
  const cases: [string[], string][] = [
    [["--fast"], 'Unknown argument "--fast"'],
    [["debug"], 'Unknown argument "debug"'],
    [
      ["--bundle", "sometimes"],
      '--bundle must be always, if-possible or never: current value is "sometimes"',
    ],
    [["--jobs", "0"], '--jobs must be a whole number of at least 1: current value is "0"'],
    [["--jobs", "many"], 'current value is "many"'],
    [["--jobs"], 'current value is ""'],
    [["--cpu-only", "--arch", "80"], "--arch and --cpu-only exclude each other"],
  ];
  const withCuda: [string[], string][] = [
    [
      ["--arch", "hopper"],
      '--arch must be native, all or names such as 80,90a: current value is "hopper"',
    ],
    [["--arch", "80,"], 'current value is ""'],
    [["--arch"], 'current value is ""'],
    [["--arch", "75"], "compute capability 8.0 (Ampere) or later is needed"],
    [["--arch", "80,999"], "Cannot build for 999: nvcc"],
  ];
  for (const [args, sentence] of [...cases, ...cuda ? withCuda : []]) {
    await t.step(args.join(" "), () => assertRefused(project, () => project.build(args), sentence));
  }
  await t.step({
    name: "--arch native without a GPU",
    ignore: !cuda || gpus.length > 0,
    fn: () => assertRefused(project, () => project.build(["--arch", "native"]), "shows no GPU"),
  });
  await t.step({
    name: "--arch all without nvcc",
    ignore: cuda !== undefined,
    fn: () => assertRefused(project, () => project.build(["--arch", "all"]), "no nvcc found"),
  });
});

Deno.test("build: says what a machine lacks", async (t) => {
  await using project = await Project.create();
  assertEquals((await project.build(cpuOnly)).code, 0);
  await Deno.mkdir(project.path("empty"));
  await program(
    project.path("old/bin/nvcc"),
    'echo "Cuda compilation tools, release 11.8, V11.8.89"',
  );
  await program(project.path("broken/bin/nvcc"), "exit 1");
  await program(project.path("odd/c++"), "exit 1");

  const cases: [string, Record<string, string>, string[], string][] = [
    ["no compiler", { PATH: project.path("empty"), CXX: "" }, cpuOnly, "no C++ compiler found"],
    ["no such CXX", { CXX: "no-such-compiler" }, cpuOnly, 'CXX is "no-such-compiler"'],
    ["a CXX that fails", { CXX: project.path("odd/c++") }, cpuOnly, "does not tell its version"],
    [
      "an old nvcc",
      { CUDA_HOME: project.path("old") },
      [],
      "CUDA 12.4 or later is needed, this is 11.8",
    ],
    ["a broken nvcc", { CUDA_HOME: project.path("broken") }, [], "does not tell its version"],
  ];
  for (const [name, env, args, sentence] of cases) {
    await t.step(name, () => assertRefused(project, () => project.build(args, env), sentence));
  }
});

Deno.test("build: shows what does not compile or link, and keeps the library", async (t) => {
  await using project = await Project.create();
  assertEquals((await project.build(cpuOnly)).code, 0);
  const good = sources["cuda/cpu/six.cpp"];
  const cases: [string, string, string, string][] = [
    ["an error", "int oops\n", "Cannot compile cuda/cpu/six.cpp", "error: expected"],
    ["a warning", `${good}static int unused = 0;\n`, "Cannot compile cuda/cpu/six.cpp", "unused"],
    ["an undefined symbol", '#include "six.h"\n', "Cannot link dist/libsage.so", "times_six"],
  ];
  for (const [name, text, sentence, detail] of cases) {
    await t.step(name, async () => {
      await project.write("cuda/cpu/six.cpp", text);
      await assertRefused(project, async () => {
        const outcome = await project.build(cpuOnly);
        assertStringIncludes(outcome.text, detail);
        return outcome;
      }, sentence);
    });
  }
  await project.write("cuda/cpu/six.cpp", good);
  assertEquals((await project.build(cpuOnly)).code, 0);
});

Deno.test("build: the first failure stops the other compilers", async () => {
  await using project = await Project.create();
  await program(
    project.path("slow/c++"),
    `case "$*" in
  *--version*) echo slow 1.0 ;;
  *api.cpp*) exec sleep 60 ;;
  *six.cpp*) echo "six.cpp: broken" >&2; exit 1 ;;
  *) exec c++ "$@" ;;
esac`,
  );
  const began = performance.now();
  const outcome = await project.build([...cpuOnly, "--jobs", "3"], {
    CXX: project.path("slow/c++"),
  });
  assertEquals(outcome.code, 1);
  assertStringIncludes(outcome.text, "six.cpp: broken");
  assertStringIncludes(outcome.text, "Cannot compile cuda/cpu/six.cpp");
  assert(performance.now() - began < 30_000, "it waited for the slow one");
});

Deno.test("build: says that the disk is full where a compiler finds it so", async () => {
  await using project = await Project.create();
  assertEquals((await project.build(cpuOnly)).code, 0);
  await program(
    project.path("full/c++"),
    `case "$*" in
  *--version*) echo full 1.0 ;;
  *) echo "fatal error: error writing to x.s: No space left on device" >&2; exit 1 ;;
esac`,
  );
  await assertRefused(
    project,
    () => project.build(cpuOnly, { CXX: project.path("full/c++") }),
    "no space left on the disk",
  );
});

const unshare = ["--user", "--map-root-user", "--mount"];
const canMount = await execute("unshare", [...unshare, "mount", "-t", "tmpfs", "tmpfs", "/mnt"])
  .then((outcome) => outcome.code === 0, () => false);

Deno.test({
  name: "build: keeps the library where dist/ is a disk that is full",
  ignore: !canMount, // needs a namespace to mount a small disk in
  async fn() {
    await using project = await Project.create();
    const script = `set -e
exec 2>&1
mkdir -p dist
mount -t tmpfs -o size=16m tmpfs dist
"$DENO" run --allow-all build.ts ${cpuOnly.join(" ")}
cksum < dist/libsage.so > before
head -c 32M /dev/zero > dist/filling || true
echo '// more' >> cuda/cpu/six.cpp
! "$DENO" run --allow-all build.ts ${cpuOnly.join(" ")} || exit 9
cksum < dist/libsage.so | cmp - before
ls -A dist`;
    const { code, text } = await execute("unshare", [...unshare, "sh", "-c", script], {
      cwd: project.folder,
      env: { DENO: Deno.execPath() },
    });
    assertEquals(code, 0, text);
    assertStringIncludes(text, "error: Cannot link dist/libsage.so: no space left on the disk");
    assertEquals(text.trimEnd().split("\n").slice(-3), ["filling", "libsage.so", "manifest.json"]);
  },
});

Deno.test("build: without npm the bundle is refused, or left out where that is asked for", async () => {
  await using project = await Project.create();
  const env = {
    NPM_CONFIG_REGISTRY: "http://127.0.0.1:9/",
    DENO_DIR: project.path("cache"),
  };
  const refused = await project.build(["--cpu-only"], env);
  assertEquals(refused.code, 1, refused.text);
  assertStringIncludes(
    refused.text,
    "error: Cannot write dist/sage_attention.js: esbuild cannot be had",
  );
  assertEquals(await project.files(), ["libsage.so", "manifest.json"]);

  const without = await project.build(["--cpu-only", "--bundle", "if-possible"], env);
  assertEquals(without.code, 0, without.text);
  assertStringIncludes(without.text, "bundle      left out (esbuild cannot be had from npm)");
  assertEquals((await project.manifest()).bundle, null);
});

// ---- what it made of this project ----------------------------------------------------------------

const made: Manifest = JSON.parse(await Deno.readTextFile(join(root, "dist/manifest.json")));

Deno.test("dist: the library is of these sources and for what this machine can compile", async () => {
  assertEquals(made.sourceHash, await sourceHash(root));
  const header = await Deno.readTextFile(join(root, "cuda/sage.h"));
  assertStringIncludes(header, `#define SAGE_ABI_VERSION ${made.abiVersion}u`);
  assertEquals(made.architectures.length > 0, cuda !== undefined);
  if (cuda) {
    for (const gpu of gpus) {
      const generation = gpu.replace(/.a?$/, "");
      const fits = made.architectures.some((name) => name.startsWith(generation));
      assert(fits || made.ptx.length > 0, `no code for ${gpu}`);
    }
  }
});

Deno.test("dist: the library exports what the header declares, and nothing else", async () => {
  const header = await Deno.readTextFile(join(root, "cuda/sage.h"));
  const declared = [...header.matchAll(/^SAGE_API \w+ (\w+)\(/gm)].map((match) => match[1]);
  assertNotEquals(declared, []);
  const library = join(root, "dist/libsage.so");
  assertEquals(await exported(library), declared.sort());
  assertEquals((await needed(library)).filter((name) => /cuda/.test(name)), []);
});

Deno.test({
  name: "dist: the bundle is one module with everything that mod.ts exports",
  ignore: made.bundle === null, // esbuild could not be had from npm; the build said so
  async fn() {
    const bundle = join(root, "dist", made.bundle!.file);
    const script = `import * as whole from "${new URL("../mod.ts", import.meta.url)}";
import * as bundle from "file://${bundle}";
console.log(JSON.stringify([Object.keys(whole).sort(), Object.keys(bundle).sort()]));
using device = bundle.Device.open("cpu");
console.log(JSON.stringify(device.kind ?? device.name));`;
    const { code, text } = await execute(Deno.execPath(), [
      "eval",
      "--quiet",
      script,
    ]);
    assertEquals(code, 0, text);
    const [whole, bundled] = JSON.parse(text.split("\n")[0]);
    assertNotEquals(whole, []);
    assertEquals(bundled, whole);
    const imports = (await Deno.readTextFile(bundle)).match(/^\s*import\b[^(].*$/m);
    assertEquals(imports, null);
  },
});
