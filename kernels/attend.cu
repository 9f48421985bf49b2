#include "attend.cuh"

// Causal attention inside each packed sequence, and over all of its prefix; no scores are stored. One block a tile of query rows
// {sequence, first row} and head.
//
// qkv (T, (H + 2 K) E) after rope; out (T, H E); log_sum (T, H), of the scaled scores, for the backward.
// Dao 2023, https://arxiv.org/abs/2307.08691, algorithm 1.
template <class T, u32 E>
__device__ void attend(const T *qkv, const Sequence *sequences, const u32 *tiles, T *out, float *log_sum, u32 kv_heads,
                       float scale) {
  typedef Tiling<T, E> Tile;
  alignas(16) __shared__ T queries[Tile::OWN * Tile::STRIDE], keys[Tile::OTHER * Tile::STRIDE],
      values[Tile::OTHER * Tile::STRIDE], room[Tile::WARPS * Left<T, Tile::OTHER>::ROOM];
  u32 heads = gridDim.y, head = blockIdx.y, kv_head = head / (heads / kv_heads);
  u32 warp = threadIdx.x / WARP, g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
  u64 width = u64(heads + 2 * kv_heads) * E;
  const Sequence sequence = sequences[tiles[2 * blockIdx.x]];
  u32 first = sequence.prefix_len + tiles[2 * blockIdx.x + 1], end = min(first + Tile::OWN, sequence.positions());
  u32 positions[2] = {first + 16 * warp + g, first + 16 * warp + g + 8};

  load_positions<T, E, Tile::OWN>(queries, qkv + head * E, width, sequence, first, end);
  finish_copies();
  Left<T, E> query;
  query.load(queries + 16 * warp * Tile::STRIDE, Tile::STRIDE);
  float sums[E / 8][4] = {}, top[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};
  for (u32 from = 0; from < end; from += Tile::OTHER) {
    __syncthreads(); // the tile before has been read
    load_positions<T, E, Tile::OTHER>(keys, qkv + (heads + kv_head) * E, width, sequence, from, end);
    load_positions<T, E, Tile::OTHER>(values, qkv + (heads + kv_heads + kv_head) * E, width, sequence, from, end);
    finish_copies();
    if (from > first + 16 * warp + 15) continue; // the warp's rows see nothing of it
    float scores[Tile::OTHER / 8][4] = {};
    multiply_rows<Tile::OTHER>(scores, query, keys, Tile::STRIDE);
    for (u32 half = 0; half < 2; half++) {
      float before = top[half], sum = 0;
      for (u32 j = 0; j < Tile::OTHER / 8; j++)
        for (u32 i = 2 * half; i < 2 * half + 2; i++) {
          scores[j][i] = from + 8 * j + 2 * t + i % 2 <= positions[half] ? scores[j][i] * scale : -INFINITY;
          top[half] = fmaxf(top[half], scores[j][i]);
        }
      top[half] = quad_max(top[half]);
      for (u32 j = 0; j < Tile::OTHER / 8; j++)
        for (u32 i = 2 * half; i < 2 * half + 2; i++) sum += scores[j][i] = exp_of(scores[j][i] - top[half]);
      float fade = exp_of(before - top[half]);
      total[half] = total[half] * fade + sum;
      for (u32 j = 0; j < E / 8; j++) sums[j][2 * half] *= fade, sums[j][2 * half + 1] *= fade;
    }
    Left<T, Tile::OTHER> weights;
    weights.take(scores, room + warp * Left<T, Tile::OTHER>::ROOM);
    multiply_columns<E>(sums, weights, values, Tile::STRIDE);
  }
  for (u32 half = 0; half < 2; half++) {
    float sum = quad_sum(total[half]);
    if (positions[half] >= end) continue;
    u64 at = u64(sequence.row(positions[half])) * heads + head;
    for (u32 j = 0; j < E / 8; j++) store_pair(out + at * E + 8 * j + 2 * t, sums[j][2 * half] / sum, sums[j][2 * half + 1] / sum);
    if (t == 0) log_sum[at] = top[half] + logf(sum);
  }
}

#define ATTEND(T, E)                                                                                                           \
  KERNEL((Tiling<T, E>::THREADS), attend_##T##_##E, const T *qkv, const Sequence *sequences, const u32 *tiles, T *out,       \
         float *log_sum, u32 kv_heads, float scale) {                                                                          \
    attend<T, E>(qkv, sequences, tiles, out, log_sum, kv_heads, scale);                                                        \
  }
FOR_EACH_TYPE_AND_WIDTH(ATTEND)
