// Runs every kernel that this machine's devices have on the Q, K and V of real models, compares each with exact
// attention in float64, prints what came out and draws it: demo.ts [picture, by default dist/demo.svg].
import {
  attention,
  cosine,
  Device,
  explain,
  kernels,
  parseSafetensors,
  relativeL1,
  rmse,
  type SafetensorsEntry,
  type Tensor,
  UnsupportedError,
} from "../mod.ts";
import { type Panel, picture } from "./demo/picture.ts";
import { type Problem, reference } from "./demo/reference.ts";

const root = new URL("../", import.meta.url);
const sets = [
  { file: "tinyllama-layer00", title: "TinyLlama layer 0, causal", causal: true },
  { file: "tinyllama-layer06", title: "TinyLlama layer 6, causal", causal: true },
  { file: "tinyllama-layer18", title: "TinyLlama layer 18, causal", causal: true },
  { file: "whisper-encoder-layer01", title: "Whisper encoder layer 1", causal: false },
];

/** The middle of several timings, after one call that does not count. */
async function medianTime(device: Device, call: () => void): Promise<number> {
  call();
  const times: number[] = [], began = performance.now();
  while (times.length < 3 || (times.length < 25 && performance.now() - began < 200)) {
    times.push(await device.time(call));
  }
  return times.sort((a, b) => a - b)[times.length >> 1];
}

function bytes(count: number): string {
  return count < 1e6 ? `${(count / 1e3).toFixed(0)} kB` : `${(count / 1e6).toFixed(1)} MB`;
}

function row(...cells: string[]): string {
  const widths = [8, 12, 13, 11, 13, 11, 11];
  return cells.map((cell, i) => i < 2 ? cell.padEnd(widths[i]) : cell.padStart(widths[i])).join("")
    .trimEnd();
}

async function load(file: string): Promise<SafetensorsEntry<"f16">[]> {
  const bytes = await Deno.readFile(new URL(`tests/data/${file}.safetensors`, root));
  const content = parseSafetensors(bytes);
  return ["q", "k", "v"].map((name) => content.get(name, "f16"));
}

// The CPU and the first GPU.
const devices = Device.list().slice(0, 2).map((info) => ({
  info,
  device: Device.open(info.device as "cpu"),
}));
try {
  for (const { info } of devices) {
    console.log(`${info.device.padEnd(8)}${info.name}, ${info.features}`);
  }

  const panels: Panel[] = [];
  for (const { file, title, causal } of sets) {
    const [q, k, v] = await load(file);
    const [batch, heads, queries, headDim] = q.shape;
    const problem: Problem = {
      batch,
      heads,
      kvHeads: k.shape[1],
      queries,
      keys: k.shape[2],
      headDim,
      causal,
    };
    const exact = reference(q.data, k.data, v.data, problem);
    const marks: Panel["marks"] = [];
    console.log(`\n${title}: Q [${q.shape.join(", ")}], K and V [${k.shape.join(", ")}], f16`);
    console.log(row("device", "kernel", "time", "cosine", "relative L1", "RMSE", "workspace"));

    for (const { device } of devices) {
      using qTensor = device.tensor(q.data, q.shape);
      using kTensor = device.tensor(k.data, k.shape);
      using vTensor = device.tensor(v.data, v.shape);
      using out: Tensor<"f16"> = device.empty(q.shape, { dtype: "f16" });
      for (const kernel of kernels) {
        let workspace: number;
        try {
          workspace = explain(qTensor, kTensor, vTensor, { kernel, causal }).workspaceBytes;
        } catch (error) {
          if (!(error instanceof UnsupportedError)) throw error;
          console.log(row(device.name, kernel, "not on this device"));
          continue;
        }
        const call = () => void attention(qTensor, kTensor, vTensor, { kernel, causal, out });
        const milliseconds = await medianTime(device, call);
        const result = await out.data(), error = relativeL1(result, exact);
        marks.push({ kernel, device: device.kind, milliseconds, relativeL1: error });
        console.log(
          row(
            device.name,
            kernel,
            `${milliseconds.toPrecision(3)} ms`,
            cosine(result, exact).toFixed(6),
            error.toFixed(5),
            rmse(result, exact).toExponential(2),
            bytes(workspace),
          ),
        );
      }
    }
    panels.push({ title, marks });
  }

  const target = Deno.args[0] ?? decodeURIComponent(new URL("dist/demo.svg", root).pathname);
  const legend = devices.map(({ info }) => [info.kind, info.name] as [string, string]);
  await Deno.writeTextFile(target, picture(panels, legend));
  console.log(`\nThe same as a picture: ${target}`);
} finally {
  for (const { device } of devices) device.dispose();
}
