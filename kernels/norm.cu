#include "common.cuh"

// The residual stream x (rows, width) gets `splits` partial results (splits, rows, width) added, in their order; normed (rows,
// width) = x / rms(x) * weight. One block a row.
template <class T>
__device__ void add_norm(float *x, const float *partial, u32 splits, const float *weight, T *normed, u32 rows, u32 width,
                         float epsilon) {
  constexpr u32 THREADS = 256;
  __shared__ float room[THREADS / WARP];
  u64 row = blockIdx.x;
  float squares = 0;
  for (u32 i = threadIdx.x; i < width; i += THREADS) {
    float sum = x[row * width + i];
    for (u32 split = 0; split < splits; split++) sum += partial[(u64(split) * rows + row) * width + i];
    if (splits) x[row * width + i] = sum;
    squares = fmaf(sum, sum, squares);
  }
  float scale = 1.0f / sqrtf(block_sum<THREADS>(squares, room) / width + epsilon);
  for (u32 i = threadIdx.x; i < width; i += THREADS)
    normed[row * width + i] = from_float<T>(x[row * width + i] * scale * weight[i]);
}

#define ADD_NORM(T)                                                                                                            \
  KERNEL(256, add_norm_##T, float *x, const float *partial, u32 splits, const float *weight, T *normed, u32 rows, u32 width,   \
         float epsilon) {                                                                                                      \
    add_norm<T>(x, partial, splits, weight, normed, rows, width, epsilon);                                                     \
  }
ADD_NORM(f32)
ADD_NORM(bf16)
ADD_NORM(f16)
