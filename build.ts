// Builds dist/: the shared library (nvcc and the host compiler), the bundle of mod.ts, and a manifest.
import { parseArgs } from "@std/cli/parse-args";
import { fromFileUrl, join } from "@std/path";
import { loadEsbuild, writeBundle } from "./tools/build/bundle.ts";
import { explainFailure, makeObjects, type Unit } from "./tools/build/objects.ts";
import { sha256, sourceHash, translationUnits } from "./tools/build/sources.ts";
import {
  BuildError,
  type CudaCompiler,
  findCudaCompiler,
  findGpus,
  findHostCompiler,
  hasStaticLibrary,
  type HostCompiler,
  runTask,
} from "./tools/build/toolchain.ts";
import project from "./deno.json" with { type: "json" };

const help = `usage: deno task build [options]

  --arch WHICH    native: the GPUs of this machine; all: every supported architecture;
                  or a list: 80,90a. Default: native where there are a GPU and nvcc, else the CPU alone
  --cpu-only      no CUDA
  --debug         -O1, assertions and line numbers
  --bundle WHEN   always (default), if-possible (left out, with a line that says so, where npm is out of
                  reach) or never
  --jobs N        compilers at a time (default: the number of cores)
  --force         compile everything again
  --help          this text
`;

const root = fromFileUrl(new URL(".", import.meta.url)).replace(/\/$/, "");
const libraryName = "libsage.so";
const bundleName = "sage_attention.js";

/**
 * Architectures of `--arch all`. Code for 8.0 runs on every 8.x; newer GPUs than Hopper compile the PTX when they load
 * it, which is of the level that has FP8 products.
 */
const allArchitectures = ["80", "90a"];
const fallbackPtx = "89";

/** Sums of products, in which a * b + c may round once; all else must equal the CPU's results bit for bit. */
const contractingSources = /\/(flash\w*|\w*attention\w*|row_products)\.cu$/;

/**
 * Portable sources without other code for 8.9 on, which FP8 has: nvcc's front end takes them once, for 8.0. One that is
 * not listed is taken once more; one that should not be would lose what 8.9 can do.
 */
const oldestFeatures =
  /\/(attention|attention_bytes|attention_(masked_)?d\d+|columns|decode|masks|mean|row_products|stream)\.cu$/;

/** Sources in this folder hold instructions that only sm_90a has. */
const hopperFolder = "cuda/kernels/sm90/";

/** What to build. */
export interface BuildOptions {
  /** "native", "all", or names such as "90a"; undefined: what this machine can use. */
  arch?: string | string[];
  cpuOnly?: boolean;
  debug?: boolean;
  bundle?: "always" | "if-possible" | "never";
  jobs?: number;
  force?: boolean;
}

/** What dist/manifest.json says. */
export interface Manifest {
  name: string;
  version: string;
  abiVersion: number;
  sourceHash: string;
  cudaVersion: string | null;
  architectures: string[];
  ptx: string[];
  debug: boolean;
  compilers: { host: string; cuda: string | null };
  options: { host: string[]; cuda: string[]; link: string[] };
  library: { file: string; sha256: string };
  bundle: { file: string; by: string } | null;
}

/** What a library holds code for. */
interface Built {
  architectures: string[];
  ptx: string[];
}

interface Target extends Built {
  cuda?: CudaCompiler;
}

/** Which architectures the options ask for on this machine; says what was found. */
async function chooseTarget(options: BuildOptions): Promise<Target> {
  const none = { architectures: [], ptx: [] };
  if (options.cpuOnly) {
    if (options.arch !== undefined) {
      throw new BuildError("Cannot build: --arch and --cpu-only exclude each other");
    }
    console.log("nvcc        not used (--cpu-only)");
    return none;
  }
  const cuda = await findCudaCompiler();
  const gpus = await findGpus();
  console.log(`nvcc        ${cuda ? `${cuda.release} (${cuda.path})` : "none found"}`);
  console.log(`GPU         ${gpus.map((gpu) => `sm_${gpu}`).join(" ") || "none found"}`);
  if (!cuda) {
    if (options.arch !== undefined) {
      throw new BuildError(
        "Cannot build for CUDA: no nvcc found (looked in $CUDA_HOME, PATH and /usr/local/cuda); " +
          "--cpu-only builds without it",
      );
    }
    if (gpus.length) console.log("            without nvcc the GPU stays unused");
    return none;
  }
  if (options.arch === undefined && !gpus.length) return none;
  if ((options.arch ?? "native") === "native") {
    if (!gpus.length) {
      throw new BuildError("Cannot build for native: nvidia-smi shows no GPU on this machine");
    }
    return { cuda, architectures: checkArchitectures(gpus, cuda), ptx: [] };
  }
  if (options.arch === "all") {
    const known = allArchitectures.filter((name) => knows(cuda, name));
    const unknown = allArchitectures.filter((name) => !knows(cuda, name));
    if (unknown.length) {
      console.log(`            nvcc ${cuda.release} lacks ${unknown.join(" ")}: left out`);
    }
    return { cuda, architectures: known, ptx: [fallbackPtx] };
  }
  const names = typeof options.arch === "string" ? options.arch.split(",") : options.arch ?? [];
  return { cuda, architectures: checkArchitectures(names, cuda), ptx: [] };
}

/** nvcc lists "90" and means "90a" too. */
function knows(cuda: CudaCompiler, name: string): boolean {
  return cuda.architectures.includes(name.replace(/[af]$/, ""));
}

function checkArchitectures(names: string[], cuda: CudaCompiler): string[] {
  for (const name of names) {
    if (!/^\d{2,3}[af]?$/.test(name)) {
      throw new BuildError(
        `Cannot build as --arch must be native, all or names such as 80,90a: current value is "${name}"`,
      );
    }
    if (parseInt(name) < 80) {
      throw new BuildError(
        `Cannot build for ${name}: compute capability 8.0 (Ampere) or later is needed`,
      );
    }
    if (!knows(cuda, name)) {
      throw new BuildError(
        `Cannot build for ${name}: nvcc ${cuda.release} knows ${cuda.architectures.join(" ")}`,
      );
    }
  }
  return [...new Set(names)].sort((a, b) => parseInt(a) - parseInt(b));
}

interface Flags {
  host: string[];
  cuda: string[];
  link: string[];
}

async function chooseFlags(host: HostCompiler, target: Target, debug: boolean): Promise<Flags> {
  const optimize = debug ? ["-O1", "-g", "-D_GLIBCXX_ASSERTIONS", "-DSAGE_DEBUG"] : ["-O3"];
  const position = ["-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-pthread"];
  const warnings = ["-Wall", "-Wextra"];
  const common = ["-std=c++17", ...optimize, "-DSAGE_BUILD"];
  const staticStandardLibrary = await hasStaticLibrary(host, "libstdc++.a")
    ? ["-static-libstdc++", "-static-libgcc"]
    : [];
  const linker = [
    "--no-undefined",
    "--version-script=cuda/exports.map",
    "-z,nodelete",
    "-z,relro",
    "-z,now",
  ];
  return {
    host: [...common, ...position, ...warnings, "-Werror"],
    cuda: target.cuda
      ? [
        ...common,
        ...debug ? ["-lineinfo"] : [],
        `-ccbin=${host.path}`,
        `-Xcompiler=${[...position, ...warnings].join(",")}`,
        "-Werror=all-warnings",
      ]
      : [],
    link: [
      "-shared",
      ...staticStandardLibrary,
      ...linker.map((option) => `-Wl,${option}`),
      "-pthread",
    ],
  };
}

/** Feature levels that portable sources tell apart; nvcc's front end runs once for each. */
function featureLevel(architecture: string): string {
  return parseInt(architecture) < 89 ? "80" : "89";
}

/** Code of a portable source: nothing in them needs the features of one architecture alone. */
function portableCode(source: string, architectures: string[], ptx: string[]): string[] {
  const old = oldestFeatures.test(source);
  const level = (name: string) => old ? "80" : featureLevel(name);
  const codes = [
    ...architectures.map((name) => [level(name), `sm_${name.replace(/[af]$/, "")}`]),
    ...ptx.map((name) => [level(name), `compute_${old ? "80" : name}`]),
  ];
  return [...Map.groupBy(codes, ([level]) => level)].map(([level, group]) =>
    `-gencode=arch=compute_${level},code=[${group.map(([, code]) => code).join(",")}]`
  );
}

/** Where a build's objects for its GPUs lie. */
function variantFolder({ architectures, ptx }: Built, debug: boolean): string {
  const names = [...architectures, ...ptx.map((name) => `ptx${name}`)];
  return `build/${debug ? "debug" : "release"}/${names.join("-") || "cpu"}`;
}

/** Where a build keeps what ptxas said of a source for Hopper. */
function reportPath(source: string, built: Built, debug: boolean): string {
  return `${variantFolder(built, debug)}/${source}.o.txt`;
}

/** Where the build that wrote a manifest keeps what ptxas said of the kernels for Hopper. */
export async function hopperReports(manifest: Manifest): Promise<string[]> {
  if (manifest.cudaVersion === null) return [];
  return (await translationUnits(root, true))
    .filter((source) => source.startsWith(hopperFolder))
    .map((source) => reportPath(source, manifest, manifest.debug));
}

interface Constants {
  version: string;
  sourceHash: string;
}

/** The compile command of every translation unit. Host objects are shared by builds for other GPUs. */
async function planUnits(
  host: HostCompiler,
  target: Target,
  flags: Flags,
  options: { debug: boolean; jobs: number; constants: Constants },
): Promise<Unit[]> {
  const variant = variantFolder(target, options.debug);
  const hostFolder = `build/${options.debug ? "debug" : "release"}/host`;
  const defines = [
    `-DSAGE_VERSION="${options.constants.version}"`,
    `-DSAGE_ARCHITECTURES="${target.architectures.join(" ")}"`,
    `-DSAGE_SOURCE_HASH="${options.constants.sourceHash}"`,
    `-DSAGE_CUDA_VERSION=${target.cuda?.version ?? 0}`,
  ];
  return (await translationUnits(root, target.cuda !== undefined)).map((source) => {
    const object = (folder: string) => `${folder}/${source}.o`;
    const hopper = source.startsWith(hopperFolder);
    if (!source.endsWith(".cu")) {
      const describes = source === "cuda/api.cpp";
      return {
        source,
        object: object(describes ? variant : hostFolder),
        compiler: host.version,
        command: [host.path, ...flags.host, ...describes ? defines : []],
      };
    }
    const code = hopper
      ? ["-gencode=arch=compute_90a,code=sm_90a", "-Xptxas=-v"]
      : portableCode(source, target.architectures, target.ptx);
    return {
      source,
      object: object(variant),
      compiler: `nvcc ${target.cuda!.release}, ${host.version}`,
      command: [
        target.cuda!.path,
        ...flags.cuda,
        ...contractingSources.test(source) ? [] : ["-fmad=false"],
        ...code,
      ],
      speed: [`--threads=${options.jobs}`],
      ...hopper && { report: reportPath(source, target, options.debug) },
    };
  });
}

async function readManifest(): Promise<Manifest | undefined> {
  try {
    return JSON.parse(await Deno.readTextFile(join(root, "dist/manifest.json")));
  } catch {
    return undefined; // none yet, or not ours: everything is linked anew
  }
}

/** Runs `write` on a temporary name in dist/ and renames the result, so that no reader sees half a file. */
async function replace(name: string, write: (path: string) => Promise<void>): Promise<void> {
  const part = join(root, `dist/.${Deno.pid}.${name}`);
  try {
    await write(part);
    await Deno.rename(part, join(root, "dist", name));
  } catch (error) {
    await Deno.remove(part).catch(() => {});
    if (error instanceof Error && /os error 28/.test(error.message)) {
      throw new BuildError(`Cannot write dist/${name}: no space left on the disk`);
    }
    throw error;
  }
}

async function link(command: string[]): Promise<void> {
  await replace(libraryName, async (part) => {
    const { success, stdout, stderr } = await new Deno.Command(command[0], {
      args: [...command.slice(1), "-o", part],
      cwd: root,
      stdin: "null",
    }).output();
    if (success) return;
    const output = new TextDecoder().decode(stdout) + new TextDecoder().decode(stderr);
    console.error(output.trimEnd());
    throw explainFailure(`link dist/${libraryName}`, command[0], output);
  });
}

async function hashLibrary(): Promise<string> {
  try {
    return await sha256(await Deno.readFile(join(root, "dist", libraryName)));
  } catch {
    return "";
  }
}

/** Builds dist/; throws a BuildError where that cannot be done, and then leaves the library as it was. */
export async function build(options: BuildOptions = {}): Promise<Manifest> {
  const began = performance.now();
  if (Deno.build.os !== "linux") {
    throw new BuildError(`Cannot build on ${Deno.build.os}: Linux is needed`);
  }
  const { debug = false, bundle = "always", force = false } = options;
  const jobs = options.jobs ?? navigator.hardwareConcurrency;
  const host = await findHostCompiler();
  console.log(`compiler    ${host.version} (${host.path})`);
  const target = await chooseTarget(options);
  const names = [
    ...target.architectures.map((name) => `sm_${name}`),
    ...target.ptx.map((name) => `compute_${name}`),
  ];
  console.log(`builds for  ${["the CPU", ...names].join(", ")}${debug ? ", for debugging" : ""}`);

  const flags = await chooseFlags(host, target, debug);
  const constants = { version: project.version, sourceHash: await sourceHash(root) };
  const units = await planUnits(host, target, flags, { debug, jobs, constants });
  await Deno.mkdir(join(root, "dist"), { recursive: true });
  const made = await makeObjects(root, units, { jobs, force });

  const previous = await readManifest();
  const cudaRuntime = target.cuda ? await cudaRuntimeFlags(target.cuda) : [];
  const linkFlags = [...flags.link, ...cudaRuntime];
  const header = await Deno.readTextFile(join(root, "cuda/sage.h"));
  const manifest: Manifest = {
    name: project.name,
    version: project.version,
    abiVersion: Number(/SAGE_ABI_VERSION (\d+)u/.exec(header)?.[1]),
    sourceHash: constants.sourceHash,
    cudaVersion: target.cuda?.release ?? null,
    architectures: target.architectures,
    ptx: target.ptx,
    debug,
    compilers: { host: host.version, cuda: target.cuda ? `nvcc ${target.cuda.release}` : null },
    options: { host: flags.host, cuda: flags.cuda, link: linkFlags },
    library: { file: libraryName, sha256: await hashLibrary() },
    bundle: null,
  };
  const same = (a: Manifest, b: Manifest) =>
    JSON.stringify({ ...a, bundle: null }) === JSON.stringify({ ...b, bundle: null });
  if (made || !previous || !same(previous, manifest)) {
    const objects = units.map((unit) => unit.object);
    await link([host.path, ...objects, ...linkFlags]);
    manifest.library.sha256 = await hashLibrary();
    console.log(`library     dist/${libraryName}`);
  } else {
    console.log(`library     dist/${libraryName} is up to date`);
  }
  const save = () =>
    replace(
      "manifest.json",
      (part) => Deno.writeTextFile(part, JSON.stringify(manifest, null, 2) + "\n"),
    );
  await save();
  manifest.bundle = await makeBundle(bundle);
  await save();
  console.log(`done        ${((performance.now() - began) / 1e3).toFixed(1)} s`);
  return manifest;
}

async function makeBundle(when: BuildOptions["bundle"]): Promise<Manifest["bundle"]> {
  const target = join(root, "dist", bundleName);
  const esbuild = when === "never" ? undefined : await loadEsbuild();
  if (!esbuild) {
    await Deno.remove(target).catch(() => {}); // one of older sources would mislead
    if (when === "always") {
      throw new BuildError(
        `Cannot write dist/${bundleName}: esbuild cannot be had from npm; the library is built, and ` +
          "--bundle never goes on without the bundle",
      );
    }
    const reason = when === "never" ? "--bundle never" : "esbuild cannot be had from npm";
    console.log(`bundle      left out (${reason})`);
    return null;
  }
  let by = "";
  await replace(bundleName, async (part) => void (by = await writeBundle(esbuild, root, part)));
  console.log(`bundle      dist/${bundleName} (${by})`);
  return { file: bundleName, by };
}

/** The static CUDA runtime of the toolkit that nvcc belongs to, and what it needs. */
async function cudaRuntimeFlags(cuda: CudaCompiler): Promise<string[]> {
  const { stdout, stderr } = await new Deno.Command(cuda.path, {
    args: ["--dryrun", "-cudart=static", "-x", "cu", "/dev/null", "-o", "/dev/null"],
    stdin: "null",
  }).output();
  const plan = new TextDecoder().decode(stdout) + new TextDecoder().decode(stderr);
  const libraries = /^#\$ LIBRARIES=(.*)$/m.exec(plan)?.[1] ?? "";
  const folders = [...libraries.matchAll(/-L"?([^"\s]+)"?/g)].map((match) => `-L${match[1]}`);
  return [...folders, "-lcudart_static", "-ldl", "-lrt"];
}

/** Command-line arguments to options; throws a BuildError that names what is wrong. */
export function parseOptions(args: string[]): BuildOptions & { help: boolean } {
  const flags = parseArgs(args, {
    boolean: ["cpu-only", "debug", "force", "help"],
    string: ["arch", "bundle", "jobs"],
    alias: { h: "help" },
    default: { bundle: "always" },
    unknown: (argument: string) => {
      throw new BuildError(`Unknown argument "${argument}"; --help lists those there are`);
    },
  });
  if (!["always", "if-possible", "never"].includes(flags.bundle)) {
    throw new BuildError(
      `Cannot build as --bundle must be always, if-possible or never: current value is "${flags.bundle}"`,
    );
  }
  const jobs = flags.jobs === undefined ? undefined : Number(flags.jobs);
  if (jobs !== undefined && !(Number.isInteger(jobs) && jobs >= 1 && flags.jobs !== "")) {
    throw new BuildError(
      `Cannot build as --jobs must be a whole number of at least 1: current value is "${flags.jobs}"`,
    );
  }
  return {
    arch: flags.arch,
    cpuOnly: flags["cpu-only"],
    debug: flags.debug,
    bundle: flags.bundle as BuildOptions["bundle"],
    jobs,
    force: flags.force,
    help: flags.help,
  };
}

if (import.meta.main) {
  await runTask(async () => {
    const options = parseOptions(Deno.args);
    if (options.help) console.log(help);
    else await build(options);
  });
}
