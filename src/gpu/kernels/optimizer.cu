#include "common.cuh"

// sums[b] = sum of the squares of x[from[2 b] .. from[2 b + 1]], in f64, so that no finite f32 overflows. Both ends are multiples of 4.
KERNEL(256, square_sums, const float *x, const u64 *from, double *sums) {
  constexpr u32 SIZE = Pack<float>::SIZE;
  __shared__ double room[256 / WARP];
  const u64 end = from[2 * blockIdx.x + 1];
  double sum = 0;
  for (u64 i = from[2 * blockIdx.x] + SIZE * threadIdx.x; i < end; i += SIZE * 256) {
    Pack<float> pack = load_pack(x + i);
    for (u32 k = 0; k < SIZE; k++) sum += double(pack.of[k]) * double(pack.of[k]);
  }
  sum = block_sum<256>(sum, room);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// `Rule` of src/optim/update.rs.
struct Rule {
  float gradient_scale, keep, first_rate, second_keep, second_rate, correction_root, epsilon, step_size;
};

template <class T> using Four = Few<T, 4>;

// Stores a second moment, in bf16 with stochastic rounding, as src/optim/update.rs does.
__device__ __forceinline__ void hold(float x, u32, float &to) { to = x; }
__device__ __forceinline__ void hold(float x, u32 word, bf16 &to) {
  to = from_float<bf16>(__uint_as_float((__float_as_uint(x) + (word & 0xffffu)) & 0xffff0000u));
}

// AdamW on `count` numbers, with moments of type M; sets the gradients to zero. The numbers before `split`, the matrices, decay and are
// copied to `low`, the others to `high`. The operations and their order are those of src/optim/update.rs, none of them fused, so that
// the bits are the same.
template <class T, class M>
__device__ void adamw(float *weights, float *gradients, M *first, M *second, T *low, float *high, u64 count, u64 split,
                      const Rule &rule, u32 key_low, u32 key_high) {
  u64 block = u64(blockIdx.x) * 256 + threadIdx.x, i = 4 * block;
  if (i >= count) return;
  Four<float> *w_at = reinterpret_cast<Four<float> *>(weights) + block, *g_at = reinterpret_cast<Four<float> *>(gradients) + block;
  Four<M> *m_at = reinterpret_cast<Four<M> *>(first) + block, *v_at = reinterpret_cast<Four<M> *>(second) + block;
  Four<float> w = *w_at, g = *g_at;
  Four<M> m = *m_at, v = *v_at;
  Four<T> copy;
  u32 words[4] = {u32(block), u32(block >> 32), 0, 0};
  if (sizeof(M) < sizeof(float)) philox(words, key_low, key_high);
  float keep = i < split ? rule.keep : 1;
  for (u32 k = 0; k < 4; k++) {
    float slope = __fmul_rn(g.of[k], rule.gradient_scale), weight = __fmul_rn(w.of[k], keep);
    float mean = to_float(m.of[k]), square = to_float(v.of[k]);
    mean = __fadd_rn(mean, __fmul_rn(rule.first_rate, __fsub_rn(slope, mean)));
    square = __fadd_rn(__fmul_rn(square, rule.second_keep), __fmul_rn(__fmul_rn(rule.second_rate, slope), slope));
    float root = __fadd_rn(sqrtf(square) / rule.correction_root, rule.epsilon);
    w.of[k] = __fsub_rn(weight, __fmul_rn(rule.step_size, mean) / root);
    m.of[k] = from_float<M>(mean);
    hold(square, words[k], v.of[k]);
    copy.of[k] = from_float<T>(w.of[k]);
  }
  *w_at = w, *m_at = m, *v_at = v, *g_at = Four<float>{};
  if (i < split)
    *reinterpret_cast<Four<T> *>(low + i) = copy;
  else
    *reinterpret_cast<Four<float> *>(high + (i - split)) = w;
}

#define ADAMW(T, M)                                                                                                            \
  KERNEL(256, adamw_##T##_##M, float *weights, float *gradients, M *first, M *second, T *low, float *high, u64 count,          \
         u64 split, float gradient_scale, float keep, float first_rate, float second_keep, float second_rate,                  \
         float correction_root, float epsilon, float step_size, u32 key_low, u32 key_high) {                                   \
    Rule rule = {gradient_scale, keep, first_rate, second_keep, second_rate, correction_root, epsilon, step_size};             \
    adamw<T, M>(weights, gradients, first, second, low, high, count, split, rule, key_low, key_high);                          \
  }
ADAMW(f32, f32)
ADAMW(bf16, f32)
ADAMW(f16, f32)
ADAMW(f32, bf16)
ADAMW(bf16, bf16)
ADAMW(f16, bf16)

// sum[o, i] = base[o, i] + the sum over r of (factor b[o, r]) a[r, i], in f32, rounded to T. The sum over r is added in parts of DEPTH, as
// src/model/matmul/outer.rs does for src/model/adapter, so that the bits are the same. A block has 8 rows, each thread 4 columns of them.
template <class T>
__device__ void merge_adapter(const float *base, const float *a, const float *b, T *sum, u32 width, u32 rank, float factor) {
  constexpr u32 ROWS = 8, DEPTH = 128;
  u32 column = 4 * (blockIdx.y * 256 + threadIdx.x);
  if (column >= width) return;
  u64 first = u64(blockIdx.x) * ROWS;
  Four<float> rows[ROWS];
  for (u32 o = 0; o < ROWS; o++) rows[o] = *reinterpret_cast<const Four<float> *>(base + (first + o) * width + column);
  for (u32 from = 0; from < rank; from += DEPTH) {
    Four<float> part[ROWS] = {};
    for (u32 r = from; r < rank && r < from + DEPTH; r++) {
      Four<float> along = *reinterpret_cast<const Four<float> *>(a + u64(r) * width + column);
      for (u32 o = 0; o < ROWS; o++) {
        float scaled = __fmul_rn(factor, b[(first + o) * rank + r]);
        for (u32 k = 0; k < 4; k++) part[o].of[k] = fmaf(scaled, along.of[k], part[o].of[k]);
      }
    }
    for (u32 o = 0; o < ROWS; o++)
      for (u32 k = 0; k < 4; k++) rows[o].of[k] = __fadd_rn(rows[o].of[k], part[o].of[k]);
  }
  for (u32 o = 0; o < ROWS; o++) {
    Four<T> rounded;
    for (u32 k = 0; k < 4; k++) rounded.of[k] = from_float<T>(rows[o].of[k]);
    *reinterpret_cast<Four<T> *>(sum + (first + o) * width + column) = rounded;
  }
}

#define MERGE_ADAPTER(T)                                                                                                       \
  KERNEL(256, merge_adapter_##T, const float *base, const float *a, const float *b, T *sum, u32 width, u32 rank,               \
         float factor) {                                                                                                       \
    merge_adapter<T>(base, a, b, sum, width, rank, factor);                                                                    \
  }
MERGE_ADAPTER(f32)
MERGE_ADAPTER(bf16)
MERGE_ADAPTER(f16)
