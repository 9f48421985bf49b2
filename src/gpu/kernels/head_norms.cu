#include "common.cuh"

// Norms of heads of queries and keys, of up to 128 numbers, as Qwen3 has them. The weights of queries (E) and of keys (E) are adjacent.
// The norm starts from queries and keys as they are kept for its backward pass, rounded.

// qkv (rows, (H + 2 K) E) = raw, with the heads of queries and keys normalised and then rotated by the angles of the rows' positions; qk
// (rows, (H + K) E) = queries and keys before that. The table holds cosines, then sines, (table, E / 2) each. One warp per head; the
// grid is {rows, heads / 4}.
template <class T>
__device__ void norm_rope(const float *raw, const float *weight, const float *rope, const u32 *positions, T *qk, T *qkv, u32 table,
                          u32 queries, u32 kv_heads, u32 dim, float epsilon) {
  constexpr u32 ROUNDS = 2;
  const u32 head = 4 * blockIdx.y + threadIdx.x / WARP, lane = threadIdx.x % WARP, normed = queries + kv_heads, half = dim / 2;
  if (head >= normed + kv_heads) return;
  const u64 row = blockIdx.x, at = (row * (normed + kv_heads) + head) * dim;
  raw += at, qkv += at;
  if (head >= normed) {
    for (u32 i = lane; i < dim; i += WARP) qkv[i] = from_float<T>(raw[i]);
    return;
  }
  qk += (row * normed + head) * dim, weight += head < queries ? 0 : dim;
  const float *cosines = rope + u64(positions[row]) * half, *sines = cosines + u64(table) * half;
  float low[ROUNDS] = {}, high[ROUNDS] = {}, squares = 0;
  for (u32 round = 0; round < ROUNDS; round++) {
    u32 i = lane + round * WARP;
    if (i >= half) break;
    T first = from_float<T>(raw[i]), second = from_float<T>(raw[i + half]);
    qk[i] = first, qk[i + half] = second;
    low[round] = to_float(first), high[round] = to_float(second);
    squares = fmaf(low[round], low[round], fmaf(high[round], high[round], squares));
  }
  const float scale = 1.0f / sqrtf(warp_sum(squares) / dim + epsilon);
  for (u32 round = 0; round < ROUNDS; round++) {
    u32 i = lane + round * WARP;
    if (i >= half) break;
    float x = low[round] * scale * weight[i], y = high[round] * scale * weight[i + half];
    qkv[i] = from_float<T>(x * cosines[i] - y * sines[i]);
    qkv[i + half] = from_float<T>(y * cosines[i] + x * sines[i]);
  }
}

// Replaces the gradients of normalised queries and keys in d_qkv (rows, (H + 2 K) E), before rope, by those of qk (rows, (H + K) E).
// partial (blocks, 2 E) receives the blocks' partial sums of the weights' gradients: those of a warp's heads in their order, then those
// of the warps. One warp per head at a time.
template <class T>
__device__ void norm_heads_backward(const T *qk, const float *weight, T *d_qkv, float *partial, u32 rows, u32 queries, u32 kv_heads,
                                    u32 dim, float epsilon) {
  constexpr u32 WARPS = 8, NUMBERS = 128 / WARP;
  __shared__ float room[WARPS][2 * 128];
  const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, normed = queries + kv_heads;
  float of_queries[NUMBERS] = {}, of_keys[NUMBERS] = {};
  for (u64 unit = u64(blockIdx.x) * WARPS + warp; unit < u64(rows) * normed; unit += u64(gridDim.x) * WARPS) {
    const u64 row = unit / normed, head = unit % normed;
    const bool is_key = head >= queries;
    const T *x = qk + unit * dim;
    T *d = d_qkv + (row * (normed + kv_heads) + head) * dim;
    const float *w = weight + (is_key ? dim : 0);
    float of_x[NUMBERS] = {}, of_dy[NUMBERS] = {}, squares = 0, along = 0;
#pragma unroll
    for (u32 k = 0; k < NUMBERS; k++) {
      u32 i = lane + k * WARP;
      if (i >= dim) continue;
      of_x[k] = to_float(x[i]), of_dy[k] = to_float(d[i]);
      squares = fmaf(of_x[k], of_x[k], squares), along = fmaf(of_dy[k] * w[i], of_x[k], along);
    }
    const float scale = 1.0f / sqrtf(warp_sum(squares) / dim + epsilon);
    along = warp_sum(along) * scale * scale * scale / dim;
#pragma unroll
    for (u32 k = 0; k < NUMBERS; k++) {
      u32 i = lane + k * WARP;
      if (i >= dim) continue;
      float of_weight = of_dy[k] * scale * of_x[k];
      of_queries[k] += is_key ? 0.0f : of_weight, of_keys[k] += is_key ? of_weight : 0.0f;
      d[i] = from_float<T>(fmaf(of_dy[k] * w[i], scale, -along * of_x[k]));
    }
  }
#pragma unroll
  for (u32 k = 0; k < NUMBERS; k++) {
    u32 i = lane + k * WARP;
    if (i < dim) room[warp][i] = of_queries[k], room[warp][dim + i] = of_keys[k];
  }
  __syncthreads();
  for (u32 i = threadIdx.x; i < 2 * dim; i += WARPS * WARP) {
    float sum = room[0][i];
    for (u32 other = 1; other < WARPS; other++) sum += room[other][i];
    partial[u64(blockIdx.x) * 2 * dim + i] = sum;
  }
}

#define HEAD_NORMS(T)                                                                                                          \
  KERNEL(128, norm_rope_##T, const float *raw, const float *weight, const float *rope, const u32 *positions, T *qk, T *qkv,    \
         u32 table, u32 queries, u32 kv_heads, u32 dim, float epsilon) {                                                       \
    norm_rope<T>(raw, weight, rope, positions, qk, qkv, table, queries, kv_heads, dim, epsilon);                               \
  }                                                                                                                            \
  KERNEL(256, norm_heads_backward_##T, const T *qk, const float *weight, T *d_qkv, float *partial, u32 rows, u32 queries,      \
         u32 kv_heads, u32 dim, float epsilon) {                                                                               \
    norm_heads_backward<T>(qk, weight, d_qkv, partial, rows, queries, kv_heads, dim, epsilon);                                 \
  }
HEAD_NORMS(f32)
HEAD_NORMS(bf16)
HEAD_NORMS(f16)
