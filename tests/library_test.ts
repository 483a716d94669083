// Finding and loading the native library: each way it can be missing, wrong, forbidden or without a driver.
import { assert, assertEquals, assertStringIncludes } from "@std/assert";
import { buildInfo, Device } from "../mod.ts";
import { libraryPath } from "./devices.ts";

const moduleUrl = new URL("../mod.ts", import.meta.url).href;
const config = decodeURIComponent(new URL("../deno.json", import.meta.url).pathname);
const { abiVersion, cudaVersion } = buildInfo(), hasCuda = cudaVersion !== "";
const hasGpu = Device.list().length > 1;

interface Outcome {
  code: number;
  out: string;
  err: string;
}

async function runCommand(command: Deno.Command): Promise<Outcome> {
  const { code, stdout, stderr } = await command.output();
  const decoder = new TextDecoder();
  return { code, out: decoder.decode(stdout), err: decoder.decode(stderr) };
}

/** Runs a script that imports everything as `sage`, with these permissions and nothing of this environment else. */
async function runScript(
  body: string,
  flags: readonly string[],
  env: Record<string, string> = {},
): Promise<Outcome> {
  const folder = await Deno.makeTempDir();
  try {
    const file = `${folder}/script.ts`;
    await Deno.writeTextFile(
      file,
      `import * as sage from ${JSON.stringify(moduleUrl)};\n${body}\n`,
    );
    return await runCommand(
      new Deno.Command(Deno.execPath(), {
        args: ["run", "--quiet", "--no-prompt", "--config", config, "--no-check", ...flags, file],
        env: { NO_COLOR: "1", DENO_SAGE_PATH: libraryPath, ...env },
      }),
    );
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
}

/** Prints the class, the code and the message of what a call throws. */
const report = (call: string) => `
try {
  ${call};
  console.log("no error");
} catch (error) {
  console.log(error.constructor.name, error.code, error.message);
}`;

const everyCall = ["sage.Device.open()", "sage.Device.list()", "sage.buildInfo()"];
const smallAttention = `
using device = sage.Device.open("cpu");
using q = device.tensor(new Float32Array([1, 2]), [1, 1, 2, 1]);
using v = device.tensor(new Float32Array([10, 20]), [1, 1, 2, 1]);
using o = sage.flashAttention(q, q, v, { causal: true });
console.log((await o.data())[0]);`;

/** Compiles C to a shared object in a folder of its own. */
async function compile(folder: string, name: string, source: string): Promise<string> {
  const input = `${folder}/${name}.c`, output = `${folder}/${name}`;
  await Deno.writeTextFile(input, source);
  const { code, err } = await runCommand(
    new Deno.Command(Deno.env.get("CC") ?? "cc", {
      args: ["-shared", "-fPIC", "-O1", "-o", output, input],
    }),
  );
  assertEquals(code, 0, err);
  return output;
}

async function inFolder(body: (folder: string) => Promise<void>): Promise<void> {
  const folder = await Deno.makeTempDir();
  try {
    await body(folder);
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
}

// ---- files --------------------------------------------------------------------------------------------

/** Every call must refuse the library alike, and with the same words the second time. */
async function refusesLibrary(path: string, says: readonly string[]): Promise<void> {
  const body = [...everyCall, ...everyCall].map(report).join("\n");
  const { code, out, err } = await runScript(body, ["-A"], { DENO_SAGE_PATH: path });
  assertEquals(code, 0, err);
  const lines = out.trimEnd().split("\n");
  assertEquals(lines.length, 2 * everyCall.length, out);
  for (const line of lines) {
    for (const words of says) assertStringIncludes(line, words);
    assertStringIncludes(line, path);
  }
}

Deno.test("a missing library is a LibraryNotFoundError that says how to get it", () =>
  inFolder((folder) =>
    refusesLibrary(`${folder}/nowhere/libsage.so`, [
      "LibraryNotFoundError library-not-found Cannot find the library",
      `Build it with "deno task build"`,
      "DENO_SAGE_PATH",
    ])
  ));

Deno.test("a file that is no library is a LibraryNotFoundError", () =>
  inFolder(async (folder) => {
    const path = `${folder}/libsage.so`;
    await Deno.writeTextFile(path, "This is no library.\n");
    await refusesLibrary(path, [
      "LibraryNotFoundError library-unusable Cannot load the library",
      "Build it again",
    ]);
  }));

Deno.test("an empty file and a folder are LibraryNotFoundErrors", () =>
  inFolder(async (folder) => {
    const path = `${folder}/libsage.so`;
    await Deno.writeTextFile(path, "");
    const says = ["LibraryNotFoundError library-unusable Cannot load the library"];
    await refusesLibrary(path, says);
    await refusesLibrary(folder, says);
  }));

Deno.test("a library cut short is a LibraryNotFoundError", () =>
  inFolder(async (folder) => {
    const bytes = await Deno.readFile(libraryPath);
    for (const length of [40, 1000, bytes.length >> 1, bytes.length - 1]) {
      const path = `${folder}/libsage-${length}.so`;
      await Deno.writeFile(path, bytes.subarray(0, length));
      await refusesLibrary(path, [
        "LibraryNotFoundError library-unusable Cannot load the library",
      ]);
    }
  }));

Deno.test("a library of something else is a LibraryNotFoundError", () =>
  inFolder(async (folder) => {
    const path = await compile(folder, "other.so", "int something_else(void) { return 1; }");
    await refusesLibrary(path, [
      "LibraryNotFoundError library-unusable Cannot load the library",
      "sage_abi_version",
    ]);
  }));

Deno.test("a library of another ABI version is refused before anything else is asked of it", () =>
  inFolder(async (folder) => {
    const path = await compile(folder, "other.so", "int sage_abi_version(void) { return 999; }");
    await refusesLibrary(path, [
      "LibraryNotFoundError abi-mismatch",
      `ABI version must be ${abiVersion}: current value is 999`,
    ]);
  }));

Deno.test("a library of the right version that lacks functions is a LibraryNotFoundError", () =>
  inFolder(async (folder) => {
    const path = await compile(
      folder,
      "part.so",
      `int sage_abi_version(void) { return ${abiVersion}; }`,
    );
    await refusesLibrary(path, ["LibraryNotFoundError library-unusable", "sage_"]);
  }));

// ---- permissions --------------------------------------------------------------------------------------

Deno.test("importing needs no permission and does nothing", async () => {
  const { code, out, err } = await runScript(
    `console.log(typeof sage.attention, JSON.stringify(Deno.resources?.() ?? {}));`,
    [],
    { DENO_SAGE_PATH: "/nowhere/libsage.so" },
  );
  assertEquals([code, err], [0, ""]);
  assertStringIncludes(out, "function");
});

Deno.test("the documented permissions are enough", async () => {
  const flags = [`--allow-ffi=${libraryPath}`, "--allow-env=DENO_SAGE_PATH"];
  assertEquals(await runScript(smallAttention, flags), { code: 0, out: "10\n", err: "" });
});

Deno.test("without --allow-ffi every call says that it is missing", async () => {
  for (const flags of [["--allow-env=DENO_SAGE_PATH"], ["--allow-env", "--allow-ffi=/nowhere"]]) {
    const { code, out, err } = await runScript(everyCall.map(report).join("\n"), flags);
    assertEquals(code, 0, err);
    const lines = out.trimEnd().split("\n");
    assertEquals(lines.length, everyCall.length, out);
    for (const line of lines) {
      assertStringIncludes(line, "NotCapable");
      assertStringIncludes(line, "--allow-ffi");
    }
  }
});

Deno.test("without --allow-env the library beside the module is taken, and nothing is asked", async () => {
  const { code, out, err } = await runScript(report("sage.buildInfo()"), ["--allow-ffi"], {
    DENO_SAGE_PATH: "/nowhere/libsage.so",
  });
  assertEquals([code, err], [0, ""]);
  assert(!out.includes("/nowhere"), out);
});

// ---- drivers ------------------------------------------------------------------------------------------

const whyNot = report(`sage.Device.open("cuda")`) + `
console.log(sage.Device.list().map(({ device }) => device).join(" "));
using device = sage.Device.open();
console.log(device.name);` + smallAttention.replace("using device", "using cpu")
  .replaceAll("device.tensor", "cpu.tensor");

/** Opening "cuda" must say why it cannot; everything else must work on the CPU. */
async function explainsItself(env: Record<string, string>, says: readonly string[]) {
  const { code, out, err } = await runScript(whyNot, ["-A"], env);
  assertEquals([code, err], [0, ""]);
  const [error, ...rest] = out.trimEnd().split("\n");
  assertStringIncludes(error, "NoDeviceError no-device Cannot use a CUDA device as");
  for (const words of says) assertStringIncludes(error, words);
  assertEquals(rest, ["cpu", "cpu", "10"]);
}

Deno.test({
  name: "a build without CUDA says so",
  ignore: hasCuda,
  fn: () => explainsItself({}, ["without CUDA"]),
});

Deno.test({
  name: "where there is no GPU, opening cuda says why",
  ignore: hasGpu || !hasCuda,
  fn: () => explainsItself({}, ["NVIDIA"]),
});

Deno.test({
  name: "CUDA_VISIBLE_DEVICES that hides every GPU is named",
  ignore: !hasGpu,
  fn: () =>
    explainsItself({ CUDA_VISIBLE_DEVICES: "-1" }, [
      `no NVIDIA GPU among those that CUDA_VISIBLE_DEVICES="-1" allows`,
    ]),
});

const oldDriver = `
int cuInit(unsigned flags) { (void)flags; return 0; }
int cuDriverGetVersion(int* version) { *version = 11020; return 0; }
int cuDeviceGetCount(int* count) { *count = 0; return 0; }
`;

Deno.test({
  name: hasCuda
    ? "a driver that is too old is a NoDeviceError with both versions"
    : "a driver that is too old (not with a build without CUDA)",
  ignore: !hasCuda || Deno.build.os !== "linux",
  fn: () =>
    inFolder(async (folder) => {
      await compile(folder, "libcuda.so.1", oldDriver);
      await explainsItself({ LD_LIBRARY_PATH: folder }, [
        "the NVIDIA driver is too old: it supports CUDA 11.2",
        "this library needs",
      ]);
    }),
});

Deno.test({
  name: hasCuda
    ? "a broken driver is a NoDeviceError"
    : "a broken driver (not with a build without CUDA)",
  ignore: !hasCuda || Deno.build.os !== "linux",
  fn: () =>
    inFolder(async (folder) => {
      await compile(folder, "libcuda.so.1", "int nothing_of_use(void) { return 0; }");
      await explainsItself({ LD_LIBRARY_PATH: folder }, ["NVIDIA"]);
    }),
});
