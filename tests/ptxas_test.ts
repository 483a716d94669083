// What ptxas says of the kernels for Hopper: nothing may be spilled, and no instruction may wait in vain.
import { assert, assertEquals, assertStringIncludes } from "@std/assert";
import { fromFileUrl, join } from "@std/path";
import { hopperReports, type Manifest } from "../build.ts";
import { makeObjects } from "../tools/build/objects.ts";
import { findWaste, parseReport, summarize } from "../tools/build/ptxas.ts";
import { findCudaCompiler } from "../tools/build/toolchain.ts";

const root = fromFileUrl(new URL("..", import.meta.url));
const cuda = await findCudaCompiler();

const clean = `
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1av' for 'sm_90a'
ptxas info    : (C7519) warpgroup.arrive is injected around line 12 by compiler in function '_Z1av'
ptxas info    : Function properties for _Z1av
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 2 barriers
ptxas info    : Compiling entry function '_Z1bv' for 'sm_90a'
ptxas info    : Function properties for _Z1bv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers
ptxas info    : Compile time = 5.150 ms
ptxas info    : Function properties for _Z1cv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
`;

Deno.test("parseReport() reads registers, and findWaste() nothing where there is none", () => {
  const report = parseReport(clean);
  assertEquals(report.functions.map(({ name, registers }) => [name, registers]), [
    ["_Z1av", 168],
    ["_Z1bv", 40],
    ["_Z1cv", 0], // called, not launched
  ]);
  assertEquals(findWaste(report), []);
  assertEquals(summarize(report), "2 kernels, 40 to 168 registers, no spills");
  assertEquals(summarize(parseReport("")), "no kernels");
});

Deno.test("findWaste() finds each kind of spill and note", () => {
  const lines: [string, string, string][] = [
    ["0 bytes stack frame", "8 bytes stack frame", "8 bytes of local memory"],
    ["0 bytes spill stores", "4 bytes spill stores", "4 spilled"],
    ["0 bytes spill loads", "12 bytes spill loads", "12 loaded again"],
    ["(C7519)", "(C7510) Potential Performance Loss:", "(C7510)"],
    ["(C7519)", "(C7517)", "(C7517)"],
  ];
  for (const [from, to, said] of lines) {
    const found = findWaste(parseReport(clean.replace(from, to)));
    assertEquals(found.length, 1, to);
    assertStringIncludes(found[0], said);
  }
  const last = clean.lastIndexOf("0 bytes spill loads");
  const second = clean.slice(0, last) + clean.slice(last).replace("0 bytes", "16 bytes");
  assertStringIncludes(findWaste(parseReport(second))[0], "_Z1cv: ");
});

const sources: Record<string, { text: string; says: string }> = {
  spills: {
    text: `__global__ __launch_bounds__(1024, 2) void spills(float* x) {
  float values[96];
#pragma unroll
  for (int i = 0; i < 96; ++i) values[i] = x[threadIdx.x + i * 1024];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 96; ++i) x[threadIdx.x * 96 + i] = values[95 - i] * values[i];
}
`,
    says: "spilled",
  },
  "makes wgmma wait": {
    text: `__global__ void waits(float* x, unsigned long long a, unsigned long long b, int n) {
  float d[4] = {};
  for (int i = 0; i < n; ++i) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a), "l"(b));
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    d[0] += 1.0f;
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  }
  for (int i = 0; i < 4; ++i) x[threadIdx.x * 4 + i] = d[i];
}
`,
    says: "wgmma.mma_async instructions are serialized",
  },
};

for (const [what, { text, says }] of Object.entries(sources)) {
  Deno.test({
    name: `the report of a kernel that ${what} says so`,
    ignore: !cuda,
    fn: async () => {
      const folder = await Deno.makeTempDir();
      try {
        await Deno.writeTextFile(join(folder, "kernel.cu"), text);
        const unit = {
          source: "kernel.cu",
          object: "kernel.o",
          compiler: cuda!.release,
          command: [cuda!.path, "-O3", "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas=-v"],
          report: "kernel.o.txt",
        };
        const make = () => makeObjects(folder, [unit], { jobs: 1, force: false });
        assert(await make());
        const report = parseReport(await Deno.readTextFile(join(folder, unit.report)));
        assertStringIncludes(findWaste(report).join("\n"), says);
        assertStringIncludes(summarize(report), "warning");
        assert(!await make());
        await Deno.remove(join(folder, unit.report));
        assert(await make(), "an object without its report is made again");
      } finally {
        await Deno.remove(folder, { recursive: true });
      }
    },
  });
}

const manifest: Manifest = JSON.parse(await Deno.readTextFile(join(root, "dist/manifest.json")));
const reports = await hopperReports(manifest);

Deno.test({
  name: "no kernel for Hopper in dist/ spills or makes wgmma wait",
  ignore: manifest.cudaVersion === null,
  fn: async () => {
    assert(reports.length > 0);
    const waste: string[] = [], silent: string[] = [];
    for (const path of reports) {
      const report = parseReport(await Deno.readTextFile(join(root, path)));
      if (report.functions.length === 0) silent.push(path.replace(/.*\//, ""));
      waste.push(...findWaste(report).map((line) => `${path}: ${line}`));
    }
    assertEquals(waste, []);
    const kernelless = ["flash", "sage2_attention", "tensor_map"];
    assertEquals(silent.sort(), kernelless.map((name) => `${name}.cu.o.txt`));
  },
});
