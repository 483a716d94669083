// Real tensors: the error of each kernel on layers of language and speech models is as recorded.
import { parseSafetensors, relativeL1 } from "../mod.ts";
import { type FloatProblem, run, type TestKernel, within } from "./attention.ts";
import { deviceTest, runs, uploadProblem } from "./devices.ts";
import { type Dims, referenceAttention } from "./reference.ts";

/** `fast` is sage2's with the fast exponential, where it is more than 1.12 times as large. */
interface Layer {
  file: string;
  causal: boolean;
  largest: Partial<Record<TestKernel, number>>;
  fast?: number;
}

const layers: Layer[] = [
  {
    file: "tinyllama-layer06",
    causal: true,
    largest: {
      flash: 0.0005,
      sage1: 0.0287,
      sage2: 0.0358,
      "sage2-int4": 0.178,
      "sage2++": 0.0349,
    },
  },
  {
    file: "tinyllama-layer18",
    causal: true,
    largest: { flash: 0.0005, sage1: 0.023, sage2: 0.0293, "sage2-int4": 0.193, "sage2++": 0.0293 },
  },
  {
    file: "tinyllama-layer00",
    causal: true,
    largest: { flash: 0.0005, sage1: 0.0076, sage2: 0.0132 },
    fast: 0.0208, // nearly uniform attention: on an H200
  },
  {
    file: "whisper-encoder-layer01",
    causal: false,
    largest: { flash: 0.0005, sage1: 0.0024, sage2: 0.02 },
  },
];

const exponentials = ["exact", "fast"] as const;

for (const { file, causal, largest, fast } of layers) {
  const path = new URL(`data/${file}.safetensors`, import.meta.url);
  let loaded: { problem: FloatProblem; reference: Float64Array } | undefined;
  const load = async () => {
    const tensors = parseSafetensors(await Deno.readFile(path));
    const [q, k, v] = ["q", "k", "v"].map((name) => tensors.get(name, "f16"));
    const floats = [q, k, v].map(({ data }) => Float32Array.from(data));
    const problem: FloatProblem = {
      q: floats[0],
      k: floats[1],
      v: floats[2],
      qDims: q.shape as readonly number[] as Dims,
      kDims: k.shape as readonly number[] as Dims,
      vDims: v.shape as readonly number[] as Dims,
    };
    return { problem, reference: referenceAttention(problem, { causal }).out };
  };
  deviceTest(`attention() is as exact as recorded on ${file}`, async (device) => {
    const { problem, reference } = loaded ??= await load();
    using tensors = uploadProblem(device, problem, "f16");
    const exact: Partial<Record<TestKernel, number>> = {};
    for (const [kernel, error] of Object.entries(largest) as [TestKernel, number][]) {
      for (const exponential of kernel === "sage2" ? exponentials : [undefined]) {
        const options = { kernel, causal, exponential };
        if (!runs(tensors.q, tensors.k, tensors.v, options)) continue;
        const { out } = await run(tensors, options);
        const recorded = exponential === "fast" ? fast ?? 1.12 * error : error;
        const bound = kernel === "flash" ? recorded : 1.1 * recorded;
        const found = relativeL1(out, reference);
        within(found, bound, `${file}, ${kernel}, ${exponential}`);
        if (exponential !== "fast") exact[kernel] = found;
      }
    }
    // What FP16 sums ask of the codes of V must not cost anything.
    if (exact["sage2++"] !== undefined && exact.sage2 !== undefined) {
      within(exact["sage2++"], 1.01 * exact.sage2, `${file}, sums of P·V in FP16`);
    }
  });
}
