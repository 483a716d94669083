// What this machine can build with: the host compiler, nvcc, and the GPUs to build for.
import { join } from "@std/path";

/** A mistake or a lack that the user can mend; its message is one sentence. */
export class BuildError extends Error {
  override name = "BuildError";
}

/** A host C++ compiler. */
export interface HostCompiler {
  path: string;
  version: string;
}

/** The CUDA compiler. */
export interface CudaCompiler {
  path: string;
  /** 13000 for 13.0, as CUDA itself counts. */
  version: number;
  release: string;
  /** Architectures it can generate code for: "80", "90". */
  architectures: string[];
}

const oldestCuda = 12040;

async function run(command: string[]): Promise<{ success: boolean; text: string }> {
  try {
    const { success, stdout, stderr } = await new Deno.Command(command[0], {
      args: command.slice(1),
      stdin: "null",
    }).output();
    const decoder = new TextDecoder();
    return { success, text: decoder.decode(stdout) + decoder.decode(stderr) };
  } catch (error) {
    if (error instanceof Deno.errors.NotFound || error instanceof Deno.errors.PermissionDenied) {
      return { success: false, text: "" };
    }
    throw error;
  }
}

/** The path of a program on PATH (or of one named by its path). */
async function locate(program: string): Promise<string | undefined> {
  const candidates = program.includes("/")
    ? [program]
    : (Deno.env.get("PATH") ?? "").split(":").filter(Boolean).map((folder) =>
      join(folder, program)
    );
  for (const candidate of candidates) {
    try {
      const { isFile, mode } = await Deno.stat(candidate);
      if (isFile && (mode ?? 0o111) & 0o111) return candidate;
    } catch { /* not here */ }
  }
}

/** The compiler that $CXX names, or the first of c++, g++ and clang++ that is there. */
export async function findHostCompiler(): Promise<HostCompiler> {
  const chosen = Deno.env.get("CXX");
  for (const candidate of chosen ? [chosen] : ["c++", "g++", "clang++"]) {
    const path = await locate(candidate);
    if (!path) continue;
    const { success, text } = await run([path, "--version"]);
    if (!success) throw new BuildError(`Cannot use ${path}: it does not tell its version`);
    return { path, version: text.split("\n")[0].trim() };
  }
  throw new BuildError(
    chosen
      ? `Cannot build: CXX is "${chosen}", which is not a program on this machine`
      : "Cannot build: no C++ compiler found (looked for $CXX, c++, g++ and clang++); " +
        "on Debian or Ubuntu, apt-get install g++ brings one",
  );
}

/** nvcc of $CUDA_HOME, PATH or /usr/local/cuda; undefined where there is none. */
export async function findCudaCompiler(): Promise<CudaCompiler | undefined> {
  const home = Deno.env.get("CUDA_HOME");
  const places = [...home ? [join(home, "bin/nvcc")] : [], "nvcc", "/usr/local/cuda/bin/nvcc"];
  for (const place of places) {
    const path = await locate(place);
    if (!path) continue;
    const { success, text } = await run([path, "--version"]);
    const [, major, minor] = /release (\d+)\.(\d+)/.exec(text) ?? [];
    if (!success || major === undefined) {
      throw new BuildError(`Cannot use ${path}: it does not tell its version`);
    }
    const version = Number(major) * 1000 + Number(minor) * 10;
    if (version < oldestCuda) {
      throw new BuildError(
        `Cannot use ${path}: CUDA 12.4 or later is needed, this is ${major}.${minor}; ` +
          "--cpu-only builds without it",
      );
    }
    const codes = await run([path, "--list-gpu-code"]);
    const architectures = [...codes.text.matchAll(/sm_(\w+)/g)].map((match) => match[1]);
    return { path, version, release: `${major}.${minor}`, architectures };
  }
}

/** Compute capabilities of the GPUs that the driver shows, as architecture names: ["90a"]. */
export async function findGpus(): Promise<string[]> {
  const { success, text } = await run([
    "nvidia-smi",
    "--query-gpu=compute_cap",
    "--format=csv,noheader",
  ]);
  if (!success) return [];
  const capabilities = [...text.matchAll(/^\s*(\d+)\.(\d)\s*$/gm)].map(([, a, b]) => a + b);
  return [...new Set(capabilities)].map((capability) => capability === "90" ? "90a" : capability);
}

/** Whether the compiler has a static C++ library to link. */
export async function hasStaticLibrary(compiler: HostCompiler, name: string): Promise<boolean> {
  const { success, text } = await run([compiler.path, `-print-file-name=${name}`]);
  return success && text.trim().startsWith("/");
}

/** Runs a task; a BuildError ends it with its sentence and exit code 1. */
export async function runTask(body: () => Promise<void>): Promise<void> {
  try {
    await body();
  } catch (error) {
    if (!(error instanceof BuildError)) throw error;
    console.error(`error: ${error.message}`);
    Deno.exitCode = 1;
  }
}
