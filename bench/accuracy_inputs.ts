// What accuracy is measured on: numbers from distributions with and without outliers, and tensors of real models.
import { basename, join } from "@std/path";
import { type FloatDType, fromFloat32, parseSafetensors, toFloat32 } from "../mod.ts";
import { normal, uniform } from "../tests/reference.ts";

type Dims = readonly [number, number, number, number];

/** Q, K and V in HND order, rounded to their element type. */
export interface Input {
  name: string;
  title: string;
  real: boolean;
  causal: boolean;
  dtype: FloatDType;
  q: Float32Array;
  k: Float32Array;
  v: Float32Array;
  qDims: Dims;
  kDims: Dims;
}

/** An input before it takes memory. */
export interface Source extends Pick<Input, "name" | "title" | "real" | "causal"> {
  load(): Promise<Input>;
}

// ---- distributions ------------------------------------------------------------------------------------

const heads = 2, tokens = 1024;

type Numbers = Pick<Input, "q" | "k" | "v">;

/** Adds a number of N(0, size²) to some of the channels. */
function addToChannels(
  x: Float32Array,
  channels: number,
  size: number,
  share: number,
  seed: number,
): void {
  const offsets = normal(seed, channels), next = uniform(seed + 1);
  const added = offsets.map((offset) => next() < share ? size * offset : 0);
  for (let i = 0; i < x.length; ++i) x[i] += added[i % channels];
}

/** Makes one of `every` numbers ten times as large. */
function enlarge(x: Float32Array, every: number, seed: number): void {
  const next = uniform(seed);
  for (let i = 0; i < x.length; ++i) if (next() < 1 / every) x[i] *= 10;
}

interface Distribution {
  name: string;
  title: string;
  causal?: boolean;
  change?: (numbers: Numbers, channels: number) => void;
}

const distributions: Distribution[] = [
  { name: "normal", title: "N(0, 1)" },
  { name: "causal", title: "N(0, 1), causal", causal: true },
  {
    name: "k-bias",
    title: "K + 8 · N(0, 1) a channel",
    change: ({ k }, channels) => addToChannels(k, channels, 8, 1, 1),
  },
  {
    name: "qk-bias",
    title: "K + 8 · N(0, 1) a channel, Q on 10 % of them",
    change: ({ q, k }, channels) => {
      addToChannels(k, channels, 8, 1, 1);
      addToChannels(q, channels, 8, 0.1, 3);
    },
  },
  {
    name: "outliers",
    title: "0.1 % of elements × 10",
    change: ({ q, k, v }) => [q, k, v].forEach((x, i) => enlarge(x, 1000, 5 + i)),
  },
  {
    name: "v-bias",
    title: "V + 4 · N(0, 1) a channel",
    change: ({ v }, channels) => addToChannels(v, channels, 4, 1, 9),
  },
];

function synthetic({ name, title, causal = false, change }: Distribution, width: number): Source {
  const about = { name: `${name}-${width}`, title: `${title}, D ${width}`, real: false, causal };
  return {
    ...about,
    load() {
      const dims: Dims = [1, heads, tokens, width], count = heads * tokens * width;
      const numbers = { q: normal(21, count), k: normal(22, count), v: normal(23, count) };
      change?.(numbers, width);
      const rounded = (x: Float32Array) => toFloat32(fromFloat32(x, "bf16"), "bf16");
      return Promise.resolve({
        ...about,
        dtype: "bf16",
        q: rounded(numbers.q),
        k: rounded(numbers.k),
        v: rounded(numbers.v),
        qDims: dims,
        kDims: dims,
      });
    },
  };
}

/** Every distribution in both head dimensions. */
export const syntheticInputs: readonly Source[] = distributions.flatMap((one) =>
  [64, 128].map((width) => synthetic(one, width))
);

// ---- real tensors -------------------------------------------------------------------------------------

/** The files of a folder, which hold "q", "k" and "v" in f16; layers of language models are causal. */
export async function realInputs(folder: string): Promise<Source[]> {
  const entries = await Array.fromAsync(Deno.readDir(folder));
  const files = entries.map(({ name }) => name).filter((name) => name.endsWith(".safetensors"));
  return await Promise.all(
    files.sort().map(async (file): Promise<Source> => {
      const content = parseSafetensors(await Deno.readFile(join(folder, file)));
      const name = basename(file, ".safetensors");
      const said = content.metadata.causal;
      const about = {
        name,
        title: name.replaceAll("-", " "),
        real: true,
        causal: said === undefined ? name.startsWith("tinyllama") : said === "true",
      };
      return {
        ...about,
        load() {
          const [q, k, v] = ["q", "k", "v"].map((part) => content.get(part, "f16"));
          const [values, dims] = [
            (x: typeof q) => Float32Array.from(x.data),
            (x: typeof q) => x.shape as readonly number[] as Dims,
          ];
          return Promise.resolve({
            ...about,
            dtype: "f16",
            ...{ q: values(q), k: values(k), v: values(v), qDims: dims(q), kDims: dims(k) },
          });
        },
      };
    }),
  );
}
