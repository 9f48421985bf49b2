#include "slots.cuh"

// Draws a token from logits, with its log-probability. The definitions, the order of sums and the random numbers are those of
// src/engine/sampler.rs and src/numbers/rng.rs: the same logits give the same token on CPU and GPU.

constexpr u32 DRAW_THREADS = 1024;
constexpr u32 DRAW_WARPS = DRAW_THREADS / WARP;
constexpr u32 DRAW_BLOCK = 1024; // tokens per block of a sum of weights
constexpr u32 DRAW_RUN = 32;     // tokens per run of a block, which a look-up skips at once
constexpr u32 DRAW_LANES = 8;    // partial sums per block

// Flags in the first word of a log entry; the second word is the log-probability.
constexpr u32 DRAWN_FLAG = 1u << 30, NOT_FINITE_FLAG = 1u << 31;

struct Distribution {
  float temperature;
  u32 top_k;
  float top_p, min_p, penalty;
};

__device__ __forceinline__ u32 blocks_of(u32 vocabulary) { return (vocabulary + DRAW_BLOCK - 1) / DRAW_BLOCK; }

// Temperature 0 takes the likeliest token, with its log-probability at temperature 1.
__device__ __forceinline__ float scale_of(float temperature) { return temperature == 0 ? 1.0f : 1.0f / temperature; }

// As in src/numbers/rng.rs: a multiple of 2^-53 in [0, 1).
__device__ double uniform(u32 key_low, u32 key_high, u32 sample, u32 position) {
  u32 counter[4] = {sample, 0, position, 0};
  philox(counter, key_low, key_high);
  u64 bits = u64(counter[0]) << 32 | counter[1];
  return double(bits >> 11) * (1.0 / double(1ull << 53));
}

struct Draw {
  Slots slots;
  const u32 *slot_of_row;
  u32 by_prompt; // whether the slots draw their first token, from the logits of their prompts
  const float *logits; // (rows or prompts, vocabulary)
  u32 vocabulary;
  const u32 *largest; // (rows), `ordered`, with the sums of
  const double *sums; // (rows, blocks), from `draw_sums`; both are null for a draw that reads all logits itself
  Distribution distribution;
  const u32 *stops;
  u32 stop_count, limit;
  u32 *seen; // (slots, words)
  u32 words;
  u32 *log; // (slots, limit, 2)

  // The slot of this block's row. The host writes it; no kernel does.
  __device__ u32 slot() const { return slot_of_row[blockIdx.x]; }
  // The row of its logits.
  __device__ u32 index(u32 slot) const { return by_prompt ? slots.at(Slots::PROMPT, slot) : blockIdx.x; }
  __device__ double uniform_of(u32 slot) const {
    return uniform(slots.at(Slots::KEY_LOW, slot), slots.at(Slots::KEY_HIGH, slot), slots.at(Slots::SAMPLE, slot),
                   slots.at(Slots::DRAWN, slot));
  }
};

// A row of logits, with the filters that apply to its tokens.
struct Row {
  const float *logits;
  const u32 *seen; // null without a penalty
  float penalty, scale, max;
  u32 vocabulary;
  u32 least_score;             // top-k: the smallest score that stays, `ordered`
  u32 least_weight, last_tied; // top-p and min-p: the smallest weight that stays, as bits, and the last token of that weight that stays

  __device__ float score(u32 token) const {
    float x = logits[token];
    if (seen && (seen[token / 32] >> token % 32 & 1)) x = x < 0 ? __fmul_rn(x, penalty) : x / penalty;
    return x;
  }
  __device__ float unfiltered(u32 token) const {
    float x = score(token);
    return ordered(x) < least_score ? 0.0f : exp_of(__fsub_rn(__fmul_rn(x, scale), max));
  }
  __device__ float weight(u32 token) const {
    float w = unfiltered(token);
    u32 bits = __float_as_uint(w);
    return bits > least_weight || (bits == least_weight && token <= last_tied) ? w : 0.0f;
  }
};

__device__ __forceinline__ double sum_lanes(const double *lanes) {
  double sum = 0;
  for (u32 lane = 0; lane < DRAW_LANES; lane++) sum += lanes[lane];
  return sum;
}

// Shared memory of a look-up.
struct FindRoom {
  float weights[DRAW_BLOCK + DRAW_BLOCK / DRAW_RUN]; // a gap after each run keeps the runs in different banks
  u32 choice, last; // what was found; the last block with a weight above 0
  double passed;
};

// Shared memory of a draw that reads all logits.
struct DrawRoom {
  float floats[DRAW_WARPS];
  u32 words[DRAW_WARPS];
  u64 masses[256];
  u32 ties[DRAW_THREADS];
  u32 choice[2];
  u64 mass;
  FindRoom find;
};

__device__ __forceinline__ u32 first_lane(u32 lanes) { return __ffs(lanes) - 1; }
__device__ __forceinline__ u32 last_lane(u32 lanes) { return WARP - 1 - __clz(lanes); }

// Adds the lanes' numbers to `before`, in order; each lane gets the sum up to its own number.
__device__ __forceinline__ double running_sum(double number, double before) {
  double mine = 0;
#pragma unroll
  for (u32 lane = 0; lane < WARP; lane++) {
    before += __shfl_sync(ALL_LANES, number, lane);
    if (threadIdx.x % WARP == lane) mine = before;
  }
  return mine;
}

// Computes `passed (blocks)`, the running sum up to each block, and returns the sum of all blocks.
__device__ double sum_blocks(const double *sums, double *passed, u32 blocks, FindRoom &room) {
  if (threadIdx.x < WARP) {
    double before = 0, next = threadIdx.x < blocks ? sums[threadIdx.x] : 0;
    u32 last = 0;
    for (u32 block = threadIdx.x; block - threadIdx.x < blocks; block += WARP) {
      const double number = next;
      next = block + WARP < blocks ? sums[block + WARP] : 0; // loads while these are added
      const double mine = running_sum(number, before);
      if (block < blocks) passed[block] = mine;
      const u32 some = __ballot_sync(ALL_LANES, number > 0);
      if (some) last = block - threadIdx.x + last_lane(some);
      before = __shfl_sync(ALL_LANES, mine, WARP - 1);
    }
    if (threadIdx.x == 0) room.last = last;
  }
  __syncthreads();
  const double total = passed[blocks - 1];
  __syncthreads();
  return total;
}

// Returns the sum of all weights and computes what `sum_blocks` does. Each block has DRAW_LANES partial sums, as on the CPU.
__device__ double sum_weights(const Row &row, double *chains, double *sums, FindRoom &room) {
  const u32 blocks = blocks_of(row.vocabulary);
  for (u32 chain = threadIdx.x; chain < blocks * DRAW_LANES; chain += DRAW_THREADS) {
    u32 first = chain / DRAW_LANES * DRAW_BLOCK, last = min(first + DRAW_BLOCK, row.vocabulary);
    double sum = 0;
    for (u32 token = first + chain % DRAW_LANES; token < last; token += DRAW_LANES) sum += double(row.weight(token));
    chains[chain] = sum;
  }
  __syncthreads();
  for (u32 block = threadIdx.x; block < blocks; block += DRAW_THREADS) sums[block] = sum_lanes(chains + block * DRAW_LANES);
  __syncthreads();
  return sum_blocks(sums, chains, blocks, room);
}

// Returns the largest key (32 bits) for which the mass of all greater keys, `above`, is less than `wanted`. It searches four digits of
// eight bits, the highest first.
template <class Key, class Mass> __device__ u32 select(u32 count, u64 wanted, u64 &above, DrawRoom &room, Key key, Mass mass) {
  u32 prefix = 0;
  u64 passed = 0;
  for (u32 shift = 24;; shift -= 8) {
    for (u32 i = threadIdx.x; i < 256; i += DRAW_THREADS) room.masses[i] = 0;
    __syncthreads();
    for (u32 token = threadIdx.x; token < count; token += DRAW_THREADS) {
      u32 bits = key(token);
      if (shift == 24 || bits >> (shift + 8) == prefix >> (shift + 8)) atomicAdd(&room.masses[bits >> shift & 255], mass(token));
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      u32 digit = 255;
      while (digit > 0 && passed + room.masses[digit] < wanted) passed += room.masses[digit--];
      room.choice[0] = digit, room.mass = passed;
    }
    __syncthreads();
    prefix |= room.choice[0] << shift, passed = room.mass;
    __syncthreads();
    if (shift == 0) break;
  }
  above = passed;
  return prefix;
}

// Weights are added in units of 2^-40, so that the sums do not depend on the order.
constexpr float MASS_UNITS = 1099511627776.0f;

// Keeps a token if the tokens before it, likelier or equally likely with a lower id, do not reach top_p of the total.
__device__ void keep_top_p(Row &row, float top_p, double total, DrawRoom &room) {
  u64 above;
  u64 wanted = u64(double(top_p) * total * double(MASS_UNITS));
  auto key = [&](u32 token) { return __float_as_uint(row.unfiltered(token)); };
  auto mass = [&](u32 token) { return u64(row.unfiltered(token) * MASS_UNITS); };
  u32 least = select(row.vocabulary, wanted, above, room, key, mass);
  u64 each = max(u64(__uint_as_float(least) * MASS_UNITS), u64(1));
  u32 ties = u32(min((wanted - min(above, wanted) + each - 1) / each, u64(row.vocabulary)));
  ties = max(ties, 1u);
  // Each thread counts the ties in a run of tokens; the one whose run contains the last tie to stay finds it.
  u32 run = (row.vocabulary + DRAW_THREADS - 1) / DRAW_THREADS;
  u32 first = min(threadIdx.x * run, row.vocabulary), last = min(first + run, row.vocabulary), mine = 0;
  for (u32 token = first; token < last; token++) mine += key(token) == least;
  room.ties[threadIdx.x] = mine;
  if (threadIdx.x == 0) room.choice[1] = row.vocabulary;
  __syncthreads();
  u32 before = 0;
  for (u32 i = 0; i < threadIdx.x; i++) before += room.ties[i];
  for (u32 token = first; token < last && before < ties; token++)
    if (key(token) == least && ++before == ties) room.choice[1] = token;
  __syncthreads();
  row.least_weight = least, row.last_tied = room.choice[1];
  __syncthreads();
}

// Adds the lanes' numbers to `passed`, in order, and returns the lane at which the sum exceeds `target`; `passed` becomes the sum before
// that lane. The lane's number is never 0: if the sum falls short, the last lane with another number is returned.
__device__ __forceinline__ u32 pass(double number, double &passed, double target) {
  const double mine = running_sum(number, passed);
  const u32 beyond = __ballot_sync(ALL_LANES, mine > target), some = __ballot_sync(ALL_LANES, number > 0);
  const u32 found = beyond ? first_lane(beyond) : some ? last_lane(some) : 0;
  const u32 until = beyond ? found - 1 : WARP - 1; // none before the first lane
  const double before = __shfl_sync(ALL_LANES, mine, until % WARP);
  if (until < WARP) passed = before;
  return found;
}

// Returns the token at which the running sum of weights exceeds `target`: first its block, then the run in the block, then the token in
// the run. `passed` comes from `sum_blocks`; the first block beyond the target has a weight above 0, since zeros do not change the sum.
template <u32 THREADS> __device__ u32 find(const Row &row, double target, const double *passed, u32 blocks, FindRoom &room) {
  static_assert(DRAW_BLOCK / DRAW_RUN == WARP && DRAW_RUN == WARP, "a lane has a run, then a token");
  if (threadIdx.x == 0 && !(passed[blocks - 1] > target)) room.choice = room.last, room.passed = passed[blocks - 1];
  for (u32 block = threadIdx.x; block < blocks; block += THREADS) {
    const double before = block == 0 ? 0 : passed[block - 1];
    if (passed[block] > target && before <= target) room.choice = block, room.passed = before;
  }
  __syncthreads();
  const u32 first = room.choice * DRAW_BLOCK;
  auto weight = [&](u32 i) -> float & { return room.weights[i + i / DRAW_RUN]; };
#pragma unroll
  for (u32 i = threadIdx.x; i < DRAW_BLOCK; i += THREADS) weight(i) = first + i < row.vocabulary ? row.weight(first + i) : 0.0f;
  __syncthreads();
  if (threadIdx.x < WARP) {
    double sum = 0, before = room.passed;
#pragma unroll
    for (u32 i = 0; i < DRAW_RUN; i++) sum += double(weight(threadIdx.x * DRAW_RUN + i));
    const u32 run = pass(sum, before, target) * DRAW_RUN;
    const u32 token = first + run + pass(double(weight(run + threadIdx.x)), before, target);
    if (threadIdx.x == 0) room.choice = token;
  }
  __syncthreads();
  return room.choice;
}

// The largest scaled score; NaN if a logit is not finite.
__device__ float row_max(const Row &row, DrawRoom &room) {
  float largest = -INFINITY;
  u32 bad = 0;
  for (u32 token = threadIdx.x; token < row.vocabulary; token += DRAW_THREADS) {
    bad |= !isfinite(row.logits[token]);
    largest = fmaxf(largest, __fmul_rn(row.score(token), row.scale));
  }
  largest = block_max<DRAW_THREADS>(largest, room.floats);
  return block_sum<DRAW_THREADS>(bad, room.words) ? NAN : largest;
}

// The first token with the largest score.
__device__ u32 likeliest(const Row &row, DrawRoom &room) {
  u32 first = row.vocabulary;
  for (u32 token = threadIdx.x; token < row.vocabulary && first == row.vocabulary; token += DRAW_THREADS)
    if (__fmul_rn(row.score(token), row.scale) == row.max) first = token;
  for (u32 far = WARP / 2; far > 0; far /= 2) first = min(first, __shfl_xor_sync(ALL_LANES, first, far));
  if (threadIdx.x % WARP == 0) room.words[threadIdx.x / WARP] = first;
  __syncthreads();
  for (u32 warp = 0; warp < DRAW_WARPS; warp++) first = min(first, room.words[warp]);
  __syncthreads();
  return first;
}

// Appends a token to the slot's sequence, and logs it for the host.
__device__ void extend(const Draw &draw, u32 slot, u32 token, float logprob, u32 flag) {
  u32 drawn = draw.slots.at(Slots::DRAWN, slot);
  u32 *entry = draw.log + (u64(slot) * draw.limit + drawn) * 2;
  entry[1] = __float_as_uint(logprob);
  __threadfence_system(); // the host reads the second word once it sees the first
  entry[0] = token | flag;
  bool stops = flag != DRAWN_FLAG || drawn + 1 == draw.limit;
  for (u32 i = 0; i < draw.stop_count; i++) stops |= draw.stops[i] == token;
  draw.slots.at(Slots::TOKEN, slot) = token;
  draw.slots.at(Slots::DRAWN, slot) = drawn + 1;
  if (stops) draw.slots.at(Slots::RUNNING, slot) = 0;
  if (draw.words) draw.seen[u64(slot) * draw.words + token / 32] |= 1u << token % 32;
}

// Draws the next token of a slot from any distribution. One block per row.
__device__ void draw_token(const Draw &draw) {
  DYNAMIC_SHARED(memory);
  __shared__ DrawRoom room;
  const u32 slot = draw.slot();
  wait_for_previous();
  if (!draw.slots.runs(slot)) return;
  const Distribution &to = draw.distribution;
  const u32 index = draw.index(slot);
  const bool greedy = to.temperature == 0;
  Row row{draw.logits + u64(index) * draw.vocabulary, draw.words ? draw.seen + u64(slot) * draw.words : nullptr, to.penalty,
          scale_of(to.temperature), 0, draw.vocabulary, 0, 0, draw.vocabulary};
  row.max = draw.largest ? __fmul_rn(from_ordered(draw.largest[index]), row.scale) : row_max(row, room);
  if (!isfinite(row.max)) {
    if (threadIdx.x == 0) extend(draw, slot, 0, 0, NOT_FINITE_FLAG);
    return;
  }
  if (!greedy && to.top_k > 0 && to.top_k < row.vocabulary) {
    u64 above;
    auto key = [&](u32 token) { return ordered(row.score(token)); };
    row.least_score = select(row.vocabulary, to.top_k, above, room, key, [](u32) { return u64(1); });
  }
  const u32 blocks = blocks_of(row.vocabulary);
  double *passed = reinterpret_cast<double *>(memory), *sums = passed + blocks * DRAW_LANES;
  double total = draw.sums ? sum_blocks(draw.sums + u64(index) * blocks, passed, blocks, room.find)
                           : sum_weights(row, passed, sums, room.find);
  float log_sum = float(log(total));
  if (!greedy && (to.top_p < 1 || to.min_p > 0)) {
    if (to.top_p < 1) keep_top_p(row, to.top_p, total, room);
    u32 least = __float_as_uint(to.min_p); // the likeliest token's weight is 1
    if (least > row.least_weight) row.least_weight = least, row.last_tied = row.vocabulary;
    double kept = sum_weights(row, passed, sums, room.find);
    log_sum += float(log(kept / total));
    total = kept;
  }
  u32 token = greedy ? likeliest(row, room)
                     : find<DRAW_THREADS>(row, __dmul_rn(draw.uniform_of(slot), total), passed, blocks, room.find);
  if (threadIdx.x == 0) extend(draw, slot, token, row.score(token) * row.scale - row.max - log_sum, DRAWN_FLAG);
}

constexpr u32 SUMMED_THREADS = 128;

// The same from known sums, if nothing is truncated, penalised or greedy. Little work is left, so many small blocks share a
// multiprocessor.
__device__ void draw_from_sums(const Draw &draw) {
  DYNAMIC_SHARED(memory);
  __shared__ FindRoom room;
  const u32 slot = draw.slot();
  wait_for_previous();
  if (!draw.slots.runs(slot)) return;
  const u32 index = draw.index(slot), blocks = blocks_of(draw.vocabulary);
  const float scale = scale_of(draw.distribution.temperature), max = __fmul_rn(from_ordered(draw.largest[index]), scale);
  if (!isfinite(max)) {
    if (threadIdx.x == 0) extend(draw, slot, 0, 0, NOT_FINITE_FLAG);
    return;
  }
  const Row row{draw.logits + u64(index) * draw.vocabulary, nullptr, 1, scale, max, draw.vocabulary, 0, 0, draw.vocabulary};
  double *passed = reinterpret_cast<double *>(memory);
  const double total = sum_blocks(draw.sums + u64(index) * blocks, passed, blocks, room);
  const u32 token = find<SUMMED_THREADS>(row, __dmul_rn(draw.uniform_of(slot), total), passed, blocks, room);
  if (threadIdx.x == 0) extend(draw, slot, token, row.score(token) * scale - max - float(log(total)), DRAWN_FLAG);
}

#define DRAW(kernel, threads, name, function)                                                                                  \
  kernel(threads, name, u32 *state, u32 count, const u32 *slot_of_row, u32 by_prompt, const float *logits, u32 vocabulary,     \
         const u32 *largest, const double *sums, float temperature, u32 top_k, float top_p, float min_p, float penalty,        \
         const u32 *stops, u32 stop_count, u32 limit, u32 *seen, u32 words, u32 *log) {                                        \
    function({{state, count}, slot_of_row, by_prompt, logits, vocabulary, largest, sums,                                       \
              {temperature, top_k, top_p, min_p, penalty}, stops, stop_count, limit, seen, words, log});                       \
  }
DRAW(KERNEL_ALONE, DRAW_THREADS, draw, draw_token)
DRAW(KERNEL, SUMMED_THREADS, draw_summed, draw_from_sums)

// Loads N numbers of a row, `step` apart, all at once; from `last` on they are `beyond`.
template <u32 N>
__device__ __forceinline__ void fetch(float (&to)[N], const float *row, u32 first, u32 step, u32 last, float beyond) {
#pragma unroll
  for (u32 k = 0; k < N; k++) to[k] = first + k * step < last ? row[first + k * step] : beyond;
}

constexpr u32 SUMS_THREADS = 128;
constexpr u32 SUMS_AT_ONCE = 16; // logits that a thread loads while it adds as many

// Computes the sums for a draw without truncation or penalty, with many blocks per row, because one block would use only one
// multiprocessor. A thread computes one partial sum of a block of tokens; the eight of a block read 32 bytes together, the least that
// memory transfers.
KERNEL(SUMS_THREADS, draw_sums, u32 *state, u32 count, const u32 *slot_of_row, const float *logits, u32 vocabulary,
       const u32 *largest, float temperature, double *sums) {
  const u32 row = blockIdx.y, blocks = blocks_of(vocabulary), slot = slot_of_row[row];
  const u32 thread = blockIdx.x * SUMS_THREADS + threadIdx.x, block = thread / DRAW_LANES, of_warp = thread / WARP * (WARP / DRAW_LANES);
  let_next_begin();
  wait_for_previous();
  if (of_warp >= blocks || !Slots{state, count}.runs(slot)) return;
  const float scale = scale_of(temperature), top = __fmul_rn(from_ordered(largest[row]), scale);
  const u32 last = min((block + 1) * DRAW_BLOCK, vocabulary);
  float next[SUMS_AT_ONCE];
  logits += u64(row) * vocabulary;
  u32 token = block * DRAW_BLOCK + thread % DRAW_LANES;
  fetch(next, logits, token, DRAW_LANES, last, -INFINITY);
  double sum = 0;
#pragma unroll 2
  for (u32 added = 0; added < DRAW_BLOCK; added += SUMS_AT_ONCE * DRAW_LANES) {
    float these[SUMS_AT_ONCE];
#pragma unroll
    for (u32 k = 0; k < SUMS_AT_ONCE; k++) these[k] = next[k];
    token += SUMS_AT_ONCE * DRAW_LANES;
    fetch(next, logits, token, DRAW_LANES, last, -INFINITY);
#pragma unroll
    for (u32 k = 0; k < SUMS_AT_ONCE; k++) sum += double(exp_of(__fsub_rn(__fmul_rn(these[k], scale), top)));
  }
  double all = 0;
#pragma unroll
  for (u32 lane = 0; lane < DRAW_LANES; lane++) all += __shfl_sync(ALL_LANES, sum, threadIdx.x % WARP / DRAW_LANES * DRAW_LANES + lane);
  if (thread % DRAW_LANES == 0 && block < blocks) sums[u64(row) * blocks + block] = all;
}

constexpr u32 LARGEST_THREADS = 128, LARGEST_AT_ONCE = 32;

// Finds the largest logit of each row, if the product that computed the logits did not.
KERNEL(LARGEST_THREADS, largest_logits, const float *logits, u32 vocabulary, u32 *largest) {
  constexpr float LEAST = -3.402823466e38f; // the smallest finite float
  __shared__ u32 here;
  if (threadIdx.x == 0) here = 0;
  let_next_begin();
  wait_for_previous();
  __syncthreads();
  float these[LARGEST_AT_ONCE];
  const u32 first = blockIdx.x * LARGEST_THREADS * LARGEST_AT_ONCE + threadIdx.x;
  fetch(these, logits + u64(blockIdx.y) * vocabulary, first, LARGEST_THREADS, vocabulary, LEAST);
  u32 mine = 0;
#pragma unroll
  for (u32 k = 0; k < LARGEST_AT_ONCE; k++) mine = max(mine, ordered_if_finite(these[k]));
  for (u32 far = WARP / 2; far > 0; far /= 2) mine = max(mine, __shfl_xor_sync(ALL_LANES, mine, far));
  if (threadIdx.x % WARP == 0) atomicMax(&here, mine);
  __syncthreads();
  if (threadIdx.x == 0) atomicMax(&largest[blockIdx.y], here);
}
