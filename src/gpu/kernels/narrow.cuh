#pragma once
#include "common.cuh"

// Stores a pack as numbers of T, 16 or 8 bytes at once. It uses __stwb, because the compiler sometimes turns an assignment into one
// store per number.
__device__ __forceinline__ void store_narrow(float *to, const Pack<float> &pack) {
  __stwb(reinterpret_cast<float4 *>(to), float4{pack.of[0], pack.of[1], pack.of[2], pack.of[3]});
}

template <class T> __device__ __forceinline__ void store_narrow(T *to, const Pack<float> &pack) {
  T narrow[4];
  for (u32 k = 0; k < 4; k++) narrow[k] = from_float<T>(pack.of[k]);
  uint2 word;
  memcpy(&word, narrow, sizeof word);
  __stwb(reinterpret_cast<uint2 *>(to), word);
}
