// Shared by all kernels: number types, sums across threads, the matrix instruction. Compiled by nvcc for GPUs and, through the shim in
// tests/shim/, by a C++ compiler for tests on the CPU.
//
// A kernel is declared with KERNEL(threads, name, parameters...) and launched with exactly that many threads per block. The order of
// every sum depends on the shapes alone, never on timing or on other rows of the batch.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define KERNEL(threads, name, ...) extern "C" __global__ void __launch_bounds__(threads) name(__VA_ARGS__)
// As KERNEL, with few enough registers for this many blocks per multiprocessor.
#define KERNEL_BESIDE(threads, blocks, name, ...) extern "C" __global__ void __launch_bounds__(threads, blocks) name(__VA_ARGS__)
// As KERNEL, for few large blocks: each may take all registers of a multiprocessor.
#define KERNEL_ALONE(threads, name, ...) extern "C" __global__ void __launch_bounds__(threads, 1) name(__VA_ARGS__)
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#else
#include "shim.h"
#endif

typedef float f32;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr u32 WARP = 32;
constexpr u32 ALL_LANES = 0xffffffffu;

// ---- numbers ----------------------------------------------------------------------------------------------------------------

#ifdef __CUDACC__
typedef __nv_bfloat16 bf16;
typedef __half f16;
#endif

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }

template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }
template <> __device__ __forceinline__ f16 from_float<f16>(float x) { return __float2half_rn(x); }

// 16 bytes of T: 4 of f32, 8 of the 16-bit types.
template <class T> struct alignas(16) Pack {
  static constexpr u32 SIZE = 16 / sizeof(T);
  T of[SIZE];
};

template <class T> __device__ __forceinline__ Pack<T> load_pack(const T *from) {
  return *reinterpret_cast<const Pack<T> *>(from);
}

template <class T> __device__ __forceinline__ void store_pack(T *to, const Pack<T> &pack) {
  *reinterpret_cast<Pack<T> *>(to) = pack;
}

// N adjacent numbers, read and written at once.
template <class T, u32 N> struct alignas(N * sizeof(T)) Few {
  T of[N];
};

// Cephes' expf with the steps of src/model/simd/mod.rs, so that the same logits give the same weights on CPU and GPU. x is from -88, where the
// result is 0, to 88. Zero results go through the same steps, because a special case would become a branch per x.
__device__ __forceinline__ float exp_within(float x) {
  const float round = 12582912.0f;
  float shifted = fmaf(x, 1.44269504088896340736f, round);
  float n = __fsub_rn(shifted, round);
  float r = fmaf(n, 2.1219444e-4f, fmaf(n, -0.6933594f, x));
  float p = 1.9875691e-4f;
  p = fmaf(p, r, 1.3982e-3f);
  p = fmaf(p, r, 8.333452e-3f);
  p = fmaf(p, r, 4.1665796e-2f);
  p = fmaf(p, r, 1.6666665e-1f);
  p = fmaf(p, r, 0.5f);
  p = __fadd_rn(fmaf(__fmul_rn(p, r), r, r), 1.0f);
  float scale = __uint_as_float((__float_as_uint(shifted) << 23) + 0x3f800000u); // 0 where n is -127
  return __fmul_rn(p, scale);
}

// 0 below -87.3.
__device__ __forceinline__ float exp_of(float x) {
  return exp_within(x < -87.3f ? -88.0f : fminf(fmaxf(x, -87.3f), 88.0f));
}

// As exp_of, in fewer steps, for x that is never above 88; below -87.3 the result may still be 2^-126.
__device__ __forceinline__ float exp_below(float x) { return exp_within(fmaxf(x, -88.0f)); }

// Maps floats to unsigned integers of the same order, so that atomicMax finds the largest, in whatever order threads run.
__device__ __forceinline__ u32 ordered(float x) {
  u32 bits = __float_as_uint(x);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The same, with all numbers that are not finite above the others; from_ordered turns these into NaN.
__device__ __forceinline__ u32 ordered_if_finite(float x) { return isfinite(x) ? ordered(x) : 0xffffffffu; }

__device__ __forceinline__ float from_ordered(u32 bits) { return __uint_as_float(bits >> 31 ? bits & 0x7fffffffu : ~bits); }

// Philox4x32-10 as in src/numbers/rng.rs: the counter becomes four random words.
__device__ __forceinline__ void philox(u32 (&counter)[4], u32 key_low, u32 key_high) {
  for (u32 round = 0; round < 10; round++) {
    u32 low0 = 0xd2511f53u * counter[0], high0 = __umulhi(0xd2511f53u, counter[0]);
    u32 low1 = 0xcd9e8d57u * counter[2], high1 = __umulhi(0xcd9e8d57u, counter[2]);
    counter[0] = high1 ^ counter[1] ^ key_low, counter[1] = low1;
    counter[2] = high0 ^ counter[3] ^ key_high, counter[3] = low0;
    key_low += 0x9e3779b9u, key_high += 0xbb67ae85u;
  }
}

// ---- sums across threads ------------------------------------------------------------------------------------------------------

template <class N> __device__ __forceinline__ N warp_sum(N x) {
  for (u32 far = WARP / 2; far > 0; far /= 2) x += __shfl_xor_sync(ALL_LANES, x, far);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
  for (u32 far = WARP / 2; far > 0; far /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, far));
  return x;
}

// The sum over a block of THREADS, in every thread. `room` is shared memory for one number per warp, free again on return.
template <u32 THREADS, class N> __device__ N block_sum(N x, N *room) {
  x = warp_sum(x);
  if (threadIdx.x % WARP == 0) room[threadIdx.x / WARP] = x;
  __syncthreads();
  N sum = 0;
  for (u32 warp = 0; warp < THREADS / WARP; warp++) sum += room[warp];
  __syncthreads();
  return sum;
}

// The largest over a block; otherwise as block_sum.
template <u32 THREADS> __device__ float block_max(float x, float *room) {
  x = warp_max(x);
  if (threadIdx.x % WARP == 0) room[threadIdx.x / WARP] = x;
  __syncthreads();
  float largest = room[0];
  for (u32 warp = 1; warp < THREADS / WARP; warp++) largest = fmaxf(largest, room[warp]);
  __syncthreads();
  return largest;
}

// ---- matrix instruction and asynchronous copies -----------------------------------------------------------------------------

// d (16 x 8) += a (16 x 16) b (16 x 8), by a warp, accumulated in f32. With g = lane / 4 and t = lane % 4, a lane holds, with two
// neighbours in depth per word, a: (g, 2t) (g + 8, 2t) (g, 2t + 8) (g + 8, 2t + 8); b: (2t, g) (2t + 8, g);
// d: (g, 2t) (g, 2t + 1) (g + 8, 2t) (g + 8, 2t + 1). PTX ISA, "Matrix Fragments for mma.m16n8k16".
template <class T> __device__ void multiply_tile(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]);

#ifdef __CUDACC__

template <> __device__ __forceinline__ void multiply_tile<bf16>(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap(); // the host refuses bf16 on such a device before it launches anything
#endif
}

template <> __device__ __forceinline__ void multiply_tile<f16>(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else // Turing: two instructions of depth 8
  for (u32 half = 0; half < 2; half++)
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
#endif
}

// Copies 16 bytes to shared memory, or zeros if `valid` is false. The copy is complete after wait_copies.
__device__ __forceinline__ void copy16(void *to, const void *from, bool valid) {
#if __CUDA_ARCH__ >= 800
  u32 address = static_cast<u32>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(valid ? 16 : 0));
#else
  *reinterpret_cast<uint4 *>(to) = valid ? *reinterpret_cast<const uint4 *>(from) : make_uint4(0, 0, 0, 0);
#endif
}

// As copy16, for 4 bytes.
__device__ __forceinline__ void copy4(void *to, const void *from) {
#if __CUDA_ARCH__ >= 800
  u32 address = static_cast<u32>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(address), "l"(from));
#else
  *reinterpret_cast<u32 *>(to) = *reinterpret_cast<const u32 *>(from);
#endif
}

// Ends a group of copies.
__device__ __forceinline__ void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;");
#endif
}

// Lets blocks of the next kernel start where there is room for them: see `wait_for_previous`.
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Waits for the end of the previous kernel. In a kernel that is launched early (`Grid::early`), every thread must call this, also in
// blocks that have nothing to do, before it writes anything or reads what a kernel of the same recording writes: any earlier kernel of
// the recording may still run. Weights, and what earlier recordings wrote, may be read before, since the first kernel of a recording is
// not launched early. PTX ISA, "griddepcontrol".
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Waits until at most N groups of this thread's copies are incomplete; for copies of other threads, a barrier must follow.
template <u32 N> __device__ __forceinline__ void wait_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(N));
#endif
}

#endif
