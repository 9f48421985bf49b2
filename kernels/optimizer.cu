#include "common.cuh"

// sums[b] = sum of the squares of x[from[2 b] .. from[2 b + 1]], in f64, so that no finite f32 overflows.
KERNEL(256, square_sums, const float *x, const u64 *from, double *sums) {
  __shared__ double room[256 / WARP];
  double sum = 0;
  for (u64 i = from[2 * blockIdx.x] + threadIdx.x; i < from[2 * blockIdx.x + 1]; i += 256) sum += double(x[i]) * double(x[i]);
  sum = block_sum<256>(sum, room);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// The numbers of an update, as src/optim.rs has them.
struct Rule {
  float gradient_scale, keep, first_rate, second_keep, second_rate, correction_root, epsilon, step_size;
};

// AdamW on `count` numbers; gradients become zero. Those before `split`, the matrices, decay, and are copied to
// `low`, the others to `high`. The operations and their order are those of src/optim.rs, and none are fused: the same bits.
template <class T>
__device__ void adamw(float *weights, float *gradients, float *first, float *second, T *low, float *high, u64 count, u64 split,
                      const Rule &rule) {
  constexpr u32 SIZE = Pack<float>::SIZE;
  u64 i = SIZE * (u64(blockIdx.x) * 256 + threadIdx.x);
  if (i >= count) return;
  Pack<float> w = load_pack(weights + i), g = load_pack(gradients + i), m = load_pack(first + i), v = load_pack(second + i);
  float keep = i < split ? rule.keep : 1;
  for (u32 k = 0; k < SIZE; k++) {
    float slope = __fmul_rn(g.of[k], rule.gradient_scale), weight = __fmul_rn(w.of[k], keep);
    m.of[k] = __fadd_rn(m.of[k], __fmul_rn(rule.first_rate, __fsub_rn(slope, m.of[k])));
    v.of[k] = __fadd_rn(__fmul_rn(v.of[k], rule.second_keep), __fmul_rn(__fmul_rn(rule.second_rate, slope), slope));
    float root = __fadd_rn(sqrtf(v.of[k]) / rule.correction_root, rule.epsilon);
    w.of[k] = __fsub_rn(weight, __fmul_rn(rule.step_size, m.of[k]) / root);
  }
  store_pack(weights + i, w), store_pack(first + i, m), store_pack(second + i, v);
  store_pack(gradients + i, Pack<float>{});
  if (i < split)
    for (u32 k = 0; k < SIZE; k++) low[i + k] = from_float<T>(w.of[k]);
  else
    store_pack(high + (i - split), w);
}

#define ADAMW(T)                                                                                                               \
  KERNEL(256, adamw_##T, float *weights, float *gradients, float *first, float *second, T *low, float *high, u64 count,        \
         u64 split, float gradient_scale, float keep, float first_rate, float second_keep, float second_rate,                  \
         float correction_root, float epsilon, float step_size) {                                                              \
    adamw<T>(weights, gradients, first, second, low, high, count, split,                                                       \
             {gradient_scale, keep, first_rate, second_keep, second_rate, correction_root, epsilon, step_size});               \
  }
ADAMW(f32)
ADAMW(bf16)
ADAMW(f16)
