// Shared by the forward and backward passes of attention over packed sequences.
//
// A query in row i of a sequence has position prefix_len + i and sees all positions up to its own: first those of the prefix, whose
// rows are elsewhere, then those of the sequence. Positions are divided into tiles as if the prefix belonged to the sequence, so that
// a prompt that is computed once gives the same bits as one that is computed per completion.
#pragma once
#include "tile.cuh"

// Written by src/gpu/packed/batch.rs.
struct Sequence {
  u32 start, len;               // the sequence's rows
  u32 prefix_start, prefix_len; // rows of the sequence that it continues
  u32 entry;                    // its first row, of prefix_len + len, in the gradients of keys and values
  u32 readers;                  // how many of the following sequences continue it

  __device__ u32 positions() const { return prefix_len + len; }
  __device__ u32 row(u32 position) const {
    return position < prefix_len ? prefix_start + position : start + position - prefix_len;
  }
};

// A block holds 16 rows of its own side per warp and iterates over the other side: it computes with OTHER rows while the next ones are
// copied into the other of two buffers.
template <class T, u32 E> struct Tiling {
  static constexpr u32 WARPS = sizeof(T) == 2 ? (E > 64 ? 2 : 4) : (E > 64 ? 1 : 2);
  static constexpr u32 OTHER = sizeof(T) == 2 ? (E > 64 ? 16 : 32) : (E > 64 ? 8 : 16);
  static constexpr u32 THREADS = WARPS * WARP;
  static constexpr u32 OWN = WARPS * 16;
  static constexpr u32 STRIDE = E + 16 / sizeof(T); // rows start in different banks

  // How many blocks have `warps` warps together, or half as many for wide heads, which take more registers.
  static constexpr u32 blocks(u32 warps) { return (E > 64 ? warps / 2 : warps) / WARPS; }
};

// Copies E numbers of each of ROWS positions to rows of STRIDE, and zeros from position `end` on.
template <class T, u32 E, u32 ROWS>
__device__ __forceinline__ void load_positions(T *to, const T *from, u64 width, const Sequence &sequence, u32 first, u32 end) {
  constexpr u32 PACKS = E / Pack<T>::SIZE, ALL = ROWS * PACKS, THREADS = Tiling<T, E>::THREADS;
  for (u32 done = 0; done < ALL; done += THREADS) { // the same count in each thread, so that the loop is unrolled
    u32 i = done + threadIdx.x;
    if (ALL % THREADS > 0 && i >= ALL) return;
    u32 position = first + i / PACKS, column = i % PACKS * Pack<T>::SIZE;
    u64 row = sequence.row(min(position, end - 1));
    copy16(to + i / PACKS * Tiling<T, E>::STRIDE + column, from + row * width + column, position < end);
  }
}

// Waits for all copies of this block, and for all of its warps.
__device__ __forceinline__ void meet_copies() {
  wait_copies<0>();
  __syncthreads();
}

// Sets the scores for which `visible(j, i)` is false to -INFINITY.
template <u32 N, class Visible> __device__ __forceinline__ void hide(float (&scores)[N / 8][4], const Visible &visible) {
  for (u32 j = 0; j < N / 8; j++)
    for (u32 i = 0; i < 4; i++)
      if (!visible(j, i)) scores[j][i] = -INFINITY;
}

// Rotates a gradient (16, E) back by the angles of the positions of its rows g and g + 8; the table holds cosines, then sines.
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
