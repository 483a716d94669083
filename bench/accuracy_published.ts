// What others published or what was measured of theirs, to stand beside our figures.

/** Cosine similarity, as a share of 1, and relative L1. */
export interface Published {
  cosine: number;
  relativeL1: number;
}

const published = (cosine: number, relativeL1: number): Published => ({ cosine, relativeL1 });

/** Where figures are from. */
export const sources = {
  anchors:
    "the official SageAttention2 kernel for sm_90 and FlashAttention-3 in FP8 on an H200: bf16 inputs of 8 heads and " +
    "4096 tokens against float64; of the real tensors, all 16 query heads that were captured",
  sage1: "SageAttention, arXiv 2410.02367: Gaussian inputs",
  sage2: "SageAttention2, arXiv 2411.10958: layers of CogVideoX, Q·K in INT4",
} as const;

/** The official kernel of SageAttention2 and FlashAttention-3 in FP8, by input. */
export const anchors: Record<string, { sage2: Published; fa3: Published; noSmoothK?: Published }> =
  {
    "normal-64": { sage2: published(.999302, .0373), fa3: published(.998567, .0530) },
    "normal-128": { sage2: published(.999268, .0382), fa3: published(.998581, .0530) },
    "causal-64": { sage2: published(.999409, .0364), fa3: published(.998843, .0514) },
    "causal-128": { sage2: published(.999384, .0368), fa3: published(.998867, .0509) },
    "k-bias-64": { sage2: published(.999269, .0382), fa3: published(.976225, .2153) },
    "k-bias-128": { sage2: published(.999279, .0379), fa3: published(.977373, .2124) },
    "qk-bias-64": { sage2: published(.998604, .0494), fa3: published(.852964, .4471) },
    "qk-bias-128": { sage2: published(.998974, .0440), fa3: published(.901295, .4542) },
    "outliers-64": { sage2: published(.999305, .0391), fa3: published(.993895, .1088) },
    "outliers-128": { sage2: published(.999372, .0419), fa3: published(.995575, .0904) },
    "v-bias-64": { sage2: published(.999998, .00235), fa3: published(.999983, .0735) },
    "v-bias-128": { sage2: published(.999998, .00232), fa3: published(.999984, .0735) },
    "tinyllama-layer00": {
      sage2: published(.999915, .0126),
      noSmoothK: published(.999905, .0127),
      fa3: published(.999839, .0144),
    },
    "tinyllama-layer06": {
      sage2: published(.999300, .0346),
      noSmoothK: published(.999153, .0378),
      fa3: published(.992277, .1087),
    },
    "tinyllama-layer12": {
      sage2: published(.999521, .0282),
      noSmoothK: published(.999404, .0311),
      fa3: published(.994121, .0976),
    },
    "tinyllama-layer18": {
      sage2: published(.999461, .0314),
      noSmoothK: published(.999251, .0369),
      fa3: published(.994261, .1008),
    },
  };

/** SageAttention2 on smoothing, at 4 bits. */
export const smoothing: Record<string, Published> = {
  "": published(.8004, .3906),
  K: published(.9807, .1493),
  Q: published(.9830, .1250),
  QK: published(.9946, .0648),
};

/** SageAttention2 on granularity, at 4 bits. */
export const granularity: Record<string, Published> = {
  token: published(.9945, .0649),
  thread: published(.9945, .0622),
  block: published(.9803, .1492),
  tensor: published(.9715, .1800),
};

/** SageAttention2 on P·V, with Q·K at 4 bits; relative L1 is not among its figures here. */
export const products: Record<string, number> = {
  INT8: .7705,
  E5M2: .9920,
  E4M3: .9944,
  FP16: .9945,
};

/** SageAttention's four kernels. */
export const sage1Kernels: Record<string, Published> = {
  T: published(1, .019),
  B: published(1, .021),
  vT: published(.999, .064),
  vB: published(.989, .138),
};
