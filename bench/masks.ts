// What masks and sequences of different lengths cost: each beside the same work without them.
import {
  attention,
  type AttentionOptions,
  attentionVarlen,
  type Device,
  explain,
  type FloatDType,
  type Tensor,
  UnsupportedError,
} from "../mod.ts";
import { labels, type Variant, variantsOf } from "./cases.ts";
import type { MaskRow } from "./format.ts";
import { measureTogether, type RandomTensors, Timed } from "./measure.ts";
import type { Skips } from "./peers.ts";
import { dtypeOf } from "./rows.ts";

/** Lengths that a device has time for. */
interface Size {
  heads: number;
  headDim: number;
  /** Of one long sequence, and how many tokens of it a query sees. */
  long: number;
  window: number;
  /** Of several shorter ones. */
  short: number;
  sequences: number;
}

const sizes: Record<Device["kind"], Size> = {
  cuda: { heads: 32, headDim: 128, long: 32768, window: 1024, short: 4096, sequences: 8 },
  cpu: { heads: 2, headDim: 64, long: 8192, window: 256, short: 512, sequences: 8 },
};

type Float = Tensor<FloatDType>;

/** Two ways to call attention, the first of which is the yardstick. */
interface Pair {
  what: string;
  against: string;
  plain: () => Disposable;
  masked: () => Disposable;
}

/** The options among some with which the same code runs as with `like`; undefined where there are none. */
function alike(
  x: Float,
  like: AttentionOptions,
  some: AttentionOptions[],
): AttentionOptions | undefined {
  const { implementation } = explain(x, x, x, like);
  return some.find((options) => {
    try {
      return explain(x, x, x, options).implementation === implementation;
    } catch (error) {
      if (error instanceof UnsupportedError) return false;
      throw error;
    }
  });
}

function pairs(
  variant: Variant,
  { window, short, sequences }: Size,
  [long, batch, packed]: readonly Float[],
  masks: readonly (readonly [what: string, mask: Tensor<"bool">])[],
  sinks: Tensor<"f32">,
): Pair[] {
  const all = (x: Float, options: AttentionOptions) => () => attention(x, x, x, options);
  // Other code may run where there are masks: what they cost is told by the same code without. Sinks by themselves
  // cost nothing, but have that code's blocks for masks, which a mask that hides nothing does without.
  const open = alike(batch, { ...variant, mask: masks[0][1] }, [variant, { ...variant, sinks }]);
  const cuSeqlensQ = Array.from({ length: sequences + 1 }, (_, i) => i * short);
  return [
    {
      what: `window of ${window} tokens, causal`,
      against: `causal, ${long.shape[2] / 1024}k tokens`,
      plain: all(long, { ...variant, causal: true }),
      masked: all(long, { ...variant, causal: true, window: window - 1 }),
    },
    ...masks.filter(() => open).map(([what, mask]) => ({
      what,
      against: "the same code without a mask",
      plain: all(batch, open!),
      masked: all(batch, { ...variant, mask }),
    })),
    {
      what: `${sequences} sequences of ${short} tokens`,
      against: `a batch of ${sequences}`,
      plain: all(batch, variant),
      masked: () => attentionVarlen(packed, packed, packed, { ...variant, cuSeqlensQ }),
    },
  ];
}

/** Every kernel with every kind of mask that it has. */
export async function maskRows(
  random: RandomTensors,
  budgetMs: number,
  skips: Skips,
): Promise<MaskRow[]> {
  const { device } = random, size = sizes[device.kind], dtype = dtypeOf(device);
  const { heads, headDim, long, short, sequences } = size;
  using one = random.make([1, heads, long, headDim], dtype);
  using batch = random.make([sequences, heads, short, headDim], dtype);
  using packed = random.make([1, heads, sequences * short, headDim], dtype);
  const mask = (queries: number, shows: (at: number) => boolean) =>
    device.tensor(
      Uint8Array.from({ length: queries * short }, (_, at) => Number(shows(at))),
      [1, 1, queries, short],
      { dtype: "bool" },
    );
  using hidesNothing = mask(short, () => true);
  using hidesOne = mask(short, (at) => at !== (short / 4) * short + short / 2);
  using padding = mask(1, (at) => at < 3 * short / 4);
  const masks = [
    ["mask that hides nothing", hidesNothing],
    ["mask that hides one key", hidesOne],
    ["padding, a quarter of the keys", padding],
  ] as const;
  using sinks = device.tensor(new Float32Array(heads), [1, heads, 1, 1]);
  const rows: MaskRow[] = [];
  for (const variant of variantsOf({ causal: false })) {
    try {
      for (
        const { what, against, plain, masked } of pairs(
          variant,
          size,
          [one, batch, packed],
          masks,
          sinks,
        )
      ) {
        const subjects = [plain, masked].map((call) => ({
          timed: new Timed(device, [() => call()[Symbol.dispose]()]),
          stages: false,
        }));
        const [{ ms: plainMs }, { ms, noise }] = await measureTogether(subjects, budgetMs);
        rows.push({ ...labels(variant), what, against, ms, plainMs, noise });
      }
    } catch (error) {
      if (!(error instanceof UnsupportedError)) throw error;
      skips.skip(`masks: ${error.message}`);
    }
  }
  return rows;
}
