// Smoothing: taking the mean away from queries, keys or values before they are quantized.
import { checkInteger, checkOneOf, checkOptions } from "./check.ts";
import { type DType, type FloatDType, floatDTypes } from "./dtype.ts";
import { smoothStruct, Struct } from "./ffi.ts";
import { errorBytes, errorSize, unwrap } from "./library.ts";
import { interiorOf, permute, type Tensor } from "./tensor.ts";

const action = "smooth";

/** Options of {@linkcode smooth}. */
export interface SmoothOptions<O extends FloatDType = FloatDType> {
  /** Rows that share one mean; the papers take 128 for queries. Default: all rows, as for keys and values. */
  blockRows?: number;
  /** Element type of the result. Default: that of the input. */
  outDtype?: O;
}

/** What {@linkcode smooth} returns. Disposing it disposes both tensors. */
export interface Smoothed<O extends DType = FloatDType> extends Disposable {
  /** x − mean, of the shape of x. */
  smoothed: Tensor<O>;
  /** The means: [B, H, 1, D], or [B, H, ⌈N / blockRows⌉, D]. */
  mean: Tensor<"f32">;
}

const call = new Struct(smoothStruct.size);

/** Room for the means of x, one for every so many rows; 0: one for all. */
export function emptyMean(x: Tensor, blockRows: number): Tensor<"f32"> {
  const [batch, heads, tokens, channels] = interiorOf(action, "x", x).geometry.shape;
  const rows = blockRows === 0 ? 1 : Math.ceil(tokens / blockRows);
  return x.device.empty(permute([batch, heads, rows, channels], x.layout), { layout: x.layout });
}

/** Enqueues x − mean, and the mean that it returns. */
function enqueue(x: Tensor, blockRows: number, smoothed: Tensor): Tensor<"f32"> {
  const { storage: { stream }, bytes } = interiorOf(action, "x", x);
  const mean = emptyMean(x, blockRows);
  try {
    call.reset();
    call.setInt(smoothStruct.blockRows, blockRows);
    call.setHandle(smoothStruct.stream, stream.handle);
    call.setStruct(smoothStruct.x, bytes);
    call.setStruct(smoothStruct.mean, interiorOf(action, "mean", mean).bytes);
    call.setStruct(smoothStruct.smoothed, interiorOf(action, "smoothed", smoothed).bytes);
    unwrap(stream.native.sage_smooth(call.bytes, errorBytes, errorSize));
    return mean;
  } catch (error) {
    mean.dispose();
    throw error;
  }
}

/**
 * Subtracts the mean over tokens, per batch entry, head and channel: γ(x) = x − mean(x).
 *
 * Values that are not finite do not count in a mean. {@linkcode attention} does this itself; this function is for
 * programs that look at the parts.
 *
 * Sources: SageAttention (arXiv 2410.02367) for keys, SageAttention2 (2411.10958) for queries and values.
 *
 * @param x [B, H, N, D]: `f32`, `f16` or `bf16`.
 * @param options Rows of a mean, element type of the result.
 * @returns The smoothed tensor and the means.
 * @throws {TypeError | RangeError} Where `x` is not of floating point or an option is not valid.
 *
 * @example
 * ```ts
 * import { Device, smooth } from "@sage/attention";
 * import { assertEquals } from "@std/assert";
 *
 * using device = Device.open("cpu");
 * using x = device.tensor(new Float32Array([1, 10, 3, 30]), [1, 1, 2, 2]);
 * using result = smooth(x);
 *
 * assertEquals(await result.mean.data(), new Float32Array([2, 20]));
 * assertEquals(await result.smoothed.data(), new Float32Array([-1, -10, 1, 10]));
 * ```
 */
export function smooth<D extends DType, O extends FloatDType = Extract<D, FloatDType>>(
  x: Tensor<D>,
  options?: SmoothOptions<O>,
): Smoothed<O>;
export function smooth(x: Tensor, options: SmoothOptions = {}): Smoothed {
  checkOptions(action, options, ["blockRows", "outDtype"]);
  interiorOf(action, "x", x);
  const dtype = checkOneOf(action, "x.dtype", x.dtype as FloatDType, floatDTypes);
  const { blockRows, outDtype = dtype } = options;
  checkOneOf(action, "outDtype", outDtype, floatDTypes);
  if (blockRows !== undefined) checkInteger(action, "blockRows", blockRows, 1, 2 ** 32 - 1);
  const smoothed = x.device.empty(x.shape, { dtype: outDtype, layout: x.layout });
  try {
    const mean = enqueue(x, blockRows ?? 0, smoothed);
    return {
      smoothed,
      mean,
      [Symbol.dispose]() {
        smoothed.dispose();
        mean.dispose();
      },
    };
  } catch (error) {
    smoothed.dispose();
    throw error;
  }
}
