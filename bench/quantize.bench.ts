// Quantizing and smoothing, in bytes that must move: codes, scales and means as well as what is read.
import { speedOf } from "./format.ts";
import { RandomTensors, sampleTogether, Timed } from "./measure.ts";
import { nameOfPreparation, preparations, preparedShape } from "./preparation.ts";
import { dtypeOf } from "./rows.ts";
import { deviceBench, lazily, openDevice, quick, rounds } from "./span.ts";

const device = openDevice(), random = new RandomTensors(device);

for (const headDim of quick ? [128] : [64, 128]) {
  const shape = preparedShape(device, headDim);
  const x = random.make(shape, dtypeOf(device));
  globalThis.addEventListener("unload", () => x.dispose());
  const group = `quantize and smooth [${shape.join(", ")}] ${x.dtype}`;
  const all = preparations(x);
  const measured = lazily(() =>
    sampleTogether(
      all.map(({ call }) => ({ timed: new Timed(device, [call]), stages: false })),
      rounds,
    )
  );
  for (const [i, preparation] of all.entries()) {
    deviceBench({
      group,
      name: nameOfPreparation(preparation),
      baseline: i === 0,
      samples: async () => (await measured())[i].total,
      speed: (ms) => speedOf({ tbs: preparation.bytes / ms / 1e9 }),
    });
  }
}
