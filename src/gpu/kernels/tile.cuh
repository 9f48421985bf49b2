// Products of small tiles by one warp: with the matrix instruction for 16-bit numbers, with plain multiply-adds for f32.
//
// Sums of a warp's 16 rows and N columns are in float d[N / 8][4], in the order of multiply_tile: with g = lane / 4 and t = lane % 4,
// d[j] is (g, 8j + 2t) (g, 8j + 2t + 1) (g + 8, 8j + 2t) (g + 8, 8j + 2t + 1).
#pragma once
#include "common.cuh"

// Two adjacent numbers in one store.
template <class T> struct alignas(2 * sizeof(T)) Pair {
  T low, high;
};

template <class T> __device__ __forceinline__ void store_pair(T *to, float low, float high) {
  *reinterpret_cast<Pair<T> *>(to) = {from_float<T>(low), from_float<T>(high)};
}

template <class T> __device__ __forceinline__ u32 pair_bits(float low, float high) {
  Pair<T> pair = {from_float<T>(low), from_float<T>(high)};
  u32 bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}

// The sum over the four lanes that share rows.
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(ALL_LANES, x, 1);
  return x + __shfl_xor_sync(ALL_LANES, x, 2);
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
  return fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
}

// ---- four 8 x 8 matrices of 16-bit numbers from shared memory -------------------------------------------------------------------

// Lane 8 i + j passes the address of row j of matrix i. From matrix i a lane gets (lane / 4, 2 (lane % 4)) and its neighbour to the
// right; with `transposed`, (2 (lane % 4), lane / 4) and its neighbour below. PTX ISA, "ldmatrix".
#ifdef __CUDACC__
template <class T> __device__ __forceinline__ void load_matrices(u32 (&words)[4], const T *row, bool transposed) {
  u32 at = static_cast<u32>(__cvta_generic_to_shared(row));
  if (transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(at)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(at)
                 : "memory");
}
#else
template <class T> void load_matrices(u32 (&words)[4], const T *row, bool transposed) {
  unsigned char *room = shim::exchange_room();
  u32 lane = shim::thread_index.x % 32, g = lane / 4, t = lane % 4;
  std::memcpy(room + lane * shim::ROOM_A_LANE, &row, sizeof row);
  shim::warp_barrier();
  for (u32 i = 0; i < 4; i++) {
    T both[2];
    for (u32 half = 0; half < 2; half++) {
      const T *at;
      std::memcpy(&at, room + (8 * i + (transposed ? 2 * t + half : g)) * shim::ROOM_A_LANE, sizeof at);
      both[half] = at[transposed ? g : 2 * t + half];
    }
    std::memcpy(&words[i], both, sizeof words[i]);
  }
}
#endif

// ---- left operands, (16, DEPTH) -------------------------------------------------------------------------------------------------

template <class T, u32 DEPTH> struct Left {
  static constexpr u32 ROOM = 1; // numbers of shared memory that `take` needs; an array has at least 1
  u32 words[DEPTH / 16][4];

  // 16 rows in shared memory.
  __device__ __forceinline__ void load(const T *rows, u32 stride) {
    u32 lane = threadIdx.x % WARP;
    for (u32 k = 0; k < DEPTH / 16; k++) load_matrices(words[k], rows + lane % 16 * stride + 16 * k + lane / 16 * 8, false);
  }

  // From the sums of a product, which have the register layout of a left operand.
  __device__ __forceinline__ void take(const float (&d)[DEPTH / 8][4], T *) {
    for (u32 k = 0; k < DEPTH / 16; k++)
      for (u32 i = 0; i < 4; i++) words[k][i] = pair_bits<T>(d[2 * k + i / 2][2 * (i % 2)], d[2 * k + i / 2][2 * (i % 2) + 1]);
  }
};

template <u32 DEPTH> struct Left<float, DEPTH> {
  static constexpr u32 ROOM = 16 * DEPTH;
  const float *rows;
  u32 stride;

  __device__ __forceinline__ void load(const float *from, u32 width) { rows = from, stride = width; }

  // `room` is shared memory of this warp alone.
  __device__ __forceinline__ void take(const float (&d)[DEPTH / 8][4], float *room) {
    u32 g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    __syncwarp();
    for (u32 j = 0; j < DEPTH / 8; j++)
      for (u32 i = 0; i < 4; i++) room[(g + i / 2 * 8) * DEPTH + 8 * j + 2 * t + i % 2] = d[j][i];
    __syncwarp();
    rows = room, stride = DEPTH;
  }
};

// ---- products -------------------------------------------------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ void multiply_tiles(float (&left)[4], float (&right)[4], const u32 (&a)[4], const u32 (&b)[4]) {
  u32 first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
  multiply_tile<T>(left, a, first);
  multiply_tile<T>(right, a, second);
}

template <u32 N, u32 DEPTH>
__device__ __forceinline__ void multiply_plainly(float (&d)[N / 8][4], const Left<float, DEPTH> &a, const float *b, u32 row_stride,
                                                 u32 column_stride) {
  u32 g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
  for (u32 k = 0; k < DEPTH; k++) {
    float upper = a.rows[g * a.stride + k], lower = a.rows[(g + 8) * a.stride + k];
    for (u32 j = 0; j < N / 8; j++)
      for (u32 i = 0; i < 4; i++)
        d[j][i] = fmaf(i < 2 ? upper : lower, b[k * row_stride + (8 * j + 2 * t + i % 2) * column_stride], d[j][i]);
  }
}

// d += a times the transpose of b, (N, DEPTH) rows of `stride` numbers in shared memory.
template <u32 N, class T, u32 DEPTH>
__device__ __forceinline__ void multiply_rows(float (&d)[N / 8][4], const Left<T, DEPTH> &a, const T *b, u32 stride) {
  u32 lane = threadIdx.x % WARP, b_words[4];
  if constexpr (sizeof(T) == 4) {
    multiply_plainly<N>(d, a, b, 1, stride);
  } else {
    for (u32 n = 0; n < N / 16; n++)
      for (u32 k = 0; k < DEPTH / 16; k++) {
        load_matrices(b_words, b + (16 * n + lane / 16 * 8 + lane % 8) * stride + 16 * k + lane / 8 % 2 * 8, false);
        multiply_tiles<T>(d[2 * n], d[2 * n + 1], a.words[k], b_words);
      }
  }
}

// d += a b, b (DEPTH, N).
template <u32 N, class T, u32 DEPTH>
__device__ __forceinline__ void multiply_columns(float (&d)[N / 8][4], const Left<T, DEPTH> &a, const T *b, u32 stride) {
  u32 lane = threadIdx.x % WARP, b_words[4];
  if constexpr (sizeof(T) == 4) {
    multiply_plainly<N>(d, a, b, stride, 1);
  } else {
    for (u32 n = 0; n < N / 16; n++)
      for (u32 k = 0; k < DEPTH / 16; k++) {
        load_matrices(b_words, b + (16 * k + lane % 16) * stride + 16 * n + lane / 16 * 8, true);
        multiply_tiles<T>(d[2 * n], d[2 * n + 1], a.words[k], b_words);
      }
  }
}
