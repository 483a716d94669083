// Runs each test on every device present, and sees to it that nothing is left behind.
import { assertEquals, assertStringIncludes, assertThrows } from "@std/assert";
import {
  attention,
  type AttentionOptions,
  Device,
  explain,
  type FloatDType,
  fromFloat32,
  type Layout,
  type Tensor,
  toFloat32,
  UnsupportedError,
} from "../mod.ts";
import { count, type Dims, inLayout, normal, type Problem, reorder } from "./reference.ts";

/** The CPU, and the first CUDA device where there is one. */
export const deviceNames = Device.list().map(({ device }) => device).slice(0, 2) as (
  | "cpu"
  | "cuda:0"
)[];

/** The library under test. */
export const libraryPath = Deno.env.get("DENO_SAGE_PATH") ??
  decodeURIComponent(new URL("../dist/libsage.so", import.meta.url).pathname);

/** Older architectures whose kernels a CUDA device can run: FP8 products need it, and the library, to be as new. */
export function olderArchitectures(name: typeof deviceNames[number]): (80 | 89)[] {
  try {
    Device.open(name, { architecture: 89 }).dispose();
    return [80, 89];
  } catch (error) {
    if (error instanceof UnsupportedError) return [80];
    throw error;
  }
}

/** One test for each device; it fails where the body leaves an allocation or a stream behind. */
export function deviceTest(
  name: string,
  body: (device: Device) => void | Promise<void>,
): void {
  for (const deviceName of deviceNames) {
    Deno.test(`${name} on ${deviceName}`, async () => {
      using device = Device.open(deviceName);
      const { allocations, bytes, streams } = device.memory();
      await body(device);
      await device.synchronize();
      const after = device.memory();
      assertEquals(
        { allocations: after.allocations, bytes: after.bytes, streams: after.streams },
        { allocations, bytes, streams },
        "memory or streams were left behind",
      );
    });
  }
}

/**
 * Whether the device can run attention with these tensors. Where it cannot, that must be an UnsupportedError that
 * says what it can, from explain() and from attention() alike, and nothing may be left behind.
 */
export function runs(
  q: Tensor<FloatDType>,
  k: Tensor<FloatDType>,
  v: Tensor<FloatDType>,
  options: AttentionOptions,
): boolean {
  try {
    explain(q, k, v, options);
    return true;
  } catch (error) {
    if (!(error instanceof UnsupportedError)) throw error;
    assertStringIncludes(error.message, "must be ");
    assertStringIncludes(error.message, "flash");
    const { allocations } = q.device.memory();
    assertThrows(() => attention(q, k, v, options), UnsupportedError, error.message);
    assertEquals(q.device.memory().allocations, allocations);
    return false;
  }
}

/** Numbers as a tensor, rounded to the dtype; given in HND order. */
export function upload<D extends FloatDType>(
  device: Device,
  values: Float32Array,
  dims: Dims,
  dtype: D,
  layout: Layout = "HND",
): Tensor<D> {
  const data = fromFloat32(reorder(values, dims, layout), dtype);
  return device.tensor(data, inLayout(dims, layout), { dtype, layout }) as Tensor as Tensor<D>;
}

/** A tensor's values in HND order. */
export async function download(tensor: Tensor): Promise<Float32Array<ArrayBuffer>> {
  const [batch, second, third, channels] = tensor.shape;
  const dims: Dims = tensor.layout === "HND"
    ? [batch, second, third, channels]
    : [batch, third, second, channels];
  return reorder(toFloat32(await tensor.data(), tensor.dtype), dims, tensor.layout, true);
}

/** A tensor full of 0xff bytes, so that what is not written shows as NaN. */
export function poisoned<D extends FloatDType>(
  device: Device,
  dims: Dims,
  dtype: D,
  layout: Layout = "HND",
): Tensor<D> {
  const tensor = device.empty(inLayout(dims, layout), { dtype, layout });
  const bytes = new Uint8Array(tensor.byteLength).fill(0xff).buffer;
  tensor.write(
    dtype === "f32"
      ? new Float32Array(bytes)
      : dtype === "f16"
      ? new Float16Array(bytes)
      : new Uint16Array(bytes),
  );
  return tensor;
}

/** Lengths of a problem. */
export interface Lengths {
  batch?: number;
  heads?: number;
  kvHeads?: number;
  queries: number;
  keys?: number;
  channels: number;
  width?: number;
}

/** Q, K and V of N(0, 1), rounded to the dtype that they will have on the device. */
export function randomProblem(
  { batch = 1, heads = 1, kvHeads = heads, queries, keys = queries, channels, width = channels }:
    Lengths,
  dtype: FloatDType,
  seed = 1,
): Problem & { q: Float32Array; k: Float32Array; v: Float32Array } {
  const qDims: Dims = [batch, heads, queries, channels];
  const kDims: Dims = [batch, kvHeads, keys, channels];
  const vDims: Dims = [batch, kvHeads, keys, width];
  const values = (salt: number, dims: Dims) =>
    toFloat32(fromFloat32(normal(seed * 3 + salt, count(dims)), dtype), dtype);
  return { q: values(0, qDims), k: values(1, kDims), v: values(2, vDims), qDims, kDims, vDims };
}

/** Q, K and V on a device; disposing it disposes them. */
export function uploadProblem<D extends FloatDType>(
  device: Device,
  problem: Problem & { q: Float32Array; k: Float32Array; v: Float32Array },
  dtype: D,
  layout: Layout = "HND",
): { q: Tensor<D>; k: Tensor<D>; v: Tensor<D> } & Disposable {
  const q = upload(device, problem.q, problem.qDims, dtype, layout);
  const k = upload(device, problem.k, problem.kDims, dtype, layout);
  const v = upload(device, problem.v, problem.vDims, dtype, layout);
  return {
    q,
    k,
    v,
    [Symbol.dispose]() {
      for (const tensor of [q, k, v]) tensor.dispose();
    },
  };
}
