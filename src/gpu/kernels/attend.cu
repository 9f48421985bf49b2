#include "attend.cuh"

// Causal attention inside each packed sequence, and over all of its prefix; no scores are stored. One block per tile of query rows
// {sequence, first row} and head.
//
// qkv (T, (H + 2 K) E) after rope; out (T, H E); log_sum (T, H), of the scaled scores, for the backward.
// Dao 2023, https://arxiv.org/abs/2307.08691, algorithm 1.
template <class T, u32 E>
__device__ void attend(const T *qkv, const Sequence *sequences, const u32 *tiles, T *out, float *log_sum, u32 kv_heads,
                       float scale) {
  typedef Tiling<T, E> Tile;
  constexpr u32 OWN = Tile::OWN, OTHER = Tile::OTHER, STRIDE = Tile::STRIDE, ROOM = Left<T, OTHER>::ROOM;
  alignas(16) __shared__ T queries[OWN * STRIDE], keys[2][OTHER * STRIDE], values[2][OTHER * STRIDE], room[Tile::WARPS * ROOM];
  u32 heads = gridDim.y, head = blockIdx.y, kv_head = head / (heads / kv_heads);
  u32 warp = threadIdx.x / WARP, g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
  u64 width = u64(heads + 2 * kv_heads) * E;
  const Sequence sequence = sequences[tiles[2 * blockIdx.x]];
  u32 first = sequence.prefix_len + tiles[2 * blockIdx.x + 1], end = min(first + OWN, sequence.positions());
  u32 warp_first = first + 16 * warp, positions[2] = {warp_first + g, warp_first + g + 8};
  auto fetch = [&](u32 from, u32 stage) {
    load_positions<T, E, OTHER>(keys[stage], qkv + (heads + kv_head) * E, width, sequence, from, end);
    load_positions<T, E, OTHER>(values[stage], qkv + (heads + kv_heads + kv_head) * E, width, sequence, from, end);
    commit_copies();
  };

  load_positions<T, E, OWN>(queries, qkv + head * E, width, sequence, first, end);
  fetch(0, 0);
  meet_copies();
  Left<T, E> query;
  query.load(queries + 16 * warp * STRIDE, STRIDE);
  float sums[E / 8][4] = {}, top[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};
  for (u32 from = 0, stage = 0; from < end; from += OTHER, stage ^= 1) {
    meet_copies(); // the previous tile has been read
    if (from + OTHER < end) fetch(from + OTHER, stage ^ 1);
    if (from > warp_first + 15 || warp_first >= end) continue; // the warp has no rows, or they see nothing of this tile
    float scores[OTHER / 8][4] = {};
    multiply_rows<OTHER>(scores, query, keys[stage], STRIDE);
    if (from + OTHER > warp_first + 1) // some rows do not see all of the tile
      hide<OTHER>(scores, [&](u32 j, u32 i) { return from + 8 * j + 2 * t + i % 2 <= positions[i / 2]; });
    for (u32 half = 0; half < 2; half++) {
      float before = top[half], sum = 0;
      for (u32 j = 0; j < OTHER / 8; j++)
        for (u32 i = 2 * half; i < 2 * half + 2; i++) {
          scores[j][i] *= scale;
          top[half] = fmaxf(top[half], scores[j][i]);
        }
      top[half] = quad_max(top[half]);
      for (u32 j = 0; j < OTHER / 8; j++)
        for (u32 i = 2 * half; i < 2 * half + 2; i++) sum += scores[j][i] = exp_below(scores[j][i] - top[half]);
      float fade = exp_below(before - top[half]);
      total[half] = total[half] * fade + sum;
      for (u32 j = 0; j < E / 8; j++) sums[j][2 * half] *= fade, sums[j][2 * half + 1] *= fade;
    }
    Left<T, OTHER> weights;
    weights.take(scores, room + warp * ROOM);
    multiply_columns<E>(sums, weights, values[stage], STRIDE);
  }
  for (u32 half = 0; half < 2; half++) {
    float sum = quad_sum(total[half]);
    if (positions[half] >= end) continue;
    float share = 1 / sum;
    u64 at = u64(sequence.row(positions[half])) * heads + head;
    T *to = out + at * E + 2 * t;
    for (u32 j = 0; j < E / 8; j++) store_pair(to + 8 * j, sums[j][2 * half] * share, sums[j][2 * half + 1] * share);
    if (t == 0) log_sum[at] = top[half] + logf(sum);
  }
}

#define ATTEND(T, E)                                                                                                           \
  KERNEL_BESIDE((Tiling<T, E>::THREADS), (Tiling<T, E>::blocks(16)), attend_##T##_##E, const T *qkv,                           \
                const Sequence *sequences, const u32 *tiles, T *out, float *log_sum, u32 kv_heads, float scale) {              \
    attend<T, E>(qkv, sequences, tiles, out, log_sum, kv_heads, scale);                                                        \
  }
FOR_EACH_TYPE_AND_WIDTH(ATTEND)
