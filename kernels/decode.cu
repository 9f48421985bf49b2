#include "slots.cuh"

// Samples start in slots, one a block: nothing drawn, the prompt's cache at its place, draws named by key and sample. `starts` is
// (6, starts): slot, prompt, prompt_len, both words of the key, sample. With a repetition penalty a slot's set of tokens seen starts
// as the prompt's; `words` is 0 without.
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

// The set of tokens of a prompt, one bit a token.
KERNEL(256, mark_seen, const u32 *tokens, u32 len, u32 *seen, u32 words) {
  for (u32 i = threadIdx.x; i < words; i += 256) seen[i] = 0;
  __syncthreads();
  for (u32 i = threadIdx.x; i < len; i += 256) atomicOr(&seen[tokens[i] / 32], 1u << tokens[i] % 32);
}

// x (rows, width) = the embedding of the last token of each row's slot. One block a row.
template <class T>
__device__ void embed_slots(Slots slots, const u32 *slot_of_row, const T *embedding, float *x, u32 width) {
  u32 slot = slot_of_row[blockIdx.x];
  bool runs = slots.runs(slot);
  const T *from = embedding + (runs ? u64(slots.at(Slots::TOKEN, slot)) * width : 0);
  for (u32 i = threadIdx.x; i < width; i += 128) x[u64(blockIdx.x) * width + i] = runs ? to_float(from[i]) : 0.0f;
}

constexpr u32 ATTENTION_THREADS = 256;
constexpr u32 ATTENTION_WARPS = ATTENTION_THREADS / WARP;
constexpr u32 MAX_GROUP = 8; // query heads of one key head

// Where the attention of a step reads and writes, for one layer. Caches are (slot, K, capacity, E).
template <class T> struct DecodeAttention {
  Slots slots;
  const u32 *slot_of_row;
  const float *partial; // (splits, rows, (H + 2 K) E): queries, keys, values before bias and rope
  u32 splits;
  const float *bias;  // ((H + 2 K) E)
  const float *rope;  // cosines, then sines, (positions, E / 2) each
  u32 positions;
  const T *prompt_keys, *prompt_values;
  u32 prompt_capacity;
  T *keys, *values;
  u32 capacity;
  T *out; // (rows, H E)
  u32 heads, kv_heads;
};

// One block a row and key head: bias and rope of this token's queries, key and value; key and value into the cache; attention of
// the group's queries over prompt and completion, by positions in chunks of 32 that go to the warps in turn and are merged in
// the warps' order.
template <class T, u32 E> __device__ void decode_attention(const DecodeAttention<T> &a) {
  constexpr u32 HALF = E / 2, DIMS = E > WARP ? E / WARP : 1;
  __shared__ float fresh[(MAX_GROUP + 2) * E];
  __shared__ float weights[ATTENTION_WARPS][MAX_GROUP][WARP];
  __shared__ float largest[ATTENTION_WARPS][MAX_GROUP], total[ATTENTION_WARPS][MAX_GROUP];
  __shared__ float sums[ATTENTION_WARPS][MAX_GROUP][E];
  const u32 row = blockIdx.x, rows = gridDim.x, head = blockIdx.y, group = a.heads / a.kv_heads;
  const u32 slot = a.slot_of_row[row], warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  T *out = a.out + (u64(row) * a.heads + head * group) * E;
  if (!a.slots.runs(slot)) {
    for (u32 i = threadIdx.x; i < group * E; i += ATTENTION_THREADS) out[i] = from_float<T>(0.0f);
    return;
  }
  const u32 prompt_len = a.slots.at(Slots::PROMPT_LEN, slot), drawn = a.slots.at(Slots::DRAWN, slot);
  const u32 len = prompt_len + drawn, position = len - 1;

  const u32 width = (a.heads + 2 * a.kv_heads) * E;
  for (u32 i = threadIdx.x; i < (group + 2) * E; i += ATTENTION_THREADS) {
    u32 of = i / E < group ? head * group + i / E : a.heads + (i / E - group) * a.kv_heads + head;
    u32 column = of * E + i % E;
    float sum = a.bias[column];
    for (u32 split = 0; split < a.splits; split++) sum += a.partial[(u64(split) * rows + row) * width + column];
    fresh[i] = sum;
  }
  __syncthreads();
  for (u32 i = threadIdx.x; i < (group + 1) * HALF; i += ATTENTION_THREADS) {
    float *low = fresh + i / HALF * E + i % HALF, *high = low + HALF;
    u64 angle = u64(position) * HALF + i % HALF;
    float c = a.rope[angle], s = a.rope[u64(a.positions) * HALF + angle], x = *low, y = *high;
    *low = x * c - y * s, *high = y * c + x * s;
  }
  __syncthreads();
  const u64 own = (u64(slot) * a.kv_heads + head) * a.capacity * E;
  const u64 prompt = (u64(a.slots.at(Slots::PROMPT, slot)) * a.kv_heads + head) * a.prompt_capacity * E;
  for (u32 i = threadIdx.x; i < (group + 2) * E; i += ATTENTION_THREADS) {
    T rounded = from_float<T>(fresh[i]); // as training rounds its queries too
    if (i / E == group) a.keys[own + (drawn - 1) * E + i % E] = rounded;
    if (i / E == group + 1) a.values[own + (drawn - 1) * E + i % E] = rounded;
    fresh[i] = to_float(rounded) * rsqrtf(float(E));
  }
  __syncthreads();

  float m[MAX_GROUP], l[MAX_GROUP], sum[MAX_GROUP][DIMS];
  for (u32 g = 0; g < MAX_GROUP; g++) {
    m[g] = -INFINITY, l[g] = 0;
    for (u32 i = 0; i < DIMS; i++) sum[g][i] = 0;
  }
  for (u32 first = warp * WARP; first < len; first += ATTENTION_THREADS) {
    const u32 at = first + lane, count = min(WARP, len - first);
    auto row_of = [&](const T *in_prompt, const T *since, u32 at) {
      return at < prompt_len ? in_prompt + prompt + u64(at) * E : since + own + u64(at - prompt_len) * E;
    };
    float score[MAX_GROUP] = {};
    if (lane < count) {
      const T *key = row_of(a.prompt_keys, a.keys, at);
      for (u32 i = 0; i < E; i += Pack<T>::SIZE) {
        Pack<T> pack = load_pack(key + i);
#pragma unroll
        for (u32 g = 0; g < MAX_GROUP; g++)
          if (g < group)
            for (u32 k = 0; k < Pack<T>::SIZE; k++) score[g] = fmaf(fresh[g * E + i + k], to_float(pack.of[k]), score[g]);
      }
    }
#pragma unroll
    for (u32 g = 0; g < MAX_GROUP; g++) {
      if (g >= group) continue;
      float mine = lane < count ? score[g] : -INFINITY, before = m[g];
      m[g] = fmaxf(before, warp_max(mine));
      float weight = exp_of(mine - m[g]), keep = exp_of(before - m[g]);
      l[g] = l[g] * keep + warp_sum(weight);
      for (u32 i = 0; i < DIMS; i++) sum[g][i] *= keep;
      weights[warp][g][lane] = weight;
    }
    __syncwarp();
    for (u32 j = 0; j < count && lane * DIMS < E; j++) {
      const T *value = row_of(a.prompt_values, a.values, first + j) + lane * DIMS;
      for (u32 i = 0; i < DIMS; i++) {
        float v = to_float(value[i]);
#pragma unroll
        for (u32 g = 0; g < MAX_GROUP; g++)
          if (g < group) sum[g][i] = fmaf(weights[warp][g][j], v, sum[g][i]);
      }
    }
    __syncwarp();
  }
  for (u32 g = 0; g < MAX_GROUP; g++) {
    if (lane == 0) largest[warp][g] = m[g], total[warp][g] = l[g];
    for (u32 i = 0; i < DIMS && lane * DIMS < E; i++) sums[warp][g][lane * DIMS + i] = sum[g][i];
  }
  __syncthreads();
  for (u32 i = threadIdx.x; i < group * E; i += ATTENTION_THREADS) {
    u32 g = i / E;
    float top = largest[0][g], over = 0, under = 0;
    for (u32 w = 1; w < ATTENTION_WARPS; w++) top = fmaxf(top, largest[w][g]);
    for (u32 w = 0; w < ATTENTION_WARPS; w++) {
      float keep = exp_of(largest[w][g] - top);
      over = fmaf(sums[w][g][i % E], keep, over), under = fmaf(total[w][g], keep, under);
    }
    out[i] = from_float<T>(over / under);
  }
}

#define DECODE_ATTENTION(T, E)                                                                                                 \
  KERNEL(ATTENTION_THREADS, decode_attention_##T##_##E, u32 *state, u32 count, const u32 *slot_of_row, const float *partial,   \
         u32 splits, const float *bias, const float *rope, u32 positions, const T *prompt_keys, const T *prompt_values,        \
         u32 prompt_capacity, T *keys, T *values, u32 capacity, T *out, u32 heads, u32 kv_heads) {                             \
    decode_attention<T, E>({{state, count}, slot_of_row, partial, splits, bias, rope, positions, prompt_keys, prompt_values,   \
                            prompt_capacity, keys, values, capacity, out, heads, kv_heads});                                   \
  }
#define DECODE(T)                                                                                                              \
  KERNEL(128, embed_slots_##T, u32 *state, u32 count, const u32 *slot_of_row, const T *embedding, float *x, u32 width) {       \
    embed_slots<T>({state, count}, slot_of_row, embedding, x, width);                                                          \
  }                                                                                                                            \
  DECODE_ATTENTION(T, 16) DECODE_ATTENTION(T, 32) DECODE_ATTENTION(T, 64) DECODE_ATTENTION(T, 128)
DECODE(f32)
DECODE(bf16)
DECODE(f16)

// Keys and values of packed prompts into their caches, (slots, K, capacity, E): row `blockIdx.x` of qkv (rows, (H + 2 K) E) is
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
