/**
 * Quantized attention on NVIDIA GPUs and on the CPU: the kernels of SageAttention, SageAttention2 and
 * SageAttention2++, and the exact attention they are compared with.
 *
 * Typed arrays become tensors on a device, attention is enqueued there, and its output comes back as a typed array:
 *
 * ```ts
 * import { attention, Device } from "@sage/attention";
 *
 * using device = Device.open(); // cuda:0 where there is one, else cpu
 * const data = () => Float16Array.from({ length: 8 * 256 * 64 }, () => Math.random() - 0.5);
 * using q = device.tensor(data(), [1, 8, 256, 64]); // [batch, heads, tokens, channels]
 * using k = device.tensor(data(), [1, 8, 256, 64]);
 * using v = device.tensor(data(), [1, 8, 256, 64]);
 * using o = attention(q, k, v, { causal: true });
 * console.log((await o.data()).length);
 * ```
 *
 * It needs `--allow-ffi` for the native library, which is `dist/libsage.so` unless the environment variable
 * `DENO_SAGE_PATH` names another (with `--allow-env=DENO_SAGE_PATH`). Importing the module does nothing else.
 *
 * @module
 */
export {
  attention,
  type AttentionPlan,
  type AttentionWithLse,
  explain,
  type ExplainOptions,
  flashAttention,
  type TensorSpec,
} from "./lib/attention.ts";
export {
  calibrate,
  type CalibrateOptions,
  type CalibrationProgress,
  type CalibrationSample,
} from "./lib/calibrate.ts";
export {
  Device,
  type DeviceInfo,
  type DeviceKind,
  type DeviceOptions,
  type MemoryStats,
  type Stage,
} from "./lib/device.ts";
export {
  type CodeDType,
  type DType,
  type DTypeArrays,
  type FloatDType,
  fromFloat32,
  type TensorData,
  toFloat32,
} from "./lib/dtype.ts";
export {
  DisposedError,
  LibraryNotFoundError,
  NoDeviceError,
  OutOfMemoryError,
  SageError,
  type SageErrorCode,
  UnsupportedError,
} from "./lib/errors.ts";
export { type BuildInfo, buildInfo } from "./lib/library.ts";
export { alibiSlopes, type MaskOptions, type MaskTensors } from "./lib/masks.ts";
export { cosine, relativeL1, rmse } from "./lib/metrics.ts";
export {
  type AttentionOptions,
  type AttentionQuantizedOptions,
  type FlashAttentionOptions,
  type Granularity,
  type Kernel,
  kernels,
  type LseOption,
} from "./lib/options.ts";
export {
  type LayerShape,
  type ModelSignature,
  type PrecisionCandidate,
  type PrecisionEntry,
  PrecisionPlan,
  type PrecisionPlanDocument,
  type PrecisionRung,
  type PrecisionSummary,
  type PrecisionTotals,
} from "./lib/precision_plan.ts";
export {
  type CostBudget,
  type PrecisionMetric,
  type PrecisionPolicy,
  type PrecisionScores,
  sageAttention2Policy,
  sageAttentionPolicy,
  type ShareBudget,
} from "./lib/precision_policy.ts";
export type { PlanOptions, Recipe } from "./lib/recipe.ts";
export {
  attentionQuantized,
  dequantize,
  type DequantizeOptions,
  type Operand,
  quantize,
  QuantizedTensor,
  type QuantizeOptions,
} from "./lib/quantize.ts";
export {
  parseSafetensors,
  Safetensors,
  type SafetensorsArrays,
  type SafetensorsDType,
  type SafetensorsEntry,
  serializeSafetensors,
} from "./lib/safetensors.ts";
export { smooth, type Smoothed, type SmoothOptions } from "./lib/smooth.ts";
export {
  type Layout,
  type Shape,
  Tensor,
  type TensorOptions,
  type ViewRanges,
} from "./lib/tensor.ts";
export { attentionVarlen, type AttentionVarlenOptions, type SequenceStarts } from "./lib/varlen.ts";
