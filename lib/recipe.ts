// Recipes: the options of attention that a precision plan holds, and those that name the plan.
import {
  type AttentionOptions,
  type FlashAttentionOptions,
  type Kernel,
  optionNames,
} from "./options.ts";
import type { PrecisionPlan } from "./precision_plan.ts";

/** Which recipe of a precision plan to follow. */
export interface PlanOptions {
  /**
   * Takes kernel, granularity, smoothing and whatever else decides about precision from a plan, as
   * {@linkcode calibrate} makes it. Such options beside it must be absent or say what it says.
   */
  plan?: PrecisionPlan;
  /** Which layer of the plan's model this is; needed with `plan`. */
  layer?: number;
  /** Which time step this is: of those in the plan the nearest counts; needed where it has any for the layer. */
  timestep?: number;
}

/** The options of {@linkcode PlanOptions}. */
export const planNames: readonly string[] = ["plan", "layer", "timestep"];

/**
 * How one call of {@linkcode attention} computes: its options that decide about precision and speed, and not about
 * what is computed.
 */
export type Recipe =
  & Omit<
    AttentionOptions,
    keyof FlashAttentionOptions | keyof PlanOptions | "kernel"
  >
  & {
    /** How to compute; a recipe leaves nothing to chance. */
    kernel: Exclude<Kernel, "auto">;
  };

/** The options of a {@linkcode Recipe}: those that change how attention is computed, not what. */
export const recipeNames: readonly string[] = optionNames.attention.filter((name) =>
  !optionNames.flash.includes(name)
);
