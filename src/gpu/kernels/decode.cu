#include "slots.cuh"
#include "tile.cuh"

// Starts samples in slots, one per block, with nothing drawn yet. `starts` is (6, samples): slot, prompt, prompt_len, both words of the
// random key, sample. With a repetition penalty, a slot's set of tokens starts as that of its prompt; without one, `words` is 0.
KERNEL(128, start_slots, u32 *state, u32 count, const u32 *starts, const u32 *prompt_seen, u32 *seen, u32 words) {
  Slots slots{state, count};
  auto number = [&](u32 which) { return starts[which * gridDim.x + blockIdx.x]; };
  u32 slot = number(0), prompt = number(1);
  if (threadIdx.x == 0) {
    slots.at(Slots::DRAWN, slot) = 0;
    slots.at(Slots::PROMPT, slot) = prompt;
    slots.at(Slots::PROMPT_LEN, slot) = number(2);
    slots.at(Slots::KEY_LOW, slot) = number(3);
    slots.at(Slots::KEY_HIGH, slot) = number(4);
    slots.at(Slots::SAMPLE, slot) = number(5);
    slots.at(Slots::RUNNING, slot) = 1;
  }
  for (u32 i = threadIdx.x; i < words; i += 128) seen[u64(slot) * words + i] = prompt_seen[u64(prompt) * words + i];
}

// Computes the set of a prompt's tokens, one bit per token.
KERNEL(256, mark_seen, const u32 *tokens, u32 len, u32 *seen, u32 words) {
  for (u32 i = threadIdx.x; i < words; i += 256) seen[i] = 0;
  __syncthreads();
  for (u32 i = threadIdx.x; i < len; i += 256) atomicOr(&seen[tokens[i] / 32], 1u << tokens[i] % 32);
}

// x (rows, width) = the embedding of the last token of each row's slot. One block per row. As the first kernel of a step, it also clears
// `largest`, which a later kernel raises: a separate clear between them would make them wait.
template <class T>
__device__ void embed_slots(Slots slots, const u32 *slot_of_row, const T *embedding, float *x, u32 width, u32 *largest) {
  let_next_begin();
  if (largest && threadIdx.x == 0) largest[blockIdx.x] = 0;
  u32 slot = slot_of_row[blockIdx.x];
  bool runs = slots.runs(slot);
  const T *from = embedding + (runs ? u64(slots.at(Slots::TOKEN, slot)) * width : 0);
  for (u32 i = threadIdx.x; i < width; i += 128) x[u64(blockIdx.x) * width + i] = runs ? to_float(from[i]) : 0.0f;
}

constexpr u32 MAX_GROUP = 8;     // query heads of one key head: half the rows of the matrix instruction
constexpr u32 PARTS_AT_ONCE = 8; // partial sums that are read before the first is added

// What the attention of one layer in a decode step reads and writes. Caches are (slot, K, capacity, E).
template <class T> struct DecodeAttention {
  Slots slots;
  const u32 *slot_of_row;
  const float *partial; // (splits, rows, (H + 2 K) E): queries, keys, values before bias, norms and rope
  u32 splits;
  const float *bias;  // ((H + 2 K) E), or none
  const float *norms; // (2 E) of queries and keys, or none
  float epsilon;
  const float *rope;  // cosines, then sines, (positions, E / 2) each
  u32 positions;
  const T *prompt_keys, *prompt_values;
  u32 prompt_capacity;
  T *keys, *values;
  u32 capacity;
  T *out; // (rows, H E)
  u32 heads, kv_heads;

  // Number `column` of row `blockIdx.x` of the product: the bias plus the partial sums, in order.
  __device__ float product(u32 column, u32 width) const {
    const float *part = partial + u64(blockIdx.x) * width + column;
    float sum = bias ? bias[column] : 0.0f;
    for (u32 split = 0; split < splits; split += PARTS_AT_ONCE) {
      float parts[PARTS_AT_ONCE];
#pragma unroll
      for (u32 k = 0; k < PARTS_AT_ONCE; k++) parts[k] = split + k < splits ? part[u64(split + k) * gridDim.x * width] : 0.0f;
#pragma unroll
      for (u32 k = 0; k < PARTS_AT_ONCE; k++) sum += parts[k];
    }
    return sum;
  }
};

// Keys and values of the earlier tokens of a sequence, for one key head, (positions, E).
template <class T, u32 E> struct Cached {
  const T *prompt_keys, *prompt_values, *keys, *values;
  u32 prompt_len, position; // this token's position, at least 1

  __device__ const T *key(u32 at) const { return row(prompt_keys, keys, at); }
  __device__ const T *value(u32 at) const { return row(prompt_values, values, at); }
  // Nothing is cached from this token's position on; the last row is returned instead.
  __device__ const T *row(const T *in_prompt, const T *since, u32 at) const {
    at = min(at, position - 1);
    return at < prompt_len ? in_prompt + u64(at) * E : since + u64(at - prompt_len) * E;
  }
};

// Queries, key and value of this token in shared memory, rounded as in training.
template <class T, u32 E> struct Fresh {
  alignas(16) T queries[MAX_GROUP][E], key[E], value[E];
};

// The result of one warp, to be merged with those of the others.
template <u32 E> struct Seen {
  float largest[MAX_GROUP], total[MAX_GROUP], sums[MAX_GROUP][E];
};

// One warp's part of the attention, CHUNK positions at a time. All keys of a chunk are loaded into registers and all values into shared
// memory at once, because to wait for one position after the other would dominate a step. Scores are products of 16 rows, the queries,
// with 8 columns, the positions; their exponentials have the register layout of a left operand. The 8 rows beyond the group's hold the
// rounding errors of the weights.
template <class T, u32 E> struct Attender {
  static constexpr u32 CHUNK = E > 64 ? 16 : 32, HALVES = (E + 31) / 32, STRIDE = E + Pack<T>::SIZE; // rows start in different banks
  // Shared memory of a warp, for values and then for its result.
  struct alignas(16) Room {
    T values[CHUNK * STRIDE];
    __device__ Seen<E> &seen() {
      static_assert(sizeof(Seen<E>) <= sizeof values);
      return *reinterpret_cast<Seen<E> *>(values);
    }
  };
  Room &room;
  uint4 key[CHUNK / 8][HALVES]; // of position 8 n + g, packs t and t + 4; the queries permute the depth alike
  float sums[E / 8][4] = {}, top = -INFINITY, total = 0;

  __device__ Attender(Room &own) : room(own) {}
  static __device__ u32 lane() { return threadIdx.x % WARP; }
  static __device__ u32 g() { return lane() / 4; }
  static __device__ u32 t() { return lane() % 4; }
  static __device__ uint4 pack(const T *row, u32 half) {
    u32 at = (4 * half + t()) * 8;
    return at < E ? *reinterpret_cast<const uint4 *>(row + at) : make_uint4(0, 0, 0, 0);
  }

  __device__ void fetch(const Cached<T, E> &cached, u32 first) {
    constexpr u32 PACKS = E / Pack<T>::SIZE;
#pragma unroll
    for (u32 n = 0; n < CHUNK / 8; n++) {
      const T *row = cached.key(first + 8 * n + g());
#pragma unroll
      for (u32 half = 0; half < HALVES; half++) key[n][half] = pack(row, half);
    }
    __syncwarp(); // the previous values have been read
#pragma unroll
    for (u32 i = lane(); i < CHUNK * PACKS; i += WARP) {
      u32 at = i / PACKS, column = i % PACKS * Pack<T>::SIZE;
      copy16(room.values + at * STRIDE + column, cached.value(first + at) + column, true);
    }
    commit_copies();
  }

  // Attends to the positions that `fetch` loaded.
  __device__ void see(const Fresh<T, E> &fresh, u32 first, u32 last) {
    float scores[CHUNK / 8][4] = {};
#pragma unroll
    for (u32 half = 0; half < HALVES; half++) {
      uint4 query = pack(fresh.queries[g()], half);
#pragma unroll
      for (u32 n = 0; n < CHUNK / 8; n++) {
        uint4 there = first + 8 * n + g() == last ? pack(fresh.key, half) : key[n][half];
        multiply_tile<T>(scores[n], {query.x, 0, query.y, 0}, {there.x, there.y});
        multiply_tile<T>(scores[n], {query.z, 0, query.w, 0}, {there.z, there.w});
      }
    }
    float before = top;
#pragma unroll
    for (u32 n = 0; n < CHUNK / 8; n++)
      for (u32 i = 0; i < 2; i++) {
        scores[n][i] = first + 8 * n + 2 * t() + i <= last ? scores[n][i] * rsqrtf(float(E)) : -INFINITY;
        top = fmaxf(top, scores[n][i]);
      }
    top = quad_max(top);
    float keep = exp_of(before - top);
    total *= keep;
#pragma unroll
    for (u32 n = 0; n < CHUNK / 8; n++)
      for (u32 i = 0; i < 2; i++) {
        float weight = exp_of(scores[n][i] - top), rounded = to_float(from_float<T>(weight));
        total += weight, scores[n][i] = rounded, scores[n][2 + i] = weight - rounded;
      }
#pragma unroll
    for (u32 j = 0; j < E / 8; j++)
      for (u32 i = 0; i < 4; i++) sums[j][i] *= keep;
    wait_copies<0>();
    __syncwarp(); // the copies of the other lanes have arrived, too
    if (last - first < CHUNK)
      for (u32 i = lane(); i < E; i += WARP) room.values[(last - first) * STRIDE + i] = fresh.value[i];
    __syncwarp();
    Left<T, CHUNK> weights;
    weights.take(scores, nullptr);
    multiply_columns<E>(sums, weights, room.values, STRIDE);
  }

  __device__ void tell() const {
    float all = quad_sum(total);
    __syncwarp(); // all values have been read
    Seen<E> &seen = room.seen();
    if (t() == 0) seen.largest[g()] = top, seen.total[g()] = all;
#pragma unroll
    for (u32 j = 0; j < E / 8; j++)
      for (u32 i = 0; i < 2; i++) seen.sums[g()][8 * j + 2 * t() + i] = sums[j][i] + sums[j][2 + i];
  }
};

// The same in f32 on plain arithmetic, for checks, not for speed. A lane computes the score of one position, and every 32nd column of the
// values.
template <u32 E> struct Attender<float, E> {
  static constexpr u32 CHUNK = WARP, DIMS = (E + WARP - 1) / WARP;
  struct Room {
    Seen<E> of_warp;
    __device__ Seen<E> &seen() { return of_warp; }
  };
  Room &room;
  const Cached<float, E> *cached;
  float sums[MAX_GROUP][DIMS] = {}, top[MAX_GROUP], total[MAX_GROUP] = {};

  __device__ Attender(Room &own) : room(own) {
    for (u32 g = 0; g < MAX_GROUP; g++) top[g] = -INFINITY;
  }
  __device__ void fetch(const Cached<float, E> &from, u32) { cached = &from; }

  __device__ void see(const Fresh<float, E> &fresh, u32 first, u32 last) {
    const u32 lane = threadIdx.x % WARP, at = first + lane;
    const float *key = at == last ? fresh.key : cached->key(at);
    for (u32 g = 0; g < MAX_GROUP; g++) {
      float score = 0;
      for (u32 i = 0; i < E; i++) score = fmaf(fresh.queries[g][i], key[i], score);
      score = at <= last ? score * rsqrtf(float(E)) : -INFINITY;
      float before = top[g];
      top[g] = fmaxf(before, warp_max(score));
      float weight = exp_of(score - top[g]), keep = exp_of(before - top[g]);
      total[g] = total[g] * keep + warp_sum(weight);
      for (u32 i = 0; i < DIMS; i++) sums[g][i] *= keep;
      for (u32 j = 0; j < WARP; j++) {
        const float *value = first + j >= last ? fresh.value : cached->value(first + j);
        float of_j = __shfl_sync(ALL_LANES, weight, j);
        for (u32 i = 0; i < DIMS; i++) sums[g][i] = fmaf(of_j, value[(lane + i * WARP) % E], sums[g][i]);
      }
    }
  }

  __device__ void tell() const {
    const u32 lane = threadIdx.x % WARP;
    Seen<E> &seen = room.seen();
    for (u32 g = 0; g < MAX_GROUP; g++) {
      if (lane == 0) seen.largest[g] = top[g], seen.total[g] = total[g];
      for (u32 i = 0; i < DIMS; i++)
        if (lane + i * WARP < E) seen.sums[g][lane + i * WARP] = sums[g][i];
    }
  }
};

// Adds bias, norms and rope to this token's queries, key and value, caches key and value, and computes the attention of the group's
// queries over prompt and completion. One block per row and key head. Chunks of positions go to the warps in turn, and the results are merged in the
// order of the warps. With few blocks, many WARPS hide latency; with many blocks, fewer warps let more blocks run at once.
template <class T, u32 E, u32 WARPS> __device__ __forceinline__ void decode_attention(const DecodeAttention<T> &a) {
  typedef Attender<T, E> Warps;
  constexpr u32 THREADS = WARPS * WARP, HALF = E / 2, STRIDE = WARPS * Warps::CHUNK;
  constexpr u32 ROUNDS = ((MAX_GROUP + 2) * HALF + THREADS - 1) / THREADS;
  constexpr u32 LANES = HALF < WARP ? HALF : WARP, PARTS = HALF / LANES; // lanes with numbers of the same head, and how many such parts
  __shared__ Fresh<T, E> fresh;
  __shared__ typename Warps::Room rooms[WARPS];
  __shared__ float squares[MAX_GROUP + 2][PARTS];
  const u32 row = blockIdx.x, head = blockIdx.y, group = a.heads / a.kv_heads;
  const u32 slot = a.slot_of_row[row], warp = threadIdx.x / WARP;
  T *out = a.out + (u64(row) * a.heads + head * group) * E;
  let_next_begin();
  const u32 any = slot == Slots::NONE ? 0 : slot; // loads all fields of a slot at once; they only change at the end of a step
  const u32 running = a.slots.at(Slots::RUNNING, any), prompt_at = a.slots.at(Slots::PROMPT, any);
  const u32 prompt_len = a.slots.at(Slots::PROMPT_LEN, any), drawn = a.slots.at(Slots::DRAWN, any);
  if (slot == Slots::NONE || !running) {
    wait_for_previous();
    for (u32 i = threadIdx.x; i < group * E; i += THREADS) out[i] = from_float<T>(0.0f);
    return;
  }
  const u32 position = prompt_len + drawn - 1; // this token's position
  const u64 own = (u64(slot) * a.kv_heads + head) * a.capacity * E;
  const u64 prompt = (u64(prompt_at) * a.kv_heads + head) * a.prompt_capacity * E;
  const Cached<T, E> cached{a.prompt_keys + prompt, a.prompt_values + prompt, a.keys + own, a.values + own, prompt_len, position};
  Warps attender(rooms[warp]);
  u32 first = warp * Warps::CHUNK;
  if (first <= position) attender.fetch(cached, first); // keys and values of earlier steps

  // Numbers i and i + E / 2 of the group's queries, the key and the value. Rope rotates them, except for the value, by the angle of the
  // position.
  float cosine[ROUNDS], sine[ROUNDS], low[ROUNDS], high[ROUNDS];
#pragma unroll
  for (u32 round = 0; round < ROUNDS; round++) {
    u64 angle = u64(position) * HALF + (threadIdx.x + round * THREADS) % HALF;
    cosine[round] = a.rope[angle], sine[round] = a.rope[u64(a.positions) * HALF + angle];
  }
  wait_for_previous();
#pragma unroll
  for (u32 round = 0; round < ROUNDS; round++) {
    u32 i = threadIdx.x + round * THREADS, of = i / HALF;
    if (of >= group + 2) break;
    u32 column = (of < group ? head * group + of : a.heads + (of - group) * a.kv_heads + head) * E + i % HALF;
    u32 width = (a.heads + 2 * a.kv_heads) * E;
    low[round] = a.product(column, width), high[round] = a.product(column + HALF, width);
  }
  if (a.norms) {
#pragma unroll
    for (u32 round = 0; round < ROUNDS; round++) {
      u32 i = threadIdx.x + round * THREADS, of = i / HALF;
      bool any = of < group + 2;
      float x = low[round] = any ? to_float(from_float<T>(low[round])) : 0; // training keeps the rounded numbers
      float y = high[round] = any ? to_float(from_float<T>(high[round])) : 0;
      float sum = fmaf(x, x, y * y);
      for (u32 far = LANES / 2; far > 0; far /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, far);
      if (any && i % LANES == 0) squares[of][i % HALF / LANES] = sum;
    }
    __syncthreads();
#pragma unroll
    for (u32 round = 0; round < ROUNDS; round++) {
      u32 i = threadIdx.x + round * THREADS, of = i / HALF, at = i % HALF;
      if (of > group) break; // a value has no norm
      float sum = 0;
      for (u32 part = 0; part < PARTS; part++) sum += squares[of][part];
      const float scale = 1.0f / sqrtf(sum / E + a.epsilon), *weight = a.norms + (of == group ? E : 0);
      low[round] *= scale * weight[at], high[round] *= scale * weight[at + HALF];
    }
  }
#pragma unroll
  for (u32 round = 0; round < ROUNDS; round++) {
    u32 i = threadIdx.x + round * THREADS, of = i / HALF, at = i % HALF;
    if (of >= group + 2) break;
    float x = low[round], y = high[round], c = cosine[round], s = sine[round];
    T *to = of < group ? fresh.queries[of] : of == group ? fresh.key : fresh.value;
    to[at] = from_float<T>(of > group ? x : x * c - y * s), to[at + HALF] = from_float<T>(of > group ? y : y * c + x * s);
  }
  for (u32 i = group * E + threadIdx.x; i < MAX_GROUP * E; i += THREADS) fresh.queries[i / E][i % E] = from_float<T>(0.0f);
  __syncthreads();
  for (u32 i = threadIdx.x; i < E; i += THREADS) {
    u64 at = own + u64(drawn - 1) * E + i;
    a.keys[at] = fresh.key[i], a.values[at] = fresh.value[i];
  }

  for (; first <= position; first += STRIDE) {
    if (first >= STRIDE) attender.fetch(cached, first);
    attender.see(fresh, first, position);
  }
  attender.tell();
  __syncthreads();
  for (u32 i = threadIdx.x; i < group * E; i += THREADS) {
    u32 g = i / E;
    float top = rooms[0].seen().largest[g], over = 0, under = 0;
#pragma unroll
    for (u32 w = 1; w < WARPS; w++) top = fmaxf(top, rooms[w].seen().largest[g]);
#pragma unroll
    for (u32 w = 0; w < WARPS; w++) {
      const Seen<E> &seen = rooms[w].seen();
      float keep = exp_of(seen.largest[g] - top);
      over = fmaf(seen.sums[g][i % E], keep, over), under = fmaf(seen.total[g], keep, under);
    }
    out[i] = from_float<T>(over / under);
  }
}

#define DECODE_ATTENTION(T, E, WARPS)                                                                                          \
  KERNEL_BESIDE(WARPS *WARP, (E > 64 ? 12 : 16) / WARPS, decode_attention_##T##_##E##_##WARPS, u32 *state, u32 count,          \
                const u32 *slot_of_row, const float *partial, u32 splits, const float *bias, const float *norms,               \
                float epsilon, const float *rope, u32 positions, const T *prompt_keys, const T *prompt_values,                 \
                u32 prompt_capacity, T *keys, T *values, u32 capacity, T *out, u32 heads, u32 kv_heads) {                      \
    decode_attention<T, E, WARPS>({{state, count}, slot_of_row, partial, splits, bias, norms, epsilon, rope, positions,        \
                                   prompt_keys, prompt_values, prompt_capacity, keys, values, capacity, out, heads, kv_heads});\
  }
#define DECODE_ATTENTION_OF(T, E) DECODE_ATTENTION(T, E, 8) DECODE_ATTENTION(T, E, 2)
#define DECODE(T)                                                                                                              \
  KERNEL(128, embed_slots_##T, u32 *state, u32 count, const u32 *slot_of_row, const T *embedding, float *x, u32 width,         \
         u32 *largest) {                                                                                                       \
    embed_slots<T>({state, count}, slot_of_row, embedding, x, width, largest);                                                 \
  }                                                                                                                            \
  DECODE_ATTENTION_OF(T, 16) DECODE_ATTENTION_OF(T, 32) DECODE_ATTENTION_OF(T, 64) DECODE_ATTENTION_OF(T, 128)
DECODE(f32)
DECODE(bf16)
DECODE(f16)

// Copies keys and values of packed prompts to their caches, (slots, K, capacity, E): row `blockIdx.x` of qkv (rows, (H + 2 K) E) is
// position `place[2 row + 1]` of the prompt at `place[2 row]`.
template <class T>
__device__ void cache_rows(const T *qkv, const u32 *place, T *keys, T *values, u32 capacity, u32 heads, u32 kv_heads, u32 dim) {
  const u32 slot = place[2 * blockIdx.x], position = place[2 * blockIdx.x + 1];
  const T *row = qkv + u64(blockIdx.x) * (heads + 2 * kv_heads) * dim + heads * dim;
  for (u32 i = threadIdx.x; i < 2 * kv_heads * dim; i += 128) {
    u32 head = i / dim % kv_heads;
    T *cache = i < kv_heads * dim ? keys : values;
    cache[((u64(slot) * kv_heads + head) * capacity + position) * dim + i % dim] = row[i];
  }
}

#define CACHE_ROWS(T)                                                                                                          \
  KERNEL(128, cache_rows_##T, const T *qkv, const u32 *place, T *keys, T *values, u32 capacity, u32 heads, u32 kv_heads,       \
         u32 dim) {                                                                                                            \
    cache_rows<T>(qkv, place, keys, values, capacity, heads, kv_heads, dim);                                                   \
  }
CACHE_ROWS(f32)
CACHE_ROWS(bf16)
CACHE_ROWS(f16)
