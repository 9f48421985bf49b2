#include "common.cuh"
#include "narrow.cuh"

// The backward pass over packed rows, between its products. Sums over rows have two stages, each in a fixed order: each block adds up
// rows at a fixed distance, then add_columns adds up the blocks.

// Backward of norm_rows: d_normed and x (rows, width); with `index`, row r was computed from row index[r] of x. The gradient of x is
// added to dx or, if `fresh`, written to it; dx may be d_normed. d (rows, width), if not null, is dx rounded for products. partial
// (blocks, width) receives the blocks' partial sums of the weight's gradient. One warp per row. Only the first `warps` of a block work,
// as many as shared memory allows: each has its own sums for the weight, which are added at the end in the order of the warps.
template <class T>
__device__ void norm_backward(const float *d_normed, const float *x, const u32 *index, const float *weight, float *dx, T *d,
                              float *partial, u32 rows, u32 width, float epsilon, u32 fresh, u32 warps) {
  constexpr u32 THREADS = 256, SIZE = Pack<float>::SIZE, PACKS = 8, TURN = PACKS * SIZE * WARP;
  DYNAMIC_SHARED(memory);
  float *sums = reinterpret_cast<float *>(memory); // (warps, width)
  const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  float *own = sums + warp * width; // a lane reads and writes only its own columns
  Pack<float> of_x[PACKS], of_dy[PACKS];
  if (warp < warps)
    for (u32 i = SIZE * lane; i < width; i += SIZE * WARP) store_pack(own + i, Pack<float>{});
  for (u64 row = u64(blockIdx.x) * warps + warp; warp < warps && row < rows; row += u64(gridDim.x) * warps) {
    const float *from = x + u64(index ? index[row] : row) * width, *dy = d_normed + row * width;
    float *of_dx = dx + row * width;
    auto load = [&](u32 first) {
#pragma unroll
      for (u32 j = 0; j < PACKS; j++) {
        u32 i = first + j * SIZE * WARP;
        of_x[j] = i < width ? load_pack(from + i) : Pack<float>{}, of_dy[j] = i < width ? load_pack(dy + i) : Pack<float>{};
      }
    };
    float squares = 0, along = 0;
    for (u32 first = SIZE * lane; first < width; first += TURN) {
      load(first);
#pragma unroll
      for (u32 j = 0; j < PACKS; j++) {
        u32 i = first + j * SIZE * WARP;
        Pack<float> w = i < width ? load_pack(weight + i) : Pack<float>{};
        for (u32 k = 0; k < SIZE; k++) {
          squares = fmaf(of_x[j].of[k], of_x[j].of[k], squares);
          along = fmaf(of_dy[j].of[k] * w.of[k], of_x[j].of[k], along);
        }
      }
    }
    float scale = 1.0f / sqrtf(warp_sum(squares) / width + epsilon);
    along = warp_sum(along) * scale * scale * scale / width;
    for (u32 first = SIZE * lane; first < width; first += TURN) {
      if (width > TURN) load(first); // otherwise the registers still hold it
      Pack<float> out[PACKS] = {};
#pragma unroll
      for (u32 j = 0; j < PACKS; j++)
        if (!fresh && first + j * SIZE * WARP < width) out[j] = load_pack(of_dx + first + j * SIZE * WARP);
#pragma unroll
      for (u32 j = 0; j < PACKS; j++) {
        u32 i = first + j * SIZE * WARP;
        if (i >= width) continue;
        Pack<float> w = load_pack(weight + i), sum = load_pack(own + i);
        for (u32 k = 0; k < SIZE; k++) {
          sum.of[k] = fmaf(of_dy[j].of[k] * scale, of_x[j].of[k], sum.of[k]);
          out[j].of[k] += fmaf(of_dy[j].of[k] * w.of[k], scale, -along * of_x[j].of[k]);
        }
        store_pack(own + i, sum);
        store_narrow(of_dx + i, out[j]);
        if (d) store_narrow(d + row * width + i, out[j]);
      }
    }
  }
  __syncthreads();
  for (u32 i = SIZE * threadIdx.x; i < width; i += SIZE * THREADS) {
    Pack<float> sum = load_pack(sums + i);
    for (u32 other = 1; other < warps; other++) {
      Pack<float> more = load_pack(sums + other * width + i);
      for (u32 k = 0; k < SIZE; k++) sum.of[k] += more.of[k];
    }
    store_pack(partial + u64(blockIdx.x) * width + i, sum);
  }
}

// partial (blocks, width) = partial sums of the columns of x (rows, width). The grid is {columns / 128, blocks}.
template <class T> __device__ void column_sums(const T *x, float *partial, u32 rows, u32 width) {
  u32 column = blockIdx.x * 128 + threadIdx.x;
  if (column >= width) return;
  float sum = 0;
  for (u64 row = blockIdx.y; row < rows; row += gridDim.y) sum += to_float(x[row * width + column]);
  partial[u64(blockIdx.y) * width + column] = sum;
}

// sums (width) += partial (blocks, width): eight chains add up every eighth block, then the chains are added up.
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

// Backward of swiglu. Replaces gate_up (rows, 2 width) by its gradient, and d_act (rows, width) by the activation.
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

// Block b adds the rows order[from[b]..from[b + 1]] of x, in that order, to row to[b] of sums (.., width).
KERNEL(256, add_rows, const float *x, const u32 *order, const u32 *from, const u32 *to, float *sums, u32 width) {
  u32 begin = from[blockIdx.x], end = from[blockIdx.x + 1];
  sums += u64(to[blockIdx.x]) * width;
  for (u32 i = threadIdx.x; i < width; i += 256) {
    float sum = 0;
    for (u32 k = begin; k < end; k++) sum += x[u64(order[k]) * width + i];
    sums[i] += sum;
  }
}

// Row r of dx (rows, width) = the sum of the rows order[from[r]..from[r + 1]] of x, zero if there are none; d is dx rounded for products.
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
  KERNEL(256, norm_backward_##T, const float *d_normed, const float *x, const u32 *index, const float *weight, float *dx,      \
         T *d, float *partial, u32 rows, u32 width, float epsilon, u32 fresh, u32 warps) {                                     \
    norm_backward<T>(d_normed, x, index, weight, dx, d, partial, rows, width, epsilon, fresh, warps);                          \
  }                                                                                                                            \
  KERNEL(128, column_sums_##T, const T *x, float *partial, u32 rows, u32 width) { column_sums<T>(x, partial, rows, width); }   \
  KERNEL(256, swiglu_backward_##T, T *gate_up, T *d_act, u32 width) { swiglu_backward<T>(gate_up, d_act, width); }             \
  KERNEL(256, scatter_rows_##T, const float *x, const u32 *order, const u32 *from, float *dx, T *d, u32 width) {               \
    scatter_rows<T>(x, order, from, dx, d, width);                                                                             \
  }
PACKED_BACKWARD(f32)
PACKED_BACKWARD(bf16)
PACKED_BACKWARD(f16)
