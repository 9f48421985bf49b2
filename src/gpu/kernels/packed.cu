#include "common.cuh"

// The forward pass over packed rows, between its products. One block per row unless stated otherwise; every width is a multiple of 8.

// x (rows, width) = the rows of the embedding table that `tokens` select.
template <class T> __device__ void embed(const u32 *tokens, const T *table, float *x, u32 width) {
  u64 row = blockIdx.x, from = u64(tokens[row]) * width;
  for (u32 i = threadIdx.x; i < width; i += 128) x[row * width + i] = to_float(table[from + i]);
}

// normed (rows, width) = x / rms(x) * weight. Row r is computed from row r of x or, with `index`, from row index[r]. With `added`, x is
// replaced by x + added, which is also written to `sums`; that may be x. One warp per row.
template <class T>
__device__ void norm_rows(const float *x, const u32 *index, const float *added, float *sums, const float *weight, T *normed,
                          u32 rows, u32 width, float epsilon) {
  constexpr u32 SIZE = Pack<float>::SIZE;
  u64 row = 4 * u64(blockIdx.x) + threadIdx.x / WARP;
  if (row >= rows) return;
  u32 lane = threadIdx.x % WARP;
  x += (index ? index[row] : row) * width, normed += row * width;
  if (added) added += row * width, sums += row * width;
  float squares = 0;
  for (u32 i = SIZE * lane; i < width; i += SIZE * WARP) {
    Pack<float> pack = load_pack(x + i);
    if (added) {
      Pack<float> more = load_pack(added + i);
      for (u32 k = 0; k < SIZE; k++) pack.of[k] += more.of[k];
      store_pack(sums + i, pack);
    }
    for (u32 k = 0; k < SIZE; k++) squares = fmaf(pack.of[k], pack.of[k], squares);
  }
  float scale = 1.0f / sqrtf(warp_sum(squares) / width + epsilon);
  if (added) x = sums;
  for (u32 i = SIZE * lane; i < width; i += SIZE * WARP) {
    Pack<float> pack = load_pack(x + i), w = load_pack(weight + i);
    for (u32 k = 0; k < SIZE; k++) normed[i + k] = from_float<T>(pack.of[k] * scale * w.of[k]);
  }
}

// qkv (rows, (H + 2 K) E) = raw + bias, or raw where bias is null, with the first `turned` heads, queries and keys, rotated by the angles of
// the rows' positions. The table holds cosines, then sines, (table, E / 2) each.
template <class T>
__device__ void bias_rope(const float *raw, const float *bias, const float *rope, const u32 *positions, T *qkv, u32 table,
                          u32 turned, u32 heads, u32 dim) {
  constexpr u32 SIZE = Pack<float>::SIZE;
  u64 row = blockIdx.x, half = dim / 2, packs = half / SIZE;
  raw += row * heads * dim, qkv += row * heads * dim;
  const float *cosines = rope + positions[row] * half, *sines = cosines + table * half;
  for (u32 i = threadIdx.x; i < heads * packs; i += 128) {
    u32 head = i / packs, at = SIZE * (i % packs), first = head * dim + at, second = first + half;
    Pack<float> a = load_pack(raw + first), b = load_pack(raw + second);
    Pack<float> a_bias = {}, b_bias = {};
    if (bias) a_bias = load_pack(bias + first), b_bias = load_pack(bias + second);
    for (u32 k = 0; k < SIZE; k++) {
      float x = a.of[k] + a_bias.of[k], y = b.of[k] + b_bias.of[k];
      float cosine = head < turned ? cosines[at + k] : 1, sine = head < turned ? sines[at + k] : 0;
      qkv[first + k] = from_float<T>(x * cosine - y * sine);
      qkv[second + k] = from_float<T>(y * cosine + x * sine);
    }
  }
}

// act (rows, width) = silu(gate) * up, with gate_up (rows, 2 width).
template <class T> __device__ void swiglu(const T *gate_up, T *act, u32 width) {
  constexpr u32 SIZE = Pack<T>::SIZE;
  const T *gates = gate_up + 2 * u64(blockIdx.x) * width;
  act += u64(blockIdx.x) * width;
  for (u32 i = SIZE * threadIdx.x; i < width; i += SIZE * 256) {
    Pack<T> gate = load_pack(gates + i), up = load_pack(gates + width + i), out;
    for (u32 k = 0; k < SIZE; k++) {
      float g = to_float(gate.of[k]);
      out.of[k] = from_float<T>(g / (1.0f + exp_of(-g)) * to_float(up.of[k]));
    }
    store_pack(act + i, out);
  }
}

#define PACKED_FORWARD(T)                                                                                                      \
  KERNEL(128, embed_##T, const u32 *tokens, const T *table, float *x, u32 width) { embed<T>(tokens, table, x, width); }        \
  KERNEL(128, norm_rows_##T, const float *x, const u32 *index, const float *added, float *sums, const float *weight,           \
         T *normed, u32 rows, u32 width, float epsilon) {                                                                      \
    norm_rows<T>(x, index, added, sums, weight, normed, rows, width, epsilon);                                                 \
  }                                                                                                                            \
  KERNEL(128, bias_rope_##T, const float *raw, const float *bias, const float *rope, const u32 *positions, T *qkv, u32 table,  \
         u32 turned, u32 heads, u32 dim) {                                                                                     \
    bias_rope<T>(raw, bias, rope, positions, qkv, table, turned, heads, dim);                                                  \
  }                                                                                                                            \
  KERNEL(256, swiglu_##T, const T *gate_up, T *act, u32 width) { swiglu<T>(gate_up, act, width); }
PACKED_FORWARD(f32)
PACKED_FORWARD(bf16)
PACKED_FORWARD(f16)
