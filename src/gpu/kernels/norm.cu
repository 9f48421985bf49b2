#include "common.cuh"
#include "narrow.cuh"

constexpr u32 ADDED_AT_ONCE = 10; // partial sums that are read before the first is added

// Adds `splits` partial sums (splits, rows, width) to the residual stream x (rows, width), in order; normed (rows, width) =
// x / rms(x) * weight. One block per row. Between two products the time is that of waiting for memory, so a thread loads everything
// that its first columns need at once, and keeps their sums in registers: up to a width of 1,024 it has no other columns.
template <class T>
__device__ void add_norm(float *x, const float *partial, u32 splits, const float *weight, T *normed, u32 rows, u32 width,
                         float epsilon) {
  constexpr u32 THREADS = 256, SIZE = Pack<float>::SIZE;
  __shared__ float room[THREADS / WARP];
  const u64 row = u64(blockIdx.x) * width, part = u64(rows) * width;
  const u32 first = SIZE * threadIdx.x, second = first + SIZE * THREADS;
  x += row, partial += row, normed += row;
  float squares = 0;
  auto add = [&](u32 i) {
    Pack<float> sum = load_pack(x + i);
    const float *from = partial + i;
    for (u32 split = 0; split < splits; split += ADDED_AT_ONCE) {
      Pack<float> more[ADDED_AT_ONCE] = {};
#pragma unroll
      for (u32 k = 0; k < ADDED_AT_ONCE; k++, from += part)
        if (split + k < splits) more[k] = load_pack(from);
#pragma unroll
      for (u32 k = 0; k < ADDED_AT_ONCE; k++)
        for (u32 e = 0; e < SIZE; e++) sum.of[e] += more[k].of[e];
    }
    if (splits) store_pack(x + i, sum);
    for (u32 e = 0; e < SIZE; e++) squares = fmaf(sum.of[e], sum.of[e], squares);
    return sum;
  };
  Pack<float> sum = {}, w = {};
  let_next_begin();
  if (first < width) w = load_pack(weight + first);
  wait_for_previous();
  if (first < width) sum = add(first);
  for (u32 i = second; i < width; i += SIZE * THREADS) add(i);
  const float scale = 1.0f / sqrtf(block_sum<THREADS>(squares, room) / width + epsilon);
  auto norm = [&](u32 i, const Pack<float> &sum, const Pack<float> &w) {
    Pack<float> out;
    for (u32 e = 0; e < SIZE; e++) out.of[e] = sum.of[e] * scale * w.of[e];
    store_narrow(normed + i, out);
  };
  if (first < width) norm(first, sum, w);
  for (u32 i = second; i < width; i += SIZE * THREADS) norm(i, load_pack(x + i), load_pack(weight + i));
}

#define ADD_NORM(T)                                                                                                            \
  KERNEL_ALONE(256, add_norm_##T, float *x, const float *partial, u32 splits, const float *weight, T *normed, u32 rows,        \
               u32 width, float epsilon) {                                                                                     \
    add_norm<T>(x, partial, splits, weight, normed, rows, width, epsilon);                                                     \
  }
ADD_NORM(f32)
ADD_NORM(bf16)
ADD_NORM(f16)
