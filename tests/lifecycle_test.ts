// Lifecycle: using things after their end, ending them in every order, workers, and the garbage collector.
import { assert, assertEquals, assertInstanceOf, assertRejects } from "@std/assert";
import {
  attention,
  attentionQuantized,
  dequantize,
  Device,
  DisposedError,
  explain,
  flashAttention,
  quantize,
  smooth,
} from "../mod.ts";
import { deviceNames, deviceTest, libraryPath, randomProblem, uploadProblem } from "./devices.ts";

const moduleUrl = new URL("../mod.ts", import.meta.url).href;
const config = decodeURIComponent(new URL("../deno.json", import.meta.url).pathname);

/** Awaits what a call gives or throws, which must be a DisposedError. */
async function refused(name: string, call: () => unknown): Promise<void> {
  let thrown: unknown;
  try {
    await call();
  } catch (error) {
    thrown = error;
  }
  assertInstanceOf(thrown, DisposedError, `${name}: ${thrown}`);
  assertEquals(thrown.code, "disposed", name);
}

// ---- after the end ------------------------------------------------------------------------------------

for (const end of ["the tensor", "the device"] as const) {
  for (const deviceName of deviceNames) {
    Deno.test(`every method refuses once ${end} was disposed on ${deviceName}`, async () => {
      using device = Device.open(deviceName);
      const shape = [1, 1, 4, 8];
      const x = device.tensor(new Float32Array(32).fill(1), shape);
      const query = quantize(x, { operand: "query" }), key = quantize(x, { operand: "key" });
      const value = quantize(x, { operand: "value" }), smoothed = smooth(x);
      assertEquals([x.disposed, query.disposed, device.disposed], [false, false, false]);
      if (end === "the device") device.dispose();
      else for (const one of [x, query, key, value, smoothed]) one[Symbol.dispose]();
      assertEquals([x.disposed, query.disposed], [true, true]);
      assertEquals(device.disposed, end === "the device");

      const calls: Record<string, () => unknown> = {
        "data": () => x.data(),
        "write": () => x.write(new Float32Array(32)),
        "view": () => x.view({}),
        "attention": () => attention(x, x, x),
        "flashAttention": () => flashAttention(x, x, x),
        "explain": () => explain(x, x, x),
        "smooth": () => smooth(x),
        "quantize": () => quantize(x, { operand: "key" }),
        "dequantize": () => dequantize(query),
        "attentionQuantized": () => attentionQuantized(query, key, value),
        "codes.data": () => query.codes.data(),
        "scales.data": () => query.scales.data(),
        "mean.data": () => smoothed.mean.data(),
      };
      const deviceCalls: Record<string, () => unknown> = {
        "tensor": () => device.tensor(new Float32Array(32), shape),
        "empty": () => device.empty(shape),
        "info": () => device.info,
        "memory": () => device.memory(),
        "synchronize": () => device.synchronize(),
        "time": () => device.time(() => {}),
        "trace": () => device.trace(() => {}),
        "explain with it": () => {
          const spec = { shape, dtype: "f32" } as const;
          return explain(spec, spec, spec, { device });
        },
      };
      for (const [name, call] of Object.entries(calls)) await refused(name, call);
      for (const [name, call] of Object.entries(deviceCalls)) {
        if (end === "the device") await refused(name, call);
      }

      // What only describes stays, and ending again does nothing.
      assertEquals([...x.shape], shape);
      assertEquals(`${x}`, `Tensor f32 [1, 1, 4, 8] HND on ${deviceName}`);
      assertEquals([device.name, `${device}`], [deviceName, deviceName]);
      for (const one of [x, query, key, value, smoothed, device]) {
        one[Symbol.dispose]();
        one[Symbol.dispose]();
      }
      x.dispose();
      query.dispose();
      device.dispose();
    });
  }
}

deviceTest("a view keeps the memory until both are disposed", async (device) => {
  const { allocations } = device.memory();
  const whole = device.tensor(Float32Array.of(1, 2, 3, 4), [1, 1, 4, 1]);
  const part = whole.view({ tokens: [2, 4] });
  assertEquals(device.memory().allocations, allocations + 1);
  whole.dispose();
  whole.dispose(); // must not take the view's hold
  assertEquals(device.memory().allocations, allocations + 1);
  assertEquals(await part.data(), Float32Array.of(3, 4));
  part.dispose();
  assertEquals(device.memory().allocations, allocations);
});

// ---- disposing while the device works -----------------------------------------------------------------

deviceTest(
  "inputs may be disposed, and their memory reused, right after a call",
  async (device) => {
    const problem = randomProblem({ heads: 4, queries: 512, channels: 64 }, "f16");
    const inputs = uploadProblem(device, problem, "f16");
    using patient = flashAttention(inputs.q, inputs.k, inputs.v);
    const expected = await patient.data();
    const later: Promise<Float16Array>[] = [];
    for (let i = 0; i < 8; ++i) {
      const { q, k, v } = uploadProblem(device, problem, "f16");
      const o = flashAttention(q, k, v);
      for (const tensor of [q, k, v]) tensor.dispose();
      using overwrite = device.tensor(new Float16Array(4 * 512 * 64).fill(NaN), q.shape);
      assertEquals(overwrite.disposed, false);
      later.push(o.data());
      o.dispose(); // while data() is pending
    }
    inputs[Symbol.dispose]();
    for (const data of await Promise.all(later)) assertEquals(data, expected);
  },
);

deviceTest("using frees what it declares, where an error is thrown too", async (device) => {
  const before = device.memory();
  try {
    using x = device.tensor(new Float16Array(512).fill(1), [1, 1, 8, 64]);
    using o = attention(x, x, x, { kernel: "flash", returnLse: true });
    using smoothed = smooth(x);
    using packed = quantize(x, { operand: "query", smooth: true });
    assertEquals([o.out.disposed, smoothed.mean.disposed, packed.disposed], [false, false, false]);
    assertEquals(device.memory().allocations, before.allocations + 1 + 2 + 2 + 3);
    throw new RangeError("on purpose");
  } catch (error) {
    assertEquals((error as Error).message, "on purpose");
  }
  await device.synchronize();
  assertEquals(device.memory().allocations, before.allocations);
  assertEquals(device.memory().bytes, before.bytes);
  assert(device.memory().peakBytes > before.bytes);
});

for (const deviceName of deviceNames) {
  Deno.test(`a device that is disposed frees its tensors on ${deviceName}`, () => {
    using witness = Device.open(deviceName);
    const before = witness.memory();
    const device = Device.open(deviceName);
    const problem = randomProblem({ heads: 4, queries: 512, channels: 64 }, "f16");
    const { q, k, v } = uploadProblem(device, problem, "f16");
    const tensors = [q, k.view({ heads: [1, 2] }), flashAttention(q, k, v)];
    assertEquals(witness.memory().streams, before.streams + 1);
    assertEquals(witness.memory().allocations, before.allocations + 4);
    device.dispose(); // while it still works
    const { streams, allocations, bytes } = witness.memory();
    assertEquals(
      { streams, allocations, bytes },
      { streams: before.streams, allocations: before.allocations, bytes: before.bytes },
    );
    for (const tensor of tensors) {
      assertEquals(tensor.disposed, true);
      tensor.dispose();
    }
  });

  Deno.test(`promises settle where their device is disposed on ${deviceName}`, async () => {
    using witness = Device.open(deviceName);
    const before = witness.memory();
    for (let i = 0; i < 5; ++i) {
      const device = Device.open(deviceName);
      const problem = randomProblem({ heads: 4, queries: 512, channels: 64 }, "f16");
      const { q, k, v } = uploadProblem(device, problem, "f16");
      const o = flashAttention(q, k, v);
      const pending = [o.data(), q.data(), device.synchronize(), device.time(() => {})];
      if (i > 0) await Promise.resolve();
      device.dispose();
      for (const result of await Promise.allSettled(pending)) {
        if (result.status === "rejected") assertInstanceOf(result.reason, DisposedError);
      }
    }
    const after = witness.memory();
    assertEquals([after.allocations, after.streams], [before.allocations, before.streams]);
  });
}

// ---- time ---------------------------------------------------------------------------------------------

deviceTest("time() measures the work and passes on what it throws", async (device) => {
  const problem = randomProblem({ heads: 2, queries: 256, channels: 64 }, "f16");
  using inputs = uploadProblem(device, problem, "f16");
  const run = (times: number) => () => {
    for (let i = 0; i < times; ++i) flashAttention(inputs.q, inputs.k, inputs.v).dispose();
  };
  await device.time(run(1));
  const nothing = await device.time(() => {}), much = await device.time(run(40));
  assert(nothing >= 0 && much > nothing, `nothing took ${nothing} ms, much took ${much} ms`);
  await assertRejects(
    () =>
      device.time(() => {
        throw new RangeError("on purpose");
      }),
    RangeError,
    "on purpose",
  );
  await assertRejects(() => device.time(() => Promise.reject(new TypeError("later"))), TypeError);
});

// ---- the library --------------------------------------------------------------------------------------

Deno.test("the library is left with its last device, and can be entered again", () => {
  for (let i = 0; i < 20; ++i) {
    const devices = Array.from({ length: 4 }, () => Device.open("cpu"));
    const tensor = devices[0].empty([1, 1, 1, 1]);
    for (const device of devices) device.dispose(); // the test fails where a Deno resource is left
    assertEquals(tensor.disposed, true);
  }
});

Deno.test("a device that is closed while it is waited for leaves no resource", async () => {
  const device = Device.open("cpu");
  const pending = device.synchronize();
  device.dispose();
  await pending.catch((error) => assertInstanceOf(error, DisposedError));
});

// ---- other processes: a crash there is a failing exit code -------------------------------------------------

async function runScript(
  files: Record<string, string>,
  flags: readonly string[] = [],
): Promise<string> {
  const folder = await Deno.makeTempDir();
  try {
    for (const [name, text] of Object.entries(files)) {
      await Deno.writeTextFile(
        `${folder}/${name}`,
        `import * as sage from ${JSON.stringify(moduleUrl)};\n${text}`,
      );
    }
    const { code, signal, stdout, stderr } = await new Deno.Command(Deno.execPath(), {
      args: [
        "run",
        "-A",
        "--quiet",
        "--no-check",
        "--config",
        config,
        ...flags,
        `${folder}/main.ts`,
      ],
      env: { NO_COLOR: "1", DENO_SAGE_PATH: libraryPath },
    }).output();
    const err = new TextDecoder().decode(stderr);
    assertEquals([code, signal, err], [0, null, ""]);
    return new TextDecoder().decode(stdout).trim();
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
}

const compute = `
export async function compute(name: string, tokens: number): Promise<string> {
  using device = sage.Device.open(name as "cpu");
  const data = Float16Array.from({ length: 2 * tokens * 64 }, (_, i) => Math.sin(i * i % 977));
  using q = device.tensor(data, [1, 2, tokens, 64]);
  using k = device.tensor(data.toReversed(), [1, 2, tokens, 64]);
  using o = sage.flashAttention(q, k, q, { causal: true });
  const bytes = new Uint8Array((await o.data()).buffer);
  const digest = await crypto.subtle.digest("SHA-256", bytes);
  return new Uint8Array(digest).toHex();
}
`;

for (const deviceName of deviceNames) {
  Deno.test(`eight workers at once compute the same on ${deviceName}`, async () => {
    const out = await runScript({
      "compute.ts": compute,
      "worker.ts": `
import { compute } from "./compute.ts";
const results = [];
for (let i = 0; i < 5; ++i) results.push(await compute("${deviceName}", 300));
self.postMessage(results);
self.close();`,
      "main.ts": `
import { compute } from "./compute.ts";
const expected = await compute("${deviceName}", 300);
const answers = await Promise.all(Array.from({ length: 8 }, () =>
  new Promise((resolve, reject) => {
    const worker = new Worker(new URL("./worker.ts", import.meta.url).href, { type: "module" });
    worker.onmessage = ({ data }) => resolve(data);
    worker.onerror = reject;
  })));
using device = sage.Device.open("${deviceName}");
const { allocations, streams } = device.memory();
console.log(
  answers.length,
  answers.flat().length,
  answers.flat().every((answer) => answer === expected),
  allocations,
  streams,
);`,
    });
    assertEquals(out, "8 40 true 0 1");
  });

  Deno.test(`a worker that is killed in mid-call harms nobody on ${deviceName}`, async () => {
    const out = await runScript({
      "compute.ts": compute,
      "worker.ts": `
using device = sage.Device.open("${deviceName}");
const shape = [1, 4, 2048, 64];
const data = new Float16Array(4 * 2048 * 64).fill(0.5);
const q = device.tensor(data, shape);
self.postMessage("ready");
while (true) {
  using o = sage.flashAttention(q, q, q);
  q.write(data);
  if (Math.random() < 0.5) await o.data();
  else await device.time(() => sage.smooth(q)[Symbol.dispose]());
}`,
      "main.ts": `
import { compute } from "./compute.ts";
const expected = await compute("${deviceName}", 300);
let equal = 0;
for (let i = 0; i < 20; ++i) {
  const worker = new Worker(new URL("./worker.ts", import.meta.url).href, { type: "module" });
  await new Promise((resolve) => worker.onmessage = resolve);
  await new Promise((resolve) => setTimeout(resolve, i * 3));
  worker.terminate();
  if (await compute("${deviceName}", 300) === expected) ++equal;
}
console.log(equal);`,
    });
    assertEquals(out, "20");
  });
}

Deno.test("the garbage collector frees what was forgotten", async () => {
  const out = await runScript({
    "main.ts": `
const collect = (globalThis as unknown as { gc(): void }).gc;
using witness = sage.Device.open("cpu");
const before = witness.memory();
async function forget() {
  using device = sage.Device.open("cpu");
  const x = device.tensor(new Float32Array(64), [1, 1, 8, 8]);
  for (let i = 0; i < 10; ++i) {
    sage.flashAttention(x, x, x).view({ tokens: [0, 1] });
    sage.quantize(x, { operand: "key", smooth: true });
    sage.Device.open("cpu").empty([1, 1, 8, 8]);
    witness.empty([1, 1, 8, 8]);
  }
  await device.synchronize();
}
await forget();
const most = witness.memory();
for (let i = 0; i < 100; ++i) {
  collect();
  await new Promise((resolve) => setTimeout(resolve, 10));
  const { allocations, streams } = witness.memory();
  if (allocations === before.allocations && streams === before.streams) break;
}
const after = witness.memory();
console.log(before.allocations, before.streams, most.allocations > 10, most.streams);
console.log(after.allocations, after.bytes, after.streams);`,
  }, ["--v8-flags=--expose-gc"]);
  assertEquals(out, "0 1 true 11\n0 0 1");
});

Deno.test("a program may end without disposing anything", async () => {
  for (const end of ["", "Deno.exit(0);"]) {
    const out = await runScript({
      "main.ts": `
const device = sage.Device.open();
const q = device.tensor(new Float16Array(4 * 2048 * 64), [1, 4, 2048, 64]);
sage.flashAttention(q, q, q);
console.log("done");
${end}`,
    });
    assertEquals(out, "done");
  }
});
