#include "common.cuh"

// y (rows, width) = x (rows, depth) weight (width, depth)^T for the few rows of a decode step. The time goes into reading the weights
// once; the first of them are fetched while the previous kernel still runs. The grid divides the rows of the weights (x), the tokens by
// TOKENS (y), and the depth by `splits` (z); the next kernel adds up the partial sums. The order of a token's sums depends on (depth,
// splits) and the column alone, so its result has the same bits in any batch.

constexpr u32 ROWS_TILE = 64; // rows of the weights per block, 16 for each of four warps
// From 16 tokens on, eight warps share them: four warps are too few to hide latency.
template <u32 TOKENS> struct Shares {
  static constexpr u32 PARTS = TOKENS < 16 ? 1 : 2, THREADS = 128 * PARTS, TOKENS_OF_A_WARP = TOKENS / PARTS;
};
constexpr u32 ROWS_DEPTH = 64; // depth per stage: 128 bytes, 8 packs
constexpr u32 ROWS_STAGES = 4;

// Writes partial sums in f32, (splits, rows, width).
struct Sums {
  float *out;
  u32 rows, width;
  u32 *largest; // (rows), `ordered`: raised to the largest result of each row; null unless the results are logits
  static constexpr bool COMPARES = true, APART = false; // splits, or more tiles than run at once, already keep blocks apart
  static constexpr u32 RESULTS = ROWS_TILE;

  // The row of the weights that is row `i` of this block's tile; there is none from `weight_rows` on.
  __device__ u32 weight_row(u32 i) const { return blockIdx.x * RESULTS + i; }
  __device__ u32 weight_rows() const { return width; }

  // `low` and `high` are the results of rows i and i + 8 of the tile for `token`.
  __device__ void write(u32 token, u32 i, float low, float high) const {
    float *row = out + (u64(blockIdx.z) * rows + token) * width + blockIdx.x * RESULTS;
    if (blockIdx.x * RESULTS + i < width) row[i] = low;
    if (blockIdx.x * RESULTS + i + 8 < width) row[i + 8] = high;
  }

  // The larger of the same two results, `ordered`.
  __device__ u32 larger(u32 i, float low, float high) const {
    u32 index = blockIdx.x * RESULTS + i;
    return max(index < width ? ordered_if_finite(low) : 0, index + 8 < width ? ordered_if_finite(high) : 0);
  }
};

// Writes silu(gate) * up, (rows, width); the weights are gate (width, depth), then up. Gate and up of one result are 8 rows apart in a
// tile, where the matrix instruction returns both to one lane.
template <class T> struct Swiglu {
  T *out;
  u32 rows, width;
  static constexpr u32 RESULTS = ROWS_TILE / 2;
  static constexpr bool COMPARES = false, APART = true; // pays for 64 tokens, see tests/bench/results/2026-11-26-h100.md

  __device__ u32 result(u32 i) const { return blockIdx.x * RESULTS + i / 16 * 8 + i % 8; }
  __device__ u32 weight_row(u32 i) const {
    u32 row = result(i);
    if (row >= width) return weight_rows();
    return i % 16 < 8 ? row : width + row;
  }
  __device__ u32 weight_rows() const { return 2 * width; }

  // Both are rounded as training stores them, so that it computes the same log-probabilities.
  __device__ void write(u32 token, u32 i, float gate, float up) const {
    gate = to_float(from_float<T>(gate)), up = to_float(from_float<T>(up));
    if (result(i) < width) out[u64(token) * width + result(i)] = from_float<T>(gate / (1.0f + exp_of(-gate)) * up);
  }
};

// The part of the depth that split `z` adds up, in stages.
struct Part {
  u32 from, to;
  // With `apart`, each tile of columns starts at another stage, because blocks that read the same x at the same time wait for the same few
  // banks of the cache.
  __device__ u32 in_turn(u32 stage, bool apart) const { return apart ? from + (stage - from + blockIdx.x) % (to - from) : stage; }
  __device__ static Part of(u32 depth, u32 splits) {
    u32 stages = (depth + ROWS_DEPTH - 1) / ROWS_DEPTH, share = (stages + splits - 1) / splits;
    return {min(blockIdx.z * share, stages), min(blockIdx.z * share + share, stages)};
  }
};

// The place of a pack in rows of 8 packs in shared memory. Every second row is permuted, so that eight lanes that read together use all
// banks.
__device__ __forceinline__ u32 place(u32 row, u32 pack) { return row * 8 + (pack ^ (row % 2 * 4)); }

// Starts to copy ROWS rows of a matrix (count, depth), those that `row_of` selects, to the rows of a stage from `at` on; zeros for rows
// that do not exist.
template <u32 THREADS, u32 ROWS, class T, class RowOf>
__device__ __forceinline__ void fetch_rows(uint4 *to, u32 at, const T *matrix, u32 count, u32 depth, u32 stage, RowOf row_of) {
#pragma unroll
  for (u32 i = threadIdx.x; i < ROWS * 8; i += THREADS) {
    u32 row = i / 8, pack = i % 8, k = stage * ROWS_DEPTH + pack * 8, index = row_of(row);
    bool valid = k < depth && index < count;
    copy16(to + place(at + row, pack), matrix + (valid ? u64(index) * depth + k : 0), valid);
  }
}

// Finds the largest result of each token, first in a block, then in the grid.
template <u32 TOKENS> struct Largest {
  u32 *here; // shared memory, (TOKENS), no longer used otherwise when all threads have reached `start`

  __device__ void start() const {
    __syncthreads();
    for (u32 i = threadIdx.x; i < TOKENS; i += Shares<TOKENS>::THREADS) here[i] = 0;
    __syncthreads();
  }
  __device__ void tell(u32 *largest, u32 first_token, u32 rows) const {
    __syncthreads();
    for (u32 i = threadIdx.x; i < TOKENS && first_token + i < rows; i += Shares<TOKENS>::THREADS) atomicMax(&largest[first_token + i], here[i]);
  }
};

template <class T, u32 TOKENS, class Result>
__device__ void linear_rows(const T *weight, const T *x, Result result, u32 depth, u32 splits) {
  DYNAMIC_SHARED(memory);
  constexpr u32 STAGE = (ROWS_TILE + TOKENS) * 8; // packs
  constexpr u32 THREADS = Shares<TOKENS>::THREADS, MINE = Shares<TOKENS>::TOKENS_OF_A_WARP;
  uint4 *stages = reinterpret_cast<uint4 *>(memory);
  const u32 warp = threadIdx.x / WARP % 4, g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
  const u32 first_token = blockIdx.y * TOKENS, mine = threadIdx.x / 128 * MINE; // of the block's tokens
  const Part part = Part::of(depth, splits);

  auto fetch_weight = [&](u32 stage) {
    if (stage < part.to)
      fetch_rows<THREADS, ROWS_TILE>(stages + stage % ROWS_STAGES * STAGE, 0, weight, result.weight_rows(), depth, part.in_turn(stage, Result::APART),
                            [&](u32 i) { return result.weight_row(i); });
  };
  auto fetch_x = [&](u32 stage) {
    if (stage < part.to)
      fetch_rows<THREADS, TOKENS>(stages + stage % ROWS_STAGES * STAGE, ROWS_TILE, x, result.rows, depth, part.in_turn(stage, Result::APART),
                         [&](u32 i) { return first_token + i; });
    commit_copies();
  };

  float sums[MINE / 8][4] = {};
  let_next_begin();
  for (u32 ahead = 0; ahead + 1 < ROWS_STAGES; ahead++) fetch_weight(part.from + ahead);
  wait_for_previous();
  for (u32 ahead = 0; ahead + 1 < ROWS_STAGES; ahead++) fetch_x(part.from + ahead);
  for (u32 stage = part.from; stage < part.to; stage++) {
    wait_copies<ROWS_STAGES - 2>();
    __syncthreads(); // this stage has arrived, and the previous one may be overwritten
    fetch_weight(stage + ROWS_STAGES - 1), fetch_x(stage + ROWS_STAGES - 1);
    const uint4 *tile = stages + stage % ROWS_STAGES * STAGE;
    for (u32 half = 0; half < 2; half++) {
      // A lane's 16 bytes are 8 neighbours in depth, enough for two instructions. Weights and x are permuted alike.
      uint4 low = tile[place(warp * 16 + g, half * 4 + t)], high = tile[place(warp * 16 + g + 8, half * 4 + t)];
      const u32 first[4] = {low.x, high.x, low.y, high.y}, second[4] = {low.z, high.z, low.w, high.w};
#pragma unroll
      for (u32 tokens = 0; tokens < MINE / 8; tokens++) {
        uint4 there = tile[place(ROWS_TILE + mine + tokens * 8 + g, half * 4 + t)];
        multiply_tile<T>(sums[tokens], first, {there.x, there.y});
        multiply_tile<T>(sums[tokens], second, {there.z, there.w});
      }
    }
  }
#pragma unroll
  for (u32 tokens = 0; tokens < MINE / 8; tokens++)
    for (u32 i = 0; i < 2; i++) {
      u32 token = first_token + mine + tokens * 8 + 2 * t + i;
      if (token < result.rows) result.write(token, warp * 16 + g, sums[tokens][i], sums[tokens][2 + i]);
    }
  if constexpr (Result::COMPARES) {
    if (!result.largest) return;
    // Reuses the memory of the stages: with memory of its own a block would exceed the available 48 KiB (Turing: 64).
    wait_copies<0>();
    u32 *room = reinterpret_cast<u32 *>(memory);
    const Largest<TOKENS> largest{room};
    largest.start();
#pragma unroll
    for (u32 tokens = 0; tokens < MINE / 8; tokens++)
      for (u32 i = 0; i < 2; i++) {
        u32 large = result.larger(warp * 16 + g, sums[tokens][i], sums[tokens][2 + i]);
        for (u32 far = 4; far < WARP; far *= 2) large = max(large, __shfl_xor_sync(ALL_LANES, large, far));
        if (g == 0) atomicMax(&room[mine + tokens * 8 + 2 * t + i], large);
      }
    largest.tell(result.largest, first_token, result.rows);
  }
}

// The same in f32 on plain arithmetic, for checks, not for speed. A thread computes 8 tokens for one row of the weights and for the row 8
// further on.
template <u32 TOKENS, class Result>
__device__ void linear_rows_plain(const float *weight, const float *x, Result result, u32 depth, u32 splits) {
  wait_for_previous();
  const Part part = Part::of(depth, splits);
  const u32 last = min(part.to * ROWS_DEPTH, depth);
  __shared__ u32 room[TOKENS];
  const Largest<TOKENS> largest{room};
  largest.start();
  for (u32 i = threadIdx.x; i < ROWS_TILE / 2 * (TOKENS / 8); i += Shares<TOKENS>::THREADS) {
    u32 pair = i % (ROWS_TILE / 2), row = pair / 8 * 16 + pair % 8, first_token = blockIdx.y * TOKENS + i / (ROWS_TILE / 2) * 8;
    u32 rows[2] = {result.weight_row(row), result.weight_row(row + 8)};
    for (u32 token = first_token; token < min(first_token + 8, result.rows); token++) {
      float sums[2] = {};
      for (u32 half = 0; half < 2; half++)
        for (u32 k = part.from * ROWS_DEPTH; k < last && rows[half] < result.weight_rows(); k++)
          sums[half] = fmaf(weight[u64(rows[half]) * depth + k], x[u64(token) * depth + k], sums[half]);
      result.write(token, row, sums[0], sums[1]);
      if constexpr (Result::COMPARES) atomicMax(&room[token % TOKENS], result.larger(row, sums[0], sums[1]));
    }
  }
  if constexpr (Result::COMPARES)
    if (result.largest) largest.tell(result.largest, blockIdx.y * TOKENS, result.rows);
}

#define LINEAR_ROWS(T, TOKENS)                                                                                                 \
  KERNEL(Shares<TOKENS>::THREADS, linear_rows_##T##_##TOKENS, const T *weight, const T *x, float *out, u32 rows, u32 width,    \
         u32 depth, u32 splits, u32 *largest) {                                                                                \
    linear_rows<T, TOKENS>(weight, x, Sums{out, rows, width, largest}, depth, splits);                                         \
  }                                                                                                                            \
  KERNEL(Shares<TOKENS>::THREADS, swiglu_rows_##T##_##TOKENS, const T *weight, const T *x, T *out, u32 rows, u32 width,        \
         u32 depth) {                                                                                                          \
    linear_rows<T, TOKENS>(weight, x, Swiglu<T>{out, rows, width}, depth, 1);                                                  \
  }
#define LINEAR_ROWS_PLAIN(TOKENS)                                                                                              \
  KERNEL(Shares<TOKENS>::THREADS, linear_rows_f32_##TOKENS, const f32 *weight, const f32 *x, float *out, u32 rows, u32 width,  \
         u32 depth, u32 splits, u32 *largest) {                                                                                \
    linear_rows_plain<TOKENS>(weight, x, Sums{out, rows, width, largest}, depth, splits);                                      \
  }                                                                                                                            \
  KERNEL(Shares<TOKENS>::THREADS, swiglu_rows_f32_##TOKENS, const f32 *weight, const f32 *x, f32 *out, u32 rows, u32 width,    \
         u32 depth) {                                                                                                          \
    linear_rows_plain<TOKENS>(weight, x, Swiglu<f32>{out, rows, width}, depth, 1);                                             \
  }
#define LINEAR_ROWS_OF(T) LINEAR_ROWS(T, 8) LINEAR_ROWS(T, 16) LINEAR_ROWS(T, 32) LINEAR_ROWS(T, 64)
LINEAR_ROWS_OF(bf16)
LINEAR_ROWS_OF(f16)
LINEAR_ROWS_PLAIN(8)
LINEAR_ROWS_PLAIN(16)
LINEAR_ROWS_PLAIN(32)
LINEAR_ROWS_PLAIN(64)
