// A GPU in a few hundred lines of C++, so that the kernels' own source runs in the tests under AddressSanitizer and
// UndefinedBehaviorSanitizer: blocks one after the other, a block's threads as fibers that change places at barriers and warp
// instructions. Every second launch runs the threads backwards: a missing barrier then changes the result.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <utility>
#include <vector>

#define __device__
#define __forceinline__ inline
#define __restrict__
#define __shared__ static
#define __align__(n) alignas(n)

using std::max;
using std::min;

struct dim3 {
  unsigned x, y, z;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace shim {

extern dim3 thread_index, block_index, block_size, grid_size;
extern unsigned char *dynamic_shared;

// Waits for all threads of the block.
void block_barrier();
// Waits for all lanes of the warp.
void warp_barrier();
// Room for one value of each lane of this warp; two rooms take turns, so that one barrier an exchange is enough.
unsigned char *exchange_room();
constexpr unsigned ROOM_A_LANE = 64;
[[noreturn]] void fail(const char *what);

template <class V> V exchange(V mine, unsigned lane) {
  static_assert(sizeof(V) <= ROOM_A_LANE);
  unsigned char *room = exchange_room();
  std::memcpy(room + thread_index.x % 32 * ROOM_A_LANE, &mine, sizeof(V));
  warp_barrier();
  V theirs;
  std::memcpy(&theirs, room + lane % 32 * ROOM_A_LANE, sizeof(V));
  return theirs;
}

struct Kernel {
  const char *name;
  unsigned threads;
  std::vector<unsigned> sizes; // of the parameters
  std::function<void(void **)> call;
};

std::vector<Kernel> &kernels();

template <class... A, size_t... I>
std::function<void(void **)> caller(void (*kernel)(A...), std::index_sequence<I...>) {
  return [kernel](void **arguments) { kernel(*static_cast<std::decay_t<A> *>(arguments[I])...); };
}

struct Register {
  template <class... A> Register(const char *name, unsigned threads, void (*kernel)(A...)) {
    kernels().push_back({name, threads, {unsigned(sizeof(A))...}, caller(kernel, std::index_sequence_for<A...>())});
  }
};

} // namespace shim

#define threadIdx (shim::thread_index)
#define blockIdx (shim::block_index)
#define blockDim (shim::block_size)
#define gridDim (shim::grid_size)
#define KERNEL(threads, name, ...)                                                                                             \
  extern "C" void name(__VA_ARGS__);                                                                                           \
  static shim::Register register_##name(#name, threads, name);                                                                 \
  extern "C" void name(__VA_ARGS__)
#define KERNEL_ALONE KERNEL
#define KERNEL_BESIDE(threads, blocks, name, ...) KERNEL(threads, name, __VA_ARGS__)
#define DYNAMIC_SHARED(name) unsigned char *name = shim::dynamic_shared

inline void __syncthreads() { shim::block_barrier(); }
inline void __syncwarp(unsigned = 0) { shim::warp_barrier(); }
template <class V> V __shfl_xor_sync(unsigned, V mine, unsigned far) {
  return shim::exchange(mine, (shim::thread_index.x % 32) ^ far);
}
template <class V> V __shfl_sync(unsigned, V mine, unsigned lane) { return shim::exchange(mine, lane); }
template <class V> V __shfl_up_sync(unsigned, V mine, unsigned far) {
  unsigned lane = shim::thread_index.x % 32;
  return shim::exchange(mine, lane < far ? lane : lane - far);
}
template <class V> V __shfl_down_sync(unsigned, V mine, unsigned far) {
  unsigned lane = shim::thread_index.x % 32;
  return shim::exchange(mine, lane + far > 31 ? lane : lane + far);
}
inline unsigned __ballot_sync(unsigned, bool mine) {
  unsigned lanes = 0, lane = shim::thread_index.x % 32;
  for (unsigned far = 0; far < 32; far++) lanes |= unsigned(shim::exchange(unsigned(mine), lane ^ far)) << (lane ^ far);
  return lanes;
}

template <class N> N atomicAdd(N *at, N more) {
  N before = *at;
  *at = before + more;
  return before;
}
template <class N> N atomicMax(N *at, N other) {
  N before = *at;
  *at = other > before ? other : before;
  return before;
}
template <class N> N atomicOr(N *at, N bits) {
  N before = *at;
  *at = before | bits;
  return before;
}
inline void __threadfence_system() {}

inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((uint64_t(a) * b) >> 32); }
template <class V> V __ldg(const V *at) { return *at; }
template <class V> void __stwb(V *at, V x) { *at = x; }
using std::isfinite;

struct bf16 {
  uint16_t bits;
};
typedef _Float16 f16;
inline float __bfloat162float(bf16 x) { return __uint_as_float(unsigned(x.bits) << 16); }
inline bf16 __float2bfloat16_rn(float x) {
  unsigned bits = __float_as_uint(x);
  if (std::isnan(x)) return {uint16_t(0x7fff)};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
inline float __half2float(f16 x) { return float(x); }
inline f16 __float2half_rn(float x) { return f16(x); }

// The matrix instruction: each lane shows its words, then computes its four numbers from what all have shown.
template <class T> void multiply_tile(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  struct Shown {
    unsigned a[4], b[2];
  } mine;
  std::memcpy(mine.a, a, sizeof a);
  std::memcpy(mine.b, b, sizeof b);
  unsigned char *room = shim::exchange_room();
  unsigned lane = shim::thread_index.x % 32;
  std::memcpy(room + lane * shim::ROOM_A_LANE, &mine, sizeof mine);
  shim::warp_barrier();
  auto number = [&](unsigned of_lane, unsigned word, unsigned half) {
    uint16_t bits;
    std::memcpy(&bits, room + of_lane * shim::ROOM_A_LANE + 4 * word + 2 * half, 2);
    T value;
    std::memcpy(&value, &bits, 2);
    if constexpr (sizeof(T) == 2) {
      if constexpr (std::is_same_v<T, bf16>) return __bfloat162float(value);
      else return __half2float(value);
    }
  };
  for (unsigned i = 0; i < 4; i++) {
    unsigned row = lane / 4 + (i < 2 ? 0 : 8), column = 2 * (lane % 4) + i % 2;
    float sum = 0;
    for (unsigned k = 0; k < 16; k++) {
      unsigned word = (row >= 8 ? 1 : 0) + (k >= 8 ? 2 : 0);
      sum += number(row % 8 * 4 + k % 8 / 2, word, k % 2) * number(column * 4 + k % 8 / 2, 4 + (k >= 8 ? 1 : 0), k % 2);
    }
    d[i] += sum;
  }
}

inline void copy16(void *to, const void *from, bool valid) {
  if (valid) std::memcpy(to, from, 16);
  else std::memset(to, 0, 16);
}
inline void copy4(void *to, const void *from) { std::memcpy(to, from, 4); }
inline void let_next_begin() {}
inline void wait_for_previous() {}
inline void commit_copies() {}
template <unsigned> void wait_copies() {}
