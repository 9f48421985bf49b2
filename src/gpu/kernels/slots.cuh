// The state of the sequences being sampled: one word per field and slot.
#pragma once
#include "common.cuh"

struct Slots {
  u32 *state; // (FIELDS, count)
  u32 count;

  enum Field { TOKEN, DRAWN, PROMPT, PROMPT_LEN, KEY_LOW, KEY_HIGH, SAMPLE, RUNNING, FIELDS };
  static constexpr u32 NONE = 0xffffffffu;

  __device__ u32 &at(Field field, u32 slot) const { return state[u64(field) * count + slot]; }
  __device__ bool runs(u32 slot) const { return slot != NONE && at(RUNNING, slot); }
};
