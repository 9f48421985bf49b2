#include "common.cuh"
#include "narrow.cuh"

// The softmax over rows of logits, and its backward. The host passes some rows at a time; the logits of all rows never exist at once.

// Rows are `stride` numbers apart, a multiple of 4. For row r of logits (rows, vocabulary), times `scale` = 1 / temperature: stats
// (rows, 4) = log-probability of tokens[r], entropy (nats), the largest logit, log of the sum of e^(logit - largest). If a logit is NaN,
// so is the log-probability. One block per row.
KERNEL(256, head_stats, const float *logits, const u32 *tokens, float *stats, u32 vocabulary, u32 stride, float scale) {
  constexpr u32 THREADS = 256, SIZE = Pack<float>::SIZE;
  __shared__ float room[THREADS / WARP];
  const float *row = logits + u64(blockIdx.x) * stride;
  float top = -INFINITY, sum = 0, weighted = 0; // sums of e^(z - top) and of e^(z - top) (z - top)
  bool broken = false;
  for (u32 i = SIZE * threadIdx.x; i < vocabulary; i += SIZE * THREADS) {
    Pack<float> pack = load_pack(row + i);
    float before = top;
    for (u32 k = 0; k < SIZE; k++) {
      pack.of[k] = i + k < vocabulary ? pack.of[k] * scale : -INFINITY;
      broken |= !(pack.of[k] < INFINITY);
      top = fmaxf(top, pack.of[k]);
    }
    if (top > before && sum > 0) {
      float shifted = before - top, fade = exp_of(shifted);
      weighted = fade * (weighted + sum * shifted), sum *= fade;
    }
    for (u32 k = 0; k < SIZE; k++) {
      float shifted = pack.of[k] - top, e = exp_of(shifted);
      if (e > 0) sum += e, weighted = fmaf(e, shifted, weighted);
    }
  }
  float most = block_max<THREADS>(top, room), shifted = top - most, fade = exp_of(shifted);
  weighted = block_sum<THREADS>(sum > 0 && fade > 0 ? fade * (weighted + sum * shifted) : 0.0f, room);
  sum = block_sum<THREADS>(sum * fade, room);
  bool none = block_max<THREADS>(broken ? 1 : 0, room) > 0;
  if (threadIdx.x) return;
  float log_sum = none ? NAN : logf(sum), *of_row = stats + 4 * u64(blockIdx.x);
  of_row[0] = row[tokens[blockIdx.x]] * scale - most - log_sum;
  of_row[1] = log_sum - weighted / sum;
  of_row[2] = most, of_row[3] = log_sum;
}

// Replaces the logits of head_stats by their gradient in the type of the products, at the start of each row's memory, from slopes (rows,
// 2) = dloss / dlogprob, dloss / dentropy. One block per row. A turn overwrites only what it or an earlier turn has read, because the narrow numbers up to
// `begin + TURN` end no later than the wide ones: so one barrier between reads and writes is enough. The numbers written after the
// vocabulary, up to the end of a pack, are never read.
template <class T>
__device__ void head_backward(float *logits, const u32 *tokens, const float *stats, const float *slopes, u32 vocabulary,
                              u32 stride, float scale) {
  constexpr u32 THREADS = 512, SIZE = Pack<float>::SIZE, PACKS = 2, TURN = PACKS * SIZE * THREADS;
  u64 row = blockIdx.x;
  const float *from = logits + row * stride;
  T *to = reinterpret_cast<T *>(logits + row * stride);
  float slope = slopes[2 * row] * scale, entropy_slope = slopes[2 * row + 1] * scale;
  float entropy = stats[4 * row + 1], most = stats[4 * row + 2], log_sum = stats[4 * row + 3];
  u32 token = tokens[row];
  for (u32 begin = 0; begin < vocabulary; begin += TURN) {
    u32 first = begin + SIZE * threadIdx.x;
    Pack<float> packs[PACKS] = {};
#pragma unroll
    for (u32 j = 0; j < PACKS; j++)
      if (first + j * SIZE * THREADS < vocabulary) packs[j] = load_pack(from + first + j * SIZE * THREADS);
    __syncthreads();
#pragma unroll
    for (u32 j = 0; j < PACKS; j++) {
      u32 i = first + j * SIZE * THREADS;
      if (i >= vocabulary) break;
      for (u32 k = 0; k < SIZE; k++) {
        float log_p = packs[j].of[k] * scale - most - log_sum, p = exp_of(log_p);
        packs[j].of[k] = slope * ((i + k == token ? 1.0f : 0.0f) - p) - entropy_slope * p * (log_p + entropy);
      }
      store_narrow(to + i, packs[j]);
    }
  }
}

#define HEAD(T)                                                                                                                \
  KERNEL(512, head_backward_##T, float *logits, const u32 *tokens, const float *stats, const float *slopes, u32 vocabulary,    \
         u32 stride, float scale) {                                                                                            \
    head_backward<T>(logits, tokens, stats, slopes, vocabulary, stride, scale);                                                \
  }
HEAD(f32)
HEAD(bf16)
HEAD(f16)
