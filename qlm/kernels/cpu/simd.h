// The few vector operations that the kernels are written in, once for each instruction set: W float32 or int32 lanes.
//
// VF holds W floats, VI W int32, which is also 4 * W bytes for `dot_u8_s8` and the bit operations. Loads and stores take
// any alignment; those ending in _n touch the first n elements only, and give zeros for the rest. Every operation is one
// instruction or a few; none depends on the rounding mode but `round_i32`, which rounds halves to even.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(QLM_ISA_AVX512VNNI)
#include "simd_avx512.h"
#elif defined(QLM_ISA_AVX2) || defined(QLM_ISA_AVXVNNI)
#include "simd_avx2.h"
#else
#include "simd_scalar.h"
#endif

namespace qlm {
namespace QLM_ISA {

// Four bytes to every lane.
static inline VI broadcast_4_bytes(const void *p) {
  int32_t word;
  memcpy(&word, p, 4);
  return set1_i32(word);
}

static inline int64_t min_i64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// W values of a float dtype, as float32.
static inline VF load_float(const void *p, int64_t index, int32_t dtype) {
  if (dtype == QLM_F32) return load_f32(static_cast<const float *>(p) + index);
  if (dtype == QLM_F16) return load_f16(static_cast<const uint16_t *>(p) + index);
  return load_bf16(static_cast<const uint16_t *>(p) + index);
}
static inline VF load_float_n(const void *p, int64_t index, int32_t dtype, int64_t n) {
  if (n >= W) return load_float(p, index, dtype);
  if (dtype == QLM_F32) return load_f32_n(static_cast<const float *>(p) + index, n);
  uint16_t half[W] = {};
  memcpy(half, static_cast<const uint16_t *>(p) + index, n * 2);
  return dtype == QLM_F16 ? load_f16(half) : load_bf16(half);
}

}  // namespace QLM_ISA
}  // namespace qlm
