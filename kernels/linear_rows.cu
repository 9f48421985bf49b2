#include "common.cuh"

// y (rows, width) = x (rows, depth) weight (width, depth)^T for the few rows of a decode step, where the time is that of reading
// the weights once. Blocks share out the weights' rows (x), tokens in TOKENS (y), and the depth in `splits` (z), whose partial
// results are added by whoever reads them. A token's sums are made in an order that follows from (depth, splits) and the column
// alone: its result is the same bits in any batch.
//
// Weights go from memory to the registers of the warp that multiplies them, since no other warp needs them, and the first of them are
// fetched while the kernel before still runs. x, which all warps of a block need, goes through shared memory.

constexpr u32 ROWS_DEPTH = 128;                  // numbers of the depth in a stage
constexpr u32 ROWS_PACKS = ROWS_DEPTH / 8;       // 16 bytes each
constexpr u32 ROWS_HALVES = 2;                   // of a stage's depth, for a warp each
constexpr u32 ROWS_STEPS = ROWS_PACKS / ROWS_HALVES / 4; // of a warp in its half, 32 numbers deep
constexpr u32 ROWS_STAGES = 4;                   // of x in shared memory

// Partial results in f32, (splits, rows, width).
struct Sums {
  float *out;
  u32 rows, width;
  u32 *largest; // (rows), `ordered`: the largest result of each row, compared with what is there; none but for logits
  static constexpr bool COMPARES = true, APART = false; // splits, or more tiles than run at once, keep blocks apart already
  static constexpr u32 TILE = 64, RESULTS = TILE;       // rows of the weights that a block has, 16 for each pair of its warps

  // Which row of the weights is row `i` of this block's tile; `width` rows or more is none.
  __device__ u32 weight_row(u32 i) const { return blockIdx.x * RESULTS + i; }
  __device__ u32 weight_rows() const { return width; }

  // `low` and `high` are the results of rows i and i + 8 of the tile for `token`.
  __device__ void write(u32 token, u32 i, float low, float high) const {
    float *row = out + (u64(blockIdx.z) * rows + token) * width + blockIdx.x * RESULTS;
    if (blockIdx.x * RESULTS + i < width) row[i] = low;
    if (blockIdx.x * RESULTS + i + 8 < width) row[i + 8] = high;
  }

  // Of the same two results.
  __device__ u32 larger(u32 i, float low, float high) const {
    u32 index = blockIdx.x * RESULTS + i;
    return max(index < width ? ordered_if_finite(low) : 0, index + 8 < width ? ordered_if_finite(high) : 0);
  }
};

// silu(gate) * up, (rows, width); the weights are gate (width, depth), then up. Gate and up of one result lie 8 rows apart in a
// tile, where the matrix instruction gives both to one lane.
template <class T> struct Swiglu {
  T *out;
  u32 rows, width;
  static constexpr u32 TILE = 64, RESULTS = TILE / 2;
  static constexpr bool COMPARES = false, APART = true; // pays for 64 tokens, see tests/bench/results/2026-11-26-h100.md

  __device__ u32 result(u32 i) const { return blockIdx.x * RESULTS + i / 16 * 8 + i % 8; }
  __device__ u32 weight_row(u32 i) const {
    u32 row = result(i);
    if (row >= width) return weight_rows();
    return i % 16 < 8 ? row : width + row;
  }
  __device__ u32 weight_rows() const { return 2 * width; }

  // Both are rounded as training keeps them, so that it finds the same log-probabilities.
  __device__ void write(u32 token, u32 i, float gate, float up) const {
    gate = to_float(from_float<T>(gate)), up = to_float(from_float<T>(up));
    if (result(i) < width) out[u64(token) * width + result(i)] = from_float<T>(gate / (1.0f + exp_of(-gate)) * up);
  }
};

// The part of the depth that split `z` sums, in stages.
struct Part {
  u32 from, to;
  // With `apart` each tile of columns begins at another stage: blocks that all read the same x at once wait for the same few banks of the
  // cache.
  __device__ u32 in_turn(u32 stage, bool apart) const { return apart ? from + (stage - from + blockIdx.x) % (to - from) : stage; }
  __device__ static Part of(u32 depth, u32 splits) {
    u32 stages = (depth + ROWS_DEPTH - 1) / ROWS_DEPTH, share = (stages + splits - 1) / splits;
    return {min(blockIdx.z * share, stages), min(blockIdx.z * share + share, stages)};
  }
};

template <class Result> constexpr u32 ROWS_THREADS = Result::TILE / 16 * ROWS_HALVES * WARP;

// Where a token's pack is in a stage: turned around for every second token, so that the eight lanes that read together hit all banks.
__device__ __forceinline__ u32 place(u32 token, u32 pack) { return token * ROWS_PACKS + (pack ^ (token % 2 * 4)); }

// What a thread copies of x (rows, depth) for a block's TOKENS tokens: one pack of a stage, of every PASS-th token.
template <class T, u32 THREADS, u32 TOKENS> struct Tokens {
  static constexpr u32 PASS = THREADS / ROWS_PACKS;
  const T *from;
  u32 depth, rows; // of its first token on

  __device__ static u32 token() { return threadIdx.x / ROWS_PACKS; }
  __device__ static u32 pack() { return threadIdx.x % ROWS_PACKS; }
  __device__ static Tokens of(const T *x, u32 first, u32 rows, u32 depth) {
    u32 own = first + token();
    return {x + u64(own) * depth + pack() * 8, depth, rows - min(own, rows)};
  }
  // Asks for a stage; zeros where there is none.
  __device__ __forceinline__ void fetch(uint4 *to, u32 stage) const {
    if (TOKENS < PASS && token() >= TOKENS) return;
    const u32 k = stage * ROWS_DEPTH;
    const bool any = k + pack() * 8 < depth;
#pragma unroll
    for (u32 more = 0; more < TOKENS; more += PASS)
      copy16(to + place(token() + more, pack()), from + u64(more) * depth + k, any && more < rows);
  }
};

// A lane's weights of some stages, under way: of rows g and g + 8 of the warp's 16, packs t, t + 4, ... of its half of the depth.
template <class T, u32 STAGES> struct Ahead {
  const T *rows[2];
  u32 valid[2], depth;
  uint4 packs[STAGES][ROWS_STEPS][2];

  __device__ static u32 k(u32 stage, u32 step) {
    return stage * ROWS_DEPTH + (threadIdx.x / WARP % ROWS_HALVES * ROWS_STEPS + step) * 32 + threadIdx.x % 4 * 8;
  }
  __device__ __forceinline__ void fetch(u32 at, u32 step, u32 stage, bool any) {
    u32 from = k(stage, step);
#pragma unroll
    for (u32 i = 0; i < 2; i++) packs[at][step][i] = load_once(rows[i] + from, any && valid[i] && from < depth);
  }
};

// The largest result of each of a block's tokens to those of the grid, when all threads have told theirs.
template <u32 THREADS> __device__ void tell_largest(const u32 *here, u32 tokens, u32 *largest, u32 rows) {
  __syncthreads();
  for (u32 i = threadIdx.x; i < min(tokens, rows); i += THREADS) atomicMax(&largest[i], here[i]);
}

// The sums of the two halves of the depth become one and go where they belong, each warp's for half of the tokens where that is more than
// none. `memory` is of the stages: with some of its own a block would have more than the 48 KiB (Turing: 64) that there are.
template <u32 TOKENS, class Result>
__device__ __forceinline__ void finish_rows(const float (&sums)[TOKENS / 8][4], const Result &result, u32 row, u32 first_token,
                                            unsigned char *memory) {
  constexpr u32 THREADS = ROWS_THREADS<Result>, OTHERS = TOKENS / 8 / ROWS_HALVES, MINE = TOKENS / 8 - OTHERS;
  const u32 half = threadIdx.x / WARP % ROWS_HALVES, g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
  const u32 pair = threadIdx.x / WARP / ROWS_HALVES * WARP + threadIdx.x % WARP; // of lanes with sums of the same results
  float *room = reinterpret_cast<float *>(memory);
  u32 *largest = reinterpret_cast<u32 *>(room + TOKENS / 2 * THREADS);
  auto place_of = [&](u32 half, u32 tile, u32 i) -> float & { return room[((half * MINE + tile) * 4 + i) * (THREADS / 2) + pair]; };
  wait_copies<0>();
  __syncthreads(); // nobody reads the stages any more
#pragma unroll
  for (u32 tile = 0; tile < MINE; tile++)
#pragma unroll
    for (u32 i = 0; i < 4; i++)
      if (half == 0 && tile < OTHERS) place_of(1, tile, i) = sums[MINE + tile][i];
      else if (half == 1) place_of(0, tile, i) = sums[tile][i];
  if constexpr (Result::COMPARES)
    for (u32 i = threadIdx.x; i < TOKENS; i += THREADS) largest[i] = 0;
  __syncthreads();
#pragma unroll
  for (u32 tile = 0; tile < MINE; tile++) {
    if (half == 1 && tile >= OTHERS) break;
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
      auto whole = [&](u32 of) { return (half == 0 ? sums[tile][of] : sums[OTHERS + tile][of]) + place_of(half, tile, of); };
      const float low = whole(i), high = whole(2 + i);
      const u32 token = (half * MINE + tile) * 8 + 2 * t + i;
      if (first_token + token < result.rows) result.write(first_token + token, row, low, high);
      if constexpr (Result::COMPARES)
        if (result.largest) {
          u32 large = result.larger(row, low, high);
          for (u32 far = 4; far < WARP; far *= 2) large = max(large, __shfl_xor_sync(ALL_LANES, large, far));
          if (g == 0) atomicMax(&largest[token], large);
        }
    }
  }
  if constexpr (Result::COMPARES)
    if (result.largest) tell_largest<THREADS>(largest, TOKENS, result.largest + first_token, result.rows - first_token);
}

template <class T, u32 TOKENS, class Result>
__device__ __forceinline__ void linear_rows(const T *weight, const T *x, Result result, u32 depth, u32 splits) {
  DYNAMIC_SHARED(memory);
  constexpr u32 THREADS = ROWS_THREADS<Result>, STAGE = TOKENS * ROWS_PACKS;
  constexpr u32 AHEAD = TOKENS > 16 ? 2 : 3; // as many as there are registers for beside the sums
  uint4 *stages = reinterpret_cast<uint4 *>(memory);
  const u32 half = threadIdx.x / WARP % ROWS_HALVES, g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
  const u32 row = threadIdx.x / WARP / ROWS_HALVES * 16 + g, first_token = blockIdx.y * TOKENS;
  const Part part = Part::of(depth, splits);

  Ahead<T, AHEAD> weights;
  weights.depth = depth;
  for (u32 i = 0; i < 2; i++) {
    u32 index = result.weight_row(row + 8 * i);
    weights.valid[i] = index < result.weight_rows();
    weights.rows[i] = weight + (weights.valid[i] ? u64(index) * depth : 0);
  }
  const auto tokens_of_x = Tokens<T, THREADS, TOKENS>::of(x, first_token, result.rows, depth);
  auto fetch_x = [&](u32 stage) {
    if (stage < part.to) tokens_of_x.fetch(stages + stage % ROWS_STAGES * STAGE, part.in_turn(stage, Result::APART));
    commit_copies();
  };

  float sums[TOKENS / 8][4] = {};
  let_next_begin();
#pragma unroll
  for (u32 at = 0; at < AHEAD; at++)
#pragma unroll
    for (u32 step = 0; step < ROWS_STEPS; step++)
      weights.fetch(at, step, part.in_turn(part.from + at, Result::APART), part.from + at < part.to);
  wait_for_previous();
  for (u32 ahead = 0; ahead + 1 < ROWS_STAGES; ahead++) fetch_x(part.from + ahead);
  for (u32 first = part.from; first < part.to; first += AHEAD)
#pragma unroll
    for (u32 at = 0; at < AHEAD; at++) {
      const u32 stage = first + at, next = stage + AHEAD;
      if (stage >= part.to) break;
      wait_copies<ROWS_STAGES - 2>();
      __syncthreads(); // this stage of x is there, and the one before it may be overwritten
      fetch_x(stage + ROWS_STAGES - 1);
      const uint4 *tile = stages + stage % ROWS_STAGES * STAGE;
#pragma unroll
      for (u32 step = 0; step < ROWS_STEPS; step++) {
        // A lane's 16 bytes are 8 neighbours of the depth: two instructions' worth. Weights and x are permuted alike.
        const uint4 low = weights.packs[at][step][0], high = weights.packs[at][step][1];
        weights.fetch(at, step, part.in_turn(next, Result::APART), next < part.to);
        const u32 early[4] = {low.x, high.x, low.y, high.y}, late[4] = {low.z, high.z, low.w, high.w};
#pragma unroll
        for (u32 tokens = 0; tokens < TOKENS / 8; tokens++) {
          uint4 there = tile[place(tokens * 8 + g, (half * ROWS_STEPS + step) * 4 + t)];
          multiply_tile<T>(sums[tokens], early, {there.x, there.y});
          multiply_tile<T>(sums[tokens], late, {there.z, there.w});
        }
      }
    }
  finish_rows<TOKENS>(sums, result, row, first_token, memory);
}

// The same in f32 on plain arithmetic: for checks, not for speed. A thread has 8 tokens of one row of the weights and of the row
// 8 further on.
template <class T, u32 TOKENS, class Result>
__device__ void linear_rows_plain(const T *weight, const T *x, Result result, u32 depth, u32 splits) {
  wait_for_previous();
  constexpr u32 THREADS = ROWS_THREADS<Result>, PAIRS = Result::TILE / 2;
  const Part part = Part::of(depth, splits);
  const u32 last = min(part.to * ROWS_DEPTH, depth), first_token = blockIdx.y * TOKENS;
  __shared__ u32 largest[TOKENS];
  for (u32 i = threadIdx.x; i < TOKENS; i += THREADS) largest[i] = 0;
  __syncthreads();
  for (u32 i = threadIdx.x; i < PAIRS * (TOKENS / 8); i += THREADS) {
    u32 row = i % PAIRS / 8 * 16 + i % 8, own = first_token + i / PAIRS * 8;
    u32 rows[2] = {result.weight_row(row), result.weight_row(row + 8)};
    for (u32 token = own; token < min(own + 8, result.rows); token++) {
      float sums[2] = {};
      for (u32 half = 0; half < 2; half++)
        for (u32 k = part.from * ROWS_DEPTH; k < last && rows[half] < result.weight_rows(); k++)
          sums[half] = fmaf(weight[u64(rows[half]) * depth + k], x[u64(token) * depth + k], sums[half]);
      result.write(token, row, sums[0], sums[1]);
      if constexpr (Result::COMPARES) atomicMax(&largest[token - first_token], result.larger(row, sums[0], sums[1]));
    }
  }
  if constexpr (Result::COMPARES)
    if (result.largest) tell_largest<THREADS>(largest, TOKENS, result.largest + first_token, result.rows - first_token);
}

// How many blocks run on a multiprocessor at once: those of the next kernel find room beside this one's.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr u32 ROWS_AT_ONCE = 1; // its 64 KiB of shared memory have room for no more
#else
constexpr u32 ROWS_AT_ONCE = 2;
#endif

#define ROWS_KERNELS(T, TOKENS, PRODUCT)                                                                                       \
  KERNEL_AT_ONCE(ROWS_AT_ONCE, ROWS_THREADS<Sums>, linear_rows_##T##_##TOKENS, const T *weight, const T *x, float *out, u32 rows, u32 width,       \
         u32 depth, u32 splits, u32 *largest) {                                                                                \
    PRODUCT<T, TOKENS>(weight, x, Sums{out, rows, width, largest}, depth, splits);                                             \
  }                                                                                                                            \
  KERNEL_AT_ONCE(ROWS_AT_ONCE, ROWS_THREADS<Swiglu<T>>, swiglu_rows_##T##_##TOKENS, const T *weight, const T *x, T *out, u32 rows, u32 width,      \
         u32 depth) {                                                                                                          \
    PRODUCT<T, TOKENS>(weight, x, Swiglu<T>{out, rows, width}, depth, 1);                                                      \
  }
#define ROWS_KERNELS_OF(T, PRODUCT)                                                                                            \
  ROWS_KERNELS(T, 8, PRODUCT) ROWS_KERNELS(T, 16, PRODUCT) ROWS_KERNELS(T, 32, PRODUCT) ROWS_KERNELS(T, 64, PRODUCT)
ROWS_KERNELS_OF(bf16, linear_rows)
ROWS_KERNELS_OF(f16, linear_rows)
ROWS_KERNELS_OF(f32, linear_rows_plain)
