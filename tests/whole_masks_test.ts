// Masks over much work that hide nothing, or one key of one row: whether kernels that need no mask run is up to what it
// holds.
import { assertEquals } from "@std/assert";
import { attention, type AttentionOptions, Device, explain, type MaskOptions } from "../mod.ts";
import { bits, run } from "./attention.ts";
import {
  deviceNames,
  download,
  olderArchitectures,
  poisoned,
  randomProblem,
  runs,
  uploadProblem,
} from "./devices.ts";
import { boolMask } from "./masks.ts";

const heads = 32, queries = 256, keys = 16384;
/** The one key that is hidden from one row, of every head or of one, and the channel of its value that tells. */
const row = 100, hiddenKey = 16000, channel = 9, head = 31;

/** Masks that hide nothing: of all dimensions, of some, and of numbers that are added. */
function openMasks(device: Device) {
  const zeros = new Float32Array(keys);
  return [
    boolMask(device, [1, 1, queries, keys], () => true),
    boolMask(device, [1, 1, 1, keys], () => true),
    device.tensor(new Uint8Array(heads * queries * keys).fill(1), [1, heads, queries, keys], {
      dtype: "bool",
    }),
    device.tensor(zeros, [1, 1, 1, keys]),
  ] as const;
}

/** Masks that hide one key, and from which heads. */
function hidingMasks(device: Device) {
  const ofHeads = new Uint8Array(heads * queries * keys).fill(1);
  ofHeads[(head * queries + row) * keys + hiddenKey] = 0;
  const added = new Float32Array(queries * keys);
  added[row * keys + hiddenKey] = -Infinity;
  const all = () => true, one = (h: number) => h === head;
  return [
    {
      mask: boolMask(device, [1, 1, queries, keys], (i, j) => i !== row || j !== hiddenKey),
      from: all,
    },
    {
      mask: device.tensor(ofHeads, [1, heads, queries, keys], { dtype: "bool" }),
      from: one,
    },
    { mask: device.tensor(added, [1, 1, queries, keys]), from: all },
  ] as const;
}

const kinds: AttentionOptions[] = [
  { kernel: "flash" },
  { kernel: "sage1", smoothK: false, smoothV: false },
  { kernel: "sage1", pvAccumulator: "f16" },
  { kernel: "sage1-int8" },
  { kernel: "sage2", exponential: "exact" },
  { kernel: "sage2", exponential: "fast" },
  { kernel: "sage2++" },
];

/** What other options do to the first of some masks; all masks are tried without them. */
const beside: MaskOptions[] = [{}, { causal: true }, { window: 2000 }];

async function check(device: Device, channels: number): Promise<void> {
  const lengths = { heads, kvHeads: 1, queries, keys, channels };
  const problem = randomProblem(lengths, "f16", channels + 1), v = problem.v.slice();
  v[hiddenKey * channels + channel] = Infinity;
  using good = uploadProblem(device, problem, "f16");
  using bad = uploadProblem(device, { ...problem, v }, "f16");
  const { q, k } = good, open = openMasks(device), hiding = hidingMasks(device);
  const implementationOf = (options: AttentionOptions) =>
    runs(q, k, good.v, options) ? explain(q, k, good.v, options).implementation : undefined;
  for (const kind of kinds) {
    for (const [i, more] of beside.entries()) {
      const options = { ...kind, ...more }, implementation = implementationOf(options);
      if (implementation === undefined) continue;
      const masks = i === 0 ? undefined : 1;
      const plain = await run(good, options);
      for (const mask of open.slice(0, masks)) {
        if (implementationOf({ ...options, mask }) !== implementation) continue;
        const what = `${JSON.stringify(options)}, mask ${mask}`;
        const masked = await run(good, { ...options, mask });
        assertEquals(bits(masked.out), bits(plain.out), what);
        assertEquals(bits(masked.lse), bits(plain.lse), what);
      }
      for (const { mask, from } of hiding.slice(0, masks)) {
        if (implementationOf({ ...options, mask }) !== implementation) continue;
        using out = poisoned(device, [1, heads, queries, channels], "f16");
        attention(bad.q, bad.k, bad.v, { ...options, mask, out });
        const values = await download(out);
        for (let at = 0; at < heads * queries; ++at) {
          const finite = [0, channel].map((c) => Number.isFinite(values[at * channels + c]));
          const hidden = at % queries === row && from(Math.floor(at / queries));
          const what = `${JSON.stringify(options)}, mask ${mask}: row ${at}`;
          assertEquals(finite, [true, hidden], what);
        }
      }
    }
  }
}

for (const name of deviceNames.filter((name) => name !== "cpu")) { // which has one code for all
  for (const architecture of [undefined, ...olderArchitectures(name)]) {
    for (const channels of [64, 128, 256]) {
      const as = architecture === undefined ? "" : ` as on ${architecture}`;
      Deno.test(`masks that hide nothing, or one key: D ${channels} on ${name}${as}`, async () => {
        using device = Device.open(name, architecture === undefined ? {} : { architecture });
        await check(device, channels);
      });
    }
  }
}
