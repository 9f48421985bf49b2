#include "common.cuh"

// Backward of what lies between the products of packed rows. Sums over rows go in two stages, each in a fixed order: block b adds
// the rows b, b + blocks, ..., then add_columns the blocks.

// Backward of norm_rows: d_normed and x (rows, width), row r of x being its row index[r] where there is `index`. The gradient of
// x is added to dx, or, where `fresh`, written to it; dx may be d_normed. d (rows, width) is dx as the products read it, if
// wanted. partial (blocks, width) gets the blocks' parts of the weight's gradient.
template <class T>
__device__ void norm_backward(const float *d_normed, const float *x, const u32 *index, const float *weight, float *dx, T *d,
                              float *partial, u32 rows, u32 width, float epsilon, u32 fresh) {
  constexpr u32 THREADS = 128, SIZE = Pack<float>::SIZE;
  __shared__ float room[THREADS / WARP];
  DYNAMIC_SHARED(memory);
  float *d_weight = reinterpret_cast<float *>(memory); // a thread reads and writes only columns of its own
  for (u32 i = SIZE * threadIdx.x; i < width; i += SIZE * THREADS) store_pack(d_weight + i, Pack<float>{});
  for (u64 row = blockIdx.x; row < rows; row += gridDim.x) {
    const float *from = x + u64(index ? index[row] : row) * width, *dy = d_normed + row * width;
    float squares = 0, along = 0;
    for (u32 i = SIZE * threadIdx.x; i < width; i += SIZE * THREADS) {
      Pack<float> of_x = load_pack(from + i), of_dy = load_pack(dy + i), w = load_pack(weight + i);
      for (u32 k = 0; k < SIZE; k++) {
        squares = fmaf(of_x.of[k], of_x.of[k], squares);
        along = fmaf(of_dy.of[k] * w.of[k], of_x.of[k], along);
      }
    }
    float scale = 1.0f / sqrtf(block_sum<THREADS>(squares, room) / width + epsilon);
    along = block_sum<THREADS>(along, room) * scale * scale * scale / width;
    for (u32 i = SIZE * threadIdx.x; i < width; i += SIZE * THREADS) {
      Pack<float> of_x = load_pack(from + i), of_dy = load_pack(dy + i), w = load_pack(weight + i);
      Pack<float> sum = load_pack(d_weight + i), out = {};
      if (!fresh) out = load_pack(dx + row * width + i);
      for (u32 k = 0; k < SIZE; k++) {
        sum.of[k] = fmaf(of_dy.of[k] * scale, of_x.of[k], sum.of[k]);
        out.of[k] += fmaf(of_dy.of[k] * w.of[k], scale, -along * of_x.of[k]);
      }
      store_pack(d_weight + i, sum);
      store_pack(dx + row * width + i, out);
      if (d)
        for (u32 k = 0; k < SIZE; k++) d[row * width + i + k] = from_float<T>(out.of[k]);
    }
  }
  for (u32 i = SIZE * threadIdx.x; i < width; i += SIZE * THREADS)
    store_pack(partial + u64(blockIdx.x) * width + i, load_pack(d_weight + i));
}

// partial (blocks, width) = sums of columns of x (rows, width). A grid of {columns / 128, blocks}.
template <class T> __device__ void column_sums(const T *x, float *partial, u32 rows, u32 width) {
  u32 column = blockIdx.x * 128 + threadIdx.x;
  if (column >= width) return;
  float sum = 0;
  for (u64 row = blockIdx.y; row < rows; row += gridDim.y) sum += to_float(x[row * width + column]);
  partial[u64(blockIdx.y) * width + column] = sum;
}

// sums (width) += the blocks' partial (blocks, width): eight chains over every eighth block, then over the chains.
KERNEL(256, add_columns, const float *partial, float *sums, u32 blocks, u32 width) {
  __shared__ float room[8][WARP];
  u32 column = blockIdx.x * WARP + threadIdx.x % WARP, chain = threadIdx.x / WARP;
  float sum = 0;
  if (column < width)
    for (u32 block = chain; block < blocks; block += 8) sum += partial[u64(block) * width + column];
  room[chain][threadIdx.x % WARP] = sum;
  __syncthreads();
  if (chain || column >= width) return;
  for (u32 other = 1; other < 8; other++) sum += room[other][threadIdx.x];
  sums[column] += sum;
}

// Backward of swiglu: gate_up (rows, 2 width) becomes its gradient, d_act (rows, width) becomes the activation again.
template <class T> __device__ void swiglu_backward(T *gate_up, T *d_act, u32 width) {
  constexpr u32 SIZE = Pack<T>::SIZE;
  T *gates = gate_up + 2 * u64(blockIdx.x) * width, *acts = d_act + u64(blockIdx.x) * width;
  for (u32 i = SIZE * threadIdx.x; i < width; i += SIZE * 256) {
    Pack<T> gate = load_pack(gates + i), up = load_pack(gates + width + i), act = load_pack(acts + i);
    for (u32 k = 0; k < SIZE; k++) {
      float g = to_float(gate.of[k]), u = to_float(up.of[k]), d = to_float(act.of[k]);
      float sigmoid = 1.0f / (1.0f + exp_of(-g)), silu = g * sigmoid;
      act.of[k] = from_float<T>(silu * u);
      up.of[k] = from_float<T>(d * silu);
      gate.of[k] = from_float<T>(d * u * sigmoid * (1.0f + g * (1.0f - sigmoid)));
    }
    store_pack(gates + i, gate), store_pack(gates + width + i, up), store_pack(acts + i, act);
  }
}

// Row from[b].. of `order` are added, in that order, to row to[b] of sums (.., width): block b's segment ends at from[b + 1].
KERNEL(256, add_rows, const float *x, const u32 *order, const u32 *from, const u32 *to, float *sums, u32 width) {
  u32 begin = from[blockIdx.x], end = from[blockIdx.x + 1];
  sums += u64(to[blockIdx.x]) * width;
  for (u32 i = threadIdx.x; i < width; i += 256) {
    float sum = 0;
    for (u32 k = begin; k < end; k++) sum += x[u64(order[k]) * width + i];
    sums[i] += sum;
  }
}

// dx (rows, width): in row r the sum of the rows order[from[r]].. of x, zero where there are none; d as the products read it.
template <class T>
__device__ void scatter_rows(const float *x, const u32 *order, const u32 *from, float *dx, T *d, u32 width) {
  u64 row = blockIdx.x;
  u32 begin = from[row], end = from[row + 1];
  for (u32 i = threadIdx.x; i < width; i += 256) {
    float sum = 0;
    for (u32 k = begin; k < end; k++) sum += x[u64(order[k]) * width + i];
    dx[row * width + i] = sum, d[row * width + i] = from_float<T>(sum);
  }
}

#define PACKED_BACKWARD(T)                                                                                                     \
  KERNEL(128, norm_backward_##T, const float *d_normed, const float *x, const u32 *index, const float *weight, float *dx,      \
         T *d, float *partial, u32 rows, u32 width, float epsilon, u32 fresh) {                                                \
    norm_backward<T>(d_normed, x, index, weight, dx, d, partial, rows, width, epsilon, fresh);                                 \
  }                                                                                                                            \
  KERNEL(128, column_sums_##T, const T *x, float *partial, u32 rows, u32 width) { column_sums<T>(x, partial, rows, width); }   \
  KERNEL(256, swiglu_backward_##T, T *gate_up, T *d_act, u32 width) { swiglu_backward<T>(gate_up, d_act, width); }             \
  KERNEL(256, scatter_rows_##T, const float *x, const u32 *order, const u32 *from, float *dx, T *d, u32 width) {               \
    scatter_rows<T>(x, order, from, dx, d, width);                                                                             \
  }
PACKED_BACKWARD(f32)
PACKED_BACKWARD(bf16)
PACKED_BACKWARD(f16)
