// onnxruntime's attention on the CPU, in a process of its own so that its threads leave ours alone. Speaks as peers.py
// does: requests in, rows out. usage: peers_onnx.ts BUDGET_MS
import type { Shape } from "./format.ts";

// Named where Deno cannot see it in advance: it is big, and only fetched where somebody asks for it.
const packageName = "npm:onnxruntime-node@1.30.0";
const leastRounds = 7, float32 = 1;

// ---- the little of onnxruntime and of ONNX that this takes ---------------------------------------

interface Session {
  run(feeds: Record<string, unknown>): Promise<unknown>;
  release(): Promise<void>;
}

interface OnnxRuntime {
  InferenceSession: {
    create(model: Uint8Array, options: { intraOpNumThreads: number }): Promise<Session>;
  };
  Tensor: new (type: "float32", data: Float32Array, dims: number[]) => unknown;
  env: { versions: { node: string } };
}

type Field = [number: number, value: number | string | Uint8Array];

function varint(value: number): number[] {
  const bytes: number[] = [];
  for (; value > 127; value = Math.floor(value / 128)) bytes.push(value % 128 + 128);
  return [...bytes, value];
}

/** A protocol buffers message of integers, texts and messages. */
function message(...fields: Field[]): Uint8Array {
  return Uint8Array.from(fields.flatMap(([number, value]) => {
    if (typeof value === "number") return [...varint(number * 8), ...varint(value)];
    const bytes = typeof value === "string" ? new TextEncoder().encode(value) : value;
    return [...varint(number * 8 + 2), ...varint(bytes.length), ...bytes];
  }));
}

function valueInfo(name: string, dims: number[]): Uint8Array {
  const shape = message(...dims.map((dim): Field => [1, message([1, dim])]));
  return message([1, name], [2, message([1, message([1, float32], [2, shape])])]);
}

function integerAttribute(name: string, value: number): Uint8Array {
  return message([1, name], [3, value], [20, 2]);
}

/** One node of com.microsoft's MultiHeadAttention: q, k and v are [batch, tokens, heads · headDim]. */
function model({ causal, heads }: Shape, q: number[], k: number[]): Uint8Array {
  const node = message(
    [1, "q"],
    [1, "k"],
    [1, "v"],
    [2, "o"],
    [4, "MultiHeadAttention"],
    [5, integerAttribute("num_heads", heads)],
    [5, integerAttribute("unidirectional", causal ? 1 : 0)],
    [7, "com.microsoft"],
  );
  const graph = message(
    [1, node],
    [2, "attention"],
    [11, valueInfo("q", q)],
    [11, valueInfo("k", k)],
    [11, valueInfo("v", k)],
    [12, valueInfo("o", q)],
  );
  const opset = message([2, 17]), contributed = message([1, "com.microsoft"], [2, 1]);
  return message([1, 8], [7, graph], [8, opset], [8, contributed]);
}

// ---- measuring -----------------------------------------------------------------------------------

function random(dims: number[]): Float32Array {
  const gauss = () =>
    Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random());
  return Float32Array.from({ length: dims.reduce((a, b) => a * b) }, gauss);
}

async function samplesOf(call: () => Promise<unknown>, budgetMs: number): Promise<number[]> {
  for (let i = 0; i < 3; ++i) await call();
  const samples: number[] = [], began = performance.now();
  while (samples.length < leastRounds || performance.now() - began < budgetMs) {
    const from = performance.now();
    await call();
    samples.push(performance.now() - from);
  }
  return samples;
}

/** What it cannot do, in a sentence. */
function objection({ heads, kvHeads }: Shape): string | undefined {
  return heads === kvHeads
    ? undefined
    : "onnxruntime: its MultiHeadAttention knows no grouped queries";
}

async function run(ort: OnnxRuntime, shape: Shape, budgetMs: number): Promise<unknown[]> {
  const { batch, heads, kvHeads, tokens, queries = tokens, headDim } = shape;
  const q = [batch, queries, heads * headDim], k = [batch, tokens, kvHeads * headDim];
  const session = await ort.InferenceSession.create(model(shape, q, k), {
    intraOpNumThreads: navigator.hardwareConcurrency,
  });
  const tensor = (dims: number[]) => new ort.Tensor("float32", random(dims), dims);
  const feeds = { q: tensor(q), k: tensor(k), v: tensor(k) };
  const samples = await samplesOf(() => session.run(feeds), budgetMs);
  await session.release();
  return [{ kernel: "onnxruntime", endToEnd: true, samples }];
}

function answer(rows: unknown[]): void {
  console.log(rows.map((row) => JSON.stringify(row) + "\n").join(""));
}

async function load(): Promise<OnnxRuntime> {
  try {
    return await import(packageName);
  } catch {
    console.error(`${packageName} is not on this machine`);
    Deno.exit(1);
  }
}

if (import.meta.main) {
  const ort = await load(), budgetMs = Number(Deno.args[0]);
  answer([{ versions: { onnxruntime: ort.env.versions.node }, skipped: [] }]);
  let rest = "";
  for await (const text of Deno.stdin.readable.pipeThrough(new TextDecoderStream())) {
    const lines = (rest + text).split("\n");
    rest = lines.pop()!;
    for (const line of lines) {
      const request: { support?: Shape; run?: Shape } = JSON.parse(line);
      const shape = request.support ?? request.run!, skipped = objection(shape);
      if (skipped) answer([{ skipped }]);
      else if (request.support) answer([{ kernel: "onnxruntime", endToEnd: true }]);
      else answer(await run(ort, shape, budgetMs));
    }
  }
}
