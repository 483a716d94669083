// What crossing into the library costs: a bare call, a tensor, a small attention. Deno's own clock serves here.
import { attention, explain } from "../mod.ts";
import { openDevice, quick } from "./span.ts";

const device = openDevice();
const path = Deno.env.get("DENO_SAGE_PATH") ??
  decodeURIComponent(new URL("../dist/libsage.so", import.meta.url).pathname);
const bare = Deno.dlopen(path, { sage_abi_version: { parameters: [], result: "u32" } });
const kilobyte = new Float32Array(256), megabyte = new Float32Array(2 ** 18);
const data = Float32Array.from({ length: 64 * 64 }, () => Math.random() - 0.5);
const half = Float16Array.from(data);
const x = device.tensor(half, [1, 1, 64, 64]), out = device.empty([1, 1, 64, 64], { dtype: "f16" });
globalThis.addEventListener("unload", () => {
  x.dispose();
  out.dispose();
  bare.close();
});

/** Deno decides how often, unless time is short. */
const times = (n: number) => quick ? { n, warmup: 50 } : {};

const call = { ...times(50_000), group: "a call into the library" };
Deno.bench({ ...call, name: "bare", baseline: true }, () => void bare.symbols.sage_abi_version());
Deno.bench({ ...call, name: "device.memory()" }, () => void device.memory());
Deno.bench({ ...call, name: "explain()" }, () => void explain(x, x, x, { kernel: "flash" }));

const tensor = { ...times(2000), group: "a tensor, made and disposed" };
Deno.bench(
  { ...tensor, name: "empty, 1 KiB", baseline: true },
  () => device.empty([1, 1, 1, 256]).dispose(),
);
Deno.bench(
  { ...tensor, name: "from 1 KiB" },
  () => device.tensor(kilobyte, [1, 1, 1, 256]).dispose(),
);
Deno.bench(
  { ...tensor, name: "from 1 MiB" },
  () => device.tensor(megabyte, [1, 1, 1024, 256]).dispose(),
);

const small = { ...times(500), group: "attention of 64 tokens, D=64, f16" };
for (const kernel of ["flash", "sage1"] as const) {
  const options = { kernel, out };
  Deno.bench({ ...small, name: `${kernel}, enqueued`, baseline: kernel === "flash" }, async (b) => {
    b.start();
    attention(x, x, x, options);
    b.end();
    await device.synchronize();
  });
  Deno.bench({ ...small, name: `${kernel}, waited for` }, async () => {
    attention(x, x, x, options);
    await device.synchronize();
  });
}
