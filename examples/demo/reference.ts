// Attention by its definition, in float64: softmax(scale · Q Kᵀ) V, one row at a time.

/** The sizes of a problem; query heads share key-value heads in equal groups. */
export interface Problem {
  batch: number;
  heads: number;
  kvHeads: number;
  queries: number;
  keys: number;
  headDim: number;
  causal: boolean;
}

/**
 * Exact attention.
 *
 * @param q [batch, heads, queries, headDim], without gaps.
 * @param k [batch, kvHeads, keys, headDim].
 * @param v The same.
 * @param problem The sizes; causal rows are aligned to the bottom right.
 * @returns [batch, heads, queries, headDim].
 */
export function reference(
  q: ArrayLike<number>,
  k: ArrayLike<number>,
  v: ArrayLike<number>,
  { batch, heads, kvHeads, queries, keys, headDim, causal }: Problem,
): Float64Array {
  const [q64, k64, v64] = [q, k, v].map((values) => Float64Array.from(values));
  const output = new Float64Array(q64.length), scores = new Float64Array(keys);
  const scale = 1 / Math.sqrt(headDim), group = heads / kvHeads;
  for (let head = 0; head < batch * heads; ++head) {
    const kv = Math.floor(head / heads) * kvHeads + Math.floor(head % heads / group);
    for (let i = 0; i < queries; ++i) {
      const row = (head * queries + i) * headDim;
      const visible = causal ? Math.max(0, i + 1 + keys - queries) : keys;
      let largest = -Infinity;
      for (let j = 0; j < visible; ++j) {
        const key = (kv * keys + j) * headDim;
        let sum = 0;
        for (let c = 0; c < headDim; ++c) sum += q64[row + c] * k64[key + c];
        scores[j] = scale * sum;
        largest = Math.max(largest, scores[j]);
      }
      let total = 0;
      for (let j = 0; j < visible; ++j) total += scores[j] = Math.exp(scores[j] - largest);
      for (let j = 0; j < visible; ++j) {
        const weight = scores[j] / total, value = (kv * keys + j) * headDim;
        for (let c = 0; c < headDim; ++c) output[row + c] += weight * v64[value + c];
      }
    }
  }
  return output;
}
