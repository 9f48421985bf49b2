#include "attend.cuh"

// Attention backward from the log-sum-exp that the forward saved: probabilities are computed again, nothing is added by atomics.
// Dao 2023, https://arxiv.org/abs/2307.08691, algorithm 2, once for the queries and once for keys and values.

// Probabilities and gradients of the scores of 16 rows and N columns: `p` in: products of queries and keys, out: probabilities;
// `ds` in: products of d_out and values, out: gradients of those products. `of` gives {log_sum, along, visible} of an element.
template <u32 N, class Of>
__device__ __forceinline__ void score_gradients(float (&p)[N / 8][4], float (&ds)[N / 8][4], float scale, const Of &of) {
  for (u32 j = 0; j < N / 8; j++)
    for (u32 i = 0; i < 4; i++) {
      float log_sum, along;
      bool visible = of(j, i, log_sum, along);
      p[j][i] = visible ? exp_of(p[j][i] * scale - log_sum) : 0;
      ds[j][i] = visible ? p[j][i] * (ds[j][i] - along) * scale : 0;
    }
}

// What the forward left, and the gradient of what it gave.
template <class T> struct Attended {
  const T *qkv, *out, *d_out; // (T, (H + 2 K) E), (T, H E) twice
  const float *log_sum;       // (T, H)
};

// Gradients of queries, turned back, into the first H E columns of d_qkv; along (T, H) = sum of d_out * out. One block a tile of
// query rows {sequence, first row} and head.
template <class T, u32 E>
__device__ void attend_queries(const Attended<T> &kept, const Sequence *sequences, const u32 *tiles, const float *rope, u32 table,
                               T *d_qkv, float *along, u32 kv_heads, float scale) {
  typedef Tiling<T, E> Tile;
  constexpr u32 OWN = Tile::OWN, OTHER = Tile::OTHER, STRIDE = Tile::STRIDE, ROOM = Left<T, OTHER>::ROOM;
  alignas(16) __shared__ T queries[OWN * STRIDE], gradients[OWN * STRIDE], keys[OTHER * STRIDE], values[OTHER * STRIDE],
      room[Tile::WARPS * ROOM];
  u32 heads = gridDim.y, head = blockIdx.y, kv_head = head / (heads / kv_heads);
  u32 warp = threadIdx.x / WARP, g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
  u64 width = u64(heads + 2 * kv_heads) * E, out_width = u64(heads) * E;
  const Sequence sequence = sequences[tiles[2 * blockIdx.x]];
  u32 first = sequence.prefix_len + tiles[2 * blockIdx.x + 1], end = min(first + OWN, sequence.positions());
  u32 positions[2] = {first + 16 * warp + g, first + 16 * warp + g + 8};

  load_positions<T, E, OWN>(queries, kept.qkv + head * E, width, sequence, first, end);
  load_positions<T, E, OWN>(gradients, kept.d_out + head * E, out_width, sequence, first, end);
  finish_copies();
  float log_sum[2], sums[2];
  for (u32 half = 0; half < 2; half++) {
    u64 at = u64(sequence.row(min(positions[half], end - 1))) * heads + head;
    const T *out = kept.out + at * E, *d_out = gradients + (positions[half] - first) * STRIDE;
    float sum = 0;
    for (u32 e = t; e < E; e += 4) sum = fmaf(to_float(d_out[e]), to_float(out[e]), sum);
    sums[half] = quad_sum(sum), log_sum[half] = kept.log_sum[at];
    if (t == 0 && positions[half] < end) along[at] = sums[half];
  }
  Left<T, E> query, gradient;
  query.load(queries + 16 * warp * STRIDE, STRIDE);
  gradient.load(gradients + 16 * warp * STRIDE, STRIDE);
  float d[E / 8][4] = {};
  for (u32 from = 0; from < end; from += OTHER) {
    __syncthreads(); // the tile before has been read
    load_positions<T, E, OTHER>(keys, kept.qkv + (heads + kv_head) * E, width, sequence, from, end);
    load_positions<T, E, OTHER>(values, kept.qkv + (heads + kv_heads + kv_head) * E, width, sequence, from, end);
    finish_copies();
    if (from > first + 16 * warp + 15) continue; // the warp's rows see nothing of it
    float p[OTHER / 8][4] = {}, ds[OTHER / 8][4] = {};
    multiply_rows<OTHER>(p, query, keys, STRIDE);
    multiply_rows<OTHER>(ds, gradient, values, STRIDE);
    score_gradients<OTHER>(p, ds, scale, [&](u32 j, u32 i, float &of_log_sum, float &of_along) {
      of_log_sum = log_sum[i / 2], of_along = sums[i / 2];
      return from + 8 * j + 2 * t + i % 2 <= positions[i / 2];
    });
    Left<T, OTHER> weights;
    weights.take(ds, room + warp * ROOM);
    multiply_columns<E>(d, weights, keys, STRIDE);
  }
  turn_back<E>(d, positions, rope, table);
  for (u32 half = 0; half < 2; half++) {
    if (positions[half] >= end) continue;
    T *to = d_qkv + sequence.row(positions[half]) * width + head * E + 2 * t;
    for (u32 j = 0; j < E / 8; j++) store_pair(to + 8 * j, d[j][2 * half], d[j][2 * half + 1]);
  }
}

// Gradients of keys, turned back, and of values that come from the queries of one sequence, into its rows of partial (entries,
// 2 K E). One block a tile of positions {sequence, first position} and key head.
template <class T, u32 E>
__device__ void attend_keys(const Attended<T> &kept, const float *along, const Sequence *sequences, const u32 *tiles,
                            const float *rope, u32 table, float *partial, u32 heads, float scale) {
  typedef Tiling<T, E> Tile;
  constexpr u32 OWN = Tile::OWN, OTHER = Tile::OTHER, STRIDE = Tile::STRIDE, ROOM = Left<T, OTHER>::ROOM;
  alignas(16) __shared__ T keys[OWN * STRIDE], values[OWN * STRIDE], queries[OTHER * STRIDE], gradients[OTHER * STRIDE],
      room[Tile::WARPS * ROOM];
  __shared__ float log_sums[OTHER], alongs[OTHER];
  u32 kv_heads = gridDim.y, kv_head = blockIdx.y, group = heads / kv_heads;
  u32 warp = threadIdx.x / WARP, g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
  u64 width = u64(heads + 2 * kv_heads) * E, out_width = u64(heads) * E;
  const Sequence sequence = sequences[tiles[2 * blockIdx.x]];
  u32 first = tiles[2 * blockIdx.x + 1], all = sequence.positions(), end = min(first + OWN, all);
  u32 positions[2] = {first + 16 * warp + g, first + 16 * warp + g + 8};

  load_positions<T, E, OWN>(keys, kept.qkv + (heads + kv_head) * E, width, sequence, first, end);
  load_positions<T, E, OWN>(values, kept.qkv + (heads + kv_heads + kv_head) * E, width, sequence, first, end);
  finish_copies();
  Left<T, E> key, value;
  key.load(keys + 16 * warp * STRIDE, STRIDE);
  float d_key[E / 8][4] = {}, d_value[E / 8][4] = {};
  for (u32 head = kv_head * group; head < (kv_head + 1) * group; head++)
    for (u32 from = max(first, sequence.prefix_len); from < all; from += OTHER) {
      __syncthreads(); // the tile before has been read
      load_positions<T, E, OTHER>(queries, kept.qkv + head * E, width, sequence, from, all);
      load_positions<T, E, OTHER>(gradients, kept.d_out + head * E, out_width, sequence, from, all);
      for (u32 i = threadIdx.x; i < OTHER; i += Tile::THREADS) {
        u64 at = u64(sequence.row(min(from + i, all - 1))) * heads + head;
        log_sums[i] = kept.log_sum[at], alongs[i] = along[at];
      }
      finish_copies();
      float p[OTHER / 8][4] = {}, ds[OTHER / 8][4] = {};
      if (E > 32) key.load(keys + 16 * warp * STRIDE, STRIDE); // again for each tile: there are not registers to keep all
      multiply_rows<OTHER>(p, key, queries, STRIDE);
      value.load(values + 16 * warp * STRIDE, STRIDE);
      multiply_rows<OTHER>(ds, value, gradients, STRIDE);
      score_gradients<OTHER>(p, ds, scale, [&](u32 j, u32 i, float &log_sum, float &of_along) {
        u32 column = 8 * j + 2 * t + i % 2, query = from + column;
        log_sum = log_sums[column], of_along = alongs[column];
        return positions[i / 2] <= query && query < all;
      });
      Left<T, OTHER> weights;
      weights.take(p, room + warp * ROOM);
      multiply_columns<E>(d_value, weights, gradients, STRIDE);
      weights.take(ds, room + warp * ROOM);
      multiply_columns<E>(d_key, weights, queries, STRIDE);
    }
  turn_back<E>(d_key, positions, rope, table);
  for (u32 half = 0; half < 2; half++) {
    if (positions[half] >= end) continue;
    float *to = partial + (u64(sequence.entry + positions[half]) * 2 * kv_heads + kv_head) * E + 2 * t;
    for (u32 j = 0; j < E / 8; j++) {
      store_pair(to + 8 * j, d_key[j][2 * half], d_key[j][2 * half + 1]);
      store_pair(to + kv_heads * E + 8 * j, d_value[j][2 * half], d_value[j][2 * half + 1]);
    }
  }
}

// The last `width` columns of d_qkv (rows, qkv_width): the sums over the sequences that read a row, in their order, of partial
// (entries, width). One block a row.
template <class T>
__device__ void join_keys(const float *partial, const Sequence *sequences, const u32 *owners, const u32 *positions, T *d_qkv,
                          u32 width, u32 qkv_width) {
  u64 row = blockIdx.x;
  const Sequence *own = sequences + owners[row];
  u32 position = positions[row], readers = own->readers;
  for (u32 i = threadIdx.x; i < width; i += 128) {
    float sum = 0;
    for (u32 reader = 0; reader <= readers; reader++) sum += partial[u64(own[reader].entry + position) * width + i];
    d_qkv[row * qkv_width + qkv_width - width + i] = from_float<T>(sum);
  }
}

#define ATTEND_BACKWARD(T, E)                                                                                                  \
  KERNEL((Tiling<T, E>::THREADS), attend_queries_##T##_##E, const T *qkv, const T *out, const T *d_out, const float *log_sum,  \
         const Sequence *sequences, const u32 *tiles, const float *rope, u32 table, T *d_qkv, float *along, u32 kv_heads,      \
         float scale) {                                                                                                        \
    attend_queries<T, E>({qkv, out, d_out, log_sum}, sequences, tiles, rope, table, d_qkv, along, kv_heads, scale);            \
  }                                                                                                                            \
  KERNEL((Tiling<T, E>::THREADS), attend_keys_##T##_##E, const T *qkv, const T *d_out, const float *log_sum,                   \
         const float *along, const Sequence *sequences, const u32 *tiles, const float *rope, u32 table, float *partial,        \
         u32 heads, float scale) {                                                                                             \
    attend_keys<T, E>({qkv, nullptr, d_out, log_sum}, along, sequences, tiles, rope, table, partial, heads, scale);            \
  }
FOR_EACH_TYPE_AND_WIDTH(ATTEND_BACKWARD)

#define JOIN_KEYS(T)                                                                                                           \
  KERNEL(128, join_keys_##T, const float *partial, const Sequence *sequences, const u32 *owners, const u32 *positions,         \
         T *d_qkv, u32 width, u32 qkv_width) {                                                                                 \
    join_keys<T>(partial, sequences, owners, positions, d_qkv, width, qkv_width);                                              \
  }
JOIN_KEYS(f32)
JOIN_KEYS(bf16)
JOIN_KEYS(f16)
