// smooth, quantize and dequantize give the bits that numerics.h promises, on every device.
import { assertEquals } from "@std/assert";
import {
  type CodeDType,
  dequantize,
  type Device,
  type FloatDType,
  fromFloat32,
  type Granularity,
  type Layout,
  type Operand,
  quantize,
  type QuantizeOptions,
  smooth,
  toFloat32,
} from "../mod.ts";
import { deviceTest, download, upload } from "./devices.ts";
import {
  count,
  type Dims,
  e4m3Code,
  inLayout,
  normal,
  packInt4,
  referenceDequantize,
  referenceMeans,
  referenceQuantize,
  referenceSmooth,
  reorder,
} from "./reference.ts";

/** Bits, so that NaN equals NaN and 0 does not equal -0. */
function bits(values: Float32Array<ArrayBuffer>): Uint32Array {
  return new Uint32Array(values.map((value) => Number.isNaN(value) ? NaN : value).buffer);
}

/** Values with a mean per channel, of a wide range, rounded to the dtype. */
function sample(dims: Dims, dtype: FloatDType, seed: number): Float32Array<ArrayBuffer> {
  const channels = dims[3];
  const offsets = normal(seed + 1000, channels).map((offset) => 8 * offset);
  const values = normal(seed, count(dims)).map((value, i) => value + offsets[i % channels]);
  return toFloat32(fromFloat32(values, dtype), dtype);
}

/** The same with what is not finite, zeros and tiny values strewn in. */
function wild(dims: Dims, dtype: FloatDType, seed: number): Float32Array<ArrayBuffer> {
  const values = sample(dims, dtype, seed), [, , tokens, channels] = dims;
  values[3 % values.length] = NaN;
  values[Math.min(values.length - 1, channels)] = Infinity;
  values[values.length - 1] = -Infinity;
  for (let n = 0; n < tokens; ++n) values[n * channels] = 0; // a channel of zeros
  values.fill(
    dtype === "f16" ? 0 : 1e-36,
    (tokens >> 1) * channels,
    (tokens >> 1) * channels + channels,
  );
  return toFloat32(fromFloat32(values, dtype), dtype);
}

const smoothCases: { dims: Dims; dtype: FloatDType; layout: Layout; blockRows?: number }[] = [
  { dims: [1, 1, 1, 1], dtype: "f32", layout: "HND" },
  { dims: [2, 3, 129, 64], dtype: "f16", layout: "HND" },
  { dims: [2, 3, 129, 40], dtype: "bf16", layout: "NHD" },
  { dims: [1, 2, 5000, 16], dtype: "f16", layout: "NHD" },
  { dims: [1, 1, 300, 128], dtype: "f32", layout: "HND", blockRows: 128 },
  { dims: [1, 2, 200, 72], dtype: "bf16", layout: "HND", blockRows: 128 },
  { dims: [1, 1, 37, 3], dtype: "f32", layout: "NHD", blockRows: 7 },
  { dims: [1, 1, 9000, 8], dtype: "bf16", layout: "HND" },
];

for (const { dims, dtype, layout, blockRows } of smoothCases) {
  const name = `${dtype} [${dims}] ${layout}${blockRows ? `, ${blockRows} rows a mean` : ""}`;
  deviceTest(`smooth() gives the promised bits for ${name}`, async (device) => {
    for (const make of [sample, wild]) {
      const values = make(dims, dtype, 7);
      using x = upload(device, values, dims, dtype, layout);
      using result = smooth(x, { blockRows, outDtype: "f32" });
      const means = referenceMeans(values, dims, blockRows);
      assertEquals(bits(await download(result.mean)), bits(means));
      const expected = referenceSmooth(values, dims, means, blockRows);
      assertEquals(bits(await download(result.smoothed)), bits(expected));

      using rounded = smooth(x, { blockRows });
      assertEquals(
        bits(await download(rounded.smoothed)),
        bits(toFloat32(fromFloat32(expected, dtype), dtype)),
      );
    }
  });
}

deviceTest("smooth() of a constant channel gives zeros", async (device) => {
  const dims: Dims = [1, 1, 77, 4];
  using x = upload(device, new Float32Array(count(dims)).fill(65504), dims, "f16");
  using result = smooth(x);
  assertEquals(await download(result.smoothed), new Float32Array(count(dims)));
  assertEquals(await download(result.mean), new Float32Array(4).fill(65504));
});

/** Quantizes on the device and in the reference, and back again, and compares every bit. */
async function compare(
  device: Device,
  values: Float32Array<ArrayBuffer>,
  dims: Dims,
  dtype: FloatDType,
  layout: Layout,
  options: QuantizeOptions & { dtype: CodeDType; granularity: Granularity },
): Promise<void> {
  const [, , tokens, channels] = dims;
  using x = upload(device, values, dims, dtype, layout);
  using quantized = quantize(x, options);
  const rows = options.operand === "query" ? 128 : tokens;
  const means = options.smooth ? referenceMeans(values, dims, rows) : undefined;
  const centred = means ? referenceSmooth(values, dims, means, rows) : values;
  const expected = referenceQuantize(centred, dims, options);

  assertEquals(bits(await download(quantized.scales)), bits(expected.scales));
  const codes = reorder(expected.codes, dims, layout);
  assertEquals(
    await quantized.codes.data(),
    options.dtype === "i8"
      ? Int8Array.from(codes)
      : options.dtype === "i4"
      ? packInt4(codes, channels)
      : Uint8Array.from(codes),
  );

  const back = referenceDequantize(
    expected.codes,
    expected.scales,
    dims,
    options,
    means && { values: means, rows },
  );
  for (const outDtype of ["f32", "f16", "bf16"] as const) {
    using dequantized = dequantize(quantized, { outDtype });
    assertEquals(
      bits(await download(dequantized)),
      bits(toFloat32(fromFloat32(back, outDtype), outDtype)),
    );
  }
}

const operands: [Operand, Granularity[]][] = [
  ["query", ["token", "block", "warp", "thread", "channel"]],
  ["key", ["token", "block", "warp", "thread", "channel"]],
  ["value", ["token", "block", "warp", "channel"]],
];
const shapes: [Dims, FloatDType, Layout][] = [
  [[2, 2, 129, 64], "f16", "HND"],
  [[1, 3, 200, 40], "bf16", "NHD"],
  [[1, 1, 1, 3], "f32", "HND"],
  [[2, 1, 65, 1], "f32", "NHD"],
  [[1, 2, 63, 72], "f16", "NHD"],
  [[1, 1, 130, 256], "bf16", "HND"],
  [[1, 2, 300, 128], "f16", "NHD"],
];
for (const [operand, granularities] of operands) {
  for (const granularity of granularities) {
    for (const dtype of ["i8", "i4", "e4m3"] as const) {
      deviceTest(
        `quantize() gives the promised bits: ${dtype}, ${operand} per ${granularity}`,
        async (device) => {
          for (const [seed, [dims, from, layout]] of shapes.entries()) {
            const recipe = { operand, dtype, granularity };
            await compare(device, sample(dims, from, seed), dims, from, layout, recipe);
            await compare(device, wild(dims, from, seed), dims, from, layout, {
              ...recipe,
              smooth: true,
            });
          }
        },
      );
    }
  }
}

deviceTest("quantize() takes any rows of a group", async (device) => {
  const dims: Dims = [1, 2, 140, 24], values = sample(dims, "f32", 3);
  for (const groupRows of [1, 7, 16, 64, 1000]) {
    const recipe = { operand: "key", dtype: "i8", granularity: "block", groupRows } as const;
    await compare(device, values, dims, "f32", "HND", recipe);
  }
  for (const operand of ["query", "key"] as const) {
    for (const groupRows of [8, 16, 48, 128, 256]) {
      for (const smooth of [false, true]) {
        const recipe = { operand, dtype: "i4", granularity: "thread", groupRows, smooth } as const;
        await compare(device, values, dims, "f32", "NHD", recipe);
      }
    }
  }
});

deviceTest("quantize() narrows FP8 codes to a range", async (device) => {
  const dims: Dims = [1, 1, 70, 16];
  for (const range of [2.25, 4.5, 9, 100]) {
    const recipe = { operand: "value", dtype: "e4m3", granularity: "channel", range } as const;
    await compare(device, sample(dims, "bf16", 5), dims, "bf16", "HND", recipe);
  }
});

deviceTest("quantize() rounds ties to even and saturates FP8", async (device) => {
  const ties = Float32Array.from({ length: 255 }, (_, i) => i - 127).map((i) => i / 2);
  ties[0] = 127; // so that the scale is 1
  const dims: Dims = [1, 1, 1, 255];
  await compare(device, ties, dims, "f32", "HND", {
    operand: "query",
    dtype: "i8",
    granularity: "token",
  });
  // Every value half way between two codes.
  const halves = Float32Array.from({ length: 0x7e }, (_, code) => {
    const value = (code: number) =>
      code < 8 ? code / 512 : (8 + code % 8) * 2 ** ((code >> 3) - 10);
    return (value(code) + value(code + 1)) / 2;
  });
  const all = Float32Array.of(...halves, ...halves.map((half) => -half), 448);
  assertEquals(e4m3Code(halves[0]), 0);
  await compare(device, all, [1, 1, 1, all.length], "f32", "HND", {
    operand: "query",
    dtype: "e4m3",
    granularity: "token",
  });
});

deviceTest("quantize() bears the largest and the smallest values", async (device) => {
  const dims: Dims = [1, 1, 4, 4];
  const extremes: [number, FloatDType][] = [
    [65504, "f16"],
    [2 ** -24, "f16"],
    [3e38, "bf16"],
    [
      1e-38,
      "bf16",
    ],
    [3.4e38, "f32"],
    [2 ** -149, "f32"],
    [2 ** -100, "f32"],
    [2 ** -101, "f32"],
  ];
  for (const [magnitude, from] of extremes) {
    const values = toFloat32(
      fromFloat32(
        Float32Array.from({ length: 16 }, (_, i) => magnitude * (i % 2 ? -1 : i / 16)),
        from,
      ),
      from,
    );
    for (const dtype of ["i8", "i4", "e4m3"] as const) {
      await compare(device, values, dims, from, "HND", {
        operand: "value",
        dtype,
        granularity: "channel",
      });
      await compare(device, values, dims, from, "HND", {
        operand: "query",
        dtype,
        granularity: "thread",
      });
    }
  }
});

deviceTest("quantize() reads views of any strides", async (device) => {
  const dims: Dims = [2, 4, 50, 16], values = sample(dims, "f16", 9);
  using whole = upload(device, values, dims, "f16", "NHD");
  using part = whole.view({ batch: [1, 2], heads: [1, 3], tokens: [7, 40] });
  assertEquals(part.shape, inLayout([1, 2, 33, 16], "NHD"));
  using fromView = quantize(part, { operand: "key", smooth: true });
  using copy = upload(device, await download(part), [1, 2, 33, 16], "f16");
  using fromCopy = quantize(copy, { operand: "key", smooth: true });
  assertEquals(await download(fromView.codes), await download(fromCopy.codes));
  assertEquals(await download(fromView.scales), await download(fromCopy.scales));
});
