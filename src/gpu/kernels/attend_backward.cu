#include "attend.cuh"

// Attention backward from the log-sum-exp that the forward pass saved: probabilities are computed again, and there are no atomics.
// Dao 2023, https://arxiv.org/abs/2307.08691, algorithm 2, once for the queries and once for keys and values.

// For the row of a query: the logarithm of the sum of its weights, and the sum of d_out * out.
struct alignas(8) OfQuery {
  float log_sum, along;
};

// Probabilities and score gradients of 16 rows and N columns. `p` holds products of queries and keys, -INFINITY where a key is not
// visible, and becomes the probabilities. `ds` holds products of d_out and values, and becomes the gradients of the products of
// queries and keys. `of` returns the query of an element.
template <u32 N, class Of>
__device__ __forceinline__ void score_gradients(float (&p)[N / 8][4], float (&ds)[N / 8][4], float scale, const Of &of) {
  for (u32 j = 0; j < N / 8; j++)
    for (u32 i = 0; i < 4; i++) {
      const OfQuery query = of(j, i);
      p[j][i] = exp_below(p[j][i] * scale - query.log_sum);
      ds[j][i] = p[j][i] * (ds[j][i] - query.along) * scale;
    }
}

// What the forward pass saved, and the gradient of its output.
template <class T> struct Attended {
  const T *qkv, *out, *d_out; // (T, (H + 2 K) E), (T, H E) twice
  const float *log_sum;       // (T, H)
};

// Writes gradients of queries before rope to the first H E columns of d_qkv, and along (T, H) = sum of d_out * out. One block per tile
// of query rows {sequence, first row} and head.
template <class T, u32 E>
__device__ void attend_queries(const Attended<T> &kept, const Sequence *sequences, const u32 *tiles, const float *rope, u32 table,
                               T *d_qkv, float *along, u32 kv_heads, float scale) {
  typedef Tiling<T, E> Tile;
  constexpr u32 OWN = Tile::OWN, OTHER = Tile::OTHER, STRIDE = Tile::STRIDE, ROOM = Left<T, OTHER>::ROOM;
  alignas(16) __shared__ T queries[OWN * STRIDE], gradients[OWN * STRIDE], keys[2][OTHER * STRIDE], values[2][OTHER * STRIDE],
      room[Tile::WARPS * ROOM];
  u32 heads = gridDim.y, head = blockIdx.y, kv_head = head / (heads / kv_heads);
  u32 warp = threadIdx.x / WARP, g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
  u64 width = u64(heads + 2 * kv_heads) * E, out_width = u64(heads) * E;
  const Sequence sequence = sequences[tiles[2 * blockIdx.x]];
  u32 first = sequence.prefix_len + tiles[2 * blockIdx.x + 1], end = min(first + OWN, sequence.positions());
  u32 warp_first = first + 16 * warp, positions[2] = {warp_first + g, warp_first + g + 8};
  auto fetch = [&](u32 from, u32 stage) {
    load_positions<T, E, OTHER>(keys[stage], kept.qkv + (heads + kv_head) * E, width, sequence, from, end);
    load_positions<T, E, OTHER>(values[stage], kept.qkv + (heads + kv_heads + kv_head) * E, width, sequence, from, end);
    commit_copies();
  };

  load_positions<T, E, OWN>(queries, kept.qkv + head * E, width, sequence, first, end);
  load_positions<T, E, OWN>(gradients, kept.d_out + head * E, out_width, sequence, first, end);
  fetch(0, 0);
  meet_copies();
  OfQuery of_rows[2];
  for (u32 half = 0; half < 2; half++) {
    u64 at = u64(sequence.row(min(positions[half], end - 1))) * heads + head;
    const T *out = kept.out + at * E, *d_out = gradients + (positions[half] - first) * STRIDE;
    float sum = 0;
    for (u32 e = 4 * t; e < E; e += 16) {
      const Few<T, 4> a = *reinterpret_cast<const Few<T, 4> *>(d_out + e), b = *reinterpret_cast<const Few<T, 4> *>(out + e);
      for (u32 k = 0; k < 4; k++) sum = fmaf(to_float(a.of[k]), to_float(b.of[k]), sum);
    }
    of_rows[half] = {kept.log_sum[at], quad_sum(sum)};
    if (t == 0 && positions[half] < end) along[at] = of_rows[half].along;
  }
  Left<T, E> query, gradient;
  query.load(queries + 16 * warp * STRIDE, STRIDE);
  gradient.load(gradients + 16 * warp * STRIDE, STRIDE);
  float d[E / 8][4] = {};
  for (u32 from = 0, stage = 0; from < end; from += OTHER, stage ^= 1) {
    meet_copies(); // the previous tile has been read
    if (from + OTHER < end) fetch(from + OTHER, stage ^ 1);
    if (from > warp_first + 15 || warp_first >= end) continue; // the warp has no rows, or they see nothing of this tile
    float p[OTHER / 8][4] = {}, ds[OTHER / 8][4] = {};
    multiply_rows<OTHER>(p, query, keys[stage], STRIDE);
    multiply_rows<OTHER>(ds, gradient, values[stage], STRIDE);
    if (from + OTHER > warp_first + 1) // some rows do not see all of the tile
      hide<OTHER>(p, [&](u32 j, u32 i) { return from + 8 * j + 2 * t + i % 2 <= positions[i / 2]; });
    score_gradients<OTHER>(p, ds, scale, [&](u32, u32 i) { return of_rows[i / 2]; });
    Left<T, OTHER> weights;
    weights.take(ds, room + warp * ROOM);
    multiply_columns<E>(d, weights, keys[stage], STRIDE);
  }
  turn_back<E>(d, positions, rope, table);
  for (u32 half = 0; half < 2; half++) {
    if (positions[half] >= end) continue;
    T *to = d_qkv + sequence.row(positions[half]) * width + head * E + 2 * t;
    for (u32 j = 0; j < E / 8; j++) store_pair(to + 8 * j, d[j][2 * half], d[j][2 * half + 1]);
  }
}

// Writes the gradients of keys before rope and of values that come from the queries of one sequence, to its rows of partial (entries,
// 2 K E). One block per tile of positions {sequence, first position} and key head.
template <class T, u32 E>
__device__ void attend_keys(const Attended<T> &kept, const float *along, const Sequence *sequences, const u32 *tiles,
                            const float *rope, u32 table, float *partial, u32 heads, float scale) {
  typedef Tiling<T, E> Tile;
  constexpr u32 OWN = Tile::OWN, OTHER = Tile::OTHER, STRIDE = Tile::STRIDE, ROOM = Left<T, OTHER>::ROOM;
  static_assert(OTHER <= Tile::THREADS);
  alignas(16) __shared__ T keys[OWN * STRIDE], values[OWN * STRIDE], queries[2][OTHER * STRIDE], gradients[2][OTHER * STRIDE],
      room[Tile::WARPS * ROOM];
  alignas(16) __shared__ OfQuery of_queries[2][OTHER];
  u32 kv_heads = gridDim.y, kv_head = blockIdx.y, group = heads / kv_heads;
  u32 warp = threadIdx.x / WARP, g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
  u64 width = u64(heads + 2 * kv_heads) * E, out_width = u64(heads) * E;
  const Sequence sequence = sequences[tiles[2 * blockIdx.x]];
  u32 first = tiles[2 * blockIdx.x + 1], all = sequence.positions(), end = min(first + OWN, all);
  u32 warp_first = first + 16 * warp, positions[2] = {warp_first + g, warp_first + g + 8};
  auto fetch = [&](u32 head, u32 from, u32 stage) {
    load_positions<T, E, OTHER>(queries[stage], kept.qkv + head * E, width, sequence, from, all);
    load_positions<T, E, OTHER>(gradients[stage], kept.d_out + head * E, out_width, sequence, from, all);
    if (threadIdx.x < OTHER) {
      u64 at = u64(sequence.row(min(from + threadIdx.x, all - 1))) * heads + head;
      copy4(&of_queries[stage][threadIdx.x].log_sum, kept.log_sum + at);
      copy4(&of_queries[stage][threadIdx.x].along, along + at);
    }
    commit_copies();
  };

  u32 begin = max(first, sequence.prefix_len), steps = (all - begin + OTHER - 1) / OTHER;
  load_positions<T, E, OWN>(keys, kept.qkv + (heads + kv_head) * E, width, sequence, first, end);
  load_positions<T, E, OWN>(values, kept.qkv + (heads + kv_heads + kv_head) * E, width, sequence, first, end);
  fetch(kv_head * group, begin, 0);
  meet_copies();
  Left<T, E> key, value;
  key.load(keys + 16 * warp * STRIDE, STRIDE);
  value.load(values + 16 * warp * STRIDE, STRIDE);
  float d_key[E / 8][4] = {}, d_value[E / 8][4] = {};
  u32 head = kv_head * group, from = begin;
  for (u32 step = 0; step < group * steps; step++) {
    u32 stage = step % 2, now = from;
    from += OTHER;
    if (from >= all) head++, from = begin;
    meet_copies(); // the previous tile has been read
    if (step + 1 < group * steps) fetch(head, from, stage ^ 1);
    if (now + OTHER <= warp_first || warp_first >= end) continue; // the warp has no rows, or nothing in this tile sees them
    float p[OTHER / 8][4] = {}, ds[OTHER / 8][4] = {};
    if (E > 64) key.load(keys + 16 * warp * STRIDE, STRIDE); // loaded per tile, because there are not enough registers to keep it
    multiply_rows<OTHER>(p, key, queries[stage], STRIDE);
    multiply_rows<OTHER>(ds, value, gradients[stage], STRIDE);
    if (now < warp_first + 15 || now + OTHER > all) // some of the tile does not see all rows
      hide<OTHER>(p, [&](u32 j, u32 i) {
        u32 query = now + 8 * j + 2 * t + i % 2;
        return positions[i / 2] <= query && query < all;
      });
    score_gradients<OTHER>(p, ds, scale, [&](u32 j, u32 i) {
      return reinterpret_cast<const Few<OfQuery, 2> *>(of_queries[stage] + 8 * j + 2 * t)->of[i % 2];
    });
    Left<T, OTHER> weights;
    weights.take(p, room + warp * ROOM);
    multiply_columns<E>(d_value, weights, gradients[stage], STRIDE);
    weights.take(ds, room + warp * ROOM);
    multiply_columns<E>(d_key, weights, queries[stage], STRIDE);
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

// Writes the last `width` columns of d_qkv (rows, qkv_width): sums of partial (entries, width) over the sequences that read a row, in
// order. One block per row.
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
  KERNEL_BESIDE((Tiling<T, E>::THREADS), (Tiling<T, E>::blocks(16)), attend_queries_##T##_##E, const T *qkv, const T *out,     \
                const T *d_out, const float *log_sum, const Sequence *sequences, const u32 *tiles, const float *rope,          \
                u32 table, T *d_qkv, float *along, u32 kv_heads, float scale) {                                                \
    attend_queries<T, E>({qkv, out, d_out, log_sum}, sequences, tiles, rope, table, d_qkv, along, kv_heads, scale);            \
  }                                                                                                                            \
  KERNEL_BESIDE((Tiling<T, E>::THREADS), (Tiling<T, E>::blocks(12)), attend_keys_##T##_##E, const T *qkv, const T *d_out,      \
                const float *log_sum, const float *along, const Sequence *sequences, const u32 *tiles, const float *rope,      \
                u32 table, float *partial, u32 heads, float scale) {                                                           \
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
