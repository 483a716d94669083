// device.trace(): which stages calls have, that they take time, and that nothing is left on.
import { assert, assertEquals, assertRejects, assertThrows } from "@std/assert";
import {
  attention,
  attentionQuantized,
  dequantize,
  Device,
  DisposedError,
  quantize,
  SageError,
  smooth,
  type Stage,
} from "../mod.ts";
import { deviceTest, randomProblem, uploadProblem } from "./devices.ts";

function names(stages: Stage[]): string[] {
  return stages.map((stage) => stage.name);
}

deviceTest("trace() names the stages of every operation in order", async (device) => {
  const problem = randomProblem({ heads: 2, queries: 200, channels: 64 }, "f16");
  using tensors = uploadProblem(device, problem, "f16");
  const { q, k, v } = tensors;
  assertEquals(await device.trace(() => {}), []);
  const stages = await device.trace(async () => {
    using smoothed = smooth(k);
    using codes = quantize(q, { operand: "query" });
    await codes.codes.data();
    using back = dequantize(codes);
    using out = attention(q, k, v, { kernel: "flash" });
    assert(!smoothed.mean.disposed && !back.disposed && !out.disposed);
  });
  const flash = device.kind === "cpu" ? ["pack", "attention"] : ["attention"];
  assertEquals(names(stages), ["smooth", "quantize", "dequantize", ...flash]);
  for (const { name, ms } of stages) assert(ms >= 0 && ms < 60_000, `${name}: ${ms}`);
});

deviceTest("trace() names the stages of quantized attention", async (device) => {
  const problem = randomProblem({ heads: 2, queries: 200, channels: 64 }, "f16");
  using tensors = uploadProblem(device, problem, "f16");
  const { q, k, v } = tensors;
  const plain = names(
    await device.trace(() => attention(q, k, v, { kernel: "sage1", smoothK: false }).dispose()),
  );
  const smoothed = names(
    await device.trace(() => attention(q, k, v, { kernel: "sage1", smoothK: true }).dispose()),
  );
  assertEquals(plain.filter((name) => name === "quantize" || name === "attention"), [
    "quantize",
    "attention",
  ]);
  assertEquals(smoothed, ["mean", ...plain]);
  using query = quantize(q, { operand: "query" }), key = quantize(k, { operand: "key" });
  const stages = await device.trace(() =>
    attentionQuantized(query, key, v, { kernel: "sage1" }).dispose()
  );
  assertEquals(names(stages), ["pack", "attention"]);
});

deviceTest("trace() tells the share that attention takes of a long call", async (device) => {
  const problem = randomProblem({ heads: 2, queries: 3000, channels: 64 }, "f16");
  using tensors = uploadProblem(device, problem, "f16");
  const { q, k, v } = tensors;
  const work = () => attention(q, k, v, { kernel: "sage1" }).dispose();
  await device.trace(work);
  let stages: Stage[] = [];
  const whole = await device.time(async () => void (stages = await device.trace(work)));
  const sum = stages.reduce((total, { ms }) => total + ms, 0);
  const { ms: attending } = stages.find(({ name }) => name === "attention")!;
  assert(attending > 0 && attending <= sum && sum <= whole * 1.01 + 0.01, `${sum} of ${whole} ms`);
  if (device.kind === "cpu") assert(attending > sum / 2, `${attending} of ${sum} ms`);
});

deviceTest("trace() ends with its work, however that ends", async (device) => {
  using x = device.tensor(new Float32Array(32).fill(1), [1, 1, 4, 8]);
  const work = () => smooth(x)[Symbol.dispose]();
  const error = await assertRejects(() => device.trace(() => device.trace(work)), SageError);
  assertEquals(
    error.message,
    "Cannot trace a stream as its tracing must be off: current value is on.",
  );
  await assertRejects(
    () =>
      device.trace(() => {
        work();
        throw new RangeError("on purpose");
      }),
    RangeError,
    "on purpose",
  );
  assertEquals(names(await device.trace(work)), ["smooth"]);
  assertEquals(names(await device.trace(() => [work(), work()])), ["smooth", "smooth"]);
  work();
  assertEquals(await device.trace(() => {}), [], "what came before is not part of a trace");
  for (const wrong of [undefined, null, 3, {}]) {
    await assertRejects(
      () => device.trace(wrong as unknown as () => void),
      TypeError,
      "work must be",
    );
  }
});

deviceTest("trace() counts more stages than fit a page", async (device) => {
  using x = device.tensor(new Float32Array(32).fill(1), [1, 1, 4, 8]);
  const stages = await device.trace(() => {
    for (let i = 0; i < 300; ++i) smooth(x)[Symbol.dispose]();
  });
  assertEquals(stages.length, 300);
  assert(stages.every(({ name, ms }) => name === "smooth" && ms >= 0));
});

deviceTest("traces of two devices do not meet", async (device) => {
  using other = Device.open(device.name as "cpu");
  using x = device.tensor(new Float32Array(32).fill(1), [1, 1, 4, 8]);
  using y = other.tensor(new Float32Array(32).fill(1), [1, 1, 4, 8]);
  const [here, there] = await Promise.all([
    device.trace(() => smooth(x)[Symbol.dispose]()),
    other.trace(() => attention(y, y, y, { kernel: "sage1" }).dispose()),
  ]);
  assertEquals(names(here), ["smooth"]);
  assertEquals(names(there).at(-1), "attention");
});

deviceTest("trace() says that its device was disposed", async (device) => {
  const gone = Device.open(device.name as "cpu");
  await assertRejects(() => gone.trace(() => gone.dispose()), DisposedError);
  await assertRejects(() => gone.trace(() => {}), DisposedError);
  assertThrows(() => gone.info, DisposedError);
});
