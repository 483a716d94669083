// Timing on a device, and data to time with.
import { type Device, fromFloat32, type Tensor } from "../mod.ts";

/** Median milliseconds of a call; short calls are timed many at a time, so that launching does not count. */
export async function measure(
  device: Device,
  call: () => void,
  budgetMs: number,
): Promise<number> {
  const sample = async (count: number) =>
    await device.time(() => {
      for (let i = 0; i < count; ++i) call();
    }) / count;
  await sample(2);
  const count = Math.max(1, Math.min(50, Math.ceil(1 / await sample(2))));
  const samples: number[] = [], began = performance.now();
  while (samples.length < 7 || performance.now() - began < budgetMs) {
    samples.push(await sample(count));
  }
  return samples.sort((a, b) => a - b)[samples.length >> 1];
}

const poolSize = 3_000_017; // prime, so that repetitions fall on other channels, rows and heads

function normals(count: number): Float32Array {
  return Float32Array.from(
    { length: count },
    () => Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random()),
  );
}

/** Makes tensors of normally distributed values; large ones repeat a pool. */
export class RandomTensors {
  readonly #pools = { bf16: new Uint16Array(), f16: new Uint16Array() };

  constructor(readonly device: Device) {
    const values = normals(poolSize);
    this.#pools.bf16 = fromFloat32(values, "bf16");
    this.#pools.f16 = new Uint16Array(fromFloat32(values, "f16").buffer);
  }

  make<D extends "bf16" | "f16">(shape: readonly number[], dtype: D): Tensor<D> {
    const bits = new Uint16Array(shape.reduce((a, b) => a * b));
    let from = Math.floor(Math.random() * poolSize);
    for (let at = 0; at < bits.length;) {
      const piece = this.#pools[dtype].subarray(from, from + bits.length - at);
      bits.set(piece, at);
      at += piece.length;
      from = 0;
    }
    return this.device.tensor(bits, shape, { dtype });
  }
}
