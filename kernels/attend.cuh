// What forward and backward of attention over packed sequences share.
//
// A query in row i of a sequence stands at position prefix_len + i and sees all positions up to its own: those of the prefix,
// which lie elsewhere among the rows, and then the sequence's. Tiles of positions are cut where they would be if the prefix were
// the sequence's own, so that a prompt computed once gives the bits of one computed for each completion.
#pragma once
#include "tile.cuh"

// As src/gpu/packed/batch.rs writes it.
struct Sequence {
  u32 start, len;               // its rows
  u32 prefix_start, prefix_len; // rows of what it goes on from
  u32 entry;                    // first of prefix_len + len rows of its own among gradients of keys and values
  u32 readers;                  // how many of the sequences after it go on from it

  __device__ u32 positions() const { return prefix_len + len; }
  __device__ u32 row(u32 position) const {
    return position < prefix_len ? prefix_start + position : start + position - prefix_len;
  }
};

// How many rows of each side a block holds: 16 of its own side for each warp.
template <class T, u32 E> struct Tiling {
  static constexpr u32 WARPS = sizeof(T) == 2 ? (E > 64 ? 2 : 4) : (E > 64 ? 1 : 2);
  static constexpr u32 OTHER = sizeof(T) == 2 ? (E > 64 ? 32 : 64) : (E > 64 ? 16 : 32);
  static constexpr u32 THREADS = WARPS * WARP;
  static constexpr u32 OWN = WARPS * 16;
  static constexpr u32 STRIDE = E + 16 / sizeof(T); // rows start in different banks
};

// Copies E numbers of each of ROWS positions to rows of STRIDE, zeros from position `end` on.
template <class T, u32 E, u32 ROWS>
__device__ __forceinline__ void load_positions(T *to, const T *from, u64 width, const Sequence &sequence, u32 first, u32 end) {
  constexpr u32 PACKS = E / Pack<T>::SIZE;
  for (u32 i = threadIdx.x; i < ROWS * PACKS; i += Tiling<T, E>::THREADS) {
    u32 position = first + i / PACKS, column = i % PACKS * Pack<T>::SIZE;
    u64 row = sequence.row(min(position, end - 1));
    copy16(to + i / PACKS * Tiling<T, E>::STRIDE + column, from + row * width + column, position < end);
  }
}

// Waits for this block's copies.
__device__ __forceinline__ void finish_copies() {
  commit_copies();
  wait_copies<0>();
  __syncthreads();
}

// Turns a gradient (16, E) back by the angles of its rows' positions, {g's, g + 8's}; the table holds cosines, then sines.
template <u32 E>
__device__ __forceinline__ void turn_back(float (&d)[E / 8][4], const u32 (&positions)[2], const float *rope, u32 table) {
  u32 t = threadIdx.x % 4;
  for (u32 j = 0; j < E / 16; j++)
    for (u32 i = 0; i < 4; i++) {
      u64 at = u64(min(positions[i / 2], table - 1)) * (E / 2) + 8 * j + 2 * t + i % 2;
      float cosine = rope[at], sine = rope[u64(table) * (E / 2) + at], a = d[j][i], b = d[j + E / 16][i];
      d[j][i] = a * cosine + b * sine;
      d[j + E / 16][i] = b * cosine - a * sine;
    }
}

#define FOR_EACH_WIDTH(MAKE, T) MAKE(T, 16) MAKE(T, 32) MAKE(T, 64) MAKE(T, 128)
#define FOR_EACH_TYPE_AND_WIDTH(MAKE) FOR_EACH_WIDTH(MAKE, f32) FOR_EACH_WIDTH(MAKE, bf16) FOR_EACH_WIDTH(MAKE, f16)
